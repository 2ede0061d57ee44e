"""Finished blocks of `asit embed` to one file: parquet, npz or CSV, written piece by piece and atomically."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import Item
from asit.errors import ConfigError
from asit.infer.embed_blocks import BlockFolder, EmbeddedBlock, Layout, Times, Vectors
from asit.io import atomic
from asit.io.csv_lines import csv_line

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

    def pieces(self) -> Iterator[tuple[list[tuple[Item, int, float]], Vectors, Times]]:
        """Yield (recording, its columns here, its seconds), vectors (rows, width) and times of the rows."""
        layout = self.folder.layout
        for number, block in enumerate(self.blocks):
            for entries, vectors in self.folder.read(number, block, _PIECE):
                recordings = [(self.items[entry.item], entry.columns, entry.seconds) for entry, _ in entries]
                times = [layout.times(first, entry.columns) + self.items[entry.item].start for entry, first in entries]
                yield recordings, vectors, np.repeat(np.concatenate(times), layout.rows)


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
            raise ConfigError(
                f"--out {out} needs pyarrow, which is not installed",
                "the extra parquet",
                "pip install 'asit-audio[parquet]', or write .npz or .csv",
            ) from None


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
        fields += [("start", pa.float64()), ("seconds", pa.float64())]
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
            if not layout.bands:
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
    width = contents.folder.layout.width
    line = ",".join(["%.9g"] * width)  # nine digits restore a float32
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(csv_line(["path", "start", "seconds", *(f"v{i}" for i in range(width))]) + "\n")
        for recordings, vectors, _ in contents.pieces():
            for (item, _, seconds), vector in zip(recordings, vectors, strict=True):
                name = csv_line([item.text], spreadsheet=contents.spreadsheet)
                file.write(f"{name},{item.start:g},{seconds:.6f},{line % tuple(vector)}\n")
