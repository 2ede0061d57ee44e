"""Annotation files, or a folder of them, to rows of a table: each box with the recording that it is in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from asit.audio import files
from asit.data.annotations import audacity, raven, textgrid
from asit.data.annotations.box import Box
from asit.data.catalogue import listing
from asit.data.catalogue.columns import normal
from asit.data.catalogue.tables import TableRow, near, open_table
from asit.errors import CatalogueError
from asit.io import local_files

SUFFIXES = frozenset({".txt", ".tsv", ".csv", ".textgrid"})
"""Suffixes of annotation files; see `kind_of`."""

log = logging.getLogger(__name__)

_READERS = {
    "Raven selection table": raven.read_selection_table,
    "Praat TextGrid": textgrid.read_textgrid,
    "Audacity label track": lambda path, label: audacity.read_label_track(path),
}


def kind_of(path: str | os.PathLike[str], *, alone: bool = True) -> str | None:
    """Return what kind of annotations a file holds, one of "Raven selection table", "Praat TextGrid" and "Audacity
    label track"; None: it holds none.

    Args:
        path: the file.
        alone: it was given by name, so that a .txt file which is no selection table is a label track; else that must
            begin with two numbers.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in SUFFIXES or not os.path.isfile(path):
        return None
    if suffix == ".textgrid":
        return "Praat TextGrid"
    try:
        with open_table(Path(path)) as lines:
            first = lines.readline(1 << 16)
    except CatalogueError:
        return "Audacity label track" if suffix == ".txt" and alone else None
    if raven.is_selection_table(first):
        return "Raven selection table"
    return "Audacity label track" if suffix == ".txt" and (alone or audacity.is_label_track(first)) else None


def read_annotations(path: str | os.PathLike[str], label: str = "") -> tuple[list[TableRow], list[str]]:
    """Read an annotation file, or all below a folder.

    A recording is the one that the file names (Raven's Begin Path and Begin File; looked for at that place, beside the
    file, and by its name in the folder that was given), else the one beside it with its name: a.wav for a.txt,
    a.TextGrid and a.Table.1.selections.txt.

    Args:
        path: file or folder.
        label: column of selection tables, or tier of TextGrids, that holds the labels; "": the usual ones.

    Returns:
        A row for each box, ordered by file; and the recordings of all files, also of those without boxes. Recordings
        that do not exist are kept: whoever opens them reports them.

    Raises:
        CatalogueError: no annotations, a damaged file (names file, line and field), or no recording beside one.
    """
    path = local_files.locate(os.fspath(path))
    folder = os.path.isdir(path)
    places = _Recordings(path if folder else os.path.dirname(path) or ".", deep=folder)
    found = {file: kind for file in _candidates(path) if (kind := kind_of(file, alone=not folder)) is not None}
    if not found:
        what = f"{path} holds no annotations" if os.path.exists(path) else f"there is no {path}"
        raise CatalogueError(what, f"a {', '.join(_READERS)}, or a folder of them", "check the path" + near(Path(path)))
    rows: list[TableRow] = []
    recordings: dict[str, None] = {}
    for file, kind in found.items():
        boxes = _READERS[kind](Path(file), label)
        own = None
        if not boxes or any(box.recording is None for box in boxes):
            own = places.beside(file)
            if own is None and folder and kind == "Audacity label track":
                continue  # a text that is not about a recording
            if own is None:
                expected = f"a recording beside it, such as {Path(file).stem}.wav"
                expected += ", or a column Begin File" if kind == "Raven selection table" else ""
                raise CatalogueError(f"{file} names no recording", expected, "move it beside its recording")
        for box in boxes:
            where = own if box.recording is None else places.named(box.recording, file)
            assert where is not None
            recordings.setdefault(where)
            rows.append(TableRow(where, label=_label(file, box), start=box.start, end=box.end))
        if own is not None:
            recordings.setdefault(own)
    kinds = ", ".join(f"{kind}: {list(found.values()).count(kind)}" for kind in dict.fromkeys(found.values()))
    log.info("%s: %d boxes in %d recordings", kinds, len(rows), len(recordings))
    return rows, list(recordings)


def _label(file: str, box: Box) -> str | None:
    try:
        return normal("label", box.label)
    except ValueError as error:
        raise CatalogueError(f"{file}: {error}", "text", "correct this label") from None


def _candidates(path: str) -> Iterable[str]:
    if not os.path.isdir(path):
        return [path]
    return [file for name in listing.walk(path, lambda *_: None) if is_suffix(file := os.path.join(path, name))]


def is_suffix(path: str) -> bool:
    """Whether a file may hold annotations by its suffix."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


class _Recordings:
    """Where the recordings are: beside an annotation file, or by name anywhere below the folder that was given."""

    def __init__(self, folder: str, *, deep: bool) -> None:
        names = listing.walk(folder, lambda *_: None) if deep else sorted(os.listdir(folder))
        self.by_folder: dict[str, list[str]] = {}
        self.by_name: dict[str, list[str]] = {}
        for name in names:
            if os.path.splitext(name)[1].lower() in files.SUFFIXES:
                path = os.path.abspath(os.path.join(folder, name))
                self.by_folder.setdefault(os.path.dirname(path), []).append(path)
                self.by_name.setdefault(os.path.basename(path), []).append(path)

    def beside(self, file: str) -> str | None:
        """Return the recording beside a file whose name begins with the recording's, up to a point."""
        at, name = os.path.split(os.path.abspath(file))
        there: Mapping[str, list[str]] = _by_stem(self.by_folder.get(at, ()))
        while "." in name:
            name = name.rpartition(".")[0]
            if same := there.get(name):
                return _only(same, file)
        return None

    def named(self, recording: str, file: str) -> str:
        """Return the recording that a file names; where it is nowhere, the path beside the file."""
        plain = recording.replace("\\", "/")
        at = os.path.dirname(os.path.abspath(file))
        base = os.path.basename(plain)
        for path in (os.path.join(at, plain), os.path.join(at, base)):
            if os.path.exists(found := local_files.locate(path)):
                return os.path.normpath(found)
        return _only(self.by_name.get(base) or [os.path.join(at, base)], file)


def _by_stem(paths: Iterable[str]) -> dict[str, list[str]]:
    """Map names of recordings, with and without their suffix, to the recordings."""
    found: dict[str, list[str]] = {}
    for path in paths:
        name = os.path.basename(path)
        for key in (name, os.path.splitext(name)[0]):
            found.setdefault(key, []).append(path)
    return found


def _only(paths: list[str], file: str) -> str:
    if len(paths) > 1:
        raise CatalogueError(
            f"{file} may belong to {' or '.join(paths[:3])}", "one recording of that name", "remove one"
        )
    return paths[0]
