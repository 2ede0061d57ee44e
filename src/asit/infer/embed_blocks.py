"""The folder of finished blocks that `asit embed` keeps until the file is written, and from which it resumes.

A block is up to some hundred consecutive recordings. NUMBER.vectors has its vectors (float32, row after row),
NUMBER.json its recordings; it is written last, and a block without it is computed again. plan.json says what the blocks
are of. Of finished blocks one file is written, piece by piece and atomically: parquet, npz or CSV.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.audio.windowing import window_start
from asit.data.catalogue.inputs import Item
from asit.errors import ConfigError, missing_extra
from asit.io import atomic, parsing, storage
from asit.io.atomic import write_file, write_json
from asit.io.csv_lines import csv_line
from asit.training.block_rounds import block_ends

PLAN = "plan.json"
MOST_FILES, MOST_BYTES = 256, 1 << 26
"""Recordings, and bytes of their files, after which a block ends."""

EntryPart = tuple["Entry", int, int]
Vectors = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """The shape of a block's rows.

    Attributes:
        width: values of a vector.
        bands: rows for each column of time, one for each band of mel; 0: one row a recording or window, without times.
        first, hop: time of a recording's first column, and from one column to the next, in s.
        window: length of the windows that are columns then, s; 0: none.
    """

    width: int
    bands: int
    first: float
    hop: float
    window: float = 0.0

    @property
    def rows(self) -> int:
        """Rows for each column, or recording."""
        return max(1, self.bands)

    def times(self, entry: Entry, first: int, count: int) -> Times:
        """Return the times of `count` columns from the column `first` on, as `Embedding.times` has them, or the starts
        of windows, of which the last ends with the recording."""
        at: Times = self.first + np.arange(first, first + count, dtype=np.float64) * self.hop
        if not self.window:
            return at.astype(np.float32).astype(np.float64)
        if count and first + count == entry.columns:
            at[-1] = window_start(entry.columns - 1, entry.columns, entry.seconds, self.window, self.hop)
        return at


class Entry(NamedTuple):
    """A recording of a block that was read.

    Attributes:
        item: its index among all recordings.
        columns: of time, windows, or 1 where there is one row a recording.
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

    def finished(self, number: int) -> EmbeddedBlock | None:
        """Return a finished block; None where there is none."""
        try:
            found = parsing.from_json(self._file(number, "json").read_bytes())
            block = EmbeddedBlock([Entry(*one) for one in found["entries"]], [(at, why) for at, why in found["faults"]])
            fits = self._file(number, "vectors").stat().st_size == block.columns * self.column_bytes
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return block if fits else None

    def read(self, number: int, block: EmbeddedBlock, most: int) -> Iterator[tuple[list[EntryPart], Vectors]]:
        """Yield a finished block in pieces of about `most` bytes: (entry, its first column here, their number) and the
        vectors of each; a piece may be part of a recording."""
        step = max(1, most // self.column_bytes)
        bounds = np.cumsum([0] + [entry.columns for entry in block.entries]).tolist()
        for first in range(0, block.columns, step):
            end = min(first + step, block.columns)
            entries = [
                (entry, max(a, first) - a, min(b, end) - max(a, first))
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


Piece = tuple[Item, int, float]
SUFFIXES = (".parquet", ".npz", ".csv")
_PIECE = 1 << 26  # bytes of vectors in memory at a time, and in a row group


@dataclass(frozen=True)
class TableContents:
    """The contents of the file.

    Attributes:
        folder: of the blocks.
        blocks: all of them.
        items: all recordings; entries of blocks index them.
        about: for the file's metadata; JSON.
        spreadsheet: of CSV: guard names that a spreadsheet program would run as formulas.
    """

    folder: BlockFolder
    blocks: Sequence[EmbeddedBlock]
    items: Sequence[Item]
    about: Mapping[str, Any]
    spreadsheet: bool = False

    def pieces(self) -> Iterator[tuple[list[Piece], Vectors, Times]]:
        """Yield (recording, its columns here, its seconds), vectors (rows, width) and times of the rows."""
        layout = self.folder.layout
        for number, block in enumerate(self.blocks):
            for entries, vectors in self.folder.read(number, block, _PIECE):
                recordings = [(self.items[entry.item], count, entry.seconds) for entry, _, count in entries]
                times = [layout.times(*one) + self.items[one[0].item].start for one in entries]
                yield recordings, vectors, np.repeat(np.concatenate(times), layout.rows)

    def ends(self, recordings: Sequence[Piece], starts: Times) -> Times:
        """Return the ends of windows."""
        last = [np.full(count, item.start + seconds) for item, count, seconds in recordings]
        return np.minimum(starts + self.folder.layout.window, np.concatenate(last))


def check_out(out: Path, level: str) -> None:
    """Raise ConfigError for an unknown suffix, CSV for many rows a file, or parquet without pyarrow."""
    suffix = out.suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}", f"a name that ends in {', '.join(SUFFIXES)}", "rename it")
    if suffix == ".csv" and level != "clip":
        raise ConfigError(
            f"--out {out} with --level {level}", "CSV for --level clip alone", "write parquet or npz: it is far smaller"
        )
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise missing_extra(f"--out {out}", "pyarrow", "parquet") from None


def write(out: Path, contents: TableContents) -> None:
    """Write the file atomically; an older one is replaced."""
    kinds: dict[str, Callable[[Path, TableContents], None]] = {".parquet": _parquet, ".npz": _npz, ".csv": _csv}
    with atomic.write_file(out) as draft:
        kinds[out.suffix.lower()](draft, contents)


def _parquet(path: Path, contents: TableContents) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    layout = contents.folder.layout
    fields = [("path", pa.string())]
    if not layout.bands:
        fields += [("start", pa.float64()), ("end" if layout.window else "seconds", pa.float64())]
    else:
        fields.append(("time", pa.float64()))
        if layout.bands > 1:
            fields.append(("band", pa.int16()))
    fields.append(("vector", pa.list_(pa.float32(), layout.width)))
    schema = pa.schema(fields, metadata={"asit": json.dumps(dict(contents.about))})
    # Compression makes vectors no smaller; a dictionary makes names so.
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["path"]) as writer:
        for recordings, vectors, times in contents.pieces():
            names = [item.text for item, _, _ in recordings]
            columns = np.array([count for _, count, _ in recordings])
            codes = np.repeat(np.arange(len(names), dtype=np.int32), columns * layout.rows)
            found = {"path": pa.DictionaryArray.from_arrays(codes, names).cast(pa.string())}
            if layout.window:
                found |= {"start": pa.array(times), "end": pa.array(contents.ends(recordings, times))}
            elif not layout.bands:
                found["start"] = pa.array([item.start for item, _, _ in recordings], pa.float64())
                found["seconds"] = pa.array([seconds for _, _, seconds in recordings], pa.float64())
            else:
                found["time"] = pa.array(times)
                if layout.bands > 1:
                    found["band"] = pa.array(_bands(layout, len(vectors)))
            found["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), layout.width)
            writer.write_table(pa.table(found, schema=schema), row_group_size=len(vectors))


def _npz(path: Path, contents: TableContents) -> None:
    layout = contents.folder.layout
    entries = [entry for block in contents.blocks for entry in block.entries]
    ends = np.cumsum([0] + [entry.columns * layout.rows for entry in entries])
    small: dict[str, npt.NDArray[Any]] = {
        "paths": np.array([contents.items[entry.item].text for entry in entries]),
        "starts": np.array([contents.items[entry.item].start for entry in entries], np.float64),
        "seconds": np.array([entry.seconds for entry in entries], np.float64),
        "about": np.array(json.dumps(dict(contents.about))),
    }
    if layout.window:
        del small["seconds"]
        small["paths"] = np.repeat(small["paths"], np.diff(ends))
        parts = [(times, contents.ends(recordings, times)) for recordings, _, times in contents.pieces()]
        small["starts"], small["ends"] = map(np.concatenate, zip(*parts, strict=True))
    if layout.bands:
        small["offsets"] = ends
    rows = int(ends[-1])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in small.items():
            _stream(archive, name, array.shape, array.dtype, [array])
        _stream(archive, "vectors", (rows, layout.width), np.float32, (found for _, found, _ in contents.pieces()))
        if layout.bands:
            _stream(archive, "times", (rows,), np.float64, (found for *_, found in contents.pieces()))
        if layout.bands > 1:
            _stream(
                archive, "bands", (rows,), np.int16, (_bands(layout, len(found)) for _, found, _ in contents.pieces())
            )


def _bands(layout: Layout, rows: int) -> npt.NDArray[np.int16]:
    return np.tile(np.arange(layout.bands, dtype=np.int16), rows // layout.bands)


def _stream(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: npt.DTypeLike, pieces: Iterable[npt.NDArray[Any]]
) -> None:
    """Write an array of this shape, given in pieces, into the archive."""
    entry = zipfile.ZipInfo(f"{name}.npy")  # without the time of day, so that equal files are equal byte for byte
    with archive.open(entry, "w", force_zip64=True) as file:
        facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(kind)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, facts)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, kind).data)


def _csv(path: Path, contents: TableContents) -> None:
    layout = contents.folder.layout
    line = ",".join(["%.9g"] * layout.width)  # nine digits restore a float32
    known = ["path", "start", "end" if layout.window else "seconds"]
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_line([*known, *(f"v{i}" for i in range(layout.width))]) + "\n")
        for recordings, vectors, times in contents.pieces():
            names = [csv_line([item.text], spreadsheet=contents.spreadsheet) for item, *_ in recordings]
            facts = [f"{item.start:g},{seconds:.6f}" for item, _, seconds in recordings]
            if layout.window:
                names = np.repeat(names, [count for _, count, _ in recordings]).tolist()
                spans = zip(times, contents.ends(recordings, times), strict=True)
                facts = [f"{start:.6f},{end:.6f}" for start, end in spans]
            for name, fact, vector in zip(names, facts, vectors, strict=True):
                file.write(f"{name},{fact},{line % tuple(vector)}\n")
