"""Build an index, or update one: only what is new or changed is read.

Letters: N rows, D width.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asit.data.catalogue.inputs import Item, expand, named
from asit.errors import AudioError, ConfigError
from asit.io import atomic, lock
from asit.io.local_files import sha256
from asit.io.remote_files import MissingError
from asit.model.audio_model import AudioModel
from asit.model.inference.embedding import Precision
from asit.model.inference.overlap import ClipPooling
from asit.progress import counter
from asit.search import hnsw, recordings
from asit.search import index_files as files
from asit.search.embed_windows import POOLINGS, check_windows, embed_sources
from asit.search.index import Index
from asit.search.partial_build import EmbeddedRecording, PartialBuild
from asit.search.recordings import Files, RecordingKey, Source

_NAMED = 3  # failures in an error message


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
        threads: that read and prepare recordings, and build the graph.
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
        exact: whether searches compare every row.
        others: files that were ignored since they have no suffix of audio, for each suffix.
    """

    folder: Path
    rows: int
    recordings: int
    read: int
    kept: int
    dropped: int
    failures: list[tuple[str, str]]
    exact: bool
    others: Counter[str]


@dataclass
class _Plan:
    """What a build has to do.

    Attributes:
        kept: indices of the old index's recordings that stay.
        need: recordings to read, in their order.
        dropped: how many of the old index's recordings are gone.
        failures: name and reason of recordings whose files are missing.
    """

    kept: list[int] = field(default_factory=list)
    need: dict[RecordingKey, Source] = field(default_factory=dict)
    dropped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def build(
    model: AudioModel,
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    settings: IndexSettings | None = None,
    *,
    add: bool = False,
    overwrite: bool = False,
    model_path: str | None = None,
) -> Built:
    """Build an index of recordings, or update one.

    A build that is stopped leaves `OUT.partial`, from which the same call resumes. With `add`, recordings whose files
    have the same size and time of change are kept; missing ones are dropped, and changed ones read again.

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
            that another process is writing, no usearch for more than `EXACT_MOST` rows.
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
        width = model.encoder.width * (2 if card["pooling"] == "class+mean" else 1)
        others = Counter[str]()
        plan = _plan(expand(inputs, others) if inputs or not add else [], old)
        partial = PartialBuild(folder, card, width, restart=overwrite)
        with atomic.disk_errors(folder, lambda: partial.kept(plan.need)):
            with partial:
                read = _read(model, plan, card, partial, settings)
            card = {**card, "width": width, "model": {**card["model"], "path": model_path}}
            with atomic.write_folder(folder, overwrite=add or overwrite) as draft:
                card = _write(draft, card, old, plan, read, settings.threads)
        partial.path.unlink(missing_ok=True)
    return Built(
        folder=folder,
        rows=card["rows"],
        recordings=card["recordings"],
        read=len(read),
        kept=len(plan.kept),
        dropped=plan.dropped,
        failures=plan.failures,
        exact=card["search"] == "exact",
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
        raise ConfigError(f"{folder} already exists, and is no index", "a free path", "choose another --out")
    files.read_card(folder)  # a model folder has a card too, and is never replaced
    if not overwrite:
        fix = "pass --add to update it, or --overwrite to rebuild it"
        raise ConfigError(f"{folder} already holds an index", "a free path, or a choice", fix)


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


def _plan(items: Sequence[Item], old: Index | None) -> _Plan:
    plan, known, wanted = _Plan(), Files(), dict[RecordingKey, Source]()
    for item in items:
        if item.fault is not None:
            plan.failures.append((item.name, item.fault))
            continue
        try:
            source = known.source(item)
        except OSError as error:
            plan.failures.append((item.name, error.strerror or str(error)))
            continue
        wanted[source.key] = source
    for i, source in enumerate([] if old is None else old.sources):
        try:
            fingerprint = known.fingerprint(source.path)
        except (OSError, MissingError):
            fingerprint = None
        now = wanted.get(source.key)
        if fingerprint == source.fingerprint and (now is None or now.offset == source.offset):
            plan.kept.append(i)
            wanted.pop(source.key, None)
        elif now is None and fingerprint is not None and source.member is None:
            wanted[source.key] = known.source(source.item())
        elif now is None:
            plan.dropped += 1
    plan.need = wanted
    return plan


def _read(
    model: AudioModel, plan: _Plan, card: Mapping[str, Any], partial: PartialBuild, settings: IndexSettings
) -> list[EmbeddedRecording]:
    """Embed the recordings that are needed and not in `partial`; those that fail are added to the plan's failures."""
    for key, source in plan.need.items():
        if key in partial.done and partial.done[key].source.fingerprint != source.fingerprint:
            del partial.done[key]
    todo = [source for key, source in plan.need.items() if key not in partial.done]
    tick, bad = counter("indexing"), 0
    try:
        with closing(embed_sources(model, todo, card, settings.batch, settings.threads)) as results:
            for done, (source, result) in enumerate(results, 1):
                if isinstance(result, str):
                    plan.failures.append((source.name, result.replace(source.path, source.name)))
                    bad += 1
                else:
                    partial.add(result)
                tick(done, len(todo), bad)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{partial.kept(plan.need)}; the same command resumes") from None
    read = [partial.done[key] for key in plan.need if key in partial.done]
    if not read and not plan.kept and not plan.failures:
        raise ConfigError("nothing is left in the index", "a recording or more", "give a folder of recordings")
    if not read and not plan.kept:
        first = "\n    ".join(named(name, reason) for name, reason in plan.failures[:_NAMED])
        raise AudioError(
            f"none of {len(plan.failures)} recordings could be read, such as\n    {first}",
            "a recording or more",
            "see `asit doctor` for the formats that are read here",
        )
    return read


def _write(
    to: Path, card: Mapping[str, Any], old: Index | None, plan: _Plan, read: Sequence[EmbeddedRecording], threads: int
) -> dict[str, Any]:
    """Write the index's files, the recordings that are kept first, then those that were read; returns the card."""
    sources = [] if old is None else [old.sources[i] for i in plan.kept]
    sources += [one.source for one in read]
    kept = np.empty(0, np.int64) if old is None else old.rows_at(plan.kept)
    at = len(kept)
    total = at + sum(len(one.times) for one in read)
    rows = np.empty(total, files.ROW)
    vectors = np.lib.format.open_memmap(to / files.VECTORS, "w+", np.dtype("<f2"), (total, card["width"]))
    if old is not None:
        vectors[:at] = old.vectors[kept]
        rows[:at] = old.rows[kept]
        rows["file"][:at] = np.searchsorted(np.asarray(plan.kept), rows["file"][:at])
    for i, one in enumerate(read, len(plan.kept)):
        part = slice(at, at + len(one.times))
        vectors[part], rows["file"][part] = one.vectors, i
        rows["start"][part], rows["end"][part] = np.asarray(one.times).T
        at = part.stop
    vectors.flush()
    np.save(to / files.ROWS, rows, allow_pickle=False)
    lines: dict[str, list[dict[str, Any]]] = {
        files.SOURCES: [recordings.to_json(source) for source in sources],
        files.FAILURES: [{"path": name, "reason": reason} for name, reason in plan.failures],
    }
    for name, values in lines.items():  # names that are no valid Unicode are escaped, and read back as they were
        (to / name).write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    names = [files.VECTORS, files.ROWS, *lines]
    method: dict[str, Any] = {"search": "exact"}
    if total > files.EXACT_MOST:
        graph = old.graph if old is not None and len(kept) == len(old) else None
        graph = graph or hnsw.Graph(card["width"])
        graph.add(vectors[len(graph) :], threads, counter("graph", "rows"))
        graph.save(to / files.GRAPH)
        names.append(files.GRAPH)
        method = {"search": "graph", "graph": hnsw.PARAMETERS}
    contents = {
        "kind": files.KIND,
        "format": files.FORMAT,
        "asit": importlib.metadata.version("asit-audio"),
        **card,
        "rows": total,
        "recordings": len(sources),
        "failures": len(plan.failures),
        **method,
        "sha256": {name: sha256(to / name) for name in names},
    }
    (to / files.CARD).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return contents
