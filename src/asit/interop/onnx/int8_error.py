"""What an int8 graph loses against the float32 one, where no labels tell.

Letters: B rows, S samples, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Run = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""A graph as a function: waves (B, S) at the model's rate to its output."""
Measure = Callable[[Run, Run], dict[str, Any]]
"""Given the float32 and the int8 graph, the facts of the loss; with "sounds" and "cosine" of `Likeness.facts`."""


class OutputAgreement:
    """Collects what two graphs give for the same sounds.

    Args:
        classes: whether outputs are (C,) values of classes; else vectors (D,) or a vector for each frame.
    """

    def __init__(self, classes: bool) -> None:
        self.classes = classes
        self._cosines: list[float] = []
        self._same: list[bool] = []
        self._largest = 0.0

    def add(self, exact: npt.NDArray[np.float32], coarse: npt.NDArray[np.float32]) -> None:
        """One sound's outputs, of equal shapes: a vector, or vectors of frames, windows or both, (..., D)."""
        a, b = exact.astype(np.float64), coarse.astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = float(((a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())
        # What is not a number, or nothing but zeros where there was something, is no likeness at all.
        self._cosines.append(cosine if np.isfinite(cosine) else -1.0)
        self._largest = max(self._largest, float(np.abs(a - b).max()))
        if self.classes:
            self._same.append(bool(a.argmax() == b.argmax()))

    def facts(self, of: str) -> dict[str, Any]:
        """The loss as JSON: how many sounds, mean and smallest cosine, largest difference, agreement of the top class.

        Args:
            of: what the sounds are, in words.
        """
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
