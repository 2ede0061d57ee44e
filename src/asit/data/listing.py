"""Which clips a scan looks at: all audio below a folder, or what a table or a corpus's reader names."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH116, PTH118, PTH122

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data import tables
from asit.data.catalogue import relative, unreadable
from asit.data.columns import WORDS, Coder, Texts, Words, encode, soft_weight
from asit.errors import CatalogueError

Part = tuple[float, float | None]
"""Start and end of a clip in its file, s; the end None: to the end of the file."""


class Listing:
    """The clips to look at, in the catalogue's order.

    Attributes:
        root: folder that the names count from.
        names: column of the files' names.
        words: columns of what is known of the clips beforehand, by the names of `WORDS`.
        starts, ends: (N,) float64, s; the start 0 and the end infinite for a whole file. None: all are whole files.
        ignored: how many files of other kinds there are, for each suffix.
        sampled: (N,) bool, clips in the sample for mean and std; all False until `draw`.
        keys: (N,) uint64, the number of each clip that its draws come from.
        order: (N,) places by key.
    """

    def __init__(
        self,
        root: str,
        names: Texts,
        words: Mapping[str, Words],
        ignored: dict[str, int],
        starts: npt.NDArray[np.float64] | None = None,
        ends: npt.NDArray[np.float64] | None = None,
    ):
        self.root, self.names, self.words, self.ignored = root, names, words, ignored
        self.starts, self.ends = starts, ends
        self.seed = 0
        self.keys = np.empty(0, np.uint64)
        self.order = np.empty(0, np.int64)
        self.sampled = np.zeros(len(names), bool)

    def __len__(self) -> int:
        return len(self.names)

    def part(self, place: int) -> Part | None:
        """Which part of its file a clip is; None: all of it."""
        if self.starts is None or self.ends is None:
            return None
        start, end = float(self.starts[place]), float(self.ends[place])
        return None if start == 0 and end == np.inf else (start, None if end == np.inf else end)

    def draw(self, count: int, seed: int) -> None:
        """Give each clip a number from its name, its part and the seed; the smallest numbers are the sample.

        So a clip's draw does not hang on which other clips there are, nor on who looks at it.

        Raises:
            CatalogueError: a clip is listed twice.
        """
        self.seed = seed
        numbers = (_key(self.names.raw(place), self.part(place), seed) for place in range(len(self)))
        self.keys = np.fromiter(numbers, np.uint64, len(self))
        self.order = np.argsort(self.keys, kind="stable")
        self.sampled[self.order[:count]] = True
        ordered = self.keys[self.order]
        twice = self.order[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            first = ", ".join(self.names[place] for place in sorted(twice.tolist())[:5])
            raise CatalogueError(
                f"{len(twice)} clips are listed twice: {first}",
                "each file, or part of a file, once",
                "remove the second one; several labels of one clip go together, parted by ';'",
            )

    def place(self, name: str, part: Part | None) -> int | None:
        """Where a clip stands in the list, found by its number; None when it is not there."""
        key = np.uint64(_key(encode(name), part, self.seed))
        at = int(np.searchsorted(self.keys, key, sorter=self.order))
        if at == len(self) or self.names[place := int(self.order[at])] != name or self.part(place) != part:
            return None
        return place


def _key(name: bytes, part: Part | None, seed: int) -> int:
    # No file's name holds the zero byte.
    whole = name if part is None else b"%b\0%b" % (name, repr(part).encode())
    return int.from_bytes(hashlib.blake2b(whole, digest_size=8, key=str(seed).encode()).digest(), "little")


def instead(folder: Path) -> str:
    """What to give instead of a folder that asit wrote, and that holds no recordings; "" for others."""
    if (folder / "catalogue.jsonl").is_file() and (folder / "config.yaml").is_file():
        return f"this is a run's folder; the data that it was given are listed in {folder / 'catalogue.jsonl'}"
    if (folder / "vectors.npy").is_file():
        return "this is an index of asit index; give the folder of the recordings"
    if (folder / "model.safetensors").is_file():
        return "this is a model's folder; give the folder of the recordings"
    return ""


def list_files(source: Path, *, folder_labels: bool = False) -> Listing:
    """The clips of a folder or a table, not looked at.

    Args:
        source: the folder or the table.
        folder_labels: label each file of a folder with the name of the first-level folder it lies in.

    Raises:
        CatalogueError: a table that cannot be, a folder without audio, or files that no folder labels.
    """
    if not source.is_dir():
        return list_rows(os.path.abspath(source.parent), tables.iterate_table(source))
    listing = _walk(source)
    if folder_labels:
        listing.words = {"label": _labels_of_folders(source, listing.names)}
    return listing


def list_rows(root: str, rows: Iterable[tables.TableRow]) -> Listing:
    """The clips that rows name, taken in one at a time; paths below ``root`` are kept relative to it."""
    coders = {name: Coder() for name in WORDS}
    codes = {name: array("i") for name in WORDS}
    starts, ends = array("d"), array("d")

    def names() -> Iterator[bytes]:
        for row in rows:
            for name in WORDS:
                codes[name].append(coders[name](getattr(row, name)))
            starts.append(row.start or 0.0)
            ends.append(np.inf if row.end is None else row.end)
            yield encode(relative(row.path, root))

    packed = Texts.pack(names())
    found = {name: coders[name].column(np.array(codes[name], np.int32)) for name in WORDS}
    words = {name: column for name, column in found.items() if column}
    begin, until = np.array(starts, np.float64), np.array(ends, np.float64)
    if not begin.any() and np.isinf(until).all():
        return Listing(root, packed, words, {})
    return Listing(root, packed, words, {}, begin, until)


def _labels_of_folders(folder: Path, names: Texts) -> Words:
    coder = Coder()
    tops = [name.partition("/")[0] if "/" in name else None for name in names]
    if loose := [name for name, top in zip(names, tops, strict=True) if top is None]:
        raise CatalogueError(
            f"{len(loose)} of {len(names)} recordings lie directly in {folder}: {', '.join(loose[:5])}",
            "each recording in a sub-folder that is named after its label",
            "move them into their label's folder, or list recordings and labels in a table",
        )
    codes = np.fromiter(map(coder, tops), np.int32, len(tops))
    for name in coder.words:
        if ";" in name or soft_weight(name) is not None:
            raise CatalogueError(
                f"the sub-folder '{name}' of {folder} cannot name a label",
                "a name that neither holds ';', which parts labels, nor ends like a soft label: 'dog:0.7'",
                "rename it, or list recordings and labels in a table",
            )
    return Words(codes, tuple(coder.words))


def walk(root: str, shut: Callable[[str, OSError], None]) -> Iterator[str]:
    """All files below root, relative, "/" between the parts, in the order of the names; hidden ones left out.

    A folder that links reach again is entered once. `shut` is called with a folder that cannot be read, relative to
    root, and the reason; it raises, or the folder is listed like a file.
    """
    entered: set[tuple[int, int]] = set()

    def below(prefix: str) -> Iterator[str]:
        place = os.path.join(root, prefix)
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(place) as entries:
                listed = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            shut(prefix, error)
            yield prefix
            return
        for name, is_folder in listed:
            inner = f"{prefix}/{name}" if prefix else name
            if is_folder:
                yield from below(inner)
            else:
                yield inner

    return below("")


def _walk(folder: Path) -> Listing:
    """All audio below a folder, in the order of the names."""
    root = os.path.abspath(folder)
    others: Counter[str] = Counter()
    closed: set[str] = set()

    def shut(place: str, error: OSError) -> None:
        if not place:
            raise unreadable(root, error) from None
        closed.add(place)  # stays in the list, so that it is counted and its reason said

    def recordings() -> Iterator[bytes]:
        for name in walk(root, shut):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in files.SUFFIXES or name in closed:
                yield encode(name)
            else:
                others[suffix or "(no suffix)"] += 1

    names = Texts.pack(recordings())
    if not len(names):
        if not others:
            raise CatalogueError(f"{folder} is empty", "recordings in it, or in folders below", "check the path")
        seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
        raise CatalogueError(
            f"{folder} holds no audio; {others.total()} files: {seen}",
            f"files that end in {', '.join(sorted(files.SUFFIXES))}",
            instead(Path(folder)) or "check the path, or turn the recordings into one of these",
        )
    return Listing(root, names, {}, dict(sorted(others.items())))
