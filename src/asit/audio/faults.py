"""Faults of recordings, and the bounds of rate, channels, length and range that each is checked against."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from asit.errors import AudioError

_FileFault = Literal["missing", "unreadable", "empty", "truncated", "non-finite", "out of range", "cancelled", "silent"]
Reason = _FileFault | Literal["too short", "outside the file"]  # of a clip
Wave = NDArray[np.float32]

RATES = (1_000, 10_000_000)
"""Lowest and highest sample rate, Hz; below, resampling would make very much of very little."""
CHANNELS = 256
"""Most channels."""
RECORDINGS = 256
"""Most recordings concatenated in one file; each needs a decoder."""
LONGEST = 7 * 24 * 3600
"""Longest recording, s."""
SHORT, THINNEST = 600, 10
"""A recording of more than 600 s has at least 10 bytes a second; silence in FLAC has 28 at 8 kHz."""
LOUDEST = 16.0
"""Largest magnitude of a sample, 24 dB above full scale; above, it is in another unit, such as int16 values."""
SILENCE = 2 / 32768
"""A range of two steps of 16-bit audio: dither at most."""
_JUDGED = 100  # samples needed for a verdict: the mean of very few is easily constant
_CANCELLED = 1e-3  # of the range of the loudest channel, -60 dB: the remainder of channels that cancel


class AudioFileError(AudioError):
    """An `AudioError` about a file, with the kind of fault (`reason`) for statistics."""

    def __init__(self, reason: Reason, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(found, expected, remedy)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type[Any], tuple[str, ...]]:  # type: ignore[override]
        return type(self), (self.reason, self.found, self.expected, self.remedy)


class Levels:
    """Tracks the ranges of the channels of a recording and of their mean while it is read."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0  # of the mean
        self.count = 0
        self.separate = False
        """Whether `mix` returns the channels themselves, (n, C)."""
        self._lows: NDArray[np.float64] | None = None
        self._highs = np.zeros(0)

    def mix(self, block: NDArray[Any]) -> Wave:
        """Mix channels (C, n) to their mean (n,).

        Raises:
            AudioFileError: samples that are not finite, or out of range.
        """
        # Channel by channel is several times as fast as over interleaved samples.
        lows = np.array([channel.min() for channel in block], np.float64)
        highs = np.array([channel.max() for channel in block], np.float64)
        low, high = float(lows.min()), float(highs.max())  # NaN if any sample is
        if not (low >= -LOUDEST and high <= LOUDEST):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise not_finite(self.name)
            peak = max(-low, high)
            int16 = ", as int16 values are" if peak <= 32768 else ""
            found = f"{self.name} holds samples up to {peak:.6g}, far outside [-1, 1]{int16}"
            fix = "divide by the largest value of their type: 32768 for int16" if int16 else "scale them"
            raise AudioFileError("out of range", found, f"samples in [-1, 1], and never beyond {LOUDEST:g}", fix)
        if self.separate:
            return np.ascontiguousarray(block.T, np.float32)
        mono = _mean(block)
        self.count += len(mono)
        least, most = (low, high) if len(block) == 1 else (float(mono.min()), float(mono.max()))
        if self._lows is None or len(self._lows) != len(lows):
            self._lows, self._highs, self.low, self.high = lows, highs, least, most
        else:
            self._lows, self._highs = np.minimum(self._lows, lows), np.maximum(self._highs, highs)
            self.low, self.high = min(self.low, least), max(self.high, most)
        return mono

    @property
    def cancelled(self) -> AudioFileError | None:
        """The error about channels that are not silent but nearly vanish in their mean; None if they do not."""
        if self._lows is None or len(self._lows) < 2 or self.count < _JUDGED:
            return None
        loudest = float((self._highs - self._lows).max())
        if loudest <= 4 * SILENCE or self.high - self.low > max(SILENCE, _CANCELLED * loudest):
            return None
        return AudioFileError(
            "cancelled",
            f"{self.name}: its {len(self._lows)} channels cancel each other: the loudest has a range of {loudest:.2g}, "
            f"their mean one of {float(self.high - self.low):.2g}",
            "channels that do not cancel each other",
            "keep one channel (sox IN OUT remix 1), or invert one",
        )


def _mean(block: NDArray[Any]) -> Wave:
    if len(block) == 1:
        return np.asarray(block[0], np.float32)
    total = np.add(block[0], block[1], dtype=np.float32)
    for channel in block[2:]:
        total += channel
    total *= np.float32(1 / len(block))
    return total


def check_bounds(name: str, rate: int, channels: int, seconds: float | None) -> None:
    """Raise an AudioFileError for a rate (Hz), number of channels or length out of bounds; seconds None: unknown."""
    damaged = "pass the right rate with an array; if a file's header is damaged, fetch it again"
    if not RATES[0] <= rate <= RATES[1]:
        found = f"{name} has a sample rate of {rate} Hz"
        raise AudioFileError("unreadable", found, f"{RATES[0]} to {RATES[1]} Hz", damaged)
    if not 1 <= channels <= CHANNELS:
        raise AudioFileError("unreadable", f"{name} has {channels} channels", f"1 to {CHANNELS} channels", damaged)
    if seconds is not None:
        check_length(name, seconds, None)


def check_length(name: str, seconds: float, size: int | None) -> None:
    """Raise an AudioFileError for a length out of bounds, or impossible in `size` bytes (None: unknown).

    A FLAC of 14 bytes may claim a minute.
    """
    if seconds > LONGEST:
        problem = f"{name} is {seconds / 3600:.1f} hours long"
        fix = "split it into several recordings; or fetch it again if its header is damaged"
        raise AudioFileError("unreadable", problem, f"at most {LONGEST // 3600} hours", fix)
    if size is not None and seconds > SHORT and size < THINNEST * seconds:
        found = f"{name} claims {seconds / 3600:.1f} hours in {size} bytes"
        expected = f"{THINNEST} bytes or more per second"
        raise AudioFileError("unreadable", found, expected, "leave it out: it is constant, or its header is damaged")


def empty(name: str) -> AudioFileError:
    """Make the error about a file without samples; `name` is `AudioDecoder.name`, here and below."""
    return AudioFileError("empty", f"{name} has no samples", "at least one", "fetch it again, or leave it out")


def truncated(name: str, held: int, promised: int, rate: int) -> AudioFileError:
    """Make the error about a file with fewer samples than its header promises; `rate` in Hz."""
    found = f"{name} is truncated: {held} samples ({held / rate:.3f} s)"
    expected = f"the {promised} samples ({promised / rate:.3f} s) that its header promises"
    return AudioFileError("truncated", found, expected, "fetch it again, or leave it out")


def cut_off(name: str, where: str) -> AudioFileError:
    """Make the error about a file that ends within a part of it, `where`."""
    fix = "fetch it again, or leave it out"
    return AudioFileError("truncated", f"{name} ends within {where}", "a complete file", fix)


def joined(name: str, what: str) -> AudioFileError:
    """Make the error about a file of several recordings that cannot be read as one."""
    found = f"{name} is several recordings in one file: {what}"
    expected = "one recording, or several of one format, rate and number of channels in MP3 or Ogg"
    return AudioFileError("unreadable", found, expected, "split the file, for example with ffmpeg")


def not_finite(name: str) -> AudioFileError:
    """Make the error about a file with NaN or infinity in it."""
    found = f"{name} holds samples that are NaN or infinite"
    return AudioFileError("non-finite", found, "finite samples", "convert it again, or leave it out")


def silent(name: str, low: float, high: float) -> AudioFileError | None:
    """Make the error about a signal that spans at most two steps of 16-bit audio; a constant offset is silence."""
    if high - low > SILENCE:
        return None
    found = f"{name} is silent: all its samples are between {low:.2g} and {high:.2g}"
    return AudioFileError("silent", found, "a range above two steps of 16-bit audio", "leave it out")
