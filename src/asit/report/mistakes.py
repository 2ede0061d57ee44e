"""What a model gets wrong: the worst clips, with sound.

Letters in shapes: N clips, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.data.catalogue.catalogue import Clip
from asit.report.audio_player import AUDIO_SECONDS
from asit.report.listen import Recordings
from asit.report.score_records import Scores

SOUNDS = 20
"""Clips with sound on a page."""
CLASSES = 12
"""Classes of several-label data whose worst clips are named, the lowest average precision first."""
EACH = 3
"""Clips named on each side of such a class."""
CLASSES_WITH_SOUND = 5
"""The first of these classes, whose two worst clips on each side are played."""


def single_label(mistakes: Sequence[Mapping[str, Any]], recordings: Recordings) -> str:
    """The wrong answers given with the highest scores.

    Args:
        mistakes: a result record's: path, truth, predicted, score; start and seconds where a clip is a part of a file.
        recordings: where their sound comes from.
    """
    if not mistakes:
        return "<p>No clip was given a wrong class.</p>"
    worst = sorted(mistakes, key=lambda m: -float(m["score"]))[:SOUNDS]
    cards = "".join(
        _card(
            f"<b>{escape(str(m['truth']))}</b> taken for <b>{escape(str(m['predicted']))}</b>, score {m['score']:.3f}",
            str(m["path"]),
            recordings.play(
                Clip(str(m["path"]), float(m.get("seconds", AUDIO_SECONDS)), 0, 0, start=float(m.get("start", 0.0)))
            ),
        )
        for m in worst
    )
    return (
        "<p>Wrong answers given with the highest scores: a wrong label in the data, a clip that is hard to hear, or a "
        f'weakness of the model.</p><div class="clips">{cards}</div>'
    )


def multi_label(
    held: Scores, classes: Sequence[str], per_class: Sequence[Mapping[str, Any]], recordings: Recordings
) -> str:
    """Of the classes with the lowest average precision: the highest scores without the label, the lowest with it.

    Args:
        held: scores of all clips.
        classes: (C,) names, in the order of the scores.
        per_class: a result record's; classes without clips are passed over.
        recordings: where their sound comes from.
    """
    place = {name: i for i, name in enumerate(classes)}
    rows = [row for row in per_class if row.get("AP") is not None and row["class"] in place]
    worst = sorted(rows, key=lambda row: (float(row["AP"]), str(row["class"])))[:CLASSES]
    if not worst:
        return '<p class="missing">No class has both clips and an average precision.</p>'
    positives = held.positives
    chosen: list[tuple[Mapping[str, Any], NDArray[np.int64], NDArray[np.int64]]] = []
    for row in worst:
        column = place[row["class"]]
        scores, there = held.scores[:, column], positives[:, column]
        chosen.append((row, _first(-scores, ~there), _first(scores, there)))
    recordings.find(str(held.ids[i]) for _, false, missed in chosen[:CLASSES_WITH_SOUND] for i in [*false, *missed])
    parts = []
    for number, (row, false, missed) in enumerate(chosen):
        cards = ""
        for said, rows_of in (("scored highest without the label", false), ("scored lowest with the label", missed)):
            for rank, i in enumerate(rows_of):
                name = str(held.ids[i])
                labels = ", ".join(classes[j] for j in held.indices[held.indptr[i] : held.indptr[i + 1]]) or "none"
                sound = recordings.player(name) if number < CLASSES_WITH_SOUND and rank < 2 else ""
                score = f"{held.scores[i, place[row['class']]]:.3f}"
                cards += _card(f"{said}: <b>{score}</b><br><small>labels: {escape(labels)}</small>", name, sound)
        opened = " open" if number < 2 else ""
        parts.append(
            f"<details{opened}><summary>{escape(str(row['class']))}: AP {row['AP']:.3f}, {row['clips']:,} clips"
            f'</summary><div class="clips">{cards}</div></details>'
        )
    sounded = min(len(worst), CLASSES_WITH_SOUND)
    return (
        f"<p>The {len(worst)} classes with the lowest average precision; the first {sounded} with sound. A clip that "
        f"scores high without the label may lack it in the data only.</p>{''.join(parts)}"
    )


def _first(values: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows with the smallest values among some, smallest first, at most EACH."""
    rows = np.flatnonzero(among)
    if len(rows) > EACH:
        rows = rows[np.argpartition(values[rows], EACH - 1)[:EACH]]
    return rows[np.lexsort((rows, values[rows]))]


def _card(said: str, name: str, sound: str) -> str:
    return f'<div class="clip"><span>{said}</span><small>{escape(os.path.basename(name))}</small>{sound}</div>'  # noqa: PTH119
