"""Catalogues, loading, shards and downloads."""
