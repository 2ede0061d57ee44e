"""Windows of a long recording: one rule for scoring catalogues and for streams.

A window follows its neighbour after a hop; the last one is moved back to end with the recording. A rest shorter than
the slack gets no window. All lengths have one unit, seconds or samples.

Letters: N recordings.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
