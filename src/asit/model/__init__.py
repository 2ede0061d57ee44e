"""The encoder, its classifier, and the model folder."""
