"""The one training loop: it sees a method only through `Trainable`, and data only as batches.

A step is a pure function of the weights, the step's number and its batch, so a run that goes on from a checkpoint
equals one that was never stopped: on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from asit.engine import optim
from asit.engine.records import Records
from asit.errors import TrainingError
from asit.runtime import Precision, World


@dataclass(frozen=True)
class Now:
    """Where a run stands: what schedules and gauges may depend on."""

    step: int
    total: int
    steps_per_epoch: int
    measure: bool = False
    """Whether gauges are wanted at this step."""

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the present one."""
        return self.step / self.steps_per_epoch


@dataclass
class StepOutput:
    """The one number that is minimised, and the ledger of what it is made of and what watches over it."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """What the optimiser follows at one step; `others` are kept in the records."""

    lr: float
    weight_decay: float
    others: Mapping[str, float] = field(default_factory=dict)


class Micro(Protocol):
    """One forward pass' worth of clips."""

    ids: Sequence[str]
    failures: Sequence[str]

    def to(self, device: torch.device) -> Micro: ...


class Trainable(Protocol):
    """A way of learning. The loop owns the optimiser; the method owns its networks and its schedules."""

    def trainable(self) -> nn.Module:
        """The module whose parameters are trained."""

    def distribute(self, world: World) -> None:
        """Get ready for several processes."""

    def rates(self, now: Now) -> Rates:
        """The schedules at this step: pure functions of it."""

    def lr_scale(self, name: str) -> float:
        """The learning rate of a parameter of `trainable`, by its name, over the step's."""

    def step(self, batch: Any, now: Now, precision: Precision, world: World) -> StepOutput:
        """Forward pass of one micro-batch."""

    def gradients_ready(self, now: Now) -> None:
        """Called after the backward passes and before clipping, to freeze what must not move yet."""

    def after_update(self, now: Now, world: World) -> None:
        """Called after the optimiser's step: teacher, centres."""

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to go on, weights included."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `state` back, strictly."""

    def suspects(self, batch: Any) -> list[str]:
        """The clips of a micro-batch that may be behind a loss that is not finite."""

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which backward passes do not exchange gradients between processes."""


class Distributed:
    """A base of methods: the network in training, whose gradients are averaged over the processes of the world."""

    _forward: nn.Module
    """What is called in a step; wrapped by `distribute`."""

    def distribute(self, world: World) -> None:
        """Average the gradients over the processes of the world."""
        if world.size > 1 and not isinstance(self._forward, DistributedDataParallel):
            self._forward = DistributedDataParallel(self._forward, broadcast_buffers=False)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """No exchange of gradients within this context."""
        if isinstance(self._forward, DistributedDataParallel):
            return self._forward.no_sync()
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Plan:
    """How long and how often."""

    total: int
    steps_per_epoch: int
    batch: int
    """Clips a step, over all processes."""
    accumulate: int
    betas: tuple[float, float]
    clip: float
    clip_per_parameter: bool
    log_every: int
    checkpoint_every: int
    stop_after: int = 0
    """Steps of the schedule to stop at; 0: its end."""
    most_failures: int = 1000
    """Files that may fail to read before the run stops."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    step: int
    finished: bool
    stopped_by: str | None
    seconds: float
    clips_per_second: float


Hook = Callable[[int], None]


def fit(
    task: Trainable,
    batches: Iterator[Micro],
    plan: Plan,
    world: World,
    precision: Precision,
    records: Records,
    *,
    start: int = 0,
    optimiser_state: Mapping[str, Tensor] | None = None,
    save: Callable[[int, dict[str, Tensor]], None] = lambda step, tensors: None,
    hooks: Sequence[tuple[int, Hook]] = (),
) -> Outcome:
    """Train from step `start` to the end of the plan, or until a signal asks to stop.

    Args:
        task: the method.
        batches: micro-batches on the CPU, `accumulate` for each step, from step `start` on.
        plan: how long and how often.
        world: processes and device.
        precision: arithmetic of the networks.
        records: metrics, log and progress.
        start: steps done already; `task` holds their weights.
        optimiser_state: what `save` was given under the prefix "optimiser/", when going on.
        save: called with the steps done and all tensors, in the main process; must write whole or not at all.
        hooks: (every, call) pairs; called with the steps done, in each process that has them.

    Raises:
        TrainingError: a loss or gradient is not finite; raised before the weights change.
    """
    task.distribute(world)
    module = task.trainable()
    optimiser = optim.adamw(module.named_parameters(), plan.betas, task.lr_scale)
    if optimiser_state:
        optim.load_optimiser_tensors(optimiser, dict(optimiser_state))
    parameters = [p for g in optimiser.param_groups for p in g["params"]]
    end = min(plan.total, plan.stop_after) if plan.stop_after else plan.total
    clock, failures = _Clock(plan.batch), set[str]()
    step = start

    def tensors() -> dict[str, Tensor]:
        held = {f"task/{name}": value for name, value in task.state().items()}
        return held | {f"optimiser/{name}": value for name, value in optim.optimiser_tensors(optimiser).items()}

    def checkpoint() -> None:
        if world.main:
            save(step, tensors())
        world.any(False)  # The others wait until it is written.

    with _Signals() as signals:
        while step < end:
            now = Now(
                step, plan.total, plan.steps_per_epoch, measure=(step + 1) % plan.log_every == 0 or step + 1 == end
            )
            rates = task.rates(now)
            optim.set_rates(optimiser, rates.lr, rates.weight_decay)
            optimiser.zero_grad(set_to_none=True)
            parts: dict[str, Tensor] = {}
            micros: list[Micro] = []
            broken: dict[str, Tensor] = {}
            for i in range(plan.accumulate):
                waited = time.perf_counter()
                batch = next(batches)
                clock.waited += time.perf_counter() - waited
                _report_failures(batch, failures, plan, records, step)
                batch = batch.to(world.device)
                micros.append(batch)
                last = i + 1 == plan.accumulate
                with contextlib.nullcontext() if last else task.no_sync():
                    output = task.step(batch, now, precision, world)
                    (output.loss / plan.accumulate).backward()
                broken = broken or {k: v.detach() for k, v in output.parts.items() if not _finite(v)}
                for name, value in {"loss": output.loss, **output.parts}.items():
                    share = value.detach().float() / plan.accumulate
                    parts[name] = parts[name] + share if name in parts else share
            task.gradients_ready(now)
            gradients = [p.grad for p in parameters if p.grad is not None]
            parts["gradient_norm"] = optim.clip(gradients, plan.clip, plan.clip_per_parameter)
            # After the exchange of gradients a value that is not finite has reached every process.
            if world.any(bool(broken) or not _finite(parts["gradient_norm"])):
                _refuse(task, micros, broken, step, world)
            optimiser.step()
            task.after_update(now, world)
            step += 1
            clock.step()
            if now.measure:
                _log(step, now, parts, rates, clock, end, records, world)
            stop = world.any(signals.caught is not None)
            if step % plan.checkpoint_every == 0 or step == end or stop:
                began = time.perf_counter()
                checkpoint()
                clock.paused(time.perf_counter() - began)
            began = time.perf_counter()
            for every, hook in hooks:
                if every and (step % every == 0 or step == end):
                    hook(step)
            clock.paused(time.perf_counter() - began)
            if stop:
                break
        # Which process the signal met does not matter: all of them stop, and all say why.
        caught: str | None = next((found for found in world.gather(signals.caught) if found), None)
    return Outcome(step, step == plan.total, caught, clock.seconds, clock.rate())


class _Clock:
    """Clips a second and the share of time spent waiting for data, since the last reading and over all."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.waited = 0.0
        self.began = self.mark = time.perf_counter()
        self.steps = self.all_steps = 0
        self.pauses = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> None:
        self.steps += 1
        self.all_steps += 1

    def paused(self, seconds: float) -> None:
        """Time spent on checkpoints, figures and probes, which is not the steps'."""
        self.mark += seconds
        self.pauses += seconds

    def rate(self) -> float:
        return self.all_steps * self.batch / max(1e-9, self.seconds - self.pauses)

    def read(self) -> tuple[float, float]:
        elapsed = max(1e-9, time.perf_counter() - self.mark)
        out = self.steps * self.batch / elapsed, min(1.0, self.waited / elapsed)
        self.mark, self.steps, self.waited = time.perf_counter(), 0, 0.0
        return out


class _Signals:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one acts at once."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Only the main thread may set handlers; elsewhere the caller's remain.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        signal.signal(number, self._before[signal.Signals(number)])


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.detach()).all())


def _report_failures(batch: Micro, known: set[str], plan: Plan, records: Records, step: int) -> None:
    """Tell of each file once, however many epochs it fails in, and stop when there are too many."""
    for text in batch.failures:
        if text not in known:
            known.add(text)
            records.event(step, f"left out: {text}; another clip stands in for it")
    if len(known) > plan.most_failures:
        raise TrainingError(
            f"{len(known)} recordings could not be read, the last: {batch.failures[-1]}",
            f"at most {plan.most_failures}, from the setting bad_files",
            "see log.txt for their names; mend the storage, or raise bad_files, then --resume",
        )


def _refuse(task: Trainable, micros: Sequence[Micro], broken: dict[str, Tensor], step: int, world: World) -> None:
    mine = (sorted(broken), [clip for micro in micros for clip in task.suspects(micro)] if broken else [])
    everyone = world.gather(mine)
    parts = sorted({part for found, _ in everyone for part in found}) or ["gradient"]
    clips = list(dict.fromkeys(clip for _, found in everyone for clip in found))
    if not clips:
        clips = list(dict.fromkeys(c for group in world.gather([i for m in micros for i in m.ids]) for c in group))
    shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
    raise TrainingError(
        f"step {step}: not finite: {', '.join(parts)}; clips: {shown}",
        "finite losses and gradients; the weights were not changed",
        "look at these clips; or start again with a lower optim.lr or optim.clip, or with precision float32",
    )


def _log(
    step: int,
    now: Now,
    parts: Mapping[str, Tensor],
    rates: Rates,
    clock: _Clock,
    end: int,
    records: Records,
    world: World,
) -> None:
    stacked = torch.stack([value.reshape(()) for value in parts.values()])
    world.sum_(stacked)
    values = dict(zip(parts, (stacked / world.size).tolist(), strict=True))
    clips, wait = clock.read()
    loss = values.pop("loss")
    records.write(
        "train",
        step,
        {
            "epoch": step / now.steps_per_epoch,
            "loss": loss,
            "parts": values,
            "lr": rates.lr,
            "weight_decay": rates.weight_decay,
            **rates.others,
            "clips_per_second": clips,
            "data_wait": wait,
            "seconds": clock.seconds,
        },
    )
    main = "  ".join(f"{name} {values[name]:.3f}" for name in ("global", "local", "reconstruction") if name in values)
    left = (end - step) * clock.batch / clips if clips > 0 else math.inf
    records.progress(step, f"loss {loss:.3f}  {main}  {clips:.1f} clips/s  waits for data {wait:.0%}", left)
