"""Local files kept open for reads at any place in them: a few descriptors, safe for threads and after a fork."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict

from asit.io import local_files

_MOST = 64
"""Files that a process keeps open."""


class Descriptors:
    """Descriptors of local files, the least used of which is closed when there are too many."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: OrderedDict[str, _File] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        with self.lock:
            file = self.held.pop(path, None) or _File(path)
            self.held[path] = file
            file.readers += 1
            dropped = [self.held.pop(next(iter(self.held)))] if len(self.held) > _MOST else []
        try:
            return file.read(offset, size)
        except OSError:
            with self.lock:
                if self.held.get(path) is file:
                    dropped.append(self.held.pop(path))
            raise
        finally:
            with self.lock:
                file.readers -= 1
                for each in [*dropped, file]:
                    each.close_unless(self.held)


class _File:
    """One open local file. A forked process shares its descriptor, which pread can bear: it moves no position."""

    def __init__(self, path: str) -> None:
        self.path, self.readers, self.open = path, 0, True
        # A number and no file object: what is still open at the end is no leak to warn of.
        with local_files.open_file(path) as file:
            self.number = os.dup(file.fileno())
        self.alone = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._some(offset, size)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.number, size, offset)
        with self.alone:
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, size)

    def close_unless(self, held: OrderedDict[str, _File]) -> None:
        if self.open and not self.readers and held.get(self.path) is not self:
            self.open = False  # once: the number is another file's soon
            os.close(self.number)


_held = Descriptors()


def read_local(path: str, offset: int, size: int) -> bytes:
    """The bytes of a local file from `offset` on, `size` or, where it ends before, fewer.

    Raises:
        OSError: it cannot be opened or read.
    """
    return _held.read(path, offset, size)


def _anew() -> None:
    # A lock that another thread held at the fork would stay held in the child, whose only thread is this one.
    global _held
    before, _held = _held, Descriptors()
    for file in [*before.held.values()]:
        os.close(file.number)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)
