"""What `asit tag` writes: rows of labels or detections, to standard output, a file, or a file for each recording."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Literal, TextIO, get_args

from asit.errors import ConfigError, missing_extra
from asit.io import atomic
from asit.io.local_files import file_name, relative_stem
from asit.terminal import stdout

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.model.inference.tagging import Tag, Tags

Annotation = Literal["raven", "audacity", "textgrid"]
Written = Literal["table", "json", "csv", "parquet", "raven", "audacity", "textgrid"]
Format = Literal["auto", "table", "json", "csv", "parquet", "raven", "audacity", "textgrid"]
Write = Callable[["Item", "Tags"], None]
"""Writes the rows of a recording."""

_ENDINGS: dict[str, Written] = {
    **{".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "table"},
    **{".parquet": "parquet", ".textgrid": "textgrid"},
}
_FILES = (".txt", ".tsv", ".textgrid")
"""Endings of --out that name a file of detections; any other name is a folder."""
_SEGMENT_THRESHOLD = 0.5
"""Default threshold of detections for a model with several labels a clip."""


@dataclass(frozen=True)
class RowSettings:
    """Which rows a recording has.

    Attributes:
        top, threshold, segments: as in `TagOptions`.
        windows: a row for each window.
        multi: whether a clip may have several labels.
    """

    top: int
    threshold: float | None
    segments: bool
    windows: bool
    multi: bool

    def rows(self, tags: Tags, start: float) -> list[stdout.Row]:
        """Return the rows of a recording; times count from the start of its file, of which `start` s are left out."""
        if self.segments:
            return [stdout.Row(tag.start, tag.end, [(tag.label, tag.score)]) for tag in self.detections(tags, start)]
        if not self.windows:
            top = tags.top(self.top, self.threshold)
            return [stdout.Row(start, start + float(tags.ends[-1]), [(one.label, one.score) for one in top])]
        rows = []
        for scores, begin, end in zip(tags.windows, tags.starts.tolist(), tags.ends.tolist(), strict=True):
            top = replace(tags, clip=scores).top(self.top, self.threshold)
            rows.append(stdout.Row(start + begin, start + end, [(one.label, one.score) for one in top]))
        return rows

    def detections(self, tags: Tags, start: float) -> list[Tag]:
        """Return the labels of each window, with `segments` those of consecutive windows merged; times as in `rows`."""
        from asit.data.catalogue.labels import BACKGROUND

        threshold, k = self.threshold, self.top
        if threshold is None:
            threshold, k = (_SEGMENT_THRESHOLD, k) if self.multi else (0.0, 1)
        found = tags.segments(threshold, k, merge=self.segments)
        named = (tag for tag in found if tag.label != BACKGROUND)  # a stretch of none of the labels is no detection
        return [replace(tag, start=start + tag.start, end=start + tag.end) for tag in named]


@dataclass(frozen=True)
class Target:
    """Where rows are written to, and how.

    Attributes:
        out: file, or folder of annotations; None: standard output.
        form: the format.
        overwrite: replace files that exist.
        spreadsheet: see `asit.io.csv_lines.csv_line`.
        band: lowest and highest frequency that the model is given, Hz.
    """

    out: str | None
    form: Written
    overwrite: bool
    spreadsheet: bool
    band: tuple[float, float]


def form_of(asked: Format, out: str | None) -> Written:
    """Return the format that was asked for, or follows from the name of the file; sets standard output's encoding.

    Raises:
        ConfigError: the name says no format, or Parquet without a file or without pyarrow.
    """
    if out is None and asked != "parquet":
        if asked in get_args(Annotation):
            stdout.for_data()
            return asked  # type: ignore[return-value]
        return stdout.choose(asked)  # type: ignore[arg-type]
    ending = PurePath(out or "").suffix.lower()
    if asked == "auto" and ending not in _ENDINGS:
        raise ConfigError(
            f"--out {out} says no format", f"a name that ends in {', '.join(_ENDINGS)}", "or pass --format"
        )
    form = _ENDINGS[ending] if asked == "auto" else asked
    if form == "parquet":
        if out is None:
            raise ConfigError("--format parquet on standard output", "a file", "add --out tags.parquet")
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise missing_extra("Parquet", "pyarrow", "parquet") from None
    return form  # type: ignore[return-value]


def free(path: Path, overwrite: bool) -> None:
    """Raise ConfigError for a file whose folder does not exist, or that exists without `overwrite`."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder", "a folder that exists", "make it, or write elsewhere")
    atomic.check_free(path, overwrite)


@contextmanager
def writer(target: Target, rows: RowSettings, items: Sequence[Item]) -> Iterator[Write]:
    """Open the output, and yield what writes a recording's rows to it; files are written atomically.

    Raises:
        ConfigError: files that exist, or several recordings in a format for one.
    """
    out = None if target.out is None else Path(target.out)
    annotation = target.form if target.form in get_args(Annotation) else None
    if out is not None and annotation and (out.suffix.lower() not in _FILES or out.is_dir()):
        yield _folder(out, target, rows, items)
        return
    if annotation in ("audacity", "textgrid") and len(items) != 1:
        raise ConfigError(
            f"--format {target.form} of {len(items)} recordings in one file",
            "a file for each: the format has no names of recordings",
            f"pass a folder, as in --out {target.form}-labels",
        )
    if out is None:
        yield _lines(sys.stdout, target, rows)
        return
    free(out, target.overwrite)
    with atomic.write_file(out) as draft:
        if target.form == "parquet":
            with _parquet(draft, rows) as write:
                yield write
        else:
            with draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield _lines(file, target, rows)


def _lines(out: TextIO, target: Target, rows: RowSettings) -> Write:
    """Return what writes lines of text."""
    annotate = None
    if target.form in get_args(Annotation):
        from asit.infer.detection_files import Annotator

        annotate = Annotator(target.form, target.band)  # type: ignore[arg-type]
    header = stdout.csv_header() if target.form == "csv" else annotate.header if annotate else ""
    out.write(f"{header}\n" if header else "")

    def write(item: Item, tags: Tags) -> None:
        if annotate is not None:
            lines = annotate.lines(item, tags, rows.detections(tags, item.start))
        elif target.form == "json":
            lines = stdout.json_lines(item.text, rows.rows(tags, item.start), rows.segments)
        elif target.form == "csv":
            lines = stdout.csv_lines(item.text, rows.rows(tags, item.start), target.spreadsheet)
        else:
            columns = 80 if target.out else min(120, get_terminal_size().columns)
            blocks = (getattr(out, "encoding", None) or "").lower().replace("-", "").startswith("utf")
            timed, seconds = rows.segments or rows.windows, float(tags.ends[-1])
            lines = stdout.table_lines(item.text, seconds, rows.rows(tags, item.start), columns, timed, blocks)
        for line in lines:
            out.write(line + "\n")

    return write


def _folder(folder: Path, target: Target, rows: RowSettings, items: Sequence[Item]) -> Write:
    """Return what writes a file for each recording into a folder."""
    from asit.infer.detection_files import ENDINGS

    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file", "a folder", "give another name")
    paths = dict(zip(map(id, items), _paths(folder, items, ENDINGS[target.form]), strict=True))  # type: ignore[index]
    for path in paths.values():
        atomic.check_free(path, target.overwrite)

    def write(item: Item, tags: Tags) -> None:
        with atomic.write_file(paths[id(item)]) as draft, draft.open("w", encoding="utf-8", newline="") as file:
            _lines(file, target, rows)(item, tags)

    return write


def _paths(folder: Path, items: Sequence[Item], ending: str) -> list[Path]:
    """Return a path for each recording: its own name below the folder, where names are relative and differ."""
    names = ["/".join(map(file_name, relative_stem(item.name).parts)) for item in items]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{i:06d}-{file_name(item.name)}" for i, item in enumerate(items)]
    return [folder / f"{name}{ending}" for name in names]


@contextmanager
def _parquet(path: Path, rows: RowSettings) -> Iterator[Write]:
    """Write the columns of the CSV, some thousand rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"path": pa.string(), "start": pa.float64(), "end": pa.float64(), "label": pa.string()}
    schema = pa.schema([*kinds.items(), ("score", pa.float32())])
    waiting: list[dict[str, object]] = []
    with pq.ParquetWriter(path, schema) as file:

        def flush() -> None:
            file.write_table(pa.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(item: Item, tags: Tags) -> None:
            for row in rows.rows(tags, item.start):
                known = {"path": item.text, "start": row.start, "end": row.end}
                waiting.extend({**known, "label": label, "score": score} for label, score in row.labels)
            if len(waiting) >= 1 << 16:
                flush()

        yield write
        flush()
