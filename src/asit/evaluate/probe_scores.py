"""Probes on collected features, one result record each: which are asked for, with which labels, on which side.

Letters: N clips of the catalogue, n clips that could be read, C classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels
from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION, Splits, may_share_groups, subsample
from asit.errors import ConfigError
from asit.evaluate import scoring
from asit.evaluate.feature_readers import LOG_MEL, LOG_MEL_STATISTICS, MODEL, POOLINGS, pooled
from asit.evaluate.features import Collected
from asit.evaluate.pooling import Pooling
from asit.evaluate.probes import knn_scores
from asit.evaluate.prototypes import prototype_probe
from asit.evaluate.ridge import ProbeScores, ridge_scores
from asit.runtime import World

Rows = npt.NDArray[np.int64]
Probe = Literal["linear", "knn", "prototype"]

PROBES: tuple[Probe, ...] = ("linear", "knn", "prototype")


@dataclass(frozen=True)
class Ask:
    """What to score, and how.

    Attributes:
        probes: which readers are fitted.
        pooling: what linear and knn read; prototype reads patch tokens.
        shares, per_class: parts of the training labels, each drawn once a seed; none of both: all labels.
        seeds, seed: how many draws, and the first.
        baselines: also the same architecture untrained, and log-mel statistics.
        fold: a fold as the test side; "all": each in turn; None: the splits, or all folds where there are no splits.
        train, validation, test: names of splits.
        kind: whether clips have one label or several.
        missing: whether clips without a label are an error or left out.
        unseen: whether test clips of classes without a training clip are an error or left out.
        allow_shared_groups: a group may lie on both sides, as in speaker identification.
        clips: at most so many clips on each side, drawn with the seed.
        seconds: length that every clip is cut or padded to; None: clips as they are.
        precision: arithmetic of the encoder.
        bad_files: share of clips that may be unreadable.
    """

    probes: tuple[Probe, ...] = ("linear", "knn")
    pooling: tuple[Pooling, ...] = ("class+mean",)
    shares: tuple[float, ...] = ()
    per_class: tuple[int, ...] = ()
    seeds: int = 1
    seed: int = 0
    baselines: bool = False
    fold: str | None = None
    train: tuple[str, ...] = TRAIN
    validation: tuple[str, ...] = VALIDATION
    test: tuple[str, ...] = TEST
    kind: Literal["auto", "single", "multi"] = "auto"
    missing: Literal["error", "skip"] = "error"
    unseen: Literal["error", "skip"] = "error"
    allow_shared_groups: bool = False
    clips: int | None = None
    seconds: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    bad_files: float = 0.1


@dataclass(frozen=True)
class Amount:
    """A part of the training labels."""

    share: float | None = None
    per_class: int | None = None

    def told(self) -> str:
        if self.per_class is not None:
            return f"{self.per_class} a class"
        return "all" if self.share is None else f"{100 * self.share:g} %"


def check(ask: Ask) -> None:
    """Refuse values that cannot be.

    Raises:
        ConfigError: names them.
    """
    choose("probe", ask.probes, PROBES)
    choose("pooling", ask.pooling, POOLINGS)
    if ask.shares and ask.per_class:
        raise ConfigError(
            "shares and per-class were both given", "one of the two", "run it twice: features come from the cache"
        )
    shares = [value for value in ask.shares if not 0 < value <= 1]
    counts = [value for value in ask.per_class if value < 1]
    if shares or counts:
        raise ConfigError(
            f"parts of the labels: {', '.join(f'{value:g}' for value in [*shares, *counts])}",
            "shares above 0 up to 1, or clips of each class from 1",
            "change these",
        )
    if ask.seeds < 1 or (ask.clips is not None and ask.clips < 2) or (ask.seconds is not None and ask.seconds <= 0):
        raise ConfigError(
            f"seeds {ask.seeds}, clips {ask.clips}, seconds {ask.seconds}",
            "at least one seed, two clips on a side, a length above 0",
            "change these",
        )


def choose(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a choice that is empty, names what is not known, or names it twice.

    Raises:
        ConfigError: names it, and all that is known.
    """
    wrong = [value for value in given if value not in known]
    if not wrong and given and len(set(given)) == len(given):
        return
    near = difflib.get_close_matches(wrong[0], known, 1) if wrong else []
    raise ConfigError(
        f"{name} {', '.join(wrong or given) or 'none'}" + (f" (did you mean {near[0]}?)" if near else ""),
        f"one or more of {', '.join(known)}, each once",
        f"give --{name} with these names parted by commas",
    )


class Scorer:
    """Probes on the collected features of one catalogue."""

    def __init__(
        self,
        catalogue: Catalogue,
        labels: Labels,
        found: Collected,
        rows: Rows,
        ask: Ask,
        task: str,
        world: World,
    ) -> None:
        self.catalogue, self.labels, self.found, self.ask, self.task = catalogue, labels, found, ask, task
        self.device = world.device
        self.place = np.full(len(catalogue), -1, np.int64)  # of each clip among those that could be read
        self.place[rows] = np.arange(len(rows))
        self.groups = None if may_share_groups(catalogue, ask.allow_shared_groups) else scoring.group_codes(catalogue)
        self._kept: tuple[tuple[str, str], npt.NDArray[np.float32]] | None = None

    def fold(self, fold: str | None, sides: Splits) -> Iterator[dict[str, Any]]:
        """Records of one test side."""
        train, validation, test = (self._read(rows) for _, rows in sides.items())
        lost = len(sides.test) - len(test)
        amounts = [Amount(share=share) for share in self.ask.shares] or [
            Amount(per_class=k) for k in self.ask.per_class
        ]
        for amount in amounts or [Amount()]:
            for seed in range(self.ask.seed, self.ask.seed + self.ask.seeds):
                part = train
                if amount != Amount():
                    part = subsample(self.labels, train, share=amount.share, per_class=amount.per_class, seed=seed)
                for encoder, kind, probe in self._all():
                    scored = self._probe(encoder, kind, probe, part, validation, test, seed)
                    record = self._record(encoder, kind, probe, scored, part, test, lost, amount, seed, fold)
                    yield record | {"unseen_classes": list(sides.unseen)}

    def _all(self) -> Iterator[tuple[str, str, Probe]]:
        """(encoder, features, probe) of each score."""
        pooled: list[Probe] = [probe for probe in self.ask.probes if probe != "prototype"]
        for encoder in self.found.vectors:
            kinds: Sequence[str] = (LOG_MEL,) if encoder == LOG_MEL_STATISTICS else self.ask.pooling
            for kind in kinds:
                for probe in pooled:
                    yield encoder, kind, probe
            if "prototype" in self.ask.probes and encoder in self.found.tokens:
                yield encoder, "patch tokens", "prototype"

    def _read(self, rows: Rows) -> Rows:
        return rows[self.place[rows] >= 0]

    def _features(self, encoder: str, kind: str, rows: Rows) -> npt.NDArray[np.float32]:
        return self._table(encoder, kind)[self.place[rows]]

    def _table(self, encoder: str, kind: str) -> npt.NDArray[np.float32]:
        """Features of all clips; of the kind that was asked for last they are kept."""
        if self._kept is None or self._kept[0] != (encoder, kind):
            self._kept = ((encoder, kind), pooled(self.found.vectors[encoder], kind))
        return self._kept[1]

    def _probe(
        self, encoder: str, kind: str, probe: Probe, train: Rows, validation: Rows, test: Rows, seed: int
    ) -> ProbeScores:
        targets = self.labels.matrix(train)
        chosen = self.labels.matrix(validation) if len(validation) else None
        if probe == "prototype":
            places = [self.place[rows] for rows in (train, validation, test)]
            return prototype_probe(
                self.found.tokens[encoder],
                places[0],
                targets,
                places[2],
                multi=self.labels.multi,
                seed=seed,
                validation=None if chosen is None else (places[1], chosen),
                device=self.device,
            )
        x, scored = self._features(encoder, kind, train), self._features(encoder, kind, test)
        if probe == "knn":
            return knn_scores(x, targets, scored)
        held = None if chosen is None else (self._features(encoder, kind, validation), chosen)
        return ridge_scores(
            x,
            targets,
            scored,
            criterion="mAP" if self.labels.multi else "accuracy",
            seed=seed,
            groups=self._fold_groups(train, targets),
            validation=held,
        )

    def _fold_groups(self, train: Rows, targets: npt.NDArray[np.float32]) -> Rows | None:
        """Groups for the folds that choose the penalty; None where they would take whole classes out."""
        if self.groups is None:
            return None
        groups = np.unique(self.groups[train], return_inverse=True)[1]
        of = [np.unique(groups[targets[:, c] > 0]).size for c in range(targets.shape[1])]
        several = [count for count in of if count]
        return groups if several and min(several) > 1 else None

    def _record(
        self,
        encoder: str,
        kind: str,
        probe: Probe,
        scored: ProbeScores,
        train: Rows,
        test: Rows,
        lost: int,
        amount: Amount,
        seed: int,
        fold: str | None,
    ) -> dict[str, Any]:
        name = f"{probe} probe, {kind}" + ("" if encoder == MODEL else f", {encoder}")
        record = scoring.record(
            scoring.Scored(test, scored.scores, [""] * lost),
            self.labels,
            self.catalogue,
            task=self.task,
            split="test" if fold is None else f"fold {fold}",
            weights=name,
            step=None,
            seed=self.ask.seed,
            groups=scoring.units(self.groups, test),
        )
        return record | {
            "probe": probe,
            "encoder": encoder,
            "features": kind,
            "fold": fold,
            "labels": amount.told(),
            "train_clips": len(train),
            "seed": seed,
            "regularisation": scored.regularisation,
            "chosen_by": scored.chosen_by,
        }
