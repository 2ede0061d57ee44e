"""Windows of a long recording: one rule for scoring catalogues and for streams.

A window follows its neighbour after a hop; the last one is moved back to end with the recording. A rest shorter than
the slack gets no window. All lengths have one unit, seconds or samples.

Letters: N recordings, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from asit.audio.faults import Wave


def window_counts(lengths: npt.NDArray[np.float64], window: float, hop: float, slack: float) -> npt.NDArray[np.int64]:
    """Count the windows of recordings of these lengths (N,): (N,), at least one each.

    Args:
        lengths: of the recordings.
        window: length of a window.
        hop: from the start of a window to that of the next.
        slack: longest rest without a window.
    """
    return 1 + np.maximum(0, np.ceil((lengths - window - slack) / hop)).astype(np.int64)


def window_start(index: int, count: int, length: float, window: float, hop: float) -> float:
    """Return the start of window `index` of `count` in a recording of this length."""
    return max(0.0, length - window) if index == count - 1 else index * hop


def cut(blocks: Iterator[Wave], window: int, hop: float, slack: float) -> Iterator[tuple[Wave, int]]:
    """Yield the samples (S,) of each window of a sound, and the sample that it begins at; holds little more than one.

    Args:
        blocks: the sound.
        window, hop, slack: as for `window_counts`, in samples.
    """
    held, begin, end, index, over = np.zeros(0, np.float32), 0, 0, 0, False
    while True:
        first = round(index * hop)
        # So far ahead that it is known whether another window follows. Joined once: joining each block would copy
        # what is held every time.
        need, parts = first + window + 1 + math.ceil(slack), [held]
        while not over and end < need:
            block = next(blocks, None)
            over = block is None
            if block is not None:
                parts.append(block)
                end += len(block)
        held = np.concatenate(parts) if len(parts) > 1 else held
        count = int(window_counts(np.array([end], np.float64), window, hop, slack)[0])
        last = over and index + 1 >= count
        if last:
            first = round(window_start(index, count, end, window, hop))
        yield held[first - begin : first - begin + window].copy(), first
        if last:
            return
        # The last window may be moved back, but not before this one.
        held, begin = held[first - begin :], first
        index += 1
