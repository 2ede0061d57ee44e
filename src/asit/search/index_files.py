"""The folder of an index: its files, its card, and what is checked before any of them is believed.

card.json says what the vectors are, and has the SHA-256 of the other files: vectors.npy (N, D) float16 of length 1,
rows.npy and sources.jsonl (see `table`), failures.jsonl, and above `EXACT_MOST` rows graph.usearch (see `graph`).

Letters: N rows, D width.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.errors import CheckpointError
from asit.evaluate.feature_readers import weights_digest
from asit.io import parsing
from asit.model.audio_model import AudioModel
from asit.search.window_layout import POOLINGS

KIND, FORMAT = "audio-index", 1
EXACT_MOST = 100_000
"""Rows up to which each is compared: docs/search.md has the times."""
CARD, VECTORS, ROWS, SOURCES, FAILURES, GRAPH = (
    "card.json",
    "vectors.npy",
    "rows.npy",
    "sources.jsonl",
    "failures.jsonl",
    "graph.usearch",
)


def facts(model: AudioModel) -> dict[str, Any]:
    """All of a model that its vectors depend on; JSON."""
    return {
        "weights": weights_digest(model.encoder),
        "front end": model.front_end.settings.model_dump(mode="json"),
        "encoder": model.encoder.settings.model_dump(mode="json"),
        "grid": list(model.encoder.grid),
    }


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an index, with the types that the rest relies on.

    Raises:
        CheckpointError: there is none, or it is damaged or newer.
    """
    path = folder / CARD
    if not path.is_file():
        there = "does not exist" if not folder.exists() else f"has no {CARD}"
        raise CheckpointError(f"{folder} {there}", "an index, as `asit index` writes it", "give its folder")
    try:
        card = parsing.from_json(path.read_bytes())
    except (OSError, parsing.Malformed) as error:
        raise damaged(path, str(error)) from error
    if not isinstance(card, dict) or card.get("kind") != KIND:
        kind = card.get("kind") if isinstance(card, dict) else None
        raise CheckpointError(
            f"{folder} is no index: its {CARD} says kind {kind!r}",
            "an index, as `asit index` writes it",
            "give the index; a model folder goes by --model",
        )
    if not isinstance(card.get("format"), int) or card["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} has format {card.get('format')!r}, written by asit {card.get('asit')}",
            f"format {FORMAT} or older",
            "upgrade asit: pip install --upgrade asit-audio",
        )
    fits = (
        all(isinstance(card.get(name), int) and 0 < card[name] < 1 << 32 for name in ("rows", "width", "recordings"))
        and card.get("pooling") in POOLINGS
        and all(isinstance(card.get(name), int | float) and 0 < card[name] < math.inf for name in ("window", "hop"))
        and isinstance(card.get("model"), dict)
        and isinstance(card["model"].get("path"), str | None)
        and (card.get("layer") is None or isinstance(card["layer"], int))
        and card.get("precision") in ("float32", "bf16")
        and isinstance(card.get("sha256"), dict)
    )
    if not fits:
        raise damaged(path, "its fields are not those of an index")
    return card


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder: Path, card: dict[str, Any], names: list[str]) -> None:
    """Refuse files that are missing, or not those that the card was written with."""
    for name in names:
        if not (folder / name).is_file():
            raise damaged(folder, f"it has no {name}")
        if sha256(folder / name) != card["sha256"].get(name):
            raise damaged(folder / name, f"its SHA-256 is not the one in {CARD}")


def read_array(path: Path, shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array of the index, left on the disk, of the shape and type that the card promises."""
    try:
        found = parsing.npy(path)
    except parsing.Malformed as error:
        raise damaged(path, str(error)) from error
    if found.shape != shape or found.dtype != kind:
        raise damaged(path, f"it holds {found.dtype} of shape {found.shape}, not {kind} of shape {shape}")
    return found


def damaged(path: Path, reason: str) -> CheckpointError:
    """What is told of a file that is not as it was written."""
    return CheckpointError(
        f"{path} is damaged: {reason}",
        "an index as `asit index` wrote it",
        "copy it again from where it was made, or make it anew with `asit index --overwrite`",
    )
