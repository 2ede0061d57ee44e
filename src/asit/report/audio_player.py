"""Embed recordings in a page, encoded small, so that the page needs no other file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import soundfile
from markupsafe import Markup
from numpy.typing import NDArray

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.waveforms import read_clip
from asit.errors import AsitError
from asit.io import storage
from asit.report.templates import part

AUDIO_SECONDS = 10.0
"""Longest audio of a player."""
RATE = 16000
"""Samples per second of recordings in a page."""
MOST_BYTES = 4_000_000
"""All recordings of a page together; further ones are named without audio."""
_MP3_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}


def player(waveform: NDArray[np.float32], rate: int, label: str) -> Markup:
    """Return an <audio> element: MP3 where the rate allows it, since every browser plays it; else FLAC.

    Args:
        waveform: (S,) float32.
        rate: samples per second.
        label: for screen readers.
    """
    mp3 = rate in _MP3_RATES and "MP3" in soundfile.available_formats()
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="MP3" if mp3 else "FLAC", compression_level=0.9)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return part("player", f"data:audio/{'mpeg' if mp3 else 'flac'};base64,{encoded}", label)


class Recordings:
    """The clips of a run, found by id and read on demand.

    Args:
        folder: the run's; its catalogue has the paths of the recordings.
    """

    def __init__(self, folder: Path) -> None:
        self._catalogue, self._bytes, self._problem = folder / "catalogue.jsonl", 0, ""
        self._clips: dict[str, Clip] = {}

    def find(self, ids: Iterable[str]) -> None:
        """Look up clips in the catalogue, all in one pass."""
        wanted = set(ids)
        try:
            catalogue = Catalogue.read(self._catalogue, look=False)
        except AsitError as error:
            self._problem = error.found
            return
        self._clips = {name: catalogue[row] for row, name in enumerate(catalogue.ids()) if name in wanted}

    def player(self, clip: Clip | str) -> Markup:
        """Return a player for a clip or the id of one that was looked up, or the reason why there is none."""
        if isinstance(clip, str):
            if clip not in self._clips:
                return part("no_sound", self._problem or f"{clip} is not in the run's catalogue")
            clip = self._clips[clip]
        location = clip.shard or clip.path
        if not storage.is_url(location) and not Path(location).is_file():
            return part("no_sound", f"{clip.path} is not there")
        if self._bytes >= MOST_BYTES:
            return part("no_sound", f"left out: the page holds {MOST_BYTES / 1e6:.0f} MB of sound already")
        try:
            waveform = read_clip(clip, RATE, seconds=min(AUDIO_SECONDS, clip.seconds))
        except AsitError as error:
            return part("no_sound", error.found)
        made = player(waveform, RATE, os.path.basename(clip.path))  # noqa: PTH119
        self._bytes += len(made)
        return made + (part("first_seconds", AUDIO_SECONDS) if clip.seconds > AUDIO_SECONDS else "")
