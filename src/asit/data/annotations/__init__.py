"""Annotations of parts of recordings: Raven, Audacity and Praat files to rows of a table."""
