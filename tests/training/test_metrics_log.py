"""What a run writes, and what of it a resumed run keeps."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from asit import logs, progress
from asit.errors import ConfigError
from asit.progress import counter, duration
from asit.training.metrics_log import Records

log = logging.getLogger("asit.test")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What it shows by now."""
        return [line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n")]


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal; not as a fixture, since pytest sets its own one before the test."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    return made


def test_lines_are_json_and_written_at_once(tmp_path: Path) -> None:
    with Records(tmp_path, 10, 0) as records:
        records.write("train", 3, {"loss": 1.25, "parts": {"global": 0.1}, "broken": math.nan})
        assert lines(tmp_path)[0]["loss"] == 1.25  # before it is closed
        records.event(4, "Übung begins")
        log.info("only logged")
    train, event = lines(tmp_path)
    assert (train["kind"], train["step"], train["parts"]) == ("train", 3, {"global": 0.1})
    assert math.isnan(train["broken"])
    assert event == {"kind": "event", "step": 4, "text": "Übung begins"}
    text = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in text] == ["Übung begins", "only logged"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "log.txt"}


def test_going_on_takes_out_what_the_stopped_try_did_after_its_checkpoint(tmp_path: Path) -> None:
    with Records(tmp_path, 10, 0) as records:
        for step in range(1, 8):
            records.write("train", step, {"loss": 1.0 * step})
            if step % 2 == 0:
                records.write("probe", step, {"accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # torn by kill -9
    with Records(tmp_path, 10, 4) as records:
        records.write("train", 5, {"loss": 50.0})
    kept = [(line["kind"], line["step"]) for line in lines(tmp_path)]
    assert kept == [("train", 1), ("train", 2), ("probe", 2), ("train", 3), ("train", 4), ("probe", 4), ("train", 5)]
    assert lines(tmp_path)[-1]["loss"] == 50.0
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "log.txt"}


@pytest.mark.parametrize(
    "damage",
    [b"null", b"\xff\xfe", b"[1]", b"3", b'{"kind": "train"}', b'{"kind": "train", "step": "2"}', b"[" * 100_000,
     b'{"kind": "train", "step": 1' + b"0" * 5000 + b"}", b'{"kind": 1, "step": 1}', b"\0" * 400, b'{"kind": "tra',
     b'{"kind": "event", "step": 1, "text": "\\ud800"}'],
)  # fmt: skip
def test_a_damaged_line_costs_that_line_alone(tmp_path: Path, damage: bytes) -> None:
    first, last = b'{"kind": "train", "step": 1, "loss": NaN}', '{"kind": "event", "step": 2, "text": "Übung"}'.encode()
    for rows in ([damage, first, last], [first, damage, last], [first, last, damage]):
        (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
        with Records(tmp_path, 10, 2) as records:
            records.write("train", 3, {"loss": 0.5})
        found = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
        assert found[:2] == [first, last]
        assert len(found) == 4


def test_other_processes_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    with logs.console(), Records(None, 10, 0) as records:
        records.write("train", 1, {"loss": 1.0})
        records.event(1, "hello")
        records.progress(1, "x", 3.0)
        log.info("a choice")
        counter("checking files")(3, 3, 0)
        log.warning("a server is slow")
    assert capfd.readouterr() == ("", "[rank 1] warning: a server is slow\n")
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_a_line_each_half_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with logs.console(), Records(tmp_path, 100, 0) as records:
        for step in range(1, 101):
            now[0] += 1
            records.progress(step, f"loss {step}", 100.0 - step)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in shown] == ["1/100", "31/100", "61/100", "91/100"]
    assert shown[1] == "step 31/100  loss 31  69 s left"
    assert [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()] == shown


def test_on_a_terminal_progress_is_one_line_that_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with logs.console(), Records(tmp_path, 100, 40) as records:
        records.progress(50, "loss 1.234", 12.0)
        log.info("a figure was written")
        assert terminal.lines() == ["a figure was written", "step 50/100  loss 1.234  12 s left"]
    assert terminal.lines() == ["a figure was written", "step 50/100  loss 1.234  12 s left", ""]
    assert "loss 1.234" not in (tmp_path / "log.txt").read_text()


def test_a_progress_line_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with logs.console():
        progress.Progress().show("x" * 100)
        assert terminal.lines() == ["x" * 78 + "…"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (45, "45 s"), (89.4, "89 s"), (90, "2 min"), (750, "12 min"), (5399, "1 h 30 min")),
        *((3 * 3600 + 5 * 60, "3 h 05 min"), (99 * 3600, "4 days 3 h"), (math.inf, "unknown time")),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_counter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def count() -> None:
        with logs.console():
            show = counter("checking files")
            for done in range(0, 101, 10):
                now[0] += 5
                show(done, 100, 2)

    counter("silent")(3, 3, 0)  # the library prints nothing by itself
    count()
    out, plain = capsys.readouterr()
    assert (out, plain.splitlines()[-1]) == ("", "checking files: 100/100  2 bad  1.8 files/s  in 55 s")
    assert len(plain.splitlines()) <= 4
    terminal = on_terminal(monkeypatch)
    count()
    assert terminal.lines() == ["checking files: 100/100  2 bad  1.8 files/s  in 55 s", ""]


def test_a_name_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.console():
        log.warning("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "warning: a\\x1b[2Jb\nc\n"


@pytest.mark.parametrize(("named", "shown"), [("debug", "dic"), ("info", "ic"), ("WARNING", "c")])
def test_how_much_the_console_shows(
    named: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ASIT_LOG", named)
    with logs.console():
        log.debug("d")
        log.info("i")
        log.warning("c")
    assert capsys.readouterr().err.replace("\n", "").replace("warning: ", "") == shown
    log.warning("after the end")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("ASIT_LOG", "loud")
    with pytest.raises(ConfigError, match="ASIT_LOG is loud"), logs.console():
        pass


def test_a_run_shows_a_library_s_user_no_more_than_they_chose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Records(tmp_path, 10, 0) as records:
        records.event(1, "begins")
        log.debug("a detail")
        log.warning("a server is slow")
    assert caplog.messages == ["a server is slow"]
    text = (tmp_path / "log.txt").read_text()
    assert [line.split(" ", 2)[2] for line in text.splitlines()] == [
        "begins", "a detail", "warning: a server is slow",
    ]  # fmt: skip
