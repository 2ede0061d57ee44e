"""One process at a time: RUN/run.lock, held from a run's start to its end; .OUT.lock, while an output is being written.

The system's own lock on the file (flock) is let go when its holder dies, however it dies, so a killed process never
blocks the next one on the same machine. Between machines flock is not always shared, so the holder also counts in the
file, a beat every few seconds, and a newcomer from another machine watches the count for a while: what counts on is
alive, what stands still was killed. Nobody compares clocks, so one that jumps changes nothing.
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
from asit.io import parsing

log = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # Windows has none: there the count alone tells
    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
"""Of the lock in a run's folder."""
BEAT = 5.0
"""Seconds between beats."""
WATCH = 30.0
"""Seconds that a newcomer from another machine looks for a beat; several beats, and what network file systems cache."""
LEASE = 120.0
"""Seconds after which a lock that a file server still holds for a silent machine is told instead of waited for; NFS
servers let go of a dead client's locks after 90 s."""

_SIZE = 512
_open: set[int] = set()
"""Open lock files of this process."""


@dataclass(frozen=True)
class Times:
    """Seconds of `BEAT`, `WATCH` and `LEASE`; tests take shorter ones."""

    beat: float = BEAT
    watch: float = WATCH
    lease: float = LEASE


@dataclass(frozen=True)
class _Words:
    """What a refusal says, and the lock's file.

    Attributes:
        path: the lock.
        out: what it is for.
        taken: of a live holder.
        rule, fix: what may be, and what to do.
    """

    path: Path
    out: Path
    taken: str
    rule: str
    fix: str

    def refusal(self, holder: dict[str, Any]) -> ConfigError:
        who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
        since = f", since {holder['began']}" if "began" in holder else ""
        return ConfigError(f"{self.out} is {self.taken}: {who}{since}", self.rule, self.fix)

    def unwritable(self, error: OSError) -> ConfigError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ConfigError(
                f"{self.path} could not be written: {error.strerror}",
                "room for the files to write",
                f"free space on the disk of {self.out}, or choose another --out",
            )
        return ConfigError(
            f"{self.out} may not be written: {error.strerror}",
            "a folder that this user may write",
            "choose another --out, or change the folder's permissions",
        )


def held(out: Path, processes: int = 1, times: Times | None = None) -> contextlib.AbstractContextManager[None]:
    """Hold the folder `out` for a run; made where it is not there, and removed again where nothing came into it.

    Args:
        out: the run's folder.
        processes: of the run; written into the lock.
        times: other times than the usual.

    Raises:
        ConfigError: a live run has it, on this machine or another.
    """
    fix = "wait for it or end it (Ctrl-C, or kill, leaves a checkpoint), or choose another --out"
    words = _Words(out / NAME, out, "in use by another run", "one run at a time in a folder", fix)
    return _held(words, processes, times or Times())


def writing(out: Path, times: Times | None = None) -> contextlib.AbstractContextManager[None]:
    """Keep other processes from writing the file or folder `out` where writing takes long.

    Args:
        out: the output; its folder is made, and removed again where nothing came into it.
        times: as of `held`.

    Raises:
        ConfigError: a live process is writing it, on this machine or another.
    """
    path, rule = out.with_name(f".{out.name}.lock"), "one process at a time that writes an output"
    words = _Words(path, out, "being written by another asit", rule, "wait for it or end it, or choose another --out")
    return _held(words, 1, times or Times())


@contextlib.contextmanager
def _held(words: _Words, processes: int, times: Times) -> Iterator[None]:
    path, folder = words.path, words.path.parent
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = _taken(words, times)
    except OSError as error:
        raise words.unwritable(error) from error
    _open.add(number)
    ended = threading.Event()
    told = {**_self(), "processes": processes, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    beats = threading.Thread(target=_count, args=(number, told, ended, times.beat), daemon=True, name=path.name)
    try:
        try:
            _write(number, told, 0)
        except OSError as error:  # an empty file would not say whose it is
            raise words.unwritable(error) from error
        beats.start()
        yield
    finally:
        ended.set()
        if beats.ident is not None:
            beats.join()
        # Unlinked while it is still locked: who waits for this file then finds that it is not the folder's any more.
        ours = _is_at(number, path)
        if fcntl is None:  # there an open file cannot be unlinked
            os.close(number)
        with contextlib.suppress(OSError):
            if ours:
                path.unlink()
        _open.discard(number)
        if fcntl is not None:
            os.close(number)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _taken(words: _Words, times: Times) -> int:
    """The lock file, open and ours; returns its number.

    Of another machine's lock the count is watched; where the system has no flock, of this machine's too.
    """
    path = words.path
    began = time.monotonic()
    first: bytes | None = None
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError:  # its folder was made by a holder who has just removed it
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            locked = _flock(number)
            if not _is_at(number, path):  # let go of by its holder in this moment
                os.close(number)
                continue
            content = os.pread(number, _SIZE, 0) if hasattr(os, "pread") else _read(number)
            holder = _holder(content)
            here = holder.get("boot") == _self()["boot"]
            if (locked is not False and not content.strip()) or (locked and here):
                return number
            if locked is False and here:
                raise words.refusal(holder)
            waited = time.monotonic() - began
            if first is None:
                first = content
                if holder:  # and not one that has the lock and has not written its name yet
                    log.info(f"{path} is of a process on {holder.get('host')}: looking whether that is alive")
            elif not holder or not _holder(first):
                first = content
            elif content != first:
                raise words.refusal(holder)
            if locked is not False and waited >= times.watch:
                return number
            if waited >= times.lease:
                raise ConfigError(
                    f"{words.out} is locked by a process on {holder.get('host')}, which gives no sign of life since "
                    f"{times.lease:.0f} s",
                    words.rule,
                    f"look whether process {holder.get('pid')} of that machine lives; if not, remove {path}",
                )
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(number)
            raise
        os.close(number)
        time.sleep(min(0.5 if holder else 0.05, times.beat))


def _flock(number: int) -> bool | None:
    """Whether the file is locked now by us; False: another has it; None: the file system knows no locks."""
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


def _count(number: int, told: dict[str, Any], ended: threading.Event, every: float) -> None:
    beat = 0
    while not ended.wait(every):
        beat += 1
        with contextlib.suppress(OSError):  # a full disk stops the run by its checkpoints, not by this
            _write(number, told, beat)


def _write(number: int, told: dict[str, Any], beat: int) -> None:
    # One write of one size in place: the lock lies on this very file, so it cannot be replaced by a new one.
    text = json.dumps({"beat": beat, **told}).encode("utf-8")[: _SIZE - 1].ljust(_SIZE - 1) + b"\n"
    if hasattr(os, "pwrite"):
        os.pwrite(number, text, 0)
    else:
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, text)
    os.fsync(number)


def _read(number: int) -> bytes:
    os.lseek(number, 0, os.SEEK_SET)
    return os.read(number, _SIZE)


def _holder(content: bytes) -> dict[str, Any]:
    try:
        found = parsing.from_json(content)
    except ValueError:  # empty, or killed in mid-write
        return {}
    return found if isinstance(found, dict) else {}


def _self() -> dict[str, Any]:
    """This process, and the machine since its last start: containers of one machine share its flocks."""
    boot = f"{socket.gethostname()}"
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    return {"host": socket.gethostname(), "boot": boot, "pid": os.getpid()}


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    # A forked loader process would otherwise keep the lock of a run that was killed.
    for number in _open:
        with contextlib.suppress(OSError):
            os.close(number)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
