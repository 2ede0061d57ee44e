"""The decoder of FFmpeg through PyAV (the extra ``asit-audio[av]``): MPEG-4, Matroska, AAC, WMA, AMR and more."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, cast

import numpy as np

from asit.audio import faults, mpeg
from asit.audio.audio_decoder import AudioDecoder, AudioInfo
from asit.audio.byte_ranges import ByteReader
from asit.audio.faults import AudioFileError, Wave
from asit.audio.sniff import Content, unknown_format

_BOXES = 100_000  # most boxes examined
_RUN_UP = 8192  # samples decoded and discarded after a seek; enough for every file tried
# Allowed demuxers: a playlist named .mp4 could make FFmpeg open other files.
_OPTIONS = {"format_whitelist": "mov,matroska,aac,asf,amr,wav,mp3,ogg,wv"}


class FFmpegDecoder(AudioDecoder):
    """A file open in FFmpeg."""

    def __init__(self, content: Content) -> None:
        try:
            import av
        except ImportError:
            raise AudioFileError(
                "unreadable",
                f"{content.name} needs FFmpeg to be read, and PyAV is not installed",
                "the package av for m4a, aac, mp4, webm and others",
                "pip install 'asit-audio[av]', or convert the file to flac",
            ) from None
        if content.kind == "mp4":
            _check_boxes(content.name, content.data)
        if content.kind == "matroska":
            _check_segment(content.name, content.data)
        self.counted = mpeg.count(content.data, content.start) if content.kind in ("adts", "mpeg") else None
        self.error = av.error.FFmpegError
        self.resampler = av.AudioResampler(format="fltp")
        content.file.seek(0)
        try:
            where = content.file if content.path is None else os.fspath(content.path)
            opened = av.open(cast(Any, where), mode="r", options=_OPTIONS)
        except (self.error, UnicodeError) as error:
            raise unknown_format(content, error, "FFmpeg") from None
        self.container: Any = opened
        try:
            self._take(content, opened, av.time_base)
        except BaseException:
            opened.close()
            raise

    def _take(self, content: Content, opened: Any, time_base: int) -> None:
        if not opened.streams.audio:
            raise AudioFileError("unreadable", f"{content.name} has no audio", "an audio stream", "leave it out")
        self.track = stream = opened.streams.audio[0]
        context, name = stream.codec_context, opened.format.name.split(",")[0]
        if context is None or not context.sample_rate:
            found = f"{content.name} has an audio stream without a codec or sample rate in its header"
            raise AudioFileError("unreadable", found, "a header with both", "fetch it again, or leave it out")
        rate = context.sample_rate
        if stream.duration is not None and stream.time_base is not None:
            length = Fraction(stream.duration) * stream.time_base
        else:
            length = Fraction(opened.duration or 0, time_base)
        # Browsers record without a length in the header; the container's length is that of its longest stream.
        own = stream.duration is not None or len(opened.streams) == 1
        exact = bool(length) and own and name not in ("aac", "amr")
        frames = round(length * rate) if exact else 0
        if self.counted is not None:
            first, count = self.counted
            frames, exact = count * first.samples * rate // first.rate, True
        info = AudioInfo(content.path, frames, rate, context.channels, f"{name.upper()}/{context.name}")
        super().__init__(content, info, round(0.25 * rate) if exact else None)
        self.exact_stamps = stream.time_base == Fraction(1, rate) and name not in ("aac", "mp3")

    def close(self) -> None:
        self.container.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at, rate = 0, self.info.rate
        try:
            zero = self.track.start_time or 0
            sought = self.exact_stamps and start > _RUN_UP
            if sought:
                self.container.seek(zero + start - _RUN_UP, stream=self.track)
            for frame in self.container.decode(self.track):
                if frame.sample_rate != rate:
                    raise faults.joined(self.name, f"its rate changes from {rate} to {frame.sample_rate} Hz")
                if sought:  # the first frame tells where the seek ended
                    at, sought = cast(int, frame.pts) - zero, False
                for part in [frame] if frame.format.name == "fltp" else self.resampler.resample(frame):
                    block = cast(Wave, part.to_ndarray())
                    length = block.shape[1]
                    block = block[:, max(0, start - at) : None if stop is None else max(0, stop - at)]
                    at += length
                    if block.shape[1]:
                        yield self.levels.mix(np.asarray(block))
                if stop is not None and at >= stop:
                    return
        except self.error as error:
            raise self.failed(at, error) from None


def _check_segment(name: str, file: ByteReader) -> None:
    """Raise an AudioFileError for a Matroska file that ends within its segment (RFC 8794, 6; RFC 9559, 4.5)."""
    at = 0
    for wanted in (b"\x1aE\xdf\xa3", b"\x18S\x80g"):
        head = file.at(at, 12)
        width = 9 - head[4].bit_length() if len(head) == 12 and head[:4] == wanted and head[4] else 0
        if not width:
            return
        size = int.from_bytes(head[4 : 4 + width], "big") & (1 << 7 * width) - 1
        at += 4 + width + size
        if size == (1 << 7 * width) - 1:  # unknown: of a stream
            return
    if at > file.size:
        raise faults.cut_off(name, f"its segment, which has {at - file.size} bytes more")


def _check_boxes(name: str, file: ByteReader) -> None:
    """Raise an AudioFileError for an MPEG-4 file that ends within a box, and for two concatenated ones."""
    at, films = 0, 0
    for _ in range(_BOXES):
        head = file.at(at, 16)
        if len(head) < 8:
            return
        (size,), box = struct.unpack_from(">I", head), head[4:8]
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack_from(">Q", head, 8)
        films += box == b"moov"
        if films > 1:
            raise faults.joined(name, f"a second one begins before byte {at}")
        if size < 8:  # 0: to the end of the file; else no box
            return
        at += size
        if at > file.size and box in (b"moov", b"mdat", b"moof"):
            raise faults.cut_off(name, f"its box '{box.decode()}', which has {at - file.size} bytes more")
