"""The verb: options, messages, exit statuses."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asit import cli
from asit.config import PretrainSettings, yaml
from asit.study import arm_costs

from .conftest import TINY


@pytest.fixture
def common(sounds: Path, labelled: Path, tmp_path: Path) -> list[str]:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.to_yaml(PretrainSettings(**TINY)), "utf-8")
    names = ["--data", str(sounds), "--table", str(labelled), "--out", str(tmp_path / "out"), "--config", str(config)]
    return ["study", "corruption", *names, "--seeds", "0"]


def test_a_study_from_the_command_line(common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*common, "--arms", "drop", "both"]) == 0
    said = capsys.readouterr().out
    assert "| drop | " in said
    assert "difference to both" in said
    assert cli.main(["study", "--report", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == said


def test_a_dry_run_lists_the_arms_and_writes_nothing(
    common: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*common, "--dry-run", "--minutes", "2"]) == 0
    said = capsys.readouterr().out
    assert "drop: 120 s" in said or "drop: 2 min" in said
    assert "--masking.replace-probability 1" in said
    assert "all runs one after the other: 8 min" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--task", "5/4"], "--task 5/4"),
        (["--minutes", "3", "--epochs", "2"], "--epochs and --minutes"),
        (["--seeds", "1", "1"], "--seeds 1 1"),
        (["--seed", "3"], "seed 3"),
        (["--arms", "dorp"], "no arm dorp"),
    ],
)
def test_mistakes_are_named(common: list[str], more: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*common, *more]) == 2
    assert said in capsys.readouterr().err


def test_steps_are_measured_by_runs(sounds: Path) -> None:
    settings = PretrainSettings(**TINY)
    arms = {"all": settings, "longer": settings.changed({"epochs": 9})}
    found = arm_costs.seconds_per_step(arms, str(sounds), steps=(1, 4), rounds=1)
    assert 1e-4 <= found["all"] == found["longer"] < 10


@pytest.mark.slow
def test_processes_share_a_study_and_one_may_be_killed(common: list[str], tmp_path: Path) -> None:
    arguments = [*common, "--epochs", "40", "--records.checkpoint-every", "5"]
    arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "alone")
    assert cli.main(arguments) == 0
    arguments[arguments.index(str(tmp_path / "alone"))] = str(tmp_path / "out")
    command = [sys.executable, "-m", "asit", *arguments]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    end = time.monotonic() + 600
    while not (tmp_path / "out/runs").exists() or not any((tmp_path / "out/runs").glob("*/checkpoints/*")):
        assert time.monotonic() < end, "no checkpoint was written"
        time.sleep(0.02)
    both[0].kill()
    assert both[0].wait(60) == -signal.SIGKILL
    assert both[1].wait(600) == 0  # a busy machine is slow
    assert cli.main(arguments) == 0  # what the killed one had, if the other was through with it by then
    tables = [list(csv.DictReader((tmp_path / name / "table.csv").open())) for name in ("alone", "out")]
    for row in tables[0] + tables[1]:
        assert (row.pop("minutes") != "") == (row["system"] in ("drop", "replace", "both", "combined"))
    assert tables[0] == tables[1]
