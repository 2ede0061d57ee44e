"""The list of clips a run trains on: held in memory, read and written in one go. `scan` beside this file makes one.

A catalogue is a JSONL file: a header, then one line a clip. In memory it is a few arrays, so that two million
clips fit and loader processes share them.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH110

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue import locations, tables
from asit.data.catalogue.columns import DAMAGE, SHARD, WORDS, Columns, Rows, Words, decode, json_line
from asit.data.catalogue.locations import relative as relative
from asit.errors import CatalogueError
from asit.io import atomic, local_files, parsing, storage

VERSION = 3
"""Version of the file's layout; a reader refuses a newer one. Version 2 has parts of files, folds and groups, version 3
clips in tar shards; a catalogue without them is written as the version that suffices."""
LINES = 4096
"""Rows that are taken in together."""

_MARK = "asit_catalogue"


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording, or a part of one.

    Attributes:
        path: absolute; of a clip in a shard, the shard and the clip's name, for people.
        seconds: length of the clip, not of its file where it is a part of it; single precision, so a clip of ten
            hours is known to 4 ms.
        rate: Hz, as in the file.
        channels: as in the file.
        label: the table's text; several labels are parted by ";".
        split: the table's text.
        sha256: of the file's bytes, in hex, when the catalogue was built with checksums.
        fold: the table's text: which fold of a cross-validation the clip lies in.
        group: the table's text: what must not lie on two sides of a split, such as a speaker or a recording.
        start: s; where in the file the clip starts.
        shard: the tar file that holds the recording, absolute or a URL; None: it is a file of its own.
        offset: bytes; where in the shard the recording begins.
        size: bytes of the recording in the shard.
    """

    path: str
    seconds: float
    rate: int
    channels: int
    label: str | None = None
    split: str | None = None
    sha256: str | None = None
    fold: str | None = None
    group: str | None = None
    start: float = 0.0
    shard: str | None = None
    offset: int = 0
    size: int = 0


class Catalogue:
    """Clips in columns; see :class:`Clip` for the units. Read only.

    Attributes:
        header: what the file's first line says: root, clips, seconds, mean and std of the log-mel (natural log of
            power; None when not measured), front_end, statistics_clips, skipped (a count for each reason), ...
        root: folder that relative paths count from.
        seconds: (N,) float32.
        rate: (N,) int32, Hz.
        channels: (N,) int16.
    """

    def __init__(self, header: dict[str, Any], root: str, columns: Columns) -> None:
        self.root = root
        self.seconds, self.rate, self.channels = columns.seconds, columns.rate, columns.channels
        self._columns = columns
        newer = 2 if columns.starts is not None or "fold" in columns.words or "group" in columns.words else 1
        self.header = {
            _MARK: newer if columns.spans is None else VERSION,
            **{key: value for key, value in header.items() if key != _MARK},
            "root": root,
            "clips": len(columns.paths),
            "seconds": round(float(columns.seconds.sum(dtype=np.float64)), 3),
        }

    def __len__(self) -> int:
        return len(self._columns.paths)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} clips, {self.header['seconds'] / 3600:.2f} h, root={self.root!r})"

    def __getitem__(self, index: int) -> Clip:
        """The clip at ``index``; negative ones count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        index, columns = int(index) % len(self), self._columns
        word = {name: column[index] for name, column in columns.words.items()}
        name, inside = columns.paths[index], word.get(SHARD)
        shard = None if inside is None else storage.join(self.root, inside)
        if shard is not None:
            assert inside is not None
            name = f"{shard}/{name.removeprefix(inside + '/')}"
        return Clip(
            storage.join(self.root, name) if shard is None else name,
            float(self.seconds[index]),
            int(self.rate[index]),
            int(self.channels[index]),
            word.get("label"),
            word.get("split"),
            None if columns.sha256 is None else _hex(columns.sha256[index]),
            word.get("fold"),
            word.get("group"),
            0.0 if columns.starts is None else float(columns.starts[index]),
            shard,
            *((0, 0) if columns.spans is None else columns.spans[index].tolist()),
        )

    def column(self, name: str) -> Words | None:
        """The column "label", "split", "fold", "group" or "shard" as codes and texts; None where no clip has one."""
        return self._columns.words.get(name)

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """Each clip's label or None, (N,) objects."""
        return self._texts("label")

    @property
    def splits(self) -> npt.NDArray[np.object_]:
        """Each clip's split or None, (N,) objects."""
        return self._texts("split")

    @property
    def folds(self) -> npt.NDArray[np.object_]:
        """Each clip's fold or None, (N,) objects."""
        return self._texts("fold")

    @property
    def groups(self) -> npt.NDArray[np.object_]:
        """Each clip's group or None, (N,) objects."""
        return self._texts("group")

    @property
    def starts(self) -> npt.NDArray[np.float32]:
        """Where in its file each clip starts, s, (N,) float32."""
        starts = self._columns.starts
        return np.broadcast_to(np.float32(0), len(self)) if starts is None else starts

    @property
    def shards(self) -> locations.Shards | None:
        """Where clips lie in tar shards; None where they are all files of their own."""
        column, spans = self.column(SHARD), self._columns.spans
        if column is None or spans is None:
            return None
        return locations.Shards(tuple(storage.join(self.root, name) for name in column.words), column.codes, spans)

    def ids(self, rows: npt.ArrayLike | None = None) -> list[str]:
        """A name for each clip that holds wherever the data lie: its path below the root, and "@start" for a part.

        Args:
            rows: places in the catalogue; None: all.
        """
        places = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        names = [self._columns.paths[place] for place in places.tolist()]
        if self._columns.starts is None:
            return names
        starts = self._columns.starts[places]
        return [f"{name}@{_decimal(start):.10g}" if start else name for name, start in zip(names, starts, strict=True)]

    def _texts(self, name: str) -> npt.NDArray[np.object_]:
        column = self.column(name)
        return np.full(len(self), None, dtype=object) if column is None else column.all()

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the clips' relative paths, lengths and starts, in order.

        Moved data keep it, and files packed as they were into shards; a changed list does not, nor other sound.
        """
        paths, starts = self._columns.paths, self._columns.starts
        whole = hashlib.sha256(paths.ends.astype("<i8").tobytes())
        whole.update(paths.blob)
        whole.update(self.seconds.astype("<f4").tobytes())
        if starts is not None:
            whole.update(starts.astype("<f4").tobytes())
        if encoded := self.header.get("encoded"):
            whole.update(str(encoded).encode())
        return whole.hexdigest()

    def subset(self, indices: npt.ArrayLike) -> Catalogue:
        """The clips at ``indices`` (integers, or N booleans), in that order; mean and std stay the whole's."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        rows = np.arange(len(self))[chosen]
        return Catalogue(self.header, self.root, self._columns.take(rows))

    @classmethod
    def from_clips(
        cls, clips: Sequence[Clip], *, root: str | os.PathLike[str] | None = None, header: dict[str, Any] | None = None
    ) -> Catalogue:
        """A catalogue of clips already known; nothing is opened.

        Args:
            clips: in the wanted order.
            root: folder for relative paths; by default the deepest one that holds all clips.
            header: further entries, such as mean and std.
        """
        top = locations.common(clips) if root is None else os.fspath(root)
        top = top if storage.is_url(top) else os.path.abspath(top)
        rows = Rows()
        names = [field.name for field in dataclasses.fields(Clip)]
        rows.extend([{name: getattr(clip, name) for name in names} | locations.placed(clip, top) for clip in clips])
        return cls({"mean": None, "std": None, **(header or {})}, top, rows.columns())

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, look: bool = True
    ) -> Catalogue:
        """The catalogue in a file, or the index of tar shards, which is one.

        Args:
            path: the JSONL file, or its URL.
            root: where the recordings are now, if they moved; shards lie beside their index unless this says otherwise.
            look: see whether the first clip is there (the others are not looked at, for there may be millions).

        Raises:
            CatalogueError: no such file, not a catalogue, a newer version, a damaged line (with its number), a
                file cut short, a clip that it lists twice, or data that moved.
            StoreError: a store that does not give it.
        """
        rows, name = Rows(), os.fspath(path)
        try:
            with io.BytesIO(storage.read(name)) if storage.is_url(name) else local_files.open_file(path) as lines:
                header = _header(path, lines.readline())
                number = 2
                while batch := list(islice(lines, LINES)):
                    try:
                        rows.extend(json.loads(decode(b"[" + b",".join(batch) + b"]")))
                    except DAMAGE:
                        rows.extend([_row(path, number + i, line) for i, line in enumerate(batch)])
                    number += len(batch)
        except OSError as error:
            raise unreadable(path, error) from None
        if len(rows) != header["clips"]:
            raise CatalogueError(
                f"{path} holds {len(rows)} clips, its header says {header['clips']}",
                "a whole catalogue",
                "copy it again, or build it again with asit catalogue",
            )
        columns = rows.columns()
        if len(twice := columns.duplicates()):  # two catalogues put together could train on what they test
            raise CatalogueError(
                f"{path} lists {len(twice)} clips twice: {', '.join(columns.paths[row] for row in twice[:3].tolist())}",
                "each file, or part of a file, once",
                "build the catalogue again; several labels of one clip go together, parted by ';'",
            )
        top = os.fspath(header["root"] if root is None else root)
        if top == locations.HERE:
            top = storage.parent(name)
        catalogue = cls(header, top if storage.is_url(top) else os.path.abspath(top), columns)
        first = (catalogue[0].shard or catalogue[0].path) if look and len(catalogue) else None
        if first is not None and not (storage.is_url(first) or os.path.exists(local_files.locate(first))):
            raise CatalogueError(
                f"{path} lists {first}, which is not there",
                f"the recordings under {catalogue.root}",
                "if they moved, give their folder's new place as root; otherwise build the catalogue again",
            )
        return catalogue

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSONL file, whole or not at all.

        Beside the shards that it lists it says only that they lie there, so that all may be moved together.

        Raises:
            CatalogueError: the place cannot be written, or the disk is full.
        """
        with replacing(path) as file:
            beside = self._columns.spans is not None and storage.parent(os.fspath(path)) == self.root
            file.writelines(self.lines(locations.HERE if beside else self.root))

    def lines(self, root: str) -> Iterator[bytes]:
        """The lines of the JSONL file, its header's root being `root`."""
        yield json_line({**self.header, "root": root})
        held = self._columns
        columns: dict[str, Iterable[Any]] = {"path": held.paths, "seconds": map(_decimal, self.seconds)}
        if held.starts is not None:
            columns["start"] = (_decimal(start) if start else None for start in held.starts)
        columns |= {"rate": self.rate.tolist(), "channels": self.channels.tolist()}
        columns |= {name: self._texts(name) for name in (*WORDS, SHARD) if name in held.words}
        if held.spans is not None:
            columns["offset"], columns["size"] = held.spans[:, 0].tolist(), held.spans[:, 1].tolist()
        if held.sha256 is not None:
            columns["sha256"] = map(_hex, held.sha256)
        for values in zip(*columns.values(), strict=True):
            row = zip(columns, values, strict=True)
            yield json_line({name: value for name, value in row if value is not None})


def _row(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    """One line parsed by itself, to say which is damaged."""
    try:
        row: dict[str, Any] = json.loads(decode(line))
        Rows().extend([row])
    except DAMAGE as error:
        raise CatalogueError(
            f"{path}, line {number}: damaged ({type(error).__name__}: {error})",
            "an object with path, seconds, rate and channels",
            "build the catalogue again",
        ) from None
    return row


def _header(path: str | os.PathLike[str], line: bytes) -> dict[str, Any]:
    try:
        header = parsing.from_json(decode(line), surrogates=True)
    except parsing.Malformed:
        header = None
    if not isinstance(header, dict) or _MARK not in header:
        raise CatalogueError(
            f"{path} is not a catalogue",
            f'a first line with "{_MARK}"',
            "make one with: asit catalogue FOLDER --out c.jsonl",
        )
    if not isinstance(header[_MARK], int) or header[_MARK] > VERSION:
        raise CatalogueError(
            f"{path} is a catalogue of version {header[_MARK]}",
            f"version {VERSION} or older",
            "update asit, or build the catalogue again with this one",
        )
    if not isinstance(header.get("root"), str) or not isinstance(header.get("clips"), int):
        raise CatalogueError(f"{path}, line 1: no root or no count of clips", "a whole header", "build it again")
    return header


def is_catalogue(path: Path) -> bool:
    """Whether the file's first line is a catalogue's header."""
    try:
        with local_files.open_file(path) as file:
            return isinstance(row := parsing.from_json(decode(file.readline()), surrogates=True), dict) and _MARK in row
    except (OSError, ValueError):
        return False


def _hex(sha256: npt.NDArray[np.uint8]) -> str | None:
    return sha256.tobytes().hex() if sha256.any() else None


def _decimal(value: np.float32) -> float:
    """The shortest decimal that gives the same float32 back."""
    return float(str(value))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes its name only when all of it is on the disk."""
    target = Path(path)
    try:
        with atomic.write_file(target) as draft, draft.open("wb") as file:
            yield file
    except OSError as error:
        raise CatalogueError(
            f"{target} cannot be written: {error.strerror}",
            "a folder that can be written, with room",
            "free or change it",
        ) from None


def unreadable(path: str | os.PathLike[str], error: OSError) -> CatalogueError:
    """The error about a file or folder that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return CatalogueError(f"there is no {path}", "a file", "check the path" + tables.near(Path(path)))
    return CatalogueError(
        f"{path} cannot be read: {error.strerror}", "a readable file", "check the path and its rights"
    )
