"""Miniatures of data sets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

Lay = Callable[..., None]


@pytest.fixture(scope="session")
def lay() -> Lay:
    """Writes a short recording to each path below a folder."""

    def write(root: Path, paths: Iterable[str], seconds: float = 0.1, silent: bool = False) -> None:
        wave = np.random.default_rng(0).normal(0, 0.0 if silent else 0.1, round(seconds * 16000)).clip(-1, 1)
        for path in paths:
            content = io.BytesIO()
            kind = {"flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}.get(path.rsplit(".", 1)[1], "WAV")
            soundfile.write(content, wave, 16000, format=kind)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content.getvalue())

    return write
