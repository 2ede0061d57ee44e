"""The folder of finished blocks that `asit embed` keeps until the file is written, and from which it resumes.

A block is up to some hundred consecutive recordings. NUMBER.vectors has its vectors (float32, row after row),
NUMBER.json its recordings; it is written last, and a block without it is computed again. plan.json says what the blocks
are of.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
        first, hop: time of a recording's first column, and from one column to the next, in s.
    """

    width: int
    bands: int
    first: float
    hop: float

    @property
    def rows(self) -> int:
        """Rows for each column, or recording."""
        return max(1, self.bands)

    def times(self, first: int, count: int) -> Times:
        """Return the times of `count` columns from the column `first` on, as `Embedding.times` has them."""
        return (self.first + np.arange(first, first + count) * self.hop).astype(np.float32).astype(np.float64)


class Entry(NamedTuple):
    """A recording of a block that was read.

    Attributes:
        item: its index among all recordings.
        columns: of time, or 1 where there is one row a recording.
        seconds: its length.
    """

    item: int
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
        self.column_bytes = 4 * layout.rows * layout.width

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
            if not overwrite and any(path.name != PLAN for path in self.folder.glob("*.json")):
                lines = [f"{name}: {_short(earlier, name)} then, {_short(now, name)} now" for name in differ]
                raise ConfigError(
                    f"{self.folder} holds the beginning of another call:\n    "
                    + "\n    ".join(lines or ["sizes of the files"]),
                    "the same model, inputs and settings, to resume it",
                    "repeat that command, or pass --overwrite to start from scratch, or another --out",
                )
        if self.folder.exists():
            own = rf"\d{{6,}}\.(vectors|times|json)|\..+\.tmp|{re.escape(PLAN)}"
            if plan is None and any(not re.fullmatch(own, path.name) for path in self.folder.iterdir()):
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
            found = parsing.from_json(self._file(number, "json").read_bytes())
            block = EmbeddedBlock([Entry(*one) for one in found["entries"]], [(at, why) for at, why in found["faults"]])
            fits = self._file(number, "vectors").stat().st_size == block.columns * self.column_bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return block if fits else None

    def read(self, number: int, block: EmbeddedBlock, most: int) -> Iterator[tuple[list[tuple[Entry, int]], Vectors]]:
        """Yield a finished block in pieces of about `most` bytes: (entry, its first column) and the vectors of each.

        `columns` of an entry are those in the piece, which may be part of a recording.
        """
        step = max(1, most // self.column_bytes)
        bounds = np.cumsum([0] + [entry.columns for entry in block.entries]).tolist()
        for first in range(0, block.columns, step):
            end = min(first + step, block.columns)
            entries = [
                (entry._replace(columns=min(b, end) - max(a, first)), max(a, first) - a)
                for entry, (a, b) in zip(block.entries, pairwise(bounds), strict=True)
                if a < end and b > first
            ]
            values, offset = (end - first) * self.column_bytes // 4, first * self.column_bytes
            vectors = np.fromfile(self._file(number, "vectors"), np.float32, values, offset=offset)
            yield entries, vectors.reshape(-1, self.layout.width)

    def remove(self) -> None:
        """Delete the folder, the plan first, so that the rest of an interrupted delete belongs to no call."""
        (self.folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def writing(self, number: int) -> Iterator[BlockWriter]:
        """Write a block, which is finished when the context ends."""
        with write_file(self._file(number, "vectors")) as draft, draft.open("wb") as file:
            writer = BlockWriter(self, file)
            yield writer
        write_json(self._file(number, "json"), vars(writer.block))

    def _file(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:06d}.{kind}"

    def _plan(self) -> dict[str, Any] | None:
        try:
            found = parsing.from_json((self.folder / PLAN).read_bytes())
            return found if isinstance(found["facts"], dict) and isinstance(found["ends"], list) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


class BlockWriter:
    """Writes one block, recording after recording."""

    def __init__(self, folder: BlockFolder, file: BinaryIO) -> None:
        self.block = EmbeddedBlock()
        self._folder, self._file, self._columns = folder, file, 0

    def add(self, vectors: Vectors) -> None:
        """Add rows (columns x rows, width) of the current recording."""
        self._file.write(np.ascontiguousarray(vectors, np.float32).data)
        self._columns += len(vectors) // self._folder.layout.rows

    def finish(self, index: int, seconds: float) -> None:
        """End the current recording."""
        self.block.entries.append(Entry(index, self._columns, seconds))
        self._columns = 0

    def fail(self, index: int, reason: str) -> None:
        """End the current recording, which cannot be read, and remove its rows."""
        self.block.faults.append((index, reason))
        self._file.seek(self.block.columns * self._folder.column_bytes)
        self._file.truncate()
        self._columns = 0


def item_blocks(items: Sequence[Item]) -> tuple[list[int], list[tuple[int, int]]]:
    """Return where blocks end, and each item's fingerprint: the size of its file in bytes and its time of change in ns,
    or a number for the ETag of its object."""
    paths = list(dict.fromkeys(item.path for item in items))
    with ThreadPoolExecutor(16) as threads:  # each request to a store takes long
        run = threads.map if any(map(storage.is_url, paths)) else map
        known = dict(zip(paths, run(_fingerprint, paths), strict=True))
    sizes = (known[item.path][0] if item.size is None else item.size for item in items)
    return block_ends(sizes, MOST_FILES, MOST_BYTES), [known[item.path] for item in items]


def _fingerprint(path: str) -> tuple[int, int]:
    try:
        return storage.fingerprint(path)
    except OSError:
        return 0, 0


def _short(facts: dict[str, Any], name: str) -> str:
    text = str(facts[name]) if name in facts else "absent"
    return text if len(text) <= 24 else text[:12] + "..."
