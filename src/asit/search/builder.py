"""Build an index, or update one: only what is new or changed is read.

Letters: N rows, D width.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asit import __version__
from asit.data.catalogue.inputs import Item, expand, named
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.io import atomic, lock
from asit.io.local_files import sha256
from asit.io.remote_files import MissingError
from asit.model.audio_model import AudioModel
from asit.model.inference.embedding import Precision
from asit.model.inference.overlap import ClipPooling
from asit.progress import counter
from asit.search import index_files as files
from asit.search.embed_windows import EmbeddedRecording, check_windows, embed_sources
from asit.search.index import Index
from asit.search.index_files import POOLINGS, Files, RecordingKey, Source

_NAMED = 3  # failures in an error message
_SAVE = 60.0  # s of work that a killed build may lose


@dataclass(frozen=True)
class IndexSettings:
    """How recordings become rows; in an update None stands for the index's own.

    Attributes:
        window: length in s of the windows that long recordings are cut into; None: the training view's.
        hop: s from one to the next; None: the window.
        pooling: of tokens into vectors; None: mean.
        layer: block whose output is taken; None: the last.
        precision: arithmetic of the encoder.
        batch: windows in a batch.
        threads: that read and prepare recordings.
    """

    window: float | None = None
    hop: float | None = None
    pooling: ClipPooling | None = None
    layer: int | None = None
    precision: Precision | None = None
    batch: int = 16
    threads: int = 1


@dataclass(frozen=True)
class Built:
    """The outcome of a build.

    Attributes:
        folder: the index.
        rows, recordings: in it.
        read, kept, dropped: recordings that were read (now, or by a build that was stopped), that the index had
            already, and that are gone.
        failures: name and reason of each that could not be read.
        others: files that were ignored since they have no suffix of audio, for each suffix.
    """

    folder: Path
    rows: int
    recordings: int
    read: int
    kept: int
    dropped: int
    failures: list[tuple[str, str]]
    others: Counter[str]

    def __repr__(self) -> str:
        found = f"{self.rows} rows of {self.recordings} recordings, {self.read} read, {len(self.failures)} failed"
        return f"Built({found}, {str(self.folder)!r})"


def build(
    model: AudioModel,
    inputs: Sequence[str] | Sequence[Item],
    out: str | os.PathLike[str],
    settings: IndexSettings | None = None,
    *,
    add: bool = False,
    overwrite: bool = False,
    model_path: str | None = None,
) -> Built:
    """Build an index of recordings, or update one.

    A build that is stopped leaves `OUT.partial`, an index from which the same call resumes. With `add`, recordings
    whose files have the same size and time of change are kept; missing ones are dropped, and changed ones read again.

    Args:
        inputs: files, folders, globs, catalogues, tables and tar shards; see `asit.data.catalogue.inputs.expand`. With
            `add` there may be none.
        out: the index's folder.
        settings: how recordings become rows.
        add: update the index in `out`.
        overwrite: replace the index in `out`.
        model_path: of the model, for the card; None: searches have to be given the model.

    Raises:
        ConfigError: invalid settings, another model or other settings than the index's, a folder that is not free or
            that another process is writing.
        AudioError: no recording could be read; nothing is written.
        CatalogueError: an input that gives nothing.
        CheckpointError: the index to update is damaged, or the disk is full.
    """
    folder, settings = Path(out), settings or IndexSettings()
    check_free(folder, add, overwrite)
    with lock.writing(folder):
        check_free(folder, add, overwrite)  # again: another process may have written it since
        old = Index.read(folder) if add else None
        if old is not None:
            old.check(model)
        card = _card_settings(model, settings, old)
        resumed = _resumed(folder, card, overwrite)
        work = _Build(folder, card, model.encoder.width, resumed or old)
        others = Counter[str]()
        work.plan(expand(inputs, others) if inputs or not add else [], keep_others=add)
        work.saved = 0 if resumed is None else len(work.kept)
        with atomic.disk_errors(folder, work.progress):
            try:
                work.read(model, settings)
                rows = work.write(folder, add or overwrite, model_path)
            except KeyboardInterrupt:
                work.save()
                raise KeyboardInterrupt(f"{work.progress()}; the same command resumes") from None
        atomic.delete_folder(work.partial)
    sources = work.sources()
    now = {source.key: source.fingerprint for source in sources}
    before = [] if old is None else old.sources
    kept = sum(now.get(source.key) == source.fingerprint for source in before)
    return Built(
        folder=folder,
        rows=rows,
        recordings=len(sources),
        read=len(sources) - kept,
        kept=kept,
        dropped=sum(source.key not in now and source.key not in work.need for source in before),
        failures=work.failures,
        others=others,
    )


def check_free(folder: Path, add: bool, overwrite: bool) -> None:
    """Check that an index may be written to a folder, before any work is done.

    Raises:
        ConfigError: the folder holds something else, there is nothing to add to, or both options were given.
        CheckpointError: it holds a model, or a damaged index.
    """
    if add and overwrite:
        raise ConfigError("--add and --overwrite were both given", "one of the two", "choose one")
    exists = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if add and not exists:
        raise ConfigError(f"{folder} does not exist", "an index to add to", "leave --add out to make one")
    if not exists or add:
        return
    if not (folder / files.CARD).is_file():
        raise ConfigError(f"{folder} already exists, and is no index", "a path that is free", "give another path")
    files.read_card(folder)  # a model folder has a card too, and is never replaced
    if not overwrite:
        fix = "pass --add to update it, or --overwrite to rebuild it"
        raise ConfigError(f"{folder} already holds an index", "a path that is free, or a choice", fix)


def _card_settings(model: AudioModel, settings: IndexSettings, old: Index | None) -> dict[str, Any]:
    """Return all that the vectors depend on, for the card; in an update those of the index, which may not change."""
    if settings.pooling is not None and settings.pooling not in POOLINGS:
        raise ConfigError(f"pooling {settings.pooling}", "one of " + ", ".join(POOLINGS), "choose one")
    precision = None if settings.precision is None else model.embedder(precision=settings.precision).precision
    given = {name: getattr(settings, name) for name in ("window", "hop", "pooling", "layer")} | {"precision": precision}
    facts = {"model": files.facts(model)}
    if old is not None:
        other = [
            f"{name} {old.card[name]} in the index, {value} given"
            for name, value in given.items()
            if value is not None and value != old.card[name]
        ]
        if other:
            raise ConfigError(
                f"{old.folder} was made with other settings: {'; '.join(other)}",
                "the same, so that its vectors can be compared",
                "leave these out, or rebuild the index with --overwrite",
            )
        return {**facts, **{name: old.card[name] for name in given}}
    window = model.frames * model.front_end.shift / model.rate if settings.window is None else settings.window
    hop = window if settings.hop is None else settings.hop
    check_windows(window, hop)
    own = {"pooling": settings.pooling or "mean", "precision": precision or model.embedder().precision}
    return {**facts, "window": window, "hop": hop, "layer": settings.layer, **own}


def _resumed(folder: Path, card: Mapping[str, Any], overwrite: bool) -> Index | None:
    """Return what a stopped build has read; ConfigError where it is of another build, unless that is overwritten."""
    partial = _partial(folder)
    with contextlib.suppress(CheckpointError):
        found = Index.read(partial)
        mine = {**found.card, "model": {name: found.card["model"].get(name) for name in card["model"]}}
        if all(mine.get(name) == value for name, value in card.items()):
            return found
    if partial.exists() and not overwrite:
        raise ConfigError(
            f"{partial} is left of a build with another model or other settings, or is damaged",
            "the same as then, to resume it",
            "repeat that command, or pass --overwrite to start from scratch",
        )
    return None


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


class _Build:
    """A build, from what an index has already (`base`: the one to update, or a stopped build's) to one on the disk."""

    def __init__(self, folder: Path, card: Mapping[str, Any], width: int, base: Index | None) -> None:
        self.partial, self.card, self.base = _partial(folder), card, base
        self.width = width * (2 if card["pooling"] == "class+mean" else 1)
        self.kept: list[int] = []  # indices of the base's recordings that stay
        self.need: dict[RecordingKey, Source] = {}  # recordings to read, in their order
        self.done: list[EmbeddedRecording] = []
        self.failures: list[tuple[str, str]] = []
        self.saved = 0  # recordings in the folder from which the build resumes

    def plan(self, items: Sequence[Item], keep_others: bool) -> None:
        """Decide what is kept and what is read; with `keep_others` also recordings that are not among the items."""
        known, wanted = Files(), self.need
        for item in items:
            if item.fault is not None:
                self.failures.append((item.name, item.fault))
                continue
            try:
                source = known.source(item)
            except OSError as error:
                self.failures.append((item.name, error.strerror or str(error)))
                continue
            wanted[source.key] = source
        for i, source in enumerate([] if self.base is None else self.base.sources):
            try:
                fingerprint = known.fingerprint(source.path)
            except (OSError, MissingError):
                continue
            now = wanted.get(source.key)
            if fingerprint == source.fingerprint and (keep_others if now is None else now.offset == source.offset):
                self.kept.append(i)
                wanted.pop(source.key, None)
            elif now is None and keep_others and source.member is None:
                wanted[source.key] = known.source(source.item())

    def read(self, model: AudioModel, settings: IndexSettings) -> None:
        """Embed the recordings that are needed; what was read is saved from time to time."""
        todo, tick, bad = list(self.need.values()), counter("indexing"), 0
        due = time.monotonic() + _SAVE
        with closing(embed_sources(model, todo, self.card, settings.batch, settings.threads)) as results:
            for done, (source, result) in enumerate(results, 1):
                if isinstance(result, str):
                    self.failures.append((source.name, result.replace(source.path, source.name)))
                    bad += 1
                else:
                    self.done.append(result)
                tick(done, len(todo), bad)
                if (begun := time.monotonic()) >= due:
                    self.save()
                    now = time.monotonic()
                    due = now + max(_SAVE, 50 * (now - begun))  # at most 2 % of the time
        if self.kept or self.done:
            return
        if not self.failures:
            raise ConfigError("nothing is left in the index", "a recording or more", "give a folder of recordings")
        first = "\n    ".join(named(name, reason) for name, reason in self.failures[:_NAMED])
        raise AudioError(
            f"none of {len(self.failures)} recordings could be read, such as\n    {first}",
            "a recording or more",
            "see `asit doctor` for the formats that are read here",
        )

    def sources(self) -> list[Source]:
        """Return the recordings of the index: those that are kept first, then those that were read."""
        return [
            *([] if self.base is None else [self.base.sources[i] for i in self.kept]),
            *(d.source for d in self.done),
        ]

    def save(self) -> None:
        """Write what was read into the folder from which the build resumes."""
        if self.done:
            self.write(self.partial, overwrite=True)
            self.saved = len(self.kept) + len(self.done)

    def progress(self) -> str:
        """Say how many recordings are saved."""
        return f"{self.saved} of {len(self.kept) + len(self.need)} recordings are kept in {self.partial}"

    def write(self, folder: Path, overwrite: bool, model_path: str | None = None) -> int:
        """Write the index and return its number of rows."""
        base, sources = self.base, self.sources()
        kept = np.empty(0, np.int64) if base is None else base.rows_at(self.kept)
        at = len(kept)
        total = at + sum(len(one.times) for one in self.done)
        rows = np.empty(total, files.ROW)
        with atomic.write_folder(folder, overwrite=overwrite) as to:
            vectors = np.lib.format.open_memmap(to / files.VECTORS, "w+", np.dtype("<f2"), (total, self.width))
            if base is not None:
                vectors[:at] = base.vectors[kept]
                rows[:at] = base.rows[kept]
                rows["file"][:at] = np.searchsorted(np.asarray(self.kept), rows["file"][:at])
            for i, one in enumerate(self.done, len(self.kept)):
                part = slice(at, at + len(one.times))
                vectors[part], rows["file"][part] = one.vectors, i
                rows["start"][part], rows["end"][part] = np.asarray(one.times).T
                at = part.stop
            vectors.flush()
            np.save(to / files.ROWS, rows, allow_pickle=False)
            lines: dict[str, list[dict[str, Any]]] = {
                files.SOURCES: [files.to_json(source) for source in sources],
                files.FAILURES: [{"path": name, "reason": reason} for name, reason in self.failures],
            }
            for name, values in lines.items():  # names that are no valid Unicode are escaped, and read back the same
                (to / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
            contents = {
                "kind": files.KIND,
                "format": files.FORMAT,
                "asit": __version__,
                **self.card,
                "model": {**self.card["model"], "path": model_path},
                "width": self.width,
                "rows": total,
                "recordings": len(sources),
                "failures": len(self.failures),
                "search": "exact",
                "sha256": {name: sha256(to / name) for name in (files.VECTORS, files.ROWS, *lines)},
            }
            (to / files.CARD).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        return total
