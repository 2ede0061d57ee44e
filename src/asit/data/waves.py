"""Waveforms of a catalogue's clips at the front end's rate, read in part or kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.catalogue import Clip
from asit.data.order import MATERIAL, Key
from asit.errors import AudioError, CatalogueError
from asit.settings import FrontEndSettings

T = TypeVar("T")
_TRIES = 8


class Waves:
    """Reads clips; after `keep`, each clip at most once in this process."""

    def __init__(self, settings: FrontEndSettings) -> None:
        self.settings = settings
        self._kept: dict[tuple[str, float, float], npt.NDArray[np.float32]] | None = None

    def keep(self) -> None:
        """From now on keep each clip in memory, decoded, once it has been read; each loader process its own."""
        self._kept = {}

    def read(self, clip: Clip, start: float, seconds: float) -> npt.NDArray[np.float32]:
        """Part of a clip: (samples,) from `start` seconds after the clip's own beginning.

        Raises:
            AudioError: the file cannot be read.
        """
        if self._kept is None:
            return self._read(clip, start, seconds)
        key = (clip.path, clip.start, clip.seconds)
        if key not in self._kept:
            # Always the whole clip, so that what a part holds does not depend on what was read before; and a little
            # more, for the catalogue's lengths are single precision.
            self._kept[key] = self._read(clip, 0.0, clip.seconds + 0.02)
        first = round(start * self.settings.rate)
        return self._kept[key][first : first + round(seconds * self.settings.rate)]

    def _read(self, clip: Clip, start: float, seconds: float) -> npt.NDArray[np.float32]:
        settings = self.settings
        return files.read(
            clip.path, rate=settings.rate, start=clip.start + start, seconds=seconds, resampler=settings.resampler
        )


def readable(make: Callable[[np.random.Generator, int], T], seed: int, key: Key, count: int) -> tuple[T, list[str]]:
    """What `make` gives for the key's sample, or for another one drawn in its place where that cannot be read.

    Args:
        make: (generator, index) to the sample's material.
        seed: of the draws.
        key: (epoch, index, ...).
        count: samples there are.

    Returns:
        The material, and what failed before it.

    Raises:
        CatalogueError: eight in a row cannot be read.
    """
    failures: list[str] = []
    for attempt in range(_TRIES):
        rng = np.random.default_rng([seed, MATERIAL, *key, attempt])
        index = key[1] if attempt == 0 else int(rng.integers(count))
        try:
            return make(rng, index), failures
        except AudioError as error:
            failures.append(error.found)
    raise CatalogueError(
        "eight clips in a row could not be read: " + "; ".join(failures),
        "the recordings that the catalogue lists",
        "see whether the storage is still there; make the catalogue anew if the files changed",
    )
