"""The list of clips a run learns from: held in memory, read and written in one go; `asit.data.scan` makes one.

A catalogue is a JSONL file: a header, then one line a clip. In memory it is a few arrays, so that two million
clips fit and loader processes share them.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH109, PTH110, PTH118, PTH120, PTH123

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from asit.data import tables
from asit.data.columns import Texts, Words, decode, encode, json_line
from asit.errors import CatalogueError

VERSION = 1
"""Version of the file's layout; a reader refuses a newer one."""
LINES = 4096
"""Rows that are taken in together."""

_MARK = "asit_catalogue"


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording, or a part of one.

    Attributes:
        path: absolute.
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

    def __init__(
        self,
        header: dict[str, Any],
        root: str,
        paths: Texts,
        seconds: npt.NDArray[np.float32],
        rate: npt.NDArray[np.int32],
        channels: npt.NDArray[np.int16],
        labels: Words | None,
        splits: Words | None,
        sha256: npt.NDArray[np.uint8] | None,
    ) -> None:
        self.root = root
        self.seconds, self.rate, self.channels = seconds, rate, channels
        self._paths, self._labels, self._splits, self._sha256 = paths, labels, splits, sha256
        self.header = {
            _MARK: VERSION,
            **{key: value for key, value in header.items() if key != _MARK},
            "root": root,
            "clips": len(paths),
            "seconds": round(float(seconds.sum(dtype=np.float64)), 3),
        }

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} clips, {self.header['seconds'] / 3600:.2f} h, root={self.root!r})"

    def __getitem__(self, index: int) -> Clip:
        """The clip at ``index``; negative ones count from the end."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        index = int(index) % len(self)
        return Clip(
            os.path.join(self.root, self._paths[index]),
            float(self.seconds[index]),
            int(self.rate[index]),
            int(self.channels[index]),
            self._labels[index] if self._labels else None,
            self._splits[index] if self._splits else None,
            _hex(self._sha256[index]) if self._sha256 is not None else None,
        )

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """Each clip's label or None, (N,) objects."""
        return self._labels.all() if self._labels else np.full(len(self), None, dtype=object)

    @property
    def splits(self) -> npt.NDArray[np.object_]:
        """Each clip's split or None, (N,) objects."""
        return self._splits.all() if self._splits else np.full(len(self), None, dtype=object)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the clips' relative paths and lengths, in order; moved data keep it, a changed list does not."""
        whole = hashlib.sha256(self._paths.ends.astype("<i8").tobytes())
        whole.update(self._paths.blob)
        whole.update(self.seconds.astype("<f4").tobytes())
        return whole.hexdigest()

    def subset(self, indices: npt.ArrayLike) -> Catalogue:
        """The clips at ``indices`` (integers, or N booleans), in that order; mean and std stay the whole's."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == np.bool_ else chosen.astype(np.int64)
        rows = np.arange(len(self))[chosen]
        return Catalogue(
            self.header,
            self.root,
            self._paths.take(rows),
            self.seconds[rows],
            self.rate[rows],
            self.channels[rows],
            self._labels.take(rows) if self._labels else None,
            self._splits.take(rows) if self._splits else None,
            self._sha256[rows] if self._sha256 is not None else None,
        )

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
        if root is None:
            folders = {os.path.dirname(os.path.abspath(clip.path)) for clip in clips}
            try:
                root = os.path.commonpath(folders) if folders else os.getcwd()
            except ValueError:  # on several drives
                root = os.getcwd()
        top = os.path.abspath(root)
        rows = Rows()
        rows.extend(
            [
                {
                    "path": relative(os.path.abspath(clip.path), top),
                    "seconds": clip.seconds,
                    "rate": clip.rate,
                    "channels": clip.channels,
                    "label": clip.label,
                    "split": clip.split,
                    "sha256": clip.sha256,
                }
                for clip in clips
            ]
        )
        return rows.catalogue({"mean": None, "std": None, **(header or {})}, top)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, *, look: bool = True
    ) -> Catalogue:
        """The catalogue in a file.

        Args:
            path: the JSONL file.
            root: where the recordings are now, if they moved.
            look: see whether the first clip is there (the others are not looked at, for there may be millions).

        Raises:
            CatalogueError: no such file, not a catalogue, a newer version, a damaged line (with its number), a
                file cut short, or data that moved.
        """
        rows = Rows()
        try:
            with open(path, "rb") as lines:
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
        catalogue = rows.catalogue(header, os.path.abspath(header["root"] if root is None else root))
        if look and len(catalogue) and not os.path.exists(catalogue[0].path):
            raise CatalogueError(
                f"{path} lists {catalogue[0].path}, which is not there",
                f"the recordings under {catalogue.root}",
                "if they moved, give their folder's new place as root; otherwise build the catalogue again",
            )
        return catalogue

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the JSONL file, whole or not at all.

        Raises:
            CatalogueError: the place cannot be written, or the disk is full.
        """
        with replacing(path) as file:
            file.write(json_line(self.header))
            columns: dict[str, Iterable[Any]] = {
                "path": self._paths,
                # The shortest decimal that gives the same float32 back.
                "seconds": (float(str(value)) for value in self.seconds),
                "rate": self.rate.tolist(),
                "channels": self.channels.tolist(),
                "label": self.labels,
                "split": self.splits,
                "sha256": map(_hex, self._sha256) if self._sha256 is not None else repeat(None, len(self)),
            }
            for values in zip(*columns.values(), strict=True):
                row = zip(columns, values, strict=True)
                file.write(json_line({name: value for name, value in row if value is not None}))


class Rows:
    """Columns that grow a batch of rows at a time."""

    def __init__(self) -> None:
        self.paths: list[Texts] = []
        self.numbers: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in ("seconds", "rate", "channels", "sha256")}
        self.codes: dict[str, list[npt.NDArray[np.int32]]] = {"label": [], "split": []}
        self.words: dict[str, dict[str, int]] = {"label": {}, "split": {}}
        self.summed = False
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, or raise one of DAMAGE and add none."""
        paths = Texts.pack(encode(row["path"]) for row in rows)
        seconds = np.array([row["seconds"] for row in rows], np.float32)
        rate = np.array([row["rate"] for row in rows], np.int32)
        channels = np.array([row["channels"] for row in rows], np.int16)
        if not (np.isfinite(seconds).all() and (seconds > 0).all() and (rate > 0).all() and (channels > 0).all()):
            raise ValueError("seconds, rate and channels must be above 0")
        hexes = [row.get("sha256") for row in rows]
        sha256 = np.broadcast_to(np.uint8(0), (len(rows), 32))  # costs no memory where there are none
        if any(hexes):
            sha256 = np.array([list(bytes.fromhex(text or "00" * 32)) for text in hexes], np.uint8).reshape(-1, 32)
        for key, words in self.words.items():
            texts = [row.get(key) for row in rows]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise ValueError(f"{key} must be text")
            codes = [-1 if text is None else words.setdefault(text, len(words)) for text in texts]
            self.codes[key].append(np.array(codes, np.int32))
        self.paths.append(paths)
        for key, values in (("seconds", seconds), ("rate", rate), ("channels", channels), ("sha256", sha256)):
            self.numbers[key].append(values)
        self.summed |= any(hexes)
        self.length += len(rows)

    def catalogue(self, header: dict[str, Any], root: str) -> Catalogue:
        """All rows so far; their relative paths count from root."""

        def joined(key: str, kind: type[np.generic]) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, kind), *self.numbers[key]])

        def column(key: str) -> Words | None:
            if not self.words[key]:
                return None
            return Words(np.concatenate(self.codes[key]), tuple(self.words[key]))

        return Catalogue(
            header,
            root,
            Texts.join(self.paths),
            joined("seconds", np.float32),
            joined("rate", np.int32),
            joined("channels", np.int16),
            column("label"),
            column("split"),
            np.concatenate(self.numbers["sha256"]) if self.summed else None,
        )


DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


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
        header = json.loads(line)
    except ValueError:
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
        with open(path, "rb") as file:
            return isinstance(row := json.loads(file.readline()), dict) and _MARK in row
    except (OSError, ValueError):
        return False


def _hex(sha256: npt.NDArray[np.uint8]) -> str | None:
    return sha256.tobytes().hex() if sha256.any() else None


def relative(full: str, root: str) -> str:
    """The path below root, with "/"; outside it, the absolute path."""
    top = root if root.endswith(os.sep) else root + os.sep
    return full[len(top) :].replace(os.sep, "/") if full.startswith(top) else full


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that takes its name only when all of it is on the disk."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except OSError as error:
        raise CatalogueError(
            f"{target} cannot be written: {error.strerror}",
            "a folder that can be written, with room",
            "free or change it",
        ) from None
    finally:
        draft.unlink(missing_ok=True)


def unreadable(path: str | os.PathLike[str], error: OSError) -> CatalogueError:
    """The error about a file or folder that cannot be opened."""
    if isinstance(error, FileNotFoundError):
        return CatalogueError(f"there is no {path}", "a file", "check the path" + tables.near(Path(path)))
    return CatalogueError(
        f"{path} cannot be read: {error.strerror}", "a readable file", "check the path and its rights"
    )
