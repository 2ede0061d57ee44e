"""Making an index, and bringing one up to date: only what is new or changed is heard.

Letters: N rows, n rows of one recording, D width.
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

from asit.data.catalogue.inputs import Item, expand
from asit.errors import AsitError, AudioError, CheckpointError, ConfigError
from asit.io import atomic, lock
from asit.io.remote_files import MissingError
from asit.model.audio_model import AudioModel
from asit.model.inference.embedding import Precision
from asit.model.inference.overlap import ClipPooling
from asit.progress import counter
from asit.search import embed_windows, index_files, recordings
from asit.search.embed_windows import POOLINGS, check_windows, view_seconds
from asit.search.hnsw import CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH, Graph
from asit.search.index import Index
from asit.search.partial_build import Done, Partial
from asit.search.recordings import Files, RecordingKey, Source

_NAMED = 3  # failures that a message names


@dataclass(frozen=True)
class Ask:
    """How recordings become rows; what is None is the index's own when one is brought up to date.

    Attributes:
        window: length in s of the stretches that long recordings are cut into; None: the training view's.
        hop: s from one to the next; None: the window.
        pooling: of tokens into vectors; None: mean.
        layer: block whose output is taken; None: the last.
        precision: arithmetic of the encoder.
        batch: windows that go through the encoder at once.
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
    """What a build did.

    Attributes:
        folder: the index.
        rows, recordings: in it.
        heard, kept, dropped: recordings that were read (now, or by a build that was stopped), were there already, or
            are gone.
        failures: name and reason of each that could not be read.
        exact: whether searches compare every row.
        others: files that were not opened since their names are not those of recordings, for each suffix.
    """

    folder: Path
    rows: int
    recordings: int
    heard: int
    kept: int
    dropped: int
    failures: list[tuple[str, str]]
    exact: bool
    others: Counter[str]


@dataclass
class _Plan:
    """What there is to do.

    Attributes:
        kept: places of the old index's recordings that stay.
        need: recordings to hear, in their order.
        dropped: how many of the old index's go.
        failures: recordings whose files are not there.
    """

    kept: list[int] = field(default_factory=list)
    need: dict[RecordingKey, Source] = field(default_factory=dict)
    dropped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


def build(
    model: AudioModel,
    inputs: Sequence[str],
    out: str | os.PathLike[str],
    ask: Ask | None = None,
    *,
    add: bool = False,
    overwrite: bool = False,
    model_path: str | None = None,
) -> Built:
    """Index recordings.

    A build that is stopped leaves `OUT.partial` beside the index; the same call goes on from there. With `add`, the
    recordings of an index that is there already are kept where their files have the same size and time of change;
    those whose files are gone are dropped, changed ones read again.

    Args:
        inputs: files, folders, globs, catalogues, tables and tar shards; see `asit.data.catalogue.inputs.expand`. With
            `add` there may be none.
        out: the index's folder.
        add: bring the index that is there up to date.
        overwrite: replace the index that is there.
        model_path: where the model came from, for the card; None: searches have to be handed the model.

    Raises:
        ConfigError: settings that cannot be, another model or other settings than the index's, a folder that is not
            free or that another process is writing, no usearch for more than `EXACT_MOST` rows.
        AudioError: no recording could be read; nothing is written.
        CatalogueError: an input that gives nothing.
        CheckpointError: the index that is there is damaged, or the disk is full.
    """
    folder, ask = Path(out), ask or Ask()
    check_free(folder, add, overwrite)
    with lock.writing(folder):
        return _build(model, inputs, folder, ask, add, overwrite, model_path)


def _build(
    model: AudioModel,
    inputs: Sequence[str],
    folder: Path,
    ask: Ask,
    add: bool,
    overwrite: bool,
    model_path: str | None,
) -> Built:
    """`build`, by the one process that may write the folder now."""
    check_free(folder, add, overwrite)  # again: another process may have written it since
    old = Index.read(folder) if add else None
    if old is not None:
        old.check(model)
    settings = _settings(model, ask, old)
    others = Counter[str]()
    plan = _plan(expand(inputs, others) if inputs or not add else [], old)
    with Partial(folder, settings, _width(model, settings), anew=overwrite) as partial:
        try:
            _hear(model, plan, settings, partial, ask)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{partial.kept(plan.need)}; the same command goes on") from None
        except OSError as error:
            if not atomic.is_disk_full(error):
                raise
            raise CheckpointError(
                f"the disk is full: {folder} was not written; {partial.kept(plan.need)}",
                "room for the vectors twice: there, and in the index",
                "free some and give the same command again",
            ) from error
        heard = [partial.done[key] for key in plan.need if key in partial.done]
        if not heard and not plan.kept:
            raise _nothing(plan)
        card = {**settings, "model": {**settings["model"], "path": model_path}}
        with atomic.write_folder(folder, overwrite=add or overwrite) as draft:
            _fill(draft, card, old, plan, heard, ask.threads)
        partial.remove()
    made = index_files.read_card(folder)
    return Built(
        folder, made["rows"], made["recordings"], len(heard), len(plan.kept), plan.dropped, plan.failures,
        index_files.GRAPH not in made["sha256"], others,
    )  # fmt: skip


def check_free(folder: Path, add: bool, overwrite: bool) -> None:
    """Refuse a place that holds something else, before any work is done.

    Raises:
        ConfigError: it does, or there is nothing to add to, or both ways on were asked for.
        CheckpointError: it holds a model, or a damaged index.
    """
    if add and overwrite:
        raise ConfigError("--add and --overwrite were both given", "one of the two", "choose one")
    there = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if add and not there:
        raise ConfigError(f"{folder} is not there", "an index to add to", "leave --add out to make one")
    if not there or add:
        return
    if not (folder.is_dir() and (folder / index_files.CARD).is_file()):
        raise ConfigError(
            f"{folder} is there already, and is no index", "a free path for the index", "choose another --out"
        )
    index_files.read_card(folder)  # a model folder has a card too, and is never replaced
    if not overwrite:
        raise ConfigError(
            f"{folder} holds an index already",
            "a free path, or a choice",
            "pass --add to bring it up to date, or --overwrite to make it anew",
        )


def _settings(model: AudioModel, ask: Ask, old: Index | None) -> dict[str, Any]:
    """What the vectors depend on; of an index that is there, its own, which nothing may change."""
    if ask.pooling is not None and ask.pooling not in POOLINGS:
        raise ConfigError(f"pooling {ask.pooling}", "one of " + ", ".join(POOLINGS), "choose one")
    asked = {
        "window": ask.window,
        "hop": ask.hop,
        "pooling": ask.pooling,
        "layer": ask.layer,
        "precision": None if ask.precision is None else model.embedder(precision=ask.precision).precision,
    }
    if old is not None:
        other = [
            f"{name} {old.card[name]} in the index, {value} asked for"
            for name, value in asked.items()
            if value is not None and value != old.card[name]
        ]
        if other:
            raise ConfigError(
                f"{old.folder} was made with other settings: {'; '.join(other)}",
                "the same, so that its vectors can be compared",
                "leave these out, or make the index anew with --overwrite",
            )
        return {"model": index_files.facts(model), **{name: old.card[name] for name in asked}}
    window = view_seconds(model) if ask.window is None else ask.window
    hop = window if ask.hop is None else ask.hop
    check_windows(window, hop)
    own = {"window": window, "hop": hop, "pooling": ask.pooling or "mean"}
    return {
        "model": index_files.facts(model),
        **own,
        "layer": ask.layer,
        "precision": asked["precision"] or model.embedder().precision,
    }


def _width(model: AudioModel, settings: Mapping[str, Any]) -> int:
    return model.encoder.width * (2 if settings["pooling"] == "class+mean" else 1)


def _plan(items: Sequence[Item], old: Index | None) -> _Plan:
    plan, files, wanted = _Plan(), Files(), dict[RecordingKey, Source]()
    for item in items:
        if item.fault is not None:
            plan.failures.append((item.name, item.fault))
            continue
        try:
            source = files.source(item)
        except OSError as error:
            plan.failures.append((item.name, error.strerror or str(error)))
            continue
        wanted[source.key] = source
    for place, source in enumerate([] if old is None else old.sources):
        try:
            state = files.fingerprint(source.path)
        except (OSError, MissingError):
            state = None
        now = wanted.get(source.key)
        if state == source.fingerprint and (now is None or now.offset == source.offset):
            plan.kept.append(place)
            wanted.pop(source.key, None)
        elif now is None and state is not None and source.member is None:
            wanted[source.key] = files.source(source.item())
        elif now is None:
            plan.dropped += 1
    plan.need = wanted
    return plan


def _hear(model: AudioModel, plan: _Plan, settings: Mapping[str, Any], partial: Partial, ask: Ask) -> None:
    """See to it that `partial` holds every recording that is needed, as its file is now, or `plan` its failure."""
    for key, source in plan.need.items():
        if key in partial.done and partial.done[key][0].fingerprint != source.fingerprint:
            del partial.done[key]
    todo = [source for key, source in plan.need.items() if key not in partial.done]
    tick, bad = counter("indexing"), 0
    with closing(embed_windows.embed_sources(model, todo, settings, ask.batch, ask.threads)) as found:
        for done, (source, times, vectors) in enumerate(found, 1):
            if isinstance(vectors, str):
                plan.failures.append((source.name, vectors.replace(source.path, source.name)))
                bad += 1
            else:
                partial.add(source, times, vectors)
            tick(done, len(todo), bad)


def told(name: str, reason: str) -> str:
    """A failure on a line, which names the recording once."""
    return reason if name in reason else f"{name}: {reason}"


def _nothing(plan: _Plan) -> AsitError:
    first = "\n    ".join(told(name, reason) for name, reason in plan.failures[:_NAMED])
    if not plan.failures:
        return ConfigError("nothing is left in the index", "a recording or more", "give a folder of recordings")
    return AudioError(
        f"none of {len(plan.failures)} recordings could be read, such as\n    {first}",
        "a recording or more",
        "see `asit doctor` for the formats that are read here",
    )


def _fill(
    to: Path,
    card: Mapping[str, Any],
    old: Index | None,
    plan: _Plan,
    heard: Sequence[Done],
    threads: int,
) -> None:
    """Write the index's files: what was kept first, in its order, then what was heard."""
    sources = [] if old is None else [old.sources[place] for place in plan.kept]
    sources += [source for source, _, _ in heard]
    kept = np.empty(0, np.int64) if old is None else old.rows_at(plan.kept)
    fresh = sum(len(times) for _, times, _ in heard)
    width = heard[0][2].shape[1] if heard else old.card["width"] if old is not None else 0
    total = len(kept) + fresh
    rows = np.empty(total, index_files.ROW)
    vectors = np.lib.format.open_memmap(to / index_files.VECTORS, "w+", np.dtype("<f2"), (total, width))
    if old is not None:
        vectors[: len(kept)] = old.vectors[kept]
        rows[: len(kept)] = old.rows[kept]
        # Recordings are counted anew.
        rows["file"][: len(kept)] = np.searchsorted(np.asarray(plan.kept), rows["file"][: len(kept)])
    at = len(kept)
    for place, (_, times, found) in enumerate(heard, len(plan.kept)):
        part = slice(at, at + len(times))
        vectors[part], rows["file"][part] = found, place
        rows["start"][part], rows["end"][part] = np.asarray(times).T
        at = part.stop
    vectors.flush()
    np.save(to / index_files.ROWS, rows, allow_pickle=False)
    with (to / index_files.SOURCES).open("w", encoding="utf-8") as file:
        file.writelines(recordings.lines(sources))
    with (to / index_files.FAILURES).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in plan.failures)
    names = [index_files.VECTORS, index_files.ROWS, index_files.SOURCES, index_files.FAILURES]
    facts: dict[str, Any] = {"search": "exact"}
    if total > index_files.EXACT_MOST:
        graph = old.graph if old is not None and len(kept) == len(old) else None
        if graph is None:
            graph = Graph(width)
        graph.add(vectors[len(graph) :], threads, counter("graph", "rows"))
        graph.save(to / index_files.GRAPH)
        names.append(index_files.GRAPH)
        numbers = (CONNECTIVITY, EXPANSION_ADD, EXPANSION_SEARCH)
        facts = {
            "search": "graph",
            "graph": dict(zip(("connectivity", "expansion_add", "expansion_search"), numbers, strict=True)),
        }
    whole = {
        "kind": index_files.KIND,
        "format": index_files.FORMAT,
        "asit": importlib.metadata.version("asit-audio"),
        **card,
        "width": width,
        "rows": total,
        "recordings": len(sources),
        "failures": len(plan.failures),
        **facts,
        "sha256": {name: index_files.sha256(to / name) for name in names},
    }
    (to / index_files.CARD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
