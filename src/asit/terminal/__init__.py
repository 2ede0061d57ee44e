"""Command-line options and output."""
