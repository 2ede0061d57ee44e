"""The files of an index, and the checks before any of them is used.

card.json describes the vectors, and has the SHA-256 of the other files: vectors.npy (N, D) float16 of length 1,
rows.npy (N,) of `ROW`, sources.jsonl (the recordings, each a `Source`), failures.jsonl.

Letters: N rows, D width.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import Item
from asit.errors import CheckpointError
from asit.evaluate.feature_readers import weights_digest
from asit.io import parsing, storage
from asit.io.local_files import sha256
from asit.model.audio_model import AudioModel
from asit.model.inference.overlap import ClipPooling

POOLINGS: tuple[ClipPooling, ...] = get_args(ClipPooling)
KIND, FORMAT = "audio-index", 1
ROW = np.dtype([("file", "<u4"), ("start", "<f8"), ("end", "<f8")])
"""A row: index of its recording in sources.jsonl, start and end in s from the beginning of the file or tar member."""
CARD, VECTORS, ROWS = "card.json", "vectors.npy", "rows.npy"
SOURCES, FAILURES = "sources.jsonl", "failures.jsonl"
_BLOCK = 1 << 14  # rows that are checked together


class RecordingKey(NamedTuple):
    """What identifies a recording in an index."""

    path: str
    member: str | None
    start: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Source:
    """A recording, and the fingerprint of its file when it was read.

    Attributes:
        name: as the user gave it.
        path: its file, absolute, its folder without symbolic links.
        size: bytes of that file.
        modified: its time of change in ns.
        member, offset, length: of a recording in a tar shard: its name, and the range of its bytes.
        start, seconds: of a catalogue's clip: the part of the file.
        label: of a catalogue's clip or a table's row.
    """

    name: str
    path: str
    size: int
    modified: int
    member: str | None = None
    offset: int | None = None
    length: int | None = None
    start: float = 0.0
    seconds: float | None = None
    label: str | None = None

    @property
    def key(self) -> RecordingKey:
        """The same for the same recording, whether its file has changed or not."""
        return RecordingKey(self.path, self.member, self.start, self.seconds)

    @property
    def fingerprint(self) -> tuple[int, int]:
        """The same while the file is unchanged."""
        return self.size, self.modified

    def item(self) -> Item:
        """Return the recording as an input."""
        return Item(path=self.path, size=self.length, **{name: getattr(self, name) for name in _SHARED})


class Files:
    """Paths and fingerprints of files; each file is looked at once, however many recordings it holds."""

    def __init__(self) -> None:
        self._folder = cache(os.path.realpath)
        self.fingerprint = cache(storage.fingerprint)

    def path(self, path: str) -> str:
        """Return the absolute path, its folder without symbolic links; a URL as it is."""
        if storage.is_url(path):
            return path
        folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        return os.path.join(self._folder(folder), name)  # noqa: PTH118

    def source(self, item: Item) -> Source:
        """Return the recording with its file's fingerprint; errors are those of `storage.fingerprint`."""
        path = self.path(item.path)
        size, modified = self.fingerprint(path)
        shared = {name: getattr(item, name) for name in _SHARED}
        return Source(path=path, size=size, modified=modified, length=item.size, **shared)


_SHARED = ("name", "member", "offset", "start", "seconds", "label")
"""Fields that a `Source` and its `Item` both have."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Source)}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "path", "member", "label"), str),
    **dict.fromkeys(("size", "modified", "offset", "length"), int),
    **dict.fromkeys(("start", "seconds"), (int, float)),
}


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
    for name in (VECTORS, ROWS, SOURCES):
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
            sources = [source_of(parsing.from_json(line, surrogates=True)) for line in file]
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


def to_json(source: Source) -> dict[str, Any]:
    """Return a source as JSON, without fields at their defaults."""
    return {name: value for name, value in dataclasses.asdict(source).items() if value != _DEFAULTS[name]}


def source_of(value: Any) -> Source:
    """Return the source of its JSON; raises ValueError where it is something else."""
    if not isinstance(value, dict):
        raise ValueError("a line is no JSON object")
    for name, field in value.items():
        if name not in _TYPES or not isinstance(field, _TYPES[name]) or isinstance(field, bool):
            raise ValueError(f"a line has {name}: {field!r}"[:200])
    try:
        return Source(**value)
    except TypeError:
        raise ValueError(f"a line has only {', '.join(value)}"[:200]) from None
