"""AudioSet: segment lists over a folder of clips named by video.

Source of layout and counts: Gemmeke et al., "Audio Set: An ontology and human-labeled dataset for audio events", 2017,
and the headers of its three lists (num_segs). No copy is complete, since videos disappear: missing clips are counted.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH118, PTH119, PTH122, PTH202

from __future__ import annotations

import csv
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from asit.data.catalogue.columns import Texts, encode
from asit.data.catalogue.tables import TableRow
from asit.data.corpora import corpus
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
_ID = re.compile(r"[A-Za-z0-9_-]{11}")
# After the video: nothing, a start, or a start and an end, in seconds or milliseconds.
_TAIL = re.compile(r"(?:_(\d+(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?")
_HEADS = ("", "Y", "id_")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_NUM_SEGS = re.compile(r"num_segs=(\d+)")
_SOFT = re.compile(r":\s*[\d.]+\s*$")


@dataclass
class _Segments:
    """The lines of all lists in columns, since there are two million; `clips` has the clip of each, -1 for none."""

    ids: bytearray = field(default_factory=bytearray)
    first: dict[str, int] = field(default_factory=dict)
    starts: array[float] = field(default_factory=lambda: array("f"))
    splits: bytearray = field(default_factory=bytearray)
    codes: array[int] = field(default_factory=lambda: array("i"))
    texts: list[str] = field(default_factory=list)
    clips: array[int] = field(default_factory=lambda: array("i"))


def read(
    root: str | os.PathLike[str],
    *,
    incomplete: bool = False,
    most_missing: float = 0.3,
) -> corpus.Corpus:
    """Read the segments of the lists whose clips are anywhere below root, named by video.

    A clip's name is the video, "Y" and the video, or "id_" and the video, alone or followed by its start, or by start
    and end, in seconds or milliseconds: ``Y-0RWZT-miFs.wav``, ``-0RWZT-miFs_420.000_430.000.flac``,
    ``-0RWZT-miFs_420000.m4a``. A start in the name must be the list's (to a second). The label is the display names in
    the official order, separated by ";"; the splits are "balanced", "unbalanced", "test".

    Args:
        root: the folder that holds clips and lists.
        incomplete: accept a missing list, shorter lists, and more missing clips than `most_missing`.
        most_missing: largest share of a split's segments without a clip.

    Raises:
        CatalogueError: a list or the class index is missing or damaged, or too many clips are missing.
    """
    if not 0 <= most_missing <= 1:
        raise CatalogueError(f"most_missing is {most_missing}", "a share from 0 to 1", "change it")
    root = corpus.existing(root)
    lists: dict[str, list[str]] = {name: [] for name in (*LISTS.values(), _INDEX)}
    clips = Texts.pack(encode(path) for path in _clips_of(corpus.walk(root), lists))
    index = _one(root, _INDEX, lists[_INDEX])
    tables = {split: _one(root, LISTS[split], lists[LISTS[split]]) for split in EXPECTED}
    absent = [LISTS[split] for split, table in tables.items() if table is None]
    if index is None or len(absent) == len(tables) or (absent and not incomplete):
        missing = absent if index else [*absent, _INDEX]
        raise CatalogueError(
            f"{root} has no {', no '.join(missing)}; it holds {len(clips):,} recordings{corpus.hints(root)}",
            f"{', '.join((*LISTS.values(), _INDEX))} in it or below it",
            "put them there (docs/tasks/audioset.md says where they come from)"
            + (f"; or {corpus.INCOMPLETE}" if index else ""),
        )
    order, positions = _read_index(index)
    present = {split: table for split, table in tables.items() if table}
    segments, short = _read_lists(present, positions, order)
    if short and not incomplete:
        raise CatalogueError(
            f"{root}: {'; '.join(short)}", "the complete lists", f"download them again; or {corpus.INCOMPLETE}"
        )
    notes = _match(clips, segments)
    listed = Counter(segments.splits)
    had = Counter(code for code, clip in zip(segments.splits, segments.clips, strict=True) if clip >= 0)
    counts = {split: (had[code], listed[code]) for code, split in enumerate(LISTS)}
    without = [i for i, clip in enumerate(segments.clips) if clip < 0]
    first = corpus.names([segments.ids[11 * i : 11 * i + 11].decode() for i in without[: corpus.FIRST]], len(without))
    if not incomplete or not any(had.values()):
        shares = {split: counts[split] for split in present}
        _refuse_missing(f"{root}, {len(clips):,} recordings", shares, most_missing, f"{first}{corpus.hints(root)}")
    notes = [f"there is no {name}: its split is left out" for name in absent] + short + notes
    if without:
        notes.append(f"{len(without):,} of {len(segments.clips):,} segments have no clip: {first}")
    splits = tuple(LISTS)

    def rows() -> Iterator[TableRow]:
        for clip, code, split in zip(segments.clips, segments.codes, segments.splits, strict=True):
            if clip >= 0:
                yield TableRow(os.path.join(root, clips[clip]), label=segments.texts[code], split=splits[split])

    return corpus.Corpus(
        name="audioset",
        root=root,
        rows=rows,
        classes=order,
        expected=EXPECTED,
        found={split: found for split, (found, _) in counts.items()},
        notes=tuple(notes),
    )


def _clips_of(paths: Iterable[str], lists: dict[str, list[str]]) -> Iterator[str]:
    """Yield the recordings, and collect the lists in `lists`."""
    for path in paths:
        if corpus.stem(path) is not None:
            yield path
        elif (base := os.path.basename(path)) in lists:
            lists[base].append(path)


def _one(root: str, name: str, copies: list[str]) -> str | None:
    """Return the list's full path; of several copies of one size the one nearest to root."""
    full = [os.path.join(root, path) for path in sorted(copies, key=lambda path: (path.count("/"), path))]
    if len({os.path.getsize(path) for path in full}) > 1:
        found = f"{root} holds {len(full)} different {name}: {corpus.names(full)}"
        raise CatalogueError(found, "one", "remove or rename the others")
    return full[0] if full else None


def _read_index(path: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the display names in the official order, and the position of each label code among them."""
    order: list[str] = []
    positions: dict[str, int] = {}
    for number, row in corpus.read_csv(path, ("index", "mid", "display_name")):
        name = row["display_name"]
        if row["index"] != str(len(order)):
            raise corpus.damaged(path, number, f"index {row['index']} where {len(order)} should come")
        if row["mid"] in positions or name in order:
            raise corpus.damaged(path, number, f"{row['mid']}, {name} is listed twice")
        if ";" in name or _SOFT.search(name) or not name.strip():
            raise corpus.damaged(path, number, f"'{name}' cannot be a label: ';' separates labels, ':' a weight")
        positions[row["mid"]] = len(order)
        order.append(name)
    if len(order) != CLASSES:
        raise CatalogueError(f"{path} has {len(order):,} classes", f"{CLASSES:,}", "download it again")
    return tuple(order), positions


def _read_lists(
    tables: Mapping[str, str], positions: Mapping[str, int], order: tuple[str, ...]
) -> tuple[_Segments, list[str]]:
    """Return all segments, and notes on lists that are too short."""
    found, short = _Segments(), []
    texts: dict[str, int] = {}  # label codes as listed -> code
    for code, split in enumerate(LISTS):
        if split not in tables:
            continue
        before, promised = len(found.codes), None
        with corpus.open_list(tables[split], "") as lines:
            for cells in csv.reader(lines, skipinitialspace=True):
                if not cells or cells[0].startswith("#"):
                    promised = promised or _NUM_SEGS.search(",".join(cells))
                    continue
                if len(cells) != 4 or not _ID.fullmatch(cells[0]) or not _NUMBER.fullmatch(cells[1]):
                    what = f"'{','.join(cells)[:60]}' is not VIDEO, start, end, \"labels\""
                    raise corpus.damaged(tables[split], f"segment {len(found.codes) - before + 1}", what)
                found.first.setdefault(cells[0], len(found.codes))
                found.ids += cells[0].encode()
                found.starts.append(float(cells[1]))
                found.splits.append(code)
                found.codes.append(texts.setdefault(cells[3], len(texts)))
        if (count := len(found.codes) - before) != EXPECTED[split]:
            header = f", and its header says {int(promised[1]):,}" if promised else ""
            short.append(f"{LISTS[split]} holds {count:,} of {EXPECTED[split]:,} segments{header}")
    found.texts = _label_texts(texts, positions, order)
    found.clips = array("i", [-1]) * len(found.codes)
    return found, short


def _label_texts(texts: Iterable[str], positions: Mapping[str, int], order: tuple[str, ...]) -> list[str]:
    out, unknown = [], {}
    for text in texts:
        mids = {mid.strip() for mid in text.split(",")}
        unknown.update(dict.fromkeys(sorted(mids - positions.keys())))
        out.append(";".join(order[i] for i in sorted(positions[mid] for mid in mids if mid in positions)))
    if unknown:
        found = f"the segment lists use {len(unknown):,} labels that {_INDEX} does not have: {corpus.names([*unknown])}"
        raise CatalogueError(found, f"lists and {_INDEX} of one release", "download them again")
    return out


def _match(clips: Texts, segments: _Segments) -> list[str]:
    """Assign clips to segments; return notes on the other files."""
    copies: list[str] = []
    elsewhere: list[str] = []
    unlisted = 0
    for file, path in enumerate(clips):
        found = _reading(os.path.basename(os.path.splitext(path)[0]), segments.first)
        if found is None:
            unlisted += 1
            continue
        at, start = found
        due = segments.starts[at]
        if start is not None and abs(start - due) >= 1 and abs(start / 1000 - due) >= 1:
            elsewhere.append(path)
        elif segments.clips[at] >= 0:
            copies.append(path)
        else:
            segments.clips[at] = file
    notes = list(corpus.copies_note(copies))
    if elsewhere:
        notes.append(
            f"{len(elsewhere):,} files have another start in their name than in the lists and were left out: "
            f"{corpus.names(elsewhere)}"
        )
    if unlisted:
        notes.append(f"{unlisted:,} recordings are in none of the lists and were left out")
    if twice := len(segments.codes) - len(segments.first):
        notes.append(f"{twice:,} segments are of a video that is listed before; they get no clip")
    return notes


def _reading(name: str, first: Mapping[str, int]) -> tuple[int, float | None] | None:
    """Return a file's segment and the start in its name; of two ways to read a name the first that is listed."""
    for head in _HEADS:
        video, rest = name[len(head) : len(head) + 11], name[len(head) + 11 :]
        if name.startswith(head) and video in first and (tail := _TAIL.fullmatch(rest)):
            return first[video], float(tail[1]) if tail[1] else None
    return None


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
    fix = "check the folder" + (f"; or raise --most-missing, or {corpus.INCOMPLETE}" if some else "")
    raise CatalogueError(problem, f"clips named by video in each split, and at most {most_missing:.0%} missing", fix)
