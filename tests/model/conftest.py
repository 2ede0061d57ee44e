"""Small models in which every weight has an effect, sounds, and the comparison of embeddings."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from asit import runtime
from asit.config import EncoderSettings, FrontEndSettings
from asit.model.audio_model import AudioModel, Embedding
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder

FRAMES = 48  # 6 columns of 80 ms
COLUMN = 8 * 160  # samples
NEED = 47 * 160 + 400  # samples of 48 frames: 0.495 s
TINY = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
CLASSES = ("dog", "rain", "door")
M = TypeVar("M", bound=nn.Module)


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" is differs between machines."""
    monkeypatch.setattr(runtime, "best_precision", lambda _: runtime.Precision("float32", "for tests"))


def filled(module: M, std: float = 0.2, first: int = 0) -> M:
    """Draw all parameters, biases and norms too, the i-th with the seed `first` + i."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters(), first):
            parameter.normal_(0.0, std, generator=torch.Generator().manual_seed(i))
    return module


def make_model(
    settings: EncoderSettings = TINY, head: Head | None = None, labels: Labelling | None = None, **front_end: Any
) -> AudioModel:
    """A model of 32 mel bins and a view of `FRAMES`."""
    of_front_end = FrontEndSettings(**{"mels": 32, "mean": -6.0, "std": 3.0, **front_end})
    encoder = filled(Encoder(settings, FRAMES, 32))
    if head is not None:
        filled(head, first=len(list(encoder.parameters())))
    return AudioModel.from_parts(encoder, of_front_end, settings, FRAMES, {"steps": 7}, head, labels)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wave(samples: int, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """Chirps in noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    tone = sum(0.1 * np.sin(2 * np.pi * f * t * (1 + 0.1 * t)) for f in rng.uniform(100, 3000, 5))
    return (tone + 0.01 * rng.standard_normal(samples)).astype(np.float32)


def close(a: Embedding, b: Embedding, atol: float = 1e-5) -> None:
    """Assert that two embeddings are the same up to rounding."""
    assert a.grid == b.grid
    for name in ("clip", "frames", "patches", "times", "class_token"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=atol, rtol=atol, msg=lambda m, n=name: n + m)
