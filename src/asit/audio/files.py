"""Recordings on disk to mono waveforms: what a file holds, its samples or a part of them, and what is wrong with it.

Letters in shapes: S samples.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from numbers import Real
from typing import BinaryIO, Literal

import numpy as np
import soxr

from asit.audio import decoders, faults, sniff
from asit.audio.decoders import AudioFileError, AudioInfo, Wave
from asit.audio.sniff import AudioBytes
from asit.errors import AudioError

__all__ = [
    "SUFFIXES",
    "AudioFileError",
    "AudioInfo",
    "Inspection",
    "Resampler",
    "Wave",
    "inspect",
    "probe",
    "read",
    "resample",
]

Resampler = Literal["soxr-hq", "soxr-vhq", "soxr-mq"]

SUFFIXES = decoders.SNDFILE_SUFFIXES | decoders.AV_SUFFIXES
"""Names that count as recordings, in lower case. Those of FFmpeg need the extra; without it, opening one says so."""

QUALITY = {"soxr-hq": "HQ", "soxr-vhq": "VHQ", "soxr-mq": "MQ"}
"""Our names of resampling qualities, and soxr's."""
_CONTEXT = 256  # samples, at the lower rate, beyond which a resampled value does not depend on the wave (128 measured)
_MOST = 1 << 31  # samples of a recording that is read at once, at its own rate or the one asked for


@dataclass(frozen=True)
class Inspection:
    """What decoding a whole file showed; see `inspect`.

    Attributes:
        info: the header, with the number of samples that were decoded.
        promised: samples that the header promised.
        truncated: fewer samples came than were promised, by more than the format leaves open.
        low, high: smallest and largest sample of the mono signal.
        wave: the region asked for, (S,) mono at the file's rate; empty when none was.
        cancelled: what is wrong with channels that all but vanish in their mean; None where they do not.
    """

    info: AudioInfo
    promised: int
    truncated: bool
    low: float
    high: float
    wave: Wave
    cancelled: AudioFileError | None = None

    @property
    def seconds_decoded(self) -> float:
        """Length of what was decoded."""
        return self.info.seconds

    @property
    def peak(self) -> float:
        """Largest magnitude."""
        return max(-self.low, self.high)

    @property
    def silent(self) -> bool:
        """Whether the signal moves by two steps of 16-bit sound at most; a constant offset counts as silence."""
        return self.high - self.low <= faults.SILENCE

    @property
    def fault(self) -> AudioFileError | None:
        """What makes the file unusable, or None."""
        name = f"{self.info.path} ({self.info.format})"
        if self.truncated:
            return faults.truncated(name, self.info.frames, self.promised, self.info.rate)
        if self.cancelled is not None:
            return self.cancelled
        if self.silent:
            return AudioFileError(
                "silent",
                f"{name} is silent: all its samples lie between {self.low:.2g} and {self.high:.2g}",
                "sound: a range above two steps of 16-bit sound",
                "leave it out",
            )
        return None


def probe(file: str | os.PathLike[str] | AudioBytes | BinaryIO, *, called: str | None = None) -> AudioInfo:
    """Read a file's header.

    Args:
        file: its path, its bytes, or an open file of them.
        called: the name of bytes or of an open file, such as a tar's member: for messages, and its suffix counts.

    Raises:
        AudioFileError: the file is missing, a directory, not audio, empty, visibly cut off (a wav shorter than its
            header says, an ogg that ends within a page), or of a rate, a number of channels or a length outside the
            bounds of `asit.audio.faults`.
    """
    with decoders.open_audio(file, called) as source:
        return source.info


def read(
    file: str | os.PathLike[str] | AudioBytes | BinaryIO,
    *,
    called: str | None = None,
    rate: int | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    resampler: Resampler = "soxr-hq",
) -> Wave:
    """Decode a recording, or the part asked for, to a mono waveform.

    A part is decoded by itself, with some context on both sides, and equals the same part of the whole resampled
    file. Two exceptions are known. In some Ogg Vorbis files with sharp onsets libsndfile's own seek lands a few
    milliseconds off, so there a part can begin that much early or late. In AAC the decoder may make noise up
    (perceptual noise substitution), and makes other noise after a seek. Parts of raw aac and webm, which have no exact
    time stamps, are decoded from the beginning of the file.

    Args:
        file: its path, its bytes, or an open file of them.
        called: as in `probe`.
        rate: samples a second wanted; None: the file's own.
        start: where the part begins, in seconds, to the nearest sample of `rate`.
        seconds: length of the part; None: to the end.
        resampler: resampling quality.

    Returns:
        (S,) float32, the mean of the channels; S = round(seconds * rate), less where the file ends before that.

    Raises:
        AudioFileError: as for `probe`, and: the decoder gives up, fewer samples come than the header promised, some are
            not finite or far outside [-1, 1], or the channels cancel each other.
        AudioError: the part is empty or begins after the end.
    """
    check_part(called or sniff.name_of(file), start, seconds)
    with decoders.open_audio(file, called) as source:
        info = source.info
        target = positive_rate(info.rate if rate is None else rate)
        part = part_of(info.rate, target, start, seconds)
        length = info.seconds if seconds is None else min(seconds, info.seconds)
        if length * max(info.rate, target) > _MOST:
            raise AudioError(
                f"{source.name}: {length:.0f} s at {target} Hz in one piece",
                f"at most {_MOST} samples at once",
                "ask for a part of it, or cut it",
            )
        wave = resample(source.read(part.begin, part.stop), info.rate, target, resampler)
        wave = wave[part.skip :][: part.count]
    if not len(wave):
        raise after_the_end(source.name, start, info.seconds)
    if not (math.isfinite(wave.min()) and math.isfinite(wave.max())):  # a mask would cost a quarter of the wave
        raise faults.not_finite(source.name)
    return wave


def resample(wave: Wave, from_rate: int, to_rate: int, quality: Resampler = "soxr-hq") -> Wave:
    """Band-limited resampling by soxr.

    Args:
        wave: (S,) float32.
        from_rate, to_rate: samples a second.
        quality: soxr's HQ (aliases below -120 dB), VHQ or MQ.

    Returns:
        (S',) float32 with S' = S * to_rate / from_rate to the nearest integer; the wave itself at equal rates.
    """
    if positive_rate(from_rate) == positive_rate(to_rate):
        return wave
    return np.asarray(soxr.resample(wave, from_rate, to_rate, QUALITY[quality]), dtype=np.float32)


def inspect(path: str | os.PathLike[str], *, keep: tuple[float, float] | None = None) -> Inspection:
    """Decode a whole file once, block by block, for a verdict; memory does not grow with its length.

    Args:
        path: the file.
        keep: (start, seconds) of a region to return as well, so that no second decoding is needed for it.

    Returns:
        The verdict; its `fault` says whether and why the file is unusable. A region that begins after the end, or that
        the end cuts short, comes back empty or short.

    Raises:
        AudioFileError: nothing can be decoded, the decoder gives up on the way, or samples are not finite or out of
            range; its `reason` says which.
    """
    with decoders.open_audio(path) as source:
        info = source.info
        start, length = keep or (0.0, 0.0)
        begin, end = round(start * info.rate), round((start + length) * info.rate)
        kept: list[Wave] = []
        frames = 0
        for block in source.blocks(0, None):
            if frames < end and frames + len(block) > begin:
                kept.append(block[max(0, begin - frames) : end - frames])
            frames += len(block)
            faults.check_length(source.name, frames / info.rate, source.content.data.size)
        if not frames:
            raise faults.empty(source.name)
        return Inspection(
            info=replace(info, frames=frames),
            promised=info.frames,
            truncated=source.slack is not None and frames < info.frames - source.slack,
            low=float(source.levels.low),
            high=float(source.levels.high),
            wave=np.concatenate(kept) if kept else np.zeros(0, np.float32),
            cancelled=source.levels.cancelled,
        )


@dataclass(frozen=True)
class Part:
    """A part of a sound in samples: which are decoded, and which of the resampled ones are wanted.

    Attributes:
        begin, stop: samples at the sound's own rate, with context on both sides; stop None: to the end.
        skip: samples at the target rate that come before the part.
        count: samples at the target rate; None: to the end.
    """

    begin: int
    stop: int | None
    skip: int
    count: int | None


def part_of(native: int, target: int, start: float, seconds: float | None) -> Part:
    """The part from `start` (s) that is `seconds` long, of a sound at `native` Hz that is wanted at `target` Hz."""
    first = round(start * target)
    count = None if seconds is None else max(1, round(seconds * target))
    # The two grids of samples meet every `down` samples of the file, which are `up` of the target. Beginning there
    # makes the resampler take the same phases as it would on the whole file.
    common = math.gcd(native, target)
    up, down = target // common, native // common
    context = 0 if up == down else math.ceil(_CONTEXT * native / min(native, target))
    meeting = max(0, (first * down // up - context) // down)
    stop = None if count is None else -(-(first + count) * down // up) + context
    return Part(meeting * down, stop, first - meeting * up, count)


def check_part(name: str, start: float, seconds: float | None) -> None:
    """Refuse a part that cannot be.

    Raises:
        AudioError: start below 0, no length, or either not finite.
    """
    if not (math.isfinite(start) and start >= 0) or not (seconds is None or (math.isfinite(seconds) and seconds > 0)):
        raise AudioError(
            f"{name} asked for {seconds} s from {start} s",
            "start of 0 or more and seconds above 0",
            "correct the two; seconds=None reads to the end",
        )


def after_the_end(name: str, start: float, seconds: float) -> AudioError:
    """The error about a part that begins where the sound has ended."""
    return AudioError(
        f"{name} asked for sound from {start:g} s",
        f"a start before its end at {seconds:.3f} s",
        "make the catalogue anew if the file has changed",
    )


def positive_rate(rate: int) -> int:
    """The rate, in Hz, if it is one to resample to.

    Raises:
        AudioError: below 1, above what any recording has, not finite, or no whole number.
    """
    if not isinstance(rate, Real) or not 1 <= rate <= faults.RATES[1] or rate != int(rate):
        raise AudioError(
            f"a sample rate of {rate} Hz", f"1 to {faults.RATES[1]} Hz", "pass the rate in samples a second"
        )
    return int(rate)
