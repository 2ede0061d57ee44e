"""The list of clips a run trains on: a few arrays in memory, a JSONL file on disk. `scan` beside this file makes one.

The file has a header and one line per clip. In memory two million clips fit, and loader processes share them.
"""

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

from asit.data.catalogue import tables
from asit.data.catalogue.columns import DAMAGE, SHARD, WORDS, Columns, Rows, ShardSpans, Words, decode, json_line
from asit.errors import CatalogueError
from asit.io import atomic, local_files, parsing, storage

VERSION = 3
"""Version of the file's layout; newer ones are refused. Version 2 added parts of files, folds and groups, version 3
clips in tar shards; a catalogue is written as the lowest version that suffices."""
LINES = 4096
"""Rows parsed together."""
INDEX = "index.jsonl"
"""Name of the catalogue beside the tar shards that it lists."""
INDEX_ROOT = "."
"""Root in such an index: the folder of the index itself."""

_VERSION_KEY = "asit_catalogue"


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording, or a part of one.

    Attributes:
        path: absolute; of a clip in a shard, the shard and the clip's name, for messages.
        seconds: length of the clip; single precision, so a clip of ten hours is known to 4 ms.
        rate: Hz, as in the file.
        channels: as in the file.
        label: text of the table; several labels are separated by ";".
        split: text of the table.
        sha256: of the file's bytes, in hex, if the catalogue was built with checksums.
        fold: text of the table: the clip's fold in a cross-validation.
        group: text of the table: what must not be in two splits, such as a speaker or a recording.
        start: s; where in the file the clip starts.
        shard: the tar file that holds the recording, absolute or a URL; None: the recording is a file.
        offset, size: of the recording in the shard, bytes.
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
        header: the first line of the file: root, clips, seconds, mean and std of the log-mel (natural log of power;
            None if not measured), front_end, statistics_clips, skipped (a count for each reason), ...
        root: folder that relative paths start from.
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
            _VERSION_KEY: newer if columns.spans is None else VERSION,
            **{key: value for key, value in header.items() if key != _VERSION_KEY},
            "root": root,
            "clips": len(columns.paths),
            "seconds": round(float(columns.seconds.sum(dtype=np.float64)), 3),
        }

    def __len__(self) -> int:
        return len(self._columns.paths)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} clips, {self.header['seconds'] / 3600:.2f} h, root={self.root!r})"

    def __getitem__(self, index: int) -> Clip:
        """Return the clip at ``index``; negative ones count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        index, columns = int(index) % len(self), self._columns
        words = {name: column[index] for name, column in columns.words.items()}
        name, shard = columns.paths[index], words.pop(SHARD, None)
        offset, size = (0, 0) if columns.spans is None else columns.spans[index].tolist()
        if shard is not None:
            name = f"{shard}/{name.removeprefix(shard + '/')}"
        return Clip(
            path=storage.join(self.root, name),
            seconds=float(self.seconds[index]),
            rate=int(self.rate[index]),
            channels=int(self.channels[index]),
            sha256=None if columns.sha256 is None else _hex(columns.sha256[index]),
            start=0.0 if columns.starts is None else float(columns.starts[index]),
            shard=None if shard is None else storage.join(self.root, shard),
            offset=offset,
            size=size,
            **words,
        )

    def column(self, name: str) -> Words | None:
        """Return the column "label", "split", "fold", "group" or "shard"; None if no clip has one."""
        return self._columns.words.get(name)

    def texts(self, name: str) -> npt.NDArray[np.object_]:
        """Return the texts of that column, (N,) objects; None for a clip without one."""
        column = self.column(name)
        return np.full(len(self), None, dtype=object) if column is None else column.all()

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """Each clip's label or None, (N,) objects."""
        return self.texts("label")

    @property
    def starts(self) -> npt.NDArray[np.float32]:
        """Where in its file each clip starts, s, (N,) float32."""
        starts = self._columns.starts
        return np.broadcast_to(np.float32(0), len(self)) if starts is None else starts

    @property
    def shards(self) -> ShardSpans | None:
        """Where the clips are in tar shards; None if all are files."""
        column, spans = self.column(SHARD), self._columns.spans
        if column is None or spans is None:
            return None
        return ShardSpans(tuple(storage.join(self.root, name) for name in column.words), column.codes, spans)

    def ids(self, rows: npt.ArrayLike | None = None) -> list[str]:
        """Name each clip (or those at ``rows``) independently of the root: relative path, and "@start" for a part."""
        indices = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64)
        names = [self._columns.paths[index] for index in indices.tolist()]
        if self._columns.starts is None:
            return names
        starts = self._columns.starts[indices]
        return [f"{name}@{_decimal(start):.10g}" if start else name for name, start in zip(names, starts, strict=True)]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the clips' relative paths, lengths and starts, in order.

        It does not change when data are moved, or packed into shards as they are; it does with other clips or audio.
        """
        paths, starts = self._columns.paths, self._columns.starts
        digest = hashlib.sha256(paths.ends.astype("<i8").tobytes())
        digest.update(paths.blob)
        digest.update(self.seconds.astype("<f4").tobytes())
        if starts is not None:
            digest.update(starts.astype("<f4").tobytes())
        if encoded := self.header.get("encoded"):
            digest.update(str(encoded).encode())
        return digest.hexdigest()

    def subset(self, indices: npt.ArrayLike) -> Catalogue:
        """Return the clips at ``indices`` (integers, or N booleans), in that order; mean and std are unchanged."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        return Catalogue(self.header, self.root, self._columns.take(np.arange(len(self))[chosen]))

    @classmethod
    def from_clips(
        cls, clips: Sequence[Clip], *, root: str | os.PathLike[str] | None = None, header: dict[str, Any] | None = None
    ) -> Catalogue:
        """Make a catalogue of known clips, in their order; no file is opened.

        `root` is the folder of relative paths, by default the deepest one that holds all clips; `header` has further
        entries, such as mean and std.
        """
        top = common_root(clips) if root is None else os.fspath(root)
        top = top if storage.is_url(top) else os.path.abspath(top)
        rows, names = Rows(), [field.name for field in dataclasses.fields(Clip)]

        def row(clip: Clip) -> dict[str, Any]:
            values = {name: getattr(clip, name) for name in names}
            if clip.shard is None:
                return values | {"path": relative(storage.absolute(clip.path), top)}
            inner = clip.path.removeprefix(clip.shard + "/")
            return values | {"path": inner, SHARD: relative(storage.absolute(clip.shard), top)}

        rows.extend(list(map(row, clips)))
        return cls({"mean": None, "std": None, **(header or {})}, top, rows.columns())

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, look: bool = True
    ) -> Catalogue:
        """Read a catalogue, or the index of tar shards, which is one.

        Args:
            path: the JSONL file, or its URL.
            root: where the recordings are now, if they moved; by default shards are beside their index.
            look: check that the first clip exists (checking all would take too long).

        Raises:
            CatalogueError: no such file, not a catalogue, a newer version, a damaged line (with its number), a
                truncated file, a clip listed twice, or data that moved.
            StoreError: a store that fails.
        """
        rows, name = Rows(), os.fspath(path)
        try:
            with io.BytesIO(storage.read(name)) if storage.is_url(name) else local_files.open_file(path) as lines:
                header = _header(path, lines.readline())
                number = 2
                while batch := list(islice(lines, LINES)):
                    _extend(rows, batch, path, number)
                    number += len(batch)
        except OSError as error:
            raise unreadable(path, error) from None
        if len(rows) != header["clips"]:
            found = f"{path} holds {len(rows)} clips, its header says {header['clips']}"
            raise CatalogueError(found, "a complete catalogue", "copy it again, or build it again with asit catalogue")
        columns = rows.columns()
        if len(twice := columns.duplicates()):  # concatenated catalogues could train on what they test
            raise CatalogueError(
                f"{path} lists {len(twice)} clips twice: {', '.join(columns.paths[row] for row in twice[:3].tolist())}",
                "each file, or part of a file, once",
                "build the catalogue again; several labels of one clip go together, separated by ';'",
            )
        top = os.fspath(header["root"] if root is None else root)
        if top == INDEX_ROOT:
            top = storage.parent(name)
        catalogue = cls(header, top if storage.is_url(top) else os.path.abspath(top), columns)
        first = (catalogue[0].shard or catalogue[0].path) if look and len(catalogue) else None
        if first is not None and not (storage.is_url(first) or os.path.exists(local_files.locate(first))):
            problem = f"{path} lists {first}, which does not exist"
            fix = "if they moved, give their new folder as root; otherwise build the catalogue again"
            raise CatalogueError(problem, f"the recordings under {catalogue.root}", fix)
        return catalogue

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSONL file atomically; an index beside its shards gets a relative root, so that both can move.

        Raises a CatalogueError where the file cannot be written.
        """
        with atomic_file(path) as file:
            beside = self._columns.spans is not None and storage.parent(os.fspath(path)) == self.root
            file.writelines(self.lines(INDEX_ROOT if beside else self.root))

    def lines(self, root: str) -> Iterator[bytes]:
        """Yield the lines of the JSONL file with this root in its header."""
        yield json_line({**self.header, "root": root})
        held = self._columns
        columns: dict[str, Iterable[Any]] = {"path": held.paths, "seconds": map(_decimal, self.seconds)}
        if held.starts is not None:
            columns["start"] = (_decimal(start) if start else None for start in held.starts)
        columns |= {"rate": self.rate.tolist(), "channels": self.channels.tolist()}
        columns |= {name: self.texts(name) for name in (*WORDS, SHARD) if name in held.words}
        if held.spans is not None:
            columns["offset"], columns["size"] = held.spans[:, 0].tolist(), held.spans[:, 1].tolist()
        if held.sha256 is not None:
            columns["sha256"] = map(_hex, held.sha256)
        for values in zip(*columns.values(), strict=True):
            row = zip(columns, values, strict=True)
            yield json_line({name: value for name, value in row if value is not None})


def common_root(clips: Sequence[Clip]) -> str:
    """Return the deepest folder that holds all clips, or their shards."""
    folders = {storage.parent(clip.shard or clip.path) for clip in clips}
    if any(map(storage.is_url, folders)):
        return folders.pop() if len(folders) == 1 else os.getcwd()
    try:
        return os.path.commonpath(folders) if folders else os.getcwd()
    except ValueError:  # on several drives
        return os.getcwd()


def relative(full: str, root: str) -> str:
    """Return the path below root, with "/"; outside it, the absolute path or URL."""
    separator = "/" if storage.is_url(root) else os.sep
    top = root if root.endswith(separator) else root + separator
    return full[len(top) :].replace(os.sep, "/") if full.startswith(top) else full


def _extend(rows: Rows, lines: Sequence[bytes], path: str | os.PathLike[str], number: int) -> None:
    """Add lines, of which the first has this number: together, and one by one to report which is damaged."""
    try:
        rows.extend(json.loads(decode(b"[" + b",".join(lines) + b"]")))
    except DAMAGE as error:
        if len(lines) > 1:
            for at, line in enumerate(lines):
                _extend(Rows(), [line], path, number + at)
        found = f"{path}, line {number}: damaged ({type(error).__name__}: {error})"
        expected = "an object with path, seconds, rate and channels"
        raise CatalogueError(found, expected, "build the catalogue again") from None


def _header(path: str | os.PathLike[str], line: bytes) -> dict[str, Any]:
    header, again = _parsed_header(line), "build the catalogue again: asit catalogue FOLDER --out c.jsonl"
    if header is None:
        raise CatalogueError(f"{path} is not a catalogue", f'a first line with "{_VERSION_KEY}"', again)
    version = header[_VERSION_KEY]
    if not isinstance(version, int) or version > VERSION:
        found = f"{path} is a catalogue of version {version}"
        raise CatalogueError(found, f"version {VERSION} or older", f"update asit, or {again}")
    if not isinstance(header.get("root"), str) or not isinstance(header.get("clips"), int):
        raise CatalogueError(f"{path}, line 1: no root or no count of clips", "a complete header", again)
    return header


def _parsed_header(line: bytes) -> dict[str, Any] | None:
    try:
        row = parsing.from_json(decode(line), surrogates=True)
    except ValueError:
        return None
    return row if isinstance(row, dict) and _VERSION_KEY in row else None


def is_catalogue(path: Path) -> bool:
    """Whether the file's first line is a catalogue's header."""
    try:
        with local_files.open_file(path) as file:
            return _parsed_header(file.readline()) is not None
    except (OSError, ValueError):
        return False


def _hex(sha256: npt.NDArray[np.uint8]) -> str | None:
    return sha256.tobytes().hex() if sha256.any() else None


def _decimal(value: np.float32) -> float:
    """Return the shortest decimal that gives the same float32 back."""
    return float(str(value))


@contextmanager
def writing(path: str | os.PathLike[str], fix: str = "free space or move it") -> Iterator[None]:
    """Report an OSError of the block as one of writing to `path`."""
    try:
        yield
    except OSError as error:
        found = f"{path} cannot be written: {error.strerror}"
        raise CatalogueError(found, "a writable folder with free space", fix) from None


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` atomically at the end of the block."""
    with writing(path), atomic.write_file(Path(path)) as draft, draft.open("wb") as file:
        yield file


def unreadable(path: str | os.PathLike[str], error: OSError) -> CatalogueError:
    """Make the error about a file or folder that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return CatalogueError(f"there is no {path}", "a file", "check the path" + tables.near(Path(path)))
    return CatalogueError(f"{path} cannot be read: {error.strerror}", "a readable file", "check its permissions")
