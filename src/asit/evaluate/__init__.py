"""Metrics, probes and evaluation of encoders and classifiers."""
