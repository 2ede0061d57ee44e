"""What a reader of a known data set gives, and what is said where the copy on the disk is not whole."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH110, PTH112, PTH113, PTH118, PTH119, PTH122

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asit.audio import files
from asit.data.catalogue import listing
from asit.data.catalogue.catalogue import unreadable
from asit.data.catalogue.tables import TableRow
from asit.errors import CatalogueError
from asit.io import local_files

FIRST = 5
"""So many names stand in a message."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".tar.bz2", ".7z")
_UNFINISHED = (".partial", ".part", ".crdownload", ".aria2", ".download", ".ytdl")


@dataclass(frozen=True)
class Corpus:
    """A known data set as it lies on the disk.

    Attributes:
        name: as on the command line, such as "esc50".
        root: absolute; the folder that the catalogue's paths count from.
        rows: called with nothing, gives the clips that are there, one at a time, always in the same order.
        classes: the names in the official order.
        expected: split (of ESC-50: fold) -> clips of the whole data set.
        found: the same for the rows.
        missing: how many clips are named by the data set's lists, or known to belong to it, and are not there.
        first: the first names among them.
        notes: what a user should know about this copy, a sentence each.
        facts: more entries for the catalogue's header.
    """

    name: str
    root: str
    rows: Callable[[], Iterator[TableRow]]
    classes: tuple[str, ...]
    expected: Mapping[str, int]
    found: Mapping[str, int]
    missing: int = 0
    first: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def header(self) -> dict[str, Any]:
        """What goes into the catalogue's header: task, classes, and "corpus" with the counts, missing and notes."""
        corpus = {
            "name": self.name,
            "expected": dict(self.expected),
            "found": dict(self.found),
            "missing": self.missing,
            "notes": list(self.notes),
        }
        return {"task": self.name, "classes": list(self.classes), "corpus": corpus, **self.facts}

    def table(self) -> str:
        """The counts and notes as lines to print."""
        width = max(map(len, self.expected))
        lines = [
            f"  {split:{width}}  {self.found.get(split, 0):>9,} of {count:>9,}"
            for split, count in self.expected.items()
        ]
        return "\n".join([f"{self.name} in {self.root}", *lines, *(f"note: {note}" for note in self.notes)])


def require_whole(
    name: str,
    root: str,
    expected: Mapping[str, int],
    found: Mapping[str, int],
    missing: Sequence[str] = (),
    *,
    incomplete: bool,
    detail: str = "",
) -> tuple[str, ...]:
    """The counts must be the known ones, unless `incomplete`; gives notes on what differs.

    Args:
        missing: names of the clips that are known not to be there, relative to root.
        detail: more on what is not there, such as the words that are short.

    Raises:
        CatalogueError: a count differs, or a clip is missing.
    """
    wrong = [
        f"{split} {found.get(split, 0):,} of {count:,} clips ({_difference(found.get(split, 0), count)})"
        for split, count in expected.items()
        if found.get(split, 0) != count
    ]
    if not wrong and not missing:
        return ()
    said = f"{name}: " + "; ".join(wrong or [f"{len(missing):,} clips are missing"])
    if missing:
        said += f"; not there: {names(missing)}"
    if detail:
        said += f"; {detail}"
    if incomplete and any(found.values()):
        return (said,)
    hints = left_behind(root)
    raise CatalogueError(
        f"{root} is not the whole of {said}" + (f"; {hints}" if hints else ""),
        "all clips: " + ", ".join(f"{split} {count:,}" for split, count in expected.items()),
        "download or unpack it again"
        + ("; or go on without them: --incomplete (in Python incomplete=True)" if any(found.values()) else ""),
    )


def _difference(found: int, expected: int) -> str:
    return f"{expected - found:,} missing" if found < expected else f"{found - expected:,} too many"


def names(found: Sequence[str], total: int | None = None) -> str:
    """The first few, and how many more of `total` (of all that are given)."""
    rest = (len(found) if total is None else total) - min(len(found), FIRST)
    return ", ".join(found[:FIRST]) + (f" and {rest:,} more" if rest else "")


def left_behind(root: str) -> str:
    """What tells of a download or an unpacking that did not end: unfinished files, archives, empty folders."""
    unfinished, archives, empty = [], [], []
    parent, own = os.path.split(root)
    for folder in (root, *_folders(root)):
        for entry in _entries(folder):
            if entry.name.lower().endswith(_UNFINISHED):
                unfinished.append(os.path.relpath(entry.path, root))
            elif folder == root and entry.name.lower().endswith(_ARCHIVES):
                archives.append(entry.name)
        if folder != root and not _entries(folder):
            empty.append(os.path.relpath(folder, root))
    beside = (entry.name for entry in _entries(parent) if entry.name.startswith(own) and entry.name != own)
    for name in beside:
        if name.lower().endswith(_ARCHIVES):
            archives.append(os.path.join(os.pardir, name))
        elif name.lower().endswith(_UNFINISHED):
            unfinished.append(os.path.join(os.pardir, name))
    said = []
    if unfinished:
        said.append(f"a download has not ended: {names(sorted(unfinished))}")
    if archives:
        said.append(f"an archive lies there, perhaps not unpacked to its end: {names(sorted(archives))}")
    if empty:
        said.append(f"{len(empty)} empty folders: {names(sorted(empty))}")
    return "; ".join(said)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _folders(folder: str) -> list[str]:
    return [entry.path for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]


def existing(root: str | os.PathLike[str]) -> str:
    """The folder's absolute path.

    Raises:
        CatalogueError: it is not there, or is a file.
    """
    path = os.path.abspath(root)
    if not os.path.isdir(path):
        archive = path.lower().endswith(_ARCHIVES) and os.path.isfile(path)
        raise CatalogueError(
            f"{path} is an archive" if archive else f"there is no folder {path}",
            "the folder that the data set was unpacked into",
            "unpack it and give that folder" if archive else "check the path",
        )
    return path


def settle(name: str, root: str, *marks: str) -> str:
    """The folder that holds all of `marks` (relative names): root itself, or the one such folder in it.

    Raises:
        CatalogueError: there is none, or there are several.
    """

    def holds(folder: str) -> bool:
        return all(os.path.exists(os.path.join(folder, mark)) for mark in marks)

    if holds(root):
        return root
    below = [folder for folder in _folders(root) if holds(folder)]
    if len(below) == 1:
        return below[0]
    if below:
        raise CatalogueError(
            f"{root} holds {name} {len(below)} times: {names([os.path.basename(folder) for folder in below])}",
            "one of them",
            "give that folder",
        )
    listed = [entry.name for entry in _entries(root)]
    hints = left_behind(root)
    raise CatalogueError(
        f"{root} does not look like {name}: it has no {' and no '.join(marks)}; it holds "
        + (names(listed) if listed else "nothing")
        + (f"; {hints}" if hints else ""),
        f"{name} in the layout in which it is distributed, with {' and '.join(marks)}",
        "give the folder that these lie in",
    )


def walk(root: str) -> Iterator[str]:
    """All files below root, as `listing.walk` gives them.

    Raises:
        CatalogueError: a folder cannot be read.
    """

    def shut(place: str, error: OSError) -> None:
        raise unreadable(os.path.join(root, place), error) from None

    return listing.walk(root, shut)


def stem(path: str) -> str | None:
    """The name without its ending, or None where that is none of a recording's."""
    head, suffix = os.path.splitext(path)
    return head if suffix.lower() in files.SUFFIXES else None


def recordings(paths: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Name without ending -> path, so that a copy turned into FLAC or Opus is the same clip; and notes on pairs."""
    found: dict[str, str] = {}
    pairs = []
    for path in paths:
        key = stem(path)
        if key is not None and found.setdefault(key, path) != path:
            pairs.append(path)
    return found, pairs_note(pairs)


def pairs_note(pairs: Sequence[str], total: int | None = None) -> tuple[str, ...]:
    """The note on files that are a second copy of a clip; `total` where only the first are given."""
    count = len(pairs) if total is None else total
    return (f"{count:,} files are a second copy of a clip and were left out: {names(pairs, count)}",) if count else ()


def read_csv(path: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV with a header, with their numbers.

    Raises:
        CatalogueError: it cannot be read, a column is missing, or a line has other cells than the header.
    """
    try:
        with local_files.open_text(path, "utf-8-sig", "") as lines:
            reader = csv.reader(lines)
            header = [name.strip() for name in next(reader, [])]
            absent = [name for name in needed if name not in header]
            if absent:
                raise CatalogueError(
                    f"{path}: no column {', '.join(absent)}; the columns are {', '.join(header) or 'none'}",
                    f"the official file, with {', '.join(needed)}",
                    "download it again",
                )
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise damaged(path, reader.line_num, f"{len(cells)} cells under {len(header)} columns")
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise unreadable(path, error) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path} is damaged: {error}", "the official file", "download it again") from None


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Lines of a text file that hold something, with their numbers.

    Raises:
        CatalogueError: it cannot be read.
    """
    try:
        with local_files.open_text(path, "utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line.strip()
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path} is damaged: {error}", "the official file", "download it again") from None


def damaged(path: str, line: int, what: str) -> CatalogueError:
    """The error about a line of a list."""
    return CatalogueError(f"{path}, line {line}: {what}", "the official file", "download it again")
