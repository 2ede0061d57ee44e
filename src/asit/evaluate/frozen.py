"""Frozen models scored: probes on their features, with all labels or few, on splits or over folds.

Letters: N clips of the catalogue, n clips that could be read, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, read_labels
from asit.data.catalogue.splits import (
    Splits,
    by_folds,
    check_splits,
    drop_unseen_classes,
    error_in_fold,
    folds,
    make_splits,
    may_share_groups,
    subsample,
)
from asit.data.shards import tar_index
from asit.errors import AsitError, CatalogueError, ConfigError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL_STATISTICS, encoders
from asit.evaluate.features import Collected, collect
from asit.evaluate.metrics import fold_summary
from asit.evaluate.probe_scores import Ask, Rows, Scorer, check
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.runtime import World
from asit.training import open_data as source
from asit.training import resources

ALL = "all"
TOKENS_SHARE = 0.7
"""Share of the machine's memory that patch tokens may take."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of a frozen model.

    Attributes:
        task: the corpus, where the catalogue names one.
        kind: "single" or "multi".
        classes: C names.
        records: one for each encoder, features, probe, part of the labels, seed and fold (docs/evaluate.md).
        notes: what the user should know.
    """

    task: str
    kind: str
    classes: tuple[str, ...]
    records: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """What the table shows: accuracy, or mAP where clips have several labels."""
        return "mAP" if self.kind == "multi" else "accuracy"

    def summary(self) -> dict[str, dict[str, Any]]:
        """ "ENCODER, FEATURES, PROBE, LABELS" -> mean, standard deviation and values over seeds (or folds)."""
        return {", ".join(key): self._over(group) for key, group in self._groups().items()}

    def text(self) -> str:
        """A table for a terminal: a row for each encoder and part of the labels, a column for each probe."""
        groups = self._groups()
        columns = list(
            dict.fromkeys((probe, kind) for encoder, kind, probe, _ in groups if encoder != LOG_MEL_STATISTICS)
        )
        rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
        for (encoder, kind, probe, labels), group in groups.items():
            # The statistics stand under the first column of their probe: they have no tokens to pool.
            at = (probe, kind) if encoder != LOG_MEL_STATISTICS else next(c for c in columns if c[0] == probe)
            rows.setdefault((encoder, labels), {})[at] = self._cell(group)
        lines = [["encoder", "labels", *(f"{probe}: {kind}" for probe, kind in columns)]]
        lines += [[encoder, labels, *(cells.get(c, "-") for c in columns)] for (encoder, labels), cells in rows.items()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*shown, self._legend()])

    def _groups(self) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
        """Records by encoder, features, probe and part of the labels."""
        out: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
        for record in self.records:
            key = tuple(record[name] for name in ("encoder", "features", "probe", "labels"))
            out.setdefault(key, []).append(record)
        return out

    def _over(self, group: list[dict[str, Any]]) -> dict[str, Any]:
        """Over seeds, each the mean of its folds; with one seed, over folds."""
        seeds: dict[int, list[float]] = {}
        for record in group:
            seeds.setdefault(record["seed"], []).append(record["metrics"][self.metric]["value"])
        values = [float(np.mean(of)) for of in seeds.values()] if len(seeds) > 1 else next(iter(seeds.values()))
        return fold_summary(values)

    def _cell(self, group: list[dict[str, Any]]) -> str:
        over = self._over(group)
        text = f"{over['mean']:.3f}" + (f" ± {over['std']:.3f}" if over["std"] is not None else "")
        intervals = [record["metrics"][self.metric]["interval"] for record in group]
        if any(record["fold"] is not None for record in group) or None in intervals:
            return text
        low, high = np.mean(intervals, 0)
        return f"{text} ({low:.3f}-{high:.3f})"

    def _legend(self) -> str:
        lists = {record["list"]: record["clips"] for record in self.records}
        seeds = len({record["seed"] for record in self.records})
        if len(lists) == 1:
            ((digest, clips),) = lists.items()
            unit = self.records[0]["bootstrap"]["unit"]
            scored = f"{self.metric} on {clips} test clips (list {digest}), in brackets the 95 % interval over {unit}s"
        else:
            scored = f"mean {self.metric} over {len(lists)} folds, {sum(lists.values())} clips"
        if seeds > 1:
            return f"{scored}; ± is the standard deviation over {seeds} seeds, the interval the mean of theirs"
        return scored + ("; ± is the standard deviation over folds" if len(lists) > 1 else "")


def open_data(data: str, model: AudioModel, world: World, *, bad_files: float) -> Catalogue:
    """The catalogue that `data` is, or one made for this look of a table, or of a folder with a folder for each class.

    Raises:
        CatalogueError: nothing usable there; told by every process, though the main one alone looks.
    """
    listed = tar_index.index_of(data)
    if listed is not None:
        return Catalogue.read(listed)
    found: Catalogue | AsitError | None = None
    if world.main:
        try:
            found = source.catalogue(source.Wanted(data, model.front_end.settings, bad_files, "folder"), None)
        except AsitError as error:
            found = error
    told = world.gather(found)[0]
    if isinstance(told, AsitError):
        raise told
    assert isinstance(told, Catalogue)
    return told


def evaluate(
    model: AudioModel,
    catalogue: Catalogue,
    ask: Ask,
    *,
    world: World,
    store: Store | None = None,
) -> Evaluation | None:
    """Fit and score the probes that were asked for; features of each clip are read once for all of it.

    Every process of the world calls this; the main one gets the scores, the others None.

    Raises:
        CatalogueError: labels, splits or folds that cannot be scored; too many unreadable clips.
        ConfigError: values that cannot go together.
        AsitError: features that are not finite.
    """
    check(ask)
    labels = read_labels(catalogue, ask.kind, missing=ask.missing)
    notes: list[str] = []
    sides = list(_sides(catalogue, labels, ask, notes))
    used = np.unique(np.concatenate([rows for _, one in sides for _, rows in one.items()]))
    if "prototype" in ask.probes:
        _tokens_fit(model, float(catalogue.seconds[used].sum(dtype=np.float64)), 2 if ask.baselines else 1)
    found = collect(
        catalogue.subset(used) if len(used) < len(catalogue) else catalogue,
        encoders(
            model,
            pooling=ask.pooling if {"linear", "knn"} & set(ask.probes) else (),
            tokens="prototype" in ask.probes,
            baselines=ask.baselines,
            seed=ask.seed,
            precision=ask.precision,
            seconds=ask.seconds,
        ),
        store=store,
        world=world,
        bad_files=ask.bad_files,
        progress=counter("features", "clips"),
    )
    if found is None:
        return None
    notes += told(found, len(used), store)
    task = str(catalogue.header.get("task") or "")
    scorer = Scorer(catalogue, labels, found, used[found.kept], ask, task, world)
    records = [record for fold, one in sides for record in scorer.fold(fold, one)]
    return Evaluation(task, "multi" if labels.multi else "single", labels.names, records, notes)


def _tokens_fit(model: AudioModel, seconds: float, encoders: int) -> None:
    """Refuse more patch tokens than memory holds: the prototype probe keeps them all, as float16.

    Raises:
        ConfigError: with what is needed and what there is.
    """
    encoder, settings = model.encoder, model.front_end.settings
    columns = seconds / (encoder.stride[0] * settings.shift_ms / 1000)
    needed = columns * encoder.grid[1] * encoder.width * 2 * encoders / 1e9
    there = resources.machine_memory() / 1e9 or np.inf
    if needed > TOKENS_SHARE * there:
        raise ConfigError(
            f"patch tokens of {seconds / 3600:.1f} h of sound take {needed:.1f} GB, and the machine has {there:.1f} GB",
            f"at most {TOKENS_SHARE:.0%} of its memory for the prototype probe",
            "take fewer clips with --clips, leave the prototype probe or the baselines out, or use a larger machine",
        )


def told(found: Collected, count: int, store: Store | None) -> list[str]:
    """What to say of the reading: what came from the cache, its size, and the clips left out."""
    notes = []
    if store is not None:
        where = f"{store.folder}, {store.size() / 1e9:.2f} GB of at most {store.limit / 1e9:g}"
        notes.append(f"features of {found.cached} of {count} clips came from the cache ({where})")
        if store.trouble:
            notes.append(f"the cache could not be written: {store.trouble}")
    if found.bad:
        first = ", ".join(path for path, _ in found.bad[:3])
        notes.append(f"{len(found.bad)} of {count} clips cannot be read and are left out: {first}")
    return notes


def _sides(catalogue: Catalogue, labels: Labels, ask: Ask, notes: list[str]) -> Iterator[tuple[str | None, Splits]]:
    """(fold or None, sides) of each scoring, checked."""
    over_folds = ask.fold == ALL or (ask.fold is None and by_folds(catalogue))
    for fold in folds(catalogue) if over_folds else [ask.fold]:
        try:
            sides = _sides_of(catalogue, labels, ask, fold)
        except AsitError as error:
            raise (error if fold is None else error_in_fold(fold, error)) from None
        notes += [note if fold is None else f"fold {fold}: {note}" for note in sides.notes if note not in notes]
        yield fold, sides


def _sides_of(catalogue: Catalogue, labels: Labels, ask: Ask, fold: str | None) -> Splits:
    sides = make_splits(
        catalogue,
        train=ask.train,
        validation=ask.validation,
        test=ask.test,
        fold=fold,
        labels=labels,
    )
    if ask.unseen == "skip":
        sides = drop_unseen_classes(labels, sides)
    if not len(sides.test):
        no_splits = catalogue.column("split") is None
        raise CatalogueError(
            "no clip to score: " + ("there are no splits and no folds" if no_splits else "no split is a test side")
            if not sides.unseen
            else f"no clip to score: no test clip is of a class with training clips ({', '.join(sides.unseen[:5])})",
            "clips of a split named test, or folds",
            "add a column split (train, test) or fold to the table, or name the split with --test",
        )
    train, validation, test = (_draw(labels, rows, ask) for rows in (sides.train, sides.validation, sides.test))
    sides = replace(sides, train=train, validation=validation, test=test)
    groups = catalogue.column("group")
    shared = may_share_groups(catalogue, ask.allow_shared_groups)
    sides.notes.extend(check_splits(labels, sides, groups, allow_shared_groups=shared))
    return sides


def _draw(labels: Labels, rows: Rows, ask: Ask) -> Rows:
    """About `ask.clips` of a side, every class kept."""
    if ask.clips is None or len(rows) <= ask.clips:
        return rows
    return subsample(labels, rows, share=ask.clips / len(rows), seed=ask.seed)
