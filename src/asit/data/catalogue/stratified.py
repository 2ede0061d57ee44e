"""Stratified draws of training clips: a held-out validation share, and small training sets for few-shot tests.

Letters in shapes: N clips, C classes, n chosen clips.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.columns import Words
from asit.data.catalogue.labels import Labels, Rows
from asit.errors import CatalogueError

log = logging.getLogger(__name__)


def hold_out(labels: Labels, rows: Rows, groups: Words | None, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose validation clips among training clips; returns a mask (n,) of ``rows``.

    Classes keep their shares as nearly as possible (a clip of several counts for its rarest), clips of one group stay
    together, and each class keeps a training clip. A share that groups make inexact is logged.

    Args:
        labels: of the catalogue's clips.
        rows: (n,) the training clips.
        groups: of the catalogue's clips; None: there are none.
        share: of the training clips, above 0 and below 1.
        seed: of the draw.

    Raises:
        CatalogueError: nothing can be held out.
    """
    part = labels.take(rows)
    stratum = _rarest(part)
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


def _rarest(labels: Labels) -> Rows:
    """Return (N,) the rarest class of each clip; C for a clip of no class."""
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
    """Choose a part of the training clips that keeps every class: for learning curves and few-shot tests.

    The seed gives each clip of the catalogue a random number, which orders the clips. For ``per_class`` = k, rounds 1
    to k each visit the classes from the rarest on and add the class's next clip where fewer clips than the round's
    number are chosen of it; so each class gets k clips, or all it has, and more where clips have several labels. For a
    ``share``, the clips of the first such round are in; then each stratum (the clips with the same rarest class) is
    filled up to its share. So a smaller choice is within a larger one of the same kind and seed.

    Args:
        labels: of the catalogue's clips.
        rows: (n,) the training clips.
        share: of each class, above 0 up to 1.
        per_class: clips of each class; give this or ``share``.
        seed: of the numbers.

    Returns:
        Rows of the catalogue, ascending.

    Raises:
        CatalogueError: neither or both were given, or an impossible value.
    """
    value = share if per_class is None else per_class
    if (share is None) == (per_class is None) or value is None or value <= 0 or (share is not None and share > 1):
        raise CatalogueError(
            f"share={share}, per_class={per_class}", "a share above 0 up to 1, or a count from 1", "give one of them"
        )
    rows = np.asarray(rows, np.int64)
    rows = rows[np.argsort(np.random.default_rng([seed]).random(len(labels))[rows], kind="stable")]
    part = labels.take(rows)
    chosen = _of_each(part, per_class or 1)
    if share is not None:
        stratum = _rarest(part)
        order = np.lexsort((~chosen, stratum))
        sizes = np.bincount(stratum)
        within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen[order[within < np.rint(share * sizes)[stratum[order]]]] = True
    return np.sort(rows[chosen])


def _of_each(labels: Labels, count: int) -> npt.NDArray[np.bool_]:
    """Return a mask (N,) of the first clips that make `count` of each class; see `subsample`."""
    counts = labels.counts()
    owners = labels.owners[np.argsort(labels.indices, kind="stable")]
    ends = np.cumsum(counts)
    following = (ends - counts).tolist()  # of each class, the first of its clips that has not been looked at
    chosen, have = np.zeros(len(labels), np.bool_), np.zeros(len(counts), np.int64)
    rarest = [index for index in np.argsort(counts, kind="stable").tolist() if counts[index]]
    for wanted in range(1, min(count, int(counts.max(initial=0))) + 1):
        for index in rarest:
            while have[index] < wanted and following[index] < ends[index]:
                clip = owners[following[index]]
                following[index] += 1
                if not chosen[clip]:
                    chosen[clip] = True
                    have[labels.indices[labels.indptr[clip] : labels.indptr[clip + 1]]] += 1
    return chosen
