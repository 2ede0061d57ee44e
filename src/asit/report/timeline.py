"""Draw the timeline of a recording: its spectrogram, and under it a track of scores for each label.

Letters in shapes: T frames, F mel bins, N columns of the picture, W windows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.io import atomic
from asit.logs import fit

Array = NDArray[np.float32]

COLUMNS = 1600
"""Most columns of a spectrogram's picture."""

_WIDTH, _DPI = 10.0, 120  # inches; dots an inch
_SPECTROGRAM, _TRACK, _REST = 2.3, 0.3, 1.1  # inches
_MOST_LABEL, _MOST_TITLE = 32, 100  # columns of a text of one width
_INK, _SCORE, _GROUND = "#30343b", "#2f6fb3", "#eef1f5"
_HZ = (50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000)
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)


class Spectrogram:
    """The log-mel of a recording of any length in at most `2 * COLUMNS` columns, in constant memory.

    A column is the mean of its frames.

    Args:
        blocks: consecutive samples (n,) at the front end's rate.
        front_end: computes the log-mel.

    Attributes:
        columns: (N, F) float32, natural log of power.
        seconds: length of the recording.
    """

    def __init__(self, blocks: Iterable[Array], front_end: FrontEnd) -> None:
        sums, counts = np.zeros((2 * COLUMNS, front_end.settings.mels)), np.zeros(2 * COLUMNS)
        each, frames, samples = 1, 0, 0  # frames of a column; frames and samples so far
        rest = np.zeros(0, np.float32)
        for block in blocks:
            samples += len(block)
            rest = np.concatenate([rest, block])
            new = front_end.frames_for(len(rest))
            if not new:
                continue
            logmel = front_end.fbank(torch.from_numpy(rest[None])).squeeze(0).double().numpy()
            rest = rest[new * front_end.shift :]
            while frames + new > 2 * COLUMNS * each:  # full: every two columns become one
                sums[:COLUMNS], counts[:COLUMNS] = sums[::2] + sums[1::2], counts[::2] + counts[1::2]
                sums[COLUMNS:], counts[COLUMNS:], each = 0.0, 0.0, 2 * each
            index = np.arange(frames, frames + new) // each
            np.add.at(sums, index, logmel)
            np.add.at(counts, index, 1.0)
            frames += new
        if not frames:  # shorter than a window
            padded = front_end.pad(torch.from_numpy(rest), front_end.window)
            sums[0], counts[0] = front_end.fbank(padded[None])[0, 0].numpy(), 1.0
        used = counts > 0
        self.columns: Array = (sums[used] / counts[used, None]).astype(np.float32)
        self.seconds = samples / front_end.settings.rate


def draw(
    path: Path,
    spectrogram: Spectrogram,
    settings: FrontEndSettings,
    tracks: Sequence[tuple[str, Array]],
    starts: Array,
    ends: Array,
    title: str,
) -> None:
    """Write the picture as a PNG atomically.

    Args:
        path: the file, which is replaced if it exists.
        spectrogram: of the recording.
        settings: of the front end, for the frequencies.
        tracks: name and scores (W,) from 0 to 1 of each label, the first at the top.
        starts, ends: (W,) of the windows, in seconds from the recording's start.
        title: printed above, such as the file's name.

    Raises:
        OSError: the file cannot be written.
    """
    names = [_one_line(name, _MOST_LABEL) for name, _ in tracks]
    title = _one_line(title, _MOST_TITLE, middle=True)
    families = fonts("".join([*names, title]))
    height = _SPECTROGRAM + _TRACK * len(tracks) + _REST
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontfamily=families, color=_INK, parse_math=False)
    ratios = [_SPECTROGRAM, *([_TRACK * len(tracks)] if tracks else [])]
    axes = figure.subplots(len(ratios), sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    _picture(axes[0], spectrogram, settings)
    if tracks:
        _tracks(axes[-1], names, [scores for _, scores in tracks], starts, ends, families)
    _time_axis(axes[-1], spectrogram.seconds)
    with atomic.write_file(path) as draft:
        FigureCanvasAgg(figure).print_png(draft)


def clock(seconds: float, step: float = 1.0) -> str:
    """Return a time as 0.25, 12, 1:05 or 2:00:00, with the decimals of the step between times, in seconds."""
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    seconds = round(seconds, decimals)
    full = int(seconds)
    if seconds < 60:
        return f"{seconds:.{decimals}f}"
    rest = f"{seconds - full + full % 60:0{2 + (decimals + 1 if decimals else 0)}.{decimals}f}"
    return f"{full // 60}:{rest}" if full < 3600 else f"{full // 3600}:{full // 60 % 60:02d}:{rest}"


def fonts(text: str) -> list[str]:
    """Return font families that cover the text: matplotlib's own, and others only for characters that it lacks."""
    families = ["DejaVu Sans"]
    missing = {ord(c) for c in text if not c.isspace()} - _characters(font_manager.findfont("DejaVu Sans"))
    seen = set(families)
    for entry in font_manager.fontManager.ttflist if missing else ():
        if entry.name in seen or (entry.style, entry.weight) not in (("normal", 400), ("normal", "normal")):
            continue
        seen.add(entry.name)
        found = _characters(entry.fname) & missing
        if found:
            families.append(entry.name)
            missing -= found
        if not missing:
            break
    return families


def _picture(axis: Axes, spectrogram: Spectrogram, settings: FrontEndSettings) -> None:
    values, mels = spectrogram.columns, spectrogram.columns.shape[1]
    low, high = np.percentile(values, [2.0, 99.8])
    axis.imshow(
        values.T,
        origin="lower",
        aspect="auto",
        extent=(0.0, spectrogram.seconds, -0.5, mels - 0.5),
        cmap="magma",
        vmin=low,
        vmax=max(high, low + 1e-3),
        interpolation="antialiased",
    )
    upper_edge = settings.high_hz if settings.high_hz > 0 else settings.rate / 2 + settings.high_hz
    lowest, highest = _mel(settings.low_hz), _mel(upper_edge)
    ticks: dict[float, str] = {}
    for hz in _HZ:
        row = (_mel(hz) - lowest) / (highest - lowest) * (mels + 1) - 1.0  # bin i is centred at its (i + 1)th part
        if -0.5 <= row <= mels + 0.5 and (not ticks or (row - max(ticks)) / mels > 0.07):
            ticks[min(row, mels - 0.5)] = f"{hz // 1000}k" if hz >= 1000 else str(hz)
    axis.set_yticks(list(ticks), list(ticks.values()))
    axis.set_ylabel("Hz", fontsize=9, color=_INK)
    axis.tick_params(labelsize=8.5, colors=_INK, length=3)
    axis.spines[:].set_visible(False)


def _tracks(
    axis: Axes, names: Sequence[str], scores: Sequence[Array], starts: Array, ends: Array, families: Sequence[str]
) -> None:
    # Windows may overlap: each is drawn over the time that is nearer to it than to its neighbours.
    edges = np.concatenate([starts[:1], (ends[:-1] + starts[1:]) / 2, ends[-1:]])
    for row, values in enumerate(scores):
        base = len(scores) - 1 - row
        axis.axhspan(base + 0.08, base + 0.92, color=_GROUND, linewidth=0)
        heights, bounds = _thin(np.clip(values, 0.0, 1.0), edges)
        axis.stairs(base + 0.08 + 0.84 * heights, bounds, baseline=base + 0.08, fill=True, color=_SCORE, linewidth=0)
        _beside(axis, f"{float(values.max()):.2f}", base + 0.5, 9)
    _beside(axis, "highest", len(scores) + 0.22, 7.5)
    axis.set_ylim(0, len(scores))
    middles = [len(scores) - 1 - row + 0.5 for row in range(len(scores))]
    axis.set_yticks(middles, names, fontfamily=list(families), fontsize=9.5, parse_math=False)
    axis.tick_params(colors=_INK, length=0, labelsize=9.5)
    axis.spines[:].set_visible(False)


def _beside(axis: Axes, text: str, y: float, size: float) -> None:
    at = ("axes fraction", "data")
    shift = {"xytext": (6, 0), "textcoords": "offset points"}
    axis.annotate(text, (1.0, y), xycoords=at, va="center", fontsize=size, color=_INK, **shift)  # type: ignore[arg-type]


def _thin(values: Array, edges: NDArray[np.float64]) -> tuple[Array, NDArray[np.float64]]:
    """At most COLUMNS steps, each the maximum of its windows."""
    if len(values) <= COLUMNS:
        return values, edges
    firsts = np.linspace(0, len(values), COLUMNS, endpoint=False).astype(int)
    return np.maximum.reduceat(values, firsts), np.append(edges[firsts], edges[-1])


def _time_axis(axis: Axes, seconds: float) -> None:
    step = next((step for step in _STEPS if seconds / step <= 12), _STEPS[-1])
    axis.xaxis.set_major_locator(FixedLocator(np.arange(0.0, seconds + 1e-9, step).tolist()))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: clock(value, step)))
    axis.set_xlim(0.0, seconds)
    axis.set_xlabel("s" if seconds < 60 else "min:s" if seconds < 3600 else "h:min:s", fontsize=9, color=_INK)
    axis.tick_params(axis="x", labelsize=8.5, colors=_INK, length=3)


def _mel(hz: float) -> float:
    return 1127.0 * math.log(1.0 + hz / 700.0)  # as in the front end's bank


def _one_line(text: str, cells: int, middle: bool = False) -> str:
    return fit(" ".join("".join(c if c.isprintable() else " " for c in text).split()), cells, middle)


def _characters(path: str) -> set[int]:
    return set(FT2Font(path).get_charmap())
