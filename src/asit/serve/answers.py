"""Format the results of a model as JSON.

Letters in shapes: C classes, W windows, D width, N frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asit.model.inference.tagging import Tag, Tags
from asit.serve.uploads import Recording

if TYPE_CHECKING:
    from asit.search import Neighbour

TRACKS, FEWEST = 24, 5
"""Most labels of the timeline, chosen by their highest window; and the fewest, however low their scores."""


def labels(tags: Tags, top: int, threshold: float) -> dict[str, Any]:
    """Return the scores of the recording and of its segments, and the tracks of the timeline, the highest first."""
    scores = tags.windows.numpy()  # (W, C)
    best = scores.max(0)
    ranked = np.argsort(-best, kind="stable").tolist()
    shown = [i for rank, i in enumerate(ranked[:TRACKS]) if rank < FEWEST or best[i] >= threshold]
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
    """Return neighbours by their names in the index, without their paths on this machine."""
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


def recording(decoded: Recording) -> dict[str, Any]:
    """Return what every answer about a recording contains."""
    facts = {name: getattr(decoded, name) for name in ("rate", "channels", "format")}
    return {"seconds": round(decoded.seconds, 4), **facts}


def _tag(tag: Tag) -> dict[str, Any]:
    return {"label": tag.label, "score": round(tag.score, 6), "start": round(tag.start, 4), "end": round(tag.end, 4)}


def rows(values: NDArray[np.float32], check: Callable[[], None]) -> bytes:
    """Return rows of numbers as JSON without the outer brackets; row by row, since encoding holds the interpreter."""
    out = []
    for row in values:
        check()
        out.append(json.dumps(rounded(row), separators=(",", ":")).encode())
    return b",".join(out)


def rounded(values: Any, digits: int = 6) -> list[Any]:
    """Return numbers as a list with few digits."""
    short: list[Any] = np.round(np.asarray(values, dtype=np.float64), digits).tolist()
    return short


def as_json(value: Mapping[str, Any]) -> bytes:
    """Return compact JSON; a value that is not finite is a bug, and raises."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
