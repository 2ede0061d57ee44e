"""Unpacking: data sets come out complete, and no archive writes outside the folder or beyond its limits."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives import write_tar, write_zip

from asit.data.download.http import DownloadError
from asit.data.download.unpack import unpack

NOISE = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8).tobytes()  # does not pack
MOST = 1_000_000
SPECIAL = "'evil' is a link, a device or a pipe"
FILES = {"top/a.wav": b"one" * 100, "top/deep/b.wav": b"two", "top/empty.txt": b""}


Make = Callable[[Path, list[tuple[str, bytes]]], Path]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_special(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "box" / "into"
    folder.mkdir(parents=True)
    return folder


def refused(archive: Path, into: Path, message: str, most: int = MOST) -> None:
    """Unpacking fails with the message, and nothing is outside the folder."""
    box = into.parent
    with pytest.raises(DownloadError, match=message) as caught:
        unpack(archive, into, most)
    assert str(archive) in str(caught.value)
    assert [p.name for p in box.iterdir()] == ["into"]
    assert not [p for p in into.rglob("*") if p.is_symlink()]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_unpack(tmp_path: Path, into: Path, mode: str) -> None:
    archive = write_tar(
        tmp_path / "a", [special("./", tarfile.DIRTYPE), *(("./" + n, b) for n, b in FILES.items())], mode
    )
    shown: list[int] = []
    unpack(archive, into, MOST, progress=lambda at, total: shown.append(at))
    assert tree(into) == FILES
    assert shown == [300, 303, 303, 303]


def test_zips_unpack_without_their_top_folder(tmp_path: Path, into: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", [("top/", b""), *FILES.items()])
    unpack(archive, into, MOST, strip=1)
    assert tree(into) == {name.removeprefix("top/"): content for name, content in FILES.items()}


def test_permissions_of_the_archive_are_not_taken_over(tmp_path: Path, into: Path) -> None:
    info = tarfile.TarInfo("a.sh")
    info.size, info.mode = 3, 0o6777
    unpack(write_tar(tmp_path / "a.tar", [info], "w"), into, MOST)
    unpack(write_zip(tmp_path / "a.zip", [zip_special("b.sh", stat.S_IFREG | 0o6777)]), into, MOST)
    for name in ("a.sh", "b.sh"):
        assert (into / name).stat().st_mode & (stat.S_ISUID | stat.S_ISGID | 0o111) == 0


@pytest.mark.parametrize(
    "name", ["../out.wav", "/tmp/out.wav", "a/../../out.wav", "..\\out.wav", "C:/out.wav", "C:out"]
)
@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_names_that_lead_out_are_refused(tmp_path: Path, into: Path, make: Make, name: str) -> None:
    refused(make(tmp_path / "a", [("good.wav", b"1"), (name, b"2")]), into, "leads out of the folder")


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "good.wav"),
        (tarfile.LNKTYPE, "../../secret"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_tars_with_links_and_devices_are_refused(tmp_path: Path, into: Path, kind: bytes, link: str) -> None:
    # A folder that is a link is not written through.
    members = [("good.wav", b"1"), special("evil", kind, link), ("evil/out.wav", b"1")]
    refused(write_tar(tmp_path / "a.tgz", members), into, SPECIAL)


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO])
def test_zips_with_links_and_pipes_are_refused(tmp_path: Path, into: Path, mode: int) -> None:
    refused(write_zip(tmp_path / "a.zip", [zip_special("evil", mode | 0o777)]), into, SPECIAL)


def test_encrypted_zips_are_refused(tmp_path: Path, into: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", [("a.wav", b"1")])
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    refused(archive, into, "'a.wav'.* is encrypted")


@pytest.mark.parametrize(
    "members",
    [
        [("a.wav", b"1"), ("a.wav", b"2")],
        [("a.wav", b"1"), ("./a.wav", b"2")],
        [("a", b"1"), ("a/b.wav", b"2")],
        [("a", b"1"), ("a/b/c.wav", b"2")],
        [("a/b.wav", b"1"), ("a", b"2")],
    ],
)
def test_a_name_that_occurs_twice_is_refused(tmp_path: Path, into: Path, members: list[tuple[str, bytes]]) -> None:
    refused(write_tar(tmp_path / "a.tgz", list(members)), into, "has the path of another member")


@pytest.mark.parametrize("make", [write_tar, write_zip])
def test_bombs_are_refused_before_they_burst(tmp_path: Path, into: Path, make: Make) -> None:
    bomb = make(tmp_path / "bomb", [("a.wav", bytes(900_000)), ("b.wav", bytes(900_000))])
    refused(bomb, into, r"at b\.wav more has come out\n.*at most 1,000,000 bytes")
    assert sum(map(len, tree(into).values())) <= MOST


def test_a_zip_with_false_sizes_gives_no_more_than_it_declares(tmp_path: Path, into: Path) -> None:
    archive = write_zip(tmp_path / "a.zip", [("a.wav", bytes(500_000))])
    content = bytearray(archive.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        start = content.index(signature) + at
        content[start : start + 4] = (10).to_bytes(4, "little")
    archive.write_bytes(content)
    refused(archive, into, "damaged or not an archive")
    assert sum(map(len, tree(into).values())) <= 10


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 1.0])  # 1.0: complete, and damaged
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_truncated_and_damaged_archives_are_reported(tmp_path: Path, into: Path, mode: str, keep: float) -> None:
    members: list[tuple[str, bytes]] = [(f"{i}.wav", NOISE[i * 10_000 :][:10_000]) for i in range(9)]
    archive = (
        write_zip(tmp_path / "a", list(members)) if mode == "zip" else write_tar(tmp_path / "a", list(members), mode)
    )
    content = bytearray(archive.read_bytes())
    if keep == 1.0:
        content[60:100] = bytes(byte ^ 0x5A for byte in content[60:100])
    archive.write_bytes(content[: int(len(content) * keep)])
    refused(archive, into, "damaged or not an archive")


def test_what_is_no_archive_is_reported(tmp_path: Path, into: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    for content in (b"", b"<html>please log in</html>", b"PK\x03\x04 and so on"):
        archive.write_bytes(content)
        refused(archive, into, "damaged or not an archive")


def test_files_beside_the_top_folder_are_refused(tmp_path: Path, into: Path) -> None:
    with pytest.raises(DownloadError, match=r"readme\.txt has the path of .* the folder itself"):
        unpack(write_zip(tmp_path / "a.zip", [("readme.txt", b"1")]), into, MOST, strip=1)
