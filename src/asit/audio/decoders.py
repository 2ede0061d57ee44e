"""Choice of the decoder for a file, and corrected headers for it where the file's own is wrong.

Each format has one decoder, since decoders disagree on where a compressed recording begins: libsndfile (soundfile)
reads WAV, FLAC, MP3, Ogg and more; FFmpeg (`asit.audio.ffmpeg`) the MPEG-4 family, Matroska, raw AAC, WMA and AMR. The
first bytes decide. A recording begins where its encoder says (the delay in a LAME tag, Opus' pre-skip, an edit
list), otherwise, as in MP3 without a tag, at the first decoded sample.

libsndfile stops at the length that a header says or that it estimates, so headers are compared with the file first
(`asit.audio.pcm_headers`, `mpeg`, `ogg`); where they are wrong, libsndfile reads a corrected one before the same bytes.

Every call opens its own decoder, so threads share nothing. libmpg123, inside libsndfile, prints warnings about MP3
files to the standard error without a switch; only a process that does nothing else may redirect it.

Letters in shapes: S samples, C channels, n samples of a block.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, TypeVar

import soundfile

from asit.audio import faults, flac, mpeg, ogg, pcm_headers
from asit.audio.audio_decoder import AudioDecoder, AudioInfo
from asit.audio.byte_ranges import ByteRange, ByteReader, SplicedFile
from asit.audio.faults import AudioFileError, Wave
from asit.audio.sniff import (
    BY_FFMPEG,
    HEADED,
    AudioBytes,
    Content,
    SafeReader,
    open_content,
    unknown_format,
    unreadable,
)

T = TypeVar("T")

_BLOCK = 1 << 16  # samples decoded at a time, of up to eight channels
# Samples decoded and discarded after a seek: MP3 frames use bits of some ten frames before, and Vorbis blocks overlap.
_RUN_UP = {"MP3/MPEG_LAYER_III": 16384, "OGG/VORBIS": 16384}
_BUFFER = 1 << 16  # bytes of a file with a corrected header that are read at once
_UNKNOWN = 1 << 62  # libsndfile reports at least so many samples for a FLAC stream of unknown length


@contextmanager
def open_audio(
    file: str | os.PathLike[str] | AudioBytes | BinaryIO, called: str | None = None
) -> Iterator[AudioDecoder]:
    """Open a file, the bytes of one, or an open file object.

    Args:
        file: what to open.
        called: name of bytes or of an open file; its suffix is used as a path's.

    Raises:
        AudioFileError: as `asit.audio.files.probe`.
    """
    with open_content(file, called) as content:
        try:
            decoder = _open(content)
        except OSError as error:
            raise unreadable(content.name, error) from None
        except AudioFileError:
            if content.failure is not None:
                raise unreadable(content.name, content.failure) from content.failure
            raise
        with closing(decoder):
            if decoder.info.frames <= 0 and decoder.slack is not None:
                raise faults.empty(decoder.name)
            yield decoder


def _open(content: Content) -> AudioDecoder:
    if content.kind in BY_FFMPEG:
        return _by_ffmpeg(content)
    if content.kind in HEADED:
        return _open_headed(content)
    if content.kind == "mpeg":
        return _open_mpeg(content, _cached(content, mpeg.stream, content.start))
    if content.kind == "ogg":
        return _open_ogg(content, _cached(content, ogg.links))
    if content.kind == "flac":
        return _chained(content, _cached(content, flac.recordings, content.start))
    return _SoundFileDecoder(content)


def _by_ffmpeg(content: Content) -> AudioDecoder:
    from asit.audio.ffmpeg import FFmpegDecoder

    return FFmpegDecoder(content)


def _open_headed(content: Content) -> AudioDecoder:
    file, before = content.data, content.start
    if before:  # after a tag
        file = ByteReader(SplicedFile(content.file, ((before, file.size - before),)))
    found = pcm_headers.find(content.kind, file)
    if found is None:
        return _SoundFileDecoder(content, ((before, file.size),) if before else None)
    if found.joined is not None:
        raise faults.joined(content.name, f"another one begins at byte {before + found.joined}")
    if found.by_ffmpeg:
        return _by_ffmpeg(content)
    start = before + found.start
    if found.tag == pcm_headers.MP3_IN_WAV and found.size:
        inner = ByteReader(SplicedFile(content.file, ((start, found.size),)))
        stream = mpeg.stream(inner, 0)
        if stream is not None:
            stream = replace(stream, parts=_moved(stream.parts or ((0, found.size),), start))
            return _open_mpeg(content, stream, "WAV/MPEG_LAYER_III", found.promised)
    parts = found.parts and _moved(found.parts, before)
    if parts is None and before:
        parts = ((before, file.size),)
    decoder = _SoundFileDecoder(content, parts)
    if found.promised is not None:
        promised, held, frames = found.promised, found.size, decoder.info.frames
        expected = promised // found.block if held // found.block == frames else frames * promised // max(1, held)
        decoder.close()
        raise faults.truncated(decoder.name, frames, expected, decoder.info.rate)
    return decoder


def _open_mpeg(
    content: Content, stream: mpeg.Stream | None, label: str | None = None, promised: int | None = None
) -> AudioDecoder:
    if stream is None:
        return _SoundFileDecoder(content)
    first = stream.first
    if stream.other is not None:
        raise faults.joined(content.name, f"after {first.rate} Hz come frames of {stream.other}")
    if stream.uneven:  # libsndfile estimates the length of layers I and II from the first frame, and stops there
        return _by_ffmpeg(content)
    decoder = _SoundFileDecoder(content, stream.parts, label, round(0.1 * first.rate))
    if stream.frames is not None and stream.promised is not None and stream.frames < stream.promised - 1:
        decoder.close()
        count, expected = stream.frames * first.samples, stream.promised * first.samples
        raise faults.truncated(decoder.name, count, expected, first.rate)
    if promised is not None:
        decoder.close()
        raise faults.cut_off(decoder.name, f"its samples, which have {promised} bytes by its header")
    return decoder


def _open_ogg(content: Content, links: ogg.Links) -> AudioDecoder:
    found = links.found
    if not found:
        if links.others:
            names = ", ".join(sorted(set(links.others)))
            found_text = f"{content.name} has no audio, but {names}"
            raise AudioFileError("unreadable", found_text, "an audio stream", "leave it out")
        return _SoundFileDecoder(content)
    if any(link.codec == "speex" for link in found):
        return _by_ffmpeg(content)
    if links.cut:
        raise faults.cut_off(f"{content.name} (OGG/{found[0].codec.upper()})", "a page of Ogg")
    return _chained(content, [link.parts for link in found], "OGG/FLAC" if found[0].codec == "flac" else None)


def _chained(content: Content, recordings: Sequence[Sequence[ByteRange]], label: str | None = None) -> AudioDecoder:
    """Open one recording, or several in sequence, each given as its byte ranges."""
    if len(recordings) > faults.RECORDINGS:
        raise faults.joined(content.name, f"more than {faults.RECORDINGS}")
    decoders = list[AudioDecoder]()
    try:
        for parts in recordings:
            plain = list(parts) == [(0, content.data.size)]
            decoders.append(_SoundFileDecoder(content, None if plain else parts, label))
        return decoders[0] if len(decoders) == 1 else _ChainedDecoder(content, decoders)
    except BaseException:
        for decoder in decoders:
            decoder.close()
        raise


def _moved(parts: Sequence[ByteRange], by: int) -> tuple[ByteRange, ...]:
    return tuple(part if isinstance(part, bytes) else (part[0] + by, part[1]) for part in parts)


def _cached(content: Content, scan: Callable[..., T], *more: Any) -> T:
    """Return what a scan of the complete file finds, cached for files that have not changed."""
    if content.path is None:
        return scan(content.data, *more)
    status = os.stat(content.path)  # noqa: PTH116
    found: T = _scan_file(os.fspath(content.path), status.st_size, status.st_mtime_ns, scan, *more)
    return found


@functools.lru_cache(maxsize=256)
def _scan_file(path: str, size: int, mtime_ns: int, scan: Callable[..., Any], *more: Any) -> Any:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return scan(ByteReader(file), *more)


class _Unseekable(soundfile.SoundFile):
    """Reads without the seek that soundfile makes after each read, which in MP3 spoils the next block."""

    def seekable(self) -> bool:
        return False


class _SoundFileDecoder(AudioDecoder):
    """A file open in libsndfile, or byte ranges of it; `label` replaces libsndfile's name of container and codec."""

    def __init__(
        self, content: Content, parts: Sequence[ByteRange] | None = None, label: str | None = None, slack: int = 0
    ) -> None:
        self.file = _opened(content, parts)
        frames = self.file.frames if 0 <= self.file.frames < _UNKNOWN else 0
        codec = f"{self.file.format}/{self.file.subtype}"
        info = AudioInfo(content.path, frames, self.file.samplerate, self.file.channels, label or codec)
        try:
            super().__init__(content, info, slack if frames == self.file.frames else None)
        except AudioFileError:
            self.file.close()
            raise
        self._run_up = _RUN_UP.get(codec, 0)

    def close(self) -> None:
        self.file.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = max(0, start - self._run_up)
        stop = self.file.frames if stop is None else min(stop, self.file.frames)
        most = max(1, _BLOCK * 8 // max(8, self.info.channels))
        try:
            if not soundfile.SoundFile.seekable(self.file):  # a codec without seek, such as GSM 06.10
                at = 0
            elif 0 < at < stop:
                self.file.seek(at)
            while at < stop:
                block = self.file.read(min(most, stop - at), dtype="float32", always_2d=True)
                if not len(block):
                    break
                skip = min(max(0, start - at), len(block))
                at += len(block)
                if skip < len(block):
                    yield self.levels.mix(block[skip:].T)
        except soundfile.SoundFileError as error:
            raise self.failed(at, error) from None


def _opened(content: Content, parts: Sequence[ByteRange] | None) -> _Unseekable:
    file: Any = content.file
    if parts is not None:
        file = SafeReader(io.BufferedReader(SplicedFile(file, parts), _BUFFER))  # type: ignore[arg-type]
    elif content.path is not None:
        file = os.fsencode(content.path)
    else:
        file.seek(0)
    try:
        return _Unseekable(file)
    except (soundfile.SoundFileError, TypeError) as error:
        raise unknown_format(content, error) from None


class _ChainedDecoder(AudioDecoder):
    """Several recordings in sequence in one file, of one rate and number of channels."""

    def __init__(self, content: Content, parts: Sequence[AudioDecoder]) -> None:
        kinds = list(dict.fromkeys((part.info.rate, part.info.channels) for part in parts))
        if len(kinds) > 1:
            listed = ", then ".join(f"{rate} Hz with {channels} channels" for rate, channels in kinds[:4])
            raise faults.joined(parts[0].name, listed)
        self.parts = parts
        known = all(part.slack is not None for part in parts)
        frames = sum(part.info.frames for part in parts) if known else 0
        super().__init__(content, replace(parts[0].info, frames=frames), 0 if known else None)
        for part in parts:
            part.levels = self.levels

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = 0
        for part in self.parts:
            known = part.slack is not None
            if stop is not None and at >= stop:
                return
            if known and at + part.info.frames <= start:
                at += part.info.frames
                continue
            begin = max(0, start - at) if known else 0
            at += begin
            for block in part.blocks(begin, None if stop is None else stop - at + begin):
                skip = min(max(0, start - at), len(block))
                at += len(block)
                if skip < len(block):
                    yield block[skip:]
