"""Waveforms of a catalogue's clips at the front end's rate, read in part or kept in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.catalogue import Clip
from asit.settings import FrontEndSettings


class Waves:
    """Reads clips; after `keep`, each file at most once in this process."""

    def __init__(self, settings: FrontEndSettings) -> None:
        self.settings = settings
        self._kept: dict[str, npt.NDArray[np.float32]] | None = None

    def keep(self) -> None:
        """From now on keep each recording in memory, decoded, once it has been read; each loader process its own."""
        self._kept = {}

    def read(self, clip: Clip, start: float, seconds: float) -> npt.NDArray[np.float32]:
        """Part of a clip: (samples,) from `start` seconds after the clip's own beginning.

        Raises:
            AudioError: the file cannot be read.
        """
        settings, at = self.settings, clip.start + start
        if self._kept is None:
            return files.read(clip.path, rate=settings.rate, start=at, seconds=seconds, resampler=settings.resampler)
        if clip.path not in self._kept:
            # Always the whole, so that what a part holds does not depend on what was read before.
            self._kept[clip.path] = files.read(clip.path, rate=settings.rate, resampler=settings.resampler)
        first = round(at * settings.rate)
        return self._kept[clip.path][first : first + round(seconds * settings.rate)]
