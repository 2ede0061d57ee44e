"""ESC-50: 2,000 recordings of five seconds, 50 classes, five official folds.

Source of the counts: Piczak, "ESC: Dataset for Environmental Sound Classification", 2015, and its meta/esc50.csv.
"""

# ruff: noqa: PTH118, PTH122

from __future__ import annotations

import os
from collections import Counter, defaultdict

from asit.data.catalogue.tables import TableRow
from asit.data.corpora import corpus
from asit.errors import CatalogueError

EXPECTED = {f"fold {fold}": 400 for fold in range(1, 6)}
"""Clips of each fold."""

CLASSES = 50
"""Classes, with equally many clips in each fold."""

SHARED = frozenset({"131943", "134049", "209698", "234879"})
"""Source recordings that are officially in two folds, each under two classes: eleven clips.

All other 1,520 are in one fold, as the documentation says of all. Counted in meta/esc50.csv.
"""

_COLUMNS = ("filename", "fold", "target", "category", "src_file")


def read(root: str | os.PathLike[str], *, incomplete: bool = False) -> corpus.Corpus:
    """Read the clips of meta/esc50.csv in audio/; label is the category, group the source recording.

    The classes are in the order of `target`. A recording of :data:`SHARED` is a group for each of its classes, since
    the official folds split it there.

    Args:
        root: the folder with audio/ and meta/, or its parent.
        incomplete: accept missing clips.

    Raises:
        CatalogueError: no such layout, a damaged list, clips missing, or a source recording in two folds.
    """
    folder = corpus.find_folder("esc50", corpus.existing(root), os.path.join("meta", "esc50.csv"), "audio")
    table = os.path.join(folder, "meta", "esc50.csv")
    there, notes = corpus.recordings(f"audio/{name}" for name in corpus.walk(os.path.join(folder, "audio")))
    rows, missing = [], []
    targets: dict[str, int] = {}
    folds: defaultdict[str, set[str]] = defaultdict(set)
    found: Counter[str] = Counter()
    listed: set[str] = set()
    for number, row in corpus.read_csv(table, _COLUMNS):
        if not row["target"].isdigit() or f"fold {row['fold']}" not in EXPECTED:
            raise corpus.damaged(table, number, f"target '{row['target']}', fold '{row['fold']}'")
        if targets.setdefault(row["category"], int(row["target"])) != int(row["target"]):
            raise corpus.damaged(table, number, f"{row['category']} has two targets")
        name = f"audio/{row['filename']}"
        if name in listed:
            raise corpus.damaged(table, number, f"{row['filename']} is listed twice")
        listed.add(name)
        source = row["src_file"]
        group = f"{source} {row['category']}" if source in SHARED else source
        folds[group].add(row["fold"])
        path = there.get(os.path.splitext(name)[0])
        if path is None:
            missing.append(name)
            continue
        found[f"fold {row['fold']}"] += 1
        rows.append(TableRow(os.path.join(folder, path), label=row["category"], fold=row["fold"], group=group))
    if parted := [f"{group} (folds {', '.join(sorted(its))})" for group, its in sorted(folds.items()) if len(its) > 1]:
        problem = f"{table}: {len(parted)} source recordings are in more than one fold: {corpus.names(parted)}"
        raise CatalogueError(problem, "all clips of a source recording in one fold", "download the list again")
    order = tuple(sorted(targets, key=targets.__getitem__))
    if [targets[name] for name in order] != [*range(CLASSES)]:
        raise CatalogueError(
            f"{table} has {len(order)} classes, and none with target "
            + corpus.names([str(target) for target in sorted(set(range(CLASSES)) - {*targets.values()})]),
            f"{CLASSES} classes, with the targets 0 to {CLASSES - 1}",
            "download the list again",
        )
    notes += corpus.require_complete("esc50", folder, (found, EXPECTED), missing, incomplete=incomplete)
    shared = sorted(SHARED & {source.split(" ")[0] for source in folds})
    if shared:
        notes += (
            f"{len(shared)} source recordings are officially in two folds under two classes: {', '.join(shared)}; "
            "each is a group for each class",
        )

    return corpus.Corpus(
        name="esc50",
        root=folder,
        rows=lambda: iter(rows),
        classes=order,
        expected=EXPECTED,
        found=dict(found),
        notes=notes,
    )
