"""Settings that every kind of training has: what is written down, and how often."""

from __future__ import annotations

from asit.config.base import Count, Positive, Settings


class RecordSettings(Settings):
    """What is written down, and how often."""

    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    figure_every: Count = 500
    """Steps between figures of clean, corrupted, reconstructed and mask; 0: none."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 3
    """Checkpoints kept."""
    save_in_background: bool = True
    """Write checkpoints beside the steps, from copies of the tensors that take their memory once more; off: the steps
    wait until they are written."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
