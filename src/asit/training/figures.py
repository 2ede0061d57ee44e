"""The figures of a pretraining run: clean, corrupted, reconstructed and mask, side by side.

Letters: n examples, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from asit.config import FrontEndSettings
from asit.io import atomic

COLUMNS = 5
"""Examples drawn; the npz file holds all of them."""
_TITLE = 36  # characters of a name


def write_figure(
    folder: Path,
    step: int,
    clean: ArrayLike,
    corrupted: ArrayLike,
    reconstructed: ArrayLike,
    mask: ArrayLike,
    ids: Sequence[object],
    front_end: FrontEndSettings,
) -> Path:
    """Write `step-<step, 8 digits>.png` and `.npz` into a folder, each atomically.

    Args:
        folder: output folder; made if missing.
        step: optimiser steps done.
        clean, corrupted, reconstructed: normalised log-mels (n, T, F), n at least 1. Values that are not finite are
            left blank, since a figure must not end a run.
        mask: (n, T, F), true where the student's input was corrupted.
        ids: n names of the examples, drawn above the columns.
        front_end: sample rate and hop, for the axes.

    Returns:
        The PNG's path. The npz file holds clean, corrupted and reconstructed as float16, mask as bool, and ids as
        strings.
    """
    values = {
        "clean": np.asarray(clean, np.float32),
        "corrupted": np.asarray(corrupted, np.float32),
        "reconstructed": np.asarray(reconstructed, np.float32),
    }
    masked = np.asarray(mask, bool)
    figure = _draw(step, values, masked, [str(i) for i in ids], front_end)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"step-{step:08d}"
    arrays: dict[str, Any] = {name: np.clip(x, -65504, 65504).astype(np.float16) for name, x in values.items()}
    arrays |= {"mask": masked, "ids": np.array([str(i) for i in ids])}
    with atomic.write_file(folder / f"{stem}.npz") as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)
    path = folder / f"{stem}.png"
    with atomic.write_file(path) as draft:
        figure.savefig(draft, format="png", dpi=100)
    return path


def _draw(step: int, values: dict[str, Any], mask: Any, ids: list[str], front_end: FrontEndSettings) -> Figure:
    columns = min(COLUMNS, len(mask))
    _, frames, mels = mask.shape
    seconds = frames * front_end.shift_ms / 1000
    figure = Figure(figsize=(0.9 + 2.9 * columns, 7.2), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot there is no global state and no display
    axes = figure.subplots(4, columns, sharex=True, sharey=True, squeeze=False)
    for column in range(columns):
        finite = values["clean"][column][np.isfinite(values["clean"][column])]
        low, high = np.quantile(finite, [0.01, 0.995]) if finite.size else (-1.0, 1.0)
        for row, name in enumerate([*values, "mask"]):
            axis = axes[row, column]
            picture = mask[column] if name == "mask" else values[name][column]
            colours, *limits = ("gray", 0, 1) if name == "mask" else ("magma", low, high)
            axis.imshow(
                picture.T,
                origin="lower",
                aspect="auto",
                extent=(0, seconds, 0, mels),
                cmap=colours,
                vmin=limits[0],
                vmax=limits[1],
            )
            if column == 0:
                axis.set_ylabel(f"{name}\nmel bin (to {front_end.rate / 2000:g} kHz)", fontsize=8)
            axis.tick_params(labelsize=7)
        name = ids[column] if len(ids[column]) <= _TITLE else "…" + ids[column][1 - _TITLE :]
        axes[0, column].set_title(name, fontsize=8, parse_math=False)
        share = mask[column].mean()
        axes[3, column].set_xlabel(f"time (s); {share:.0%} masked", fontsize=8)
    figure.suptitle(f"step {step:,}", fontsize=10)
    return figure
