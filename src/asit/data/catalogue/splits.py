"""Training, validation and test splits of a catalogue: by name, by fold or by a held-out share.

Letters in shapes: N clips, C classes, n chosen clips.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.columns import Words, identifier
from asit.data.catalogue.labels import Labels, Rows, read_labels
from asit.errors import AsitError, AudioError, CatalogueError, suggestion

TRAIN = ("train", "balanced", "unbalanced")
"""Names of training splits; AudioSet has two."""
VALIDATION = ("validation",)
TEST = ("test",)

USUAL = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
_SYNONYMS = {
    **dict.fromkeys(("training",), "train"),
    **dict.fromkeys(("val", "valid", "dev"), "validation"),
    **dict.fromkeys(("testing", "eval", "evaluation"), "test"),
}

_PARTS = re.compile(r"\d+|\D+")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Rows of the catalogue, ascending, int64; no clip is in two splits.

    Attributes:
        train, validation, test: the rows.
        unseen: classes whose clips :func:`drop_unseen_classes` removed.
    """

    train: Rows
    validation: Rows
    test: Rows
    unseen: tuple[str, ...] = ()

    def items(self) -> list[tuple[str, Rows]]:
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


def canonical(name: str) -> str:
    """Return "train", "validation" or "test" for the usual synonyms; other names in lower case."""
    name = (identifier(name) or "").lower()
    return _SYNONYMS.get(name, name)


def rows_of_splits(catalogue: Catalogue, names: Sequence[str]) -> Rows:
    """Return the rows of the clips of these splits, ascending; synonyms are one name.

    Raises:
        CatalogueError: a split that no clip has.
    """
    return np.flatnonzero(_in_splits(_having(catalogue, names, "name one of these, or none"), names))


def make_splits(
    catalogue: Catalogue,
    *,
    train: Sequence[str] = TRAIN,
    validation: Sequence[str] = VALIDATION,
    test: Sequence[str] = TEST,
    fold: str | None = None,
    share: float = 0.0,
    seed: int = 0,
    labels: Labels | None = None,
) -> Splits:
    """Split a catalogue by its split column or by one of its folds.

    Names are compared in lower case and by their synonyms: training is train; val, valid and dev are validation;
    testing, eval and evaluation are test. A catalogue without splits is all train.

    Args:
        catalogue: N clips.
        train, validation, test: names in the split column that make up each split.
        fold: test on this fold and train on the others; the split column is ignored.
        share: where there are no validation clips, hold out this share of the training clips: of each class, in
            complete groups.
        seed: of that draw.
        labels: of the catalogue's clips, read for a share if not given; clips without a label are in no split.

    Raises:
        CatalogueError: no clip to train on, an unknown split or fold, a name given for two splits, or a share that
            leaves nothing.
    """
    if not 0 <= share < 1:
        raise CatalogueError(f"a validation share of {share}", "0 or more and below 1", "change it")
    known = np.ones(len(catalogue), np.bool_) if labels is None else labels.known
    _log_unused(~known, "without a label")
    if fold is not None:
        splits = _from_fold(catalogue, fold, known)
    else:
        splits = _from_names(catalogue, {"train": train, "validation": validation, "test": test}, known)
    if not share or len(splits.validation):
        return splits
    labels = read_labels(catalogue) if labels is None else labels
    held = _hold_out(labels, splits.train, catalogue.column("group"), share, seed)
    return replace(splits, train=splits.train[~held], validation=splits.train[held])


def _hold_out(labels: Labels, rows: Rows, groups: Words | None, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return a mask (n,) of validation clips among training clips: of each class, and in complete groups."""
    part = labels.take(rows)
    stratum = part.rarest
    # A unit is what stays together: a group, or a clip without one.
    units = np.arange(len(rows)) if groups is None else groups.codes[rows].astype(np.int64)
    units = np.where(units < 0, np.arange(len(rows)) + (units.max(initial=0) + 1), units)
    units = np.unique(units, return_inverse=True)[1]
    sizes = np.bincount(units)
    # The stratum of a group is that of most of its clips, the lower one of equals.
    strata = len(part.names) + 1
    pairs, together = np.unique(units * strata + stratum, return_counts=True)
    best = np.lexsort((pairs % strata, -together, pairs // strata))
    best = best[np.unique(pairs[best] // strata, return_index=True)[1]]
    order = np.random.default_rng([seed, len(rows)]).permutation(len(sizes))
    order = order[np.argsort((pairs[best] % strata)[order], kind="stable")]
    # Going through the strata in order, hold a unit out whenever that brings the share nearer.
    chosen, seen, taken = np.zeros(len(sizes), np.bool_), 0, 0
    for unit, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        seen += size
        if taken + size / 2 < share * seen:
            chosen[unit], taken = True, taken + size
    if not taken:
        chosen[order[np.argmin(sizes[order])]] = True
    held: npt.NDArray[np.bool_] = chosen[units]
    # Each class keeps a unit to train on.
    kept = np.bincount(part.indices[~held[part.owners]], minlength=len(part.names))
    for index in np.flatnonzero((kept == 0) & (part.counts() > 0)).tolist():
        holders = part.owners[part.indices == index]
        if held[holders].all():
            held[units == units[holders[0]]] = False
    if not held.any() or held.all():
        raise CatalogueError(
            f"a share of {share:g} of {len(rows)} training clips in {len(sizes)} {'groups' if groups else 'clips'} "
            "cannot be held out with a training clip left of each class",
            "more clips, or more groups, than that",
            "give a validation split, or set the share to 0",
        )
    if groups is not None and abs(held.mean() - share) > 0.02:
        log.info(f"{held.mean():.0%} of the training clips are held out, not {share:.0%}: groups stay together")
    return held


def _log_unused(clips: npt.NDArray[np.bool_], which: str) -> None:
    if count := int(clips.sum()):
        log.info("%d clips %s are not used", count, which)


def _from_fold(catalogue: Catalogue, fold: str, known: npt.NDArray[np.bool_]) -> Splits:
    names, fold = folds(catalogue), identifier(fold) or fold
    if fold not in names:
        raise CatalogueError(f"there is no fold {fold}", f"one of {', '.join(names)}", "choose one of these")
    column = catalogue.column("fold")
    assert column is not None, "folds() has found some"
    _log_unused(column.codes < 0, "without a fold")
    inside = column.codes == column.words.index(fold)
    train, test = np.flatnonzero(known & ~inside & (column.codes >= 0)), np.flatnonzero(known & inside)
    if not len(train) or not len(test):
        use = "test" if len(train) else "train"
        raise CatalogueError(f"fold {fold} leaves no labelled clip to {use} on", "labelled clips", "label more clips")
    return Splits(train, np.empty(0, np.int64), test)


def _from_names(catalogue: Catalogue, named: dict[str, Sequence[str]], known: npt.NDArray[np.bool_]) -> Splits:
    for split, names in named.items():
        if names and tuple(names) != USUAL[split]:
            _having(catalogue, names, f"name one of these for {split}")
    if (column := catalogue.column("split")) is None:
        empty = np.empty(0, np.int64)
        return Splits(np.flatnonzero(known), empty, empty)
    for (one, first), (other, second) in itertools.combinations(named.items(), 2):
        if both := set(map(canonical, first)) & set(map(canonical, second)):
            found = f"split {', '.join(both)} is named for {one} and for {other}"
            raise CatalogueError(found, "each split once", "remove it from the other")
    chosen = {split: known & _in_splits(column, names) for split, names in named.items()}
    used = [name for names in named.values() for name in map(canonical, names)]
    for code, name in enumerate(column.words):
        if canonical(name) not in used:
            _log_unused(column.codes == code, f"of split {name}")
    _log_unused(column.codes < 0, "without a split")
    if not chosen["train"].any():
        found = f"no clip to train on: no labelled clip is in one of the splits {', '.join(named['train'])}"
        raise CatalogueError(found, _listed(column), "name the training splits, or rename them in the table")
    train, validation, test = map(np.flatnonzero, chosen.values())
    return Splits(train, validation, test)


def _in_splits(column: Words, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return a mask of the clips in these splits."""
    wanted = set(map(canonical, names))
    return np.array([*(canonical(word) in wanted for word in column.words), False])[column.codes]


def _having(catalogue: Catalogue, names: Sequence[str], fix: str) -> Words:
    """Return the column of splits, which must have all these names."""
    if (column := catalogue.column("split")) is None:
        raise CatalogueError(
            f"there is no split {', '.join(names)}: the catalogue has no splits",
            "a split column in the table that it was made from",
            "add it, or name no splits",
        )
    counts = _counts(column)
    present = set(map(canonical, counts))
    if missing := [name for name in names if canonical(name) not in present]:
        hint = suggestion(missing[0], counts)
        raise CatalogueError(f"there is no split {', '.join(missing)}{hint}", _listed(column), fix)
    return column


def _counts(column: Words) -> dict[str, int]:
    return {name: count for name, count in column.counts().items() if count}


def _listed(column: Words) -> str:
    return "the splits are " + ", ".join(f"{name} ({count} clips)" for name, count in _counts(column).items())


def by_folds(catalogue: Catalogue) -> bool:
    """Whether a catalogue is meant for cross-validation: its clips have folds, and no splits."""
    return catalogue.column("split") is None and catalogue.column("fold") is not None


def folds(catalogue: Catalogue) -> list[str]:
    """Return the names of the catalogue's folds in natural order: 2 before 10.

    Raises:
        CatalogueError: no folds, only one, or one without clips.
    """
    column = catalogue.column("fold")
    if column is None:
        raise CatalogueError("the catalogue has no folds", "a fold column in its table", "add it, or use splits")
    counts = column.counts()
    if all(name.isdecimal() for name in counts):  # a fold that lost all its clips to a scan leaves a gap
        numbers = set(map(int, counts))
        counts |= {str(number): 0 for number in range(min(numbers), max(numbers)) if number not in numbers}
    names = sorted(counts, key=lambda name: [(int(x), "") if x.isdecimal() else (-1, x) for x in _PARTS.findall(name)])
    empty = [name for name in names if not counts[name]]
    if empty or len(names) < 2:
        found = ", ".join(f"{name} ({counts[name]} clips)" for name in names if counts[name])
        raise CatalogueError(
            f"folds without a clip: {', '.join(empty)}" if empty else "there is only one fold",
            f"at least two folds, and clips in each; there are {found}",
            "see the catalogue's .skipped.jsonl for clips left out, or renumber the folds",
        )
    return names


def error_in_fold(name: str, error: AsitError, remedy: str | None = None) -> AsitError:
    """Put the fold's name before an error; one about an audio file, which names the file, is returned unchanged.

    Args:
        name: of the fold.
        error: what was raised in it.
        remedy: replaces the error's own fix.
    """
    if isinstance(error, AudioError):
        return error
    return type(error)(f"fold {name}: {error.found}", error.expected, error.remedy if remedy is None else remedy)


def drop_unseen_classes(labels: Labels, splits: Splits) -> Splits:
    """Remove the validation and test clips of every class that has no training clip; ``unseen`` lists these classes."""
    trained = labels.counts(splits.train) > 0
    unseen = np.flatnonzero((labels.counts(np.concatenate([splits.validation, splits.test])) > 0) & ~trained)
    if not len(unseen):
        return splits
    kept = {}
    for split, rows in splits.items()[1:]:
        part = labels.take(rows)
        kept[split] = np.delete(rows, part.owners[~trained[part.indices]])
    names = tuple(labels.names[i] for i in unseen.tolist())
    log.info(
        "%d of %d classes have no training clip: %s%s; their %d validation and test clips are left out",
        *(len(names), len(labels.names), ", ".join(names[:5]), ", ..." * (len(names) > 5)),
        len(splits.validation) + len(splits.test) - sum(map(len, kept.values())),
    )
    return replace(splits, **kept, unseen=names)


def check_splits(labels: Labels, splits: Splits, groups: Words | None, *, allow_shared_groups: bool = False) -> None:
    """Refuse splits that cannot be learned from, or that leak from one to another; log classes without test clips.

    Args:
        labels: of the catalogue's clips.
        splits: rows of it.
        groups: the catalogue's column of groups; None: there are no groups.
        allow_shared_groups: a group may be in several splits, as speakers are in speaker identification.

    Raises:
        CatalogueError: a label of a test or validation clip that no training clip has, or a group in two splits.
    """
    counts = {split: labels.counts(rows) for split, rows in splits.items()}
    for split in ("validation", "test"):
        unseen = np.flatnonzero((counts[split] > 0) & (counts["train"] == 0))
        if len(unseen):
            first = ", ".join(f"{labels.names[i]} ({counts[split][i]} clips)" for i in unseen[:5].tolist())
            raise CatalogueError(
                f"{len(unseen)} of {len(labels.names)} classes are in {split} and not in train: {first}",
                "training clips of each class",
                "add such clips to train; or leave these classes out: --sides.unseen-classes skip (asit finetune), "
                "--unseen-classes skip (asit evaluate)",
            )
    if groups is not None and not allow_shared_groups:
        _refuse_shared(groups, splits)
    untested = np.flatnonzero((counts["train"] > 0) & (counts["test"] == 0))
    if len(splits.test) and len(untested):
        first = ", ".join(labels.names[i] for i in untested[:5].tolist())
        log.info("%d of %d classes have no test clips: %s", len(untested), len(labels.names), first)


def may_share_groups(catalogue: Catalogue, requested: bool) -> bool:
    """Whether a group may be in several splits: on request, or because the corpus is made so."""
    return requested or bool(catalogue.header.get("shared_groups"))


def _refuse_shared(groups: Words, splits: Splits) -> None:
    counts = {split: groups.take(rows).counts() for split, rows in splits.items()}
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        if shared := [name for name in groups.words if counts[one][name] and counts[other][name]]:
            first = ", ".join(f"{name} ({counts[one][name]} and {counts[other][name]} clips)" for name in shared[:5])
            raise CatalogueError(
                f"{len(shared)} groups are in {one} and in {other}: {first}",
                "each group (speaker, recording) in one split; otherwise the score is too good",
                "move these clips; or, where the task is to tell groups apart, allow it: --sides.shared-groups "
                "(asit finetune), --allow-shared-groups (asit evaluate)",
            )
