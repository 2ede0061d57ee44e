"""`asit pretrain --budget`: encoder and length of a run that ends in time, with replaced measurements."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import asit
from asit import cli
from asit.config import PretrainSettings
from asit.errors import ConfigError
from asit.pretrain.pretrain_setup import PretrainSetup
from asit.tools import time_budget
from asit.tools.step_profile import StepCost, StepProfile

SECONDS = {(192, 6): 0.01, (192, 12): 0.02, (384, 12): 0.1, (768, 12): 0.4, (32, 2): 0.01}
"""Of a step of four clips, by width and depth of the encoder."""
GB = {(192, 6): 1.0, (192, 12): 1.5, (384, 12): 4.0, (768, 12): 40.0, (32, 2): 1.0}
"""Memory of a step of four clips."""
MACHINE = {"cpu": 10.0}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Replace the measurements; return the encoders that were tried."""
    tried: list[tuple[int, int]] = []

    def shape(setup: PretrainSetup) -> tuple[int, int]:
        encoder = setup.task.student.encoder
        return encoder.width, encoder.depth

    def small_costs(setup: PretrainSetup, world: object, micro: int) -> tuple[list[StepCost], float]:
        tried.append(shape(setup))
        seconds, memory = SECONDS[shape(setup)], GB[shape(setup)]
        return [StepCost(n, seconds * n / 4, {"cpu": memory * n / 4}) for n in (2, 4)], 0.0

    def measure(setup: PretrainSetup, world: object, micro: int, **_: Any) -> StepProfile:
        seconds = SECONDS[shape(setup)] * micro / 4
        return StepProfile(
            micro=micro,
            step_seconds=[seconds] * 3,
            wait_seconds=[0.0] * 3,
            clip_seconds=seconds / micro,
            workers=0,
            memory_gb={"cpu": GB[shape(setup)] * micro / 4},
            clip_gb={"cpu": 0.1},
            worker_gb=0.0,
            machine_gb=MACHINE,
            checkpoint_seconds=0.0,
            checkpoint_gb=0.1,
            model_gb=0.1,
            start_seconds=0.0,
            device="cpu",
            threads=1,
            precision="float32",
        )

    monkeypatch.setattr(time_budget, "small_costs", small_costs)
    monkeypatch.setattr(time_budget, "measure", measure)
    monkeypatch.setattr(time_budget, "machine", lambda device: MACHINE)
    return tried


def chosen(settings: PretrainSettings, seconds: float | None, *given: str) -> time_budget.Chosen:
    return time_budget.choose(settings, seconds, given)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("8h", 28_800), ("3d", 259_200), ("1h30m", 5400), ("0.5h", 1800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert time_budget.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "45", "m", "45 m", "-5m", "0m", "1y", "45min", "1e3s", "inf", "99999999999d"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"a budget of {text!r}")):
        time_budget.seconds_of(text)


@pytest.mark.parametrize(
    ("seconds", "encoder", "reason"),
    [
        (60, (192, 6), "192 x 12, would get 3,000 steps of the 5,000"),
        (120, (192, 12), "384 x 12, would get 1,200 steps"),
        (600, (384, 12), "768 x 12, does not fit in memory"),
    ],
)
def test_the_largest_encoder_with_enough_steps_that_fits_in_memory(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], seconds: int, encoder: tuple[int, int], reason: str
) -> None:
    found = chosen(tiny(tmp_path / "run"), seconds)
    settings = found.settings
    assert (settings.encoder.width, settings.encoder.depth) == encoder
    assert reason in found.summary[0]
    steps = round(settings.epochs * 4)
    assert steps * SECONDS[encoder] == pytest.approx(seconds, rel=0.1)
    assert steps * SECONDS[encoder] < seconds
    assert settings.optim.warmup == pytest.approx(0.05 * settings.epochs, abs=1e-3)
    assert settings.optim.lr == pytest.approx(tiny(tmp_path).optim.lr * 192 / settings.encoder.width)
    assert not list(tmp_path.iterdir())


def test_what_is_given_is_kept(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], measured: list[tuple[int, int]]
) -> None:
    found = chosen(tiny(tmp_path / "run", optim={"warmup": 0.25}), 600, "encoder.width", "optim.warmup")
    assert set(measured) == {(32, 2)}
    assert found.settings.encoder.width == 32
    assert found.settings.optim.warmup == 0.25
    assert "(as given)" in found.summary[0]


def test_a_batch_that_does_not_fit_is_accumulated(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path / "run", batch_size=16)
    monkeypatch.setitem(GB, (192, 6), 7.0)
    assert chosen(settings, 60).settings.accumulate == 4
    monkeypatch.setitem(GB, (192, 6), 40.0)
    with pytest.raises(ConfigError, match="does not fit in memory, one clip at a time"):
        chosen(settings, 60)


def test_too_short_a_budget_names_the_least_one(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, (32, 2), 60.0)
    with pytest.raises(ConfigError, match=r"a budget of 5 min: \d+ steps of 60.00 s") as error:
        chosen(tiny(tmp_path / "run"), 300, "encoder.width")
    assert re.search(r"give at least 2\d min", str(error.value))


def test_a_run_of_few_steps_is_warned_of(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    settings = tiny(tmp_path / "run")
    assert "an encoder reads hardly better than an untrained one" in chosen(settings, 4.0, "encoder.width").warning
    assert not chosen(settings, 60.0, "encoder.width").warning


def apply(settings: PretrainSettings, budget: str | None, *given: str, **options: Any) -> PretrainSettings:
    return time_budget.apply(settings, budget, given, **options)


def test_an_hour_is_assumed_where_nothing_says_how_long(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], caplog: pytest.LogCaptureFixture
) -> None:
    settings = tiny(tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="asit"):
        assert apply(settings, None, "encoder.width").epochs * 4 * 0.01 == pytest.approx(3600, rel=0.01)
    assert "No --budget and no --epochs: assuming a budget of 60 min" in caplog.text
    for given in ("epochs", "stop_after", "preset"):
        assert apply(settings, None, given) is settings
    assert apply(settings, None, config="some.yaml") is settings
    settings = settings.changed({"preset": "paper"})
    assert apply(settings, None) is settings


def test_budgets_that_cannot_be(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny(tmp_path / "run")
    with pytest.raises(ConfigError, match="a budget and epochs were both given"):
        apply(settings, "1h", "epochs")
    with pytest.raises(ConfigError, match="a budget for a run that is resumed"):
        apply(settings, "1h", resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="a budget, in 2 processes"):
        apply(settings, "1h")
    assert apply(settings, None) is settings


def test_a_folder_that_is_not_free_is_refused_before_anything_is_measured(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], measured: list[tuple[int, int]]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        apply(tiny(tmp_path / "run"), "1h")
    assert not measured


def test_a_config_file_keeps_its_settings_but_for_the_length(
    tmp_path: Path, tiny: Callable[..., PretrainSettings]
) -> None:
    settings = tiny(tmp_path / "run")
    (tmp_path / "c.yaml").write_text("epochs: 7\nencoder: {size: custom, width: 32, depth: 2, heads: 2}\n")
    found = apply(settings, "60s", config=tmp_path / "c.yaml")
    assert (found.encoder.width, found.encoder.depth) == (32, 2)
    assert round(found.epochs * 4) * 0.01 == pytest.approx(60, rel=0.1)


def test_from_python_and_the_command_line(
    tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(time_budget, "LEAST_STEPS", 1)
    monkeypatch.setitem(SECONDS, (32, 2), 1.0)
    small = {"encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2}, "batch_size": 8, "workers": 0}
    front = {"front_end": {"rate": 8000, "mels": 32}, "views": {"seconds": 0.5}}
    result = asit.pretrain(recordings, tmp_path / "run", budget="7s", threads=1, **small, **front)
    assert result.finished
    assert 1 <= result.total <= 3
    flags = "--encoder.width 32 --encoder.depth 2 --encoder.heads 2 --batch-size 8 --front-end.rate 8000"
    flags += " --front-end.mels 32 --encoder.patch-mels 32 --views.seconds 0.5 --threads 1 --workers 0 --dry-run"
    arguments = ["pretrain", "--data", str(recordings), "--out", str(tmp_path / "other"), "--budget", "9s"]
    assert cli.main([*arguments, *flags.split()]) == 0
    captured = capsys.readouterr()
    assert "Budget of 9 s: encoder 32 x 2 (as given)" in captured.err
    assert not (tmp_path / "other").exists()


def test_a_part_of_an_epoch(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    result = asit.pretrain(**tiny(tmp_path / "run", epochs=1.5).model_dump())
    assert (result.step, result.total) == (6, 6)
    assert "epochs: 1.5" in (tmp_path / "run" / "config.yaml").read_text()
