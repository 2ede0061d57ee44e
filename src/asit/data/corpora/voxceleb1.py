"""VoxCeleb1 as speaker identification: 1,251 speakers, the split of iden_split.txt.

Source of layout and counts: Nagrani, Chung, Zisserman, "VoxCeleb: a large-scale speaker identification dataset", 2017,
and SUPERB's speaker identification, which uses the same list.
"""

# ruff: noqa: PTH118, PTH119, PTH122

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from asit.data.catalogue.tables import TableRow
from asit.data.corpora.corpus import (
    FIRST,
    Corpus,
    damaged,
    existing,
    left_behind,
    names,
    pairs_note,
    read_lines,
    require_whole,
    stem,
    walk,
)
from asit.errors import CatalogueError

EXPECTED = {"train": 138_361, "validation": 6_904, "test": 8_251}
"""Utterances of each split."""

SPEAKERS = 1251

_SPLITS = {"1": "train", "2": "validation", "3": "test"}
_LIST = "iden_split.txt"
_CLIP = re.compile(r"id\d{5}/[^/]+/\d+")
_TRIALS = re.compile(r"(veri_test|list_test_).*\.txt")


def read(
    root: str | os.PathLike[str],
    *,
    incomplete: bool = False,
    expected: Mapping[str, int] = EXPECTED,
    speakers: int = SPEAKERS,
) -> Corpus:
    """The utterances of iden_split.txt, wherever below root idXXXXX/VIDEO/NNNNN.wav lies (wav/, dev/wav/, test/wav/).

    The label is the speaker; the classes are the speakers by number. There is no group: the task has each speaker on
    all sides, which the header says as "shared_groups". Trial lists for verification that lie there (veri_test*.txt,
    list_test_*.txt) stand in the header as "trials".

    Args:
        root: the folder that holds the recordings and the list.
        incomplete: go on where utterances or speakers are missing.
        expected: utterances of each split.
        speakers: how many there are.

    Raises:
        CatalogueError: no list, a damaged one, or utterances missing.
    """
    name, place = "voxceleb1", existing(root)
    there: dict[str, str] = {}
    lists, trials, pairs = [], [], []
    for path in walk(place):
        head = stem(path)
        if head is None:
            base = os.path.basename(path)
            if base == _LIST:
                lists.append(path)
            elif _TRIALS.fullmatch(base):
                trials.append(path)
            continue
        key = "/".join(head.split("/")[-3:])
        if _CLIP.fullmatch(key) and there.setdefault(key, path) != path:
            pairs.append(path)
    if not lists:
        raise CatalogueError(
            f"{place} has no {_LIST}; it holds {len(there):,} recordings named idXXXXX/VIDEO/NNNNN"
            + (f"; {hints}" if (hints := left_behind(place)) else ""),
            "the list of the identification split, beside wav/",
            f"put {_LIST} there; docs/tasks/voxceleb1.md says where it comes from",
        )
    table = os.path.join(place, min(lists, key=lambda path: path.count("/")))
    splits: dict[str, str] = {}
    missing = []
    for number, line in read_lines(table):
        code, _, clip = line.partition(" ")
        key = os.path.splitext(clip.strip())[0]
        if code not in _SPLITS or not _CLIP.fullmatch(key):
            raise damaged(table, number, f"'{line[:60]}' is not like '1 id10003/na8-QEFmj44/00003.wav'")
        if key in splits:
            raise damaged(table, number, f"{clip} is listed twice")
        splits[key] = _SPLITS[code]
        if key not in there:
            missing.append(clip.strip())
    found = Counter(split for key, split in splits.items() if key in there)
    classes = tuple(sorted({key.split("/")[0] for key in splits}))
    heard = {key.split("/")[0] for key in splits if key in there}
    silent = sorted(set(classes) - heard)
    detail = f"{len(silent):,} of {len(classes):,} speakers have no recording: {names(silent)}" if silent else ""
    if len(classes) != speakers:
        detail = f"the list names {len(classes):,} speakers of {speakers:,}" + (f"; {detail}" if detail else "")
    notes = pairs_note(pairs)
    notes += require_whole(name, place, expected, found, missing, incomplete=incomplete, detail=detail)
    unlisted = len(there.keys() - splits.keys())
    if unlisted:
        notes += (f"{unlisted:,} recordings are not in {_LIST} and were left out",)

    def iterate() -> Iterator[TableRow]:
        for key, split in splits.items():
            if key in there:
                yield TableRow(os.path.join(place, there[key]), key.split("/")[0], split)

    facts: dict[str, Any] = {"shared_groups": True}
    if trials:
        facts["trials"] = trials
    return Corpus(
        name, place, iterate, classes, expected, dict(found), len(missing), tuple(missing[:FIRST]), notes, facts
    )
