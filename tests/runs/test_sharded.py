"""Sharded weights (FSDP2) learn what unsharded ones learn, and give the same checkpoint files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import asit
from asit import runtime
from asit.errors import StoreError
from asit.finetune import finetune_run, supervised
from asit.pretrain import pretrain_run
from asit.pretrain.pretrain_setup import PretrainSetup
from asit.training import stopping

pytestmark = pytest.mark.slow

WHOLE: dict[str, Any] = {"batch_size": 16, "epochs": 3, "records": {"checkpoint_every": 1, "figure_every": 2}}


def go(settings: Any, **how: Any) -> int:
    return 0 if pretrain_run.pretrain(settings, **how).finished else 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_shards_equal_ddp_and_one_process(
    accumulate: int, tiny: Any, tmp_path: Path, ranks: Any, state: Any, metrics: Any, close: Any
) -> None:
    runs = {name: tmp_path / name for name in ("one", "ddp", "fsdp")}
    assert go(tiny(runs["one"], accumulate=accumulate, **WHOLE)) == 0
    for name in ("ddp", "fsdp"):
        settings = tiny(
            runs[name], accumulate=accumulate, parallel=name, checkpoint_activations=name == "fsdp", **WHOLE
        )
        for ended in ranks(2, lambda settings=settings: go(settings)):
            assert ended.code == 0, ended.said
    assert not [v for v in state(runs["fsdp"]).values() if type(v) is not Tensor]
    for other in ("one", "ddp"):
        close(state(runs["fsdp"]), state(runs[other]))
    norms = [[line["parts"]["gradient_norm"] for line in metrics(runs[name])] for name in ("one", "fsdp")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    theirs, ours = (asit.load(runs[n] / "model").encoder.state_dict() for n in ("one", "fsdp"))
    close(ours, theirs, "")
    assert len(list((runs["fsdp"] / "figures").glob("*.png"))) == 2


def test_a_run_goes_on_with_and_without_shards(tiny: Any, tmp_path: Path, ranks: Any, state: Any, close: Any) -> None:
    """Two processes with ddp, two with fsdp, one alone: as one process all the way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert go(tiny(whole, **WHOLE)) == 0
    ranks(2, lambda: go(tiny(parts, stop_after=1, **WHOLE)), code=1)
    sharded = tiny(parts, stop_after=2, parallel="fsdp", **WHOLE)
    for ended in ranks(2, lambda: go(sharded, resume=True)):
        assert ended.code == 1, ended.said
    assert go(tiny(parts, **WHOLE), resume=True) == 0
    close(state(parts), state(whole))


def test_a_spoilt_step_of_shards_is_refused_a_step_late(
    tiny: Any, tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of accelerators, driven here on CPUs."""
    monkeypatch.setattr(stopping, "checks_late", lambda device: True)
    run_away = {**WHOLE, "epochs": 12, "optim": {"lr": 1e9, "warmup": 0, "clip": 0.0}}
    settings = tiny(tmp_path / "run", parallel="fsdp", **run_away)
    for ended in ranks(2, lambda: go(settings), code=2):
        assert "not finite" in ended.said


def test_fine_tuning_in_shards(tuned: Any, tmp_path: Path, ranks: Any, state: Any, close: Any) -> None:
    runs = {"one": tmp_path / "one", "fsdp": tmp_path / "fsdp"}
    assert finetune_run.finetune(tuned(runs["one"])).finished
    settings = tuned(runs["fsdp"], parallel="fsdp", checkpoint_activations=True)
    ranks(2, lambda: 0 if finetune_run.finetune(settings).finished else 1, code=0)
    close(state(runs["fsdp"]), state(runs["one"]))
    assert (runs["fsdp"] / "results.json").exists()


def test_data_that_ends_in_one_process_ends_both_with_a_checkpoint(
    tiny: Any, tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch, equal_runs: Any
) -> None:
    """The other process is in the middle of the step; the resumed run equals an undisturbed one bit for bit."""
    fed = PretrainSetup.feed
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    often = {**WHOLE, "records": {"checkpoint_every": 100}}
    ranks(2, lambda: go(tiny(whole, **often)), code=0)

    def ending(setup: Any, start: int) -> Any:
        for number, batch in enumerate(fed(setup, start)):
            if setup.world.rank == 1 and number == 2:
                raise StoreError("shard-3.tar is not there", "a shard", "bring it back")
            yield batch

    monkeypatch.setattr(PretrainSetup, "feed", ending)
    said = [ended.said for ended in ranks(2, lambda: go(tiny(broken, **often)))]
    assert "another process of this run got no more data: shard-3.tar is not there" in said[0]
    assert "shard-3.tar is not there\n  expected: a shard\n  fix:      bring it back" in said[1]
    assert [p.name for p in (broken / "checkpoints").iterdir()] == ["step-00000002"]
    assert "stopped: shard-3.tar is not there; step 2 is kept" in (broken / "log.txt").read_text()
    monkeypatch.setattr(PretrainSetup, "feed", fed)
    ranks(2, lambda: go(tiny(broken, **often), resume=True), code=0)
    equal_runs(broken, whole)


def test_gradients_are_exchanged_while_the_backward_pass_goes_on(ranks: Any) -> None:
    def body() -> int:
        with runtime.world("cpu", 1) as world:
            layers = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(12)])

            task, x = supervised.Supervised.__new__(supervised.Supervised), torch.ones(64, 1024)
            task.network = task._forward = layers  # type: ignore[assignment]
            task.distribute(world)
            for _ in range(2):  # the first backward pass settles the buckets
                task._forward(x).square().mean().backward()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                task._forward(x).square().mean().backward()
            events = profile.events()
            exchanged = [e.time_range for e in events if e.name == "c10d::allreduce_"]
            passed = [e.time_range for e in events if e.name.startswith("autograd::engine::evaluate_function")]
            middle = (passed[0].start + max(e.end for e in passed)) / 2
            assert len(exchanged) >= 3
            assert sum(e.start < middle for e in exchanged) >= 1
        return 0

    ranks(2, body, code=0)
