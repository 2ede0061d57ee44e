"""The input of a decoder (a path, bytes, an open file) and its format, recognised by its first bytes.

The suffix counts only where the bytes are unclear.
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
from typing import BinaryIO

from asit.audio import mpeg
from asit.audio.byte_ranges import ByteReader, VirtualFile, after_id3
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
"""Suffixes of files for FFmpeg, in lower case."""
MPEG_SUFFIXES = frozenset({".mp3", ".mp2", ".mp1", ".mpga"})
SNDFILE_SUFFIXES = MPEG_SUFFIXES | {
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".sph"),
}
"""Suffixes of files for libsndfile."""

HEADED = ("wav", "w64", "aiff", "au", "caf", "sphere")
"""Formats whose headers `asit.audio.pcm_headers` reads."""
BY_FFMPEG = ("adts", "mp4", "matroska", "asf", "amr", "wavpack")
"""Formats that FFmpeg reads; "adts" is also used for one of its suffixes where the bytes are unclear."""
_MAGIC = {
    **{b"fLaC": "flac", b"OggS": "ogg", b".snd": "au", b"dns.": "au", b"caff": "caf", b"NIST": "sphere"},
    **{b"\x1aE\xdf\xa3": "matroska", b"wvpk": "wavpack"},
}
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"pnot", b"styp")  # after the size at the beginning of an MPEG-4 file
_W64, _ASF = bytes.fromhex("726966662e91cf11"), bytes.fromhex("3026b2758e66cf11")
_HEAD = 64  # bytes
_IN_MEMORY = 1 << 26  # bytes of an unseekable stream; longer ones go to a temporary file


class SafeReader(VirtualFile):
    """An open binary file for libsndfile, which would print exceptions of its callbacks instead of raising them.

    The first exception is kept in `failure`, and the file ends there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size) or b""
        except Exception as error:  # whatever the caller's file raises
            self.failure = self.failure or error
            return b""

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            self._file.seek(offset, whence)
            return self._file.tell()
        except Exception as error:
            self.failure = self.failure or error
            return -1


@dataclass(frozen=True)
class Content:
    """The input of a decoder.

    Attributes:
        name: for messages.
        path: the file; None: bytes or an open file.
        file: open for reading.
        data: its bytes.
        head: the first of them.
        kind: the format: one of `HEADED` or `BY_FFMPEG`, "flac", "ogg", "mpeg", or "" if unknown.
        start: where the audio begins, after ID3 tags.
        suffix: in lower case; empty without a name.
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
        """The exception of the open file that was given, if any."""
        return self.file.failure if isinstance(self.file, SafeReader) else None


@contextmanager
def open_content(file: str | os.PathLike[str] | AudioBytes | BinaryIO, called: str | None = None) -> Iterator[Content]:
    """Open a path, bytes or an open file and recognise its format.

    An open file is read from its beginning, stays open and is reset to its position; an unseekable one is first copied
    to memory or a temporary file.

    Args:
        file: the input.
        called: name of the bytes or open file, such as a member of a tar, for messages; its suffix is used too.

    Raises:
        AudioFileError: missing, a folder, or unreadable.
    """
    if isinstance(file, str | os.PathLike):
        if not os.fspath(file):  # Path("") is the current folder
            raise AudioFileError("missing", "an empty path", "a recording", "correct the path")
        path = Path(local_files.locate(os.fspath(file)))
        with _opened(path) as opened:
            if local_files.special(path) == "a pipe":  # such as /dev/stdin
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
    """Return a name for messages: the path, or a description."""
    if isinstance(file, str | os.PathLike):
        return os.fspath(file)
    if isinstance(file, bytes | bytearray | memoryview):
        size = memoryview(file).nbytes
        if size < 1000:
            return f"the {size} bytes given"
        return f"the {f'{size / 1000:.0f} kB' if size < 1e6 else f'{size / 1e6:.1f} MB'} of bytes given"
    name = getattr(file, "name", None)
    return f"the open file {name}" if isinstance(name, str) else f"the {type(file).__name__} given"


def kind_of(file: ByteReader, suffix: str = "") -> tuple[str, int]:
    """Return the format of a file, as `Content.kind`, and where it begins; unclear bytes leave it to the suffix."""
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
    """Whether FFmpeg reads this file: the MPEG-4 family, Matroska, raw AAC and others."""
    return kind_of(ByteReader(io.BytesIO(body)))[0] in BY_FFMPEG


def unknown_format(content: Content, error: Exception, decoder: str = "libsndfile") -> AudioFileError:
    """Make the error about a file that its decoder does not recognise."""
    head, suffix = content.head, content.suffix
    if not head:
        return AudioFileError("empty", f"{content.name} has no bytes", "a recording", "fetch it again, or leave it out")
    begins = "begins with the bytes " + head[:8].hex(" ")
    remedy = "fetch or convert it again, or leave it out"
    if head.lstrip().startswith(b"<"):
        begins, remedy = "is a web page or XML", "fetch it again; a server may have sent an error page"
    elif content.path is None and not suffix:
        remedy = "give the complete bytes of an audio file, or samples as an array with rate="
    named = content.path is not None or suffix
    known = f"audio, by its name ({suffix or 'no suffix'})" if named else "the bytes of a file"
    return AudioFileError("unreadable", f"{content.name} {begins}; {decoder} says: {error_text(error)}", known, remedy)


def error_text(error: Exception) -> str:
    """Return the decoder's message, without the path that soundfile puts before it."""
    return (getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)).strip()


def _content(name: str, path: Path | None, file: SafeReader | BinaryIO, suffix: str) -> Content:
    try:
        data = ByteReader(file)
        head = data.at(0, _HEAD)
        kind, start = kind_of(data, suffix)
    except OSError as error:
        raise unreadable(name, error) from None
    return Content(name=name, path=path, file=file, data=data, head=head, kind=kind, start=start, suffix=suffix)


def unreadable(name: str, error: Exception) -> AudioFileError:
    """Make the error about a file that opens and cannot be read."""
    remedy = "check its disk or network, and open it again"
    return AudioFileError("unreadable", f"{name} cannot be read: {error_text(error)}", "a readable file", remedy)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, or a pipe with a writer, for reading."""
    try:
        file = local_files.open_file(path, pipes=True)
    except FileNotFoundError:
        remedy = "correct the path, or build the catalogue again"
        raise AudioFileError("missing", f"{path} does not exist", "a recording", remedy) from None
    except OSError as error:
        remedy = "name a file in it" if path.is_dir() else "check its permissions and its disk"
        raise AudioFileError("unreadable", f"{path}: {error.strerror}", "a readable file", remedy) from None
    except ValueError as error:  # a zero byte in the name
        raise AudioFileError("missing", f"{path!r}: {error}", "a path", "correct the path") from None
    with file:
        yield file  # type: ignore[misc]


@contextmanager
def _rewound(file: BinaryIO, name: str) -> Iterator[SafeReader]:
    text = False
    try:
        position = file.tell() if file.seekable() else None
        if position is not None:
            file.seek(0)
            text = not isinstance(file.read(0), bytes)
    except Exception as error:  # whatever the caller's file raises
        raise unreadable(name, error) from None
    if text:
        raise AudioFileError("unreadable", f"{name} gives text", "a file opened as bytes", 'open it with "rb"')
    if position is not None:
        try:
            yield SafeReader(file)
        finally:
            if not file.closed:
                file.seek(position)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as kept:
        try:
            shutil.copyfileobj(file, kept)
        except (OSError, ValueError, TypeError) as error:
            raise unreadable(name, error) from None
        kept.seek(0)
        yield SafeReader(kept)  # type: ignore[arg-type]
