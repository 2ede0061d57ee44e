"""Lists of the clips to scan: all audio below a folder, or the rows of a table or a corpus."""

from __future__ import annotations

import glob
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.catalogue import splits, tables
from asit.data.catalogue.catalogue import relative, unreadable
from asit.data.catalogue.columns import WORDS, Coder, Texts, Words, encode, soft_weight
from asit.data.shards.tar_reader import PACKED
from asit.errors import CatalogueError

Span = tuple[float, float | None]
"""Start and end of a clip in its file, s; end None: the end of the file."""

ARCHIVES = (*PACKED, ".zip", ".7z", ".rar")
"""Suffixes of compressed archives, which must be unpacked first."""


@dataclass
class Listing:
    """The clips to scan, in the catalogue's order.

    Attributes:
        root: folder of the relative names.
        names: of the files.
        words: the columns of `WORDS` that are known beforehand.
        ignored: number of other files by suffix.
        spans: (N, 2) float64, start and end in s; 0 and infinity for a complete file. None: all are complete.
        keys: (N,) uint64, seeds of the clips' draws, from `draw`.
        order: (N,) indices sorted by key.
        sampled: (N,) bool, clips in the sample for mean and std.
    """

    root: str
    names: Texts
    words: Mapping[str, Words]
    ignored: dict[str, int] = field(default_factory=dict)
    spans: npt.NDArray[np.float64] | None = None
    seed: int = field(default=0, init=False)
    keys: npt.NDArray[np.uint64] = field(init=False)
    order: npt.NDArray[np.int64] = field(init=False)
    sampled: npt.NDArray[np.bool_] = field(init=False)

    def __len__(self) -> int:
        return len(self.names)

    def span(self, index: int) -> Span | None:
        """Return which part of its file a clip is; None: all of it."""
        if self.spans is None:
            return None
        start, end = self.spans[index].tolist()
        return None if start == 0 and end == np.inf else (start, None if end == np.inf else end)

    def draw(self, count: int, seed: int) -> None:
        """Hash each clip's name, span and the seed to its key; the `count` smallest keys are the sample.

        So a clip's draws depend neither on the other clips nor on the process that reads it.

        Raises:
            CatalogueError: a clip is listed twice.
        """
        self.seed = seed
        numbers = (_key(self.names.raw(index), self.span(index), seed) for index in range(len(self)))
        self.keys = np.fromiter(numbers, np.uint64, len(self))
        self.order = np.argsort(self.keys, kind="stable")
        self.sampled = np.zeros(len(self), np.bool_)
        self.sampled[self.order[:count]] = True
        ordered = self.keys[self.order]
        twice = self.order[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            first = ", ".join(self.names[index] for index in sorted(twice.tolist())[:5])
            found = f"{len(twice)} clips are listed twice: {first}"
            fix = "remove one; several labels of one clip go together, separated by ';'"
            raise CatalogueError(found, "each file, or part of a file, once", fix)

    def find(self, name: str, span: Span | None) -> int | None:
        """Return the index of a clip, found by its key; None if it is not listed."""
        key = np.uint64(_key(encode(name), span, self.seed))
        at = int(np.searchsorted(self.keys, key, sorter=self.order))
        if at == len(self) or self.names[index := int(self.order[at])] != name or self.span(index) != span:
            return None
        return index


def _key(name: bytes, span: Span | None, seed: int) -> int:
    text = name if span is None else b"%b\0%b" % (name, repr(span).encode())  # no file name has a zero byte
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=str(seed).encode()).digest(), "little")


def list_files(source: Path, *, folder_labels: bool = False) -> Listing:
    """List the recordings of a folder without opening them.

    Args:
        source: the folder.
        folder_labels: label each file of a folder by its sub-folder: CLASS, SPLIT/CLASS or CLASS/SPLIT.

    Raises:
        CatalogueError: a folder without audio, or files without a folder that labels them.
    """
    root, others = os.path.abspath(source), Counter[str]()
    # The scan reports folders that cannot be read.
    names = Texts.pack(encode(name) for name, _ in walk_audio(root, files.SUFFIXES, others))
    if not len(names):
        raise no_audio("folder", str(source), others)
    words = _labels_of_folders(source, names) if folder_labels else {}
    return Listing(root, names, words, dict(sorted(others.items())))


def list_rows(root: str, rows: Iterable[tables.TableRow]) -> Listing:
    """List the clips of rows, consumed one at a time; paths below ``root`` are stored relative to it."""
    coders = {name: Coder(name) for name in WORDS}
    codes = {name: array("i") for name in WORDS}
    times = array("d")

    def names() -> Iterator[bytes]:
        for row in rows:
            try:
                for name in WORDS:
                    codes[name].append(coders[name](getattr(row, name)))
            except ValueError as error:
                raise CatalogueError(f"{row.path}: {name} is {error}", "text or a number", "correct it") from None
            times.extend((row.start or 0.0, np.inf if row.end is None else row.end))
            yield encode(relative(row.path, root))

    packed = Texts.pack(names())
    words = {name: coder.column(np.array(codes[name], np.int32)) for name, coder in coders.items() if coder.words}
    spans = np.array(times, np.float64).reshape(-1, 2)
    return Listing(root, packed, words, spans=spans if (spans != (0.0, np.inf)).any() else None)


def _labels_of_folders(folder: Path, names: Texts) -> dict[str, Words]:
    """Return labels from the first folder of each name, and splits where folders are SPLIT/CLASS or CLASS/SPLIT."""
    first = [name.partition("/")[0] if "/" in name else "" for name in names]
    second = [name.split("/", 2)[1] if name.count("/") > 1 else "" for name in names]
    if loose := [name for name, top in zip(names, first, strict=True) if not top]:
        problem = f"{len(loose)} of {len(names)} recordings are directly in {folder}: {', '.join(loose[:5])}"
        expected = "each recording in a sub-folder named after its label"
        fix = "move them into their label's folder, or list recordings, labels and splits in a table; annotations of "
        fix += "Raven, Audacity or Praat beside them are read with --window SECONDS"
        raise CatalogueError(problem, expected, fix)
    # Folders with the usual names are splits if all first ones are, or all second ones, and there are at least two.
    for split, label in ((first, second), (second, first)):
        usual = [name for name in dict.fromkeys(split) if splits.canonical(name) in splits.USUAL]
        others = [name or "recordings in no class" for name in dict.fromkeys(split) if name not in usual]
        others += [] if all(label) else ["recordings in no class"]
        if len(set(map(splits.canonical, usual))) < 2 and (split is second or any(set(split) - set(usual))):
            continue
        if not others:
            return {"label": _coded(folder, "label", label), "split": _coded(folder, "split", split)}
        raise CatalogueError(
            f"{folder} has folders named after splits ({', '.join(usual)}) beside others ({', '.join(others[:5])})",
            "folders of classes, or of splits with classes in them",
            "keep splits and classes apart, as SPLIT/CLASS or CLASS/SPLIT, or list labels and splits in a table",
        )
    return {"label": _coded(folder, "label", first)}


def _coded(folder: Path, column: str, texts: Iterable[str]) -> Words:
    coder = Coder(column)
    words = coder.column(np.fromiter(map(coder, texts), np.int32))
    for name in words.words if column == "label" else ():
        if ";" in name or soft_weight(name) is not None:
            found = f"the sub-folder '{name}' of {folder} cannot name a label"
            expected = "a name without ';', which separates labels, and without the end of a soft label: 'dog:0.7'"
            raise CatalogueError(found, expected, "rename it, or list recordings and labels in a table")
    return words


def describe_ignored(others: Mapping[str, int]) -> str:
    """Return a line on files that were not opened because of their suffix; empty if there are none."""
    if not others:
        return ""
    ordered = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    seen = ", ".join(f"{count} {suffix}" for suffix, count in ordered[:6]) + (", ..." if len(ordered) > 6 else "")
    return f"not opened, as these are no audio suffixes: {seen}"


def walk(root: str, shut: Callable[[str, OSError], None], *, folders: bool = False) -> Iterator[str]:
    """Yield the files below root, relative with "/", sorted by name, without hidden ones.

    A folder that several links reach is entered once. A broken entry, such as a link to itself, is listed as a file.

    Args:
        root: the folder.
        shut: called with the relative name of a folder that cannot be read, and the reason; unless it raises, the
            folder is listed as a file.
        folders: yield the folders that are entered instead; root is "".
    """
    entered: set[tuple[int, int]] = set()

    def below(prefix: str) -> Iterator[str]:
        folder = os.path.join(root, prefix)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
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
    except OSError:  # such as a link to itself
        return False


def matches(pattern: str) -> list[str]:
    """Return the paths that match a pattern with ``*``, ``?``, ``[...]`` or ``**``, sorted.

    As `glob`, but ``**`` enters each real folder once, so that loops of links end. A final ``**`` is the folder before
    it.
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


def no_audio(kind: str, path: str, others: Counter[str]) -> CatalogueError:
    """Make the error about a folder, pattern or tar without audio; `others` counts the other files by suffix."""
    if not others:
        return CatalogueError(f"the {kind} {path} is empty", "recordings in it, or in folders below", "check the path")
    seen = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(6))
    remedy = "check the path, or convert the recordings to one of these"
    own = {"config.yaml": "a run", "vectors.npy": "an index", "model.safetensors": "a model"}
    if what := next((what for name, what in own.items() if (Path(path) / name).is_file()), None):
        remedy = f"this is {what} of asit; give the folder of the recordings, or the catalogue.jsonl in it"
    elif packed := ", ".join(suffix for suffix in others if suffix in ARCHIVES):
        remedy = f"unpack the {packed} files; a tar is read as it is once gunzip, unxz or zstd -d decompressed it"
    found = f"the {kind} {path} holds no audio; {others.total()} files: {seen}"
    return CatalogueError(found, f"files that end in {', '.join(sorted(files.SUFFIXES))}", remedy)


def suffix_of(name: str) -> str:
    """Return the suffix in lower case, ".tar.gz" and the like in full; "(no suffix)" for none."""
    lower = name.lower()
    packed = next((suffix for suffix in ARCHIVES if lower.endswith(suffix)), None)
    return packed or os.path.splitext(lower)[1] or "(no suffix)"


def walk_audio(folder: str, suffixes: Container[str], others: Counter[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the files below a folder with these suffixes, and folders that cannot be read with the reason.

    Other files are counted by suffix in `others`.

    Raises:
        CatalogueError: the folder itself cannot be read.
    """
    closed: dict[str, str] = {}

    def shut(name: str, error: OSError) -> None:
        if not name:
            raise unreadable(folder, error) from None
        closed[name] = error.strerror or str(error)

    for name in walk(folder, shut):
        if name in closed or os.path.splitext(name)[1].lower() in suffixes:
            yield name, closed.get(name)
        else:
            others[suffix_of(name)] += 1
