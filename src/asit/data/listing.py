"""Which files a scan looks at: all audio below a folder, or what a table names."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH116, PTH118, PTH122

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asit.audio import files
from asit.data import tables
from asit.data.catalogue import relative, unreadable
from asit.data.columns import Texts, Words, encode
from asit.errors import CatalogueError


class Listing:
    """The files to look at, in the catalogue's order.

    Attributes:
        root: folder that the names count from.
        names, labels, splits: columns.
        ignored: how many files of other kinds there are, for each suffix.
        sampled: (N,) bool, files in the sample for mean and std; all False until `draw`.
        keys: (N,) uint64, the number of each file that its draws come from.
        order: (N,) places by key.
    """

    def __init__(self, root: str, names: Texts, labels: Words | None, splits: Words | None, ignored: dict[str, int]):
        self.root, self.names, self.labels, self.splits, self.ignored = root, names, labels, splits, ignored
        self.seed = 0
        self.keys = np.empty(0, np.uint64)
        self.order = np.empty(0, np.int64)
        self.sampled = np.zeros(len(names), bool)

    def __len__(self) -> int:
        return len(self.names)

    def draw(self, count: int, seed: int) -> None:
        """Give each file a number from its name and the seed; the smallest numbers are the sample.

        So a file's draw does not hang on which other files there are, nor on who looks at it.
        """
        self.seed = seed
        self.keys = np.fromiter((_key(self.names.raw(index), seed) for index in range(len(self))), np.uint64, len(self))
        self.order = np.argsort(self.keys, kind="stable")
        self.sampled[self.order[:count]] = True

    def place(self, name: str) -> int | None:
        """Where a file stands in the list, found by its number; None when it is not there."""
        key = np.uint64(_key(encode(name), self.seed))
        at = int(np.searchsorted(self.keys, key, sorter=self.order))
        if at == len(self) or self.names[place := int(self.order[at])] != name:
            return None
        return place


def _key(name: bytes, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8, key=str(seed).encode()).digest(), "little")


def list_files(source: Path) -> Listing:
    """The files of a folder or a table, not looked at.

    Raises:
        CatalogueError: a table that cannot be, or a folder without audio.
    """
    if source.is_dir():
        return _walk(source)
    root = os.path.abspath(source.parent)
    codes: dict[str, list[int]] = {"label": [], "split": []}
    words: dict[str, dict[str, int]] = {"label": {}, "split": {}}

    def names() -> Iterator[bytes]:
        for row in tables.iterate_table(source):
            for key, text in (("label", row.label), ("split", row.split)):
                codes[key].append(-1 if text is None else words[key].setdefault(text, len(words[key])))
            yield encode(relative(row.path, root))

    packed = Texts.pack(names())
    labels, splits = (
        Words(np.array(codes[key], np.int32), tuple(words[key])) if words[key] else None for key in ("label", "split")
    )
    return Listing(root, packed, labels, splits, {})


def _walk(folder: Path) -> Listing:
    """All audio below a folder, in the order of the names; a folder that links reach again is entered once."""
    root = os.path.abspath(folder)
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()

    def below(prefix: str) -> Iterator[bytes]:
        place = os.path.join(root, prefix)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                listed = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            if not prefix:
                raise unreadable(place, error) from None
            yield encode(prefix)  # listed like a file, so that it is counted and its reason said
            return
        for name, is_folder in listed:
            if is_folder:
                yield from below(f"{prefix}/{name}" if prefix else name)
            elif (suffix := os.path.splitext(name)[1].lower()) in files.SUFFIXES:
                yield encode(f"{prefix}/{name}" if prefix else name)
            else:
                others[suffix or "(no suffix)"] += 1

    names = Texts.pack(below(""))
    if not len(names):
        if not others:
            raise CatalogueError(f"{folder} is empty", "recordings in it, or in folders below", "check the path")
        seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
        raise CatalogueError(
            f"{folder} holds no audio; {others.total()} files: {seen}",
            f"files that end in {', '.join(sorted(files.SUFFIXES))}",
            "check the path, or turn the recordings into one of these",
        )
    return Listing(root, names, None, None, dict(sorted(others.items())))
