"""Fit a head on frozen features, score it, and return it with its encoder as a classifier that can be saved.

The features are what the classifier itself will read: its windows of the training input's length, padded by the card's
rule, pooled by its head. Their standardisation is folded into the head's linear layer.

Letters: N clips, W windows of a clip, n windows of all clips, D features, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy import special

from asit.audio.fbank import FrontEnd
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, read_labels, subsample
from asit.data.catalogue.splits import Splits, by_folds, check_splits, make_splits, may_share_groups
from asit.errors import ConfigError
from asit.evaluate.classifier_scoring import ALL_CLIPS, FITTED_ON
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import MODEL, HeadReader
from asit.evaluate.frozen import all_splits, collected
from asit.evaluate.frozen_scores import FrozenScores, FrozenSettings, Rows, fold_groups
from asit.evaluate.logistic import LogisticProblem
from asit.evaluate.probes import Criterion, criterion_value, draw_folds
from asit.evaluate.result_records import ClipScores, RecordHeader, group_codes, result_record
from asit.io import checkpoint
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.card import head_of
from asit.model.classifier import Labelling, Pooling
from asit.model.encoders import empty_encoder
from asit.runtime import World

log = logging.getLogger(__name__)

PENALTIES = np.logspace(-1, 3, 5)
"""Penalties tried, a decade apart; features are standardised and each clip counts one."""
FEW_CLIPS_PENALTY = 10.0
"""Penalty where no clip can be held out."""
_ROUGH = 1e-2, 40  # precision and steps of the fits that only choose a penalty
_Floats = npt.NDArray[np.float64]


class FittedHead(NamedTuple):
    """A linear layer on features as they are (not standardised): weights (D, C), bias (C,), and how it was fitted.

    `held_out` is the criterion on the clips that chose the penalty; None where nothing was chosen.
    """

    weights: _Floats
    bias: _Floats
    penalty: float
    chosen_by: str
    held_out: float | None


@dataclass(frozen=True)
class ProbeRows:
    """Clips to fit: their windows' features, each (W, D), targets (N, C) in [0, 1], and groups (N,) or None."""

    windows: Sequence[npt.NDArray[np.float32]]
    targets: npt.NDArray[np.float32]
    groups: Rows | None = None

    def take(self, rows: Rows) -> ProbeRows:
        """Return the clips at `rows`, without their groups."""
        return ProbeRows([self.windows[row] for row in rows.tolist()], self.targets[rows])


class _Design:
    """The windows of clips as standardised rows, in which each clip counts one."""

    def __init__(self, clips: ProbeRows, multi: bool, kind: type = np.float64) -> None:
        counts = np.array([len(one) for one in clips.windows])
        x, weights = np.concatenate(clips.windows).astype(np.float64), np.repeat(1 / counts, counts)
        self.mean = weights @ x / len(counts)
        x -= self.mean
        variance = weights @ np.square(x) / len(counts)
        constant = variance <= 1e-12 * np.maximum(self.mean**2, 1e-30)
        self.inverse = np.where(constant, 0.0, 1 / np.sqrt(np.where(constant, 1.0, variance)))
        targets = np.repeat(clips.targets.astype(np.float64), counts, axis=0)
        self.problem = LogisticProblem((x * self.inverse).astype(kind), targets, weights, multi)

    def fit(self, penalty: float, *precision: Any) -> tuple[_Floats, _Floats]:
        """Return weights (D, C) and bias (C,) for features as they are."""
        found = self.problem.solve(penalty, *precision)
        weights = found.weights * self.inverse[:, None]
        return weights, found.bias - self.mean @ weights


def fit_head(
    train: ProbeRows, *, multi: bool, criterion: Criterion, seed: int, validation: ProbeRows | None = None
) -> FittedHead:
    """Fit logistic regression on standardised windows, its penalty chosen as that of `probes.ridge_scores`.

    Args:
        train: clips to fit; their groups are each kept within one fold.
        multi: sigmoids instead of a softmax.
        criterion: what the penalty is chosen by, on the mean of a clip's windows; of equal penalties the strongest.
        seed: of the folds.
        validation: clips to choose the penalty on, instead of cross-validation.
    """
    rng = np.random.default_rng(seed)
    pairs: list[tuple[ProbeRows, ProbeRows]] = []
    if validation is not None:
        pairs, chosen_by = [(train, validation)], f"{criterion} on the validation split"
    elif (fold_of := draw_folds(train.targets, criterion, train.groups, rng)) is None:
        chosen_by = "fixed: no clip can be held out"
    else:
        for fold in range(int(fold_of.max()) + 1):
            pairs.append((train.take(np.flatnonzero(fold_of != fold)), train.take(np.flatnonzero(fold_of == fold))))
        unit = "clips" if train.groups is None else "groups"
        chosen_by = f"{criterion} over {len(pairs)} folds of the training {unit}"
    penalty, held_out = FEW_CLIPS_PENALTY, None
    if pairs:
        totals = np.zeros(len(PENALTIES))
        for fitted, held in pairs:
            design = _Design(fitted, multi, np.float32)
            for i in range(len(PENALTIES) - 1, -1, -1):  # from the strongest, whose fit is near the next one's
                scores = _scores(*design.fit(PENALTIES[i], *_ROUGH), held.windows, multi)
                totals[i] += criterion_value(scores, held.targets, criterion)
        best = int(np.flatnonzero(totals == totals.max())[-1])
        penalty = float(PENALTIES[best])
        held_out = float(totals[best]) / (sum(len(held.windows) for _, held in pairs) if not multi else len(pairs))
    return FittedHead(*_Design(train, multi).fit(penalty), penalty, chosen_by, held_out)


def _scores(
    weights: _Floats, bias: _Floats, windows: Sequence[npt.NDArray[np.float32]], multi: bool
) -> npt.NDArray[np.float32]:
    """Return the mean of each clip's window scores, (N, C)."""
    counts = np.array([len(one) for one in windows])
    logits = np.concatenate(windows) @ weights + bias
    scores = special.expit(logits) if multi else special.softmax(logits, axis=1)
    means = np.add.reduceat(scores, np.cumsum(counts) - counts) / counts[:, None]
    return np.asarray(means, np.float32)


def blank_classifier(
    model: AudioModel, classes: tuple[str, ...], multi: bool, pooling: Pooling, layers: Sequence[int], seconds: float
) -> AudioModel:
    """Return the encoder with a linear head of zeros, whose training input is `seconds` or the encoder's view.

    A shorter input has the first columns of the view, in complete columns of patches.

    Raises:
        ConfigError: no such block, or a pooling that the encoder does not have.
    """
    encoder, front_end = model.encoder, model.front_end
    settings = encoder.settings
    wanted = positions.round_up_frames(max(1, front_end.frames_for(round(seconds * model.rate))), settings)
    frames = min(model.frames, wanted)
    own = empty_encoder(settings, frames, encoder.mels)
    state = encoder.state_dict()
    if "pos_embed" in state:
        state["pos_embed"] = encoder.positions((own.grid[0], own.grid[1]), stretch=False)
    checkpoint.load_strict(own, state, "the given encoder")
    span = front_end.samples_for(frames) / model.rate
    read = tuple(encoder.block_indices(list(layers))) if layers else ()
    labels = Labelling(classes, multi, pooling, max(span, seconds) if frames == wanted else span, layers=read)
    head = head_of(encoder.width, labels, norm=False)
    torch.nn.init.zeros_(head.linear.weight)
    device = encoder.pos_embed.device
    return AudioModel(own, FrontEnd(front_end.settings), head=head, labels=labels).to(device)


@dataclass(frozen=True)
class SavedProbe:
    """A classifier, its scores (no record where there is no test split), and how its head was fitted."""

    model: AudioModel
    scores: FrozenScores
    head: FittedHead
    clips: int

    def text(self) -> str:
        """Describe scores and fit in a few lines."""
        metric, head = self.scores.metric, self.head
        lines = [self.scores.text()] if self.scores.records else ["no test split: no score"]
        chosen = head.chosen_by + ("" if head.held_out is None else f": {metric} {head.held_out:.3f}")
        names = f"{len(self.scores.classes)} classes, fitted on {self.clips} clips"
        return "\n".join([*lines, f"{names}; penalty {head.penalty:g} ({chosen})"])


def fit_classifier(
    model: AudioModel,
    catalogue: Catalogue,
    settings: FrozenSettings,
    *,
    world: World,
    store: Store | None = None,
    name: str = "",
) -> SavedProbe | None:
    """Fit a linear head on the frozen encoder and score it on the test split, or on each fold.

    Of data with splits the head that is scored is returned. Of data with folds each fold is scored by a head that is
    fitted on the others, and the returned one is fitted on all clips; so it is where there is neither.

    Args:
        model: encoder or classifier, on the world's device; a head that it has is not used.
        catalogue: labelled clips.
        settings: pooling (one), layers, splits and at most one part of the labels.
        world, store: as for `evaluate_frozen`.
        name: of the model, for the card.

    Returns:
        In the main process; None in the others.

    Raises:
        ConfigError: settings that a saved head cannot have.
        CatalogueError: labels, splits or folds that cannot be used; too many unreadable clips.
    """
    pooling = _check(model, settings)
    labels = read_labels(catalogue, settings.kind, missing=settings.missing)
    over = _splits(catalogue, labels, settings)
    used = np.unique(np.concatenate([rows for _, splits in over for _, rows in splits.items()]))
    longest = float(np.quantile(catalogue.seconds[over[0][1].train], 0.95, method="higher"))
    blank = blank_classifier(
        model, labels.names, labels.multi, pooling, settings.layers, settings.seconds or round(longest, 3)
    )
    reader = HeadReader(blank, settings.precision)
    found = collected(catalogue, used, {MODEL: reader}, store=store, world=world, bad_files=settings.bad_files)
    if found is None:
        return None
    fitter = _Fitter(catalogue, labels, settings, found.tokens[MODEL], used[found.kept])
    records = []
    for fold, splits in over:
        head, fitted = fitter.fit(splits)
        if len(splits.test):
            records.append(fitter.record(fold, splits, head, blank, len(fitted)))
    if len(over) > 1:
        everything = Splits(used, used[:0], used[:0])
        head, fitted = fitter.fit(everything)
    kept = settings.train if catalogue.column("split") is not None and over[0][0] is None else (ALL_CLIPS,)
    kept = () if settings.fold is not None and len(over) == 1 else kept  # all folds but one
    fill(blank, head)
    facts: dict[str, Any] = {
        "method": "logistic regression on frozen features",
        "from": name,
        "clips": len(fitted),
        "catalogue": catalogue.digest,
        FITTED_ON: list(kept),
        "regularisation": head.penalty,
        "chosen_by": head.chosen_by,
        "seed": settings.seed,
        "precision": settings.precision,
    }
    blank.training.update(
        facts | {fact: model.training[fact] for fact in ("license", "data") if fact in model.training}
    )
    task, kind = str(catalogue.header.get("task") or ""), "multi" if labels.multi else "single"
    return SavedProbe(blank, FrozenScores(task, kind, labels.names, records), head, len(fitted))


def fill(model: AudioModel, head: FittedHead) -> None:
    """Write a fitted head into a classifier's linear layer."""
    assert model.head is not None, "a classifier"
    with torch.no_grad():
        model.head.linear.weight.copy_(torch.from_numpy(head.weights.T))
        model.head.linear.bias.copy_(torch.from_numpy(head.bias))


class _Fitter:
    """Fits and scores heads on the windows of a catalogue's clips (`rows`, those that could be read)."""

    def __init__(
        self, catalogue: Catalogue, labels: Labels, settings: FrozenSettings, windows: list[Any], rows: Rows
    ) -> None:
        self.catalogue, self.labels, self.settings, self.windows = catalogue, labels, settings, windows
        self.index = np.full(len(catalogue), -1, np.int64)
        self.index[rows] = np.arange(len(rows))
        self.groups = None if may_share_groups(catalogue, settings.allow_shared_groups) else group_codes(catalogue)

    def fit(self, splits: Splits) -> tuple[FittedHead, Rows]:
        """Return the head of a training split, or of a part of its labels, and the clips that it was fitted on."""
        settings, multi = self.settings, self.labels.multi
        train = splits.train[self.index[splits.train] >= 0]
        if settings.shares or settings.per_class:
            share, count = (*settings.shares, None)[0], (*settings.per_class, None)[0]
            train = subsample(self.labels, train, share=share, per_class=count, seed=settings.seed)
        held = splits.validation[self.index[splits.validation] >= 0]
        clips = self._clips(train)
        groups = fold_groups(self.groups, train, clips.targets)
        head = fit_head(
            ProbeRows(clips.windows, clips.targets, groups),
            multi=multi,
            criterion="mAP" if multi else "accuracy",
            seed=settings.seed,
            validation=self._clips(held) if len(held) else None,
        )
        return head, train

    def record(
        self, fold: str | None, splits: Splits, head: FittedHead, model: AudioModel, fitted: int
    ) -> dict[str, Any]:
        """Return the record of the test split, scored by the classifier's own layer."""
        assert model.head is not None
        settings, labels = self.settings, self.labels
        test = splits.test[self.index[splits.test] >= 0]
        fill(model, head)
        means = []
        with torch.inference_mode():
            for windows in self._clips(test).windows:
                logits = model.head.linear(torch.from_numpy(windows).to(model.head.linear.weight.device))
                scores = logits.sigmoid() if labels.multi else logits.softmax(1)
                means.append(scores.double().mean(0).float().cpu().numpy())
        scored = ClipScores(test, np.stack(means), [""] * (len(splits.test) - len(test)))
        split = "test" if fold is None else f"fold {fold}"
        header = RecordHeader(str(self.catalogue.header.get("task") or ""), split, "model", None)
        pooling = settings.pooling[0]
        return {
            **result_record(scored, labels, self.catalogue, header, seed=settings.seed, groups=self.groups),
            "encoder": MODEL,
            "features": pooling,
            "probe": "logistic",
            "fold": fold,
            "labels": _part(settings),
            "train_clips": fitted,
            "seed": settings.seed,
            "regularisation": head.penalty,
            "chosen_by": head.chosen_by,
            "unseen_classes": list(splits.unseen),
        }

    def _clips(self, rows: Rows) -> ProbeRows:
        return ProbeRows([self.windows[i] for i in self.index[rows].tolist()], self.labels.matrix(rows))


def _part(settings: FrozenSettings) -> str:
    names = [f"{100 * share:g} %" for share in settings.shares] + [f"{count} a class" for count in settings.per_class]
    return names[0] if names else "all"


def poolings_of(model: AudioModel) -> tuple[Pooling, ...]:
    """Return the kinds of pooling that an encoder has, the last the default of a saved head."""
    known: tuple[Pooling, ...] = get_args(Pooling)
    return known if model.encoder.prefix else tuple(one for one in known if not one.startswith("class"))


def _check(model: AudioModel, settings: FrozenSettings) -> Literal[Pooling]:
    """Return the pooling; refuse settings that one saved head cannot have."""
    settings.check()
    allowed = poolings_of(model)
    several = len(settings.shares) + len(settings.per_class) > 1 or settings.seeds > 1
    wrong = [one for one in settings.pooling if one not in allowed]
    if wrong or len(settings.pooling) > 1:
        raise ConfigError(
            f"a head to save with pooling {', '.join(settings.pooling)}", f"one of {', '.join(allowed)}", "choose one"
        )
    if several or settings.baselines:
        raise ConfigError(
            "a head to save with several parts of the labels, several seeds or baselines",
            "one head: at most one of shares and per-class, one seed",
            "compare them without --save first, and save the one to keep",
        )
    return settings.pooling[0]  # type: ignore[return-value]


def _splits(catalogue: Catalogue, labels: Labels, settings: FrozenSettings) -> list[tuple[str | None, Splits]]:
    """Return the splits, or those of each fold; without test clips all others are fitted."""
    if settings.fold is not None or by_folds(catalogue):
        return list(all_splits(catalogue, labels, settings))
    splits = make_splits(
        catalogue, train=settings.train, validation=settings.validation, test=settings.test, labels=labels
    )
    if len(splits.test):
        return list(all_splits(catalogue, labels, settings))
    shared = may_share_groups(catalogue, settings.allow_shared_groups)
    check_splits(labels, splits, catalogue.column("group"), allow_shared_groups=shared)
    return [(None, splits)]
