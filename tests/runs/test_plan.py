"""What `asit plan` measures and estimates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from asit import cli
from asit.config import PretrainSettings
from asit.errors import ConfigError
from asit.runtime import World
from asit.tools import run_estimate, step_profile
from asit.tools.run_estimate import Estimate
from asit.tools.step_profile import StepCost, StepProfile, extrapolate

MACHINE = StepProfile(
    micro=8,
    step_seconds=[0.9, 1.1],
    wait_seconds=[0.0, 0.0],
    clip_seconds=0.1,
    workers=2,
    memory_gb={"cpu": 3.0, "gpu": 10.0},
    clip_gb={"cpu": 0.0, "gpu": 1.0},
    worker_gb=0.5,
    machine_gb={"cpu": 64.0, "gpu": 40.0},
    checkpoint_seconds=2.0,
    checkpoint_gb=1.5,
    model_gb=0.3,
    start_seconds=20.0,
    device="cuda:0",
    threads=4,
    precision="bf16",
)
WORK = run_estimate.Workload(
    recordings=2_000_000,
    hours=5555.6,
    epoch_clips=2_000_000,
    epoch_steps=250_000,
    epochs=1,
    steps=250_000,
    batch=8,
    accumulate=1,
    kept_gb=0.0,
    checkpoint_every=1000,
    keep=3,
)


def expected(profile: dict[str, Any] | None = None, work: dict[str, Any] | None = None, **request: Any) -> Estimate:
    measured, run = dataclasses.replace(MACHINE, **(profile or {})), dataclasses.replace(WORK, **(work or {}))
    return run_estimate.estimate(measured, run, run_estimate.PlanRequest(**request))


def test_time_is_steps_checkpoints_and_the_start() -> None:
    found = expected(price_per_hour=2.0)
    assert found.hours == pytest.approx((250_000 * 1.0 + 250 * 2.0 + 20.0) / 3600)
    assert found.hours_low == pytest.approx((250_000 * 0.9 * 0.95 + 520) / 3600)
    assert found.hours_high == pytest.approx((250_000 * 1.1 * 1.05 + 520) / 3600)
    assert found.cost == pytest.approx(2 * found.hours)
    assert found.memory_gb == {"cpu": 3.0 + 2 * 0.5, "gpu": 10.0}
    assert found.disk_gb == pytest.approx(3 * 1.5 + 0.3 + 0.24)


def test_a_larger_batch_follows_the_line_and_says_so() -> None:
    found = expected(work={"batch": 64, "accumulate": 2, "steps": 31_250, "epoch_steps": 31_250})
    assert (found.micro, found.cost) == (32, None)
    assert found.step_seconds == pytest.approx(1.0 + 56 * 0.1)
    assert found.memory_gb["gpu"] == pytest.approx(10.0 + 24 * 1.0)
    assert any("32 clips follows the line through smaller ones, up to 8" in sentence for sentence in found.assumed)


def test_processes_share_the_batch_at_an_efficiency() -> None:
    given = expected(work={"batch": 32}, processes=4, efficiency=0.8)
    assert given.step_seconds == pytest.approx(1.0 / 0.8)
    assert given.clips_per_second == pytest.approx(32 * 0.8)
    assumed = expected(work={"batch": 32}, processes=4)
    assert assumed.hours_high / assumed.hours_low > given.hours_high / given.hours_low
    assert any("not measured" in sentence for sentence in assumed.assumed)


def test_a_slow_loader_limits_the_rate_whatever_the_efficiency() -> None:
    slow = {"step_seconds": [2.5, 2.5], "wait_seconds": [1.5, 1.5]}
    found = expected(slow, {"batch": 16}, processes=2)
    assert found.step_seconds == pytest.approx(2.5)
    assert found.wait_seconds == pytest.approx(2.5 - 1.0 / 0.9)


def test_kept_recordings_cost_memory_in_each_loader() -> None:
    found = expected(work={"kept_gb": 1.5})
    assert found.memory_gb["cpu"] == pytest.approx(3.0 + 2 * 0.5 + 2 * 1.5)
    assert any("decoded in each epoch" in sentence for sentence in found.assumed)


def test_extrapolates_along_the_last_two_costs() -> None:
    costs = [StepCost(2, 1.0, {"cpu": 4.0}), StepCost(4, 1.5, {"cpu": 3.0})]
    assert extrapolate(costs, 8) == StepCost(8, 2.5, {"cpu": 3.0})  # memory never falls
    assert extrapolate(costs[:1], 4) == StepCost(4, 2.0, {"cpu": 8.0})


def test_measures_a_run_and_leaves_nothing(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    settings = tiny(tmp_path / "run", batch_size=8, accumulate=2)
    measured, found = run_estimate.plan(settings, run_estimate.PlanRequest(budget=0.2))
    work = found.work
    assert (work.recordings, work.epoch_clips, work.steps, work.accumulate) == (16, 16, 4, 2)
    assert measured.micro == found.micro == 4
    assert len(measured.step_seconds) == len(measured.wait_seconds) == 3
    assert 0 <= min(measured.wait_seconds) < min(measured.step_seconds)
    assert measured.clip_seconds > 0
    assert work.kept_gb == pytest.approx(14.0 * 1.0864 * 8000 * 4 / 1e9, rel=0.1)
    assert measured.checkpoint_gb > measured.model_gb > 0
    assert found.hours > 0
    assert list(tmp_path.iterdir()) == []


def test_a_forward_pass_that_does_not_fit_is_extrapolated(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: Any
) -> None:
    monkeypatch.setattr(step_profile, "_fits", lambda cost, *_: cost.clips <= 4)
    measured, found = run_estimate.plan(tiny(tmp_path / "run", batch_size=16), run_estimate.PlanRequest(budget=0.2))
    assert (measured.micro, found.micro) == (4, 16)
    assert any("16 clips follows the line" in sentence for sentence in found.assumed)


def test_long_recordings_that_are_not_here_count_by_their_segments(
    tmp_path: Path, tiny: Callable[..., PretrainSettings]
) -> None:
    settings = tiny(tmp_path / "run", views={"segment_seconds": 1.0})
    with run_estimate.prepared(settings, run_estimate.PlanRequest(clips=1000, clip_seconds=3.0)) as (setup, work, _):
        assert work.epoch_clips == 3000
        assert work.epoch_steps == 750
        assert work.hours == pytest.approx(3000 / 3600)
        assert len(setup.clips) < 3000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no data were given"),
        (["--data", "x", "--clips", "5"], "both given"),
        (["--clips", "5", "--budget", "8h"], "that time: asit pretrain --budget 8h"),
    ],
)
def test_refuses(given: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [True, False])
def test_prints_the_estimate(as_json: bool, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"encoder.size": "custom", "encoder.width": 32, "encoder.depth": 2, "encoder.heads": 2}
    values |= {"heads.hidden": 32, "heads.class-prototypes": 64, "heads.patch-prototypes": 64, "views.seconds": 0.5}
    values |= {"precision": "float32", "device": "cpu", "workers": 0, "threads": 1, "clips": 1000, "clip-seconds": 1}
    values |= {"batch-size": 4, "measure-seconds": 1, "price-per-hour": 3}
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    assert cli.main(["plan", *flags, *["--json"][: int(as_json)]]) == 0
    out = capsys.readouterr().out
    if as_json:
        found = json.loads(out)["prediction"]
        assert found["work"]["steps"] == 100 * 250
        assert found["cost"] == pytest.approx(3 * found["hours"])
    else:
        assert "25,000 steps: 100 epochs of 250 steps of 4 clips" in out
        assert "cost: " in out


def test_refuses_several_processes(tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: Any) -> None:
    world = World(0, 2, torch.device("cpu"), "")
    monkeypatch.setattr(run_estimate.runtime, "world", lambda *_: contextlib.nullcontext(world))
    with pytest.raises(ConfigError, match=r"(?s)torchrun in 2 processes.*--processes 2"):
        run_estimate.plan(tiny(tmp_path / "run"), run_estimate.PlanRequest())


@pytest.mark.gpu
def test_measures_a_gpu(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    settings = tiny(tmp_path / "run", batch_size=8, device="cuda", precision="auto", workers=1)
    found, _ = run_estimate.plan(settings, run_estimate.PlanRequest(budget=2.0))
    assert found.device.startswith("cuda")
    assert 0 < found.memory_gb["gpu"] < found.machine_gb["gpu"]
    assert min(found.step_seconds) > 0
