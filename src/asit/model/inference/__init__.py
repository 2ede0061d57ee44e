"""Embeddings and tags of recordings of any length."""
