"""Serve a model as a page in the browser and an HTTP API."""
