"""How recordings become rows: short ones whole, long ones in windows, and a vector for each.

Letters: n samples, D width of a row's vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import get_args

import numpy as np
import numpy.typing as npt

from asit.errors import AudioError, ConfigError
from asit.model.audio_model import AudioModel, Embedding
from asit.model.inference.overlap import ClipPooling

Wave = npt.NDArray[np.float32]
POOLINGS: tuple[ClipPooling, ...] = get_args(ClipPooling)
Piece = tuple[float, float, Wave]
"""Start and end in s from the beginning of the sound, and the samples."""

WHOLE = 1.5
"""A recording up to this many times as long as the window is one row."""


def view_seconds(model: AudioModel) -> float:
    """Length of the training view, the window unless another is asked for."""
    return model.frames * model.front_end.shift / model.rate


def check_windows(window: float, hop: float) -> None:
    """Refuse windows that leave gaps, or have no length.

    Raises:
        ConfigError: says which number does not fit.
    """
    if not 0 < window < float("inf"):
        raise ConfigError(f"a window of {window:g} s", "more than 0", "leave --window out for the training length")
    if not 0 < hop <= window:
        raise ConfigError(
            f"a hop of {hop:g} s between windows of {window:g} s",
            "more than 0, and at most the window, so that nothing is left out",
            "leave --hop out for windows end to end",
        )


def cut(blocks: Iterable[Wave], rate: int, window: float, hop: float) -> Iterator[Piece]:
    """A sound to its pieces, holding little more than a window and a block of it.

    A sound up to `WHOLE` windows long is one piece; a longer one is cut into windows at each hop, the last moved back
    to end with the sound.

    Args:
        blocks: the sound's samples (n,), in order.
        rate: in Hz.
        window, hop: in s.
    """
    size, step, most = max(1, round(window * rate)), max(1, round(hop * rate)), round(WHOLE * window * rate)
    held, first, following = np.empty(0, np.float32), 0, 0  # `first`: place of held[0]; `following`: of the next window
    for block in blocks:
        held = np.concatenate([held, block])
        end = first + len(held)
        if end <= most:
            continue
        while following + size <= end:
            yield following / rate, (following + size) / rate, held[following - first : following - first + size]
            following += step
        keep = min(following, end - size)
        held, first = held[keep - first :], keep
    end = first + len(held)
    if not following:
        yield 0.0, end / rate, held
    elif following - step + size < end:
        yield (end - size) / rate, end / rate, held[end - size - first :]


def vector(embedding: Embedding, pooling: ClipPooling) -> npt.NDArray[np.float32]:
    """The vector (D,) of a sound, of length 1.

    Raises:
        AudioError: the model's answer is not finite, or all zero.
    """
    whole = embedding.pooled(pooling).double()
    length = float(whole.norm())
    if not 0 < length < float("inf"):
        raise AudioError("the model's vector is not finite", "numbers", "leave this recording out, or check the model")
    return (whole / length).float().numpy()
