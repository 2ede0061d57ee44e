"""Catalogues of clips: reading, building, labels and splits."""
