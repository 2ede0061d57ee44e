"""The verb tag."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from asit.errors import ConfigError
from asit.io import atomic
from asit.terminal import stdout
from asit.terminal.options import (
    Batch,
    Count,
    Device,
    Inputs,
    Model,
    Precision,
    Seconds,
    Share,
    Spreadsheet,
    Threads,
    check_spreadsheet,
    parse,
    recordings,
)

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.model.audio_model import AudioModel
    from asit.model.inference.tagging import Tags

_TRACKS = 10
_SEGMENT_THRESHOLD = 0.5
"""Default threshold of segments for a model with several labels a clip."""

log = logging.getLogger(__name__)


@dataclass
class TagOptions:
    model: Model
    inputs: Inputs
    top: Count = 5
    """Most labels a row."""
    threshold: Share | None = None
    """Leave out labels that score less."""
    window: Seconds | None = None
    """Length of a window in seconds, at most that of the training input; a row for each window."""
    hop: Seconds | None = None
    """Seconds from window to window; by default they lie end to end."""
    windows: bool = False
    """A row for each window, of the training input's length unless --window says another."""
    segments: bool = False
    """A row for each stretch over which a label holds: neighbouring windows above the threshold, merged. Without
    --threshold: 0.5 where a clip may have several labels, else the highest label of each window."""
    format: Literal["auto", "table", "json", "csv"] = "auto"
    """auto: a table on a terminal, else JSON lines; with --out what its name ends in (.json, .jsonl, .csv, .txt)."""
    out: str | None = None
    """Write to this file, atomically, instead of standard output."""
    timeline: str | None = None
    """Draw the tracks of the highest labels under the spectrogram: a PNG, for one recording."""
    timeline_dir: str | None = None
    """The same for each recording, into this folder."""
    spreadsheet: Spreadsheet = False
    overwrite: bool = False
    """Replace --out and timelines that exist."""
    precision: Precision = "auto"
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16


def tag(prog: str, summary: str, given: list[str]) -> int:
    options = parse(TagOptions, prog, summary, given)
    if options.segments and options.windows:
        raise ConfigError("--segments and --windows", "one of them", "segments are windows, merged")
    if options.timeline and options.timeline_dir:
        raise ConfigError("--timeline and --timeline-dir", "one of them", "--timeline-dir draws each recording")
    import asit
    from asit import runtime
    from asit.infer.embed_rows import tag_items
    from asit.progress import counter

    with runtime.world(options.device, options.threads) as world:
        if world.size > 1:
            raise ConfigError(
                f"asit tag in {world.size} processes", "one process", "start it without torchrun; --threads uses cores"
            )
        model = asit.load(options.model, world.device)
        tagger = model.tagger(options.precision, options.window, options.hop)
        items = recordings(options.inputs)
        pictures = _pictures(options, items)
        done = failed = 0
        show = counter("tag") if options.out else None
        tagged = tag_items(tagger, items, options.batch)
        with _output(options) as (out, form), closing(tagged):
            check_spreadsheet(options.spreadsheet, form)
            if form == "csv":
                out.write(stdout.csv_header() + "\n")
            for item, found, picture in zip(items, tagged, pictures, strict=True):
                done += 1
                if isinstance(found, str):
                    problem: str | None = found
                else:
                    _write(out, form, item, found, options, model.multi)
                    problem = None if picture is None else _draw(picture, item, found, model, options.top)
                if problem is not None:
                    failed += 1
                    out.flush()  # so that lines of the two streams stand in order on a terminal
                    log.warning(problem)
                if show is not None:
                    show(done, len(items), failed)
            if options.out and failed == done:
                raise ConfigError(f"all {failed} inputs failed", remedy=f"{options.out} was not written: see above")
        if failed and done > 1:
            log.warning(f"{failed} of {done} inputs failed")
    return 2 if failed else 0


def _write(out: TextIO, form: stdout.Format, item: Item, tags: Tags, options: TagOptions, multi: bool) -> None:
    rows = _rows(tags, options, multi, item.start)
    if form == "json":
        lines = stdout.json_lines(item.text, rows, options.segments)
    elif form == "csv":
        lines = stdout.csv_lines(item.text, rows, options.spreadsheet)
    else:
        timed = options.segments or _by_window(options)
        columns = 80 if options.out else min(120, shutil.get_terminal_size().columns)
        blocks = (getattr(out, "encoding", None) or "").lower().replace("-", "").startswith("utf")
        lines = stdout.table_lines(item.text, float(tags.ends[-1]), rows, columns, timed, blocks)
    for line in lines:
        out.write(line + "\n")


def _rows(tags: Tags, options: TagOptions, multi: bool, start: float) -> list[stdout.Row]:
    """Return the rows of a recording; times count from the start of its file."""
    if options.segments:
        if options.threshold is None and not multi:
            found = tags.segments(0.0, k=1)
        else:
            threshold = _SEGMENT_THRESHOLD if options.threshold is None else options.threshold
            found = tags.segments(threshold, k=options.top)
        return [stdout.Row(start + one.start, start + one.end, [(one.label, one.score)]) for one in found]
    if not _by_window(options):
        top = tags.top(options.top, options.threshold)
        return [stdout.Row(start, start + float(tags.ends[-1]), [(one.label, one.score) for one in top])]
    rows = []
    for scores, begin, end in zip(tags.windows, tags.starts.tolist(), tags.ends.tolist(), strict=True):
        top = replace(tags, clip=scores).top(options.top, options.threshold)
        rows.append(stdout.Row(start + begin, start + end, [(one.label, one.score) for one in top]))
    return rows


def _by_window(options: TagOptions) -> bool:
    windows = options.windows or options.window is not None or options.hop is not None
    return windows and not options.segments


@contextmanager
def _output(options: TagOptions) -> Iterator[tuple[TextIO, stdout.Format]]:
    """Open the output and choose its format; a file is written atomically."""
    if options.out is None:
        yield sys.stdout, stdout.choose(options.format)
        return
    path = Path(options.out)
    endings: dict[str, stdout.Format] = {".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "table"}
    if options.format == "auto" and path.suffix.lower() not in endings:
        raise ConfigError(
            f"--out {path} says no format", f"a name that ends in {', '.join(endings)}", "or pass --format"
        )
    form = endings[path.suffix.lower()] if options.format == "auto" else options.format
    _free(path, options.overwrite)
    with (
        atomic.write_file(path) as draft,
        draft.open("w", encoding="utf-8", errors="backslashreplace", newline="") as out,
    ):
        yield out, form


def _pictures(options: TagOptions, items: Sequence[Item]) -> list[Path | None]:
    """Return the picture of each input; raises ConfigError where one may not be written."""
    if options.timeline or options.timeline_dir:
        pipe = next((item.name for item in items if Path(item.path).is_fifo()), None)
        if pipe is not None:
            raise ConfigError(f"{pipe} is a pipe", "a file: a timeline reads the recording again", "save it first")
    if options.timeline is not None:
        path = Path(options.timeline)
        if len(items) != 1:
            raise ConfigError(
                f"--timeline {path} and {len(items)} recordings",
                "one recording",
                "pass --timeline-dir FOLDER for a picture of each",
            )
        if path.suffix.lower() != ".png":
            raise ConfigError(f"--timeline {path}", "a name that ends in .png", "such as timeline.png")
        _free(path, options.overwrite)
        return [path]
    if options.timeline_dir is None:
        return [None] * len(items)
    folder = Path(options.timeline_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--timeline-dir {folder} is a file", "a folder", "give another name")
    names = [_file_name(item.name) for item in items]
    # Several parts of one recording, or names that are equal once characters are replaced or their case is ignored.
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{i:06d}-{name}" for i, name in enumerate(names)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        _free(folder / f"{name}.png", options.overwrite)
    return [folder / f"{name}.png" for name in names]


def _file_name(name: str) -> str:
    """Return a file name: separators are replaced, and a name too long for a disk is cut."""
    flat = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in name).lstrip(".") or "sound"
    while len(flat.encode(errors="surrogateescape")) > 200:
        flat = flat[1:]
    return flat


def _free(path: Path, overwrite: bool) -> None:
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder", "a folder that exists", "make it, or write elsewhere")
    atomic.check_free(path, overwrite)


def _draw(path: Path, item: Item, tags: Tags, model: AudioModel, top: int) -> str | None:
    """Draw a recording's timeline; returns the reason where that fails."""
    from asit.audio.stream import open_sound
    from asit.data.catalogue.inputs import named
    from asit.errors import AsitError
    from asit.report.timeline import Spectrogram, draw

    settings = model.front_end.settings
    try:
        with open_sound(item.sound(), None, model.rate, settings.resampler, item.start, item.seconds) as sound:
            spectrogram = Spectrogram(sound.blocks(), model.front_end)
        order = tags.windows.max(0).values.sort(descending=True, stable=True).indices[: min(top, _TRACKS)].tolist()
        tracks = [(tags.classes[i], tags.windows[:, i].numpy()) for i in order]
        draw(path, spectrogram, settings, tracks, tags.starts.numpy(), tags.ends.numpy(), item.name)
    except (AsitError, OSError) as error:
        return named(str(path), error.found if isinstance(error, AsitError) else error.strerror or str(error))
    return None
