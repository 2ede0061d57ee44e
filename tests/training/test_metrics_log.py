"""What a run writes while it goes, and what of it a resumed run keeps."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from asit.errors import ConfigError
from asit.training import metrics_log as module
from asit.training.metrics_log import Records, counter, duration


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_json_and_written_at_once(tmp_path: Path) -> None:
    with Records(tmp_path, 10, 0, tensorboard=False, stream=None) as records:
        records.write("train", 3, {"loss": 1.25, "parts": {"global": 0.1}, "broken": math.nan})
        assert lines(tmp_path)[0]["loss"] == 1.25  # before it is closed
        records.event(4, "Übung begins")
        records.say("only said")
    train, event = lines(tmp_path)
    assert (train["kind"], train["step"], train["parts"]) == ("train", 3, {"global": 0.1})
    assert math.isnan(train["broken"])
    assert event == {"kind": "event", "step": 4, "text": "Übung begins"}
    log = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in log] == ["Übung begins", "only said"]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "log.txt"}


def test_going_on_takes_out_what_the_stopped_try_did_after_its_checkpoint(tmp_path: Path) -> None:
    with Records(tmp_path, 10, 0, tensorboard=False, stream=None) as records:
        for step in range(1, 8):
            records.write("train", step, {"loss": 1.0 * step})
            if step % 2 == 0:
                records.write("probe", step, {"accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # torn by kill -9
    with Records(tmp_path, 10, 4, tensorboard=False, stream=None) as records:
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
        with Records(tmp_path, 10, 2, tensorboard=False, stream=None) as records:
            records.write("train", 3, {"loss": 0.5})
        found = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
        assert found[:2] == [first, last]
        assert len(found) == 4


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stream = io.StringIO()
    with Records(None, 10, 0, tensorboard=True, stream=stream) as records:
        records.write("train", 1, {"loss": 1.0})
        records.event(1, "hello")
        records.progress(1, "x", 3.0)
    assert stream.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_a_line_each_half_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, stream = [1000.0], io.StringIO()
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Records(tmp_path, 100, 0, tensorboard=False, stream=stream) as records:
        for step in range(1, 101):
            now[0] += 1
            records.progress(step, f"loss {step}", 100.0 - step)
    told = stream.getvalue().splitlines()
    assert [line.split()[1] for line in told] == ["1/100", "31/100", "61/100", "91/100"]
    assert told[1] == "step 31/100  loss 31  69 s left"


def test_on_a_terminal_it_is_one_line_that_moves(tmp_path: Path) -> None:
    stream = Terminal()
    with Records(tmp_path, 100, 40, tensorboard=False, stream=stream) as records:
        records.progress(50, "loss 1.234", 12.0)
        records.say("a figure was written")
    shown = stream.getvalue()
    assert "50/100" in shown
    assert "50%" in shown
    assert "loss 1.234" in shown
    assert "a figure was written\n" in shown
    assert "loss 1.234" not in (tmp_path / "log.txt").read_text()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Records(tmp_path, 10, 0, tensorboard=True, stream=None) as records:
        for step in range(1, 6):
            records.write("train", step, {"loss": 2.0 * step, "parts": {"global": 0.5}})
        records.event(3, "no number")
    with Records(tmp_path, 10, 3, tensorboard=True, stream=None) as records:
        records.write("train", 4, {"loss": -4.0})
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"train/loss", "train/parts/global"}
    # What came after the checkpoint is taken out here as in metrics.jsonl, and the checkpoint's own step stays.
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 2.0), (2, 4.0), (3, 6.0), (4, -4.0)]


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"tensorboard is not installed(.|\n)*--no-records\.tensorboard"):
        Records(tmp_path, 10, 0, tensorboard=True, stream=None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.4, "0 s"), (45, "45 s"), (89.4, "89 s"), (90, "2 min"), (750, "12 min"), (5399, "1 h 30 min")),
        *((3 * 3600 + 5 * 60, "3 h 05 min"), (99 * 3600, "4 days 3 h"), (math.inf, "unknown time")),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    assert counter(None, "files") is None
    plain, terminal = io.StringIO(), Terminal()
    shows = [counter(stream, "checking files") for stream in (plain, terminal)]
    for done in range(0, 101, 10):
        now[0] += 5
        for show in shows:
            assert show is not None
            show(done, 100, 2)
    assert plain.getvalue().splitlines()[-1] == "checking files: 100/100  2 bad  2 files/s  in 55 s"
    assert len(plain.getvalue().splitlines()) <= 4
    assert terminal.getvalue().endswith("in 55 s\n")
    assert terminal.getvalue().count("\n") == 1
