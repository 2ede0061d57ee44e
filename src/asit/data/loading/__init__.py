"""Samples and batches of a catalogue's clips."""
