"""VoxCeleb1 as speaker identification: 1,251 speakers, the split of iden_split.txt.

Source of layout and counts: Nagrani, Chung, Zisserman, "VoxCeleb: a large-scale speaker identification dataset", 2017,
and SUPERB's speaker identification, which uses the same list.
"""

# ruff: noqa: PTH118, PTH119, PTH122

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator

from asit.data.catalogue.tables import TableRow
from asit.data.corpora import corpus
from asit.errors import CatalogueError

EXPECTED = {"train": 138_361, "validation": 6_904, "test": 8_251}
"""Utterances of each split."""

SPEAKERS = 1251

_SPLITS = {"1": "train", "2": "validation", "3": "test"}
_LIST = "iden_split.txt"
_CLIP = re.compile(r"id\d{5}/[^/]+/\d+")
_TRIALS = re.compile(r"(veri_test|list_test_).*\.txt")


def read(root: str | os.PathLike[str], *, incomplete: bool = False) -> corpus.Corpus:
    """Read the utterances of iden_split.txt, idXXXXX/VIDEO/NNNNN.wav in any folder below root.

    The label is the speaker; the classes are the speakers by number. There is no group: the task has each speaker in
    all splits, which the header says as "shared_groups". Its "trials" are the trial lists for verification found
    (veri_test*.txt, list_test_*.txt).

    Args:
        root: the folder that holds the recordings and the list.
        incomplete: accept missing utterances and speakers.

    Raises:
        CatalogueError: no list, a damaged one, or utterances missing.
    """
    root = corpus.existing(root)
    paths: dict[str, str] = {}
    lists, trials, copies = [], [], []
    for path in corpus.walk(root):
        head = corpus.stem(path)
        if head is None:
            base = os.path.basename(path)
            if base == _LIST:
                lists.append(path)
            elif _TRIALS.fullmatch(base):
                trials.append(path)
            continue
        key = "/".join(head.split("/")[-3:])
        if _CLIP.fullmatch(key) and paths.setdefault(key, path) != path:
            copies.append(path)
    if not lists:
        problem = (
            f"{root} has no {_LIST}; it holds {len(paths):,} recordings named idXXXXX/VIDEO/NNNNN{corpus.hints(root)}"
        )
        wanted = "the list of the identification split, beside wav/"
        raise CatalogueError(problem, wanted, f"put {_LIST} there; docs/tasks/voxceleb1.md says where it comes from")
    table = os.path.join(root, min(lists, key=lambda path: path.count("/")))
    splits: dict[str, str] = {}
    missing = []
    for number, line in corpus.read_lines(table):
        code, _, clip = line.partition(" ")
        key = os.path.splitext(clip.strip())[0]
        if code not in _SPLITS or not _CLIP.fullmatch(key):
            raise corpus.damaged(table, number, f"'{line[:60]}' is not like '1 id10003/na8-QEFmj44/00003.wav'")
        if key in splits:
            raise corpus.damaged(table, number, f"{clip} is listed twice")
        splits[key] = _SPLITS[code]
        if key not in paths:
            missing.append(clip.strip())
    found = Counter(split for key, split in splits.items() if key in paths)
    classes = tuple(sorted({key.split("/")[0] for key in splits}))
    absent = sorted(set(classes) - {key.split("/")[0] for key in splits if key in paths})
    detail = f"{len(absent):,} of {len(classes):,} speakers have no recording: {corpus.names(absent)}" if absent else ""
    if len(classes) != SPEAKERS:
        detail = f"the list names {len(classes):,} speakers of {SPEAKERS:,}" + (f"; {detail}" if detail else "")
    notes = corpus.copies_note(copies)
    notes += corpus.require_complete(
        "voxceleb1", root, (found, EXPECTED), missing, incomplete=incomplete, detail=detail
    )
    if unlisted := len(paths.keys() - splits.keys()):
        notes += (f"{unlisted:,} recordings are not in {_LIST} and were left out",)

    def rows() -> Iterator[TableRow]:
        for key, split in splits.items():
            if key in paths:
                yield TableRow(path=os.path.join(root, paths[key]), label=key.split("/")[0], split=split)

    return corpus.Corpus(
        name="voxceleb1",
        root=root,
        rows=rows,
        classes=classes,
        expected=EXPECTED,
        found=dict(found),
        notes=notes,
        facts={"shared_groups": True, **({"trials": trials} if trials else {})},
    )
