"""Small models and recordings for the verbs that use a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit.model.audio_model import AudioModel
from asit.model.classifier import Labelling

CLASSES = ("dog", "rain", "نباح كلب", "a label that is rather long, as some of AudioSet's are")
SECONDS = 0.495  # of 48 frames
LOUDNESS = (0.0005, 0.005, 0.05, 0.25)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., AudioModel]) -> Path:
    """A folder with the models single and multi (classifiers) and encoder."""
    folder = tmp_path_factory.mktemp("models")
    training = {"method": "drawn", "license": "CC0-1.0", "data": "noise", "steps": 7}
    # No class is ahead of the others for every sound, so that labels come and go with loudness.
    waves = torch.randn(4, 7920, generator=torch.Generator().manual_seed(0)) * torch.tensor(LOUDNESS)[:, None]
    for name, multi in (("single", False), ("multi", True)):
        model = small_model(Labelling(CLASSES, multi, "mean", SECONDS), training)
        assert model.head is not None
        with torch.no_grad():
            model.head.linear.bias -= model.logits(model.input(waves)).mean(0)
        model.save(folder / name)
    small_model(training=training).save(folder / "encoder")
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recordings: short.wav (0.3 s), two.flac (stereo, 44.1 kHz), long.wav (21 s), and no.wav, none."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    soundfile.write(folder / "short.wav", rng.normal(0, 0.1, 4800), 16000)
    soundfile.write(folder / "two.flac", rng.normal(0, 0.1, (88200, 2)), 44100)
    loudness = np.repeat(rng.choice(LOUDNESS, 14), 24000)  # loud and quiet by turns
    soundfile.write(folder / "long.wav", loudness * rng.normal(0, 1.0, 14 * 24000).clip(-3, 3), 16000)
    (folder / "no.wav").write_bytes(b"<html>no such page</html>")
    return folder


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
