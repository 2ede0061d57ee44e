"""What `asit embed` keeps while it goes: a folder of finished blocks, from which a stopped call goes on.

A block is some hundred recordings that follow one another. Its vectors lie in NUMBER.vectors (float32, row after row),
the times of its columns in NUMBER.times (float64, s), what is known of its recordings in NUMBER.json, which is written
last: a block without it is made anew. PLAN says what the blocks are of.
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
        place: among all recordings.
        columns: of time, or 1 where there is one row a recording.
        seconds: its length.
    """

    place: int
    columns: int
    seconds: float


@dataclass
class Block:
    """What a finished block's JSON says.

    Attributes:
        entries: the recordings that were read, in order.
        faults: (place, reason) of the others.
    """

    entries: list[Entry] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)


class Parts:
    """The folder of blocks beside an output.

    Args:
        folder: may be absent; `begin` makes it.
        layout: of the rows.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout

    def begin(self, facts: dict[str, Any], ends: Sequence[int], overwrite: bool) -> dict[str, Any]:
        """Go on with the blocks of an earlier call, or make the folder.

        Args:
            facts: what the numbers follow from; an "auto" stands for whatever the earlier call resolved it to.
            ends: where blocks end.
            overwrite: delete blocks of another call.

        Returns:
            the facts, with what the earlier call resolved.

        Raises:
            ConfigError: the folder holds finished blocks that were made otherwise, or files that are no blocks.
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
                self._refuse(earlier, now, differ or ["sizes of the files"])
        if self.folder.exists():
            if plan is None and any(not _own(path.name) for path in self.folder.iterdir()):
                raise ConfigError(f"{self.folder} holds other files", "a name that is free", "give another --out")
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        return facts

    def settle(self, facts: dict[str, Any], ends: Sequence[int]) -> None:
        """Write the plan, all facts being known."""
        write_json(self.folder / PLAN, {"facts": facts, "ends": list(ends)})

    def done(self, number: int) -> Block | None:
        """A finished block; None where there is none."""
        try:
            found = parsing.from_json((self.folder / f"{number:06d}.json").read_bytes())
            block = Block([Entry(*entry) for entry in found["entries"]], [(at, why) for at, why in found["faults"]])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        columns = sum(entry.columns for entry in block.entries)
        sizes = {"vectors": columns * self.layout.rows * self.layout.width * 4}
        if self.layout.bands:
            sizes["times"] = columns * 8
        for kind, size in sizes.items():
            path = self._file(number, kind)
            if not path.is_file() or path.stat().st_size != size:
                return None
        return block

    def writer(self, number: int) -> Writer:
        """Writes a block, to be used in a `with`."""
        return Writer(self, number)

    def read(self, number: int, block: Block, most: int) -> Iterator[tuple[list[Entry], Vectors, Times]]:
        """A finished block, some `most` bytes of vectors at a time: the recordings' columns, vectors, times.

        Entries that come are parts of recordings: `columns` says how many columns of them are in this piece.
        """
        layout = self.layout
        step = max(1, most // (4 * layout.width * layout.rows))
        columns = sum(entry.columns for entry in block.entries)
        bounds = np.cumsum([0] + [entry.columns for entry in block.entries])
        for first in range(0, columns, step):
            end = min(first + step, columns)
            held = [
                Entry(entry.place, int(min(b, end) - max(a, first)), entry.seconds)
                for entry, (a, b) in zip(block.entries, pairwise(bounds.tolist()), strict=True)
                if a < end and b > first
            ]
            size = layout.rows * layout.width
            path = self._file(number, "vectors")
            vectors = np.fromfile(path, np.float32, (end - first) * size, offset=4 * first * size)
            times = np.empty(0, np.float64)
            if layout.bands:
                times = np.fromfile(self._file(number, "times"), np.float64, end - first, offset=8 * first)
            yield held, vectors.reshape(-1, layout.width), times

    def remove(self) -> None:
        """Delete the folder, the plan first, so that what is left of a killed delete is nobody's."""
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _plan(self) -> dict[str, Any] | None:
        try:
            found = parsing.from_json((self.folder / PLAN).read_bytes())
            return found if isinstance(found["facts"], dict) and isinstance(found["ends"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _refuse(self, earlier: dict[str, Any], now: dict[str, Any], differ: Sequence[str]) -> None:
        told = [
            f"{name}: {_short(earlier[name])} then, {_short(now[name])} now"
            if name in earlier and name in now
            else name
            for name in differ
        ]
        raise ConfigError(
            f"{self.folder} holds the beginning of another call:\n    " + "\n    ".join(told),
            "the same model, inputs and settings to go on with",
            "give the same command as then, or --overwrite to begin anew, or another --out",
        )


class Writer:
    """Writes one block's rows, recording after recording."""

    def __init__(self, parts: Parts, number: int) -> None:
        self.parts, self.number = parts, number
        self.block = Block()
        self._columns = 0
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        self._files: dict[str, BinaryIO] = {}
        for kind in ("vectors", "times") if self.parts.layout.bands else ("vectors",):
            draft = self._stack.enter_context(write_file(self.parts._file(self.number, kind)))
            self._files[kind] = self._stack.enter_context(draft.open("wb"))
        return self

    def add(self, vectors: Vectors, times: Times) -> None:
        """Rows of the recording at hand: (columns x rows, width), and its columns' times, (columns,) or none."""
        self._files["vectors"].write(np.ascontiguousarray(vectors, np.float32).data)
        if "times" in self._files:
            self._files["times"].write(np.ascontiguousarray(times, np.float64).data)
        self._columns += len(vectors) // self.parts.layout.rows

    def finish(self, place: int, seconds: float) -> None:
        """The recording is complete."""
        self.block.entries.append(Entry(place, self._columns, seconds))
        self._columns = 0

    def fail(self, place: int, reason: str) -> None:
        """The recording cannot be read: what came of it is taken back."""
        self.block.faults.append((place, reason))
        if self._columns:
            held = sum(entry.columns for entry in self.block.entries)
            layout = self.parts.layout
            sizes = {"vectors": 4 * layout.rows * layout.width, "times": 8}
            for kind, file in self._files.items():
                file.flush()
                file.truncate(held * sizes[kind])
                file.seek(0, os.SEEK_END)
        self._columns = 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)
        if error is None:
            entries = [[entry.place, entry.columns, entry.seconds] for entry in self.block.entries]
            facts = {"entries": entries, "faults": self.block.faults}
            write_json(self.parts.folder / f"{self.number:06d}.json", facts)


def block_ends(items: Sequence[Item]) -> tuple[list[int], list[tuple[int, int]]]:
    """Where blocks end, and each item's size in bytes and time of change in ns, or a number for its store's mark: they
    tell whether it is the same."""
    paths = list(dict.fromkeys(item.path for item in items))
    if any(map(storage.is_url, paths)):
        with ThreadPoolExecutor(16) as threads:  # an answer of a store takes long, whatever it says
            known = dict(zip(paths, threads.map(_stamp, paths), strict=True))
    else:
        known = dict(zip(paths, map(_stamp, paths), strict=True))
    ends, stamps, count, size = [], [], 0, 0
    for at, item in enumerate(items, 1):
        stamps.append(known[item.path])
        count, size = count + 1, size + (item.size if item.size is not None else known[item.path][0])
        if count == MOST_FILES or size >= MOST_BYTES or at == len(items):
            ends.append(at)
            count, size = 0, 0
    return ends, stamps


def _stamp(path: str) -> tuple[int, int]:
    try:
        return storage.fingerprint(path)
    except OSError:
        return 0, 0


def _own(name: str) -> bool:
    return bool(re.fullmatch(rf"\d{{6,}}\.(vectors|times|json)|\..+\.tmp|{re.escape(PLAN)}", name))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
