"""A tiny study: twelve recordings to pretrain on, a labelled table with groups, settings of a second."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit.config import PretrainSettings
from asit.study.grids import Grid
from asit.study.study_plan import Request

RATE = 8000
TINY: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 4,
    "device": "cpu",
    "precision": "float32",
    "workers": 0,
    "threads": 1,
    "front_end": {"rate": RATE, "mels": 32, "mean": -8.0, "std": 3.5},
    "views": {"seconds": 0.4, "local_views": 1, "local_seconds": 0.2},
    "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 1, "patch_frames": 16, "patch_mels": 16},
    "heads": {"hidden": 16, "bottleneck": 8, "class_prototypes": 16, "patch_prototypes": 16},
    "records": {"figure_every": 0, "tensorboard": False},
}


def tone(path: Path, hertz: float, seed: int) -> None:
    rng, t = np.random.default_rng(seed), np.arange(RATE // 2) / RATE
    wave = 0.2 * np.sin(2 * np.pi * hertz * t) + 0.1 * rng.standard_normal(len(t))
    soundfile.write(path, wave.astype(np.float32), RATE, subtype="FLOAT")


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings without labels."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(12):
        tone(folder / f"{i:02d}.wav", 200.0 + 150 * i, i)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two classes over two folds."""
    folder = tmp_path_factory.mktemp("labelled")
    rows = []
    for i in range(16):
        tone(folder / f"{i:02d}.wav", (300.0, 1500.0)[i % 2], 100 + i)
        rows.append([f"{i:02d}.wav", ("low", "high")[i % 2], str(i // 2 % 2), f"g{i // 2}"])
    with (folder / "tones.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "fold", "group"], *rows])
    return folder / "tones.csv"


@pytest.fixture
def request_of(sounds: Path, labelled: Path) -> Callable[..., Request]:
    """`request_of(out, arms)`: a study of these arms; other fields of the request by name."""

    def make(out: Path, arms: dict[str, dict[str, Any]], **more: Any) -> Request:
        settings = PretrainSettings(data=str(sounds), out=str(out), **TINY | more.pop("settings", {}))
        return Request(
            grid=Grid("toy", "a test", arms, next(iter(arms))), base=settings, tables=(str(labelled),), **more
        )

    return make
