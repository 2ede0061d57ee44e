"""Tar shards: packing, indexing and reading."""
