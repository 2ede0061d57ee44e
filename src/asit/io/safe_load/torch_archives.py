"""Check the two kinds of files that `torch.save` writes before torch reads them.

Since torch 1.6: a zip archive with a pickle and the raw numbers of each storage, uncompressed. Before: five
pickles (magic number, version, machine, content, keys of the storages), then the numbers.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import zipfile
from typing import IO, NoReturn

from asit.io.safe_load.pickles import Refused, shown, walk

LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""First bytes of files of torch before 1.6 (torch/serialization.py)."""

ZIP = b"PK\x03\x04"
"""First bytes of a zip archive."""

_NOT_RECORDS = ("code/", "constants.pkl")
"""Parts that only TorchScript's archives have."""


def check_archive(file: IO[bytes], length: int, training_state: bool) -> None:
    """Compare the storages that the pickle in a zip archive of `length` bytes refers to with those in the archive.

    Raises:
        Refused: they differ, or the archive is not as torch writes one.
        Other exceptions: it is damaged.
    """
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        _check_end(file, length)
        parts = archive.infolist()
        names = [part.filename for part in parts]
        if len({name.lower() for name in names}) != len(names):  # torch's reader takes small letters for capitals
            raise Refused("is an archive with two parts of one name")
        for part in parts:
            _check_part(part)
        if sum(part.file_size for part in parts) > length:
            raise Refused(f"is an archive whose parts are larger than its {length} bytes")
        tops = {name.split("/")[0] for name in names}
        inner = {name.partition("/")[2] for name in names}
        if any(name.startswith(_NOT_RECORDS) for name in inner):
            raise Refused("is a TorchScript archive, which holds code")
        if len(tops) != 1 or "data.pkl" not in inner:
            raise Refused(f"is a zip archive without a data.pkl ({', '.join(map(shown, sorted(names)[:3]))})")
        top = tops.pop()
        sizes: dict[str, int] = {}
        walk(io.BytesIO(archive.read(f"{top}/data.pkl")), training_state, sizes)
        held = {part.filename: part.file_size for part in parts}
        for key, size in sizes.items():
            has = held.get(f"{top}/data/{key}")
            if has != size:
                there = "nothing" if has is None else f"{has} bytes"
                raise Refused(f"says that it holds {size} bytes for storage {shown(key)!r} and holds {there}")


def _check_part(part: zipfile.ZipInfo) -> None:
    steps, name = re.split(r"[/\\]", part.filename), shown(part.filename)
    if ".." in steps or not steps[0] or ":" in steps[0] or "\x00" in part.orig_filename:
        raise Refused(f"is an archive with a part outside itself ({name!r})")
    if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
        raise Refused(f"is an archive with compressed parts ({name!r}), which torch never writes")
    if part.file_size != part.compress_size:
        raise Refused(f"is an archive that says two sizes of a part ({name!r})")


def _check_end(file: IO[bytes], length: int) -> None:
    """Raise Refused unless the table of contents ends where the file's last record begins, with no comment after it."""
    # Readers find the table in different ways: a file with two would be one archive for Python, another for torch.
    file.seek(max(0, length - 98))
    tail = file.read().rjust(98, b"\0")
    # Records of APPNOTE 6.3: end of the table (22 bytes) after, in large files, its 64-bit form (56) and the
    # position of that (20).
    signature, (size, start), comment = tail[-22:-18], struct.unpack("<2L", tail[-10:-2]), tail[-2:]
    records, placed = 22, True
    if tail[-42:-38] == b"PK\x06\x07":
        records = 98
        size, start = struct.unpack("<2Q", tail[-58:-42])
        placed = tail[:4] == b"PK\x06\x06" and struct.unpack("<Q", tail[-34:-26]) == (length - 98,)
    if signature != b"PK\x05\x06" or comment != b"\0\0" or not placed or start + size + records != length:
        raise Refused("is an archive with something before or after it, or with two tables of contents")


def check_legacy(file: IO[bytes], length: int, training_state: bool) -> None:
    """Compare the sizes in the pickles of an older file of `length` bytes with its length.

    Raises:
        Refused: it is less.
        Other exceptions: it is damaged.
    """
    file.seek(0)
    sizes: dict[str, int] = {}
    for _ in range(5):
        walk(file, training_state, sizes)
    if sum(sizes.values()) + file.tell() > length:
        raise Refused(f"says that it holds {sum(sizes.values())} bytes of numbers, and is {length} bytes long")


def no_format(file: IO[bytes], training_state: bool) -> NoReturn:
    """Raise the exception that says what a file is that torch.save did not write."""
    file.seek(0)
    start = file.read(262)
    if start[257:] == b"ustar":
        raise Refused("is a tar archive: of torch before 0.2, or no weights")
    if not start:
        raise EOFError("it is empty")
    if start[0] == 0x80:
        file.seek(0)
        walk(file, training_state, {})
        raise Refused("is a pickle that torch.save did not write")
    raise pickle.UnpicklingError("it begins like no file of torch.save")


def check_download(file: IO[bytes]) -> None:
    """Raise Refused for what a failed download leaves instead of the file."""
    file.seek(0)
    start = file.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise Refused("is a pointer of Git LFS: the weights themselves were not downloaded", "run git lfs pull there")
    if start.startswith((b"<!doctype", b"<html")):
        raise Refused("is a web page: the weights themselves were not downloaded", "download the file itself")
