"""Where the windows of a long recording lie: one rule for scoring catalogues and for sounds as they come in.

A window follows its neighbour after a hop; the last one is moved back to end with the recording. A rest that is
shorter than the slack is no reason for another window. All lengths are of one unit, seconds or samples.

Letters: N recordings.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def window_counts(lengths: npt.NDArray[np.float64], window: float, hop: float, slack: float) -> npt.NDArray[np.int64]:
    """How many windows recordings of these lengths (N,) have: (N,), at least one each.

    Args:
        lengths: of the recordings.
        window: length of a window.
        hop: from the beginning of a window to that of the next.
        slack: how much sound may be left over.
    """
    return 1 + np.maximum(0, np.ceil((lengths - window - slack) / hop)).astype(np.int64)


def window_start(index: int, count: int, length: float, window: float, hop: float) -> float:
    """Where window `index` of `count` begins in a recording of this length."""
    return max(0.0, length - window) if index == count - 1 else index * hop
