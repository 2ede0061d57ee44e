"""Tar shards as lists of recordings: where each one's bytes lie, by one pass over the headers; nothing is unpacked.

A shard is an uncompressed tar file, as webdataset writes them: key.flac beside key.json and the like. What is not
audio by its name is counted and left alone; folders, links and devices are passed over.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from asit.audio import files
from asit.errors import CatalogueError

SUFFIX = ".tar"
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
"""Names of compressed tar files, in which nothing can be reached without unpacking all before it."""


@dataclass(frozen=True, slots=True)
class Member:
    """One recording in a shard.

    Attributes:
        name: in the shard, as its header says.
        offset: of its first byte in the tar file.
        size: its bytes.
        fault: why it is not read; None: it may be.
    """

    name: str
    offset: int
    size: int
    fault: str | None = None


@dataclass
class Shard:
    """The recordings of one tar file.

    Attributes:
        members: in the file's order.
        others: how many files of other kinds there are, for each suffix.
        fault: where and why the headers could not be read on; None: they were read to their end.
    """

    members: list[Member] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    fault: str | None = None


def is_shard(path: str) -> bool:
    """Whether a file is a tar by its name."""
    return path.lower().endswith(SUFFIX)


def is_packed(path: str) -> bool:
    """Whether a file is a compressed tar by its name."""
    return path.lower().endswith(PACKED)


def read_shard(path: str) -> Shard:
    """The recordings of an uncompressed tar file.

    Members whose names are absolute or climb out by "..", sparse ones and ones that the file does not hold to their end
    come with a fault. A file that is cut off gives those before the cut, and its fault.

    Raises:
        CatalogueError: a compressed tar, no tar, or a file that cannot be read.
    """
    if is_packed(path):
        raise CatalogueError(
            f"{path} is compressed",
            "an uncompressed .tar, in which a recording can be reached where it lies",
            "uncompress it first (such as: gunzip FILE.tar.gz); compressed audio gains nothing by it",
        )
    shard = Shard()
    try:
        size = Path(path).stat().st_size
        with tarfile.open(path, "r:") as archive:
            for header in _headers(archive, shard):
                _take(shard, header, size)
    except tarfile.ReadError as error:
        raise _no_tar(path, error) from None
    except FileNotFoundError:
        raise CatalogueError(f"there is no {path}", "a tar file", "check the path") from None
    except OSError as error:
        raise CatalogueError(f"{path} cannot be read: {error.strerror}", "a tar file", "check its rights") from None
    return shard


def read_member(path: str, offset: int, size: int) -> bytes:
    """The bytes of a member, or fewer where the tar file has become shorter."""
    with Path(path).open("rb", buffering=0) as file:
        file.seek(offset)
        parts = []
        while size > 0 and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def _headers(archive: tarfile.TarFile, shard: Shard) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            header = archive.next()
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            shard.fault = f"cut off or damaged at byte {archive.offset}: {error}"
            return
        if header is None:  # a header that is none counts as the end: an end is empty, or zeros
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                shard.fault = f"damaged at byte {archive.offset}: no header there"
            return
        archive.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
        yield header


def _take(shard: Shard, header: tarfile.TarInfo, size: int) -> None:
    if not (header.isreg() or header.issparse()):
        return
    base = header.name.rsplit("/", 1)[-1]
    suffix = "." + base.rpartition(".")[2].lower() if "." in base[1:] else ""
    if base.startswith(".") and not base.startswith(".."):  # such as the resource forks that macOS puts into tars
        return
    if suffix not in files.SUFFIXES:
        shard.others[suffix or "(no suffix)"] += 1
        return
    fault = None
    parts = header.name.replace("\\", "/").split("/")
    if header.name.startswith(("/", "\\")) or ".." in parts or (len(parts[0]) == 2 and parts[0][1] == ":"):
        fault = "its name leads out of the tar"
    elif header.issparse():
        fault = "it is stored as a sparse file"
    elif header.offset_data + header.size > size:
        fault = f"the tar ends before its {header.size} bytes do"
    shard.members.append(Member(header.name, header.offset_data, header.size, fault))


def _no_tar(path: str, error: Exception) -> CatalogueError:
    head = b""
    if Path(path).is_file():
        with Path(path).open("rb") as file:
            head = file.read(6)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return CatalogueError(
        f"{path} is {'compressed' if packed else 'no tar file'}: {error}",
        "an uncompressed tar file",
        "uncompress it first" if packed else "check the path, or fetch the file anew",
    )
