"""Pooling against loops, and log-mel statistics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from asit.evaluate.feature_readers import log_mel_statistics, pool


def test_pool_against_loops() -> None:
    time, mel, width = 3, 2, 4
    generator = torch.Generator().manual_seed(0)
    cls, patches = torch.randn(5, width, generator=generator), torch.randn(5, time * mel, width, generator=generator)
    got = {kind: pool(cls, patches, (time, mel), kind).numpy() for kind in
           ("class", "mean", "class+mean", "time-mean", "mel-mean", "mean+std")}  # fmt: skip
    for r in range(5):
        token = {(t, m): patches[r, t * mel + m].numpy() for t in range(time) for m in range(mel)}
        every = np.stack(list(token.values()))
        expected = {
            "class": cls[r].numpy(),
            "mean": every.mean(0),
            "class+mean": np.concatenate([cls[r].numpy(), every.mean(0)]),
            "time-mean": np.concatenate([np.mean([token[t, m] for t in range(time)], 0) for m in range(mel)]),
            "mel-mean": np.concatenate([np.mean([token[t, m] for m in range(mel)], 0) for t in range(time)]),
            "mean+std": np.concatenate([every.mean(0), every.std(0)]),
        }
        for kind, vector in expected.items():
            np.testing.assert_allclose(got[kind][r], vector, atol=1e-6, err_msg=kind)


def test_log_mel_statistics_are_mean_and_deviation_over_time() -> None:
    front_end: Any = SimpleNamespace(fbank=lambda waveforms: waveforms.unflatten(1, (4, 3)))
    waveforms = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))
    got = log_mel_statistics(front_end, waveforms).numpy()
    logmel = waveforms.numpy().reshape(2, 4, 3)
    np.testing.assert_allclose(got, np.concatenate([logmel.mean(1), logmel.std(1)], 1), atol=1e-6)
