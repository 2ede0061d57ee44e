"""Facts of the files in before_move, and digests and command lines that tests/test_before_move.py compares them by.

The script that made the files ran once, by the package of commit 11ab9cc, and runs by no other; git finds it by
`git log -- tests/golden/make_before_move.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import scipy
import soundfile
import torch

MANY = 260
"""Recordings in `many`: more than the 256 of one block of `asit embed`, so that a stopped call keeps a block."""
MTIME = 1_700_000_000_000_000_000
"""Time of change of all recordings, ns: git keeps none, and feature caches, indexes and blocks depend on it."""
QUERY = "low-1.flac"
"""The recording whose neighbours, vectors and labels are kept."""


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on: versions of the libraries that compute, and the processor."""
    flags: set[str] = set()
    about: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = set(about.get("flags", "").split())
    kinds = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "soundfile": soundfile.__libsndfile_version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": " ".join(about.get(name, "?") for name in ("vendor_id", "cpu family", "model")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": {name: name in flags for name in kinds},
    }


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def last_state(run: Path) -> Path:
    """The tensors of a run's newest checkpoint."""
    return max((run / "checkpoints").iterdir()) / "state.safetensors"


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of training in metrics.jsonl, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    timed = ("clips_per_second", "data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == "train"]


def bits_of(run: Path) -> dict[str, str]:
    """Digests of a run's newest checkpoint and of the model that it leaves."""
    files = {"state": last_state(run), "model": run / "model" / "model.safetensors"}
    return {name: digest(safetensors.numpy.load_file(path)) for name, path in files.items()}


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a file."""
    return {name: list(value.shape) for name, value in sorted(safetensors.numpy.load_file(path).items())}


def set_times(place: Path) -> None:
    """Give the recordings their time of change."""
    for path in [*(place / "clips").iterdir(), *(place / "shards").glob("*.tar")]:
        os.utime(path, ns=(MTIME, MTIME))


def copy_many(place: Path) -> None:
    """Lay the copies of the recordings that `asit embed` was asked for."""
    clips = sorted((place / "clips").iterdir())
    (place / "many").mkdir()
    for i in range(MANY):
        copy = place / "many" / f"{i:03d}{clips[i % len(clips)].suffix}"
        shutil.copyfile(clips[i % len(clips)], copy)
        os.utime(copy, ns=(MTIME, MTIME))


def embed_arguments(inputs: str, out: str) -> list[str]:
    """The command line of `asit embed`, the same for the call that was stopped and for the one that goes on."""
    how = ["--precision", "float32", "--device", "cpu", "--threads", "1"]
    return ["embed", "encoder", inputs, "--out", out, *how]


def index_arguments(out: str) -> list[str]:
    """The command line of `asit index`."""
    how = ["--precision", "float32", "--device", "cpu", "--threads", "1"]
    return ["index", "encoder", "clips", "--out", out, *how]


def evaluate_arguments(cache: str, out: str) -> list[str]:
    """The command line of `asit evaluate` that fills the cache, or reads it."""
    how = ["--probe", "linear", "--pooling", "class+mean", "--device", "cpu", "--threads", "1"]
    return ["evaluate", "encoder", "--data", "table.csv", *how, "--cache", cache, "--out", out]
