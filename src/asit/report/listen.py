"""Clips that a model gets wrong, to listen to: read from the recordings and put into the page."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.waveforms import read_clip
from asit.errors import AsitError
from asit.io import storage
from asit.report.audio_player import AUDIO_SECONDS, player

RATE = 16000
"""Samples a second of the sounds; enough to hear what is said, and what most models here hear."""
MOST_BYTES = 4_000_000
"""All sounds of a page together; what comes after that is named without sound."""


class Recordings:
    """The clips of a run, found by name and read when asked for.

    Args:
        folder: the run's; its catalogue says where the recordings lie.
    """

    def __init__(self, folder: Path) -> None:
        self.bytes = 0
        self.trouble = ""
        self._clips: dict[str, Clip] = {}
        self._place = folder / "catalogue.jsonl"

    def find(self, names: Iterable[str]) -> None:
        """Look clips up in the catalogue in one go; names are its ids."""
        wanted = set(names)
        try:
            catalogue = Catalogue.read(self._place, look=False)
        except AsitError as error:
            self.trouble = error.found
            return
        self._clips = {name: catalogue[row] for row, name in enumerate(catalogue.ids()) if name in wanted}

    def player(self, name: str) -> str:
        """A player for a clip that was looked up, or a sentence that says why there is none."""
        clip = self._clips.get(name)
        return _missing(self.trouble or f"{name} is not in the run's catalogue") if clip is None else self.play(clip)

    def play(self, clip: Clip) -> str:
        """A player for a clip, at most AUDIO_SECONDS of it, or a sentence that says why there is none."""
        place = clip.shard or clip.path
        if not storage.is_url(place) and not Path(place).is_file():
            return _missing(f"{clip.path} is not there")
        if self.bytes >= MOST_BYTES:
            return _missing(f"left out: the page holds {MOST_BYTES / 1e6:.0f} MB of sound already")
        try:
            wave = read_clip(clip, RATE, seconds=min(AUDIO_SECONDS, clip.seconds))
        except AsitError as error:
            return _missing(error.found)
        made = player(wave, RATE, os.path.basename(clip.path))  # noqa: PTH119
        self.bytes += len(made)
        cut = f"<small>the first {AUDIO_SECONDS:g} s</small>" if clip.seconds > AUDIO_SECONDS else ""
        return made + cut


def _missing(reason: str) -> str:
    return f'<span class="missing">No sound: {escape(reason)}</span>'
