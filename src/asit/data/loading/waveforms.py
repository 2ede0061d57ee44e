"""Waveforms of a catalogue's clips at the front end's rate, read in part or kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.audio.files import Resampler, Wave
from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Clip
from asit.data.loading.sampler import MATERIAL, Key
from asit.data.shards import range_reader
from asit.data.shards.range_reader import ByteSpan
from asit.errors import AudioError, CatalogueError
from asit.io import storage

T = TypeVar("T")
_TRIES = 8


def read_clip(
    clip: Clip,
    rate: int,
    start: float = 0.0,
    seconds: float | None = None,
    resampler: Resampler = "soxr-hq",
    found: Mapping[ByteSpan, bytes] | None = None,
) -> Wave:
    """Read a clip, or a part of it, from its file or its shard: (samples,) at `rate` Hz.

    Args:
        clip: what to read.
        rate: Hz.
        start: s after the clip's own beginning.
        seconds: length, s; None: the clip's.
        resampler: resampling quality.
        found: bytes of members read before, from `range_reader.fetch`.

    Raises:
        AudioError: the recording cannot be read.
        StoreError: its shard is missing, or the store cannot be reached.
    """
    start, seconds = clip.start + start, clip.seconds if seconds is None else seconds
    span = range_reader.span_of(clip)
    if span is None:
        return files.read(clip.path, rate=rate, start=start, seconds=seconds, resampler=resampler)
    if span.size <= range_reader.AT_ONCE:
        held = (found or {}).get(span)
        data = storage.read_range(*span) if held is None else held
        return files.read(data, called=clip.path, rate=rate, start=start, seconds=seconds, resampler=resampler)
    with range_reader.open_span(span) as file:
        return files.read(file, called=clip.path, rate=rate, start=start, seconds=seconds, resampler=resampler)


class WaveformReader:
    """Reads the waveforms of clips; after `keep`, each clip at most once in this process."""

    def __init__(self, settings: FrontEndSettings) -> None:
        self.settings = settings
        self._kept: dict[tuple[str, float, float], npt.NDArray[np.float32]] | None = None
        self._found: Mapping[ByteSpan, bytes] = {}

    def fetch(self, clips: Iterable[Clip]) -> None:
        """Read the bytes of a batch's clips in shards, in few requests, for `read` to find; drops the batch before.

        Raises:
            StoreError: a shard is missing, or its store cannot be reached.
        """
        self._found = {}  # before the next are read: they need not be held at the same time
        new = (clip for clip in clips if self._kept is None or _span(clip) not in self._kept)
        self._found = range_reader.fetch(span for clip in new if (span := range_reader.span_of(clip)) is not None)

    def keep(self) -> None:
        """Keep each clip in memory, decoded, from its first read on; each loader process keeps its own."""
        self._kept = {}

    def read(self, clip: Clip, start: float, seconds: float) -> npt.NDArray[np.float32]:
        """Read part of a clip: (samples,) from `start` seconds after the clip's own beginning.

        Raises:
            AudioError: the recording cannot be read.
            StoreError: its shard is missing, or the store cannot be reached.
        """
        settings = self.settings
        if self._kept is None:
            return read_clip(clip, settings.rate, start, seconds, settings.resampler, self._found)
        key = _span(clip)
        if key not in self._kept:
            # The complete clip, so that a part does not depend on earlier reads; and a little more, because the
            # catalogue's lengths are single precision.
            length = clip.seconds + 0.02
            self._kept[key] = read_clip(clip, settings.rate, 0.0, length, settings.resampler, self._found)
        first = round(start * settings.rate)
        return self._kept[key][first : first + round(seconds * settings.rate)]


def _span(clip: Clip) -> tuple[str, float, float]:
    return clip.path, clip.start, clip.seconds


def readable(make: Callable[[np.random.Generator, int], T], seed: int, key: Key, count: int) -> tuple[T, list[str]]:
    """Return what `make` gives for the key's sample, or for a substitute drawn at random where it cannot be read.

    Args:
        make: (generator, index) to the sample's content.
        seed: of the draws.
        key: (epoch, index, ...).
        count: samples to draw a substitute from.

    Returns:
        The content, and the failures before it.

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
        "check that the storage is still mounted; rebuild the catalogue if the files changed",
    )
