"""A file is written whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asit.errors import CheckpointError, ConfigError
from asit.io import atomic
from asit.io.checkpoint import check_free, write_file


def test_a_file_is_made_and_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    def write(to: Path) -> None:
        assert to.suffix == ".onnx"
        assert not (tmp_path / "a" / "m.onnx").exists()
        to.write_bytes(b"whole")

    (tmp_path / "a").mkdir()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = atomic.draft_of(tmp_path / "a" / "m.onnx", ending=".onnx")
    left = left.with_name(left.name.replace(f".{os.getpid()}-", f".{int(ended.stdout)}-"))
    left.write_bytes(b"left by a writer that was killed")
    write_file(tmp_path / "a" / "m.onnx", write)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["m.onnx"]
    assert (tmp_path / "a" / "m.onnx").read_bytes() == b"whole"


def test_its_folder_is_made_too(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "m.pt2", lambda to: to.write_bytes(b"x") and None)
    assert (tmp_path / "a" / "b" / "m.pt2").read_bytes() == b"x"


def test_what_is_there_stays_unless_told(tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"m\.pt2 already exists.*\n.*\n.*--overwrite"):
        write_file(target, lambda to: to.write_bytes(b"other") and None)
    assert target.read_bytes() == b"mine"
    write_file(target, lambda to: to.write_bytes(b"other") and None, overwrite=True)
    assert target.read_bytes() == b"other"
    with pytest.raises(ConfigError, match="is a folder"):
        check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "may not be written")],
)
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, number: int, said: str) -> None:
    def write(to: Path) -> None:
        to.write_bytes(b"half")
        raise OSError(number, os.strerror(number))

    target = tmp_path / "m.pt2"
    target.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=said):
        write_file(target, write, overwrite=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.pt2", b"mine")]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(CheckpointError, match="may not be written"):
        write_file(tmp_path / "a" / "m.pt2", lambda to: to.write_bytes(b"x") and None)


def test_other_errors_go_on_and_leave_nothing(tmp_path: Path) -> None:
    def write(to: Path) -> None:
        to.write_bytes(b"half")
        raise KeyError("mine")

    with pytest.raises(KeyError):
        write_file(tmp_path / "m.pt2", write)
    assert not list(tmp_path.iterdir())
