"""Which clips a scan looks at: all audio below a folder, or what a table or a corpus's reader names."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH116, PTH118, PTH122, PTH207

from __future__ import annotations

import glob
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.catalogue import split_names, tables
from asit.data.catalogue.catalogue import relative, unreadable
from asit.data.catalogue.columns import WORDS, Coder, Texts, Words, encode, soft_weight
from asit.data.shards.tar_reader import PACKED
from asit.errors import CatalogueError

Part = tuple[float, float | None]
"""Start and end of a clip in its file, s; the end None: to the end of the file."""


ARCHIVES = (*PACKED, ".zip", ".7z", ".rar")
"""Names of compressed archives, in which no recording can be reached without unpacking."""


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
        folder_labels: label each file of a folder by the sub-folder it lies in: CLASS, SPLIT/CLASS or CLASS/SPLIT.

    Raises:
        CatalogueError: a table that cannot be, a folder without audio, or files that no folder labels.
    """
    if not source.is_dir():
        return list_rows(os.path.abspath(source.parent), tables.iterate_table(source))
    listing = _walk(source)
    if folder_labels:
        listing.words = _words_of_folders(source, listing.names)
    return listing


def list_rows(root: str, rows: Iterable[tables.TableRow]) -> Listing:
    """The clips that rows name, taken in one at a time; paths below ``root`` are kept relative to it."""
    coders = {name: Coder(name) for name in WORDS}
    codes = {name: array("i") for name in WORDS}
    starts, ends = array("d"), array("d")

    def names() -> Iterator[bytes]:
        for row in rows:
            try:
                for name in WORDS:
                    codes[name].append(coders[name](getattr(row, name)))
            except ValueError as error:
                raise CatalogueError(f"{row.path}: {name} is {error}", "text or a number", "mend it") from None
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


def _words_of_folders(folder: Path, names: Texts) -> dict[str, Words]:
    """Labels from the first folders of these names, and splits where the folders are SPLIT/CLASS or CLASS/SPLIT.

    A folder is a split by the usual names (see `splits.canonical`). First folders that are all splits are so taken, and
    so are second ones, where each recording lies in one and there are at least two.

    Raises:
        CatalogueError: recordings outside a class's folder, splits beside classes, or a name that cannot be a label.
    """
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    second = [name.split("/", 2)[1] if name.count("/") > 1 else "" for name in names]
    if loose := [name for name, top in zip(names, first, strict=True) if not top]:
        raise CatalogueError(
            f"{len(loose)} of {len(names)} recordings lie directly in {folder}: {', '.join(loose[:5])}",
            "each recording in a sub-folder that is named after its label",
            "move them into their label's folder, or list recordings and labels in a table",
        )
    tops, inner = (
        {name: split_names.canonical(name) in split_names.SIDES for name in level} for level in (first, second)
    )
    beside = "keep splits and classes apart, as SPLIT/CLASS or CLASS/SPLIT, or list recordings, labels and splits in a "
    if all(tops.values()):
        if loose := [name for name, part in zip(names, second, strict=True) if not part]:
            raise CatalogueError(
                f"the sub-folders of {folder} are splits ({', '.join(tops)}), and {len(loose)} of {len(names)} "
                f"recordings lie directly in one: {', '.join(loose[:5])}",
                "a folder for each class in each split, such as train/dog",
                beside + "table",
            )
        return {"label": _coded(folder, "label", second), "split": _coded(folder, "split", first)}
    for level in (tops, inner):
        sides = [name for name, is_split in level.items() if is_split]
        if len({split_names.canonical(name) for name in sides}) < 2:
            continue
        if level is inner and len(sides) == len(inner):
            return {"label": _coded(folder, "label", first), "split": _coded(folder, "split", second)}
        others = [name or "recordings outside them" for name, is_split in level.items() if not is_split]
        raise CatalogueError(
            f"{folder} has folders named after splits ({', '.join(sides)}) beside others ({', '.join(others[:5])})",
            "folders of classes, or of splits with classes in them",
            beside + "table",
        )
    return {"label": _coded(folder, "label", first)}


def _coded(folder: Path, column: str, texts: Iterable[str]) -> Words:
    coder = Coder(column)
    codes = np.fromiter(map(coder, texts), np.int32)
    for name in coder.words if column == "label" else ():
        if ";" in name or soft_weight(name) is not None:
            raise CatalogueError(
                f"the sub-folder '{name}' of {folder} cannot name a label",
                "a name that neither holds ';', which parts labels, nor ends like a soft label: 'dog:0.7'",
                "rename it, or list recordings and labels in a table",
            )
    return Words(codes, tuple(coder.words))


def describe_ignored(others: Mapping[str, int]) -> str:
    """A line on files that were not opened, as their names are not those of recordings; empty where there are none."""
    if not others:
        return ""
    ordered = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    seen = ", ".join(f"{count} {suffix}" for suffix, count in ordered[:6]) + (", ..." if len(ordered) > 6 else "")
    return f"not opened, as their names are not those of recordings: {seen}"


def walk(root: str, shut: Callable[[str, OSError], None], *, folders: bool = False) -> Iterator[str]:
    """All files below root, relative, "/" between the parts, in the order of the names; hidden ones left out.

    A folder that links reach again is entered once. `shut` is called with a folder that cannot be read, relative to
    root, and the reason; it raises, or the folder is listed like a file. What cannot be looked at, such as a link to
    itself, is listed like a file too.

    Args:
        root: the folder.
        shut: see above.
        folders: list the folders that are entered instead, root's own name being "".
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
                listed = sorted((entry.name, _is_folder(entry)) for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            shut(prefix, error)
            yield prefix
            return
        if folders:
            yield prefix
        for name, is_folder in listed:
            inner = f"{prefix}/{name}" if prefix else name
            if is_folder:
                yield from below(inner)
            elif not folders:
                yield inner

    return below("")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: its own fault, and not its folder's
        return False


def matches(pattern: str) -> list[str]:
    """The paths that a pattern with ``*``, ``?``, ``[...]`` or ``**`` matches, sorted.

    As `glob` has it, but that ``**`` enters each real folder once, as :func:`walk` does: links that form a loop give
    no path twice. A last ``**`` stands for the folder before it.
    """
    return sorted(dict.fromkeys(_matching("", pattern)))


def _matching(base: str, pattern: str) -> Iterator[str]:
    parts = pattern.split("/")
    if "**" not in parts:
        found = glob.glob(pattern, root_dir=base or None)
        yield from (os.path.join(base, name) for name in found)
        return
    at = parts.index("**")
    before, after = "/".join(parts[:at]), "/".join(parts[at + 1 :]).lstrip("/")
    tops = [base] if not parts[:at] else ["/"] if not before else _matching(base, before)
    for top in tops:
        if not after:
            yield from [top] if top else glob.glob("*")
            continue
        for inner in walk(top or ".", lambda *_: None, folders=True):
            yield from _matching(os.path.join(top, inner) if inner else top, after)


def no_audio(kind: str, place: str, others: Counter[str]) -> CatalogueError:
    """The error about a folder, pattern or tar without a recording; `others`: other files, counted by suffix."""
    if not others:
        return CatalogueError(f"the {kind} {place} is empty", "recordings in it, or in folders below", "check the path")
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
    remedy = instead(Path(place)) or "check the path, or turn the recordings into one of these"
    if packed := [suffix for suffix in others if suffix in ARCHIVES]:
        remedy = (
            f"unpack the {', '.join(packed)} files; an uncompressed .tar is read as it is (gunzip, bunzip2, unxz or "
            "zstd -d turn a compressed tar into one)"
        )
    return CatalogueError(
        f"the {kind} {place} holds no audio; {others.total()} files: {seen}",
        f"files that end in {', '.join(sorted(files.SUFFIXES))}",
        remedy,
    )


def suffix_of(name: str) -> str:
    """A file's suffix in lower case, both where it is one of a compressed tar (".tar.gz"); "(no suffix)" for none."""
    lower = name.lower()
    packed = next((suffix for suffix in ARCHIVES if lower.endswith(suffix)), None)
    return packed or os.path.splitext(lower)[1] or "(no suffix)"


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
                others[suffix_of(name)] += 1

    names = Texts.pack(recordings())
    if not len(names):
        raise no_audio("folder", str(folder), others)
    return Listing(root, names, {}, dict(sorted(others.items())))
