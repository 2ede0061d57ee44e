"""Compare the outputs of an int8 and a float32 graph.

Letters: B rows, S samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""A graph as a function of waveforms (B, S) at the model's rate."""
Measure = Callable[[Run, Run], dict[str, Any]]
"""Measure the loss, given the float32 and the int8 graph; see `OutputAgreement.facts`."""


class OutputAgreement:
    """Agreement of two graphs' outputs: of classes (C,) if `classes`, else of vectors (D,) or a vector per frame."""

    def __init__(self, classes: bool) -> None:
        self.classes = classes
        self._cosines: list[float] = []
        self._same: list[bool] = []
        self._largest = 0.0

    def add(self, exact: npt.NDArray[np.float32], coarse: npt.NDArray[np.float32]) -> None:
        """Add the two outputs (..., D) of one input."""
        a, b = exact.astype(np.float64), coarse.astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = float(((a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())
        # NaN, or zeros instead of values, count as opposite.
        self._cosines.append(cosine if np.isfinite(cosine) else -1.0)
        self._largest = max(self._largest, float(np.abs(a - b).max()))
        if self.classes:
            self._same.append(bool(a.argmax() == b.argmax()))

    def facts(self, of: str) -> dict[str, Any]:
        """Return the result as JSON; `of` describes the inputs."""
        facts: dict[str, Any] = {
            "of": of,
            "sounds": len(self._cosines),
            "cosine": float(np.mean(self._cosines)),
            "smallest_cosine": float(np.min(self._cosines)),
            "largest_difference": self._largest,
        }
        if self.classes:
            facts["same_top_class"] = float(np.mean(self._same))
        return facts
