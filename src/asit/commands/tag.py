"""The verb tag."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from asit.errors import ConfigError
from asit.io.local_files import file_name
from asit.terminal import tag_output
from asit.terminal.options import (
    Batch,
    Columns,
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
    pick,
    recordings,
)
from asit.terminal.tag_output import free

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.infer.detection_clips import DetectionClips
    from asit.model.audio_model import AudioModel
    from asit.model.inference.tagging import Tags

_TRACKS = 10

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
    format: tag_output.Format = "auto"
    """auto: a table on a terminal, else JSON lines; with --out what its name ends in (.json, .jsonl, .csv, .parquet,
    .txt, .TextGrid). raven, audacity and textgrid hold detections: the labels of each window, or --segments."""
    out: str | None = None
    """Write to this file, atomically, instead of standard output; with raven, audacity or textgrid also to a folder, a
    file for each recording."""
    save_clips: str | None = None
    """Cut out the detections as WAV files, into this new folder; those of --format raven."""
    clip_padding: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Seconds before and after the detection in each of these files."""
    clips_per_label: Count | None = None
    """Most of these files for each label: those with the highest scores."""
    timeline: str | None = None
    """Draw the tracks of the highest labels under the spectrogram: a PNG, for one recording."""
    timeline_dir: str | None = None
    """The same for each recording, into this folder."""
    spreadsheet: Spreadsheet = False
    overwrite: bool = False
    """Replace --out and timelines that exist."""
    precision: Precision = "auto"
    columns: Columns = ""
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16


def tag(prog: str, summary: str, given: list[str]) -> int:
    options = parse(TagOptions, prog, summary, given)
    _check(options)
    form = tag_output.form_of(options.format, options.out)
    check_spreadsheet(options.spreadsheet, form)
    clips = None
    if options.save_clips is not None:
        from asit.infer.detection_clips import DetectionClips

        clips = DetectionClips(Path(options.save_clips), options.clip_padding, options.clips_per_label)
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
        items = recordings(options.inputs, options.columns)
        pictures = _pictures(options, items)
        rows = pick(tag_output.RowSettings, options, windows=_by_window(options), multi=model.multi)
        target = pick(tag_output.Target, options, form=form, band=model.front_end.band)
        done = failed = 0
        show = counter("tag") if options.out else None
        tagged = tag_items(tagger, items, options.batch)
        with tag_output.writer(target, rows, items) as write, closing(tagged):
            for item, found, picture in zip(items, tagged, pictures, strict=True):
                done += 1
                if isinstance(found, str):
                    problem: str | None = found
                else:
                    write(item, found)
                    if clips is not None:
                        clips.add(item, rows.detections(found, item.start))
                    problem = None if picture is None else _draw(picture, item, found, model, options.top)
                if problem is not None:
                    failed += 1
                    sys.stdout.flush()  # so that lines of the two streams stand in order on a terminal
                    log.warning(problem)
                if show is not None:
                    show(done, len(items), failed)
            if options.out and failed == done:
                raise ConfigError(f"all {failed} inputs failed", remedy=f"{options.out} was not written: see above")
        if failed and done > 1:
            log.warning(f"{failed} of {done} inputs failed")
        return 2 if (clips is not None and _save(clips)) or failed else 0


def _check(options: TagOptions) -> None:
    """Raise ConfigError for options that exclude or need each other."""
    if options.segments and options.windows:
        raise ConfigError("--segments and --windows", "one of them", "segments are windows, merged")
    if options.timeline and options.timeline_dir:
        raise ConfigError("--timeline and --timeline-dir", "one of them", "--timeline-dir draws each recording")
    if options.save_clips is None and (options.clip_padding or options.clips_per_label is not None):
        raise ConfigError("--clip-padding or --clips-per-label", "--save-clips with it", "add --save-clips FOLDER")


def _save(clips: DetectionClips) -> bool:
    """Write the clips; returns whether some could not be."""
    count, faults = clips.save()
    for fault in faults:
        log.warning(fault)
    log.info(f"{clips.folder}: {count} clips")
    return bool(faults)


def _by_window(options: TagOptions) -> bool:
    windows = options.windows or options.window is not None or options.hop is not None
    return windows and not options.segments


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
        free(path, options.overwrite)
        return [path]
    if options.timeline_dir is None:
        return [None] * len(items)
    folder = Path(options.timeline_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--timeline-dir {folder} is a file", "a folder", "give another name")
    names = [file_name(item.name) for item in items]
    # Several parts of one recording, or names that are equal once characters are replaced or their case is ignored.
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{i:06d}-{name}" for i, name in enumerate(names)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        free(folder / f"{name}.png", options.overwrite)
    return [folder / f"{name}.png" for name in names]


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
