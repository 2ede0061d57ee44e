"""One run at a time in a folder: it is refused while a process holds the lock, and taken over from a dead one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asit.errors import ConfigError
from asit.finetune import finetune_run
from asit.io import lock
from asit.pretrain import pretrain_run

fcntl = pytest.importorskip("fcntl")
ELSEWHERE = {"host": "node7", "pid": 4711, "began": "1970-01-01"}


def left_by(run: Path, holder: dict[str, Any]) -> Path:
    """The lock of a holder that did not release it."""
    run.mkdir(exist_ok=True)
    (run / lock.NAME).write_text(json.dumps(holder))
    return run / lock.NAME


def test_a_lock_is_held_and_released(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with lock.held(run):
        assert json.loads((run / lock.NAME).read_text())["pid"] == os.getpid()
        (run / "log.txt").touch()
    assert [path.name for path in run.iterdir()] == ["log.txt"]


def test_a_full_disk_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with (
        pytest.raises(ConfigError, match=r"run may not be written: No space left"),
        lock.held(tmp_path / "run"),
    ):
        pytest.fail("it was taken")
    assert list(tmp_path.iterdir()) == []


def test_an_unused_folder_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path / "run"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["tiny", "tuned"])
def test_two_runs_in_one_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start: Any = pretrain_run.pretrain if kind == "tiny" else finetune_run.finetune
    settings = request.getfixturevalue(kind)(run)
    with (
        lock.held(run),
        pytest.raises(ConfigError, match=rf"in use by another run: process {os.getpid()} on (.|\n)*--out"),
    ):
        start(settings)
    assert list(tmp_path.iterdir()) == []


HOLD = """
import os, sys, time
from pathlib import Path
from asit.io import lock
with lock.held(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)  # by the child itself: from here on it has closed what it inherited
    time.sleep(60)
"""


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """A folder whose holder was killed while a process that it had forked lives on."""
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"), lock.held(run):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    yield run
    os.kill(child, signal.SIGKILL)


def test_a_killed_holder_blocks_nobody(killed: Path) -> None:
    """Not even while a loader process of it lives."""
    assert (killed / lock.NAME).exists()
    with lock.held(killed):
        assert json.loads((killed / lock.NAME).read_text())["pid"] == os.getpid()


def test_the_released_lock_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    left_by(tmp_path / "run", ELSEWHERE)
    with lock.held(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / lock.NAME).read_text())["pid"] == os.getpid()


def test_a_lock_that_a_file_server_keeps_is_refused(tmp_path: Path) -> None:
    with left_by(tmp_path / "run", ELSEWHERE).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="process 4711 on node7"), lock.held(tmp_path / "run"):
            pass


def test_without_flock_the_file_is_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_flock", lambda number: None)
    run = tmp_path / "run"
    with lock.held(run), pytest.raises(ConfigError, match="in use"), lock.held(run):
        pass
    file = left_by(run, ELSEWHERE)
    with (
        pytest.raises(ConfigError, match=rf"process 4711 on node7(.|\n)*delete {re.escape(str(file))}"),
        lock.held(run),
    ):
        pass
    file.write_text("")
    with lock.held(run):
        pass


def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="may not be written"), lock.held(tmp_path / "file" / "run"):
        pass
