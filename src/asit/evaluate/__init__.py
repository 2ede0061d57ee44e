"""Scores of models: metrics with intervals, classifiers, probes of frozen features, verification."""
