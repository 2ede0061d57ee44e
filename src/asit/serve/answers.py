"""Format the results of a model as JSON, and what the page draws (spectrogram, colours, attention) as bytes in it.

Letters in shapes: C classes, W windows, D width, N frames or columns of a picture, S samples, F mel bins, H heads.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from asit.audio.fbank import FrontEnd
from asit.audio.files import Wave
from asit.model.inference.tagging import Tag, Tags

if TYPE_CHECKING:
    from asit.search import Neighbour
    from asit.serve.analysis import Recording

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


COLUMNS = 1600
"""Most columns of a spectrogram: more than a page is wide."""

_WINDOWS = 6  # fewest of a sound for their means to be nearly independent of the sound
_BLOCK = 3000  # frames whose log-mel is made at once


def spectrogram(front_end: FrontEnd, wave: Wave, check: Callable[[], None]) -> dict[str, Any]:
    """Return the log-mel of a sound in bytes; a column has the maximum of its frames, so that no onset is lost.

    Args:
        front_end: of the model.
        wave: (S,) at the model's rate.
        check: called regularly; may raise.

    Returns:
        JSON: `columns` N, `mels` F, `first` where the first column begins and `seconds` of a column, `hz` (F,) centres
        of the bins, `values` base64 of N x F bytes, column by column, lowest bin first, 0 to 255 from `low` to `high`,
        which are decibels.
    """
    samples = front_end.pad(torch.from_numpy(wave), front_end.window)
    frames = front_end.frames_for(len(samples))
    each = math.ceil(frames / COLUMNS)
    block = max(1, _BLOCK // each) * each
    parts = []
    for first in range(0, frames, block):
        check()
        count = min(block, frames - first)
        start = first * front_end.shift
        logmel = front_end.fbank(samples[None, start : start + front_end.samples_for(count)])[0].cpu().numpy()
        filled = np.pad(logmel, ((0, -count % each), (0, 0)), constant_values=-np.inf)
        parts.append(filled.reshape(-1, each, filled.shape[1]).max(1))
    picture = np.concatenate(parts) * (10.0 / math.log(10.0))  # natural logarithm of power to decibels
    high = float(picture.max())
    low = max(float(np.percentile(picture, 5)), high - 80.0)
    return {
        "columns": len(picture),
        "mels": picture.shape[1],
        # A frame is drawn around its middle, as wide as the hop.
        "first": (front_end.window - front_end.shift) / 2 / front_end.settings.rate,
        "seconds": each * front_end.shift / front_end.settings.rate,
        "hz": [round(hz, 1) for hz in bin_centres(front_end).tolist()],
        "low": round(low, 2),
        "high": round(high, 2),
        "values": _coded((picture - low) / max(high - low, 1e-6)),
    }


def bin_centres(front_end: FrontEnd) -> NDArray[np.float64]:
    """Return the centres (F,) of the mel bins in Hz, on the scale of `asit.audio.fbank.mel_bank`."""
    count = front_end.settings.mels
    low, high = 1127.0 * np.log1p(np.array(front_end.band) / 700.0)
    mels = low + (high - low) * np.arange(1, count + 1) / (count + 1)
    centres: NDArray[np.float64] = 700.0 * np.expm1(mels / 1127.0)
    return centres


def colours(frames: NDArray[np.float32], period: int | None = None) -> str:
    """Return a colour for each frame: its first three principal components as red, green and blue.

    Args:
        frames: (N, D).
        period: frames from window to window of a long sound. With enough windows, the mean over frames at the same
            position of their windows is subtracted: it depends on the position, not on the sound, and would stripe a
            long, even sound.

    Returns:
        base64 of N x 3 bytes; each component is scaled from its 2nd to its 98th percentile. A constant component is
        grey.
    """
    x = frames.astype(np.float64) - frames.mean(0)
    if period and len(x) >= _WINDOWS * period:
        for position in range(period):
            x[position::period] -= x[position::period].mean(0)
    # With fewer frames than dimensions, the smaller matrix has the same components.
    if len(x) <= x.shape[1]:
        values, vectors = np.linalg.eigh(x @ x.T)
        components = vectors[:, ::-1][:, :3] * np.sqrt(np.maximum(values[::-1][:3], 0.0))
    else:
        components = x @ np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :3]
    out = np.full((len(x), 3), 0.5)
    for i, component in enumerate(components.T):
        if component[np.abs(component).argmax()] < 0:  # the sign of a component is arbitrary
            component = -component
        low, high = np.percentile(component, [2, 98])
        if high - low > 1e-6 * max(1.0, float(np.abs(frames).max())):
            out[:, i] = 0.15 + 0.75 * (component - low) / (high - low)
    return _coded(out)


def attention(maps: NDArray[np.float32]) -> tuple[str, list[float]]:
    """Return the attention of each head in bytes.

    Args:
        maps: (H, N, M) for M patches of a column.

    Returns:
        base64 of H x N x M bytes, each head relative to its maximum; and these maxima.
    """
    peaks = maps.reshape(len(maps), -1).max(1)
    return _coded(maps / np.maximum(peaks, 1e-12)[:, None, None]), [round(float(peak), 6) for peak in peaks]


def _coded(values: NDArray[Any]) -> str:
    """Values, clipped to 0 to 1, as base64 of bytes."""
    return base64.b64encode(np.rint(np.clip(values, 0.0, 1.0) * 255.0).astype(np.uint8).tobytes()).decode()
