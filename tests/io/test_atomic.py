"""Files and folders are written atomically; drafts of killed writers are removed."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from asit.errors import CheckpointError, ConfigError
from asit.io import atomic


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def put(target: Path, text: str, **options: Any) -> None:
    """A folder with one file."""
    with atomic.write_folder(target, **options) as draft:
        (draft / "a.txt").write_text(text)


def half(path: Path, error: BaseException) -> None:
    """Fail in the middle of a write."""
    path.write_text("half")
    raise error


# Files


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "results.json"
    for old in (None, "old"):
        with atomic.write_file(target) as draft:
            draft.write_text(f"new, not {old}")
            assert (target.read_text() if target.exists() else None) == old
            assert re.fullmatch(r"\.results\.json\.[0-9a-f]{12}\.tmp", draft.name)
        assert target.read_text() == f"new, not {old}"
        assert names(tmp_path / "deep") == {"results.json"}
        target.write_text("old")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), KeyError("mine")])
@pytest.mark.parametrize("old", ["old", None])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, error: BaseException, old: str | None) -> None:
    target = tmp_path / "results.json"
    if old:
        target.write_text(old)
    with pytest.raises(type(error)), atomic.write_file(target) as draft:
        half(draft, error)
    assert [path.read_text() for path in tmp_path.iterdir()] == [old] * bool(old)


def test_a_block_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.write_file(tmp_path / "results.json"):
        pass
    assert names(tmp_path) == set()


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_on_the_disk_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with atomic.write_file(tmp_path / "results.json", sync=sync) as draft:
        draft.write_text("new")
    assert order == ["fsync"] * sync + ["replace"]


def test_existing_files_are_refused_before_any_work(tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    atomic.check_free(target, overwrite=False)
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"m\.pt2 already exists.*\n.*\n.*--overwrite"):
        atomic.check_free(target, overwrite=False)
    atomic.check_free(target, overwrite=True)
    with pytest.raises(ConfigError, match="is a folder"):
        atomic.check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EROFS, "may not be written")],
)
def test_disk_errors_name_the_target(tmp_path: Path, number: int, said: str) -> None:
    target = tmp_path / "m.pt2"
    target.write_bytes(b"mine")
    with (
        pytest.raises(CheckpointError, match=said),
        atomic.disk_errors(target),
        atomic.write_file(target) as draft,
    ):
        half(draft, OSError(number, os.strerror(number)))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.pt2", b"mine")]
    path = target / "below a file"
    with pytest.raises(CheckpointError, match="may not be written"), atomic.disk_errors(path), atomic.write_file(path):
        pass


# Folders


def test_a_folder_appears_complete_with_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic.write_folder(target) as draft:
        assert not target.exists()
        (draft / "sub").mkdir()
        (draft / "sub" / "b.txt").write_text("b")
    assert names(tmp_path / "deep") == {"out"}
    assert (target / "sub" / "b.txt").read_text() == "b"


@pytest.mark.parametrize("sync", [True, False])
def test_an_occupied_folder_is_refused_and_replaced_on_request(tmp_path: Path, sync: bool) -> None:
    target = tmp_path / "out"
    target.mkdir()
    put(target, "old", sync=sync)  # an empty one is free
    with pytest.raises(CheckpointError, match=r"out already exists\n.*free\n.*another path"):
        put(target, "new", sync=sync)
    assert (target / "a.txt").read_text() == "old"
    put(target, "new", overwrite=True, sync=sync)
    assert (target / "a.txt").read_text() == "new"
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine"), OSError(errno.EIO, "broken")])
def test_a_failure_leaves_the_old_folder(tmp_path: Path, error: BaseException) -> None:
    def fail(overwrite: bool) -> None:
        with pytest.raises(type(error)) as raised, atomic.write_folder(target, overwrite=overwrite) as draft:
            half(draft / "a.txt", error)
        assert raised.value is error

    target = tmp_path / "out"
    fail(False)
    assert names(tmp_path) == set()
    put(target, "old")
    fail(True)
    assert names(tmp_path) == {"out"}
    assert (target / "a.txt").read_text() == "old"


def test_a_failed_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    put(target, "old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="broken"):
        put(target, "new", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert (target / "a.txt").read_text() == "old"


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    said = r"disk is full: .*out was not written\n.*room for all of it\n.*free space"
    with pytest.raises(CheckpointError, match=said), atomic.write_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == set()
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(CheckpointError, match=r"what was there before is untouched") as caught,
        atomic.write_folder(tmp_path / "out", overwrite=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "checkpoint" not in str(caught.value)


def test_a_killed_writer_leaves_the_old_folder_and_its_draft_is_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    put(target, "old")
    code = (
        "import os, signal, sys; from pathlib import Path; from asit.io import atomic\n"
        "with atomic.write_folder(Path(sys.argv[1]), overwrite=True) as draft:\n"
        "    (draft / 'a.txt').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)])
    assert done.returncode == -signal.SIGKILL
    assert (target / "a.txt").read_text() == "old"
    assert len(names(tmp_path)) == 2
    atomic._swept.clear()  # as a new process has it
    (draft,) = tmp_path.glob(".out.*.tmp")
    os.utime(draft, (time.time() - 8 * 86400,) * 2)
    put(target, "new", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert (target / "a.txt").read_text() == "new"


def test_a_folder_killed_between_its_renames_comes_back(tmp_path: Path) -> None:
    put(tmp_path / ".out.old", "old")
    with pytest.raises(CheckpointError, match="already exists"):
        put(tmp_path / "out", "new")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_a_folder_killed_while_it_is_deleted_is_swept_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "out", "old")
    with monkeypatch.context() as killed:
        killed.setattr(atomic, "remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path / "out", "new", overwrite=True)
    assert len(names(tmp_path)) == 2
    atomic.sweep(tmp_path, {"out"}, locked=True)
    assert names(tmp_path) == {"out"}
    assert (tmp_path / "out" / "a.txt").read_text() == "new"


# Several writers


def threads(count: int, call: Callable[[int], Any]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(call, range(count)))


def test_writers_of_one_file_or_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    def file(number: int) -> None:
        for _ in range(20):
            atomic.write_text(tmp_path / "a.json", str(number) * 5000)

    def folder(number: int) -> None:
        for _ in range(20):
            with atomic.write_folder(tmp_path / "model", overwrite=True) as draft:
                (draft / "a.txt").write_text(str(number))
                (draft / "b.txt").write_text(str(number))

    threads(4, file)
    assert len(set((tmp_path / "a.json").read_text())) == 1
    threads(4, folder)
    assert (tmp_path / "model" / "a.txt").read_text() == (tmp_path / "model" / "b.txt").read_text()
    assert names(tmp_path) == {"a.json", "model"}


def test_drafts_of_dead_writers_are_removed_and_others_stay(tmp_path: Path) -> None:
    mine, left = atomic.draft_of(tmp_path / "a.json"), tmp_path / ".a.json.4711-0123abcd-0.tmp"
    legacy, last_week = tmp_path / ".a.json.tmp", time.time() - 8 * 86400
    for path in (mine, left, legacy):
        path.write_text("x")
    for path in (left, legacy):  # the latter may be another program's
        os.utime(path, (last_week, last_week))
    atomic.write_text(tmp_path / "b.json", "y")
    assert names(tmp_path) == {mine.name, legacy.name, "b.json"}
    atomic.sweep(tmp_path, {"b.json"}, locked=True)
    assert mine.exists()
    atomic.sweep(tmp_path, locked=True)
    assert names(tmp_path) == {"b.json"}
    atomic.sweep(tmp_path / "absent", locked=True)
