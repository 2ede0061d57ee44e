"""The decoders behind `asit.audio.files`: which one reads a file, and what it is given where the header is wrong.

One decoder for each format, since decoders disagree on where a compressed recording begins: libsndfile (by soundfile)
reads WAV, FLAC, MP3, Ogg and what else it knows; the MPEG-4 family, Matroska, raw AAC, WMA and AMR go to FFmpeg
(`asit.audio.ffmpeg`). The first bytes tell which it is. Time zero of a recording is where its encoder's own note puts
it (the delay in a LAME tag, Opus' pre-skip, an edit list); where there is none, as in MP3 without a tag, it is the
first sample that comes out of the decoder.

libsndfile stops at the length that a header says or that it guesses, so headers are held against the file first
(`asit.audio.pcm_headers`, `mpeg`, `ogg`); where they are wrong, libsndfile reads a corrected one before the same bytes.

Every call opens its own decoder, so threads share nothing. libmpg123, inside libsndfile, writes notes on odd MP3 files
to the standard error by itself. It has no switch for that, and turning the descriptor away would silence the other
threads too, so this module leaves it as it is: a process that decodes and nothing else may do it.

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
from asit.audio.byte_ranges import Bytes, Spliced, Stretch
from asit.audio.decoder import AudioInfo, Source
from asit.audio.faults import AudioFileError, Wave
from asit.audio.sniff import (
    AV_SUFFIXES,
    BY_FFMPEG,
    HEADED,
    SNDFILE_SUFFIXES,
    AudioBytes,
    Content,
    Handle,
    cannot_be_read,
    not_audio,
    open_content,
)

__all__ = ["AV_SUFFIXES", "SNDFILE_SUFFIXES", "AudioFileError", "AudioInfo", "Source", "Wave", "open_audio"]

T = TypeVar("T")

_BLOCK = 1 << 16  # samples decoded at a time, of up to eight channels
# Samples decoded and thrown away after a seek. MP3 frames borrow bits from up to some ten frames before, and Vorbis
# blocks overlap.
_RUN_UP = {"MP3/MPEG_LAYER_III": 16384, "OGG/VORBIS": 16384}
_BUFFER = 1 << 16  # bytes of a file with a corrected header that are read at once
_UNKNOWN = 1 << 62  # libsndfile says so many samples, and more, of a FLAC whose encoder could not go back to its header


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
        try:
            source = _open(content)
        except OSError as error:
            raise cannot_be_read(content.name, error) from None
        except AudioFileError:
            if content.failure is not None:
                raise cannot_be_read(content.name, content.failure) from content.failure
            raise
        with closing(source):
            if source.info.frames <= 0 and source.slack is not None:
                raise faults.empty(source.name)
            yield source


def _open(content: Content) -> Source:
    if content.kind in BY_FFMPEG:
        return _by_ffmpeg(content)
    if content.kind in HEADED:
        return _open_headed(content)
    if content.kind == "mpeg":
        return _open_mpeg(content, _looked(content, mpeg.stream, content.start))
    if content.kind == "ogg":
        return _open_ogg(content, _looked(content, ogg.links))
    if content.kind == "flac":
        return _chained(content, _looked(content, flac.recordings, content.start))
    return _SoundFileSource(content)


def _by_ffmpeg(content: Content) -> Source:
    from asit.audio.ffmpeg import FFmpegSource

    return FFmpegSource(content)


def _open_headed(content: Content) -> Source:
    file, before = content.data, content.start
    if before:  # behind a tag
        file = Bytes(Spliced(content.file, ((before, file.size - before),)))
    found = pcm_headers.look(content.kind, file)
    if found is None:
        return _SoundFileSource(content, ((before, file.size),) if before else None)
    if found.joined is not None:
        raise faults.joined(content.name, f"another one begins at byte {before + found.joined}")
    if found.by_ffmpeg:
        return _by_ffmpeg(content)
    start = before + found.start
    if found.tag == pcm_headers.MP3_IN_WAV and found.size:
        inner = Bytes(Spliced(content.file, ((start, found.size),)))
        stream = mpeg.stream(inner, 0)
        if stream is not None:
            stream = replace(stream, parts=_moved(stream.parts or ((0, found.size),), start))
            return _open_mpeg(content, stream, "WAV/MPEG_LAYER_III", found.promised)
    parts = found.parts and _moved(found.parts, before)
    if parts is None and before:
        parts = ((before, file.size),)
    source = _SoundFileSource(content, parts)
    if found.promised is not None:
        promised, held = found.promised, found.size
        frames = source.info.frames
        whole = promised // found.block if held // found.block == frames else frames * promised // max(1, held)
        source.close()
        raise faults.truncated(source.name, source.info.frames, whole, source.info.rate)
    return source


def _open_mpeg(
    content: Content, stream: mpeg.Stream | None, label: str | None = None, promised: int | None = None
) -> Source:
    if stream is None:
        return _SoundFileSource(content)
    first = stream.first
    if stream.other is not None:
        raise faults.joined(content.name, f"after {first.rate} Hz come frames of {stream.other}")
    if stream.uneven:  # libsndfile guesses the length of layers I and II by the first frame, and stops there
        return _by_ffmpeg(content)
    source = _SoundFileSource(content, stream.parts, label, round(0.1 * first.rate))
    if stream.frames is not None and stream.promised is not None and stream.frames < stream.promised - 1:
        source.close()
        count, whole = stream.frames * first.samples, stream.promised * first.samples
        raise faults.truncated(source.name, count, whole, first.rate)
    if promised is not None:
        source.close()
        raise faults.cut_off(source.name, f"its samples, which have {promised} bytes by its header")
    return source


def _open_ogg(content: Content, links: ogg.Links) -> Source:
    found = links.found
    if not found:
        if links.others:
            names = ", ".join(sorted(set(links.others)))
            raise AudioFileError(
                "unreadable", f"{content.name} has no sound in it, but {names}", "a stream of sound", "leave it out"
            )
        return _SoundFileSource(content)
    if any(link.codec == "speex" for link in found):
        return _by_ffmpeg(content)
    if links.cut:
        raise faults.cut_off(f"{content.name} (OGG/{found[0].codec.upper()})", "a page of Ogg")
    return _chained(content, [link.parts for link in found], "OGG/FLAC" if found[0].codec == "flac" else None)


def _chained(content: Content, recordings: Sequence[Sequence[Stretch]], label: str | None = None) -> Source:
    """One recording, or several of them behind each other, each given as its parts."""
    if len(recordings) > faults.RECORDINGS:
        raise faults.joined(content.name, f"more than {faults.RECORDINGS}")
    sources = list[Source]()
    try:
        for parts in recordings:
            plain = list(parts) == [(0, content.data.size)]
            sources.append(_SoundFileSource(content, None if plain else parts, label))
        return sources[0] if len(sources) == 1 else _Chain(content, sources)
    except BaseException:
        for source in sources:
            source.close()
        raise


def _moved(parts: Sequence[Stretch], by: int) -> tuple[Stretch, ...]:
    return tuple(part if isinstance(part, bytes) else (part[0] + by, part[1]) for part in parts)


def _looked(content: Content, look: Callable[..., T], *more: Any) -> T:
    """What a look through all of a file finds, kept for files that have not changed since."""
    if content.path is None:
        return look(content.data, *more)
    status = os.stat(content.path)  # noqa: PTH116
    found: T = _kept(os.fspath(content.path), status.st_size, status.st_mtime_ns, look, *more)
    return found


@functools.lru_cache(maxsize=256)
def _kept(path: str, size: int, mtime_ns: int, look: Callable[..., Any], *more: Any) -> Any:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        return look(Bytes(file), *more)


class _OneWay(soundfile.SoundFile):
    """Reads on without a seek.

    soundfile seeks to where it stands after each read of a seekable file; in MP3 that throws the decoder's bits away
    and the next block begins with up to some 3,000 wrong samples.
    """

    def seekable(self) -> bool:
        return False


class _SoundFileSource(Source):
    """A file open in libsndfile.

    Args:
        content: the file.
        parts: what is read in its place; None: the file as it is.
        label: container and codec; None: as libsndfile says.
        slack: as of `Source`.
    """

    def __init__(
        self, content: Content, parts: Sequence[Stretch] | None = None, label: str | None = None, slack: int = 0
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
            if not soundfile.SoundFile.seekable(self.file):  # a codec that has no seek, such as GSM 06.10
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
            raise self.gave_up(at, error) from None


def _opened(content: Content, parts: Sequence[Stretch] | None) -> _OneWay:
    file: Any = content.file
    if parts is not None:
        file = Handle(io.BufferedReader(Spliced(file, parts), _BUFFER))  # type: ignore[arg-type]
    elif content.path is not None:
        file = os.fsencode(content.path)
    else:
        file.seek(0)
    try:
        return _OneWay(file)
    except (soundfile.SoundFileError, TypeError) as error:
        raise not_audio(content, error) from None


class _Chain(Source):
    """Several recordings in one file, one behind the other.

    Raises:
        AudioFileError: their rates or channels differ.
    """

    def __init__(self, content: Content, sources: Sequence[Source]) -> None:
        kinds = list(dict.fromkeys((source.info.rate, source.info.channels) for source in sources))
        if len(kinds) > 1:
            listed = ", then ".join(f"{rate} Hz with {channels} channels" for rate, channels in kinds[:4])
            raise faults.joined(sources[0].name, listed)
        self.sources = sources
        known = all(source.slack is not None for source in sources)
        frames = sum(source.info.frames for source in sources) if known else 0
        super().__init__(content, replace(sources[0].info, frames=frames), 0 if known else None)
        for source in sources:
            source.levels = self.levels

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        at = 0
        for source in self.sources:
            known = source.slack is not None
            if stop is not None and at >= stop:
                return
            if known and at + source.info.frames <= start:
                at += source.info.frames
                continue
            begin = max(0, start - at) if known else 0
            at += begin
            for block in source.blocks(begin, None if stop is None else stop - at + begin):
                skip = min(max(0, start - at), len(block))
                at += len(block)
                if skip < len(block):
                    yield block[skip:]
