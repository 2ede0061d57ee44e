"""Log-mels on the training device: the same clips, masks and losses as in the loader, and exact resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asit.pretrain import pretrain_setup
from asit.pretrain.pretrain_run import pretrain
from asit.runtime import World
from asit.training import open_data


def losses(metrics: Any, out: Path) -> list[float]:
    return [row["loss"] for row in metrics(out) if row["kind"] == "train"]


def test_a_run_with_log_mels_on_the_device_learns_the_same(tiny: Any, tmp_path: Path, metrics: Any) -> None:
    changed = {"views": {"seconds": 0.4, "local_views": 1, "local_seconds": 0.2, "stretch": 0.2, "mel_warp": 0.1}}
    for place in ("loader", "device"):
        pretrain(tiny(tmp_path / place, front_end_on=place, stop_after=3, **changed))
    first, second = losses(metrics, tmp_path / "loader"), losses(metrics, tmp_path / "device")
    assert len(first) == len(second) == 3
    assert second == pytest.approx(first, rel=1e-4)
    assert "log-mels: on cpu, a batch at once" in (tmp_path / "device" / "log.txt").read_text()
    assert "log-mels: on" not in (tmp_path / "loader" / "log.txt").read_text()


def test_it_goes_on_bit_for_bit(tiny: Any, tmp_path: Path, equal_runs: Any) -> None:
    pretrain(tiny(tmp_path / "whole", front_end_on="device", stop_after=4))
    pretrain(tiny(tmp_path / "parts", front_end_on="device", stop_after=2))
    pretrain(tiny(tmp_path / "parts", front_end_on="device", stop_after=4), resume=True)
    equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_auto_is_the_loader_on_a_cpu(tiny: Any, tmp_path: Path) -> None:
    settings = tiny(tmp_path)
    assert settings.front_end_on == "auto"
    world = World(0, 1, torch.device("cpu"), "a test")
    made = pretrain_setup.prepare(settings, open_data.of_run(settings, None), world)
    assert made.on_device is None
    assert not made.clips.on_device


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on(tiny: Any, tmp_path: Path, metrics: Any) -> None:
    """On a GPU sums may be taken in another order: the losses agree, the bits need not."""
    for out, stops in (("whole", (4,)), ("parts", (2, 4))):
        for i, stop in enumerate(stops):
            given = {"device": "cuda", "precision": "bf16", "compile": "auto", "stop_after": stop}
            pretrain(tiny(tmp_path / out, **given), resume=i > 0)
    assert losses(metrics, tmp_path / "parts") == pytest.approx(losses(metrics, tmp_path / "whole"), rel=2e-2)
