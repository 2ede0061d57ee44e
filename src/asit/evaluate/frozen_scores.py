"""Fit probes on the features of a catalogue, make a result record of each, and summarise them in a table.

Letters: N clips of the catalogue, n clips that could be read, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, subsample
from asit.data.catalogue.splits import Splits, may_share_groups
from asit.errors import CatalogueError, ConfigError
from asit.evaluate.feature_readers import (
    LOG_MEL,
    LOG_MEL_STATISTICS,
    MODEL,
    POOLINGS,
    FeatureSettings,
    Pooling,
    choose,
    pooled,
)
from asit.evaluate.features import Collected
from asit.evaluate.metrics import fold_summary
from asit.evaluate.probes import ProbeScores, knn_scores, ridge_scores
from asit.evaluate.prototypes import LabelledRows, prototype_probe
from asit.evaluate.result_records import ClipScores, RecordHeader, bracketed, group_codes, result_record, text_table
from asit.runtime import World

Rows = npt.NDArray[np.int64]
Keep = Callable[[dict[str, Any], ClipScores], None]
"""Takes each record and the scores of its clips."""


Probe = Literal["linear", "knn", "prototype"]


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(FeatureSettings):
    """Settings of probes.

    Attributes:
        probes: which are fitted; prototype reads patch tokens.
        shares, per_class: parts of the training labels, each drawn once per seed; neither: all labels.
        seeds: number of draws, the first with `seed`.
        fold: a fold to test on; "all": each in turn; None: the splits, or all folds where there are no splits.
        kind: whether clips have one label or several.
        missing: whether clips without a label are an error, left out, or of the class "background".
        unseen: whether test clips of classes without a training clip are an error or left out.
        allow_shared_groups: a group may be in several splits, as in speaker identification.
        clips: about so many clips of each split, drawn with the seed.
    """

    pooling: tuple[Pooling, ...] = ("class+mean+std",)
    probes: tuple[Probe, ...] = ("linear", "knn")
    shares: tuple[float, ...] = ()
    per_class: tuple[int, ...] = ()
    seeds: int = 1
    fold: str | None = None
    kind: Literal["auto", "single", "multi"] = "auto"
    missing: Literal["error", "skip", "background"] = "error"
    unseen: Literal["error", "skip"] = "error"
    allow_shared_groups: bool = False
    clips: int | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: names them.
        """
        choose("probe", self.probes, get_args(Probe))
        choose("pooling", self.pooling, POOLINGS)
        wrong = [f"{share:g}" for share in self.shares if not 0 < share <= 1]
        wrong += [str(count) for count in self.per_class if count < 1]
        if wrong:
            expected = "shares above 0 up to 1, or clips of each class from 1"
            raise ConfigError(f"parts of the labels: {', '.join(wrong)}", expected, "change these")
        few_clips = self.clips is not None and self.clips < 2
        if self.seeds < 1 or few_clips or (self.seconds is not None and self.seconds <= 0):
            found = f"seeds {self.seeds}, clips {self.clips}, seconds {self.seconds}"
            raise ConfigError(found, "at least one seed, two clips in a split, a length above 0", "change these")


class ScoredProbe(NamedTuple):
    """What a score is of."""

    encoder: str
    features: str
    probe: Probe


class ProbeScorer:
    """Fits probes on the features of a catalogue's clips and scores others.

    Args:
        catalogue: N clips.
        labels: of them.
        found: features of some of them.
        rows: (n,) which.
        settings: probes and parts of the labels.
        world: its device trains the prototype probe.
    """

    def __init__(
        self, catalogue: Catalogue, labels: Labels, found: Collected, rows: Rows, settings: FrozenSettings, world: World
    ) -> None:
        self.catalogue, self.labels, self.found, self.settings = catalogue, labels, found, settings
        self.device = world.device
        self.index = np.full(len(catalogue), -1, np.int64)  # of each clip in the features; -1: unreadable
        self.index[rows] = np.arange(len(rows))
        self.groups = None if may_share_groups(catalogue, settings.allow_shared_groups) else group_codes(catalogue)
        self._table: tuple[tuple[str, str], npt.NDArray[np.float32]] | None = None

    def records(self, fold: str | None, splits: Splits, keep: Keep | None = None) -> Iterator[dict[str, Any]]:
        """Yield a record for each part of the labels, seed, encoder, kind of features and probe.

        Args:
            fold: name of the fold that the test split is; None: of the catalogue's splits.
            splits: rows of the catalogue.
            keep: called with each record and the scores of its clips before it is yielded.

        Raises:
            CatalogueError: no training clip could be read.
        """
        settings = self.settings
        train, validation, test = (rows[self.index[rows] >= 0] for _, rows in splits.items())
        if not len(train):
            raise CatalogueError("no training clip can be read", "at least one", "mend these files")
        unreadable = [""] * (len(splits.test) - len(test))
        task, split = str(self.catalogue.header.get("task") or ""), "test" if fold is None else f"fold {fold}"
        for labels, part, seed in self._parts(train):
            for which in self._probes():
                scored = self._score(which, part, validation, test, seed)
                weights = f"{which.probe} probe, {which.features}" + f", {which.encoder}" * (which.encoder != MODEL)
                header = RecordHeader(task, split, weights, None)
                scores = ClipScores(test, scored.scores, unreadable)
                record = {
                    **result_record(
                        scores, self.labels, self.catalogue, header, seed=settings.seed, groups=self.groups
                    ),
                    **which._asdict(),
                    "fold": fold,
                    "labels": labels,
                    "train_clips": len(part),
                    "seed": seed,
                    "regularisation": scored.regularisation,
                    "chosen_by": scored.chosen_by,
                    "unseen_classes": list(splits.unseen),
                }
                if keep is not None:
                    keep(record, scores)
                yield record

    def _parts(self, train: Rows) -> Iterator[tuple[str, Rows, int]]:
        """Yield the name and the rows of each part of the training labels, for each seed."""
        settings = self.settings
        seeds = range(settings.seed, settings.seed + settings.seeds)
        if not settings.shares and not settings.per_class:
            yield from (("all", train, seed) for seed in seeds)
        drawn: list[tuple[str, dict[str, Any]]] = [(f"{100 * one:g} %", {"share": one}) for one in settings.shares]
        drawn += [(f"{count} a class", {"per_class": count}) for count in settings.per_class]
        for name, how in drawn:
            yield from ((name, subsample(self.labels, train, seed=seed, **how), seed) for seed in seeds)

    def _probes(self) -> Iterator[ScoredProbe]:
        for encoder in self.found.vectors:
            for features in (LOG_MEL,) if encoder == LOG_MEL_STATISTICS else self.settings.pooling:
                for probe in self.settings.probes:
                    if probe != "prototype":
                        yield ScoredProbe(encoder, features, probe)
            if "prototype" in self.settings.probes and encoder in self.found.tokens:
                yield ScoredProbe(encoder, "patch tokens", "prototype")

    def _score(self, which: ScoredProbe, train: Rows, validation: Rows, test: Rows, seed: int) -> ProbeScores:
        multi, index = self.labels.multi, self.index
        targets, held_targets = self.labels.matrix(train), self.labels.matrix(validation)
        if which.probe == "prototype":
            return prototype_probe(
                self.found.tokens[which.encoder],
                LabelledRows(index[train], targets),
                index[test],
                multi=multi,
                seed=seed,
                validation=LabelledRows(index[validation], held_targets) if len(validation) else None,
                device=self.device,
            )
        key = which.encoder, which.features
        if self._table is None or self._table[0] != key:
            self._table = key, pooled(self.found.vectors[which.encoder], which.features)
        table = self._table[1]
        if which.probe == "knn":
            return knn_scores(table[index[train]], targets, table[index[test]])
        return ridge_scores(
            table[index[train]],
            targets,
            table[index[test]],
            criterion="mAP" if multi else "accuracy",
            seed=seed,
            groups=fold_groups(self.groups, train, targets),
            validation=(table[index[validation]], held_targets) if len(validation) else None,
        )


def fold_groups(groups: Rows | None, train: Rows, targets: npt.NDArray[np.float32]) -> Rows | None:
    """Return the groups of cross-validation on these clips; None where a class is in one group alone.

    Args:
        groups: of all clips, see `group_codes`.
        train: (n,) the clips.
        targets: (n, C) of them.
    """
    if groups is None:
        return None
    own = np.unique(groups[train], return_inverse=True)[1]
    counts = [np.unique(own[targets[:, c] > 0]).size for c in range(targets.shape[1])]
    return own if min((count for count in counts if count), default=0) > 1 else None


@dataclass(frozen=True)
class FrozenScores:
    """Scores of a frozen model.

    Attributes:
        task: the corpus, where the catalogue names one.
        kind: "single" or "multi".
        classes: C names.
        records: one for each encoder, features, probe, part of the labels, seed and fold (docs/evaluate.md).
    """

    task: str
    kind: str
    classes: tuple[str, ...]
    records: list[dict[str, Any]]

    @property
    def metric(self) -> str:
        """The metric of table and summary: accuracy, or mAP where clips have several labels."""
        return "mAP" if self.kind == "multi" else "accuracy"

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return "ENCODER, FEATURES, PROBE, LABELS" -> mean, standard deviation and values over seeds (or folds)."""
        return {", ".join(key): self._mean(group) for key, group in self._groups().items()}

    def text(self) -> str:
        """Make a table with a row for each encoder and part of the labels, a column for each probe."""
        groups = self._groups()
        columns = list(
            dict.fromkeys((probe, kind) for encoder, kind, probe, _ in groups if encoder != LOG_MEL_STATISTICS)
        )
        rows: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
        for (encoder, kind, probe, labels), group in groups.items():
            # Log-mel statistics, which have no tokens to pool, are in the first column of their probe.
            column = (probe, kind) if encoder != LOG_MEL_STATISTICS else next(c for c in columns if c[0] == probe)
            rows.setdefault((encoder, labels), {})[column] = self._cell(group)
        lines = [["encoder", "labels", *(f"{probe}: {kind}" for probe, kind in columns)]]
        lines += [[*key, *(cells.get(column, "-") for column in columns)] for key, cells in rows.items()]
        return "\n".join([*text_table(lines), self._legend()])

    def _groups(self) -> dict[tuple[str, str, str, str], list[dict[str, Any]]]:
        """Group records by encoder, features, probe and part of the labels."""
        out: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
        for record in self.records:
            out.setdefault(tuple(record[name] for name in (*ScoredProbe._fields, "labels")), []).append(record)
        return out

    def _mean(self, group: list[dict[str, Any]]) -> dict[str, Any]:
        """Summarise seeds, each the mean of its folds; with one seed, folds."""
        seeds: dict[int, list[float]] = {}
        for record in group:
            seeds.setdefault(record["seed"], []).append(record["metrics"][self.metric]["value"])
        first, *others = seeds.values()
        return fold_summary([float(np.mean(of)) for of in (first, *others)] if others else first)

    def _cell(self, group: list[dict[str, Any]]) -> str:
        over = self._mean(group)
        text = f"{over['mean']:.3f}" + (f" ± {over['std']:.3f}" if over["std"] is not None else "")
        intervals = [record["metrics"][self.metric]["interval"] for record in group]
        if any(record["fold"] is not None for record in group) or None in intervals:
            return text
        return text + bracketed(np.mean(intervals, 0).tolist(), 3)

    def _legend(self) -> str:
        lists = {record["list"]: record["clips"] for record in self.records}
        seeds = len({record["seed"] for record in self.records})
        if len(lists) == 1:
            ((digest, clips),) = lists.items()
            unit = self.records[0]["bootstrap"]["unit"]
            text = f"{self.metric} on {clips} test clips (list {digest}), in brackets the 95 % interval over {unit}s"
        else:
            text = f"mean {self.metric} over {len(lists)} folds, {sum(lists.values())} clips"
        if seeds > 1:
            return f"{text}; ± is the standard deviation over {seeds} seeds, the interval the mean of theirs"
        return text + ("; ± is the standard deviation over folds" if len(lists) > 1 else "")
