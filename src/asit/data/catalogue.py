"""The list of clips a run learns from: scanned once, checked, measured, and read back in one go.

A catalogue is a JSONL file: a header, then one line a clip. In memory it is a few arrays, so that two million
clips fit and loader processes share them. Torch is imported only while the mean and std are measured.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH109, PTH110, PTH116, PTH118, PTH120, PTH122, PTH123

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import math
import mmap
import multiprocessing
import os
import signal
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from multiprocessing import connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data import tables
from asit.errors import AudioError, CatalogueError
from asit.settings import FrontEndSettings

if TYPE_CHECKING:
    from asit.audio.fbank import FrontEnd

VERSION = 1
"""Version of the file's layout; a reader refuses a newer one."""
MEASURED_SECONDS = 10.0
"""At most this much of a file enters the mean and std."""

_MARK = "asit_catalogue"
_LINES = 4096  # lines parsed together while reading
_CHUNK = 32  # files handed to a worker at once
_WHOLE = 10_000  # fewer files than this are all looked at, so that the list of bad ones is complete


# ---------------------------------------------------------------------------------------------------------------
# the catalogue in memory


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording.

    Attributes:
        path: absolute.
        seconds: length; single precision, so a clip of ten hours is known to 4 ms.
        rate: Hz, as in the file.
        channels: as in the file.
        label: the table's text; several labels are parted by ";".
        split: the table's text.
        sha256: of the file's bytes, in hex, when the catalogue was built with checksums.
    """

    path: str
    seconds: float
    rate: int
    channels: int
    label: str | None = None
    split: str | None = None
    sha256: str | None = None


class _Texts:
    """Strings in one UTF-8 blob: no Python object for each, so forked loaders never copy the pages."""

    def __init__(self, blob: bytes, ends: npt.NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def pack(cls, texts: Iterable[bytes]) -> _Texts:
        blob, ends = bytearray(), []
        for text in texts:
            blob += text
            ends.append(len(blob))
        return cls(bytes(blob), np.array(ends, np.int64))

    @classmethod
    def join(cls, parts: Sequence[_Texts]) -> _Texts:
        starts = np.cumsum([0] + [len(part.blob) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(b"".join(part.blob for part in parts), np.concatenate([np.empty(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, index: int) -> bytes:
        return self.blob[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def __getitem__(self, index: int) -> str:
        return _decode(self.raw(index))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield _decode(self.blob[start:end])
            start = end

    def take(self, indices: npt.NDArray[np.int64]) -> _Texts:
        return _Texts.pack(self.raw(index) for index in indices.tolist())


class _Words:
    """A column of few distinct strings, or none: a code for each row."""

    def __init__(self, codes: npt.NDArray[np.int32], words: tuple[str, ...]) -> None:
        self.codes, self.words = codes, words

    def __getitem__(self, index: int) -> str | None:
        code = int(self.codes[index])
        return None if code < 0 else self.words[code]

    def all(self) -> npt.NDArray[np.object_]:
        # The last entry is what code -1 means.
        return np.array([*self.words, None], dtype=object)[self.codes]

    def take(self, indices: npt.NDArray[np.int64]) -> _Words:
        return _Words(self.codes[indices], self.words)


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
        paths: _Texts,
        seconds: npt.NDArray[np.float32],
        rate: npt.NDArray[np.int32],
        channels: npt.NDArray[np.int16],
        labels: _Words | None,
        splits: _Words | None,
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
        rows = _Rows()
        rows.extend(
            [
                {
                    "path": _relative(os.path.abspath(clip.path), top),
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
        rows = _Rows()
        try:
            with open(path, "rb") as lines:
                header = _header(path, lines.readline())
                number = 2
                while batch := list(islice(lines, _LINES)):
                    try:
                        rows.extend(json.loads(_decode(b"[" + b",".join(batch) + b"]")))
                    except _DAMAGE:
                        rows.extend([_row(path, number + i, line) for i, line in enumerate(batch)])
                    number += len(batch)
        except OSError as error:
            raise _unreadable(path, error) from None
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
        with _replacing(path) as file:
            file.write(_line(self.header))
            columns: list[Iterable[Any]] = [
                # The shortest decimal that gives the same float32 back.
                (float(str(value)) for value in self.seconds),
                self.rate.tolist(),
                self.channels.tolist(),
                self.labels,
                self.splits,
                map(_hex, self._sha256) if self._sha256 is not None else repeat(None, len(self)),
            ]
            for text, seconds, rate, channels, label, split, sha256 in zip(self._paths, *columns, strict=True):
                row = {"path": text, "seconds": seconds, "rate": rate, "channels": channels}
                if label is not None:
                    row["label"] = label
                if split is not None:
                    row["split"] = split
                if sha256 is not None:
                    row["sha256"] = sha256
                file.write(_line(row))


class _Rows:
    """Columns that grow a batch of rows at a time."""

    def __init__(self) -> None:
        self.paths: list[_Texts] = []
        self.numbers: dict[str, list[npt.NDArray[Any]]] = {key: [] for key in ("seconds", "rate", "channels", "sha256")}
        self.codes: dict[str, list[npt.NDArray[np.int32]]] = {"label": [], "split": []}
        self.words: dict[str, dict[str, int]] = {"label": {}, "split": {}}
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, or raise one of _DAMAGE and add none."""
        paths = _Texts.pack(_encode(row["path"]) for row in rows)
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
        self.length += len(rows)

    def catalogue(self, header: dict[str, Any], root: str) -> Catalogue:
        def joined(key: str, kind: type[np.generic]) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, kind), *self.numbers[key]])

        def column(key: str) -> _Words | None:
            if not self.words[key]:
                return None
            return _Words(np.concatenate(self.codes[key]), tuple(self.words[key]))

        sha256 = self.numbers["sha256"]
        summed = any(part.strides[0] for part in sha256)
        return Catalogue(
            header,
            root,
            _Texts.join(self.paths),
            joined("seconds", np.float32),
            joined("rate", np.int32),
            joined("channels", np.int16),
            column("label"),
            column("split"),
            np.concatenate(sha256) if summed else None,
        )


_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def _row(path: str | os.PathLike[str], number: int, line: bytes) -> dict[str, Any]:
    """One line parsed by itself, to say which is damaged."""
    try:
        row: dict[str, Any] = json.loads(_decode(line))
        _Rows().extend([row])
    except _DAMAGE as error:
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


def _hex(sha256: npt.NDArray[np.uint8]) -> str | None:
    return sha256.tobytes().hex() if sha256.any() else None


def _encode(text: str) -> bytes:
    # File names need not be UTF-8; surrogateescape brings any of them back as it was.
    return text.encode("utf-8", "surrogateescape")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _line(row: dict[str, Any]) -> bytes:
    return _encode(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def _relative(full: str, root: str) -> str:
    """The path below root, with "/"; outside it, the absolute path."""
    top = root if root.endswith(os.sep) else root + os.sep
    return full[len(top) :].replace(os.sep, "/") if full.startswith(top) else full


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
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


def _unreadable(path: str | os.PathLike[str], error: OSError) -> CatalogueError:
    if isinstance(error, FileNotFoundError):
        return CatalogueError(f"there is no {path}", "a file", "check the path" + tables.near(Path(path)))
    return CatalogueError(
        f"{path} cannot be read: {error.strerror}", "a readable file", "check the path and its rights"
    )


# ---------------------------------------------------------------------------------------------------------------
# building one


def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    front_end: FrontEndSettings,
    workers: int | Literal["auto"] = "auto",
    check: Literal["full", "header"] = "full",
    checksum: bool = False,
    bad_files: float = 0.1,
    statistics_clips: int = 2000,
    silence_db: float = -90.0,
    restart: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
    seed: int = 0,
) -> Catalogue:
    """Scan a folder or a table, leave out what cannot be used, measure the log-mel, and write ``out``.

    Beside ``c.jsonl`` stands ``c.skipped.jsonl``: each file left out, with its reason (missing, unreadable, empty,
    too short, truncated, non-finite, silent) and the detail. While it works, results go to ``c.jsonl.partial``; a
    scan that was stopped goes on from there, and its outcome is the same to the byte. Files found bad are looked
    at again, and so are files whose size or time of change differ.

    Args:
        source: a folder, searched through all its levels (hidden names left out), or a table
            (:func:`asit.data.tables.read_table`).
        out: the catalogue's path; an older catalogue there is replaced.
        front_end: decides the log-mel that mean and std are measured on.
        workers: processes; "auto": one for each CPU this process may use.
        check: "full" decodes every file, "header" only opens it.
        checksum: store the SHA-256 of each file.
        bad_files: largest share of unusable files.
        statistics_clips: files in the sample for mean and std, at most 10 s of each from a drawn position;
            0: not measured.
        silence_db: a file is silent when half the way from its lowest to its highest sample is below this, in dB of
            full scale (one step of 16 bits: -90.3 dB); a constant offset is silence.
        restart: throw away what an earlier scan left.
        progress: called with (files done, files in all, bad files).
        seed: of the sample and its positions.

    Raises:
        CatalogueError: nothing to list, too many bad files, or a place that cannot be written.
        KeyboardInterrupt: after Ctrl-C, saying how to go on; what was done is kept.
    """
    source, out = Path(source), Path(out)
    if not 0 <= bad_files <= 1 or statistics_clips < 0 or (workers != "auto" and workers < 1):
        raise CatalogueError(
            f"bad_files={bad_files}, statistics_clips={statistics_clips}, workers={workers}",
            "a share from 0 to 1, a count from 0, and 'auto' or at least 1 worker",
            "change them",
        )
    _refuse(source, out)
    listing = _list(source)
    plan = _Plan(listing.root, check, checksum, silence_db, seed, front_end)
    listing.draw(statistics_clips, seed)
    with _Partial(Path(f"{out}.partial"), plan.fingerprint(source, statistics_clips), listing, restart) as partial:
        todo = np.flatnonzero(partial.offsets < 0)
        total, bad = len(listing), 0
        processes = min(_cpus() if workers == "auto" else workers, max(1, len(todo) // 8))
        results = _scan(listing, todo, plan, processes)
        try:
            if progress:
                progress(total - len(todo), total, bad)
            for chunk in results:
                bad += partial.append(chunk)
                if progress:
                    progress(partial.done, total, bad)
                if total >= _WHOLE and bad > bad_files * total:
                    break
            else:
                assert partial.done == total, "the scan lost files"
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {partial.done} of {total} files; the same command goes on from {partial.path}"
            ) from None
        finally:
            results.close()
        rows, skipped, counts, sums = partial.collect(listing)
    if len(skipped) > bad_files * total or not len(rows):
        raise _too_many(source, len(rows) + len(skipped), skipped, counts, bad_files, partial.path)
    mean, std = sums.moments()
    header = {
        "mean": mean,
        "std": std,
        "statistics_clips": sums.clips,
        "front_end": plan.spectrum(),
        "check": check,
        "silence_db": silence_db,
        "seed": seed,
        "skipped": dict(sorted(counts.items())),
        "ignored": listing.ignored,
    }
    catalogue = rows.catalogue(header, listing.root)
    with _replacing(_beside(out)) as file:
        for row in skipped:
            file.write(_line(row))
    catalogue.write(out)
    partial.path.unlink()
    return catalogue


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a worker must know."""

    root: str
    check: str
    checksum: bool
    silence_db: float
    seed: int
    front_end: FrontEndSettings

    def spectrum(self) -> dict[str, Any]:
        """The settings that the mean and std hang on."""
        settings: dict[str, Any] = self.front_end.model_dump(mode="json", exclude={"mean", "std", "padding"})
        return settings

    def fingerprint(self, source: Path, statistics_clips: int) -> dict[str, Any]:
        """What must agree for an earlier scan's results to be of use."""
        return {
            "source": os.path.abspath(source),
            "check": self.check,
            "checksum": self.checksum,
            "silence_db": self.silence_db,
            "seed": self.seed,
            "statistics_clips": statistics_clips,
            "front_end": self.spectrum(),
        }


class _Listing:
    """The files to look at, in the catalogue's order."""

    def __init__(self, root: str, names: _Texts, labels: _Words | None, splits: _Words | None, ignored: dict[str, int]):
        self.root, self.names, self.labels, self.splits, self.ignored = root, names, labels, splits, ignored
        self.keys = np.empty(0, np.uint64)
        self.sampled = np.zeros(len(names), bool)

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, seed: int) -> None:
        """Give each file a number from its name and the seed; the smallest numbers are the sample.

        So a file's draw does not hang on which other files there are, nor on who looks at it.
        """
        self.keys = np.fromiter((_key(self.names.raw(index), seed) for index in range(len(self))), np.uint64, len(self))
        if count:
            self.sampled[np.argsort(self.keys, kind="stable")[:count]] = True


def _key(name: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, key=str(seed).encode()).digest(), "little")


def _refuse(source: Path, out: Path) -> None:
    """Errors that cost nothing to find."""
    if not source.exists():
        raise CatalogueError(
            f"there is no {source}", "a folder of recordings, or a table", "check the path" + tables.near(source)
        )
    if source.is_file():
        if source.suffix.lower() in files.SUFFIXES:
            raise CatalogueError(f"{source} is one recording", "a folder or a table", "give the folder it lies in")
        if _is_catalogue(source):
            raise CatalogueError(
                f"{source} is already a catalogue",
                "a folder of recordings, or a table",
                "use it as it is: asit pretrain takes it",
            )
    if out.is_dir():
        raise CatalogueError(f"{out} is a folder", "a file's name for the catalogue", f"write to {out / 'c.jsonl'}")
    if out.exists() and not _is_catalogue(out):
        raise CatalogueError(
            f"{out} exists and is not a catalogue", "a new name, or an older catalogue", "choose another name"
        )


def _is_catalogue(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return isinstance(row := json.loads(file.readline()), dict) and _MARK in row
    except (OSError, ValueError):
        return False


def _beside(out: Path) -> Path:
    return out.with_name((out.name[: -len(".jsonl")] if out.name.endswith(".jsonl") else out.name) + ".skipped.jsonl")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _list(source: Path) -> _Listing:
    if source.is_dir():
        return _walk(source)
    root = os.path.abspath(source.parent)
    codes: dict[str, list[int]] = {"label": [], "split": []}
    words: dict[str, dict[str, int]] = {"label": {}, "split": {}}

    def names() -> Iterator[bytes]:
        for row in tables.iterate_table(source):
            for key, text in (("label", row.label), ("split", row.split)):
                codes[key].append(-1 if text is None else words[key].setdefault(text, len(words[key])))
            yield _encode(_relative(row.path, root))

    packed = _Texts.pack(names())
    labels, splits = (
        _Words(np.array(codes[key], np.int32), tuple(words[key])) if words[key] else None for key in ("label", "split")
    )
    return _Listing(root, packed, labels, splits, {})


def _walk(folder: Path) -> _Listing:
    """All audio below a folder, in the order of the names; a folder that links reach again is entered once."""
    root = os.path.abspath(folder)
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()

    def below(prefix: str) -> Iterator[bytes]:
        place = os.path.join(root, prefix)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                listed = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            if not prefix:
                raise _unreadable(place, error) from None
            yield _encode(prefix)  # listed like a file, so that it is counted and its reason said
            return
        for name, is_folder in listed:
            if is_folder:
                yield from below(f"{prefix}/{name}" if prefix else name)
            elif (suffix := os.path.splitext(name)[1].lower()) in files.SUFFIXES:
                yield _encode(f"{prefix}/{name}" if prefix else name)
            else:
                others[suffix or "(no suffix)"] += 1

    names = _Texts.pack(below(""))
    if not len(names):
        if not others:
            raise CatalogueError(f"{folder} is empty", "recordings in it, or in folders below", "check the path")
        seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
        raise CatalogueError(
            f"{folder} holds no audio; {others.total()} files: {seen}",
            f"files that end in {', '.join(sorted(files.SUFFIXES))}",
            "check the path, or turn the recordings into one of these",
        )
    return _Listing(root, names, None, None, dict(sorted(others.items())))


# ---------------------------------------------------------------------------------------------------------------
# looking at files, in worker processes

_Task = tuple[int, str, int | None]  # place in the listing, name, and the key for the draw where it is sampled
_Result = tuple[int, bytes, bool]  # place in the listing, its line for the partial file, whether it is bad


class _Worker:
    """This process's part in a scan; set once, when the process starts."""

    plan: _Plan
    stopped: Any


def _start(plan: _Plan, stopped: Any) -> None:
    _Worker.plan, _Worker.stopped = plan, stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Decoders write to the standard error by themselves and would tear the progress line.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _look(tasks: list[_Task]) -> list[_Result]:
    plan, results = _Worker.plan, []
    for place, name, key in tasks:
        if _Worker.stopped.value:
            break
        path = os.path.join(plan.root, name)
        row: dict[str, Any] = {"path": name}
        try:
            row |= _inspect(path, plan, key)
        except files.AudioFileError as error:
            row |= {"reason": error.reason, "detail": error.found.replace(path, name)}
        except _Short as error:
            row |= {"reason": "too short", "detail": f"{name}: {error}"}
        except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
            # Whatever a decoder, the resampler or the disk comes up with: one file must not end a scan of millions.
            row |= {"reason": "unreadable", "detail": f"{name}: {type(error).__name__}: {error}".replace(path, name)}
        results.append((place, _line(row), "reason" in row))
    return results


class _Short(Exception):  # noqa: N818  (a verdict, not an error)
    """A file that holds no window of the front end."""


def _inspect(path: str, plan: _Plan, key: int | None) -> dict[str, Any]:
    """What the partial file says of a good file; a bad one raises."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise files.AudioFileError("missing", f"{path} does not exist") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise files.AudioFileError("unreadable", f"{path} is a pipe or a device")  # opening it could wait for ever
    settings = plan.front_end
    keep = None
    if plan.check == "header" or key is not None:
        info = files.probe(path)
        if key is not None:
            rng = np.random.default_rng([plan.seed, key])
            keep = (rng.uniform(0.0, max(0.0, info.seconds - MEASURED_SECONDS)), MEASURED_SECONDS)
    wave = None
    if plan.check == "full" or info.frames < 1:  # some headers say no length
        seen = files.inspect(path, keep=keep)
        info = seen.info
        _refuse_sound(seen, plan.silence_db)
        if keep:
            wave = files.resample(seen.wave, info.rate, settings.rate, settings.resampler)
    elif keep:
        wave = _part(path, keep[0], settings)
    if info.seconds * 1000 < settings.window_ms:
        raise _Short(f"{info.seconds * 1000:.1f} ms, and a window takes {settings.window_ms:g} ms")
    row: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"seconds": info.seconds, "rate": info.rate, "channels": info.channels}
    if plan.checksum:
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if wave is not None:
        row["sums"] = _sums(wave, plan)
    return row


def _refuse_sound(seen: files.Inspection, silence_db: float) -> None:
    fault = seen.fault
    if fault and fault.reason != "silent":
        raise fault
    swing = (seen.high - seen.low) / 2  # so that a constant offset is silence too
    if swing < 10 ** (silence_db / 20):
        level = f"{20 * math.log10(swing):.1f} dB" if swing else "nothing"
        raise files.AudioFileError("silent", f"{seen.info.path} swings by {level}, below {silence_db:g} dB")


def _part(path: str, start: float, settings: FrontEndSettings) -> npt.NDArray[np.float32]:
    try:
        return files.read(path, rate=settings.rate, start=start, seconds=MEASURED_SECONDS, resampler=settings.resampler)
    except files.AudioFileError:
        raise
    except AudioError:  # nothing there: the header's length was a guess
        return files.read(path, rate=settings.rate, seconds=MEASURED_SECONDS, resampler=settings.resampler)


@functools.lru_cache(maxsize=1)
def _front_end(settings: str) -> FrontEnd:
    import torch

    from asit.audio.fbank import FrontEnd

    # The workers share the CPUs, and sums must not hang on how many threads made them.
    torch.set_num_threads(1)
    return FrontEnd(FrontEndSettings.model_validate_json(settings))


def _sums(wave: npt.NDArray[np.float32], plan: _Plan) -> tuple[float, float, int]:
    """Sum, sum of squares and count of the log-mel values of a waveform at the front end's rate."""
    import torch

    from asit.audio.fbank import logmel_statistics

    front_end = _front_end(plan.front_end.model_dump_json())
    if len(wave) < front_end.window:  # the last sample of a window can fall to resampling
        return 0.0, 0.0, 0
    return logmel_statistics(front_end.fbank(torch.from_numpy(wave)[None]))


def _scan(listing: _Listing, todo: npt.NDArray[np.int64], plan: _Plan, workers: int) -> Generator[list[_Result]]:
    """What the files turn out to be, chunk by chunk as they come; a few chunks a worker are under way at a time."""
    if not len(todo):
        return
    # Fork shares what is imported; macOS and Windows cannot, and start afresh.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    if listing.sampled[todo].any() and context.get_start_method() == "fork":
        import asit.audio.fbank  # noqa: F401  (once here instead of once in each worker)

    stopped = context.RawValue(ctypes.c_bool, False)

    def pool(processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(plan, stopped))

    def tasks(places: npt.NDArray[np.int64]) -> list[_Task]:
        return [
            (place, listing.names[place], int(listing.keys[place]) if listing.sampled[place] else None)
            for place in places.tolist()
        ]

    size = min(_CHUNK, max(1, len(todo) // (8 * workers)))
    chunks = (tasks(todo[first : first + size]) for first in range(0, len(todo), size))
    waiting: dict[Future[list[_Result]], list[_Task]] = {}
    executor = pool(workers)
    try:
        while True:
            try:
                for chunk in islice(chunks, 4 * workers - len(waiting)):
                    try:
                        waiting[executor.submit(_look, chunk)] = chunk
                    except BrokenProcessPool:
                        waiting[Future()] = chunk  # so that it is not lost: all that wait are looked at below
                        raise
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    results = future.result()
                    del waiting[future]
                    yield results
            except BrokenProcessPool:
                executor.shutdown()
                suspects = [task for chunk in waiting.values() for task in chunk]
                waiting.clear()
                executor = pool(1)
                for task in suspects:
                    try:
                        results = executor.submit(_look, [task]).result()
                    except BrokenProcessPool:
                        detail = f"{task[1]}: the process that read it died; its decoder crashed, or memory ran out"
                        results = [(task[0], _line({"path": task[1], "reason": "unreadable", "detail": detail}), True)]
                        executor = pool(1)
                    yield results
                executor.shutdown()
                executor = pool(workers)
    finally:
        stopped.value = True
        executor.shutdown(cancel_futures=True)


class _Partial:
    """The file of results so far: a line for the plan, then one line a file, in the order they came.

    Only the place of each line is kept in memory. A torn last line, of a killed process, is cut off.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], listing: _Listing, restart: bool) -> None:
        self.path = path
        self.offsets = np.full(len(listing), -1, np.int64)
        self.done = 0
        first = _line({"asit_partial": VERSION, **fingerprint})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            end = 0 if restart or not path.exists() else self._load(first, listing)
            self.file = open(path, "r+b" if end else "wb")  # noqa: SIM115  (closed by __exit__)
            self.file.truncate(end)
            self.file.seek(end)
            if not end:
                self.file.write(first)
            self.end = self.file.tell()
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise self._unwritable(error) from None

    def _load(self, first: bytes, listing: _Listing) -> int:
        """Take over the results that still hold; the length of the file without a torn last line."""
        order = np.argsort(listing.keys)
        keys = listing.keys[order]
        with open(self.path, "rb") as lines:
            found = lines.readline()
            if not found.endswith(b"\n"):
                return 0
            self._agree(found, first)
            end = lines.tell()
            seed = json.loads(first)["seed"]
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                start, end = end, end + len(line)
                try:
                    row = json.loads(_decode(line))
                    name, stamp = row["path"], (row["size"], row["mtime_ns"])
                except _DAMAGE:
                    continue  # a bad file, or what a crash of the machine left: look again
                at = int(np.searchsorted(keys, np.uint64(_key(_encode(name), seed))))
                if "reason" in row or at == len(order) or listing.names[place := int(order[at])] != name:
                    continue
                try:
                    status = os.stat(os.path.join(listing.root, name))
                except OSError:
                    continue
                if stamp == (status.st_size, status.st_mtime_ns) and ("sums" in row or not listing.sampled[place]):
                    self.done += self.offsets[place] < 0
                    self.offsets[place] = start
        self.done = int(self.done)
        return end

    def _agree(self, found: bytes, first: bytes) -> None:
        wanted = json.loads(first)
        try:
            had = json.loads(found)
            names = [name for name in wanted if had.get(name) != wanted[name]]
        except (ValueError, AttributeError):
            had, names = {}, list(wanted)
        if names:
            told = ", ".join(f"{name} {json.dumps(had.get(name))}, now {json.dumps(wanted[name])}" for name in names)
            raise CatalogueError(
                f"{self.path} is from a scan with other settings: {told}",
                "the same settings, to go on from there",
                "use those settings again, or start afresh with restart=True (--restart)",
            )

    def append(self, results: list[_Result]) -> int:
        """Keep results; how many of them are bad."""
        try:
            for place, line, _ in results:
                self.done += int(self.offsets[place] < 0)
                self.offsets[place] = self.end
                self.end += len(line)
                self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        return sum(bad for *_, bad in results)

    def collect(self, listing: _Listing) -> tuple[_Rows, list[dict[str, str]], Counter[str], _Sums]:
        """Everything in the listing's order: clips, files left out, counts by reason, and the log-mel's sums."""
        rows, batch = _Rows(), []
        skipped: list[dict[str, str]] = []
        sums = _Sums()
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for place in np.flatnonzero(self.offsets >= 0).tolist():
                start = int(self.offsets[place])
                row = json.loads(_decode(lines[start : lines.find(b"\n", start)]))
                if "reason" in row:
                    skipped.append({name: row[name] for name in ("path", "reason", "detail")})
                    continue
                if "sums" in row:
                    sums.add(*row["sums"])
                row["label"] = listing.labels[place] if listing.labels else None
                row["split"] = listing.splits[place] if listing.splits else None
                batch.append(row)
                if len(batch) == _LINES:
                    rows.extend(batch)
                    batch = []
            rows.extend(batch)
        return rows, skipped, Counter(row["reason"] for row in skipped), sums

    def _unwritable(self, error: OSError) -> CatalogueError:
        return CatalogueError(
            f"{self.path} cannot be written: {error.strerror}",
            "a folder that can be written, with room",
            "free or change it; the same command then goes on where it stopped",
        )


@dataclass
class _Sums:
    """What mean and std are made of; float64 is ample for log-mel values, which lie within -16 and 20."""

    clips: int = 0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, total: float, squares: float, count: int) -> None:
        self.clips += 1
        self.count += count
        self.total += total
        self.squares += squares

    def moments(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of the population."""
        if not self.count:
            return None, None
        mean = self.total / self.count
        return mean, math.sqrt(max(0.0, self.squares / self.count - mean * mean))


def _too_many(
    source: Path, looked: int, skipped: list[dict[str, str]], counts: Counter[str], bad_files: float, partial: Path
) -> CatalogueError:
    bad = len(skipped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = "".join(f"\n    {row['reason']}: {row['detail']}" for row in skipped[:5])
    remedy = f"mend or remove them; {partial} lists each with its reason"
    if bad < looked:
        remedy += f"; or allow more: bad_files={math.ceil(100 * bad / looked) / 100} (--bad-files)"
    return CatalogueError(
        f"{bad} of the {looked} files looked at in {source} cannot be used: {reasons}{first}",
        f"a share of at most {bad_files:g}" if bad < looked else "at least one file that can be used",
        remedy,
    )
