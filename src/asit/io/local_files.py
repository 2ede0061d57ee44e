"""Local files: found under any spelling of their name, opened without waiting for a pipe, read at any offset."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH111, PTH116, PTH117, PTH118, PTH206

from __future__ import annotations

import errno
import functools
import hashlib
import io
import os
import select
import stat
import unicodedata
from pathlib import Path, PurePath
from typing import BinaryIO, TextIO

_GRACE = 1000  # ms within which a pipe must have a writer
_MOST_OPEN = 64  # files that `read_at` keeps open

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

PICKLED = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
"""Suffixes of files of weights that `asit.io.safe_load` can read."""


def cache_folder(name: str) -> Path:
    """Return `asit/NAME` under XDG_CACHE_HOME, or under ~/.cache (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "asit" / name


def file_name(text: str, most: int = 200) -> str:
    """Return a text as the name of a file: separators are replaced, and its beginning is cut above `most` bytes."""
    flat = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in text).lstrip(".") or "sound"
    while len(flat.encode(errors="surrogateescape")) > most:
        flat = flat[1:]
    return flat


def relative_stem(name: str) -> PurePath:
    """Return a recording's name without its suffix; of one that is not below the current folder, the last part."""
    stem = PurePath(name).with_suffix("")
    return PurePath(stem.name) if stem.is_absolute() or ".." in stem.parts else stem


def special(path: str | os.PathLike[str]) -> str | None:
    """Return "a pipe", "a socket" or "a device"; None for a file or folder, or where nothing exists."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return None


def open_file(path: str | os.PathLike[str], *, pipes: bool = False) -> BinaryIO:
    """Open a regular file for reading; refuse pipes (FIFOs) and devices, which may block or have no end.

    Args:
        path: the file.
        pipes: accept a pipe that has a writer, such as /dev/stdin behind another command.

    Raises:
        OSError: as `open`; or a device, a socket, a pipe, or with `pipes` a pipe that nothing writes to for a second.
    """
    kind = special(path)
    if kind is not None and not (pipes and kind == "a pipe"):
        raise _unsuitable(f"{kind}, not a regular file", path)
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    number = os.open(path, flags)
    try:
        kind = _KINDS.get(stat.S_IFMT(os.fstat(number).st_mode))  # it may have been replaced since
        if kind == "a pipe" and pipes:
            _await_writer(number, path)
        elif kind is not None:
            raise _unsuitable(f"{kind}, not a regular file", path)
        elif stat.S_ISDIR(os.fstat(number).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def open_text(path: str | os.PathLike[str], encoding: str = "utf-8", newline: str | None = None) -> TextIO:
    """Open a regular file for reading text, decoded strictly; see `open_file`."""
    return io.TextIOWrapper(open_file(path), encoding, newline=newline)


class _OpenFile:
    """A descriptor that is closed with its last reference. A forked process may share it: pread moves no position."""

    def __init__(self, path: str) -> None:
        with open_file(path) as file:
            self.number = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_open_files = functools.lru_cache(_MOST_OPEN)(_OpenFile)


def read_at(path: str, offset: int, size: int) -> bytes:
    """Read `size` bytes from `offset` on, fewer where the file ends before. The file stays open for the next read.

    Raises:
        OSError: it cannot be opened or read.
    """
    if not hasattr(os, "pread"):
        with open_file(path) as opened:
            opened.seek(offset)
            return opened.read(size)
    file, parts = _open_files(path), []
    try:
        while size > 0 and (part := os.pread(file.number, size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
    except OSError:
        _open_files.cache_clear()
        raise
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _await_writer(number: int, path: str | os.PathLike[str]) -> None:
    """Wait until something is written into a pipe; raise where there is no writer."""
    waiting = select.poll()
    waiting.register(number, select.POLLIN)
    if not waiting.poll(_GRACE):
        # A pipe that never had a writer looks like one whose writer is slow; only one that lost its last is hung up.
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        if any(event & select.POLLHUP and not event & select.POLLIN for _, event in waiting.poll(0)):
            raise _unsuitable("a pipe that nothing writes to", path)
    os.set_blocking(number, True)


def _unsuitable(what: str, path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, f"it is {what}", os.fspath(path))


def locate(path: str, folder: str = "") -> str:
    """Return the path as it is spelt on the disk, below `folder` where it is relative.

    The first of these that exists: the path as given; with the user's folder for a leading "~"; with "/" for each
    backslash; each part in the Unicode forms NFC and NFD, since one disk keeps "é" as one character and another as two.
    Where none exists, the path as given. Only a path with such characters is looked up at all.
    """
    given = os.path.join(folder, path)
    if (path.isascii() and "\\" not in path and not path.startswith("~")) or os.path.lexists(given):
        return given
    spellings = [path, path.replace("\\", "/")] if os.sep == "/" else [path]
    for spelling in spellings:
        if (found := _spelt(os.path.expanduser(spelling), folder)) is not None:
            return found
    return given


def _spelt(path: str, folder: str) -> str | None:
    """Return the path with each part as the disk spells it; None where a part does not exist in any form."""
    at = os.sep if path.startswith(os.sep) else folder
    for part in path.split(os.sep):
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        found = next((full for form in forms if os.path.lexists(full := os.path.join(at, form))), None)
        if found is None:
            return None
        at = found
    return at


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
