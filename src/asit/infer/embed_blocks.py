"""The folder of finished blocks that `asit embed` keeps until the file is written, and from which it resumes.

A block is up to some hundred consecutive recordings. NUMBER.vectors has its vectors (float32, row after row),
NUMBER.times the times of its columns (float64, s), NUMBER.json its recordings; the last is written last, and a block
without it is computed again. plan.json says what the blocks are of.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import Item
from asit.errors import ConfigError
from asit.io import parsing, storage
from asit.io.atomic import write_file, write_json
from asit.training.block_rounds import block_ends

PLAN = "plan.json"
MOST_FILES, MOST_BYTES = 256, 1 << 26
"""Recordings, and bytes of their files, after which a block ends."""

Vectors = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """The shape of a block's rows.

    Attributes:
        width: values of a vector.
        bands: rows for each column of time, one for each band of mel; 0: one row a recording, without times.
    """

    width: int
    bands: int

    @property
    def rows(self) -> int:
        """Rows for each column, or recording."""
        return max(1, self.bands)


@dataclass(frozen=True)
class Entry:
    """A recording of a block that was read.

    Attributes:
        index: among all recordings.
        columns: of time, or 1 where there is one row a recording.
        seconds: its length.
    """

    index: int
    columns: int
    seconds: float


@dataclass
class EmbeddedBlock:
    """The recordings of a finished block: those that were read, in order, and (index, reason) of the others."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)

    @property
    def columns(self) -> int:
        """Columns of all recordings."""
        return sum(entry.columns for entry in self.entries)


class BlockFolder:
    """The folder of blocks beside an output; `begin` makes it."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout

    def begin(self, facts: dict[str, Any], ends: Sequence[int], overwrite: bool) -> dict[str, Any]:
        """Take over the blocks of an earlier call, or make the folder.

        Args:
            facts: all that the numbers depend on; "auto" matches whatever the earlier call resolved it to.
            ends: where blocks end.
            overwrite: delete the blocks of a different call.

        Returns:
            the facts, with what the earlier call resolved.

        Raises:
            ConfigError: the folder holds finished blocks of a different call, or files that are no blocks.
        """
        plan = self._plan()
        if plan is not None:
            earlier = plan["facts"]
            now = {name: earlier.get(name) if value == "auto" else value for name, value in facts.items()}
            differ = [name for name in {**now, **earlier} if now.get(name) != earlier.get(name)]
            if not differ and plan["ends"] == list(ends):
                return now
            begun = any(path.name != PLAN for path in self.folder.glob("*.json"))
            if begun and not overwrite:
                raise _other_call(self.folder, earlier, now, differ or ["sizes of the files"])
        if self.folder.exists():
            if plan is None and any(not _own(path.name) for path in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} holds other files", "a name that is free", "give another --out")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return facts

    def write_plan(self, facts: dict[str, Any], ends: Sequence[int]) -> None:
        """Write the plan, when all facts are resolved."""
        write_json(self.folder / PLAN, {"facts": facts, "ends": list(ends)})

    def finished(self, number: int) -> EmbeddedBlock | None:
        """Return a finished block; None where there is none."""
        try:
            found = parsing.from_json((self.folder / f"{number:06d}.json").read_bytes())
            block = EmbeddedBlock(
                [Entry(*entry) for entry in found["entries"]], [(at, why) for at, why in found["faults"]]
            )
            sizes = {kind: self.file(number, kind).stat().st_size for kind in self.bytes_per_column()}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        fits = sizes == {kind: block.columns * size for kind, size in self.bytes_per_column().items()}
        return block if fits else None

    def read(self, number: int, block: EmbeddedBlock, most: int) -> Iterator[tuple[list[Entry], Vectors, Times]]:
        """Yield a finished block in pieces of about `most` bytes of vectors: entries, vectors and times of each.

        `columns` of an entry are those in the piece, which may be part of a recording.
        """
        layout = self.layout
        step = max(1, most // self.bytes_per_column()["vectors"])
        bounds = np.cumsum([0] + [entry.columns for entry in block.entries]).tolist()
        for first in range(0, block.columns, step):
            end = min(first + step, block.columns)
            entries = [
                Entry(entry.index, min(b, end) - max(a, first), entry.seconds)
                for entry, (a, b) in zip(block.entries, pairwise(bounds), strict=True)
                if a < end and b > first
            ]
            size = layout.rows * layout.width
            vectors = np.fromfile(self.file(number, "vectors"), np.float32, (end - first) * size, "", 4 * first * size)
            times = np.empty(0, np.float64)
            if layout.bands:
                times = np.fromfile(self.file(number, "times"), np.float64, end - first, "", 8 * first)
            yield entries, vectors.reshape(-1, layout.width), times

    def remove(self) -> None:
        """Delete the folder, the plan first, so that the rest of an interrupted delete belongs to no call."""
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def file(self, number: int, kind: str) -> Path:
        """Return the path of a block's vectors or times."""
        return self.folder / f"{number:06d}.{kind}"

    def bytes_per_column(self) -> dict[str, int]:
        """Return the kinds of files of a block, and the bytes that each has for a column."""
        vectors = {"vectors": 4 * self.layout.rows * self.layout.width}
        return {**vectors, "times": 8} if self.layout.bands else vectors

    def _plan(self) -> dict[str, Any] | None:
        try:
            found = parsing.from_json((self.folder / PLAN).read_bytes())
            return found if isinstance(found["facts"], dict) and isinstance(found["ends"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class BlockWriter:
    """Writes one block, recording after recording; a context manager."""

    def __init__(self, folder: BlockFolder, number: int) -> None:
        self.folder, self.number, self.block = folder, number, EmbeddedBlock()
        self._columns = 0
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BlockWriter:
        for kind in self.folder.bytes_per_column():
            draft = self._stack.enter_context(write_file(self.folder.file(self.number, kind)))
            self._files[kind] = self._stack.enter_context(draft.open("wb"))
        return self

    def add(self, vectors: Vectors, times: Times) -> None:
        """Add rows (columns x rows, width) of the current recording, and its columns' times, (columns,) or none."""
        self._files["vectors"].write(np.ascontiguousarray(vectors, np.float32).data)
        if "times" in self._files:
            self._files["times"].write(np.ascontiguousarray(times, np.float64).data)
        self._columns += len(vectors) // self.folder.layout.rows

    def finish(self, index: int, seconds: float) -> None:
        """End the current recording."""
        self.block.entries.append(Entry(index, self._columns, seconds))
        self._columns = 0

    def fail(self, index: int, reason: str) -> None:
        """End the current recording, which cannot be read, and remove its rows."""
        self.block.faults.append((index, reason))
        if self._columns:
            for kind, size in self.folder.bytes_per_column().items():
                self._files[kind].flush()
                self._files[kind].truncate(self.block.columns * size)
                self._files[kind].seek(0, os.SEEK_END)
        self._columns = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        if error is None:
            entries = [[entry.index, entry.columns, entry.seconds] for entry in self.block.entries]
            write_json(self.folder.file(self.number, "json"), {"entries": entries, "faults": self.block.faults})


def item_blocks(items: Sequence[Item]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return where blocks end, and each item's fingerprint: the size of its file in bytes and its time of change in ns,
    or a number for the ETag of its object."""
    paths = list(dict.fromkeys(item.path for item in items))
    if any(map(storage.is_url, paths)):
        with ThreadPoolExecutor(16) as threads:  # each request takes long
            known = dict(zip(paths, threads.map(_fingerprint, paths), strict=True))
    else:
        known = dict(zip(paths, map(_fingerprint, paths), strict=True))
    sizes = (known[item.path][0] if item.size is None else item.size for item in items)
    return block_ends(sizes, MOST_FILES, MOST_BYTES), [known[item.path] for item in items]


def _fingerprint(path: str) -> tuple[int, int]:
    try:
        return storage.fingerprint(path)
    except OSError:
        return 0, 0


def _own(name: str) -> bool:
    return bool(re.fullmatch(rf"\d{{6,}}\.(vectors|times|json)|\..+\.tmp|{re.escape(PLAN)}", name))


def _other_call(folder: Path, earlier: dict[str, Any], now: dict[str, Any], differ: Sequence[str]) -> ConfigError:
    lines = [
        f"{name}: {_short(earlier[name])} then, {_short(now[name])} now" if name in earlier and name in now else name
        for name in differ
    ]
    return ConfigError(
        f"{folder} holds the beginning of another call:\n    " + "\n    ".join(lines),
        "the same model, inputs and settings, to resume it",
        "repeat that command, or pass --overwrite to start from scratch, or another --out",
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
