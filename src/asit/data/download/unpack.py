"""Unpack tar and zip archives: nothing is written outside the target, or beyond the set's size."""

from __future__ import annotations

import lzma
import ntpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from asit.data.download.http import DownloadError

_BLOCK = 1 << 20
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    RuntimeError,
    OSError,
)
"""Errors of damaged archives; RuntimeError is zipfile's for encrypted members and unknown compression."""


def unpack(
    archive: Path,
    into: Path,
    most: int,
    *,
    strip: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> None:
    """Unpack a tar (plain, gz, bz2, xz) or a zip, member by member.

    Only files and folders are written, with the permissions of this process. What was written stays when this fails;
    the caller unpacks into a draft folder.

    Args:
        archive: the file.
        into: an existing folder.
        most: bytes above which this stops, measured on what is written and not on what is declared.
        strip: leading folders of each name that are left out.
        progress: called with bytes written, and with their sum at the end.

    Raises:
        DownloadError: not an archive, truncated or damaged; a member that leads out of the folder (absolute, a drive,
            ".."), a link, a device or pipe, an encrypted member, two members of one name, or more than `most`.
    """
    written = 0
    try:
        for name, special, source in _members(archive):
            path = PurePosixPath(name)
            # A backslash or a drive is an ordinary character here and leads out on another system.
            if path.is_absolute() or ".." in path.parts or ntpath.splitdrive(name)[0] or "\\" in name:
                raise _refused(archive, f"the member {name!r} leads out of the folder", "names below the folder")
            if special:
                raise _refused(archive, f"the member {name!r} is a link, a device or a pipe", "files and folders only")
            target = into.joinpath(*path.parts[strip:])
            try:
                if source is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                out = target.open("xb")
            except (FileExistsError, NotADirectoryError):
                found = f"{name} has the path of another member, or of the folder itself"
                raise _refused(archive, found, "each path once") from None
            with source, out:
                while block := source.read(_BLOCK):
                    written += len(block)
                    if written > most:
                        raise _refused(archive, f"at {name} more has come out", f"at most {most:,} bytes")
                    out.write(block)
            progress(written, None)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's: gzip and bz2 report damage as an OSError without a number
        found = f"damaged or not an archive ({error or type(error).__name__})"
        raise _refused(archive, found, "a complete tar or zip") from None
    progress(written, written)


def _members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    """Yield each member's name, whether it is neither file nor folder, and its content, None for a folder."""
    with archive.open("rb") as start:
        zipped = start.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    if zipped:
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                special = stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR)
                yield info.filename, special, None if info.is_dir() else packed.open(info)
        return
    with tarfile.open(archive) as packed_tar:
        while (entry := packed_tar.next()) is not None:
            packed_tar.members.clear()  # type: ignore[attr-defined]  # a hundred thousand are 100 MB
            plain = entry.isreg() or entry.isdir()
            yield entry.name, not plain, packed_tar.extractfile(entry) if plain else None


def _refused(archive: Path, found: str, expected: str) -> DownloadError:
    return DownloadError(f"{archive}: {found}", expected, "delete this archive and fetch it again")
