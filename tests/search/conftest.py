"""A tiny encoder, recordings that differ, and an index of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from asit import runtime, search
from asit.config import EncoderSettings, FrontEndSettings
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder
from asit.search import Index

RATE = 8000
ENCODER = EncoderSettings(size="custom", width=24, depth=2, heads=2, patch_frames=8, patch_mels=32)
FRAMES = 40  # a view of 0.4 s


@pytest.fixture(autouse=True)
def float32_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What "auto" is differs between machines."""
    monkeypatch.setattr(runtime, "best_precision", lambda _: runtime.Precision("float32", "for tests"))


def make_model(seed: int = 0) -> AudioModel:
    encoder = Encoder(ENCODER, FRAMES, 32)
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(100 * seed + i))
    settings = FrontEndSettings(rate=RATE, mels=32, mean=-6.0, std=3.0)
    return AudioModel.from_parts(encoder, settings, ENCODER, FRAMES)


@pytest.fixture(scope="session")
def model() -> AudioModel:
    return make_model()


@pytest.fixture(scope="session")
def model_folder(model: AudioModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder)
    return folder


def sound(seconds: float, seed: int) -> np.ndarray:
    """Chirps in noise, other ones for each seed and each half second."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = rng.uniform(100, 3000, 1 + int(seconds / 0.5))[(t / 0.5).astype(int)]
    return (0.2 * np.sin(2 * np.pi * pitch * t) + 0.01 * rng.standard_normal(len(t))).astype(np.float32)


def write(path: Path, seconds: float, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound(seconds, seed), RATE, subtype="FLOAT")
    return path


def write_archive(folder: Path) -> Path:
    """Eight recordings of half a second, and one of 3 s."""
    for i in range(8):
        write(folder / f"{i}.wav", 0.5, i)
    write(folder / "long.wav", 3.0, 50)
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Recordings that a test may change."""
    return write_archive(tmp_path / "sounds")


@pytest.fixture
def made(archive: Path, model: AudioModel, tmp_path: Path) -> Index:
    """An index of the archive that a test may change."""
    search.build(model, [str(archive)], tmp_path / "index")
    return Index.read(tmp_path / "index")


@pytest.fixture(scope="session")
def index(model: AudioModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    """An index to look things up in; nothing may change it, nor the recordings in `sounds` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    search.build(
        model, [str(write_archive(folder / "sounds"))], folder / "index", search.IndexSettings(precision="float32")
    )
    return Index.read(folder / "index")


@pytest.fixture
def sounds(index: Index) -> Path:
    """The recordings of `index`."""
    return index.folder.parent / "sounds"


@pytest.fixture
def copied(index: Index, tmp_path: Path) -> Path:
    """The folder of a copy of `index`, to be altered."""
    return Path(shutil.copytree(index.folder, tmp_path / "index"))
