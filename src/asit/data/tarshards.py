"""Tar shards as lists of recordings: where each one's bytes lie, by one pass over the headers; nothing is unpacked.

A shard is an uncompressed tar file on a disk or in a store, as webdataset writes them: key.flac beside key.json and the
like. What is not audio by its name is counted and left alone; folders, links and devices are passed over.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from asit.audio import files
from asit.data import spans, stores
from asit.data.columns import DAMAGE
from asit.errors import AsitError, CatalogueError

SUFFIX = ".tar"
SIDECARS = (".cls", ".json")
"""Files beside a recording that may hold its label."""
_PIECE = 4 << 20
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
        size: of the tar file, bytes.
        members: in the file's order.
        others: how many files of other kinds there are, for each suffix.
        fault: where and why the headers could not be read on; None: they were read to their end.
    """

    size: int = 0
    members: list[Member] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    fault: str | None = None


def is_shard(path: str) -> bool:
    """Whether a file is a tar by its name."""
    return path.lower().endswith(SUFFIX)


def is_packed(path: str) -> bool:
    """Whether a file is a compressed tar by its name."""
    return path.lower().endswith(PACKED)


def read_shard(place: str, labels: dict[str, str] | None = None) -> Shard:
    """The recordings of an uncompressed tar file.

    Members whose names are absolute or climb out by "..", sparse ones and ones that the file does not hold to their end
    come with a fault. A file that is cut off gives those before the cut, and its fault.

    Args:
        place: path or URL.
        labels: takes the text of each sidecar KEY.cls, or "label" in KEY.json, by its key.

    Raises:
        CatalogueError: a compressed tar, no tar, or a file that cannot be read.
        StoreError: a tar at a URL that is missing, or a store that cannot be reached.
    """
    if is_packed(place):
        raise CatalogueError(
            f"{place} is compressed",
            "an uncompressed .tar, in which a recording can be reached where it lies",
            "uncompress it first (such as: gunzip FILE.tar.gz); compressed audio gains nothing by it",
        )
    shard = Shard()
    try:
        with _opened(place) as (file, shard.size), tarfile.open(fileobj=file, mode="r:") as archive:
            for header in _headers(archive, shard):
                _take(shard, header)
                if labels is not None and (label := _label(archive, header)) is not None:
                    labels[key_of(header.name)] = label
    except AsitError:
        raise
    except FileNotFoundError:
        raise CatalogueError(f"there is no {place}", "a tar file", "check the path") from None
    except OSError as error:
        raise CatalogueError(f"{place} cannot be read: {error.strerror}", "a tar file", "check its rights") from None
    except Exception as error:  # as in `_headers`, for the first one
        raise _no_tar(place, error) from None
    return shard


@contextmanager
def _opened(place: str) -> Iterator[tuple[BinaryIO, int]]:
    """A tar file and its length."""
    if stores.is_url(place):
        size = stores.size(place)
        with spans.opened((place, 0, size)) as file:
            yield cast(BinaryIO, _InPieces(file)), size
    else:
        with Path(place).open("rb") as file:
            yield cast(BinaryIO, _InPieces(file)), os.fstat(file.fileno()).st_size


class _InPieces:
    """A tar file that gives no more than `_PIECE` bytes at once: a header may claim any length for a name."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _PIECE:
            raise tarfile.HeaderError(f"a header of {size:,} bytes")  # type: ignore[attr-defined]
        return self.file.read(size)


def key_of(name: str) -> str:
    """webdataset's key: the name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


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
    end = -1
    while True:
        try:
            header = archive.next()
            if header is not None and archive.offset <= end:  # older releases of Python then loop for ever
                raise tarfile.ReadError("a length below zero")
            end = archive.offset
        except AsitError:  # of a store
            raise
        except Exception as error:  # tarfile raises whatever its parsing meets, RecursionError and the like
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


def _take(shard: Shard, header: tarfile.TarInfo) -> None:
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
    elif header.offset_data + header.size > shard.size:
        fault = f"the tar ends before its {header.size} bytes do"
    shard.members.append(Member(header.name, header.offset_data, header.size, fault))


def _label(archive: tarfile.TarFile, header: tarfile.TarInfo) -> str | None:
    suffix = "." + header.name.rpartition(".")[2].lower()
    if suffix not in SIDECARS or not header.isreg() or header.size > 1 << 20:
        return None
    try:
        file = archive.extractfile(header)
        text = b"" if file is None else file.read()
    except tarfile.ReadError:  # cut off
        return None
    if suffix == ".cls":
        return text.decode("utf-8", "replace").strip() or None
    try:
        label = json.loads(text).get("label")
    except DAMAGE:
        return None
    return str(label) if isinstance(label, str | int) and str(label) else None


def _no_tar(path: str, error: Exception) -> CatalogueError:
    head = b""
    if not stores.is_url(path) and Path(path).is_file():
        with Path(path).open("rb") as file:
            head = file.read(6)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return CatalogueError(
        f"{path} is {'compressed' if packed else 'no tar file'}: {error}",
        "an uncompressed tar file",
        "uncompress it first" if packed else "check the path, or fetch the file anew",
    )
