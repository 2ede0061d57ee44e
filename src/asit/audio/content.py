"""What is handed to a decoder (a path, bytes, an open file), which decoder its content asks for, why it is no audio.

Which decoder reads a file is told by its suffix, where it has one that is known, and else by its first bytes.
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
from typing import Any, BinaryIO, Literal

from asit import disk
from asit.errors import AudioError

Reason = Literal["missing", "unreadable", "empty", "truncated", "non-finite", "silent"]
AudioBytes = bytes | bytearray | memoryview
"""The content of an audio file in memory."""

AV_SUFFIXES = frozenset({".m4a", ".aac", ".mp4", ".webm"})
"""Names that FFmpeg reads, in lower case; libsndfile reads all others."""
SNDFILE_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".ogg", ".opus"})
"""Names that libsndfile reads; a file of any other name goes by its content."""

_MAGIC = {
    b"RIFF": (".wav",),
    b"fLaC": (".flac",),
    b"OggS": (".ogg", ".opus"),
    b"ftyp": (".m4a", ".mp4"),
    b"\x1aE\xdf\xa3": (".webm",),
}
_HEAD = 64  # bytes
_IN_MEMORY = 1 << 26  # bytes of a stream that cannot seek, above which they go to a temporary file


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


class Handle(io.RawIOBase):
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
        handle: bytes or an open file; None: the file at `path`.
        head: its first bytes.
        ffmpeg: whether FFmpeg reads it, and else libsndfile.
        suffix: of its name, in lower case; empty where there is no name.
    """

    name: str
    path: Path | None
    handle: Handle | None
    head: bytes
    ffmpeg: bool
    suffix: str

    @contextmanager
    def bytes_from_start(self) -> Iterator[BinaryIO | Handle]:
        """The bytes, from the first one; a decoder that reads the same handle finds it where it was."""
        if self.handle is None:
            assert self.path is not None
            with disk.open_file(self.path) as file:
                yield file
            return
        place = self.handle.tell()
        self.handle.seek(0)
        try:
            yield self.handle
        finally:
            self.handle.seek(place)


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
        path = Path(disk.locate(os.fspath(file)))
        if disk.special(path) == "a pipe":  # such as /dev/stdin behind another command
            with _opened(path) as pipe, _rewound(pipe, str(path)) as handle:
                yield _content(str(path), None, handle, _head_of(handle), "")
            return
        yield _content(str(path), path, None, _first_bytes(path), path.suffix.lower())
        return
    name = name_of(file) if called is None else called
    suffix = "" if called is None else Path(called).suffix.lower()
    if isinstance(file, bytes | bytearray | memoryview):
        handle = Handle(io.BytesIO(file))
        yield _content(name, None, handle, _head_of(handle), suffix)
        return
    with _rewound(file, name) as handle:
        yield _content(name, None, handle, _head_of(handle), suffix)


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


def by_content(head: bytes) -> bool:
    """Whether the first bytes are those of a file that FFmpeg reads here: the MPEG-4 family, WebM, raw AAC."""
    adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0  # its layer bits are 0; those of MP3 are not
    return adts or head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3"


def not_audio(content: Content, error: Exception) -> AudioFileError:
    """The error about a file that its decoder cannot make anything of."""
    head, suffix = content.head, content.suffix
    if not head:
        return AudioFileError("empty", f"{content.name} has no bytes", "a recording", "fetch it anew, or leave it out")
    begins = "begins with the bytes " + head[:8].hex(" ")
    remedy = "fetch or convert it anew, or leave it out"
    suits = next((suffixes for magic, suffixes in _MAGIC.items() if magic in (head[:4], head[4:8])), None)
    if suits is not None and suffix and suffix not in suits:
        begins, remedy = f"has the contents of a {suits[0]} file", f"rename it to {suits[0]}"
    elif head.lstrip().startswith(b"<"):
        begins, remedy = "is a web page or XML", "fetch it anew: a server may have sent an error page"
    elif content.path is None and not suffix:
        remedy = "give the whole content of an audio file; samples go in as an array with rate="
    known = (
        f"audio as its name says ({suffix or 'no suffix'})"
        if content.path is not None or suffix
        else "the bytes of a file"
    )
    return AudioFileError(
        "unreadable",
        f"{content.name} {begins}; {'FFmpeg' if content.ffmpeg else 'libsndfile'} says: {words(error)}",
        known,
        remedy,
    )


def words(error: Exception) -> str:
    """The decoder's own words, without the path that soundfile puts in front of them."""
    return (getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)).strip()


def _content(name: str, path: Path | None, handle: Handle | None, head: bytes, suffix: str) -> Content:
    named = suffix in AV_SUFFIXES or suffix in SNDFILE_SUFFIXES
    return Content(name, path, handle, head, suffix in AV_SUFFIXES if named else by_content(head), suffix)


def _first_bytes(path: Path) -> bytes:
    with _opened(path) as file:
        try:
            return file.read(_HEAD)
        except OSError as error:
            raise AudioFileError(
                "unreadable", f"{path}: {error.strerror}", "a readable file", "see to its disk"
            ) from None


def _opened(path: Path) -> BinaryIO:
    """The file, or a pipe that is written to, open for reading."""
    try:
        return disk.open_file(path, pipes=True)
    except FileNotFoundError:
        raise AudioFileError(
            "missing", f"{path} does not exist", "a recording", "correct the path, or make the catalogue anew"
        ) from None
    except OSError as error:
        remedy = "name a file in it" if path.is_dir() else "see to its permissions and its disk"
        raise AudioFileError("unreadable", f"{path}: {error.strerror}", "a readable file", remedy) from None
    except ValueError as error:  # a zero byte in the name
        raise AudioFileError("missing", f"{path!r}: {error}", "a path", "correct the path") from None


def _head_of(handle: Handle) -> bytes:
    head = handle.read(_HEAD)
    handle.seek(0)
    return head


@contextmanager
def _rewound(file: BinaryIO, name: str) -> Iterator[Handle]:
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
            "unreadable", f"{name} cannot be read: {words(error)}", "an open file", "open it for reading, as bytes"
        ) from None
    if place is not None:
        try:
            yield Handle(file)
        finally:
            if not file.closed:
                file.seek(place)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as kept:
        try:
            shutil.copyfileobj(file, kept)
        except (OSError, ValueError, TypeError) as error:
            raise AudioFileError(
                "unreadable", f"{name} cannot be read: {words(error)}", "bytes up to its end", "read it and give bytes"
            ) from None
        kept.seek(0)
        yield Handle(kept)  # type: ignore[arg-type]
