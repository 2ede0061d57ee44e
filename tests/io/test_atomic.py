"""Files are written whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from asit.io import atomic


def test_a_file_takes_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "results.json"
    target.write_text("old")
    with atomic.written(target) as draft:
        draft.write_text("new")
        assert target.read_text() == "old"
        assert re.fullmatch(rf"\.results\.json\.{os.getpid()}-[0-9a-f]{{8}}-\d+\.tmp", draft.name)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_off_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "results.json"
    target.write_text("old")

    def broken() -> None:
        with atomic.written(target) as draft:
            draft.write_text("half")
            raise error

    with pytest.raises(type(error)):
        broken()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_block_that_wrote_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.written(tmp_path / "results.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_it_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with atomic.written(tmp_path / "results.json") as draft:
        draft.write_text("new")
    assert order == ["fsync", "replace"]
