"""Lock files: one run at a time in a folder (RUN/run.lock), one writer at a time of an output (.OUT.lock).

The system releases its lock on the file (flock) when the holder dies, on network file systems also for other machines,
so a killed process never blocks the next one. Where there are no such locks, the file itself is the lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from asit.errors import ConfigError
from asit.io import parsing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class InUseError(ConfigError):
    """A live process has the lock."""


NAME = "run.lock"
"""Of the lock in a run's folder."""
_MOST = 4096  # bytes of a lock file
_open: set[int] = set()
"""Descriptors of the lock files that this process holds."""


def held(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the folder `out` for a run; it is made where it is missing, and removed again if it stays empty.

    Raises:
        InUseError: a live run has it, on this machine or another.
    """
    return _locked(out / NAME, out, "in use by another run")


def writing(out: Path, *, wait: bool = False) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing the file or folder `out` where writing takes long.

    Its folder is made where it is missing, and removed again if it stays empty.

    Args:
        out: the file or folder.
        wait: wait for a live process that is writing it.

    Raises:
        InUseError: a live process is writing it, on this machine or another.
    """
    return _locked(out.with_name(f".{out.name}.lock"), out, "being written by another asit", wait)


@contextlib.contextmanager
def _locked(path: Path, out: Path, state: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; `state` is the message's word for an output that another process has."""
    made, number = not path.parent.exists(), None
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    try:
        try:
            number = _acquire(path, f"{out} is {state}", wait)
            _open.add(number)
            os.lseek(number, 0, os.SEEK_SET)
            os.ftruncate(number, 0)
            os.write(number, json.dumps(facts).encode())
        except OSError as error:
            raise ConfigError(
                f"{out} may not be written: {error.strerror}",
                "a folder that this user may write, on a disk with room",
                "choose another --out, change the folder's permissions, or free space",
            ) from error
        yield
    finally:
        if number is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(number, 0)  # Windows unlinks no open file: an empty one blocks nobody
                if _is_at(number, path):  # unlinked while it is still locked
                    path.unlink()
            _open.discard(number)
            os.close(number)
        if made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _acquire(path: Path, taken: str, wait: bool) -> int:
    """Return the descriptor of the lock file, once it is ours; `taken` begins the message where another has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # a holder that made the folder may have removed it
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as closing:
            number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            closing.callback(os.close, number)
            locked = _flock(number)
            if not _is_at(number, path):  # released by its holder in this moment
                continue
            content, holder = os.read(number, _MOST), dict[str, str]()
            if locked or (locked is None and not content.strip()):
                closing.pop_all()
                return number
            if wait and locked is False:
                time.sleep(0.5)
                continue
            with contextlib.suppress(ValueError, TypeError):  # not written yet, or killed in mid-write
                holder = dict(parsing.from_json(content))
            who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
            since = f", since {holder['began']}" if "began" in holder else ""
            dead = "" if locked is False else f"; if it has ended, delete {path}"
            raise InUseError(
                f"{taken}: {who}{since}",
                "one process at a time that writes an output",
                f"wait for it or end it, or choose another --out{dead}",
            )


def _flock(number: int) -> bool | None:
    """Whether the file is now locked by us; False: another process has it; None: the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    # A forked loader process would otherwise keep the lock of a run that was killed.
    for number in _open:
        with contextlib.suppress(OSError):
            os.close(number)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
