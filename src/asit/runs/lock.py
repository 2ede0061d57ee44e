"""One run at a time in a folder: RUN/run.lock, held from the start of a run to its end.

The system's own lock on the file (flock) is let go when its holder dies, however it dies, so a killed run never blocks
the next one on the same machine. Between machines flock is not always shared, so the holder also counts in the file, a
beat every few seconds, and a newcomer from another machine watches the count for a while: what counts on is alive, what
stands still was killed. Nobody compares clocks, so one that jumps changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit import parsing
from asit.errors import ConfigError
from asit.runs.folder import LOCK as NAME

try:
    import fcntl
except ImportError:  # Windows has none: there the count alone tells
    fcntl = None  # type: ignore[assignment]

BEAT = 5.0
"""Seconds between beats."""
WATCH = 30.0
"""Seconds that a newcomer from another machine looks for a beat; several beats, and what network file systems cache."""
LEASE = 120.0
"""Seconds after which a lock that a file server still holds for a silent machine is told instead of waited for; NFS
servers let go of a dead client's locks after 90 s."""

_SIZE = 512
_held: set[int] = set()
"""Open lock files of this process."""


@dataclass(frozen=True)
class Times:
    """Seconds of `BEAT`, `WATCH` and `LEASE`; tests take shorter ones."""

    beat: float = BEAT
    watch: float = WATCH
    lease: float = LEASE


@contextlib.contextmanager
def held(
    out: Path, processes: int = 1, say: Callable[[str], None] = lambda text: None, times: Times | None = None
) -> Iterator[None]:
    """Hold the folder `out` for a run; made where it is not there, and taken away again where nothing came into it.

    Args:
        out: the run's folder.
        processes: of the run; told to who finds the folder taken.
        say: is told why it takes a while.
        times: other times than the usual.

    Raises:
        ConfigError: a live run has it, on this machine or another.
    """
    times = times or Times()
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = _taken(out, times, say)
    except OSError as error:
        raise ConfigError(
            f"{out / NAME} may not be written: {error.strerror}",
            "a folder for the run that this user may write",
            "choose another --out, or change the folder's permissions",
        ) from error
    _held.add(number)
    ended = threading.Event()
    told = {**_self(), "processes": processes, "began": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    beats = threading.Thread(target=_count, args=(number, told, ended, times.beat), daemon=True, name="run.lock")
    try:
        try:
            _write(number, told, 0)
        except OSError as error:  # an empty file would tell nobody whose it is
            raise ConfigError(
                f"{out / NAME} could not be written: {error.strerror}",
                "room for the run's files",
                f"free space on the disk of {out}, or choose another --out",
            ) from error
        beats.start()
        yield
    finally:
        ended.set()
        if beats.ident is not None:
            beats.join()
        # Unlinked while it is still locked: who waits for this file then finds that it is not the folder's any more.
        ours = _is_at(number, out / NAME)
        if fcntl is None:  # there an open file cannot be unlinked
            os.close(number)
        with contextlib.suppress(OSError):
            if ours:
                (out / NAME).unlink()
        _held.discard(number)
        if fcntl is not None:
            os.close(number)
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def _taken(out: Path, times: Times, say: Callable[[str], None]) -> int:
    """The lock file, open and ours; returns its number.

    Of another machine's lock the count is watched; where the system has no flock, of this machine's too.
    """
    path = out / NAME
    began = time.monotonic()
    first: bytes | None = None
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
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
                raise _refusal(out, holder)
            waited = time.monotonic() - began
            if first is None:
                first = content
                say(f"{path} is of a run on {holder.get('host', 'another machine')}: looking whether that is alive")
            elif content != first:
                raise _refusal(out, holder)
            if locked is not False and waited >= times.watch:
                return number
            if waited >= times.lease:
                raise ConfigError(
                    f"{out} is locked by a run on {holder.get('host')}, which gives no sign of life since "
                    f"{times.lease:.0f} s",
                    "a folder that no run is using",
                    f"look whether process {holder.get('pid')} of that machine lives; if not, remove {path}",
                )
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(number)
            raise
        os.close(number)
        time.sleep(min(0.5, times.beat))


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


def _refusal(out: Path, holder: dict[str, Any]) -> ConfigError:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this machine')}"
    since = f", since {holder['began']}" if "began" in holder else ""
    return ConfigError(
        f"{out} is in use by another run: {who}{since}",
        "one run at a time in a folder",
        "wait for it or end it (Ctrl-C, or kill, leaves a checkpoint), or choose another --out",
    )


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
    for number in _held:
        with contextlib.suppress(OSError):
            os.close(number)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
