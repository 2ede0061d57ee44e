"""Self-supervised pretraining by ASiT."""
