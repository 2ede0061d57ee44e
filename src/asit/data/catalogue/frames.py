"""Tables in memory, as data frames, data sets or lists, kept as JSONL files that any run can read again.

The packages of the frames are not imported: a frame is known by its methods.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from asit.config import TableSettings
from asit.data.catalogue import table_columns
from asit.data.catalogue.columns import json_line
from asit.errors import CatalogueError
from asit.io import atomic, local_files

_KINDS = "a path, a DataFrame of pandas or polars, a Dataset of datasets, a table of pyarrow, or rows as dicts"


def stored(data: Any, columns: str = "") -> str:
    """Return a path as it is, and of a table in memory the JSONL file in the user's cache folder that it is kept in.

    The file's name is the hash of its contents: the same rows are one file. It has our names of columns, absolute paths
    (relative ones start at the working directory), and the names of classes where a Dataset has numbers. Recordings
    that a Dataset holds as bytes become files beside it.

    Args:
        data: a path, or rows: pandas or polars DataFrame, `datasets.Dataset` or DatasetDict (its keys are the splits),
            pyarrow Table, or an iterable of dicts or `TableRow`.
        columns: names of its columns, see `TableSettings`.

    Raises:
        CatalogueError: no rows, an unknown kind, or a recording without a path; names the row.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    lines = [json_line(row) for row in _named(_rows(data), columns)]
    if not lines:
        raise CatalogueError("the data have no rows", "at least one row with a path", "check the table")
    text = b"".join(lines)
    target = folder() / f"{hashlib.sha256(text).hexdigest()[:32]}.jsonl"
    if not target.exists():
        _write(target, text)
    return str(target)


def take(data: Any, table: TableSettings | None) -> tuple[str, TableSettings]:
    """Return `stored` and how to read it: a table in memory has our columns."""
    table = table or TableSettings()
    if isinstance(data, str | os.PathLike):
        return os.fspath(data), table
    return stored(data, table.columns), table.model_copy(update={"columns": ""})


def is_stored(source: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a table that `stored` keeps."""
    return os.path.dirname(os.path.abspath(source)) == os.path.abspath(folder())


def folder() -> Path:
    """Return the folder of the tables that `stored` keeps."""
    return local_files.cache_folder("tables")


def root_of(source: str | os.PathLike[str], paths: Iterable[str]) -> str:
    """Return the folder that the names of a table's recordings are relative to: the table's, or of a table that was in
    memory the deepest one that holds all recordings."""
    if is_stored(source):
        return os.path.commonpath(map(os.path.dirname, paths))
    return os.path.dirname(os.path.abspath(source))


def _rows(data: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a table of any kind, as dicts."""
    if hasattr(data, "collect") and hasattr(data, "collect_schema"):  # a polars LazyFrame
        data = data.collect()
    if isinstance(data, Mapping):  # a DatasetDict
        for split, part in data.items():
            if not hasattr(part, "column_names"):
                raise CatalogueError(f"the data are a {type(data).__name__}", _KINDS, "give rows as a list of dicts")
            yield from ({"split": split, **row} for row in _rows(part))
    elif hasattr(data, "cast_column") and hasattr(data, "features"):
        yield from _of_dataset(data)
    elif hasattr(data, "to_dicts"):  # polars
        yield from data.to_dicts()
    elif hasattr(data, "to_pylist"):  # pyarrow
        yield from data.to_pylist()
    elif hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        yield from data.to_dict("records")
    else:
        try:
            rows = iter(data)
        except TypeError:
            raise CatalogueError(f"the data are a {type(data).__name__}", _KINDS, "give one of these") from None
        for number, row in enumerate(rows, 1):
            row = dataclasses.asdict(row) if dataclasses.is_dataclass(row) and not isinstance(row, type) else row
            if not isinstance(row, Mapping):
                raise CatalogueError(f"row {number} is a {type(row).__name__}", _KINDS, "give each row as a dict")
            yield row


def _of_dataset(data: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a `datasets.Dataset`, its audio as path or bytes, and its classes by their names."""
    names: dict[str, Any] = {}
    for column, feature in data.features.items():
        if getattr(feature, "decode", False) is True:
            data = data.cast_column(column, dataclasses.replace(feature, decode=False))
        names[column] = getattr(getattr(feature, "feature", feature), "names", None)

    def named(column: str, value: Any) -> Any:
        known = names.get(column)
        if not known or value is None:
            return value
        return [known[i] for i in value] if isinstance(value, list) else None if value < 0 else known[value]

    for row in data:
        yield {column: named(column, value) for column, value in row.items()}


def _named(rows: Iterable[Mapping[str, Any]], columns: str) -> Iterator[dict[str, Any]]:
    """Yield rows under our names, without missing values; paths are absolute."""
    known = functools.lru_cache(64)(lambda keys: table_columns.known("the data", keys, columns))
    for number, row in enumerate(rows, 1):
        ours = known(tuple(map(str, row)))
        found = {name: _plain(value) for name, value in zip(ours, row.values(), strict=True) if name}
        found["path"] = _path(number, found.get("path"))
        yield {name: value for name, value in found.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; None for NaN and other missing values, which differ from themselves."""
    if hasattr(value, "tolist"):  # numpy
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, dict | str | bytes | int | float | None):
        return value if value == value else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if str(value) in ("<NA>", "NaT") else str(value)


def _path(number: int, value: Any) -> str:
    if isinstance(value, dict):
        path, content = value.get("path"), value.get("bytes")
        if path and os.path.isfile(path):
            value = path
        elif isinstance(content, bytes):
            suffix = os.path.splitext(path or "")[1]
            target = folder() / "recordings" / f"{hashlib.sha256(content).hexdigest()[:32]}{suffix}"
            if not target.exists():
                _write(target, content)
            return str(target)
        else:
            value = path
    if not isinstance(value, str) or not value.strip():
        found = f"row {number}: path is {value!r:.60}"
        raise CatalogueError(found, "the path of a recording, or its bytes", "write decoded audio to a file first")
    return os.path.abspath(os.path.expanduser(value.strip()))


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic.write_file(target) as draft:
        draft.write_bytes(content)
