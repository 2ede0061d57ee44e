"""Embeddings and tags of many recordings."""
