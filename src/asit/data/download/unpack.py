"""Unpack tar and zip archives: nothing is written outside the target, or beyond the limits of the set."""

from __future__ import annotations

import functools
import lzma
import ntpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from asit.errors import AsitError

_BLOCK = 1 << 20
_ANOTHER = "this is not the set's archive; delete it and fetch it again"


class ArchiveError(AsitError):
    """An archive that is damaged, or that holds what a data set must not hold."""


@dataclass(frozen=True)
class Limits:
    """The most that an archive may unpack to.

    Attributes:
        files: files and folders together.
        bytes: of all files, unpacked.
        ratio: unpacked bytes to the archive's own; recordings pack to a half at best, a bomb to a thousandth.
    """

    files: int
    bytes: int
    ratio: float = 100.0


@dataclass(frozen=True)
class Unpacked:
    """What came out: files and their bytes."""

    files: int
    bytes: int


@dataclass(frozen=True)
class _Member:
    name: str
    kind: str
    open: Callable[[], IO[bytes]]


def unpack(
    archive: Path,
    into: Path,
    limits: Limits,
    *,
    strip: int = 0,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Unpacked:
    """Unpack a tar (plain, gz, bz2, xz) or a zip, member by member.

    Only files and folders are written, with the permissions of this process: owners, set-user-id bits and times of the
    archive are ignored. What was written stays when this fails; the caller unpacks into a draft folder.

    Args:
        archive: the file.
        into: an existing folder.
        limits: sizes and counts above which this stops, measured on what is written and not on what is declared.
        strip: leading folders of each name that are left out.
        progress: called with bytes written and, for a zip, the bytes to write.

    Raises:
        ArchiveError: not an archive, truncated or damaged; a member that leads out of the folder (absolute, a drive,
            ".."), a link, a device or pipe, an encrypted member, two members of one name, or more than the limits.
    """
    most = min(limits.bytes, int(limits.ratio * max(1, archive.stat().st_size)))
    entries = files = written = 0
    with _damage(archive), _opened(archive) as (members, total):
        if total is not None and total > most:
            raise _too_big(archive, f"it declares {total:,} bytes", most)
        for entries, member in enumerate(members, 1):
            if entries > limits.files:
                raise ArchiveError(
                    f"{archive} holds more than {limits.files:,} files and folders",
                    "what the set is known to hold",
                    _ANOTHER,
                )
            parts = _checked(archive, member)[strip:]
            if member.kind == "file" and not parts:
                raise ArchiveError(
                    f"{archive}: {member.name} is beside the set's folder",
                    f"every file at least {strip} folder(s) deep",
                    _ANOTHER,
                )
            target = into.joinpath(*parts)
            try:
                if member.kind == "folder":
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                out = target.open("xb")
            except (FileExistsError, NotADirectoryError):
                raise ArchiveError(
                    f"{archive}: {member.name} occurs twice", "each name once", "fetch the archive again"
                ) from None
            with out, member.open() as source:
                while block := source.read(_BLOCK):
                    written += len(block)
                    if written > most:
                        raise _too_big(archive, f"at {member.name} more has come out", most)
                    out.write(block)
            files += 1
            progress(written, total)
    progress(written, written)
    return Unpacked(files, written)


def _too_big(archive: Path, what: str, most: int) -> ArchiveError:
    return ArchiveError(f"{archive}: {what}", f"at most {most:,} bytes, which is more than the set holds", _ANOTHER)


def _checked(archive: Path, member: _Member) -> tuple[str, ...]:
    """Return the parts of a member's name, once it is known to stay inside and to be a plain file or folder."""
    name = member.name
    path = PurePosixPath(name)
    if member.kind == "folder" and name in (".", "./"):
        return ()
    # A backslash or a drive is an ordinary character here and leads out on another system.
    found, expected = "", ""
    leads_out = path.is_absolute() or ".." in path.parts or ntpath.splitdrive(name)[0]
    if not path.parts or leads_out or "\\" in name or "\0" in name:
        found, expected = "leads out of the folder", "names below the folder that is unpacked to"
    elif member.kind not in ("file", "folder"):
        found, expected = f"is a {member.kind}", "files and folders only"
    if found:
        advice = "do not use this archive; fetch it from the address in the documentation"
        raise ArchiveError(f"{archive}: the member {name!r} {found}", expected, advice)
    return path.parts


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[Iterator[_Member], int | None]]:
    """Yield members in the archive's order, and the unpacked bytes where the archive declares them up front."""
    with archive.open("rb") as start:
        zipped = start.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    if zipped:
        with zipfile.ZipFile(archive) as packed:
            yield _of_zip(packed), sum(info.file_size for info in packed.infolist())
        return
    with tarfile.open(archive, "r:*") as packed_tar:
        yield _of_tar(packed_tar), None


def _of_zip(packed: zipfile.ZipFile) -> Iterator[_Member]:
    for info in packed.infolist():
        mode = info.external_attr >> 16
        if info.flag_bits & 1:
            kind = "encrypted file"
        elif stat.S_ISLNK(mode):
            kind = "link"
        elif info.is_dir():
            kind = "folder"
        elif stat.S_IFMT(mode) in (0, stat.S_IFREG):
            kind = "file"
        else:
            kind = "device or pipe"
        # orig_filename: the name before zipfile turns separators and cuts at a zero byte.
        yield _Member(info.orig_filename, kind, functools.partial(packed.open, info))


def _of_tar(packed: tarfile.TarFile) -> Iterator[_Member]:
    while (info := packed.next()) is not None:
        # tarfile keeps every member: a hundred thousand are 100 MB.
        packed.members.clear()  # type: ignore[attr-defined]
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
            kind = "file"
        elif info.isdir():
            kind = "folder"
        elif info.issym() or info.islnk():
            kind = f"link to {info.linkname!r}"
        else:
            kind = "sparse file" if info.issparse() else "device or pipe"
        yield _Member(info.name, kind, functools.partial(_content, packed, info))


def _content(packed: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    source = packed.extractfile(info)
    assert source is not None  # only links and devices have none
    return source


@contextmanager
def _damage(archive: Path) -> Iterator[None]:
    damage = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)
    try:
        yield
    except (*damage, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the archive's: gzip and bz2 report damage as an OSError without a number
        why = str(error) or type(error).__name__
        raise ArchiveError(
            f"{archive} is damaged or not an archive ({why})", "a complete tar or zip", "delete it and fetch it again"
        ) from None
