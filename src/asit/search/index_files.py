"""The files of an index, and the checks before any of them is used.

card.json describes the vectors, and has the SHA-256 of the other files: vectors.npy (N, D) float16 of length 1,
rows.npy (N,) of `ROW`, sources.jsonl (see `recordings`), failures.jsonl, and above `EXACT_MOST` rows graph.usearch (see
`hnsw`).

Letters: N rows, D width.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.errors import CheckpointError
from asit.evaluate.feature_readers import weights_digest
from asit.io import parsing
from asit.io.local_files import sha256
from asit.model.audio_model import AudioModel
from asit.search import recordings
from asit.search.embed_windows import POOLINGS
from asit.search.recordings import Source

KIND, FORMAT = "audio-index", 1
EXACT_MOST = 100_000
"""Rows up to which a search compares every row; times are in docs/speed.md."""
ROW = np.dtype([("file", "<u4"), ("start", "<f8"), ("end", "<f8")])
"""A row: index of its recording in sources.jsonl, start and end in s from the beginning of the file or tar member."""
CARD, VECTORS, ROWS = "card.json", "vectors.npy", "rows.npy"
SOURCES, FAILURES, GRAPH = "sources.jsonl", "failures.jsonl", "graph.usearch"
_BLOCK = 1 << 14  # rows that are checked together


def facts(model: AudioModel) -> dict[str, Any]:
    """Return all of a model that its vectors depend on; JSON."""
    return {
        "weights": weights_digest(model.encoder),
        "front end": model.front_end.settings.model_dump(mode="json"),
        "encoder": model.encoder.settings.model_dump(mode="json"),
        "grid": list(model.encoder.grid),
    }


def read_card(folder: Path) -> dict[str, Any]:
    """Return the card of an index, its types checked; raises CheckpointError where it is missing, damaged or newer."""
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


def read_files(folder: Path, card: dict[str, Any]) -> tuple[list[Source], npt.NDArray[Any], npt.NDArray[np.float16]]:
    """Return the recordings, rows (N,) and vectors (N, D) of an index; the vectors stay on the disk.

    Raises:
        CheckpointError: a file is missing, is not the one that the card was written with, or does not fit the others.
    """
    names = [VECTORS, ROWS, SOURCES, *([GRAPH] if GRAPH in card["sha256"] else [])]
    for name in names:
        if not (folder / name).is_file():
            raise damaged(folder, f"it has no {name}")
        if sha256(folder / name) != card["sha256"].get(name):
            raise damaged(folder / name, f"its SHA-256 is not the one in {CARD}")
    count = card["rows"]
    vectors = _array(folder / VECTORS, (count, card["width"]), np.dtype("<f2"))
    if not all(np.isfinite(vectors[at : at + _BLOCK]).all() for at in range(0, count, _BLOCK)):
        raise damaged(folder / VECTORS, "its numbers are not all finite")
    rows = np.array(_array(folder / ROWS, (count,), ROW))
    if (np.diff(rows["file"].astype(np.int64)) < 0).any():
        raise damaged(folder / ROWS, "its rows are out of order")
    try:
        with (folder / SOURCES).open("rb") as file:
            sources = [recordings.from_json(parsing.from_json(line, surrogates=True)) for line in file]
    except (OSError, ValueError) as error:
        raise damaged(folder / SOURCES, str(error)) from error
    if len(sources) != card["recordings"] or rows["file"].max() >= len(sources):
        raise damaged(folder / ROWS, f"it names recordings beyond the {len(sources)} of {SOURCES}")
    start, end = rows["start"], rows["end"]
    if not (np.isfinite(start) & np.isfinite(end) & (start <= end) & (start >= 0)).all():
        raise damaged(folder / ROWS, "its times are not times")
    return sources, rows, vectors


def damaged(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file that is not as it was written."""
    return CheckpointError(
        f"{path} is damaged: {reason}",
        "an index as `asit index` wrote it",
        "copy it again from where it was made, or rebuild it with `asit index --overwrite`",
    )


def _array(path: Path, shape: tuple[int, ...], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """Map an array that must have this shape and type."""
    try:
        found = parsing.npy(path)
    except parsing.Malformed as error:
        raise damaged(path, str(error)) from error
    if found.shape != shape or found.dtype != kind:
        raise damaged(path, f"it holds {found.dtype} of shape {found.shape}, not {kind} of shape {shape}")
    return found
