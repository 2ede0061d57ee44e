"""Tar and zip archives with given members."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def write_tar(path: Path, members: Sequence[tarfile.TarInfo | tuple[str, bytes]], mode: str = "w:gz") -> Path:
    """A member without content is filled with "x" up to its size."""
    with tarfile.open(path, mode) as packed:  # type: ignore[call-overload]
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                info, content = member, b"x" * member.size
            else:
                info, content = tarfile.TarInfo(member[0]), member[1]
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, members: Sequence[zipfile.ZipInfo | tuple[str, bytes]]) -> Path:
    """A member without content is a link to "target"."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in members:
            packed.writestr(*(member if isinstance(member, tuple) else (member, b"target")))
    return path
