"""The training loop with a small linear model: the order of its calls, resuming, and how it ends."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from asit.errors import CheckpointError, StoreError, TrainingError
from asit.runtime import Precision, World
from asit.training import loop, stopping
from asit.training.loop import Plan
from asit.training.metrics_log import Records
from asit.training.trainable import Now, Rates, StepOutput, Trainable

WORLD = World(0, 1, torch.device("cpu"), "")
FLOAT32 = Precision("float32", "")


@dataclass
class Pair:
    """A micro-batch."""

    x: Tensor
    ids: Sequence[str]
    failures: Sequence[str] = ()

    def to(self, device: torch.device) -> Pair:
        return self


@dataclass
class Line(Trainable):
    """Fits y = 3 x by least squares, and records the calls."""

    module: nn.Linear = field(default_factory=lambda: nn.Linear(3, 2))
    calls: list[Any] = field(default_factory=list)
    spoil: dict[int, str] = field(default_factory=dict)
    at: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.module.weight.copy_(torch.arange(6.0).view(2, 3) / 10)
            self.module.bias.fill_(0.5)

    def trainable(self) -> nn.Module:
        return self.module

    def distribute(self, world: World) -> None:
        self.calls.append("distribute")

    def rates(self, now: Now) -> Rates:
        return Rates(0.1 / (1 + now.step), 0.01 * now.step, {"other": now.epoch})

    def step(self, batch: Pair, now: Now, precision: Precision, world: World) -> StepOutput:
        self.calls.append(("step", now.step, now.measure, tuple(batch.ids)))
        if now.step in self.at:
            self.at.pop(now.step)()
        error = (self.module(batch.x) - 3 * batch.x[:, :2]).square().mean()
        parts = {"square": error}
        if self.spoil.get(now.step) == "part":
            parts["spoilt"] = error * float("nan")
            error = error + parts["spoilt"]
        if self.spoil.get(now.step) == "gradient":
            error = error + (self.module.weight * 0).sqrt().sum()  # its slope at 0 is not finite
        return StepOutput(error, parts)

    def gradients_ready(self, now: Now) -> None:
        self.calls.append(("gradients", now.step, self.module.weight.grad is not None))

    def after_update(self, now: Now, world: World) -> None:
        self.calls.append(("after", now.step))

    def modules(self) -> list[tuple[str, nn.Module]]:
        return [("line", self.module)]

    def suspects(self, batch: Pair) -> list[str]:
        return [name for name, x in zip(batch.ids, batch.x, strict=True) if x.abs().max() > 100] or list(batch.ids)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        self.calls.append("no_sync")
        return contextlib.nullcontext()


def pair(index: int, clips: int = 4) -> Pair:
    x = torch.randn(clips, 3, generator=torch.Generator().manual_seed(index))
    return Pair(x, [f"{index}-{i}.wav" for i in range(clips)])


def stream(start: int = 0) -> Iterator[Pair]:
    index = start
    while True:
        yield pair(index)
        index += 1


def plan(**over: Any) -> Plan:
    values: dict[str, Any] = {"total": 6, "steps_per_epoch": 3, "batch": 4, "accumulate": 1, "betas": (0.9, 0.999)}
    values |= {"clip": 1.0, "clip_per_parameter": False, "log_every": 2, "checkpoint_every": 4}
    return Plan(**values | over)


def fit(
    task: Line, chosen: Plan, out: Path | None = None, start: int = 0, data: Any = None, **how: Any
) -> loop.Outcome:
    with Records(out, chosen.total, start) as records:
        batches = data if data is not None else stream(start * chosen.accumulate)
        how |= {"plan": chosen, "world": WORLD, "precision": FLOAT32, "records": records}
        return loop.Loop(task=task, batches=batches, step=start, **how).run()


def by_hand(steps: int, passes: int = 1) -> nn.Linear:
    """The same steps with torch's optimiser and clipping."""
    module = Line().module
    groups = [{"params": [module.weight]}, {"params": [module.bias], "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 0.1 / (1 + step)
        optimiser.param_groups[0]["weight_decay"] = 0.01 * step
        optimiser.zero_grad()
        x = torch.cat([pair(step * passes + i).x for i in range(passes)])
        (module(x) - 3 * x[:, :2]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
    return module


@pytest.mark.parametrize("passes", [1, 3])
def test_steps_equal_torchs(passes: int) -> None:
    task = Line()
    outcome = fit(task, plan(accumulate=passes))
    assert (outcome.step, outcome.finished, outcome.stopped_by) == (6, True, None)
    want = by_hand(6, passes)
    torch.testing.assert_close(task.module.weight, want.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.module.bias, want.bias, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(task.module.weight, Line().module.weight)


def test_the_order_of_a_step() -> None:
    task = Line()
    fit(task, plan(total=2, accumulate=2))
    once = [
        *("no_sync", ("step", 0, False, tuple(pair(0).ids)), ("step", 0, False, tuple(pair(1).ids))),
        *(("gradients", 0, True), ("after", 0)),
        *("no_sync", ("step", 1, True, tuple(pair(2).ids)), ("step", 1, True, tuple(pair(3).ids))),
        *(("gradients", 1, True), ("after", 1)),
    ]
    assert task.calls == ["distribute", *once]


def test_six_steps_equal_three_and_three_resumed() -> None:
    straight, first, second = Line(), Line(), Line()
    saved: dict[int, dict[str, Tensor]] = {}

    def save(step: int, tensors: dict[str, Tensor]) -> None:
        saved[step] = {name: value.clone() for name, value in tensors.items()}

    fit(straight, plan(), save=save)
    assert set(saved) == {4, 6}
    final = saved[6]
    outcome = fit(first, plan(stop_after=3), save=save)
    assert (outcome.step, outcome.finished) == (3, False)
    assert set(saved[3]) == {
        *("task/line.weight", "task/line.bias"),
        *(f"optimiser/{name}/{kind}" for name in ("weight", "bias") for kind in ("step", "exp_avg", "exp_avg_sq")),
    }
    second.load_state({name.removeprefix("task/"): v for name, v in saved[3].items() if name.startswith("task/")})
    state = {name.removeprefix("optimiser/"): v for name, v in saved[3].items() if name.startswith("optimiser/")}
    assert fit(second, plan(), start=3, optimiser_state=state, save=save).finished
    assert saved[6].keys() == final.keys()
    assert all(torch.equal(saved[6][name], value) for name, value in final.items())
    done = fit(second, plan(), start=6)
    assert (done.step, done.finished) == (6, True)


def test_steps_of_hooks_and_checkpoints() -> None:
    hooks: list[tuple[str, int]] = []
    saves: list[int] = []
    two, never = ((2, lambda step: hooks.append(("two", step))), (0, lambda step: hooks.append(("never", step))))
    five = (5, lambda step: hooks.append(("five", step)))
    fit(Line(), plan(total=7), hooks=[two, five, never], save=lambda step, _: saves.append(step))
    assert hooks == [("two", 2), ("two", 4), ("five", 5), ("two", 6), ("two", 7), ("five", 7)]
    assert saves == [4, 7]


def test_metrics_of_a_step(tmp_path: Path) -> None:
    task = Line()
    fit(task, plan(total=5, accumulate=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    before = by_hand(1, 2)
    x = [pair(i).x for i in (2, 3)]
    with torch.no_grad():
        errors = [float((before(each) - 3 * each[:, :2]).square().mean()) for each in x]
    first = lines[0]
    assert first["loss"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    assert first["parts"]["square"] == pytest.approx(first["loss"])
    assert first["parts"]["gradient_norm"] > 1
    assert (first["lr"], first["weight_decay"], first["other"]) == (0.05, 0.01, pytest.approx(1 / 3))
    assert first["epoch"] == pytest.approx(2 / 3)
    assert 0 <= first["data_wait"] <= 1
    assert first["clips_per_second"] > 0


# what is not finite


@pytest.mark.parametrize(("kind", "part"), [("part", "spoilt"), ("gradient", "gradient")])
@pytest.mark.parametrize(("late", "at"), [(False, 3), (True, 3), (True, 5)])
def test_a_step_that_is_not_finite_changes_no_weight_and_is_named(
    kind: str, part: str, late: bool, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On accelerators the check comes a step late; here that is driven on the CPU."""
    monkeypatch.setattr(stopping, "checks_late", lambda device: late)
    task, saves = Line(spoil={at: kind}), list[int]()
    with pytest.raises(TrainingError) as caught:
        fit(task, plan(log_every=100, checkpoint_every=3), save=lambda step, _: saves.append(step))
    text = str(caught.value)
    assert f"step {at}: not finite: {part}; clips: {', '.join(f'{at}-{i}.wav' for i in range(4))}" in text
    assert "the weights were not changed" in text
    assert caught.value.exit_code == 2
    assert torch.allclose(task.module.weight, by_hand(at).weight, atol=1e-6)
    assert (("after", at) in task.calls) is late
    assert saves == [3]
    assert [call[1] for call in task.calls if call[0] == "step"][-1] == (min(at + 1, 5) if late else at)


def test_the_suspects_are_named_and_many_are_counted() -> None:
    wide = pair(0, clips=30)
    with pytest.raises(TrainingError, match=r"0-7\.wav and 22 more"):
        fit(Line(spoil={0: "part"}), plan(), data=iter([wide]))
    wide.x[17] = 1e3
    with pytest.raises(TrainingError, match=r"clips: 0-17\.wav\n"):
        fit(Line(spoil={0: "part"}), plan(), data=iter([wide]))


def test_only_the_micro_batch_that_is_not_finite_is_named() -> None:
    with pytest.raises(TrainingError) as caught:
        fit(Line(spoil={1: "part"}), plan(accumulate=2))
    assert all(f"{i}-0.wav" in str(caught.value) for i in (2, 3))
    assert "0-0.wav" not in str(caught.value)


# files that fail


def test_files_that_fail_are_counted_once_each(tmp_path: Path) -> None:
    def failing(many: bool) -> Iterator[Pair]:
        for index in range(100):
            made = pair(index)
            made.failures = [f"{index if many else index % 2}.wav is gone"]
            yield made

    assert fit(Line(), plan(total=20, most_failures=2), tmp_path, data=failing(many=False)).finished
    assert (tmp_path / "log.txt").read_text().count("another clip stands in") == 2
    with pytest.raises(
        TrainingError, match=r"3 recordings could not be read, the last: 2\.wav is gone(.|\n)*at most 2"
    ):
        fit(Line(), plan(total=20, most_failures=2), data=failing(many=True))


# signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_after_the_step_with_a_checkpoint(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    saves: list[int] = []
    task = Line(at={2: lambda: os.kill(os.getpid(), number)})
    outcome = fit(task, plan(total=50, checkpoint_every=100), save=lambda step, _: saves.append(step))
    assert (outcome.step, outcome.finished, outcome.stopped_by) == (3, False, number.name)
    assert saves == [3]
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_at_once() -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    task = Line(at={2: twice})
    with pytest.raises(KeyboardInterrupt):
        fit(task, plan(total=50))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_runs_outside_the_main_thread() -> None:
    found: list[loop.Outcome] = []
    thread = threading.Thread(target=lambda: found.append(fit(Line(), plan())))
    thread.start()
    thread.join()
    assert found[0].finished


# data that ends, and writers that fail


def ending(after: int, error: Exception) -> Iterator[Pair]:
    yield from (pair(index) for index in range(after))
    raise error


def test_data_that_ends_saves_the_last_complete_step(tmp_path: Path) -> None:
    saves: dict[int, Tensor] = {}
    gone = StoreError("shard-3.tar is not there", "a shard", "bring it back")

    def save(step: int, tensors: dict[str, Tensor]) -> None:
        saves[step] = tensors["task/line.weight"].clone()

    with pytest.raises(StoreError) as caught:
        fit(Line(), plan(accumulate=2), tmp_path, data=ending(7, gone), save=save)
    assert caught.value is gone
    assert list(saves) == [3]
    assert torch.allclose(saves[3], by_hand(3, passes=2).weight, atol=1e-6)
    assert "stopped: shard-3.tar is not there; step 3 is kept" in (tmp_path / "log.txt").read_text()


def test_data_that_ends_at_a_checkpoint_or_before_the_first_step_writes_none() -> None:
    for steps, wanted in ((4, [4]), (0, [])):
        saves: list[int] = []
        with pytest.raises(StoreError):
            fit(Line(), plan(), data=ending(steps, StoreError("gone")), save=lambda s, _, kept=saves: kept.append(s))
        assert saves == wanted


@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_is_of_its_step_and_its_failure_is_raised(background: bool) -> None:
    written: list[tuple[int, Tensor]] = []

    def save(step: int, tensors: dict[str, Tensor]) -> Any:
        def write() -> None:
            if step == 4:
                raise CheckpointError("the disk is full")
            time.sleep(0.05 if background else 0)
            written.append((step, tensors["task/line.weight"].clone()))

        return write

    with pytest.raises(CheckpointError, match="the disk is full"):
        fit(Line(), plan(total=50, checkpoint_every=2, save_in_background=background), save=save)
    [(step, weight)] = written
    assert step == 2
    assert torch.allclose(weight, by_hand(2).weight, atol=1e-6)


@pytest.mark.parametrize(
    "then", ["a checkpoint", "a signal", "no more data", "a figure", "a line of the log", "the end"]
)
def test_the_late_check_saves_nothing_of_a_step_that_is_not_finite(
    then: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Teacher and centres have changed by then: the run ends before whatever comes next."""
    monkeypatch.setattr(stopping, "checks_late", lambda device: True)
    task, kept = Line(spoil={3: "part"}), list[int]()
    data, every, end = stream(), {"log_every": 100, "checkpoint_every": 100}, 50
    hooks = [(4, lambda step: pytest.fail("a figure of it"))] if then == "a figure" else []
    if then == "a checkpoint":
        every["checkpoint_every"] = 4
    elif then == "a line of the log":
        every["log_every"] = 4
    elif then == "a signal":
        task.at = {3: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    elif then == "no more data":
        data = ending(4, StoreError("gone"))
    else:
        end = 4 if then == "the end" else end
    with pytest.raises(TrainingError, match="step 3: not finite: spoilt"):
        fit(task, plan(total=end, **every), tmp_path, data=data, hooks=hooks, save=lambda step, _: kept.append(step))
    assert ("after", 3) in task.calls
    assert kept == []
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_the_late_check_does_not_change_finite_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, late = Line(), Line()
    fit(plain, plan())
    monkeypatch.setattr(stopping, "checks_late", lambda device: True)
    assert fit(late, plan()).finished
    assert torch.equal(plain.module.weight, late.module.weight)


def test_setting_the_system_time_changes_only_time_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    days = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 86400.0 * next(days))
    outcome = fit(Line(), plan(total=6, log_every=1), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert outcome.finished
    assert 0 < outcome.seconds < 60
    assert [line["step"] for line in lines] == list(range(1, 7))
    assert all(line["clips_per_second"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_the_clock_leaves_out_pauses() -> None:
    clock = loop.Clock(batch=8)
    clock.began -= 10
    clock.last_read -= 10
    for _ in range(5):
        clock.step()
    clock.waited = 2.5
    clock.paused(5.0)
    rate, waited = clock.read()
    assert rate == pytest.approx(5 * 8 / 5, rel=0.05)
    assert waited == pytest.approx(0.5, rel=0.05)
    assert clock.rate() == pytest.approx(8.0, rel=0.05)
    assert math.isfinite(clock.read()[0])
