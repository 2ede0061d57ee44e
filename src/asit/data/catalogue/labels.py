"""Labels of a catalogue's clips, parsed from their texts, sampling weights and small training sets of all classes.

Letters in shapes: N clips, W distinct texts, C classes, n chosen clips.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.columns import encode, identifier, soft_weight
from asit.errors import CatalogueError, suggestion

log = logging.getLogger(__name__)

Rows = npt.NDArray[np.int64]

BACKGROUND = "background"
"""Class of sounds that are none of the others."""


@dataclass(frozen=True)
class Labels:
    """Classes of each clip as a sparse matrix of N clips by C classes in CSR form.

    Attributes:
        names: the C classes in their order.
        multi: a clip may have several labels, or soft ones.
        indptr: (N + 1,) int64; the entries of clip i are indptr[i] to indptr[i + 1].
        indices: int32, the classes; ascending within a clip.
        weights: float32, above 0 up to 1; below 1 for soft labels only.
        known: (N,) bool, whether the clip has a label; a known one without entries is of no class.
    """

    names: tuple[str, ...]
    multi: bool
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    known: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.known)

    @property
    def single(self) -> npt.NDArray[np.int64]:
        """(N,) the class of each clip, -1 where it is unknown; for labels that are not multi."""
        assert not self.multi, "clips with several labels have no single class"
        classes = np.full(len(self), -1, np.int64)
        classes[self.known] = self.indices
        return classes

    @property
    def owners(self) -> npt.NDArray[np.int64]:
        """The clip of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.indptr))

    @property
    def rarest(self) -> npt.NDArray[np.int64]:
        """(N,) the rarest class of each clip; C for a clip of no class."""
        stratum = np.full(len(self), len(self.names), np.int64)
        filled = np.diff(self.indptr) > 0
        by_count = np.argsort(self.counts(), kind="stable")
        rank = np.argsort(by_count)
        if len(self.indices):
            stratum[filled] = by_count[np.minimum.reduceat(rank[self.indices], self.indptr[:-1][filled])]
        return stratum

    def counts(self, rows: npt.ArrayLike | None = None) -> npt.NDArray[np.int64]:
        """Count the clips of each class (C,), soft labels as 1, among the clips at ``rows``, or all."""
        indices = self.indices if rows is None else self.take(rows).indices
        return np.bincount(indices, minlength=len(self.names))

    def take(self, rows: npt.ArrayLike) -> Labels:
        """Return the labels of the clips at ``rows``, in that order."""
        rows = np.asarray(rows, np.int64)
        counts = self.indptr[rows + 1] - self.indptr[rows]
        ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        entries = np.arange(ends[-1]) + np.repeat(self.indptr[rows] - ends[:-1], counts)
        return replace(
            self, indptr=ends, indices=self.indices[entries], weights=self.weights[entries], known=self.known[rows]
        )

    def matrix(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return (n, C) float32 targets of the clips at ``rows``: 1 where a clip has the class, less if it is soft."""
        part = self.take(rows)
        out = np.zeros((len(part), len(self.names)), np.float32)
        out[part.owners, part.indices] = part.weights
        return out


def read_labels(
    catalogue: Catalogue,
    kind: Literal["auto", "single", "multi"] = "auto",
    classes: Sequence[str] | None = None,
    *,
    missing: Literal["error", "skip", "background"] = "error",
) -> Labels:
    """Parse the labels of a catalogue's clips.

    A label is a name; several are separated by ";", and a soft one ends in a colon and its weight from 0 to 1:
    "dog:0.7". A weight of 0 is no label, so "dog:0" is a clip known to be of no class. Names are compared as
    :func:`asit.data.catalogue.columns.identifier` normalises them; a repeated name in one clip counts once.
    Ambiguous labels are logged: "call:0" and "call:1", and classes that differ only in case.

    Args:
        catalogue: N clips.
        kind: "single": one class a clip; "multi": any number; "auto": multi if any clip has several or soft labels.
        classes: the names in order; by default "classes" of the catalogue's header, else all that occur, sorted.
        missing: whether clips without a label are an error, are kept with ``known`` False, or are of the class
            "background".

    Raises:
        CatalogueError: clips without a label, fewer than two classes, an invalid weight, several labels where "single"
            is requested, or a name that is not among the classes.
    """
    column = catalogue.column("label")
    words, codes = ((), np.full(len(catalogue), -1, np.int32)) if column is None else (column.words, column.codes)
    used, rows = np.unique(codes, return_inverse=True)  # words that no clip has do not count
    blank = BACKGROUND if missing == "background" else ""
    texts = _parse([(*words, "")[code].strip() or blank for code in used.tolist()])
    sizes = np.diff(texts.indptr)
    known = (sizes > 0)[rows]
    _refuse_missing(catalogue, known, missing)
    many = texts.soft | (sizes > 1)
    if kind == "single" and many.any():
        wrong = np.flatnonzero(many[rows])
        raise CatalogueError(
            f"{len(wrong)} of {len(catalogue)} clips have several labels, or soft ones: {_examples(catalogue, wrong)}",
            "one label a clip",
            "request multi, or correct these labels",
        )
    names, index = _classes(texts, catalogue.header.get("classes") if classes is None else classes)
    owners, indices = np.repeat(np.arange(len(sizes)), sizes), index[texts.indices]
    order = np.lexsort((indices, owners))
    order = order[texts.weights[order] > 0]
    return Labels(
        names=names,
        multi=kind == "multi" or (kind == "auto" and bool(many.any())),
        indptr=np.append(0, np.cumsum(np.bincount(owners[order], minlength=len(sizes)))),
        indices=indices[order].astype(np.int32),
        weights=texts.weights[order],
        known=sizes > 0,
    ).take(rows)


@dataclass(frozen=True)
class _Parsed:
    """W texts as a CSR matrix over the names in them, in order of first occurrence."""

    names: list[str]
    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    soft: npt.NDArray[np.bool_]  # (W,) whether the text has weights
    binary: list[str]  # labels with a weight, if all weights are written "0" or "1"


def _parse(texts: Sequence[str]) -> _Parsed:
    names: dict[str, int] = {}
    binary: dict[str, bool] = {}
    wrong: list[str] = []

    @functools.cache
    def label(piece: str) -> tuple[int, float, bool]:
        """Return index (-1: no name), weight, and whether the weight was given."""
        name, weight, number = piece.strip(), 1.0, soft_weight(piece.strip())
        if number is not None:
            binary[name] = number in ("0", "1")
            try:
                weight, part = float(number), name[: -len(number) - 1].strip()
            except ValueError:
                weight, part = math.nan, ""
            if not (0 <= weight <= 1 and part):
                wrong.append(name)
            name = part
        return names.setdefault(name, len(names)) if name else -1, weight, number is not None

    rows, soft, differing = [], [], []
    for text in texts:
        found = [label(piece) for piece in text.split(";")]
        row: dict[int, float] = {}
        for index, weight, _ in found:
            if index >= 0 and row.setdefault(index, weight) != weight:
                differing.append(text)
        rows.append(row)
        soft.append(any(weighted for index, _, weighted in found if index >= 0))
    if wrong or differing:
        problem = "end in a colon and an invalid weight" if wrong else "have a name twice with different weights"
        raise CatalogueError(
            f"{len(wrong or differing)} labels {problem}: {', '.join(map(repr, (wrong or differing)[:5]))}",
            "a name, once, and a weight from 0 to 1, such as 'dog:0.7'",
            "correct the weights; in a name, replace the last colon by another sign",
        )
    return _Parsed(
        names=[*names],
        indptr=np.cumsum([0, *map(len, rows)]),
        indices=np.array([index for row in rows for index in row], np.int64),
        weights=np.array([weight for row in rows for weight in row.values()], np.float32),
        soft=np.array(soft, np.bool_),
        binary=[*binary] if all(binary.values()) else [],
    )


def _classes(texts: _Parsed, known: Sequence[str] | None) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Return the classes in their order, and the index of each found name among them."""
    names = tuple(sorted(texts.names) if known is None else known)
    forms = [identifier(name) or "" for name in names]
    index = {form: i for i, form in enumerate(forms)}
    if len(index) < len(names):
        twice = [name for name, form in zip(names, forms, strict=True) if forms.count(form) > 1]
        raise CatalogueError(f"classes that are listed twice: {', '.join(twice[:5])}", "each class once", "remove one")
    if other := [name for name in texts.names if name not in index]:
        hint = suggestion(other[0], names, " (did you mean '{}'?)")
        raise CatalogueError(
            f"{len(other)} labels are not among the {len(names)} classes: {', '.join(map(repr, other[:5]))}{hint}",
            f"labels of the classes {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}",
            "correct the labels, or add these classes",
        )
    first = ", ".join(map(repr, texts.binary[:4]))
    doubt = f"labels such as {first} are read as weights of {len(names)} classes; if they are names, replace ':' by '_'"
    if len(names) < 2:
        found = f"all clips have the same label: {', '.join(names) or 'none'}"
        raise CatalogueError(found, "at least two classes", doubt if first else "label the clips with their classes")
    if first:
        log.warning(doubt)
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        log.warning("classes that differ only in upper and lower case: %s", ", ".join(map(repr, alike[:6])))
    return names, np.array([index[name] for name in texts.names], np.int64)


def _refuse_missing(catalogue: Catalogue, known: npt.NDArray[np.bool_], missing: str) -> None:
    if not known.any():
        fix = "make the catalogue from a table with a label column, or from a folder per class with labels=folder"
        raise CatalogueError(f"none of the {len(known)} clips has a label", "a label for each clip", fix)
    if missing == "error" and not known.all():
        unknown = np.flatnonzero(~known)
        found = f"{len(unknown)} of {len(known)} clips have no label: {_examples(catalogue, unknown)}"
        fix = "fill the label column, or take these rows out of the table; of a folder, move these recordings into the "
        raise CatalogueError(found, "a label for each clip", fix + "sub-folder of their class, or out of the folder")


def _examples(catalogue: Catalogue, rows: Rows) -> str:
    return ", ".join(catalogue.ids(rows[:5])) + (", ..." if len(rows) > 5 else "")


def balanced_weights(labels: Labels, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (n,) sampling weights of the clips at ``rows`` that favour rare classes.

    A weight is the sum over a clip's labels of 1000 / (count + 0.01), count being the clips at ``rows`` with that
    label: the rule of AST's public code for AudioSet (``gen_weight_file.py``). A soft label counts as 1; a clip of no
    class has weight 0.
    """
    part = labels.take(rows)
    each = 1000.0 / (part.counts() + 0.01)
    return np.asarray(np.bincount(part.owners, each[part.indices], len(part)), np.float64)


def inverse_weights(labels: Labels, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (n,) one over the count of each clip's class among ``rows``: all classes are drawn equally often."""
    classes = labels.take(rows).single
    assert (classes >= 0).all(), "clips without a label have no weight"
    return np.divide(1.0, np.bincount(classes)[classes], dtype=np.float64)


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
        stratum = part.rarest
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


def list_hash(ids: Iterable[str]) -> str:
    """Hash a list of clip ids, to print beside a score: 16 hex digits of the SHA-256 of the ids, a line each."""
    digest = hashlib.sha256()
    for name in ids:
        digest.update(encode(name) + b"\n")
    return digest.hexdigest()[:16]
