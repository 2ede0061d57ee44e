"""Draw a map of an index: its rows on two principal components, and groups of rows that sound alike.

Letters: N rows, M rows of the map, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.cluster.vq import kmeans2

if TYPE_CHECKING:
    from asit.search import Index

ROWS = 2000
"""Most rows of a map; of more, evenly spaced ones are shown."""
_GROUPS, _COMPONENTS, _SEED = 8, 16, 0


def index_map(index: Index, check: Callable[[], None]) -> dict[str, Any]:
    """Return the rows of an index as points of a plane.

    The plane is that of the two principal components of the rows' unit vectors with the largest variance; groups are
    those of k-means (at most 8, k-means++, seed 0) on the 16 largest components.

    Args:
        index: what is drawn.
        check: called between the steps; may raise.

    Returns:
        JSON: `points`, each with `number`, `name`, `start`, `end`, `label`, `x` and `y` from -1 to 1, and `group`;
        `groups`, their number; `explained`, the share of the variance that the plane shows; `total`, rows of the index.
    """
    chosen = np.unique(np.linspace(0, len(index) - 1, min(ROWS, len(index))).round().astype(np.int64))
    vectors = index.vectors[chosen].astype(np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    check()
    vectors -= vectors.mean(0)
    left, lengths, _ = np.linalg.svd(vectors, full_matrices=False)
    components = left * lengths  # (M, min(M, D))
    components *= np.where(np.abs(components).max(0) > components.max(0), -1.0, 1.0)  # signs are arbitrary
    check()
    groups = min(_GROUPS, max(1, len(chosen) // 4))
    if groups > 1:
        with np.errstate(all="ignore"):
            _, member = kmeans2(components[:, :_COMPONENTS], groups, minit="++", seed=_SEED)
    else:
        member = np.zeros(len(chosen), np.int64)
    plane = np.zeros((len(chosen), 2))
    plane[:, : components.shape[1]] = components[:, :2]
    plane /= max(float(np.abs(plane).max(initial=0.0)), 1e-12)
    total = float((lengths**2).sum())
    points = []
    for row, (x, y), group in zip(chosen.tolist(), plane.tolist(), member.tolist(), strict=True):
        clip = index.clip(row)
        points.append(
            {
                "number": row,
                "name": clip.name,
                "start": round(clip.start, 3),
                "end": round(clip.end, 3),
                "label": clip.label,
                "x": round(x, 4),
                "y": round(y, 4),
                "group": group,
            }
        )
    explained = float((lengths[:2] ** 2).sum()) / total if total else 0.0
    return {"points": points, "groups": groups, "explained": round(explained, 4), "total": len(index)}
