"""Files that are written atomically, and the drafts that killed writers leave.

A draft is a hidden neighbour of its target, `.NAME.PID-MACHINE-COUNT.tmp`, so no two writers share one, threads and
other machines included: whoever ends last has written the file. `.old` in place of `.tmp` is what a folder was renamed
to while its successor took its name.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

_DRAFT = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<machine>[0-9a-f]{8})-\d+\.(?P<kind>tmp|old)(\.\w+)?")
# Of earlier versions, which could share a draft.
_EARLIER = re.compile(r"\.(?P<name>.+?)(\.\d+\.tmp|\.tmp|\.tmp-\d+(\.\w+)?|\.(?P<kind>old))")

_count = itertools.count()
_swept: set[Path] = set()
"""Folders in which `written` has done so: it would be slow for each of a million files."""


@contextmanager
def written(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft beside `target` for the block to write, which then takes its name; a file that is there is replaced.

    It is on the disk before it is renamed. If the block raises, it is deleted and `target` stays as it was; only a
    killed process leaves it, and the next process that writes in this folder deletes it. Several writers of one target
    do not disturb each other: the last one to end replaces the others' file.

    Raises:
        OSError: `target` is a folder, or cannot be written, or the disk is full.
    """
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    draft = draft_of(path)
    if path.parent not in _swept:
        _swept.add(path.parent)
        sweep(path.parent)
    try:
        yield draft
        with draft.open("rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def draft_of(target: Path, kind: str = "tmp", ending: str = "") -> Path:
    """A name for a draft of `target` that no other writer has; `ending` is put behind it."""
    return target.with_name(f".{target.name}.{os.getpid()}-{_machine()}-{next(_count)}.{kind}{ending}")


def drafted(name: str) -> tuple[str, bool] | None:
    """Of a draft's name: the name of its target, and whether it is what a folder was renamed to; None: no draft."""
    found = _DRAFT.fullmatch(name) or _EARLIER.fullmatch(name)
    return None if found is None else (found["name"], found["kind"] == "old")


def sweep(folder: Path) -> None:
    """Delete the drafts in a folder whose writers have died; those of other machines and containers stay."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = _DRAFT.fullmatch(entry.name)
            if found is None or found["machine"] != _machine() or _of_the_living(entry.name):
                continue
            if found["kind"] == "tmp" or (folder / found["name"]).exists():
                remove(Path(entry.path))


def tidy(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove all drafts from a folder that one process at a time may write, whichever machine they are of.

    A folder that was renamed by a writer killed before its successor had the name gets its own name back.

    Args:
        folder: may be absent.
        names: targets whose drafts are meant; None: all.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        found = drafted(path.name)
        if found is None or not (names is None or found[0] in names):
            continue
        if found[1]:
            bring_back(folder / found[0])
        remove(path)


def bring_back(target: Path) -> None:
    """Give a folder its name back where a killed writer had renamed it and nothing has come in its place."""
    if target.exists():
        return
    for left in target.parent.glob(f".{glob.escape(target.name)}.*old"):
        if drafted(left.name) == (target.name, True) and not _of_the_living(left.name):
            with contextlib.suppress(OSError):  # another writer was first
                left.rename(target)
                return


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it; nothing where it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # and was not deleted by another process meanwhile
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@functools.cache
def _machine() -> str:
    """What tells process numbers of one machine, start of it and container from those of others."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256(" ".join(facts).encode("utf-8", "replace")).hexdigest()[:8]


def _of_the_living(name: str) -> bool:
    """Whether a draft is of a process of this machine that lives."""
    found = _DRAFT.fullmatch(name)
    if found is None or found["machine"] != _machine():
        return False
    if os.name != "posix":  # there os.kill ends a process
        return True
    try:
        os.kill(int(found["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
