"""List the recordings in a tar shard and what sidecars say of them, by one pass over its headers.

A shard is an uncompressed tar file on a disk or in a store, as webdataset writes them: key.flac beside key.json. Files
that are not audio by their names are counted; folders, links and devices are skipped.
"""

from __future__ import annotations

import itertools
import logging
import operator
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from asit.audio import files
from asit.data.catalogue.columns import DAMAGE, WORDS, normal
from asit.data.catalogue.tables import label_text, unique_keys
from asit.data.shards import range_reader
from asit.errors import AsitError, CatalogueError
from asit.io import local_files, parsing, storage

log = logging.getLogger(__name__)

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
        fault: where and why reading the headers stopped; None: they were read to their end.
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


def read_shard(location: str, sidecars: Sidecars | None = None) -> Shard:
    """Return the recordings of an uncompressed tar file.

    Members whose names are absolute or lead out by "..", sparse ones and truncated ones come with a fault. A truncated
    file gives those before the cut, and its fault.

    Args:
        location: path or URL.
        sidecars: is given each KEY.cls and KEY.json.

    Raises:
        CatalogueError: a compressed tar, no tar, or a file that cannot be read.
        StoreError: a tar at a URL that is missing, or a store that cannot be reached.
    """
    if is_packed(location):
        raise CatalogueError(
            f"{location} is compressed",
            "an uncompressed .tar, in which a recording can be read without unpacking",
            "uncompress it first (such as: gunzip FILE.tar.gz); compressed audio gains nothing by it",
        )
    shard = Shard()
    try:
        with _opened(location) as (file, shard.size), tarfile.open(fileobj=file, mode="r:") as archive:
            for header in _headers(archive, shard):
                _take(shard, header)
                if sidecars is not None:
                    sidecars.take(archive, header)
    except AsitError:
        raise
    except FileNotFoundError:
        raise CatalogueError(f"there is no {location}", "a tar file", "check the path") from None
    except OSError as error:
        raise CatalogueError(f"{location} cannot be read: {error.strerror}", "a tar file", "check its rights") from None
    except Exception as error:  # as in `_headers`, for the first one
        fix = "uncompress it if it is compressed; or check the path, or fetch the file again"
        raise CatalogueError(f"{location} is no tar file: {error}", "an uncompressed tar file", fix) from None
    return shard


@contextmanager
def _opened(location: str) -> Iterator[tuple[BinaryIO, int]]:
    """A tar file and its length."""
    if storage.is_url(location):
        size = storage.size(location)
        with range_reader.open_span(range_reader.ByteSpan(location, 0, size)) as file:
            yield cast(BinaryIO, _BoundedReads(file)), size
    else:
        with local_files.open_file(location) as file:
            yield cast(BinaryIO, _BoundedReads(file)), os.fstat(file.fileno()).st_size


class _BoundedReads:
    """A file that gives no more than `_PIECE` bytes at once: a header may claim any length for a name."""

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


class Sidecars:
    """Labels, splits, folds and groups in the files beside the recordings of one shard.

    KEY.cls holds a label, KEY.json an object with any of the four. A sidecar belongs to the recording of the same name
    but for the last suffix: "a.2024-01.cls" to "a.2024-01.wav". One without such a recording belongs to the only
    recording of its key, which webdataset ends at the first dot.
    """

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self._values: dict[str, dict[str, str]] = {}  # sidecar -> column -> text
        self._twice: list[str] = []
        self._damaged: list[str] = []

    def take(self, archive: tarfile.TarFile, header: tarfile.TarInfo) -> None:
        """Read a member if it is a sidecar; a damaged one is counted."""
        _, dot, suffix = header.name.rpartition(".")
        if dot + suffix.lower() not in SIDECARS or not header.isreg() or header.size > 1 << 20:
            return
        if header.name.rpartition("/")[2].startswith("."):  # macOS's resource forks, as in `_take`
            return
        try:
            file = archive.extractfile(header)
            content = b"" if file is None else file.read()
        except tarfile.ReadError:  # the tar ends in it, which `_headers` meets next; its recordings stay
            self._damaged.append(f"{header.name}: cut off")
            return
        values = self._read(header.name, content)
        if self._values.setdefault(header.name, values) != values:
            self._twice.append(header.name)

    def _read(self, name: str, content: bytes) -> dict[str, str]:
        values = {}
        try:
            if name.lower().endswith(".cls"):
                found: Any = {"label": content.decode("utf-8")}
            else:
                found = parsing.from_json(content, pairs=unique_keys)
                found = {**found, "label": label_text(found.get("label"))} if isinstance(found, dict) else {}
            for column in WORDS:
                if (text := normal(column, found.get(column))) is not None:
                    values[column] = text
        except DAMAGE as error:
            self._damaged.append(f"{name}: {error.args[0] if error.args else error}")
        return values

    def of(self, members: Sequence[Member]) -> dict[str, dict[str, str]]:
        """Return the columns of each recording, by its name; log how many sidecars are damaged.

        Raises:
            CatalogueError: a member that comes twice, or sidecars that several recordings of one key share, or that
                contradict each other.
        """
        twice = [name for name, count in Counter(member.name for member in members).items() if count > 1]
        if twice := [*dict.fromkeys([*twice, *self._twice])]:
            raise CatalogueError(
                f"{self.shard} holds {len(twice)} names twice: {', '.join(twice[:3])}",
                "each member once",
                "write the tar again without one of the two",
            )
        if self._damaged:
            log.warning("%s: %d sidecars are damaged, the first %s", self.shard, len(self._damaged), self._damaged[0])
        of_key: defaultdict[str, list[str]] = defaultdict(list)
        of_stem: defaultdict[str, list[str]] = defaultdict(list)
        for member in members:
            of_key[key_of(member.name)].append(member.name)
            of_stem[member.name.rpartition(".")[0]].append(member.name)
        found: dict[str, dict[str, str]] = {member.name: {} for member in members}
        for sidecar, values in filter(operator.itemgetter(1), self._values.items()):
            owners, key = of_stem.get(sidecar.rpartition(".")[0], []), key_of(sidecar)
            if not owners and len(owners := of_key.get(key, [])) > 1:
                names = sorted(owners)
                raise CatalogueError(
                    f"{self.shard}: {len(names)} recordings have the key '{key}', which ends at the first dot: "
                    f"{', '.join(names[:3])}; and {sidecar} belongs to none of them by its name",
                    "a sidecar for each recording, or one recording a key",
                    f"name sidecars as recordings are, such as {names[0].rpartition('.')[0]}.cls; or give recordings "
                    "names without further dots",
                )
            for owner, (column, text) in itertools.product(owners, values.items()):
                if (known := found[owner].setdefault(column, text)) != text:
                    raise CatalogueError(
                        f"{self.shard}: {sidecar} says the {column} of {owner} is '{text}', another sidecar '{known}'",
                        f"one {column} for each recording",
                        "mend one of the two, or take it out",
                    )
        return found


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
