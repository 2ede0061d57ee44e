"""What `asit plan` measures, and what it makes of it."""

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
from asit.tools import run_estimate
from asit.tools.step_profile import Measured

MACHINE = Measured(
    micro=8,
    step_seconds=[1.0, 1.0],
    fed_seconds=[0.9, 1.1],
    fed_cpu_seconds=[2.0, 2.0],
    clip_seconds=0.1,
    fixed_seconds=0.2,
    loader_clips=[100.0, 100.0],
    workers=2,
    read_seconds=0.02,
    read_cpu_seconds=0.02,
    again_seconds=None,
    again_cpu_seconds=0.02,
    memory_gb={"cpu": 3.0, "gpu": 10.0},
    clip_gb={"cpu": 0.0, "gpu": 1.0},
    worker_gb=0.5,
    machine_gb={"cpu": 64.0, "gpu": 40.0},
    checkpoint_seconds=5.0,
    checkpoint_stall=2.0,
    checkpoint_gb=1.5,
    model_gb=0.3,
    start_seconds=20.0,
    start_cpu_seconds=3600.0,
    device="cuda:0",
    threads=4,
    precision="bf16",
    environment={},
)
WORK = run_estimate.Work(
    recordings=2_000_000,
    epoch_clips=2_000_000,
    hours=5555.6,
    batch=8,
    processes=1,
    accumulate=1,
    epochs=1,
    steps=250_000,
    epoch_steps=250_000,
    kept_gb=0.0,
    checkpoint_every=1000,
    log_every=10,
    keep=3,
)


def test_a_plan_is_steps_checkpoints_and_a_start() -> None:
    found = run_estimate.predict(MACHINE, WORK, run_estimate.Asked(price_per_hour=2.0))
    assert found.slower == "step"
    assert not found.extrapolated
    assert found.hours == pytest.approx((250_000 * 1.0 + 250 * 2.0 + 5.0 + 20.0) / 3600)
    assert found.hours_low == pytest.approx((250_000 * 0.9 * 0.95 + 525) / 3600)
    assert found.hours_high == pytest.approx((250_000 * 1.1 * 1.05 + 525) / 3600)
    assert found.cost == pytest.approx(2 * found.hours)
    assert found.cpu_hours == pytest.approx(250_000 * (2.0 + 8 * 0.02) / 3600 + 1)
    assert found.memory_gb == {"cpu": 3.0 + 2 * 0.5, "gpu": 10.0}
    assert found.disk_gb == pytest.approx(3 * 1.5 + 0.3 + 0.24 + 0.0225)


def test_another_batch_follows_the_line_and_says_so() -> None:
    work = dataclasses.replace(WORK, batch=64, accumulate=2, steps=31_250, epoch_steps=31_250)
    found = run_estimate.predict(MACHINE, work, run_estimate.Asked())
    assert found.micro == 32
    assert found.extrapolated
    assert found.cost is None
    assert found.compute_seconds == pytest.approx(0.2 + 64 * 0.1)
    assert found.memory_gb["gpu"] == pytest.approx(10.0 + 24 * 1.0)
    assert any("32 clips follows from smaller ones, up to 8" in told for told in found.assumed)


def test_processes_share_the_batch_at_an_efficiency() -> None:
    work = dataclasses.replace(WORK, batch=32, processes=4)
    given = run_estimate.predict(MACHINE, work, run_estimate.Asked(processes=4, efficiency=0.8))
    assert given.step_seconds == pytest.approx(1.0 / 0.8)
    assert given.clips_per_second == pytest.approx(32 * 0.8)
    assumed = run_estimate.predict(MACHINE, work, run_estimate.Asked(processes=4))
    assert assumed.hours_high / assumed.hours_low > given.hours_high / given.hours_low
    assert any("without a measurement" in told for told in assumed.assumed)


def test_a_loader_that_is_slower_decides() -> None:
    slow = dataclasses.replace(MACHINE, loader_clips=[4.0, 4.0], fed_seconds=[2.5, 2.5])
    found = run_estimate.predict(slow, WORK, run_estimate.Asked())
    assert found.slower == "loader"
    assert found.step_seconds == pytest.approx(2.5)  # as fed steps show it, though the loader alone takes 2 s


def test_recordings_that_are_kept_cost_memory_and_a_slower_first_epoch() -> None:
    kept = dataclasses.replace(MACHINE, again_seconds=0.002, loader_clips=[20.0, 20.0])
    work = dataclasses.replace(WORK, kept_gb=1.5, epochs=2, steps=20, epoch_steps=10, checkpoint_every=100)
    found = run_estimate.predict(kept, work, run_estimate.Asked())
    assert found.memory_gb["cpu"] == pytest.approx(3.0 + 2 * 0.5 + 2 * 1.5)
    assert found.hours * 3600 == pytest.approx(20 + 2 + 5 + 10 * 1.0 + 10 * 8 / 20 * 10)


def test_measures_a_run_and_leaves_nothing(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    settings = tiny(tmp_path / "run", batch_size=8, accumulate=2)
    asked = run_estimate.Asked(budget=1.0)
    taken, work = run_estimate.take(settings, asked, stream=None)
    found = taken.measured
    assert (work.recordings, work.epoch_clips, work.steps, work.accumulate) == (16, 16, 4, 2)
    assert found.micro == 4
    assert len(found.fed_seconds) == len(found.step_seconds) == len(found.loader_clips) >= 2
    assert min(found.fed_seconds) > 0
    assert found.clip_seconds > 0
    assert found.again_seconds is not None
    assert work.kept_gb == pytest.approx(14.0 * 1.0864 * 8000 * 4 / 1e9, rel=0.1)
    assert found.checkpoint_gb > found.model_gb > 0
    assert not (tmp_path / "run").exists()
    assert run_estimate.predict(found, work, asked).hours > 0

    file = tmp_path / "machine.json"
    run_estimate.save(file, taken)
    again = run_estimate.load(file)
    assert again.measured == found
    assert again.settings == taken.settings
    many = run_estimate.Asked(clips=2_000_000, clip_seconds=1.0, processes=2)
    big = run_estimate.work_of(tiny(tmp_path / "run", batch_size=16, epochs=100), many, again, stream=None)
    assert (big.recordings, big.steps, big.kept_gb) == (2_000_000, 100 * 125_000, 0.0)
    assert big.hours == pytest.approx(2_000_000 / 3600)
    gpu = again.settings.model_copy(update={"front_end_on": "device", "precision": "bf16", "compile": True})
    here = tiny(tmp_path / "run", batch_size=16, epochs=100, precision="auto", compile=True)
    assert run_estimate.work_of(here, many, dataclasses.replace(again, settings=gpu), stream=None) == big
    other = tiny(tmp_path / "run", encoder={"width": 64}, batch_size=16)
    with pytest.raises(ConfigError, match=r"encoder\.width: 32 there, 64 asked for"):
        run_estimate.work_of(other, many, again, stream=None)


def test_long_recordings_that_are_not_here_count_by_their_segments(
    tmp_path: Path, tiny: Callable[..., PretrainSettings]
) -> None:
    settings = tiny(tmp_path / "run", views={"segment_seconds": 1.0})
    with run_estimate._prepared(settings, run_estimate.Asked(clips=1000, clip_seconds=3.0), None) as (setup, work, _):
        assert work.epoch_clips == 3000
        assert work.epoch_steps == 750
        assert len(setup.clips) < 3000


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "no data were given"),
        (["--data", "x", "--clips", "5"], "both given"),
        (["--clips", "5", "--machine", "m.json", "--save", "s.json"], "--machine was given with"),
        (["--clips", "5", "--measure-only"], "no place for the measurements"),
        (["--clips", "5", "--machine", "none.json"], "none.json cannot be read"),
    ],
)
def test_refuses(given: list[str], told: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", *given]) == 2
    assert told in capsys.readouterr().err


def test_prints_json_for_a_machine_measured_before(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"encoder.size": "custom", "encoder.width": 32, "encoder.depth": 2, "encoder.heads": 2}
    values |= {"heads.hidden": 32, "heads.class-prototypes": 64, "heads.patch-prototypes": 64, "views.seconds": 0.5}
    values |= {"precision": "float32", "device": "cpu", "workers": 0, "threads": 1, "clips": 1000, "clip-seconds": 1}
    flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    short = ["--batch-size", "2", "--budget", "1", "--measure-only", "--save", "m.json"]
    assert cli.main(["plan", *flags, *short]) == 0
    assert "measurements are in m.json" in capsys.readouterr().out
    assert cli.main(["plan", *flags, *short]) == 2
    assert "m.json" in capsys.readouterr().err
    assert (
        cli.main(["plan", *flags, "--batch-size", "4", "--machine", "m.json", "--price-per-hour", "3", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)["prediction"]
    assert found["work"]["steps"] == 100 * 250
    assert found["cost"] == pytest.approx(3 * found["hours"])


def test_is_not_started_in_several_processes(
    tmp_path: Path, tiny: Callable[..., PretrainSettings], monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        run_estimate.runtime, "world", lambda *_: contextlib.nullcontext(World(0, 2, torch.device("cpu"), ""))
    )
    with pytest.raises(ConfigError, match=r"(?s)torchrun in 2 processes.*--processes 2"):
        run_estimate.take(tiny(tmp_path / "run"), run_estimate.Asked(), stream=None)


@pytest.mark.gpu
def test_measures_a_gpu(tmp_path: Path, tiny: Callable[..., PretrainSettings]) -> None:
    settings = tiny(tmp_path / "run", batch_size=8, device="cuda", precision="auto", workers=1)
    found = run_estimate.take(settings, run_estimate.Asked(budget=2.0), stream=None)[0].measured
    assert found.device.startswith("cuda")
    assert 0 < found.memory_gb["gpu"] < found.machine_gb["gpu"]
    assert min(found.step_seconds) > 0
