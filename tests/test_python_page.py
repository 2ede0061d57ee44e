"""The page on the Python door: its code runs, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder
from asit.settings import EncoderSettings, FrontEndSettings


def test_the_page_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2)
    encoder, head = Encoder(settings, 112, 32), Head(32, 3)
    front_end = FrontEndSettings(mels=32, mean=-6.0, std=3.0)
    labels = Labelling(("a", "b", "c"), False, "class", 1.0)
    AudioModel.from_parts(encoder, front_end, settings, 112, {}, head, labels).save(tmp_path / "RUN" / "model")
    rng = np.random.default_rng(0)
    for name, seconds in (("clip.wav", 2.5), ("a.wav", 0.3), ("b.flac", 1.0), ("an hour.flac", 30)):
        soundfile.write(tmp_path / name, 0.1 * rng.standard_normal(int(seconds * 16000)), 16000)
    monkeypatch.chdir(tmp_path)
    names = {"wave": rng.standard_normal(50_000).astype(np.float32)}
    blocks = re.findall(r"```python\n(.*?)```", (repository / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(block, names)
    heard, found = names["heard"], names["found"]
    assert heard.frames.shape == (len(heard.times), 32)
    torch.testing.assert_close(heard.clip, heard.frames.mean(0))
    assert found.map.shape[0] == 2
