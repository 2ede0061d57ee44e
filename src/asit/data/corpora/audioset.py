"""AudioSet: segment lists over a folder of clips named by video.

Source of layout and counts: Gemmeke et al., "Audio Set: An ontology and human-labeled dataset for audio events", 2017,
and the headers of its three lists (num_segs). No copy is whole, since videos go away: what is missing is counted.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH118, PTH119, PTH122, PTH202

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import unreadable
from asit.data.catalogue.columns import Texts, encode
from asit.data.catalogue.tables import TableRow
from asit.data.corpora.corpus import (
    FIRST,
    Corpus,
    damaged,
    existing,
    left_behind,
    names,
    pairs_note,
    read_csv,
    stem,
    walk,
)
from asit.errors import CatalogueError
from asit.io import local_files

EXPECTED = {"balanced": 22_160, "unbalanced": 2_041_789, "test": 20_371}
"""Segments of each list."""

CLASSES = 527

LISTS = {
    "balanced": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}
"""The split of each list: the two training lists keep their own names, the evaluation list is "test"."""

_INDEX = "class_labels_indices.csv"
_AT_ONCE = 1 << 16  # files matched at a time
_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# Behind the video: nothing, a start, or a start and an end, in seconds or milliseconds.
_TAIL = re.compile(r"(?:_(\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?")
_HEADS = ("", "Y", "id_")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PROMISE = re.compile(r"num_segs=(\d+)")
_SOFT = re.compile(r":\s*[\d.]+\s*$")
_SPLITS = tuple(LISTS)


@dataclass(frozen=True)
class _Segments:
    """The lines of all lists, in their order.

    Attributes:
        ids: (N,) S11, the videos.
        starts: (N,) float32, s.
        splits: (N,) int8, place in _SPLITS.
        codes: (N,) int32, place in texts.
        texts: label texts, names parted by ";".
    """

    ids: npt.NDArray[np.bytes_]
    starts: npt.NDArray[np.float32]
    splits: npt.NDArray[np.int8]
    codes: npt.NDArray[np.int32]
    texts: list[str]


def read(
    root: str | os.PathLike[str],
    *,
    incomplete: bool = False,
    most_missing: float = 0.3,
    expected: Mapping[str, int] = EXPECTED,
    classes: int = CLASSES,
) -> Corpus:
    """The segments of the lists whose clips lie anywhere below root, named by video.

    A clip's name is the video, "Y" and the video, or "id_" and the video, alone or followed by its start, or by start
    and end, in seconds or milliseconds: ``Y-0RWZT-miFs.wav``, ``-0RWZT-miFs_420.000_430.000.flac``,
    ``-0RWZT-miFs_420000.m4a``. Folders do not matter. A start in the name must be the list's (to a second). The
    label is the display names in the official order, parted by ";"; the splits are "balanced", "unbalanced", "test".

    Args:
        root: the folder that holds clips and lists.
        incomplete: go on without a list, with shorter lists, and with more missing than `most_missing`.
        most_missing: largest share of a split's segments without a clip.
        expected: segments of each list.
        classes: how many there are.

    Raises:
        CatalogueError: a list or the class index is missing or damaged, or too many clips are missing.
    """
    if not 0 <= most_missing <= 1:
        raise CatalogueError(f"most_missing is {most_missing}", "a share from 0 to 1", "change it")
    place = existing(root)
    lists: dict[str, list[str]] = {name: [] for name in (*LISTS.values(), _INDEX)}
    clips = Texts.pack(encode(path) for path in _clips_of(walk(place), lists))
    index = _one(place, _INDEX, lists[_INDEX])
    tables = {split: _one(place, LISTS[split], lists[LISTS[split]]) for split in expected}
    absent = [LISTS[split] for split, table in tables.items() if table is None]
    if index is None or len(absent) == len(tables) or (absent and not incomplete):
        raise _no_lists(place, absent if index else [*absent, _INDEX], len(clips), skippable=index is not None)
    order, places = _read_index(index, classes)
    segments, short = _read_lists({split: table for split, table in tables.items() if table}, places, order, expected)
    if short and not incomplete:
        raise CatalogueError(
            f"{place}: {'; '.join(short)}",
            "the whole lists",
            "download them again; or go on with these: --incomplete (in Python incomplete=True)",
        )
    where, told = _match(clips, segments)
    there = np.bincount(segments.splits[where >= 0], minlength=len(_SPLITS))
    found = {split: int(there[_SPLITS.index(split)]) for split in expected}
    lost = np.flatnonzero(where < 0)
    first = tuple(segments.ids[i].decode() for i in lost[:FIRST].tolist())
    listed = np.bincount(segments.splits, minlength=len(_SPLITS))
    counts = {split: (found[split], int(listed[_SPLITS.index(split)])) for split, table in tables.items() if table}
    _require(place, counts, first, len(lost), len(clips), most_missing, incomplete)
    notes = [f"there is no {name}: its split is left out" for name in absent] + short + told
    if len(lost):
        notes.append(f"{len(lost):,} of {len(where):,} segments have no clip: {names(first, len(lost))}")

    def iterate() -> Iterator[TableRow]:
        for i in np.flatnonzero(where >= 0).tolist():
            path = os.path.join(place, clips[int(where[i])])
            yield TableRow(path, segments.texts[int(segments.codes[i])], _SPLITS[int(segments.splits[i])])

    return Corpus("audioset", place, iterate, order, expected, found, len(lost), first, tuple(notes))


def _clips_of(paths: Iterable[str], lists: dict[str, list[str]]) -> Iterator[str]:
    """The recordings; lists are put aside."""
    for path in paths:
        if stem(path) is not None:
            yield path
        elif (base := os.path.basename(path)) in lists:
            lists[base].append(path)


def _one(place: str, name: str, copies: list[str]) -> str | None:
    """The list's full path: of several copies of one size the one nearest to root."""
    full = [os.path.join(place, path) for path in sorted(copies, key=lambda path: (path.count("/"), path))]
    if len({os.path.getsize(path) for path in full}) > 1:
        raise CatalogueError(
            f"{place} holds {len(full)} different {name}: {names(full)}", "one", "remove or rename the others"
        )
    return full[0] if full else None


def _no_lists(place: str, absent: list[str], clips: int, *, skippable: bool) -> CatalogueError:
    hints = left_behind(place)
    return CatalogueError(
        f"{place} has no {', no '.join(absent)}; it holds {clips:,} recordings" + (f"; {hints}" if hints else ""),
        f"{', '.join((*LISTS.values(), _INDEX))} in it or below it",
        "put them there (docs/tasks/audioset.md says where they come from)"
        + ("; or go on without that split: --incomplete (in Python incomplete=True)" if skippable else ""),
    )


def _read_index(path: str, count: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """The display names in the official order, and each label code's place among them."""
    order: list[str] = []
    places: dict[str, int] = {}
    for number, row in read_csv(path, ("index", "mid", "display_name")):
        name = row["display_name"]
        if row["index"] != str(len(order)):
            raise damaged(path, number, f"index {row['index']} where {len(order)} should come")
        if row["mid"] in places or name in order:
            raise damaged(path, number, f"{row['mid']}, {name} stands there twice")
        if ";" in name or _SOFT.search(name) or not name.strip():
            raise damaged(path, number, f"'{name}' cannot be a label: ';' parts labels, ':' and a number is a weight")
        places[row["mid"]] = len(order)
        order.append(name)
    if len(order) != count:
        raise CatalogueError(f"{path} has {len(order):,} classes", f"{count:,}", "download it again")
    return tuple(order), places


def _read_lists(
    tables: Mapping[str, str], places: Mapping[str, int], order: tuple[str, ...], expected: Mapping[str, int]
) -> tuple[_Segments, list[str]]:
    """All segments, and what the lists lack."""
    ids, starts, splits, codes = bytearray(), array("f"), bytearray(), array("i")
    texts: dict[str, int] = {}  # label codes as they stand there -> code
    short = []
    for split, path in tables.items():
        before = len(codes)
        promised = None
        try:
            with local_files.open_text(path, "utf-8-sig", "") as lines:
                for cells in csv.reader(lines, skipinitialspace=True):
                    if not cells or cells[0].startswith("#"):
                        promised = promised or _PROMISE.search(",".join(cells))
                        continue
                    if len(cells) != 4 or not _ID.fullmatch(cells[0]) or not _NUMBER.fullmatch(cells[1]):
                        line = f"segment {len(codes) - before + 1}"
                        raise CatalogueError(
                            f"{path}, {line}: '{','.join(cells)[:60]}' is not VIDEO, start, end, \"labels\"",
                            "the official list",
                            "download it again",
                        )
                    ids += cells[0].encode()
                    starts.append(float(cells[1]))
                    codes.append(texts.setdefault(cells[3], len(texts)))
        except OSError as error:
            raise unreadable(path, error) from None
        except (csv.Error, UnicodeDecodeError) as error:
            raise CatalogueError(f"{path} is damaged: {error}", "the official list", "download it again") from None
        count = len(codes) - before
        splits += bytes([_SPLITS.index(split)]) * count
        if count != expected[split]:
            said = f", and its header says {int(promised[1]):,}" if promised else ""
            short.append(f"{LISTS[split]} holds {count:,} of {expected[split]:,} segments{said}")
    return (
        _Segments(
            np.frombuffer(bytes(ids), "S11"),
            np.array(starts, np.float32),
            np.frombuffer(bytes(splits), np.int8),
            np.array(codes, np.int32),
            _label_texts(texts, places, order),
        ),
        short,
    )


def _label_texts(texts: Iterable[str], places: Mapping[str, int], order: tuple[str, ...]) -> list[str]:
    out, unknown = [], {}
    for text in texts:
        mids = {mid.strip() for mid in text.split(",")}
        unknown.update(dict.fromkeys(sorted(mids - places.keys())))
        out.append(";".join(order[place] for place in sorted(places[mid] for mid in mids if mid in places)))
    if unknown:
        raise CatalogueError(
            f"the segment lists use {len(unknown):,} labels that {_INDEX} does not have: {names([*unknown])}",
            f"lists and {_INDEX} of one release",
            "download them again",
        )
    return out


def _match(clips: Texts, segments: _Segments) -> tuple[npt.NDArray[np.int64], list[str]]:
    """For each segment the place of its clip, -1 where there is none; and what is told about the other files."""
    where = np.full(len(segments.ids), -1, np.int64)
    by_id = np.argsort(segments.ids, kind="stable")
    ids = segments.ids[by_id]
    pairs, elsewhere = _Few(), _Few()
    used = 0
    batch: list[tuple[bytes, float, int]] = []

    def settle() -> None:
        nonlocal used
        if not batch or not len(ids):
            return
        named = np.array([name for name, _, _ in batch], "S11")
        starts = np.array([start for _, start, _ in batch])
        files = np.array([file for _, _, file in batch])
        at = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
        known = np.flatnonzero(ids[at] == named)
        # A name can be read in two ways ("id_" may begin a video); the first that is listed counts.
        known = known[np.unique(files[known], return_index=True)[1]]
        segment = by_id[at[known]]
        start, due = starts[known], segments.starts[segment]
        right = np.isnan(start) | (np.abs(start - due) < 1) | (np.abs(start / 1000 - due) < 1)
        for file in files[known[~right]].tolist():
            elsewhere.add(clips, file)
        segment, known = segment[right], known[right]
        for one, file in zip(segment.tolist(), files[known].tolist(), strict=True):
            if where[one] < 0:
                where[one] = file
                used += 1
            else:
                pairs.add(clips, file)
        batch.clear()

    for file, path in enumerate(clips):
        batch.extend((name, start, file) for name, start in _readings(os.path.basename(os.path.splitext(path)[0])))
        if len(batch) >= _AT_ONCE:
            settle()
    settle()
    told = list(pairs_note(pairs.first, pairs.count))
    if elsewhere.count:
        told.append(
            f"{elsewhere.count:,} files are named for another start than their video has in the lists and were left "
            f"out: {names(elsewhere.first, elsewhere.count)}"
        )
    if strange := len(clips) - used - pairs.count - elsewhere.count:
        told.append(f"{strange:,} recordings are in none of the lists and were left out")
    if twice := int((ids[1:] == ids[:-1]).sum()):
        told.append(f"{twice:,} segments are of a video that is listed before; they get no clip")
    return where, told


class _Few:
    """A count, and the first names."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, clips: Texts, place: int) -> None:
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(clips[place])


def _readings(name: str) -> Iterator[tuple[bytes, float]]:
    """Video and start (NaN: none) in each way a file's name can be read."""
    for head in _HEADS:
        if name.startswith(head):
            video, rest = name[len(head) : len(head) + 11], name[len(head) + 11 :]
            if _ID.fullmatch(video) and (tail := _TAIL.fullmatch(rest)):
                yield video.encode(), float(tail[1]) if tail[1] else math.nan


def _require(
    place: str,
    counts: Mapping[str, tuple[int, int]],
    first: tuple[str, ...],
    lost: int,
    clips: int,
    most_missing: float,
    incomplete: bool,
) -> None:
    """Each split must have clips, and not miss too many."""
    few = {split for split, (found, listed) in counts.items() if not found or listed - found > most_missing * listed}
    total = sum(found for found, _ in counts.values())
    if not few or (incomplete and total):
        return
    told = [
        f"{split} {found:,} of {listed:,} clips ({1 - found / max(1, listed):.1%} missing)"
        for split, (found, listed) in counts.items()
    ]
    hints = left_behind(place)
    raise CatalogueError(
        f"{place}, {clips:,} recordings: {'; '.join(told)}; no clip of {names(first, lost)}"
        + (f"; {hints}" if hints else ""),
        f"clips named by video in each split, and at most {most_missing:.0%} missing",
        "check the folder"
        + ("; or go on with these: --most-missing or --incomplete (in Python incomplete=True)" if total else ""),
    )
