"""Show which clips a model gets wrong, with their sound.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from asit.data.catalogue.catalogue import Clip
from asit.report.audio_player import AUDIO_SECONDS, Recordings
from asit.report.score_records import Scores
from asit.report.templates import part

SOUNDS = 20
"""Clips with sound on a page."""
CLASSES = 12
"""Multi-label data: classes whose worst clips are named, the lowest average precision first."""
EACH = 3
"""Clips of such a class that are named for scoring too high, and as many for scoring too low."""
CLASSES_WITH_SOUND = 5
"""The first of these classes, of which the two worst clips of each kind are played."""


def single_label(mistakes: Sequence[Mapping[str, Any]], recordings: Recordings) -> Markup:
    """Return the wrong answers with the highest scores.

    Args:
        mistakes: of a result record: path, truth, predicted, score; start and seconds if the clip is a part of a file.
        recordings: source of the sound.
    """
    if not mistakes:
        return part("text", "No clip was given a wrong class.")
    cards = []
    for held in sorted(mistakes, key=lambda m: -float(m["score"]))[:SOUNDS]:
        path, seconds, begin = str(held["path"]), float(held.get("seconds", AUDIO_SECONDS)), float(held.get("start", 0))
        sound = recordings.player(Clip(path=path, seconds=seconds, rate=0, channels=0, start=begin))
        cards.append((held["truth"], held["predicted"], float(held["score"]), _basename(path), sound))
    return part("mistakes", cards)


def multi_label(
    held: Scores, classes: Sequence[str], per_class: Sequence[Mapping[str, Any]], recordings: Recordings
) -> Markup:
    """Return, for the classes with the lowest average precision, the highest scores without the label and the lowest
    with it.

    Args:
        held: scores of all clips.
        classes: (C,) names, in the order of the scores.
        per_class: of a result record; classes without clips are skipped.
        recordings: source of the sound.
    """
    columns = {name: i for i, name in enumerate(classes)}
    rows = [row for row in per_class if row.get("AP") is not None and row["class"] in columns]
    worst = sorted(rows, key=lambda row: (float(row["AP"]), str(row["class"])))[:CLASSES]
    if not worst:
        return part("missing", "No class has both clips and an average precision.")
    positives = held.positives
    chosen: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for row in worst:
        scores, has = held.scores[:, columns[row["class"]]], positives[:, columns[row["class"]]]
        chosen.append((_smallest(-scores, ~has), _smallest(scores, has)))
    recordings.find(str(held.ids[i]) for high, low in chosen[:CLASSES_WITH_SOUND] for i in [*high, *low])
    shown = []
    for number, (row, (high, low)) in enumerate(zip(worst, chosen, strict=True)):
        cards = []
        for kind, clips in (("scored highest without the label", high), ("scored lowest with the label", low)):
            for rank, i in enumerate(clips):
                name, score = str(held.ids[i]), float(held.scores[i, columns[row["class"]]])
                labels = ", ".join(classes[j] for j in held.indices[held.indptr[i] : held.indptr[i + 1]]) or "none"
                sound = recordings.player(name) if number < CLASSES_WITH_SOUND and rank < 2 else ""
                cards.append((kind, score, labels, _basename(name), sound))
        shown.append((row["class"], row["AP"], row["clips"], cards))
    return part("worst_classes", shown, min(len(worst), CLASSES_WITH_SOUND))


def _smallest(values: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows of `among` with the smallest values, in order, at most EACH."""
    rows = np.flatnonzero(among)
    if len(rows) > EACH:
        rows = rows[np.argpartition(values[rows], EACH - 1)[:EACH]]
    return rows[np.lexsort((rows, values[rows]))]


def _basename(path: str) -> str:
    return os.path.basename(path)  # noqa: PTH119
