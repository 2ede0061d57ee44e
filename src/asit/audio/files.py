"""Recordings on disk to mono waveforms: what a file holds, its samples or a part of them, and what is wrong with it.

One decoder for each format, since decoders disagree on where a compressed recording begins: libsndfile (by soundfile)
reads everything but the MPEG-4 family, raw AAC and WebM, which FFmpeg reads (by PyAV, the extra ``asit-audio[av]``).
Every call opens its own decoder, so threads share nothing. libmpg123, inside libsndfile, writes notes on odd MP3 files
to the standard error by itself. It has no switch for that, and turning the descriptor away would silence the other
threads too, so this module leaves it as it is: a process that decodes and nothing else may do it.

Letters in shapes: S samples, C channels, n samples of a block.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from asit.errors import AudioError

Wave = NDArray[np.float32]
Resampler = Literal["soxr-hq", "soxr-vhq", "soxr-mq"]
Reason = Literal["missing", "unreadable", "empty", "truncated", "non-finite", "silent"]

_AV_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".webm"})
SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"}) | _AV_SUFFIXES
"""Names that count as recordings, in lower case. Those of FFmpeg need the extra; without it, opening one says so."""

_QUALITY = {"soxr-hq": "HQ", "soxr-vhq": "VHQ", "soxr-mq": "MQ"}
_BLOCK = 1 << 16  # samples decoded at a time
_CONTEXT = 256  # samples, at the lower rate, beyond which a resampled value does not depend on the wave (128 measured)
# Samples decoded and thrown away after a seek. MP3 frames borrow bits from up to some ten frames before, and Vorbis
# and AAC blocks overlap; 8192 was enough for every file tried.
_RUN_UP = {"MP3/MPEG_LAYER_III": 16384, "OGG/VORBIS": 16384}
_RUN_UP_AV = 8192
_MAGIC = {
    b"RIFF": (".wav",),
    b"fLaC": (".flac",),
    b"OggS": (".ogg", ".opus"),
    b"ftyp": (".m4a", ".mp4"),
    b"\x1aE\xdf\xa3": (".webm",),
}
_SILENCE = 2 / 32768  # a range of two steps of 16-bit sound: dither at most


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


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        path: the file.
        frames: samples of one channel. Exact for wav, flac, ogg and opus; for mp3, m4a, mp4 and webm as the encoder
            noted it; a guess from the size of the file for raw aac and for mp3 without a Xing, Info or VBRI tag.
        rate: samples a second.
        channels: channels in the file; everything read is their mean.
        format: container and codec, such as "WAV/PCM_16".
    """

    path: Path
    frames: int
    rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.rate


@dataclass(frozen=True)
class Inspection:
    """What decoding a whole file showed; see `inspect`.

    Attributes:
        info: the header, with the number of samples that were decoded.
        promised: samples that the header promised.
        truncated: fewer samples came than were promised, by more than the format leaves open.
        low, high: smallest and largest sample of the mono signal; NaN where any sample is NaN.
        wave: the region asked for, (S,) mono at the file's rate; empty when none was.
    """

    info: AudioInfo
    promised: int
    truncated: bool
    low: float
    high: float
    wave: Wave

    @property
    def seconds_decoded(self) -> float:
        """Length of what was decoded."""
        return self.info.seconds

    @property
    def finite(self) -> bool:
        """Whether every sample is a number."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def peak(self) -> float:
        """Largest magnitude."""
        return max(-self.low, self.high)

    @property
    def silent(self) -> bool:
        """Whether the signal moves by two steps of 16-bit sound at most; a constant offset counts as silence."""
        return self.high - self.low <= _SILENCE

    @property
    def fault(self) -> AudioFileError | None:
        """What makes the file unusable, or None."""
        name = f"{self.info.path} ({self.info.format})"
        if self.truncated:
            return _truncated(name, self.info.frames, self.promised, self.info.rate)
        if not self.finite:
            return _not_finite(name)
        if self.silent:
            return AudioFileError(
                "silent",
                f"{name} is silent: all its samples lie between {self.low:.2g} and {self.high:.2g}",
                "sound: a range above two steps of 16-bit sound",
                "leave it out",
            )
        return None


def probe(path: str | os.PathLike[str]) -> AudioInfo:
    """Read a file's header.

    Raises:
        AudioFileError: the file is missing, a directory, not audio, empty, or visibly cut off (a wav shorter than its
            header says, an ogg that ends within a page).
    """
    with _open(path) as source:
        return source.info


def read(
    path: str | os.PathLike[str],
    *,
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
        path: the file.
        rate: samples a second wanted; None: the file's own.
        start: where the part begins, in seconds, to the nearest sample of `rate`.
        seconds: length of the part; None: to the end.
        resampler: resampling quality.

    Returns:
        (S,) float32, the mean of the channels; S = round(seconds * rate), less where the file ends before that.

    Raises:
        AudioFileError: as for `probe`, and: the decoder gives up, fewer samples come than the header promised, or some
            are not finite.
        AudioError: the part is empty or begins after the end.
    """
    if not (math.isfinite(start) and start >= 0) or not (seconds is None or (math.isfinite(seconds) and seconds > 0)):
        raise AudioError(
            f"{os.fspath(path)} asked for {seconds} s from {start} s",
            "start of 0 or more and seconds above 0",
            "correct the two; seconds=None reads to the end",
        )
    with _open(path) as source:
        info = source.info
        target = _positive_rate(info.rate if rate is None else rate)
        first = round(start * target)
        count = None if seconds is None else max(1, round(seconds * target))
        # The two grids of samples meet every `down` samples of the file, which are `up` of the target. Beginning there
        # makes the resampler take the same phases as it would on the whole file.
        common = math.gcd(info.rate, target)
        up, down = target // common, info.rate // common
        context = 0 if up == down else math.ceil(_CONTEXT * info.rate / min(info.rate, target))
        meeting = max(0, (first * down // up - context) // down)
        stop = None if count is None else -(-(first + count) * down // up) + context
        wave = resample(_collect(source, meeting * down, stop), info.rate, target, resampler)
        wave = wave[first - meeting * up :][:count]
    if not len(wave):
        raise AudioError(
            f"{source.name} asked for sound from {start:g} s",
            f"a start before its end at {info.seconds:.3f} s",
            "make the catalogue anew if the file has changed",
        )
    if not (math.isfinite(wave.min()) and math.isfinite(wave.max())):  # a mask would cost a quarter of the wave
        raise _not_finite(source.name)
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
    if _positive_rate(from_rate) == _positive_rate(to_rate):
        return wave
    return np.asarray(soxr.resample(wave, from_rate, to_rate, _QUALITY[quality]), dtype=np.float32)


def inspect(path: str | os.PathLike[str], *, keep: tuple[float, float] | None = None) -> Inspection:
    """Decode a whole file once, block by block, for a verdict; memory does not grow with its length.

    Args:
        path: the file.
        keep: (start, seconds) of a region to return as well, so that no second decoding is needed for it.

    Returns:
        The verdict; its `fault` says whether and why the file is unusable. A region that begins after the end, or that
        the end cuts short, comes back empty or short.

    Raises:
        AudioFileError: nothing can be decoded, or the decoder gives up on the way; its `reason` says which.
    """
    with _open(path) as source:
        info = source.info
        begin, end = (round(t * info.rate) for t in ((keep[0], keep[0] + keep[1]) if keep else (0.0, 0.0)))
        kept: list[Wave] = []
        lows: list[np.float32] = []
        highs: list[np.float32] = []
        frames = 0
        for block in source.blocks(0, None):
            lows.append(block.min())
            highs.append(block.max())
            if frames < end and frames + len(block) > begin:
                kept.append(block[max(0, begin - frames) : end - frames])
            frames += len(block)
        if not frames:
            raise _empty(source.name)
        return Inspection(
            info=replace(info, frames=frames),
            promised=info.frames,
            truncated=source.slack is not None and frames < info.frames - source.slack,
            low=float(np.min(lows)),
            high=float(np.max(highs)),
            wave=np.concatenate(kept) if kept else np.zeros(0, np.float32),
        )


class _Source:
    """An open file.

    Attributes:
        info: its header.
        name: path and codec, for messages.
        slack: samples by which decoding may stay behind the header; None where the header is a guess.
    """

    info: AudioInfo
    slack: int | None

    @property
    def name(self) -> str:
        return f"{self.info.path} ({self.info.format})"

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        """Mono samples from `start` to `stop` or the end, in blocks (n,), none of them empty."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        raise NotImplementedError

    def _gave_up(self, after: int, error: Exception) -> AudioFileError:
        where = f"after {after / self.info.rate:.3f} of {self.info.seconds:.3f} s"
        return AudioFileError(
            "truncated" if after else "unreadable",
            f"{self.name} cannot be decoded {where}: {_words(error)}",
            "a whole recording",
            "fetch or convert it anew, or leave it out",
        )


class _OneWay(soundfile.SoundFile):
    """Reads on without a seek.

    soundfile seeks to where it stands after each read of a seekable file; in MP3 that throws the decoder's bits away
    and the next block begins with up to some 3,000 wrong samples.
    """

    def seekable(self) -> bool:
        return False


class _SoundFileSource(_Source):
    def __init__(self, path: Path) -> None:
        try:
            self.file = _OneWay(os.fsencode(path))
        except (soundfile.SoundFileError, TypeError) as error:
            raise _not_audio(path, error) from None
        name = f"{self.file.format}/{self.file.subtype}"
        self.info = AudioInfo(path, self.file.frames, self.file.samplerate, self.file.channels, name)
        self.slack = 0
        if self.file.format == "MP3":
            self.slack = _slack(self.info) if _mp3_length_is_known(path) else None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()

    def check(self) -> None:
        """Refuse a file that libsndfile, by its log, found cut off; it goes on with what is left."""
        log = self.file.extra_info
        chunk = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
        # Programs that write into a pipe cannot know the length and put one of these in its place.
        if chunk and (promised := int(chunk[1])) > (held := int(chunk[2])) and promised < 0x7FFFF000:
            whole = self.info.frames * promised // held if held else promised
            raise _truncated(self.name, self.info.frames, whole, self.info.rate)
        if self.file.format == "OGG" and "Junk after the last page" in log:
            raise AudioFileError(
                "truncated",
                f"{self.name} ends within a page, after {self.info.seconds:.3f} s",
                "whole pages of Ogg up to the end",
                "fetch it anew, or leave it out",
            )

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = max(0, start - _RUN_UP.get(self.info.format, 0))
        stop = self.info.frames if stop is None else min(stop, self.info.frames)
        try:
            if 0 < at < stop:
                self.file.seek(at)
            while at < stop:
                block = self.file.read(min(_BLOCK, stop - at), dtype="float32", always_2d=True)
                if not len(block):
                    break
                skip = min(max(0, start - at), len(block))
                at += len(block)
                if skip < len(block):
                    yield _mono(block[skip:].T)
        except soundfile.SoundFileError as error:
            raise self._gave_up(at, error) from None


class _AvSource(_Source):
    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError:
            raise AudioFileError(
                "unreadable",
                f"{path} needs FFmpeg to be read, and PyAV is not installed",
                "the package av for m4a, aac, mp4 and webm",
                "pip install 'asit-audio[av]', or convert the file to flac",
            ) from None
        self.error = av.error.FFmpegError
        self.resampler = av.AudioResampler(format="fltp")
        try:
            self.container = av.open(os.fspath(path))
        except (self.error, UnicodeError) as error:
            raise _not_audio(path, error) from None
        if not self.container.streams.audio:
            self.container.close()
            raise AudioFileError("unreadable", f"{path} has no sound in it", "an audio stream", "leave it out")
        self.stream = stream = self.container.streams.audio[0]
        rate, name = stream.codec_context.sample_rate, self.container.format.name.split(",")[0]
        if stream.duration is not None and stream.time_base is not None:
            length = Fraction(stream.duration) * stream.time_base
        else:
            length = Fraction(self.container.duration or 0, av.time_base)
        codec = f"{name.upper()}/{stream.codec_context.name}"
        self.info = AudioInfo(path, round(length * rate), rate, stream.codec_context.channels, codec)
        self.slack = None if name == "aac" else _slack(self.info)
        self.exact_stamps = stream.time_base == Fraction(1, rate) and name != "aac"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.container.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = 0
        try:
            zero = self.stream.start_time or 0
            sought = self.exact_stamps and start > _RUN_UP_AV
            if sought:
                self.container.seek(zero + start - _RUN_UP_AV, stream=self.stream)
            for frame in self.container.decode(self.stream):
                if sought:  # where the seek landed is known from the first frame
                    at, sought = cast(int, frame.pts) - zero, False
                for part in [frame] if frame.format.name == "fltp" else self.resampler.resample(frame):
                    block = cast(Wave, part.to_ndarray())
                    length = block.shape[1]
                    block = block[:, max(0, start - at) : None if stop is None else max(0, stop - at)]
                    at += length
                    if block.shape[1]:
                        yield _mono(block)
                if stop is not None and at >= stop:
                    return
        except self.error as error:
            raise self._gave_up(at, error) from None


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[_Source]:
    """The file, open and found to hold samples."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        raise AudioFileError(
            "missing", f"{path} does not exist", "a recording", "correct the path, or make the catalogue anew"
        ) from None
    except OSError as error:
        remedy = "name a file in it" if path.is_dir() else "see to its permissions and its disk"
        raise AudioFileError("unreadable", f"{path}: {error.strerror}", "a readable file", remedy) from None
    source: _AvSource | _SoundFileSource
    source = _AvSource(path) if path.suffix.lower() in _AV_SUFFIXES else _SoundFileSource(path)
    with source:
        if isinstance(source, _SoundFileSource):
            source.check()
        if source.info.frames <= 0 and source.slack is not None:
            raise _empty(source.name)
        yield source


def _collect(source: _Source, start: int, stop: int | None) -> Wave:
    """Samples `start` to `stop` as one array (S,), and no second copy of them when the header's length is right."""
    promised = max(0, (source.info.frames if stop is None else min(stop, source.info.frames)) - start)
    out, filled = np.empty(promised, np.float32), 0
    for block in source.blocks(start, stop):
        if filled + len(block) > len(out):
            out = np.concatenate([out[:filled], np.empty(max(len(block), filled), np.float32)])
        out[filled : filled + len(block)] = block
        filled += len(block)
    if source.slack is not None and filled < promised - source.slack:
        raise _truncated(source.name, start + filled, source.info.frames, source.info.rate)
    return out[:filled]


def _mono(block: NDArray[np.float32]) -> Wave:
    """(C, n) to its mean (n,), channel by channel: several times as fast as a mean over interleaved samples."""
    if len(block) == 1:
        return block[0]
    total = block[0] + block[1]
    for channel in block[2:]:
        total += channel
    total *= np.float32(1 / len(block))
    return total


def _slack(info: AudioInfo) -> int:
    return round(max(0.02 * info.frames, 0.1 * info.rate))


def _mp3_length_is_known(path: Path) -> bool:
    """Whether the first frame carries the number of frames; otherwise libsndfile guesses it from the bit rate."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its length is in the last four bytes, seven bits in each
            file.seek(10 + int("".join(f"{byte:07b}" for byte in head[6:10]), 2))
            head = b""
        head += file.read(4096)
    return any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))


def _not_audio(path: Path, error: Exception) -> AudioFileError:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return AudioFileError("empty", f"{path} has no bytes", "a recording", "fetch it anew, or leave it out")
    suffix = path.suffix.lower()
    begins = "begins with the bytes " + head[:8].hex(" ")
    remedy = "fetch or convert it anew, or leave it out"
    suits = next((suffixes for magic, suffixes in _MAGIC.items() if magic in (head[:4], head[4:8])), None)
    if suits is not None and suffix not in suits:
        begins, remedy = f"has the contents of a {suits[0]} file", f"rename it to {suits[0]}"
    elif head.lstrip().startswith(b"<"):
        begins, remedy = "is a web page or XML", "fetch it anew: a server may have sent an error page"
    return AudioFileError(
        "unreadable",
        f"{path} {begins}; {'FFmpeg' if suffix in _AV_SUFFIXES else 'libsndfile'} says: {_words(error)}",
        f"audio as its name says ({suffix or 'no suffix'})",
        remedy,
    )


def _words(error: Exception) -> str:
    """The decoder's own words, without the path that soundfile puts in front of them."""
    return (getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)).strip()


def _empty(name: str) -> AudioFileError:
    return AudioFileError("empty", f"{name} has no samples", "at least one", "fetch it anew, or leave it out")


def _truncated(name: str, held: int, promised: int, rate: int) -> AudioFileError:
    return AudioFileError(
        "truncated",
        f"{name} is truncated: {held} samples ({held / rate:.3f} s)",
        f"the {promised} samples ({promised / rate:.3f} s) that its header promises",
        "fetch it anew, or leave it out",
    )


def _not_finite(name: str) -> AudioFileError:
    found = f"{name} holds samples that are NaN or infinite"
    return AudioFileError("non-finite", found, "finite samples", "convert it anew, or leave it out")


def _positive_rate(rate: int) -> int:
    if rate < 1:
        raise AudioError(f"a sample rate of {rate} Hz", "1 Hz or more", "pass the rate in samples a second")
    return rate
