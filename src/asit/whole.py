"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A draft beside `target` for the block to write, which then takes its name; a file that is there is replaced.

    The draft is `.NAME.PID.tmp`, and on the disk before it is renamed. If the block raises, it is deleted and `target`
    stays as it was; only a killed process leaves it.

    Raises:
        OSError: `target` is a folder, or cannot be written, or the disk is full.
    """
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder, where a file is to be written", str(path))
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with draft.open("rb+") as file:  # Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
