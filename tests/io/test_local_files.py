"""Files named by the user: opening never waits for a pipe, and never reads without an end."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from asit.audio import files
from asit.config import yaml
from asit.data.catalogue import tables
from asit.data.catalogue.catalogue import Catalogue, is_catalogue
from asit.data.shards import tar_reader
from asit.errors import AsitError
from asit.io import local_files

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A pipe, a socket and a device."""
    monkeypatch.setattr(local_files, "_GRACE", 50)
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)  # a socket's path may be short only
        made.bind("socket")
    return {"a pipe": str(tmp_path / "pipe"), "a socket": str(tmp_path / "socket"), "a device": os.devnull}


def test_pipes_sockets_and_devices_are_refused_at_once(odd: dict[str, str], tmp_path: Path) -> None:
    for kind, path in odd.items():
        assert local_files.special(path) == kind
        with pytest.raises(OSError, match=f"it is {kind}, not a regular file"):
            local_files.open_file(path)
    with pytest.raises(OSError, match="it is a pipe that nothing writes to"):
        local_files.open_file(odd["a pipe"], pipes=True)
    assert local_files.special(tmp_path) is local_files.special(tmp_path / "none") is None
    with pytest.raises(IsADirectoryError):
        local_files.open_file(tmp_path)


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_pipe_with_a_writer_is_read_to_its_end(odd: dict[str, str], delay: float) -> None:
    content = os.urandom(1 << 18)

    def write() -> None:
        with Path(odd["a pipe"]).open("wb") as pipe:
            time.sleep(delay)  # the writer is there, and slower than the time within which there must be one
            pipe.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    with local_files.open_file(odd["a pipe"], pipes=True) as file:
        assert file.read() == content
    writer.join()


READERS: dict[str, Callable[[str], object]] = {
    "recording": files.probe,
    "whole recording": files.inspect,
    "table": lambda path: tables.read_table(_named(path, ".csv")),
    "list": lambda path: tables.read_table(_named(path, ".jsonl")),
    "catalogue": Catalogue.read,
    "shard": tar_reader.read_shard,
    "settings": lambda path: yaml.read_yaml(Path(path)),
}


def _named(path: str, suffix: str) -> Path:
    link = Path(path).name
    made = Path(f"{link}{suffix}").absolute()
    made.symlink_to(path)
    return made


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_them(odd: dict[str, str], reader: str) -> None:
    for kind, path in odd.items():
        began = time.monotonic()
        with pytest.raises(AsitError, match=f"it is {kind}"):
            READERS[reader](path)
        assert not is_catalogue(Path(path))
        assert time.monotonic() - began < 5


def test_a_recording_behind_a_pipe(odd: dict[str, str], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", [0.1, -0.1] * 800, 16000)
    content = (tmp_path / "a.wav").read_bytes()
    writer = threading.Thread(target=Path(odd["a pipe"]).write_bytes, args=[content])
    writer.start()
    assert len(files.read(odd["a pipe"])) == 1600
    writer.join()
