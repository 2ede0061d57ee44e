"""A page in the browser over a model, and the HTTP API behind it."""
