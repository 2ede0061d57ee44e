"""The decoders behind `asit.audio.files`: a file opened, its header, its samples in mono blocks, and what is wrong.

One decoder for each format, since decoders disagree on where a compressed recording begins: libsndfile (by soundfile)
reads everything but the MPEG-4 family, raw AAC and WebM, which FFmpeg reads (by PyAV, the extra ``asit-audio[av]``).
Every call opens its own decoder, so threads share nothing. libmpg123, inside libsndfile, writes notes on odd MP3 files
to the standard error by itself. It has no switch for that, and turning the descriptor away would silence the other
threads too, so this module leaves it as it is: a process that decodes and nothing else may do it.

Letters in shapes: S samples, C channels, n samples of a block.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import soundfile
from numpy.typing import NDArray

from asit.audio.content import (
    AV_SUFFIXES,
    SNDFILE_SUFFIXES,
    AudioBytes,
    AudioFileError,
    Content,
    not_audio,
    open_content,
    words,
)

__all__ = ["AV_SUFFIXES", "SNDFILE_SUFFIXES", "AudioFileError", "AudioInfo", "Source", "Wave", "open_audio"]

Wave = NDArray[np.float32]

_BLOCK = 1 << 16  # samples decoded at a time
# Samples decoded and thrown away after a seek. MP3 frames borrow bits from up to some ten frames before, and Vorbis
# and AAC blocks overlap; 8192 was enough for every file tried.
_RUN_UP = {"MP3/MPEG_LAYER_III": 16384, "OGG/VORBIS": 16384}
_RUN_UP_AV = 8192
_UNKNOWN = 1 << 62  # libsndfile says so many samples, and more, of a FLAC whose encoder could not go back to its header
# Demuxers of the formats named above: a playlist that calls itself .mp4 could make FFmpeg open other files.
_AV_OPTIONS = {"format_whitelist": "mov,matroska,aac"}


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        path: the file; None for bytes and open files.
        frames: samples of one channel. Exact for wav, flac, ogg and opus; for mp3, m4a, mp4 and webm as the encoder
            noted it; a guess from the size of the file for raw aac and for mp3 without a Xing, Info or VBRI tag; 0
            where a header says nothing, as those of streams do.
        rate: samples a second.
        channels: channels in the file; everything read is their mean.
        format: container and codec, such as "WAV/PCM_16".
    """

    path: Path | None
    frames: int
    rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.rate


@contextmanager
def open_audio(file: str | os.PathLike[str] | AudioBytes | BinaryIO, called: str | None = None) -> Iterator[Source]:
    """The file, or an audio file's bytes or an open file object, open and found to hold samples.

    Args:
        file: what to open.
        called: the name of bytes or of an open file, whose suffix counts as a path's does.

    Raises:
        AudioFileError: as `asit.audio.files.probe` says.
    """
    with open_content(file, called) as content:
        source: Source = _AvSource(content) if content.ffmpeg else _SoundFileSource(content)
        with closing(source):
            source.check()
            if source.info.frames <= 0 and source.slack is not None:
                raise empty(source.name)
            yield source


class Source:
    """An open file.

    Attributes:
        content: what is decoded.
        info: its header.
        name: path and codec, for messages.
        slack: samples by which decoding may stay behind the header; None where the header is a guess.
    """

    content: Content
    info: AudioInfo
    slack: int | None

    @property
    def name(self) -> str:
        return f"{self.content.name} ({self.info.format})"

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        """Mono samples from `start` to `stop` or the end, in blocks (n,), none of them empty."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse a file that the decoder found damaged as it opened it."""

    def stream(self, start: int, stop: int | None) -> Iterator[Wave]:
        """As `blocks`; refuses, at the end, a file that held fewer samples than its header promises."""
        promised, held = self._promised(start, stop), 0
        for block in self.blocks(start, stop):
            held += len(block)
            yield block
        self._check_length(start, held, promised)

    def read(self, start: int, stop: int | None) -> Wave:
        """Samples `start` to `stop` as one array (S,), and no second copy of them when the header's length is right."""
        promised = self._promised(start, stop)
        out, filled = np.empty(promised, np.float32), 0
        for block in self.blocks(start, stop):
            if filled + len(block) > len(out):
                out = np.concatenate([out[:filled], np.empty(max(len(block), filled), np.float32)])
            out[filled : filled + len(block)] = block
            filled += len(block)
        self._check_length(start, filled, promised)
        return out[:filled]

    def _promised(self, start: int, stop: int | None) -> int:
        return max(0, (self.info.frames if stop is None else min(stop, self.info.frames)) - start)

    def _check_length(self, start: int, held: int, promised: int) -> None:
        handle = self.content.handle
        if handle is not None and handle.failure is not None:
            raise AudioFileError(
                "unreadable",
                f"{self.name} cannot be read on after {(start + held) / self.info.rate:.3f} s: {words(handle.failure)}",
                "a file that can be read to its end",
                "open it again",
            ) from handle.failure
        if self.slack is not None and held < promised - self.slack:
            raise truncated(self.name, start + held, self.info.frames, self.info.rate)

    def close(self) -> None:
        raise NotImplementedError

    def _gave_up(self, after: int, error: Exception) -> AudioFileError:
        where = f"after {after / self.info.rate:.3f} of {self.info.seconds:.3f} s"
        return AudioFileError(
            "truncated" if after else "unreadable",
            f"{self.name} cannot be decoded {where}: {words(error)}",
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


class _SoundFileSource(Source):
    def __init__(self, content: Content) -> None:
        self.content = content
        try:
            self.file = _OneWay(content.handle or os.fsencode(cast(Path, content.path)))
        except (soundfile.SoundFileError, TypeError) as error:
            raise not_audio(content, error) from None
        name = f"{self.file.format}/{self.file.subtype}"
        frames = self.file.frames if self.file.frames < _UNKNOWN else 0
        self.info = AudioInfo(content.path, frames, self.file.samplerate, self.file.channels, name)
        self.slack = 0 if frames == self.file.frames else None
        if self.file.format == "MP3":
            self.slack = _slack(self.info) if _mp3_length_is_known(content) else None

    def close(self) -> None:
        self.file.close()

    def check(self) -> None:
        """Refuse a file that libsndfile, by its log, found cut off; it goes on with what is left."""
        log = self.file.extra_info
        chunk = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
        # Programs that write into a pipe cannot know the length and put one of these in its place.
        promised, held = (int(chunk[1]), int(chunk[2])) if chunk else (0, 0)
        if held < promised < 0x7FFFF000:
            whole = self.info.frames * promised // held if held else promised
            raise truncated(self.name, self.info.frames, whole, self.info.rate)
        if self.file.format == "OGG" and "Junk after the last page" in log:
            raise AudioFileError(
                "truncated",
                f"{self.name} ends within a page, after {self.info.seconds:.3f} s",
                "whole pages of Ogg up to the end",
                "fetch it anew, or leave it out",
            )

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = max(0, start - _RUN_UP.get(self.info.format, 0))
        stop = self.file.frames if stop is None else min(stop, self.file.frames)
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


class _AvSource(Source):
    def __init__(self, content: Content) -> None:
        self.content = content
        try:
            import av
        except ImportError:
            raise AudioFileError(
                "unreadable",
                f"{content.name} needs FFmpeg to be read, and PyAV is not installed",
                "the package av for m4a, aac, mp4 and webm",
                "pip install 'asit-audio[av]', or convert the file to flac",
            ) from None
        self.error = av.error.FFmpegError
        self.resampler = av.AudioResampler(format="fltp")
        try:
            opened = av.open(content.handle or os.fspath(cast(Path, content.path)), mode="r", options=_AV_OPTIONS)
        except (self.error, UnicodeError) as error:
            raise not_audio(content, error) from None
        self.container: Any = opened
        if not opened.streams.audio:
            opened.close()
            raise AudioFileError("unreadable", f"{content.name} has no sound in it", "an audio stream", "leave it out")
        self.track = stream = opened.streams.audio[0]
        context, name = stream.codec_context, opened.format.name.split(",")[0]
        if context is None or not context.sample_rate:
            opened.close()
            found = f"{content.name} has a sound whose codec or sample rate its header does not tell"
            raise AudioFileError("unreadable", found, "a header that does", "fetch it anew, or leave it out")
        rate = context.sample_rate
        if stream.duration is not None and stream.time_base is not None:
            length = Fraction(stream.duration) * stream.time_base
        else:
            length = Fraction(opened.duration or 0, av.time_base)
        codec = f"{name.upper()}/{context.name}"
        self.info = AudioInfo(content.path, round(length * rate), rate, context.channels, codec)
        # What a browser records has no length in its header.
        self.slack = None if name == "aac" or not length else _slack(self.info)
        self.exact_stamps = stream.time_base == Fraction(1, rate) and name != "aac"

    def close(self) -> None:
        self.container.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = 0
        try:
            zero = self.track.start_time or 0
            sought = self.exact_stamps and start > _RUN_UP_AV
            if sought:
                self.container.seek(zero + start - _RUN_UP_AV, stream=self.track)
            for frame in self.container.decode(self.track):
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


def _mp3_length_is_known(content: Content) -> bool:
    """Whether the first frame carries the number of frames; otherwise libsndfile guesses it from the bit rate."""
    with content.bytes_from_start() as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its length is in the last four bytes, seven bits in each
            file.seek(10 + int("".join(f"{byte:07b}" for byte in head[6:10]), 2))
            head = b""
        head += file.read(4096)
    return any(tag in head for tag in (b"Xing", b"Info", b"VBRI"))


def empty(name: str) -> AudioFileError:
    """The error about a file without samples; `name` is `Source.name`, here and below."""
    return AudioFileError("empty", f"{name} has no samples", "at least one", "fetch it anew, or leave it out")


def truncated(name: str, held: int, promised: int, rate: int) -> AudioFileError:
    """The error about a file that holds fewer samples than its header promises; `rate` in Hz."""
    return AudioFileError(
        "truncated",
        f"{name} is truncated: {held} samples ({held / rate:.3f} s)",
        f"the {promised} samples ({promised / rate:.3f} s) that its header promises",
        "fetch it anew, or leave it out",
    )


def not_finite(name: str) -> AudioFileError:
    """The error about a file with NaN or infinity in it."""
    found = f"{name} holds samples that are NaN or infinite"
    return AudioFileError("non-finite", found, "finite samples", "convert it anew, or leave it out")
