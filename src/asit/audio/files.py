"""Audio files to mono waveforms: headers, samples or a part of them, resampling, and faults.

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
from numpy.typing import NDArray

from asit.audio import decoders, faults, sniff
from asit.audio.audio_decoder import AudioInfo as AudioInfo
from asit.audio.faults import AudioFileError as AudioFileError
from asit.audio.faults import Wave as Wave
from asit.audio.sniff import AudioBytes
from asit.errors import AudioError

Resampler = Literal["soxr-hq", "soxr-vhq", "soxr-mq"]

SUFFIXES = sniff.SNDFILE_SUFFIXES | sniff.AV_SUFFIXES
"""Suffixes of audio files, in lower case. Those of FFmpeg need the extra `av`."""

SOXR_QUALITY = {"soxr-hq": "HQ", "soxr-vhq": "VHQ", "soxr-mq": "MQ"}
"""soxr's names of the resampling qualities."""
_CONTEXT = 256  # samples at the lower rate on which a resampled value depends on each side (128 measured)
_MOST = 1 << 31  # samples read at once, at the file's or the requested rate


@dataclass(frozen=True)
class Inspection:
    """What decoding a complete file showed; see `inspect`.

    Attributes:
        info: the header, with the number of samples that were decoded.
        low, high: smallest and largest sample of the mono signal.
        wave: the requested region, (S,) mono at the file's rate; empty if none.
        fault: the error that makes the file unusable (truncated, channels that cancel each other, silent), or None.
    """

    info: AudioInfo
    low: float
    high: float
    wave: Wave
    fault: AudioFileError | None = None


def probe(file: str | os.PathLike[str] | AudioBytes | BinaryIO, *, called: str | None = None) -> AudioInfo:
    """Read a file's header.

    Args:
        file: its path, its bytes, or an open file of them.
        called: name of the bytes or open file, such as a tar's member, for messages; its suffix is used too.

    Raises:
        AudioFileError: the file is missing, a directory, not audio, empty, truncated (a wav shorter than its header
            says, an ogg that ends within a page), or of a rate, a number of channels or a length outside the bounds of
            `asit.audio.faults`.
    """
    with decoders.open_audio(file, called) as decoder:
        return decoder.info


def read(
    file: str | os.PathLike[str] | AudioBytes | BinaryIO,
    *,
    called: str | None = None,
    rate: int | None = None,
    start: float = 0.0,
    seconds: float | None = None,
    resampler: Resampler = "soxr-hq",
) -> Wave:
    """Decode a recording, or a part of it, to a mono waveform.

    A part is decoded by itself, with some context on each side, and equals the same part of the resampled file, with
    two exceptions: in some Ogg Vorbis files with sharp onsets libsndfile's seek is a few milliseconds off, and AAC
    decoders may synthesise other noise after a seek (perceptual noise substitution). Parts of raw aac and webm, which
    have no exact time stamps, are decoded from the beginning of the file.

    Args:
        file: its path, its bytes, or an open file of them.
        called: as in `probe`.
        rate: Hz of the result; None: the file's own.
        start: beginning of the part, s, to the nearest sample of `rate`.
        seconds: length of the part; None: to the end.
        resampler: resampling quality.

    Returns:
        (S,) float32, the mean of the channels; S = round(seconds * rate), less if the file ends before that.

    Raises:
        AudioFileError: as `probe`, and: the decoder fails, fewer samples are decoded than the header promises, some
            are not finite or far outside [-1, 1], or the channels cancel each other.
        AudioError: the part is empty or begins after the end.
    """
    check_part(called or sniff.name_of(file), start, seconds)
    with decoders.open_audio(file, called) as decoder:
        info = decoder.info
        target = positive_rate(info.rate if rate is None else rate)
        part = sample_range(info.rate, target, start, seconds)
        length = info.seconds if seconds is None else min(seconds, info.seconds)
        if length * max(info.rate, target) > _MOST:
            found = f"{decoder.name}: {length:.0f} s at {target} Hz at once"
            raise AudioError(found, f"at most {_MOST} samples", "read a part of it, or split the file")
        wave = resample(decoder.read(part.begin, part.stop), info.rate, target, resampler)
        wave = wave[part.skip :][: part.count]
    if not len(wave):
        raise start_after_end(decoder.name, start, info.seconds)
    if not (math.isfinite(wave.min()) and math.isfinite(wave.max())):  # np.isfinite would need a quarter more memory
        raise faults.not_finite(decoder.name)
    return wave


def read_channels(
    file: str | os.PathLike[str] | AudioBytes | BinaryIO, start: float, end: float
) -> tuple[NDArray[np.float32], AudioInfo]:
    """Read a part of a recording as it is stored: all channels, at its own rate.

    Args:
        file: as for `probe`.
        start, end: of the part, s; cut to the recording.

    Returns:
        samples (n, C), and what the header says.

    Raises:
        AudioFileError: as `probe`; the part holds no sample, or cannot be decoded.
    """
    with decoders.open_audio(file) as decoder:
        rate, decoder.levels.separate = decoder.info.rate, True
        blocks = list(decoder.stream(max(0, round(start * rate)), max(0, round(end * rate))))
        if not blocks:
            raise start_after_end(decoder.name, start, decoder.info.seconds)
        return np.concatenate(blocks), decoder.info


def resample(wave: Wave, from_rate: int, to_rate: int, quality: Resampler = "soxr-hq") -> Wave:
    """Resample by soxr, band-limited.

    Args:
        wave: (S,) float32.
        from_rate, to_rate: samples a second.
        quality: soxr's HQ (aliases below -120 dB), VHQ or MQ.

    Returns:
        (S',) float32 with S' = round(S * to_rate / from_rate); the wave itself at equal rates.
    """
    if positive_rate(from_rate) == positive_rate(to_rate):
        return wave
    return np.asarray(soxr.resample(wave, from_rate, to_rate, SOXR_QUALITY[quality]), dtype=np.float32)


def inspect(
    path: str | os.PathLike[str],
    *,
    part: tuple[float, float] | None = None,
    keep: tuple[float, float] | None = None,
) -> Inspection:
    """Decode a file, or a part of it, block by block and check it; memory does not grow with its length.

    Args:
        path: the file.
        part: start and end of the part, s; None: the complete file.
        keep: (start, seconds) of a region of it to return as well, which saves a second decoding.

    Returns:
        The verdict. A region after the end is empty, one across it short.

    Raises:
        AudioFileError: nothing can be decoded, the decoder fails, or samples are not finite or out of range.
    """
    with decoders.open_audio(path) as decoder:
        info = decoder.info
        first, stop = (0, None) if part is None else (round(part[0] * info.rate), round(part[1] * info.rate))
        start, length = keep or (0.0, 0.0)
        begin, end = round(start * info.rate), round((start + length) * info.rate)
        kept: list[Wave] = []
        frames = 0
        for block in decoder.blocks(first, stop):
            if frames < end and frames + len(block) > begin:
                kept.append(block[max(0, begin - frames) : end - frames])
            frames += len(block)
            faults.check_length(decoder.name, frames / info.rate, decoder.content.data.size)
        if not frames:
            raise faults.empty(decoder.name)
        low, high = float(decoder.levels.low), float(decoder.levels.high)
        fault = decoder.levels.cancelled or faults.silent(decoder.name, low, high)
        if decoder.slack is not None and frames < decoder.promised(first, stop) - decoder.slack:
            fault = faults.truncated(decoder.name, first + frames, info.frames, info.rate)
        return Inspection(
            info=replace(info, frames=frames),
            low=low,
            high=high,
            wave=np.concatenate(kept) if kept else np.zeros(0, np.float32),
            fault=fault,
        )


@dataclass(frozen=True)
class SampleRange:
    """The samples to decode for a part of a recording, and those to keep after resampling.

    Attributes:
        begin, stop: samples to decode, with context on each side; stop None: to the end.
        skip: resampled samples before the part.
        count: resampled samples of the part; None: to the end.
    """

    begin: int
    stop: int | None
    skip: int
    count: int | None


def sample_range(native: int, target: int, start: float, seconds: float | None) -> SampleRange:
    """Return the samples of the part from `start` that is `seconds` long, resampled from `native` to `target` Hz."""
    first = round(start * target)
    count = None if seconds is None else max(1, round(seconds * target))
    # The two sample grids coincide every `down` samples of the file, which are `up` of the target. Starting there gives
    # the resampler the same phases as on the complete file.
    common = math.gcd(native, target)
    up, down = target // common, native // common
    context = 0 if up == down else math.ceil(_CONTEXT * native / min(native, target))
    aligned = max(0, (first * down // up - context) // down)
    stop = None if count is None else -(-(first + count) * down // up) + context
    return SampleRange(aligned * down, stop, first - aligned * up, count)


def check_part(name: str, start: float, seconds: float | None) -> None:
    """Raise an AudioError for a start below 0, no length, or values that are not finite."""
    if not (math.isfinite(start) and start >= 0) or not (seconds is None or (math.isfinite(seconds) and seconds > 0)):
        found = f"{name}: a part of {seconds} s from {start} s"
        raise AudioError(found, "start of 0 or more and seconds above 0", "correct them; seconds=None reads to the end")


def start_after_end(name: str, start: float, seconds: float) -> AudioError:
    """Make the error about a part that begins after the end."""
    expected = f"a start before its end at {seconds:.3f} s"
    return AudioError(f"{name}: a part from {start:g} s", expected, "build the catalogue again if the file has changed")


def positive_rate(rate: int) -> int:
    """Return the rate, Hz; an AudioError refuses one below 1, above all recordings' or that is no integer."""
    if not isinstance(rate, Real) or not 1 <= rate <= faults.RATES[1] or rate != int(rate):
        raise AudioError(f"a sample rate of {rate} Hz", f"1 to {faults.RATES[1]} Hz", "pass the rate in Hz")
    return int(rate)
