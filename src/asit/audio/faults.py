"""What can be wrong with a recording, and the bounds that every one is held to before anything is computed of it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from asit.errors import AudioError

Reason = Literal["missing", "unreadable", "empty", "truncated", "non-finite", "out of range", "cancelled", "silent"]
Wave = NDArray[np.float32]

RATES = (1_000, 10_000_000)
"""Lowest and highest sample rate, Hz: below it there is no sound to hear, and resampling makes much of very little."""
CHANNELS = 256
"""Most channels."""
RECORDINGS = 256
"""Most recordings joined in one file, each of which has a decoder of its own."""
LONGEST = 7 * 24 * 3600
"""Longest recording, s."""
SHORT, THINNEST = 600, 10
"""A recording of more seconds than the first has at least so many bytes a second; silence in FLAC has 28 at 8 kHz."""
LOUDEST = 16.0
"""Largest magnitude of a sample, 24 dB above full scale: more is another unit, such as int16 values."""
SILENCE = 2 / 32768
"""A range of two steps of 16-bit sound: dither at most."""
_JUDGED = 100  # samples, of fewer of which nothing is said: the mean of two is easily constant
_CANCELLED = 1e-3  # of the range of the loudest channel, -60 dB: what is left of channels that cancel


class AudioFileError(AudioError):
    """An `AudioError` about a file, with the kind of fault for whoever counts them.

    Args:
        reason: kind of fault.
        found, expected, remedy: as in `AudioError`.
    """

    def __init__(self, reason: Reason, found: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(found, expected, remedy)
        self.reason: Reason = reason

    def __reduce__(self) -> tuple[type[Any], tuple[str, ...]]:  # type: ignore[override]
        return type(self), (self.reason, self.found, self.expected, self.remedy)


class Levels:
    """Ranges of the channels of a sound and of their mean, taken while it is read.

    Args:
        name: of the sound, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.low = self.high = 0.0  # of the mean
        self.count = 0
        self._lows: NDArray[np.float64] | None = None
        self._highs = np.zeros(0)

    def mix(self, block: NDArray[Any]) -> Wave:
        """Channels (C, n) to their mean (n,), channel by channel: several times as fast as over interleaved samples.

        Raises:
            AudioFileError: samples that are not finite, or out of range.
        """
        lows = np.array([channel.min() for channel in block], np.float64)
        highs = np.array([channel.max() for channel in block], np.float64)
        low, high = float(lows.min()), float(highs.max())  # NaN if any sample is
        if not (low >= -LOUDEST and high <= LOUDEST):
            if not (math.isfinite(low) and math.isfinite(high)):
                raise not_finite(self.name)
            raise out_of_range(self.name, max(-low, high))
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
        """The error about channels that all but vanish in their mean though they hold sound; None where they do not."""
        if self._lows is None or len(self._lows) < 2 or self.count < _JUDGED:
            return None
        loudest = float((self._highs - self._lows).max())
        if loudest <= 4 * SILENCE or self.high - self.low > max(SILENCE, _CANCELLED * loudest):
            return None
        return AudioFileError(
            "cancelled",
            f"{self.name}: its {len(self._lows)} channels cancel each other: the loudest has a range of {loudest:.2g}, "
            f"their mean one of {float(self.high - self.low):.2g}",
            "channels whose mean holds the sound",
            "keep one channel (sox IN OUT remix 1), or turn the sign of one",
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
    """Refuse what a header says and no recording has, before anything is decoded or resampled.

    Args:
        name: of the sound.
        rate: Hz.
        channels: of it.
        seconds: its length as the header says; None: it says none.

    Raises:
        AudioFileError: outside the bounds.
    """
    damaged = "pass the right rate with an array; a file's header is damaged if that is not so: fetch it again"
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioFileError(
            "unreadable",
            f"{name} has a sample rate of {rate} Hz",
            f"{RATES[0]} to {RATES[1]} Hz",
            damaged,
        )
    if not 1 <= channels <= CHANNELS:
        raise AudioFileError("unreadable", f"{name} has {channels} channels", f"1 to {CHANNELS} channels", damaged)
    if seconds is not None:
        check_length(name, seconds, None)


def check_length(name: str, seconds: float, size: int | None) -> None:
    """Refuse a length that no recording has, or none in so few bytes: a FLAC of 14 bytes may claim a minute.

    Args:
        name: of the sound.
        seconds: its length as the header says, or what has been decoded of it.
        size: bytes of the file; None: it has none.

    Raises:
        AudioFileError: outside the bounds.
    """
    if seconds > LONGEST:
        raise AudioFileError(
            "unreadable",
            f"{name} is {seconds / 3600:.1f} hours long",
            f"at most {LONGEST // 3600} hours",
            "cut it into several recordings; or fetch it again if its header is damaged",
        )
    if size is not None and seconds > SHORT and size < THINNEST * seconds:
        raise AudioFileError(
            "unreadable",
            f"{name} claims {seconds / 3600:.1f} hours in {size} bytes",
            f"{THINNEST} bytes or more for a second of sound",
            "leave it out: it holds nothing but one value, or its header is damaged",
        )


def empty(name: str) -> AudioFileError:
    """The error about a file without samples; `name` is `Source.name`, here and below."""
    return AudioFileError("empty", f"{name} has no samples", "at least one", "fetch it again, or leave it out")


def truncated(name: str, held: int, promised: int, rate: int) -> AudioFileError:
    """The error about a file that holds fewer samples than its header promises; `rate` in Hz."""
    return AudioFileError(
        "truncated",
        f"{name} is truncated: {held} samples ({held / rate:.3f} s)",
        f"the {promised} samples ({promised / rate:.3f} s) that its header promises",
        "fetch it again, or leave it out",
    )


def cut_off(name: str, where: str) -> AudioFileError:
    """The error about a file that ends within what it consists of; `where` says in what."""
    return AudioFileError(
        "truncated", f"{name} ends within {where}", "a complete file", "fetch it again, or leave it out"
    )


def joined(name: str, what: str) -> AudioFileError:
    """The error about a file that holds several recordings which cannot be read as one."""
    return AudioFileError(
        "unreadable",
        f"{name} is several recordings in one file: {what}",
        "one recording in a file, or several of one format, rate and number of channels in MP3 or Ogg",
        "take them apart, such as with ffmpeg",
    )


def not_finite(name: str) -> AudioFileError:
    """The error about a file with NaN or infinity in it."""
    found = f"{name} holds samples that are NaN or infinite"
    return AudioFileError("non-finite", found, "finite samples", "convert it again, or leave it out")


def out_of_range(name: str, peak: float) -> AudioFileError:
    """The error about samples that cannot be meant as parts of full scale."""
    whole = ", as int16 values are" if peak <= 32768 else ""
    return AudioFileError(
        "out of range",
        f"{name} holds samples up to {peak:.6g}, far outside [-1, 1]{whole}",
        f"samples in [-1, 1], and never beyond {LOUDEST:g}",
        "divide by the largest value of their unit: 32768 for int16" if whole else "scale them, or leave it out",
    )
