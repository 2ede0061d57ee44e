"""Which clips train, which choose, and which test: splits, folds, held-out shares, and small seeded training sets.

Letters in shapes: N clips, C classes, n chosen clips.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.columns import Coder, Words, identifier
from asit.data.catalogue.labels import Labels, Rows, read_labels
from asit.data.catalogue.split_names import canonical, listed
from asit.errors import AsitError, AudioError, CatalogueError

TRAIN = ("train", "balanced", "unbalanced")
"""Splits that train; AudioSet has two."""
VALIDATION = ("validation",)
TEST = ("test",)


@dataclass(frozen=True)
class Splits:
    """Places in the catalogue, ascending, int64.

    Attributes:
        train, validation, test: no clip is on two of them.
        notes: what the user should know, a sentence each.
        unseen: classes without a training clip, taken out of the other splits by :func:`drop_unseen_classes`.
    """

    train: Rows
    validation: Rows
    test: Rows
    notes: list[str] = field(default_factory=list)
    unseen: tuple[str, ...] = ()

    def items(self) -> list[tuple[str, Rows]]:
        return [("train", self.train), ("validation", self.validation), ("test", self.test)]


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
    """The sides that a catalogue's splits, or one of its folds, make.

    Names of splits are compared in lower case, and the usual synonyms are one name: training is train; val, valid and
    dev are validation; testing, eval and evaluation are test. A catalogue without splits is all train.

    Args:
        catalogue: N clips.
        train, validation, test: the splits of each side.
        fold: this fold is the test side and the others train; splits then say nothing.
        share: where there is no validation side, this share of the training clips becomes it. Classes keep their
            shares as nearly as can be (a clip of several counts for its rarest), clips of one group stay together, and
            each class keeps a training clip.
        seed: of that draw.
        labels: of the catalogue's clips. Those not known stay off all sides, with a note. Needed for a share;
            read from the catalogue where they are not given.

    Raises:
        CatalogueError: no clip to train on, a split or fold that was named and is not there, a split named for two
            sides, or a share that leaves nothing.
    """
    notes: list[str] = []
    if not 0 <= share < 1:
        raise CatalogueError(f"a validation share of {share}", "0 or more and below 1", "change it")
    known = np.ones(len(catalogue), np.bool_) if labels is None else labels.known
    if count := int((~known).sum()):
        notes.append(f"{count} clips without a label are left out")
    if fold is not None:
        sides = _of_fold(catalogue, fold, known, notes)
    else:
        sides = _of_splits(catalogue, {"train": train, "validation": validation, "test": test}, known, notes)
    if not share or len(sides.validation):
        return sides
    labels = read_labels(catalogue) if labels is None else labels
    held = _hold_out(labels, sides.train, catalogue.column("group"), share, seed, notes)
    return replace(sides, train=sides.train[~held], validation=sides.train[held])


def _of_fold(catalogue: Catalogue, fold: str, known: npt.NDArray[np.bool_], notes: list[str]) -> Splits:
    names, fold = folds(catalogue), identifier(fold) or fold
    if fold not in names:
        raise CatalogueError(f"there is no fold {fold}", f"one of {', '.join(names)}", "choose one of these")
    column = catalogue.column("fold")
    assert column is not None, "folds() has found some"
    inside = column.codes == column.words.index(fold)
    if count := int((column.codes < 0).sum()):
        notes.append(f"{count} clips without a fold are left out")
    empty = np.empty(0, np.int64)
    sides = Splits(np.flatnonzero(known & ~inside & (column.codes >= 0)), empty, np.flatnonzero(known & inside), notes)
    if not len(sides.train) or not len(sides.test):
        side = "test" if len(sides.train) else "train"
        raise CatalogueError(f"fold {fold} leaves no labelled clip to {side} on", "labelled clips", "label more clips")
    return sides


def _of_splits(
    catalogue: Catalogue, named: dict[str, Sequence[str]], known: npt.NDArray[np.bool_], notes: list[str]
) -> Splits:
    column = catalogue.column("split")
    empty = np.empty(0, np.int64)
    if column is None:
        asked = [name for side, names in named.items() if tuple(names) != _DEFAULT[side] for name in names]
        if asked:
            raise CatalogueError(
                f"splits {', '.join(asked)} were named, and the catalogue has no splits",
                "a split column in the table that it was made of",
                "add it, or name no splits",
            )
        return Splits(np.flatnonzero(known), empty, empty, notes)
    side_of: dict[str, str] = {}
    for side, names in named.items():
        for name in map(canonical, names):
            if side_of.setdefault(name, side) != side:
                raise CatalogueError(
                    f"split {name} is named for {side_of[name]} and for {side}", "one side", "take it out of the other"
                )
    counts = {name: count for name, count in column.counts().items() if count}
    there = {canonical(name) for name in counts}
    for side, names in named.items():
        lost = [name for name in names if canonical(name) not in there]
        if lost and tuple(names) != _DEFAULT[side]:
            near = difflib.get_close_matches(lost[0], counts, 1)
            raise CatalogueError(
                f"there is no split {lost[0]}" + (f"; did you mean {near[0]}?" if near else ""),
                listed(counts),
                f"name one of these for {side}",
            )
    which = np.array([_PLACES.get(side_of.get(canonical(name), ""), -1) for name in column.words] + [-1])[column.codes]
    train, validation, test = (np.flatnonzero(known & (which == place)) for place in _PLACES.values())
    other = {name: count for name, count in counts.items() if canonical(name) not in side_of}
    notes += [f"{count} clips of split {name} are on no side" for name, count in other.items()]
    if count := int((column.codes < 0).sum()):
        notes.append(f"{count} clips without a split are on no side")
    if not len(train):
        raise CatalogueError(
            f"no clip to train on: no split is one of {', '.join(named['train'])}"
            if not (which == 0).any()
            else "no clip to train on has a label",
            listed(counts),
            "name the splits that train, or name them so in the table",
        )
    return Splits(train, validation, test, notes)


_PLACES = {"train": 0, "validation": 1, "test": 2}
_DEFAULT: dict[str, tuple[str, ...]] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}


def by_folds(catalogue: Catalogue) -> bool:
    """Whether a catalogue is meant for cross-validation: its clips have folds, and no splits."""
    return catalogue.column("split") is None and catalogue.column("fold") is not None


def folds(catalogue: Catalogue) -> list[str]:
    """The names of the catalogue's folds, in natural order: 2 before 10.

    Raises:
        CatalogueError: no folds, only one, or one without clips.
    """
    column = catalogue.column("fold")
    if column is None:
        raise CatalogueError(
            "the catalogue has no folds", "a fold column in the table that it was made of", "add it, or use splits"
        )
    counts = column.counts()
    empty = [name for name, count in counts.items() if not count]
    if all(name.isdecimal() for name in counts):  # a fold that lost all its clips to a scan leaves a gap
        numbers = set(map(int, counts))
        empty += [str(number) for number in range(min(numbers), max(numbers)) if number not in numbers]
    if empty or len(counts) < 2:
        found = ", ".join(f"{name} ({counts[name]} clips)" for name in sorted(counts, key=_natural) if counts[name])
        raise CatalogueError(
            f"folds without a clip: {', '.join(sorted(empty, key=_natural))}" if empty else "there is but one fold",
            f"at least two folds, and clips in each; there are {found}",
            "see the catalogue's .skipped.jsonl for clips left out, or number the folds anew",
        )
    return sorted(counts, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def error_in_fold(name: str, error: AsitError, remedy: str | None = None) -> AsitError:
    """The error with the fold's name before it; one about a sound file, which names that, as it is.

    Args:
        remedy: the fix to name instead of the error's own.
    """
    if isinstance(error, AudioError):
        return error
    return type(error)(f"fold {name}: {error.found}", error.expected, error.remedy if remedy is None else remedy)


def drop_unseen_classes(labels: Labels, sides: Splits) -> Splits:
    """The sides without the validation and test clips of any class that no training clip has.

    A network cannot learn such a class, and a fold may leave several of them. Their names are in ``unseen``.
    """
    trained = labels.counts(sides.train) > 0
    lost = np.flatnonzero((labels.counts(np.concatenate([sides.validation, sides.test])) > 0) & ~trained)
    if not len(lost):
        return sides
    kept = {}
    for side, rows in (("validation", sides.validation), ("test", sides.test)):
        part = labels.take(rows)
        owners = np.repeat(np.arange(len(part)), np.diff(part.indptr))
        mask = np.ones(len(rows), np.bool_)
        mask[owners[~trained[part.indices]]] = False
        kept[side] = rows[mask]
    names = tuple(labels.names[place] for place in lost.tolist())
    count = len(sides.validation) + len(sides.test) - sum(map(len, kept.values()))
    note = f"{len(names)} of {len(labels.names)} classes have no training clip: {', '.join(names[:5])}"
    note += f"{', ...' * (len(names) > 5)}; their {count} clips of other sides are left out"
    return replace(sides, **kept, notes=[*sides.notes, note], unseen=names)


def check_splits(
    labels: Labels,
    sides: Splits,
    groups: npt.NDArray[np.object_] | Words | None,
    *,
    allow_shared_groups: bool = False,
) -> list[str]:
    """Refuse sides that cannot be learned from, or that leak from one to another.

    Args:
        labels: of the catalogue's clips.
        sides: places in it.
        groups: each clip's group or None (``Catalogue.groups``, or its column as it is); None: there are no groups.
        allow_shared_groups: a group may lie on several sides, as speakers do in speaker identification.

    Returns:
        Notes: training classes that no test clip has.

    Raises:
        CatalogueError: a label of a test or validation clip that no training clip has, or a group on two sides.
    """
    counts = {side: labels.counts(rows) for side, rows in sides.items()}
    for side in ("validation", "test"):
        unseen = np.flatnonzero((counts[side] > 0) & (counts["train"] == 0))
        if len(unseen):
            first = ", ".join(f"{labels.names[place]} ({counts[side][place]} clips)" for place in unseen[:5].tolist())
            raise CatalogueError(
                f"{len(unseen)} of {len(labels.names)} classes are in {side} and not in train: {first}",
                "training clips of each class",
                "add such clips to train; or go on without these classes: --sides.unseen-classes skip (asit finetune), "
                "--unseen-classes skip (asit evaluate)",
            )
    if groups is not None and not allow_shared_groups:
        _refuse_shared(groups, sides)
    notes = []
    untested = np.flatnonzero((counts["train"] > 0) & (counts["test"] == 0))
    if len(sides.test) and len(untested):
        first = ", ".join(labels.names[place] for place in untested[:5].tolist())
        notes.append(f"{len(untested)} of {len(labels.names)} classes have no test clips: {first}")
    return notes


def may_share_groups(catalogue: Catalogue, asked: bool) -> bool:
    """Whether a group may lie on several sides: as asked, or because the corpus is made so (speaker identification)."""
    return asked or bool(catalogue.header.get("shared_groups"))


def _refuse_shared(groups: npt.NDArray[np.object_] | Words, sides: Splits) -> None:
    if not isinstance(groups, Words):
        coder = Coder("group")
        groups = Words(np.fromiter(map(coder, groups), np.int32, len(groups)), tuple(coder.words))
    on = {}
    for side, rows in sides.items():
        codes = groups.codes[rows]
        on[side] = np.bincount(codes[codes >= 0], minlength=len(groups.words))
    for one, other in (("train", "test"), ("train", "validation"), ("validation", "test")):
        shared = np.flatnonzero((on[one] > 0) & (on[other] > 0))
        if len(shared):
            first = ", ".join(
                f"{groups.words[place]} ({on[one][place]} and {on[other][place]} clips)"
                for place in shared[:5].tolist()
            )
            raise CatalogueError(
                f"{len(shared)} groups are in {one} and in {other}: {first}",
                "each group (speaker, recording) on one side only, or the score is of clips the model has half seen",
                "move these clips; or, where the task is to tell groups apart, allow it: --sides.shared-groups "
                "(asit finetune), --allow-shared-groups (asit evaluate)",
            )


def _hold_out(
    labels: Labels, rows: Rows, groups: Words | None, share: float, seed: int, notes: list[str]
) -> npt.NDArray[np.bool_]:
    """(n,) which of these clips are held out for validation."""
    part = labels.take(rows)
    stratum = _rarest(part)
    # A unit is what stays together: a group, or a clip of none.
    units = np.arange(len(rows)) if groups is None else groups.codes[rows].astype(np.int64)
    units = np.where(units < 0, np.arange(len(rows)) + (units.max(initial=0) + 1), units)
    units = np.unique(units, return_inverse=True)[1]
    sizes = np.bincount(units)
    # A group's stratum is the one that most of its clips are of, the lower of equals.
    strata = len(part.names) + 1
    pairs, together = np.unique(units * strata + stratum, return_counts=True)
    best = np.lexsort((pairs % strata, -together, pairs // strata))
    best = best[np.unique(pairs[best] // strata, return_index=True)[1]]
    order = np.random.default_rng([seed, len(rows)]).permutation(len(sizes))
    order = order[np.argsort((pairs[best] % strata)[order], kind="stable")]
    # Through the strata one after the other, a unit is held out whenever that brings the share nearer.
    chosen, seen, taken = np.zeros(len(sizes), np.bool_), 0, 0
    for unit, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        seen += size
        if taken + size / 2 < share * seen:
            chosen[unit], taken = True, taken + size
    if not taken:
        chosen[order[np.argmin(sizes[order])]] = True
    held: npt.NDArray[np.bool_] = chosen[units]
    # Each class keeps a unit to train on.
    owners = np.repeat(np.arange(len(rows)), np.diff(part.indptr))
    kept = np.bincount(part.indices[~held[owners]], minlength=len(part.names))
    for place in np.flatnonzero((kept == 0) & (part.counts() > 0)).tolist():
        holders = owners[part.indices == place]
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
        notes.append(f"{held.mean():.0%} of the training clips are held out, not {share:.0%}: groups stay whole")
    return held


def _rarest(labels: Labels) -> Rows:
    """(N,) each clip's class that fewest clips have; C for a clip of no class."""
    stratum = np.full(len(labels), len(labels.names), np.int64)
    sizes = np.diff(labels.indptr)
    rank = np.empty(len(labels.names), np.int64)
    by_count = np.argsort(labels.counts(), kind="stable")
    rank[by_count] = np.arange(len(by_count))
    if len(labels.indices):
        stratum[sizes > 0] = by_count[np.minimum.reduceat(rank[labels.indices], labels.indptr[:-1][sizes > 0])]
    return stratum


def subsample(
    labels: Labels, rows: npt.ArrayLike, *, share: float | None = None, per_class: int | None = None, seed: int
) -> Rows:
    """A part of the training clips that keeps every class: for learning curves and few-shot tests.

    Each clip has a random number from the seed and its place in the catalogue, which orders the clips. For
    ``per_class`` = k, rounds 1 to k each visit the classes from the rarest on, and add the class's next clip in that
    order where fewer clips than the round's number are chosen of it; so each class gets k clips, or all it has, and
    more where clips have several labels. For a ``share``, the clips of the first such round are in; then
    each stratum (the clips whose rarest class is the same) is filled up to its share, in the order of the numbers.
    So a smaller choice lies within a larger one of the same kind and seed.

    Args:
        labels: of the catalogue's clips.
        rows: (n,) places of the training clips in the catalogue.
        share: of each class, above 0 up to 1.
        per_class: clips of each class; give this or ``share``.
        seed: of the numbers.

    Returns:
        places in the catalogue, ascending.

    Raises:
        CatalogueError: neither or both were given, or a value that cannot be.
    """
    value = share if per_class is None else per_class
    if (share is None) == (per_class is None) or value is None or value <= 0 or (share is not None and share > 1):
        raise CatalogueError(
            f"share={share}, per_class={per_class}", "a share above 0 up to 1, or a count from 1", "give one of them"
        )
    places = np.asarray(rows, np.int64)
    places = places[np.argsort(np.random.default_rng([seed]).random(len(labels))[places], kind="stable")]
    part = labels.take(places)
    chosen = _of_each(part, per_class or 1)
    if share is not None:
        stratum = _rarest(part)
        order = np.lexsort((~chosen, stratum))
        sizes = np.bincount(stratum)
        within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen[order[within < np.rint(share * sizes)[stratum[order]]]] = True
    return np.sort(places[chosen])


def _of_each(labels: Labels, count: int) -> npt.NDArray[np.bool_]:
    """(N,) the first clips in the order given that make `count` of each class; see `subsample`."""
    counts = labels.counts()
    owners = np.repeat(np.arange(len(labels)), np.diff(labels.indptr))[np.argsort(labels.indices, kind="stable")]
    ends = np.cumsum(counts)
    following = (ends - counts).tolist()  # of each class, the first of its clips that has not been looked at
    chosen, have = np.zeros(len(labels), np.bool_), np.zeros(len(counts), np.int64)
    rarest = [place for place in np.argsort(counts, kind="stable").tolist() if counts[place]]
    for wanted in range(1, min(count, int(counts.max(initial=0))) + 1):
        for place in rarest:
            while have[place] < wanted and following[place] < ends[place]:
                clip = owners[following[place]]
                following[place] += 1
                if not chosen[clip]:
                    chosen[clip] = True
                    have[labels.indices[labels.indptr[clip] : labels.indptr[clip + 1]]] += 1
    return chosen
