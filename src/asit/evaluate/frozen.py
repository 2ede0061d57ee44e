"""Evaluate a frozen model: probes on its features, with all labels or few, on splits or over folds; beside
the same architecture untrained and log-mel statistics (`asit probe`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asit.audio import files
from asit.config import TableSettings
from asit.data.annotations.clips import rows_of
from asit.data.catalogue import frames
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import Labels, read_labels, subsample
from asit.data.catalogue.splits import (
    Splits,
    by_folds,
    canonical,
    check_splits,
    drop_unseen_classes,
    error_in_fold,
    folds,
    make_splits,
    may_share_groups,
)
from asit.data.catalogue.tables import TableRow
from asit.data.shards import tar_index
from asit.errors import AsitError, CatalogueError, ConfigError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import MODEL, FeatureSettings, Pooling, readers
from asit.evaluate.features import Collected, Readers, collect
from asit.evaluate.frozen_scores import FrozenScores, FrozenSettings, Keep, ProbeScorer, Rows
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.runtime import World
from asit.training import open_data, resources
from asit.training.block_rounds import BlockRounds

log = logging.getLogger(__name__)

ALL = "all"
TOKENS_SHARE = 0.7
"""Share of the machine's memory that patch tokens may take."""


def open_catalogue(
    data: Any, model: AudioModel, world: World, *, bad_files: float, table: TableSettings | None = None
) -> Catalogue:
    """Read a catalogue, or make one in memory of a table, or of a folder with a folder for each class.

    Raises:
        CatalogueError: nothing usable is there; every process raises it, though only the main one looks.
    """
    data, table = frames.take(data, table)
    path = tar_index.index_of(data)
    if path is not None:
        return Catalogue.read(path)
    read = functools.partial(open_data.catalogue, data, model.front_end.settings, None, bad_files=bad_files)
    read = functools.partial(read, table=table)
    (found,) = BlockRounds(world, range(1)).run(lambda own: read(labels="folder") if own else None)
    assert found[0] is not None
    return found[0]


def evaluate_frozen(
    model: AudioModel,
    catalogue: Catalogue,
    settings: FrozenSettings,
    *,
    world: World,
    store: Store | None = None,
    keep: Keep | None = None,
) -> FrozenScores | None:
    """Fit and score probes; the features of each clip are computed once for all of them.

    Every process of the world calls this; the main one gets the scores, the others None. `keep` is called there with
    each record and the scores of its clips.

    Raises:
        CatalogueError: labels, splits or folds that cannot be scored; too many unreadable clips.
        ConfigError: settings out of range.
        AsitError: features that are not finite.
    """
    settings.check()
    labels = read_labels(catalogue, settings.kind, missing=settings.missing)
    over = list(all_splits(catalogue, labels, settings))
    used = np.unique(np.concatenate([rows for _, splits in over for _, rows in splits.items()]))
    tokens = "prototype" in settings.probes
    if tokens:
        _check_memory(model, float(catalogue.seconds[used].sum(dtype=np.float64)), 1 + settings.baselines)
    pooling = settings.pooling if {"linear", "knn"} & set(settings.probes) else ()
    found = collect_features(model, catalogue, used, settings, pooling=pooling, tokens=tokens, world=world, store=store)
    if found is None:
        return None
    scorer = ProbeScorer(
        catalogue=catalogue, labels=labels, found=found, rows=used[found.kept], settings=settings, world=world
    )
    return FrozenScores(
        task=str(catalogue.header.get("task") or ""),
        kind="multi" if labels.multi else "single",
        classes=labels.names,
        records=[record for fold, splits in over for record in scorer.records(fold, splits, keep)],
    )


def collect_features(
    model: AudioModel,
    catalogue: Catalogue,
    rows: Rows,
    settings: FeatureSettings,
    *,
    pooling: tuple[Pooling, ...],
    tokens: bool = False,
    world: World,
    store: Store | None,
) -> Collected | None:
    """Collect features of the clips at `rows`; see `collected`."""
    wanted = readers(model, settings, pooling, tokens)
    return collected(catalogue, rows, wanted, store=store, world=world, bad_files=settings.bad_files)


def collected(
    catalogue: Catalogue, rows: Rows, wanted: Readers, *, store: Store | None, world: World, bad_files: float
) -> Collected | None:
    """Collect what readers read of the clips at `rows` (None in all processes but the main one); log cache hits and
    failures."""
    found = collect(
        catalogue.subset(rows) if len(rows) < len(catalogue) else catalogue,
        wanted,
        store=store,
        world=world,
        bad_files=bad_files,
        progress=counter("features", "clips"),
    )
    if found is None:
        return None
    if store is not None:
        text = "features of %d of %d clips came from the cache (%s, %.2f GB of at most %g)"
        log.info(text, found.cached, len(rows), store.folder, store.size() / 1e9, store.limit / 1e9)
        if store.trouble:
            log.warning("the cache could not be written: %s", store.trouble)
    if found.bad:
        first = ", ".join(path for path, _ in found.bad[:3])
        log.warning("%d of %d clips cannot be read and are left out: %s", len(found.bad), len(rows), first)
    return found


def _check_memory(model: AudioModel, seconds: float, encoders: int) -> None:
    """Refuse more patch tokens than fit in memory: the prototype probe holds them all, as float16."""
    encoder, settings = model.encoder, model.front_end.settings
    columns = seconds / (encoder.stride[0] * settings.shift_ms / 1000)
    needed = columns * encoder.grid[1] * encoder.width * 2 * encoders / 1e9
    memory = resources.machine_memory() / 1e9 or np.inf
    if needed > TOKENS_SHARE * memory:
        raise ConfigError(
            f"patch tokens of {seconds / 3600:.1f} h of audio take {needed:.1f} GB, the machine has {memory:.1f} GB",
            f"at most {TOKENS_SHARE:.0%} of its memory for the prototype probe",
            "take fewer clips with --clips, leave the prototype probe or the baselines out, or use a larger machine",
        )


def all_splits(catalogue: Catalogue, labels: Labels, settings: FrozenSettings) -> Iterator[tuple[str | None, Splits]]:
    """Yield the checked splits, or (fold, splits) of each fold."""
    over_folds = settings.fold == ALL or (settings.fold is None and by_folds(catalogue))
    for fold in folds(catalogue) if over_folds else [settings.fold]:
        log.debug("fold %s", fold)
        try:
            splits = _checked_splits(catalogue, labels, settings, fold)
        except AsitError as error:
            raise (error if fold is None else error_in_fold(fold, error)) from None
        yield fold, splits


def _checked_splits(catalogue: Catalogue, labels: Labels, settings: FrozenSettings, fold: str | None) -> Splits:
    splits = make_splits(
        catalogue, train=settings.train, validation=settings.validation, test=settings.test, fold=fold, labels=labels
    )
    if settings.unseen == "skip":
        splits = drop_unseen_classes(labels, splits)
    if not len(splits.test):
        reason = "there are no splits and no folds" if catalogue.column("split") is None else "there is no test split"
        if splits.unseen:
            reason = f"no test clip is of a class with training clips ({', '.join(splits.unseen[:5])})"
        raise CatalogueError(
            f"no clip to score: {reason}",
            "clips of a split named test, or folds",
            "add a column split (train, test) or fold to the table, or name the split with --test",
        )
    train, validation, test = (_draw(labels, rows, settings) for _, rows in splits.items())
    splits = replace(splits, train=train, validation=validation, test=test)
    shared = may_share_groups(catalogue, settings.allow_shared_groups)
    check_splits(labels, splits, catalogue.column("group"), allow_shared_groups=shared)
    return splits


def _draw(labels: Labels, rows: Rows, settings: FrozenSettings) -> Rows:
    """Draw about `settings.clips` of a split, keeping every class."""
    if settings.clips is None or len(rows) <= settings.clips:
        return rows
    return subsample(labels, rows, share=settings.clips / len(rows), seed=settings.seed)


PROBED: tuple[Pooling, ...] = ("class", "mean", "class+mean", "time-mean", "mel-mean")
HEADLINE: Pooling = "class+mean"
"""The pooling that encoders are compared by."""
PRETRAINING_POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean")
"""Poolings probed during pretraining: the narrow ones, which take seconds."""
PRETRAINED = "pretrained"
"""Name of the model among the encoders of `accuracies`."""


def linear_probes(
    model: AudioModel,
    clips: Catalogue,
    *,
    seed: int,
    pooling: tuple[Pooling, ...] = PROBED,
    baselines: bool = False,
    store: Store | None = None,
) -> FrozenScores:
    """Probe the frozen model on clips of `labelled_clips`; `baselines`: also the untrained one and log-mel statistics.

    All clips are cut or padded to the median length of the first training clips, at most 10 s.
    """
    settings = FrozenSettings(
        probes=("linear",),
        pooling=pooling,
        baselines=baselines,
        seed=seed,
        validation=(),
        kind="single",
        allow_shared_groups=True,
        seconds=min(10.0, float(np.median(clips.seconds[:50]))),
        bad_files=0.0,
    )
    found = evaluate_frozen(model, clips, settings, world=World(0, 1, model.encoder.pos_embed.device, ""), store=store)
    assert found is not None, "a single process is the main one"
    return found


def accuracies(found: FrozenScores) -> dict[str, dict[str, dict[str, Any]]]:
    """Return encoder -> kind of features -> {"accuracy", "interval", "clips"}."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for record in found.records:
        metric, encoder = record["metrics"]["accuracy"], record["encoder"]
        out.setdefault(PRETRAINED if encoder == MODEL else encoder, {})[record["features"]] = {
            "accuracy": metric["value"],
            "interval": metric["interval"],
            "clips": record["clips"],
        }
    return out


def metrics_entry(found: FrozenScores) -> dict[str, Any]:
    """Make the values of a probe's line in metrics.jsonl."""
    results = accuracies(found)[PRETRAINED]
    features = {kind: result["accuracy"] for kind, result in results.items()}
    return {"accuracy": features[HEADLINE], "features": features, "clips": results[HEADLINE]["clips"]}


def labelled_clips(table: Any, most: int, seed: int, settings: TableSettings | None = None) -> Catalogue:
    """Read the training, then the test clips of a table, a catalogue or shards; at most `most` of each, drawn.

    Raises:
        CatalogueError: no or several labels of a clip, or no split into train and test.
    """
    table, settings = frames.take(table, settings)
    path = tar_index.index_of(table)
    listed: Sequence[TableRow] | Catalogue = list(rows_of(table, settings)) if path is None else Catalogue.read(path)
    splits = listed.texts("split") if isinstance(listed, Catalogue) else [row.split for row in listed]
    chosen = []
    for name in ("train", "test"):
        part = np.flatnonzero([canonical(split or "") == name for split in splits])
        if not len(part):
            found = sorted(set(map(str, splits)))[:5]
            raise CatalogueError(
                f"{table}: no clip of the split {name!r}; its splits are {', '.join(found)}",
                "a column split with train and test",
                "add it, so that the probe is scored on clips it has not been fitted on",
            )
        if len(part) > most:
            part = part[np.sort(np.random.default_rng([seed, len(name)]).permutation(len(part))[:most])]
        chosen.append(part)
    rows = np.concatenate(chosen)
    if isinstance(listed, Catalogue):
        clips = listed.subset(rows)
    else:
        clips = Catalogue.from_clips([_clip(listed[row]) for row in rows.tolist()])
    read_labels(clips, "single")
    return clips


def _clip(row: TableRow) -> Clip:
    info = files.probe(row.path)
    start = row.start or 0.0
    end = info.seconds if row.end is None else min(row.end, info.seconds)
    if end <= start:
        raise CatalogueError(
            f"{row.path} is {info.seconds:.2f} s long, and the clip starts at {start:g} s",
            "a part of the file",
            "correct the table's start and end",
        )
    return Clip(row.path, end - start, info.rate, info.channels, row.label, row.split, start=start)
