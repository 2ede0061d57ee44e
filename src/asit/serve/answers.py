"""Results of a model as what is answered: JSON.

Letters: C classes, W windows, D width, N frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asit.audio.files import Wave
from asit.model.inference.tagging import Tag, Tags

if TYPE_CHECKING:
    from asit.search import Neighbour

TRACKS, FEWEST = 24, 5
"""Most labels of the timeline, those with the highest scores in any window; and how many there are even if these scores
are low."""


@dataclass(frozen=True)
class Heard:
    """A decoded recording.

    Attributes:
        wave: (S,) mono at the model's rate.
        rate, channels, format: of the file.
    """

    wave: Wave
    rate: int
    channels: int
    format: str


def labels(tags: Tags, top: int, threshold: float) -> dict[str, Any]:
    """Scores of the whole sound and its stretches, and the tracks of a timeline, the label that is highest in any
    window first."""
    scores = tags.windows.numpy()  # (W, C)
    best = scores.max(0)
    ranked = np.argsort(-best, kind="stable").tolist()
    shown = [i for place, i in enumerate(ranked[:TRACKS]) if place < FEWEST or best[i] >= threshold]
    tops, segments = tags.top(min(top, len(tags.classes))), tags.segments(threshold)
    named = {tag.label for tag in (*tops, *segments)} | {tags.classes[i] for i in shown}
    return {
        "multi": tags.multi,
        "tags": [_tag(tag) for tag in tops],
        "segments": [_tag(tag) for tag in segments],
        "scores": {
            label: {"clip": round(float(tags.clip[i]), 6), "highest": round(float(best[i]), 6)}
            for i, label in enumerate(tags.classes)
            if label in named
        },
        "starts": rounded(np.asarray(tags.starts), 4),
        "ends": rounded(np.asarray(tags.ends), 4),
        "tracks": [{"label": tags.classes[i], "scores": rounded(scores[:, i])} for i in shown],
    }


def neighbours(found: Sequence[Neighbour]) -> list[dict[str, Any]]:
    """What is told of neighbours: what the user called them, not where they lie on this machine."""
    return [
        {
            "number": one.row,
            "name": one.name,
            "start": round(one.start, 3),
            "end": round(one.end, 3),
            "label": one.label,
            "similarity": round(one.similarity, 6),
        }
        for one in found
    ]


def sound(heard: Heard, rate: int) -> dict[str, Any]:
    """What every answer about a recording tells of it; `rate`: the model's."""
    return {
        "seconds": round(len(heard.wave) / rate, 4),
        "rate": heard.rate,
        "channels": heard.channels,
        "format": heard.format,
    }


def _tag(tag: Tag) -> dict[str, Any]:
    return {"label": tag.label, "score": round(tag.score, 6), "start": round(tag.start, 4), "end": round(tag.end, 4)}


def rows(values: NDArray[np.float32], check: Callable[[], None]) -> bytes:
    """Rows of numbers as JSON, without the outer brackets; row by row, since the server answers nobody meanwhile."""
    out = []
    for row in values:
        check()
        out.append(json.dumps(rounded(row), separators=(",", ":")).encode())
    return b",".join(out)


def rounded(values: Any, digits: int = 6) -> list[Any]:
    """Numbers as a list, short enough to be sent."""
    short: list[Any] = np.round(np.asarray(values, dtype=np.float64), digits).tolist()
    return short


def as_json(value: Mapping[str, Any]) -> bytes:
    """In as few bytes as can be. What is not finite is a defect, and an error."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
