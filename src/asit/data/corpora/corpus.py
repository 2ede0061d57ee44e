"""The result of reading a known data set, and what the readers share: lists, completeness checks and hints."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH110, PTH112, PTH113, PTH118, PTH119, PTH122

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TextIO

from asit.audio import files
from asit.data.catalogue import listing
from asit.data.catalogue.catalogue import unreadable
from asit.data.catalogue.tables import TableRow
from asit.errors import CatalogueError
from asit.io import local_files

FIRST = 5
"""Number of names in a message."""
INCOMPLETE = "accept it as it is: --incomplete (in Python incomplete=True)"
"""The fix where clips or lists are missing."""

_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".tar.bz2", ".7z")
_UNFINISHED = (".partial", ".part", ".crdownload", ".aria2", ".download", ".ytdl")


@dataclass(frozen=True)
class Corpus:
    """A known data set on the disk.

    Attributes:
        name: as on the command line, such as "esc50".
        root: absolute; the folder of the catalogue's relative paths.
        rows: yields the clips that exist, always in the same order.
        classes: the names in the official order.
        expected: split (of ESC-50: fold) -> clips of the complete data set.
        found: the same for the rows.
        notes: what a user should know about this copy, a sentence each.
        facts: more entries for the catalogue's header.
    """

    name: str
    root: str
    rows: Callable[[], Iterator[TableRow]]
    classes: tuple[str, ...]
    expected: Mapping[str, int]
    found: Mapping[str, int]
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def missing(self) -> int:
        """Number of clips that should exist and do not."""
        return sum(max(0, count - self.found.get(split, 0)) for split, count in self.expected.items())

    def header(self) -> dict[str, Any]:
        """Return entries for the catalogue's header: task, classes, and "corpus" with counts, missing and notes."""
        corpus = {
            "name": self.name,
            "expected": dict(self.expected),
            "found": dict(self.found),
            "missing": self.missing,
            "notes": list(self.notes),
        }
        return {"task": self.name, "classes": list(self.classes), "corpus": corpus, **self.facts}

    def table(self) -> str:
        """Format the counts and notes as lines to print."""
        width = max(map(len, self.expected))
        lines = [
            f"  {split:{width}}  {self.found.get(split, 0):>9,} of {count:>9,}"
            for split, count in self.expected.items()
        ]
        return "\n".join([f"{self.name} in {self.root}", *lines, *(f"note: {note}" for note in self.notes)])


def require_complete(
    name: str,
    root: str,
    counts: tuple[Mapping[str, int], Mapping[str, int]],
    missing: Sequence[str] = (),
    *,
    incomplete: bool,
    detail: str = "",
) -> tuple[str, ...]:
    """Compare the counts of clips with those of the complete data set.

    Args:
        name: of the data set.
        root: its folder.
        counts: clips found and expected in each split.
        missing: names of clips that are known to be missing, relative to root.
        incomplete: return the differences as notes instead of raising.
        detail: more on what is missing.

    Raises:
        CatalogueError: a count differs, or a clip is missing.
    """
    found, expected = counts
    wrong = [
        f"{split} {count - lack:,} of {count:,} clips ({abs(lack):,} {'missing' if lack > 0 else 'too many'})"
        for split, count in expected.items()
        if (lack := count - found.get(split, 0))
    ]
    if not wrong and not missing:
        return ()
    parts = ["; ".join(wrong or [f"{len(missing):,} clips are missing"])]
    parts += [f"missing: {names(missing)}"] if missing else []
    parts += [detail] if detail else []
    text = f"{name}: {'; '.join(parts)}"
    if incomplete and any(found.values()):
        return (text,)
    wanted = "all clips: " + ", ".join(f"{split} {count:,}" for split, count in expected.items())
    fix = "download or unpack it again" + (f"; or {INCOMPLETE}" if any(found.values()) else "")
    raise CatalogueError(f"{root} is not the complete {text}{hints(root)}", wanted, fix)


def names(found: Sequence[str], total: int | None = None) -> str:
    """List the first few names, and how many more of `total` (default: of all given)."""
    rest = (len(found) if total is None else total) - min(len(found), FIRST)
    return ", ".join(found[:FIRST]) + (f" and {rest:,} more" if rest else "")


def hints(root: str) -> str:
    """Describe, after "; ", traces of an interrupted download: unfinished files, archives, empty folders."""
    parent, own = os.path.split(root)
    beside = [entry.path for entry in _entries(parent) if entry.name.startswith(own) and entry.name != own]
    inside = {folder: [entry.path for entry in _entries(folder)] for folder in _folders(root)}
    near = [*(entry.path for entry in _entries(root)), *beside]
    empty = [folder for folder, paths in inside.items() if not paths]
    texts = {
        "an unfinished download": [p for p in chain(near, *inside.values()) if p.lower().endswith(_UNFINISHED)],
        "an archive, perhaps not completely unpacked": [path for path in near if path.lower().endswith(_ARCHIVES)],
        f"{len(empty)} empty folders": empty,
    }
    shown = {text: sorted(os.path.relpath(path, root) for path in paths) for text, paths in texts.items()}
    return "".join(f"; {text}: {names(paths)}" for text, paths in shown.items() if paths)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []


def _folders(folder: str) -> list[str]:
    return [entry.path for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]


def existing(root: str | os.PathLike[str]) -> str:
    """Return the folder's absolute path.

    Raises:
        CatalogueError: it does not exist, or is a file.
    """
    path = os.path.abspath(root)
    if not os.path.isdir(path):
        archive = path.lower().endswith(_ARCHIVES) and os.path.isfile(path)
        found = f"{path} is an archive" if archive else f"there is no folder {path}"
        expected = "the folder that the data set was unpacked into"
        raise CatalogueError(found, expected, "unpack it and give that folder" if archive else "check the path")
    return path


def find_folder(name: str, root: str, *required: str) -> str:
    """Return the folder that holds all `required` relative names: root itself, or the only such folder in it.

    Raises:
        CatalogueError: there is none, or there are several.
    """

    def holds(folder: str) -> bool:
        return all(os.path.exists(os.path.join(folder, entry)) for entry in required)

    below = [root] if holds(root) else [folder for folder in _folders(root) if holds(folder)]
    if len(below) == 1:
        return below[0]
    if below:
        found = names([os.path.basename(folder) for folder in below])
        raise CatalogueError(f"{root} holds {name} {len(below)} times: {found}", "one of them", "give that folder")
    raise CatalogueError(
        f"{root} does not look like {name}: it has no {' and no '.join(required)}; it holds "
        + (names([entry.name for entry in _entries(root)]) or "nothing")
        + hints(root),
        f"{name} in the layout in which it is distributed, with {' and '.join(required)}",
        "give the folder that contains these",
    )


def walk(root: str) -> Iterator[str]:
    """Yield all files below root, as `listing.walk`.

    Raises:
        CatalogueError: a folder cannot be read.
    """

    def shut(name: str, error: OSError) -> None:
        raise unreadable(os.path.join(root, name), error) from None

    return listing.walk(root, shut)


def stem(path: str) -> str | None:
    """Return the name without its suffix, or None where that is no audio suffix."""
    head, suffix = os.path.splitext(path)
    return head if suffix.lower() in files.SUFFIXES else None


def recordings(paths: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Map names without suffix to paths, so that a copy converted to FLAC or Opus is the same clip; and notes."""
    found: dict[str, str] = {}
    copies = []
    for path in paths:
        key = stem(path)
        if key is not None and found.setdefault(key, path) != path:
            copies.append(path)
    return found, copies_note(copies)


def copies_note(copies: Sequence[str]) -> tuple[str, ...]:
    """Return the note on files that are a second copy of a clip."""
    text = f"{len(copies):,} files are a second copy of a clip and were left out: {names(copies)}"
    return (text,) if copies else ()


@contextmanager
def open_list(path: str, newline: str | None = None) -> Iterator[TextIO]:
    """Open an official list.

    Raises:
        CatalogueError: it cannot be read, or is no text or CSV.
    """
    try:
        with local_files.open_text(path, "utf-8-sig", newline) as lines:
            yield lines
    except OSError as error:
        raise unreadable(path, error) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise CatalogueError(f"{path} is damaged: {error}", "the official file", "download it again") from None


def read_csv(path: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the lines of a CSV with a header, with their numbers.

    Raises:
        CatalogueError: as `open_list`; a missing column, or a line with a wrong number of cells.
    """
    with open_list(path, "") as lines:
        reader = csv.reader(lines)
        header = [name.strip() for name in next(reader, [])]
        if absent := [name for name in needed if name not in header]:
            found = f"{path}: no column {', '.join(absent)}; the columns are {', '.join(header) or 'none'}"
            raise CatalogueError(found, f"the official file, with {', '.join(needed)}", "download it again")
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise damaged(path, reader.line_num, f"{len(cells)} cells under {len(header)} columns")
            yield reader.line_num, dict(zip(header, cells, strict=True))


def read_lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file that are not blank, with their numbers; raises as `open_list`."""
    with open_list(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, line.strip()


def damaged(path: str, line: int | str, what: str) -> CatalogueError:
    """Make the error about a line of a list."""
    where = f"line {line}" if isinstance(line, int) else line
    return CatalogueError(f"{path}, {where}: {what}", "the official file", "download it again")
