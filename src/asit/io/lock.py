"""Lock files: one run at a time in a folder (RUN/run.lock), one writer at a time of an output (.OUT.lock).

The system releases its lock on the file (flock) when the holder dies, so a killed process never blocks the next one on
the same machine. Between machines flock is not always shared, so the holder also writes a heartbeat into the file, and
a process of another machine watches it for a while before it takes the lock over. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.errors import ConfigError
from asit.io import atomic, parsing

try:
    import fcntl
except ImportError:  # Windows: there the heartbeat alone decides
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NAME = "run.lock"
"""Of the lock in a run's folder."""
_SIZE = 512  # bytes of a lock file
_open: set[int] = set()
"""Descriptors of the lock files that this process holds."""


@dataclass(frozen=True)
class Times:
    """Seconds between heartbeats, of watching another machine's lock, and of waiting for a file server.

    Attributes:
        beat: between heartbeats.
        watch: several heartbeats, and what network file systems cache.
        lease: after which a lock that a file server holds for a silent machine is an error; NFS servers release a dead
            client's locks after 90 s.
    """

    beat: float = 5.0
    watch: float = 30.0
    lease: float = 120.0


def held(out: Path, processes: int = 1, times: Times = Times()) -> contextlib.AbstractContextManager[None]:
    """Lock the folder `out` for a run; it is made where it is missing, and removed again if it stays empty.

    Args:
        out: the run's folder.
        processes: of the run; written into the lock.
        times: for tests.

    Raises:
        ConfigError: a live run has it, on this machine or another.
    """
    lock = _Lock(
        path=out / NAME,
        out=out,
        state="in use by another run",
        rule="one run at a time in a folder",
        fix="wait for it or end it (Ctrl-C, or kill, leaves a checkpoint), or choose another --out",
        times=times,
    )
    return lock.held(processes)


def writing(out: Path, times: Times = Times()) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing the file or folder `out` where writing takes long.

    Args:
        out: the output; its folder is made where it is missing, and removed again if it stays empty.
        times: for tests.

    Raises:
        ConfigError: a live process is writing it, on this machine or another.
    """
    lock = _Lock(
        path=out.with_name(f".{out.name}.lock"),
        out=out,
        state="being written by another asit",
        rule="one process at a time that writes an output",
        fix="wait for it or end it, or choose another --out",
        times=times,
    )
    return lock.held(1)


@dataclass(frozen=True)
class _Lock:
    """A lock file, what it is for, and the parts of the message that refuses it."""

    path: Path
    out: Path
    state: str
    rule: str
    fix: str
    times: Times

    @contextlib.contextmanager
    def held(self, processes: int) -> Iterator[None]:
        folder = self.path.parent
        made = not folder.exists()
        facts = {**_self(), "processes": processes, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        ended = threading.Event()
        number: int | None = None
        try:
            try:
                number = self._acquire()
                _open.add(number)
                _write(number, facts, 0)  # an empty file would not say whose it is
            except OSError as error:
                raise self._unwritable(error) from error
            name = self.path.name
            beats = threading.Thread(target=_beat, args=(number, facts, ended, self.times.beat), name=name, daemon=True)
            beats.start()
            try:
                yield
            finally:
                ended.set()
                beats.join()
        finally:
            if number is not None:
                self._release(number)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _acquire(self) -> int:
        """Return the descriptor of the lock file, once it is ours."""
        began, first = time.monotonic(), b""
        while True:
            self.path.parent.mkdir(parents=True, exist_ok=True)  # a holder that made the folder may have removed it
            try:
                number = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            except FileNotFoundError:
                continue
            with contextlib.ExitStack() as closing:
                closing.callback(os.close, number)
                locked = _flock(number)
                if not _is_at(number, self.path):  # released by its holder in this moment
                    continue
                content = _read(number)
                holder = _parse(content)
                here = holder.get("boot") == _self()["boot"]
                waited = time.monotonic() - began
                free = (locked and (here or not holder)) or (locked is not False and not content.strip())
                if not free and ((locked is False and here) or (holder and first and content != first)):
                    raise self._refusal(holder)
                if free or (locked is not False and waited >= self.times.watch):
                    closing.pop_all()
                    return number
                if waited >= self.times.lease:
                    raise ConfigError(
                        f"{self.out} is locked by a process on {holder.get('host')}, which gives no sign of life since "
                        f"{self.times.lease:.0f} s",
                        self.rule,
                        f"check whether process {holder.get('pid')} of that machine lives; if not, remove {self.path}",
                    )
                if holder and not first:
                    first = content
                    log.info("%s is of a process on %s: checking whether it is alive", self.path, holder.get("host"))
            time.sleep(min(0.5 if holder else 0.05, self.times.beat))

    def _release(self, number: int) -> None:
        # Unlinked while it is still locked: a process that waits for this file then finds another or none there.
        unlink = _is_at(number, self.path)
        _open.discard(number)
        if fcntl is None:  # there an open file cannot be unlinked
            os.close(number)
        if unlink:
            with contextlib.suppress(OSError):
                self.path.unlink()
        if fcntl is not None:
            os.close(number)

    def _refusal(self, holder: dict[str, Any]) -> ConfigError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
        since = f", since {holder['began']}" if "began" in holder else ""
        return ConfigError(f"{self.out} is {self.state}: {who}{since}", self.rule, self.fix)

    def _unwritable(self, error: OSError) -> ConfigError:
        if atomic.is_disk_full(error):
            found, rule = f"{self.path} could not be written: {error.strerror}", "room for the files to write"
            return ConfigError(found, rule, f"free space on the disk of {self.out}, or choose another --out")
        found, rule = f"{self.out} may not be written: {error.strerror}", "a folder that this user may write"
        return ConfigError(found, rule, "choose another --out, or change the folder's permissions")


def _flock(number: int) -> bool | None:
    """Whether the file is now locked by us; False: another process has it; None: the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise
    return True


def _beat(number: int, facts: dict[str, Any], ended: threading.Event, every: float) -> None:
    beat = 0
    while not ended.wait(every):
        beat += 1
        with contextlib.suppress(OSError):  # a full disk stops the run by its checkpoints, not by this
            _write(number, facts, beat)


def _write(number: int, facts: dict[str, Any], beat: int) -> None:
    # One write of one size in place: the lock is on this very file, so it cannot be replaced by a new one.
    text = json.dumps({"beat": beat, **facts}).encode("utf-8")[: _SIZE - 1].ljust(_SIZE - 1) + b"\n"
    os.lseek(number, 0, os.SEEK_SET)
    os.write(number, text)
    os.fsync(number)


def _read(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    return os.read(number, _SIZE)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = parsing.from_json(content)
    except ValueError:  # empty, or killed in mid-write
        return {}
    return found if isinstance(found, dict) else {}


def _self() -> dict[str, Any]:
    """Return this process and the machine's last start: containers of one machine share its flocks."""
    boot = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid()}


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
