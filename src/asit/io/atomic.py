"""Atomic writes: a file or folder is written to a temporary neighbour (a draft) and renamed when it is complete.

A draft is called `.NAME.TOKEN.tmp` with a random token, so no two writers share one, threads and other machines
included. `.old` instead of `.tmp` names a folder that is being replaced.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from asit.errors import CheckpointError, ConfigError

_DRAFT = re.compile(r"\.(?P<target>.+)\.([0-9a-f]{12}|\d+-[0-9a-f]{8}-\d+)\.(?P<kind>tmp|old)(\.\w+)?")
_LEGACY_DRAFT = re.compile(r"\.(?P<target>.+?)(\.\d+\.tmp|\.tmp|\.tmp-\d+(\.\w+)?|\.(?P<kind>old))")
_STALE = 7 * 24 * 3600.0
"""Seconds after which an unchanged draft is a killed writer's."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}

_swept: set[Path] = set()
"""Folders swept by this process: once is enough, and listing a folder for each of a million files would be slow."""


class Draft(NamedTuple):
    """What a draft's name says; `legacy`: of an earlier version, or another program's file."""

    target: str
    kind: str
    legacy: bool


@contextmanager
def write_file(target: str | os.PathLike[str], *, sync: bool = True) -> Iterator[Path]:
    """Yield a draft to write; it replaces `target` when the block ends, and is deleted if the block raises.

    Of several concurrent writers of one target, the last to end wins. Missing parent folders are made.

    Args:
        target: the file.
        sync: flush the draft to the disk before it is renamed; False for files that are cheap to lose.

    Raises:
        OSError: `target` is a folder or cannot be written, or the disk is full.
    """
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    draft = _new_draft(path)
    try:
        yield draft
        if sync:
            with draft.open("rb+") as file:  # Windows syncs only what may be written
                os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a small file atomically, in UTF-8, with the line ends that `text` has."""
    with write_file(target) as draft:
        draft.write_text(text, "utf-8", newline="")


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def write_folder(target: Path, *, overwrite: bool = False, sync: bool = True) -> Iterator[Path]:
    """Yield an empty draft folder to fill; it takes the name `target` when the block ends.

    A crash at any moment leaves either the old folder or the new one. Of several concurrent writers, the last to end
    wins with `overwrite`; without, the first does and the others raise.

    Args:
        target: the folder to make; its parents are made too. An empty folder counts as absent.
        overwrite: replace what is there.
        sync: flush all files to the disk before the rename; False for many files that are cheap to lose.

    Raises:
        CheckpointError: target exists and overwrite is off, the disk is full, or the location is not writable.
    """
    replaced: list[Path] = []
    with disk_errors(target):
        draft = _new_draft(target)
        _restore(target)
        if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise _exists(target)
        draft.mkdir()
        try:
            yield draft
            if sync:
                for path in [*draft.rglob("*"), draft]:
                    _fsync(path)
            _take_name(draft, target, overwrite, replaced)
            _fsync(target.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            if replaced and replaced[-1].exists() and not target.exists():
                replaced[-1].rename(target)
            raise
        for old in replaced:
            delete_folder(old, target)


def delete_folder(folder: Path, target: Path | None = None) -> None:
    """Delete a folder atomically: a crash on the way leaves a draft of `target` (the folder itself unless given), never
    a part of the folder."""
    doomed = draft_of(target or folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(doomed)
        remove(doomed)


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse, before any work is done, a file `target` that must not be written.

    Raises:
        ConfigError: it is a folder, or exists and overwrite is off.
    """
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", "the path of a file", f"give one in it, such as {target / 'model'}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} already exists", "a path that is free", "give another path, or pass --overwrite")


@contextmanager
def disk_errors(target: Path, kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Raise a CheckpointError that names `target` where the disk is full or the location is not writable; `kept` says
    what a repeated command resumes from."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error) and kept is not None:
            raise CheckpointError(
                f"the disk is full: {target} was not written; {kept()}",
                "room for the results twice: there, and in the file",
                "free some and give the same command again",
            ) from error
        if is_disk_full(error):
            raise CheckpointError(
                f"the disk is full: {target} was not written",
                f"room for all of it{'; what was there before is untouched' if target.exists() else ''}",
                f"free space on the disk of {target.parent}, or write elsewhere",
            ) from error
        if _errno(error) in _FORBIDDEN:
            raise CheckpointError(
                f"{target} may not be written: {error}",
                "a folder that this user may write",
                "give another path, or change the folder's permissions",
            ) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether the error says that a disk or a user's quota is full."""
    return _errno(error) in _FULL


def draft_of(target: Path, kind: str = "tmp") -> Path:
    """Return a draft's path beside `target` that no other writer has."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.{kind}")


def parse_draft(name: str) -> Draft | None:
    """Parse the name of a draft, of this version or an earlier one; None for any other name."""
    if found := _DRAFT.fullmatch(name):
        return Draft(found["target"], found["kind"], legacy=False)
    found = _LEGACY_DRAFT.fullmatch(name)
    return found and Draft(found["target"], found["kind"] or "tmp", legacy=True)


def sweep(folder: Path, names: Collection[str] | None = None, *, locked: bool = False) -> None:
    """Delete drafts in a folder whose writers were killed, and restore a folder killed between its two renames.

    Args:
        folder: may be absent.
        names: targets whose drafts are meant; None: all.
        locked: the caller holds the folder's lock, so every draft is a left-over. Otherwise only those are that have
            not changed for a week, and a renamed folder is left to its next writer.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if entry.name.startswith(".")]:
            draft = parse_draft(name)
            if draft is None or not (names is None or draft.target in names):
                continue
            missing = draft.kind == "old" and not (folder / draft.target).exists()
            if locked and missing:
                _restore(folder / draft.target)
            with contextlib.suppress(FileNotFoundError):
                stale = time.time() - (folder / name).lstat().st_mtime > _STALE and not draft.legacy
                if locked or (stale and not missing):
                    remove(folder / name)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with its content; nothing where it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():  # and was not deleted by another process meanwhile
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _new_draft(target: Path) -> Path:
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _swept:
        _swept.add(folder)
        with contextlib.suppress(OSError):
            sweep(folder)
    return draft_of(target)


def _restore(target: Path) -> None:
    """Rename a folder back that a killed writer had renamed, where nothing has replaced it."""
    if target.exists():
        return
    for path in target.parent.glob(f".{glob.escape(target.name)}.*old"):
        draft = parse_draft(path.name)
        if draft and draft.target == target.name:
            with contextlib.suppress(OSError):  # another writer was first
                path.rename(target)
                return


def _take_name(draft: Path, target: Path, overwrite: bool, replaced: list[Path]) -> None:
    """Rename a finished folder to its target; what was there is renamed first, and its new name put in `replaced`."""
    while True:
        if overwrite and target.exists():
            replaced.append(draft_of(target, "old"))
            with contextlib.suppress(FileNotFoundError):  # another writer has renamed it
                target.rename(replaced[-1])
        try:
            draft.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not overwrite:
                raise _exists(target) from None
            # Another writer's folder has come there since: replace that one.


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(f"{target} already exists", "a path that is free", "give another path, or pass --overwrite")


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes in Rust, and gives the system's number in its text alone.
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None


def _fsync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
