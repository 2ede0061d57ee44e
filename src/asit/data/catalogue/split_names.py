"""The names of splits: synonyms, what there is, and the clips of some of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.columns import identifier
from asit.data.catalogue.labels import Rows
from asit.errors import CatalogueError

_SAME = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


SIDES = frozenset({"train", "validation", "test"})
"""The usual splits, by their canonical names."""


def rows_of_splits(catalogue: Catalogue, names: Sequence[str]) -> Rows:
    """Places of the clips of these splits, ascending; the usual synonyms are one name.

    Raises:
        CatalogueError: a split that no clip has.
    """
    column = catalogue.column("split")
    counts = {} if column is None else {name: count for name, count in column.counts().items() if count}
    there = {canonical(name) for name in counts}
    lost = [name for name in names if canonical(name) not in there]
    if column is None or lost:
        near = difflib.get_close_matches(lost[0], counts, 1) if lost else []
        raise CatalogueError(
            f"there is no split {', '.join(lost or names)}" + (f"; did you mean {near[0]}?" if near else ""),
            listed(counts) if counts else "a split column in the table that the catalogue was made of",
            "name one of these, or none",
        )
    wanted = {canonical(name) for name in names}
    return np.flatnonzero(np.array([canonical(word) in wanted for word in column.words] + [False])[column.codes])


def canonical(split: str) -> str:
    """One name for the usual synonyms: train, validation, test; others in lower case."""
    name = (identifier(split) or "").lower()
    return _SAME.get(name, name)


def listed(counts: dict[str, int]) -> str:
    """The splits there are, as errors tell them."""
    return "the splits are " + ", ".join(f"{name} ({count} clips)" for name, count in counts.items())
