"""`asit download`: a data set appears when it is complete; what is printed, and what an interruption leaves."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from archives import write_tar, write_zip

from asit import cli, logs
from asit.data.download import fetch as downloads
from asit.data.download.fetch import download
from asit.data.download.http import DownloadError
from asit.data.download.registry import SOURCES, Archive, DownloadSource
from asit.errors import CheckpointError, ConfigError
from asit.io import atomic
from asit.progress import counter

DATA = np.random.default_rng(1).integers(0, 256, 10_000, dtype=np.uint8).tobytes()


WORDS = {"./yes/a.wav": DATA[:5000], "./yes/b.wav": DATA[5000:9000], "./yes/._b.wav": b"fork", "./README.md": b"hello"}
TEST = {"./yes/t.wav": DATA[9000:9900]}


def source(server: Any, folder: Path) -> DownloadSource:
    """A miniature of Speech Commands V1: two archives, each to a folder of its own."""
    archives = []
    for name, files, count in (("train", WORDS, 2), ("test", TEST, 1)):
        content = server.files[f"/{name}.tar.gz"] = write_tar(folder / name, [*files.items()]).read_bytes()
        sha = hashlib.sha256(content).hexdigest()
        url = f"{server.url}/{name}.tar.gz"
        archives.append(Archive(url, f"{name}.tar.gz", len(content), 16_000, count, sha256=sha, folder=name))
    return DownloadSource("mini", "Mini", "CC0", tuple(archives), "mini {}")


Get = Callable[..., downloads.Downloaded]


@pytest.fixture
def get(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Get:
    monkeypatch.setitem(SOURCES, "mini", source(server, tmp_path))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return partial(download, "mini", tmp_path / "data" / "mini")


def test_a_set_is_downloaded(get: Get, server: Any, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int | None]] = []
    server.script = [200, None, 100, None]
    got = get(progress=lambda what: lambda *line: shown.append((what, *line)))
    assert not got.there
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["mini"]
    assert (got.folder / "train" / "yes" / "a.wav").read_bytes() == DATA[:5000]
    assert sorted(p.name for p in got.folder.iterdir()) == ["test", "train"]
    assert {line[0] for line in shown} == {
        "train.tar.gz",
        "test.tar.gz",
        "unpacking train.tar.gz",
        "unpacking test.tar.gz",
    }


def test_a_set_that_is_there_is_left_alone(get: Get, server: Any) -> None:
    folder = get().folder
    (folder / "notes.txt").write_text("mine")  # what the user adds beside the set does not matter
    asked = len(server.asked)
    assert get().there
    assert len(server.asked) == asked
    (folder / "train" / "yes" / "a.wav").unlink()
    with pytest.raises(DownloadError, match=r"1 recordings \(\*\*/\*\.wav\) of 2 train"):
        get()


def test_force_fetches_again_and_deletes_nothing(get: Get, server: Any) -> None:
    folder = get().folder
    (folder / "notes.txt").write_text("mine")
    (folder / "train" / "yes" / "a.wav").unlink()
    got = get(force=True)
    assert got.replaced == folder.with_name("mini.old")
    assert (got.replaced / "notes.txt").read_text() == "mine"
    assert (folder / "train" / "yes" / "a.wav").exists()
    assert len(server.asked) == 4
    with pytest.raises(DownloadError, match=r"mini\.old is there"):
        get(force=True)


def test_a_set_unpacked_by_other_means_counts(get: Get, server: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "mini"
    for name, files in (("train", WORDS), ("test", TEST)):
        for path, content in files.items():
            (folder / name / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / path).write_bytes(content)
    assert get().there
    (folder / "test" / "yes" / "t.wav").unlink()
    with pytest.raises(DownloadError, match=r"mini is there; 0 recordings .* of 1 test"):
        get()
    assert (folder / "train" / "yes" / "a.wav").exists()
    assert not server.asked


def test_folders_that_cannot_be_the_target(get: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "mini"
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(DownloadError, match="is there; 0 recordings"):
        get()
    folder.unlink()
    folder.mkdir()  # empty: may be used
    assert not get().there
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="the folder you are in"):
        download("free-spoken-digit", ".")


def test_archives_are_kept_on_demand_and_where_the_user_put_them(get: Get, server: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.tar.gz").write_bytes(server.files["/train.tar.gz"])
    got = get()
    assert [path.name for path in got.kept] == ["train.tar.gz"]
    assert [asked["path"] for asked in server.asked] == ["/test.tar.gz"]
    shutil.rmtree(got.folder)
    assert [path.name for path in get(keep_archive=True).kept] == ["train.tar.gz", "test.tar.gz"]
    assert (tmp_path / "data" / "test.tar.gz").exists()


def test_a_mirror(get: Get, server: Any) -> None:
    for name in ("train", "test"):
        server.files[f"/mirror/{name}.tar.gz"] = server.files.pop(f"/{name}.tar.gz")
    with pytest.raises(ConfigError, match=r"mini has 2 archives\n.*train\.tar\.gz, test\.tar\.gz, ending in /"):
        get(url=server.url + "/mirror/train.tar.gz")
    with pytest.raises(DownloadError, match="404"):
        get()
    assert not get(url=server.url + "/mirror/").there


def test_a_mirror_with_other_files_is_refused(get: Get, server: Any, tmp_path: Path) -> None:
    content = server.files["/train.tar.gz"]
    server.files["/train.tar.gz"] = content[:-20] + bytes(20)
    with pytest.raises(DownloadError, match="as published"):
        get()
    assert not (tmp_path / "data" / "mini").exists()


def test_nothing_half_unpacked_is_left(get: Get, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str) -> Any:
        if what == "unpacking test.tar.gz":
            raise KeyboardInterrupt
        return lambda done, total: None

    with pytest.raises(KeyboardInterrupt, match="the same command resumes from there"):
        get(progress=stop)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["test.tar.gz", "train.tar.gz"]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads, "unpack", full)
        with pytest.raises(CheckpointError, match=r"the disk is full: .*mini was not written"):
            get()
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["test.tar.gz", "train.tar.gz"]
    left = atomic.draft_of(tmp_path / "data" / "mini")  # of a killed run
    (left / "x").mkdir(parents=True)
    asked = len(server.asked)
    assert not get().there
    assert len(server.asked) == asked
    assert not left.exists()


def test_stopping_a_transfer_says_how_to_go_on(get: Get) -> None:
    def stop(what: str) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="the same command resumes from there"):
        get(progress=stop)


def test_room_is_asked_for_first(get: Get, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=32_100))
    with pytest.raises(DownloadError, match=r"GB free[^$]*the archives still to come, and what they unpack to"):
        get()
    assert not server.asked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recordings": 3}, r"2 recordings .* of 3 train\n.*the complete Mini"),
        ({"digest": "0" * 64}, "not those of Mini"),
        ({"unpacked": 7_000}, r"at \./yes/b\.wav more has come out"),
    ],
)
def test_an_archive_that_is_not_the_set(
    get: Get, server: Any, tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = SOURCES["mini"].archives
    monkeypatch.setitem(SOURCES, "mini", replace(SOURCES["mini"], archives=(replace(train, **change), test)))
    with pytest.raises(DownloadError, match=message):
        get()
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["test.tar.gz", "train.tar.gz"]


def test_the_digest_by_hand(tmp_path: Path) -> None:
    paths = [tmp_path / "c.wav", tmp_path / "b.wav", tmp_path / "a.wav"]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    lines = "".join(f"{hashlib.md5(bytes([i])).hexdigest()}  {paths[i].name}\n" for i in (2, 1, 0))
    assert downloads.digest(paths) == hashlib.sha256(lines.encode()).hexdigest()


def test_unknown_sets_and_those_of_others(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no esc, did you mean esc50"):
        download("esc", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"eval_segments\.csv[^$]*asit catalogue audioset ROOT"):
        download("audioset", tmp_path / "x")
    with pytest.raises(ConfigError, match=r"iden_split\.txt[^$]*asit catalogue voxceleb1 ROOT"):
        download("voxceleb1", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_every_set_is_proved() -> None:
    """Each archive has a published checksum, or each of its recordings enters a digest."""
    for name, known in SOURCES.items():
        assert name == known.name
        for archive in known.archives:
            assert archive.url.startswith("https://")
            assert archive.size
            assert archive.unpacked
            assert archive.sha256 or archive.digest


def test_the_real_digits_from_the_command_line(
    server: Any,
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The set as it is published, packed as its host packs it, against the digest that asit carries."""
    recordings = sorted((shared_data / "free-spoken-digit-dataset" / "recordings").glob("*.wav"))
    top = "free-spoken-digit-dataset-d6938f9bf1545aa66d8489fc9f1385a7abd64282/"
    files = {f"{top}recordings/{path.name}": path.read_bytes() for path in recordings}
    server.files["/d.zip"] = write_zip(
        tmp_path / "d.zip", [(top, b""), *files.items(), (top + "README.md", b"digits")]
    ).read_bytes()
    server.script = [1_000_000, None]
    monkeypatch.setattr(time, "sleep", lambda _: None)
    out = tmp_path / "digits"
    given = ["download", "free-spoken-digit", "--out", str(out), "--url", server.url + "/d.zip"]
    assert cli.main(given) == 0
    printed = capsys.readouterr()
    assert f"{out}: Free Spoken Digit Dataset 1.0.10, 3,000 recordings\n" in printed.out
    assert "licence: CC BY-SA 4.0" in printed.out
    assert f"next: asit catalogue {out}/table.csv --out free-spoken-digit.jsonl" in printed.out
    assert "retry 1 in 1 s" in caplog.text
    assert "free-spoken-digit-dataset-1.0.10.zip: " in printed.err
    with (out / "table.csv").open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == ["path", "label", "group"]
    assert len(rows) == 3001
    assert len({tuple(row[1:]) for row in rows[1:]}) == 60
    assert rows[1] == ["recordings/0_george_0.wav", "0", "george"]
    assert all((out / row[0]).is_file() for row in rows[1:])
    assert cli.main(given) == 0
    assert "already there" in capsys.readouterr().out
    # One byte of one recording: the size stays, the digest does not.
    damaged = out / "recordings" / recordings[7].name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x55")
    assert cli.main(given) == 2
    assert "3,000 recordings, but not those of Free Spoken Digit Dataset" in capsys.readouterr().err


def test_command_line_of_sets_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", "audioset"]) == 2
    assert "balanced_train_segments.csv" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_progress_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    terminal, plain = Terminal(), io.StringIO()
    for stream in (terminal, plain):
        monkeypatch.setattr(sys, "stderr", stream)
        now[0] = 100.0
        with logs.console():
            show, unpacking = (counter(what, "MB", 1e6) for what in ("a.zip", "unpacking a.zip"))
            show(50_000_000, 1_050_000_000)  # resumed: the first 50 MB took no time now
            now[0] = 110.0
            show(150_000_000, 1_050_000_000)
            now[0] = 200.0
            show(1_050_000_000, 1_050_000_000)
            unpacking(7_000_000, None)
    assert terminal.getvalue().split("\r\x1b[K")[1:] == [
        "a.zip: 50/1,050 MB",
        "a.zip: 150/1,050 MB  10 MB/s  2 min left",
        "a.zip: 1,050/1,050 MB  10 MB/s  in 2 min\n",
        "unpacking a.zip: 7 MB  0.1 MB/s\n",
    ]
    assert plain.getvalue() == (
        "a.zip: 50/1,050 MB\na.zip: 1,050/1,050 MB  10 MB/s  in 2 min\nunpacking a.zip: 7 MB  0.1 MB/s\n"
    )
