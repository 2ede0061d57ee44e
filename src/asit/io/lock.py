"""Lock files: one run at a time in a folder (RUN/run.lock), one writer at a time of an output (.OUT.lock).

The system releases its lock on the file (flock) when the holder dies, so a killed process never blocks the next one on
the same machine. Machines do not always share flocks, so the holder also touches the file every few seconds, and one
of another machine watches this heartbeat before it takes the lock over. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asit.errors import ConfigError
from asit.io import parsing

try:
    import fcntl
except ImportError:  # Windows: there the heartbeat alone decides
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = "run.lock"
"""Of the lock in a run's folder."""
_BEAT, _WATCH = 5.0, 30.0
"""Seconds between heartbeats, and of watching another machine's lock: several heartbeats, and a file server's cache."""
_MOST = 4096  # bytes of a lock file
_open: set[int] = set()
"""Descriptors of the lock files that this process holds."""


def held(out: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the folder `out` for a run; it is made where it is missing, and removed again if it stays empty.

    Raises:
        ConfigError: a live run has it, on this machine or another.
    """
    return _locked(out / NAME, out, "in use by another run")


def writing(out: Path) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing the file or folder `out` where writing takes long.

    Its folder is made where it is missing, and removed again if it stays empty.

    Raises:
        ConfigError: a live process is writing it, on this machine or another.
    """
    return _locked(out.with_name(f".{out.name}.lock"), out, "being written by another asit")


@contextlib.contextmanager
def _locked(path: Path, out: Path, state: str) -> Iterator[None]:
    """Hold the lock file `path`; `state` is the message's word for an output that another process has."""
    made = not path.parent.exists()
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    facts = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "began": began}
    ended, number = threading.Event(), None
    try:
        try:
            number = _acquire(path, f"{out} is {state}")
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
        beats = threading.Thread(target=_beat, args=(path, ended), name=path.name, daemon=True)
        beats.start()
        try:
            yield
        finally:
            ended.set()
            beats.join()
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


def _acquire(path: Path, taken: str) -> int:
    """Return the descriptor of the lock file, once it is ours; `taken` begins the message where another has it."""
    began, first = time.monotonic(), 0
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # a holder that made the folder may have removed it
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as closing:
            number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            closing.callback(os.close, number)
            locked = _flock(number)
            if not _is_at(number, path):  # released by its holder in this moment
                continue
            content, beat, holder = os.read(number, _MOST), os.fstat(number).st_mtime_ns, dict[str, Any]()
            with contextlib.suppress(ValueError, TypeError):  # empty, or killed in mid-write
                holder = dict(parsing.from_json(content))
            late = time.monotonic() - began >= _WATCH
            if (locked is False and (holder or late)) or (holder and first and beat != first):
                who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
                since = f", since {holder['began']}" if "began" in holder else ""
                raise ConfigError(
                    f"{taken}: {who}{since}",
                    "one process at a time that writes an output",
                    "wait for it or end it, or choose another --out",
                )
            here = locked and (not holder or holder.get("boot") == _boot())
            if locked is not False and (here or late or not content.strip()):
                closing.pop_all()
                return number
            if holder and not first:
                first = beat
                log.info("%s is of a process on %s: checking whether it is alive", path, holder.get("host"))
        time.sleep(min(0.5 if first else 0.05, _BEAT))


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


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with contextlib.suppress(OSError):  # a full disk stops the run by its checkpoints, not by this
            os.utime(path)


@functools.cache
def _boot() -> str:
    """Return the machine's last start: containers of one machine share its flocks."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return socket.gethostname()


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
