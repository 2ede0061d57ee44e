"""AudioSet: segment lists over a folder of clips named by video.

Source of layout and counts: Gemmeke et al., "Audio Set: An ontology and human-labeled dataset for audio events", 2017,
and the headers of its three lists (num_segs). No copy is complete, since videos disappear: missing clips are counted.
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

from asit.data.catalogue.columns import Texts, encode
from asit.data.catalogue.tables import TableRow
from asit.data.corpora.corpus import (
    FIRST,
    INCOMPLETE,
    Corpus,
    copies_note,
    damaged,
    existing,
    first_names,
    hints,
    open_list,
    read_csv,
    stem,
    walk,
)
from asit.errors import CatalogueError

EXPECTED = {"balanced": 22_160, "unbalanced": 2_041_789, "test": 20_371}
"""Segments of each list."""

CLASSES = 527

LISTS = {
    "balanced": "balanced_train_segments.csv",
    "unbalanced": "unbalanced_train_segments.csv",
    "test": "eval_segments.csv",
}
"""The list of each split."""

_INDEX = "class_labels_indices.csv"
_BATCH = 1 << 16  # files matched together
_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# After the video: nothing, a start, or a start and an end, in seconds or milliseconds.
_TAIL = re.compile(r"(?:_(\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?")
_HEADS = ("", "Y", "id_")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NUM_SEGS = re.compile(r"num_segs=(\d+)")
_SOFT = re.compile(r":\s*[\d.]+\s*$")
_SPLITS = tuple(LISTS)


@dataclass(frozen=True)
class _Segments:
    """The lines of all lists, in order.

    Attributes:
        ids: (N,) S11, the videos.
        starts: (N,) float32, s.
        splits: (N,) int8, index into _SPLITS.
        codes: (N,) int32, index into texts.
        texts: label texts, names separated by ";".
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
    """Read the segments of the lists whose clips are anywhere below root, named by video.

    A clip's name is the video, "Y" and the video, or "id_" and the video, alone or followed by its start, or by start
    and end, in seconds or milliseconds: ``Y-0RWZT-miFs.wav``, ``-0RWZT-miFs_420.000_430.000.flac``,
    ``-0RWZT-miFs_420000.m4a``. A start in the name must be the list's (to a second). The label is the display names in
    the official order, separated by ";"; the splits are "balanced", "unbalanced", "test".

    Args:
        root: the folder that holds clips and lists.
        incomplete: accept a missing list, shorter lists, and more missing clips than `most_missing`.
        most_missing: largest share of a split's segments without a clip.
        expected: segments of each list.
        classes: number of classes.

    Raises:
        CatalogueError: a list or the class index is missing or damaged, or too many clips are missing.
    """
    if not 0 <= most_missing <= 1:
        raise CatalogueError(f"most_missing is {most_missing}", "a share from 0 to 1", "change it")
    root = existing(root)
    lists: dict[str, list[str]] = {name: [] for name in (*LISTS.values(), _INDEX)}
    clips = Texts.pack(encode(path) for path in _clips_of(walk(root), lists))
    index = _one(root, _INDEX, lists[_INDEX])
    tables = {split: _one(root, LISTS[split], lists[LISTS[split]]) for split in expected}
    absent = [LISTS[split] for split, table in tables.items() if table is None]
    if index is None or len(absent) == len(tables) or (absent and not incomplete):
        missing = absent if index else [*absent, _INDEX]
        raise CatalogueError(
            f"{root} has no {', no '.join(missing)}; it holds {len(clips):,} recordings{hints(root)}",
            f"{', '.join((*LISTS.values(), _INDEX))} in it or below it",
            "put them there (docs/tasks/audioset.md says where they come from)"
            + (f"; or {INCOMPLETE}" if index else ""),
        )
    order, positions = _read_index(index, classes)
    present = {split: table for split, table in tables.items() if table}
    segments, short = _read_lists(present, positions, order, expected)
    if short and not incomplete:
        raise CatalogueError(
            f"{root}: {'; '.join(short)}", "the complete lists", f"download them again; or {INCOMPLETE}"
        )
    clip_of, notes = _match(clips, segments)
    counts = np.bincount(segments.splits[clip_of >= 0], minlength=len(_SPLITS))
    found = {split: int(counts[_SPLITS.index(split)]) for split in expected}
    without = np.flatnonzero(clip_of < 0)
    first = first_names([segments.ids[i].decode() for i in without[:FIRST].tolist()], len(without))
    listed = np.bincount(segments.splits, minlength=len(_SPLITS))
    shares = {split: (found[split], int(listed[_SPLITS.index(split)])) for split in present}
    if not incomplete or not any(found.values()):
        _refuse_missing(f"{root}, {len(clips):,} recordings", shares, most_missing, f"{first}{hints(root)}")
    notes = [f"there is no {name}: its split is left out" for name in absent] + short + notes
    if len(without):
        notes.append(f"{len(without):,} of {len(clip_of):,} segments have no clip: {first}")

    def rows() -> Iterator[TableRow]:
        for i in np.flatnonzero(clip_of >= 0).tolist():
            path = os.path.join(root, clips[int(clip_of[i])])
            yield TableRow(
                path=path, label=segments.texts[int(segments.codes[i])], split=_SPLITS[int(segments.splits[i])]
            )

    return Corpus(
        name="audioset",
        root=root,
        rows=rows,
        classes=order,
        expected=expected,
        found=found,
        missing=len(without),
        notes=tuple(notes),
    )


def _clips_of(paths: Iterable[str], lists: dict[str, list[str]]) -> Iterator[str]:
    """Yield the recordings, and collect the lists in `lists`."""
    for path in paths:
        if stem(path) is not None:
            yield path
        elif (base := os.path.basename(path)) in lists:
            lists[base].append(path)


def _one(root: str, name: str, copies: list[str]) -> str | None:
    """Return the list's full path; of several copies of one size the one nearest to root."""
    full = [os.path.join(root, path) for path in sorted(copies, key=lambda path: (path.count("/"), path))]
    if len({os.path.getsize(path) for path in full}) > 1:
        found = f"{root} holds {len(full)} different {name}: {first_names(full)}"
        raise CatalogueError(found, "one", "remove or rename the others")
    return full[0] if full else None


def _read_index(path: str, count: int) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the display names in the official order, and the position of each label code among them."""
    order: list[str] = []
    positions: dict[str, int] = {}
    for number, row in read_csv(path, ("index", "mid", "display_name")):
        name = row["display_name"]
        if row["index"] != str(len(order)):
            raise damaged(path, number, f"index {row['index']} where {len(order)} should come")
        if row["mid"] in positions or name in order:
            raise damaged(path, number, f"{row['mid']}, {name} is listed twice")
        if ";" in name or _SOFT.search(name) or not name.strip():
            raise damaged(path, number, f"'{name}' cannot be a label: ';' separates labels, ':' a weight")
        positions[row["mid"]] = len(order)
        order.append(name)
    if len(order) != count:
        raise CatalogueError(f"{path} has {len(order):,} classes", f"{count:,}", "download it again")
    return tuple(order), positions


def _read_lists(
    tables: Mapping[str, str], positions: Mapping[str, int], order: tuple[str, ...], expected: Mapping[str, int]
) -> tuple[_Segments, list[str]]:
    """Return all segments, and notes on lists that are too short."""
    ids, starts, splits, codes = bytearray(), array("f"), bytearray(), array("i")
    texts: dict[str, int] = {}  # label codes as listed -> code
    short = []
    for split, path in tables.items():
        before, promised = len(codes), None
        with open_list(path, "") as lines:
            for cells in csv.reader(lines, skipinitialspace=True):
                if not cells or cells[0].startswith("#"):
                    promised = promised or _NUM_SEGS.search(",".join(cells))
                    continue
                if len(cells) != 4 or not _ID.fullmatch(cells[0]) or not _NUMBER.fullmatch(cells[1]):
                    what = f"'{','.join(cells)[:60]}' is not VIDEO, start, end, \"labels\""
                    raise damaged(path, f"segment {len(codes) - before + 1}", what)
                ids += cells[0].encode()
                starts.append(float(cells[1]))
                codes.append(texts.setdefault(cells[3], len(texts)))
        count = len(codes) - before
        splits += bytes([_SPLITS.index(split)]) * count
        if count != expected[split]:
            header = f", and its header says {int(promised[1]):,}" if promised else ""
            short.append(f"{LISTS[split]} holds {count:,} of {expected[split]:,} segments{header}")
    segments = _Segments(
        np.frombuffer(bytes(ids), "S11"),
        np.array(starts, np.float32),
        np.frombuffer(bytes(splits), np.int8),
        np.array(codes, np.int32),
        _label_texts(texts, positions, order),
    )
    return segments, short


def _label_texts(texts: Iterable[str], positions: Mapping[str, int], order: tuple[str, ...]) -> list[str]:
    out, unknown = [], {}
    for text in texts:
        mids = {mid.strip() for mid in text.split(",")}
        unknown.update(dict.fromkeys(sorted(mids - positions.keys())))
        out.append(";".join(order[i] for i in sorted(positions[mid] for mid in mids if mid in positions)))
    if unknown:
        found = f"the segment lists use {len(unknown):,} labels that {_INDEX} does not have: {first_names([*unknown])}"
        raise CatalogueError(found, f"lists and {_INDEX} of one release", "download them again")
    return out


def _match(clips: Texts, segments: _Segments) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the index of each segment's clip, -1 if there is none, and notes on the other files."""
    clip_of = np.full(len(segments.ids), -1, np.int64)
    by_id = np.argsort(segments.ids, kind="stable")
    ids = segments.ids[by_id]
    copies, elsewhere = _Few(clips), _Few(clips)
    batch: list[tuple[bytes, float, int]] = []

    def match_batch() -> None:
        if not batch or not len(ids):
            return
        named = np.array([name for name, _, _ in batch], "S11")
        starts = np.array([start for _, start, _ in batch])
        files = np.array([file for _, _, file in batch])
        at = np.minimum(np.searchsorted(ids, named), len(ids) - 1)
        known = np.flatnonzero(ids[at] == named)
        # Some names can be read in two ways ("id_" may begin a video): take the first that is listed.
        known = known[np.unique(files[known], return_index=True)[1]]
        segment = by_id[at[known]]
        start, due = starts[known], segments.starts[segment]
        right = np.isnan(start) | (np.abs(start - due) < 1) | (np.abs(start / 1000 - due) < 1)
        for file in files[known[~right]].tolist():
            elsewhere.add(file)
        for one, file in zip(segment[right].tolist(), files[known[right]].tolist(), strict=True):
            if clip_of[one] < 0:
                clip_of[one] = file
            else:
                copies.add(file)
        batch.clear()

    for file, path in enumerate(clips):
        batch.extend((name, start, file) for name, start in _readings(os.path.basename(os.path.splitext(path)[0])))
        if len(batch) >= _BATCH:
            match_batch()
    match_batch()
    notes = list(copies_note(copies.first, copies.count))
    if elsewhere.count:
        notes.append(
            f"{elsewhere.count:,} files have another start in their name than in the lists and were left out: "
            f"{first_names(elsewhere.first, elsewhere.count)}"
        )
    if unlisted := len(clips) - int((clip_of >= 0).sum()) - copies.count - elsewhere.count:
        notes.append(f"{unlisted:,} recordings are in none of the lists and were left out")
    if twice := int((ids[1:] == ids[:-1]).sum()):
        notes.append(f"{twice:,} segments are of a video that is listed before; they get no clip")
    return clip_of, notes


class _Few:
    """Counts files and keeps the first names."""

    def __init__(self, clips: Texts) -> None:
        self.clips = clips
        self.count = 0
        self.first: list[str] = []

    def add(self, file: int) -> None:
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(self.clips[file])


def _readings(name: str) -> Iterator[tuple[bytes, float]]:
    """Yield video and start (NaN: none) for each way to read a file's name."""
    for head in _HEADS:
        if name.startswith(head):
            video, rest = name[len(head) : len(head) + 11], name[len(head) + 11 :]
            if _ID.fullmatch(video) and (tail := _TAIL.fullmatch(rest)):
                yield video.encode(), float(tail[1]) if tail[1] else math.nan


def _refuse_missing(found: str, counts: Mapping[str, tuple[int, int]], most_missing: float, first: str) -> None:
    """Raise unless each split has clips, and does not lack too many."""
    if not any(not have or listed - have > most_missing * listed for have, listed in counts.values()):
        return
    texts = [
        f"{split} {have:,} of {listed:,} clips ({1 - have / max(1, listed):.1%} missing)"
        for split, (have, listed) in counts.items()
    ]
    some = any(have for have, _ in counts.values())
    problem = f"{found}: {'; '.join(texts)}; no clip of {first}"
    fix = "check the folder" + (f"; or raise --most-missing, or {INCOMPLETE}" if some else "")
    raise CatalogueError(problem, f"clips named by video in each split, and at most {most_missing:.0%} missing", fix)
