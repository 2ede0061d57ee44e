"""A single file, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Callable
from pathlib import Path

from asit.errors import CheckpointError, ConfigError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def check_free(target: Path, overwrite: bool) -> None:
    """Say so before any work is done where `target` may not be written.

    Raises:
        ConfigError: it is a folder, or exists and overwrite is off.
    """
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", "the path of a file", f"give one in it, such as {target / 'model'}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} already exists", "a path that is free", "give another path, or pass --overwrite")


def write_file(target: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Make the file `target`, or leave everything as it was; its folder is made too.

    Args:
        target: the file to make.
        write: is given a temporary neighbour with the same ending, and fills it. What it raises goes on to the caller.
        overwrite: replace what is there.

    Raises:
        ConfigError: as `check_free`.
        CheckpointError: the disk is full, or the place may not be written.
    """
    check_free(target, overwrite)
    temporary = target.with_name(f".{target.stem}.tmp-{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.stem)}.tmp-*{glob.escape(target.suffix)}"):
            left.unlink()  # by a writer that was killed; one process at a time may write a target
        write(temporary)
        number = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
        os.replace(temporary, target)
    except OSError as error:
        if error.errno in _FULL:
            raise CheckpointError(
                f"the disk is full: {target} was not written",
                "room for the whole file; what was there before is untouched",
                f"free space on the disk of {target.parent}, or write elsewhere",
            ) from error
        if error.errno in _FORBIDDEN or isinstance(error, NotADirectoryError | FileExistsError):
            raise CheckpointError(
                f"{target} may not be written: {error}", "a folder that this user may write", "give another path"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
