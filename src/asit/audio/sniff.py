"""What is handed to a decoder (a path, bytes, an open file), what its first bytes say it is, and why it is no audio.

The bytes decide which decoder reads a file, whatever its name; the name counts only where they are unclear.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from asit.audio import mpeg
from asit.audio.byte_ranges import ByteReader, after_id3
from asit.audio.faults import AudioFileError
from asit.io import local_files

AudioBytes = bytes | bytearray | memoryview
"""The content of an audio file in memory."""

AV_SUFFIXES = frozenset(
    (
        *(".m4a", ".m4b", ".mp4", ".mov", ".3gp", ".3g2", ".aac", ".webm", ".mka", ".mkv"),
        *(".wma", ".amr", ".spx", ".wv"),
    )
)
"""Names of what FFmpeg reads, in lower case."""
MPEG_SUFFIXES = frozenset({".mp3", ".mp2", ".mp1", ".mpga"})
SNDFILE_SUFFIXES = MPEG_SUFFIXES | {
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".sph"),
}
"""Names of what libsndfile reads; a file of any other name goes by its content."""

HEADED = ("wav", "w64", "aiff", "au", "caf", "sphere")
"""Kinds of files whose headers `asit.audio.pcm_headers` reads."""
BY_FFMPEG = ("adts", "mp4", "matroska", "asf", "amr", "wavpack")
"""Kinds of files that FFmpeg reads; "adts" also stands for a name of its, where the bytes are unclear."""
_MAGIC = {
    **{b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"dns.": "au", b"caff": "caf", b"NIST": "sphere"},
    **{b"\x1aE\xdf\xa3": "matroska", b"wvpk": "wavpack"},
}
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"pnot", b"styp")  # after a size, at the beginning of an MPEG-4 file
_W64, _ASF = bytes.fromhex("726966662e91cf11"), bytes.fromhex("3026b2758e66cf11")
_HEAD = 64  # bytes
_IN_MEMORY = 1 << 26  # bytes of a stream that cannot seek, above which they go to a temporary file


class SafeReader(io.RawIOBase):
    """An open binary file, read from its beginning whatever its position was, for decoders that call back.

    libsndfile is called from C, where an exception of the file would only be printed: it is kept in `failure` and the
    file ends there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size) or b""
        except Exception as error:  # whatever a stranger's file raises
            self.failure = self.failure or error
            return b""

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            self._file.seek(offset, whence)
            return self._file.tell()
        except Exception as error:
            self.failure = self.failure or error
            return -1

    def tell(self) -> int:
        return self.seek(0, os.SEEK_CUR)


@dataclass(frozen=True)
class Content:
    """What to decode.

    Attributes:
        name: for messages.
        path: the file; None: bytes or an open file.
        file: open to be read.
        data: its bytes.
        head: the first of them.
        kind: what they say it is: one of `HEADED` or `BY_FFMPEG`, "flac", "ogg", "mpeg", or "" where they say nothing.
        start: where it begins, behind tags of ID3.
        suffix: of its name, in lower case; empty where there is no name.
    """

    name: str
    path: Path | None
    file: SafeReader | BinaryIO
    data: ByteReader
    head: bytes
    kind: str
    start: int
    suffix: str

    @property
    def failure(self) -> Exception | None:
        """Why the bytes that were given, or the open file, did not come."""
        return self.file.failure if isinstance(self.file, SafeReader) else None


@contextmanager
def open_content(file: str | os.PathLike[str] | AudioBytes | BinaryIO, called: str | None = None) -> Iterator[Content]:
    """A path, bytes or an open file, looked at so far that its decoder is known.

    An open file is read from its beginning, stays open and is put back to where it stood; one that cannot seek is read
    to its end first, into memory or a temporary file.

    Args:
        file: what to look at.
        called: the name of what the bytes or the open file hold, such as a member of a tar: messages tell it, and its
            suffix chooses the decoder as a path's does.

    Raises:
        AudioFileError: missing, a folder, not readable, or without bytes.
    """
    if isinstance(file, str | os.PathLike):
        if not os.fspath(file):  # a Path of it would be the current folder
            raise AudioFileError("missing", "a path without a character", "a recording", "correct the path")
        path = Path(local_files.locate(os.fspath(file)))
        with _opened(path) as opened:
            if local_files.special(path) == "a pipe":  # such as /dev/stdin behind another command
                with _rewound(opened, str(path)) as handle:
                    yield _content(str(path), None, handle, "")
            else:
                yield _content(str(path), path, opened, path.suffix.lower())
        return
    name = name_of(file) if called is None else called
    suffix = "" if called is None else Path(called).suffix.lower()
    if isinstance(file, bytes | bytearray | memoryview):
        yield _content(name, None, SafeReader(io.BytesIO(file)), suffix)
        return
    with _rewound(file, name) as handle:
        yield _content(name, None, handle, suffix)


def name_of(file: object) -> str:
    """What messages call a file: its path, or what kind of thing it is."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    if isinstance(file, bytes | bytearray | memoryview):
        size = memoryview(file).nbytes
        told = f"{size} bytes" if size < 1000 else f"{size / 1000:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"
        return f"the {told} given" if size < 1000 else f"the {told} of bytes given"
    name = getattr(file, "name", None)
    return f"the open file {name}" if isinstance(name, str) else f"the {type(file).__name__} given"


def kind_of(file: ByteReader, suffix: str = "") -> tuple[str, int]:
    """What the first bytes say a file is, as `Content.kind`, and where it begins.

    Args:
        file: its bytes.
        suffix: of its name, which decides where they say nothing clear.
    """
    start = after_id3(file)
    head = file.at(start, 16)
    kind = _MAGIC.get(head[:4], "")
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        kind = "wav"
    elif head[:4] == b"FORM" and head[8:11] == b"AIF":
        kind = "aiff"
    elif head[:8] in (_W64, _ASF):
        kind = "w64" if head[:8] == _W64 else "asf"
    elif head[4:8] in _BOXES:
        kind = "mp4"
    elif head[:5] == b"#!AMR":
        kind = "amr"
    elif not kind and (found := mpeg.begins(file, start)) is not None:
        kind = "mpeg" if found.layer else "adts"
    elif not kind and suffix in AV_SUFFIXES:
        kind = "adts"
    elif not kind and (suffix in MPEG_SUFFIXES or start):
        kind = "mpeg"
    return kind, start


def by_ffmpeg(body: bytes) -> bool:
    """Whether these are the bytes of a file that FFmpeg reads here: the MPEG-4 family, Matroska, raw AAC and others."""
    return kind_of(ByteReader(io.BytesIO(body)))[0] in BY_FFMPEG


def unknown_format(content: Content, error: Exception, decoder: str = "libsndfile") -> AudioFileError:
    """The error about a file that its decoder cannot make anything of."""
    head, suffix = content.head, content.suffix
    if not head:
        return AudioFileError("empty", f"{content.name} has no bytes", "a recording", "fetch it again, or leave it out")
    begins = "begins with the bytes " + head[:8].hex(" ")
    remedy = "fetch or convert it again, or leave it out"
    if head.lstrip().startswith(b"<"):
        begins, remedy = "is a web page or XML", "fetch it again: a server may have sent an error page"
    elif content.path is None and not suffix:
        remedy = "give the whole content of an audio file; samples go in as an array with rate="
    named = content.path is not None or suffix
    known = f"audio as its name says ({suffix or 'no suffix'})" if named else "the bytes of a file"
    return AudioFileError("unreadable", f"{content.name} {begins}; {decoder} says: {error_text(error)}", known, remedy)


def error_text(error: Exception) -> str:
    """The decoder's own words, without the path that soundfile puts in front of them."""
    return (getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)).strip()


def _content(name: str, path: Path | None, file: SafeReader | BinaryIO, suffix: str) -> Content:
    try:
        data = ByteReader(file)
        head = data.at(0, _HEAD)
        kind, start = kind_of(data, suffix)
    except OSError as error:
        raise unreadable(name, error) from None
    return Content(name, path, file, data, head, kind, start, suffix)


def unreadable(name: str, error: Exception) -> AudioFileError:
    """The error about a file that opens, and whose bytes do not come."""
    remedy = "see to its disk or network, and open it again"
    return AudioFileError("unreadable", f"{name} cannot be read: {error_text(error)}", "a readable file", remedy)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, or a pipe that is written to, open for reading."""
    try:
        file = local_files.open_file(path, pipes=True)
    except FileNotFoundError:
        raise AudioFileError(
            "missing", f"{path} does not exist", "a recording", "correct the path, or make the catalogue anew"
        ) from None
    except OSError as error:
        remedy = "name a file in it" if path.is_dir() else "see to its permissions and its disk"
        raise AudioFileError("unreadable", f"{path}: {error.strerror}", "a readable file", remedy) from None
    except ValueError as error:  # a zero byte in the name
        raise AudioFileError("missing", f"{path!r}: {error}", "a path", "correct the path") from None
    with file:
        yield file  # type: ignore[misc]


@contextmanager
def _rewound(file: BinaryIO, name: str) -> Iterator[SafeReader]:
    try:
        place = file.tell() if file.seekable() else None
        if place is not None:
            file.seek(0)
            if not isinstance(file.read(0), bytes):
                raise AudioFileError("unreadable", f"{name} gives text", "a file opened as bytes", 'open it with "rb"')
    except AudioFileError:
        raise
    except Exception as error:  # whatever a stranger's file raises
        raise AudioFileError(
            "unreadable", f"{name} cannot be read: {error_text(error)}", "an open file", "open it for reading, as bytes"
        ) from None
    if place is not None:
        try:
            yield SafeReader(file)
        finally:
            if not file.closed:
                file.seek(place)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as kept:
        try:
            shutil.copyfileobj(file, kept)
        except (OSError, ValueError, TypeError) as error:
            raise AudioFileError(
                "unreadable",
                f"{name} cannot be read: {error_text(error)}",
                "bytes up to its end",
                "read it and give bytes",
            ) from None
        kept.seek(0)
        yield SafeReader(kept)  # type: ignore[arg-type]
