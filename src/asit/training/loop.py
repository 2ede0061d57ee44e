"""The one training loop: it sees a method only as a `Trainable`, and data only as batches.

A step is a pure function of the weights, the step's number and its batch, so a resumed run equals one that was
never stopped: on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from asit.errors import AsitError, TrainingError
from asit.runtime import Precision, World
from asit.training import distributed, optim, stopping
from asit.training.async_checkpoint import Saver
from asit.training.metrics_log import Records
from asit.training.trainable import Now, Rates, Trainable

log = logging.getLogger(__name__)


class Micro(Protocol):
    """One forward pass' worth of clips."""

    ids: Sequence[str]
    failures: Sequence[str]

    def to(self, device: torch.device) -> Micro: ...


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
    save_in_background: bool = True
    """Write checkpoints in the background, from copies, which take their memory once more."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    step: int
    finished: bool
    stopped_by: str | None
    seconds: float
    clips_per_second: float


Hook = Callable[[int], None]
Save = Callable[[int, dict[str, Tensor]], Callable[[], None] | None]


@dataclass
class _Passes:
    """What the forward and backward passes of a step gave."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    micros: list[Micro] = field(default_factory=list)
    ended: AsitError | None = None
    """Why there was no batch; then the step counts for nothing."""
    answer: Callable[[], list[bool]] | None = None
    """What the processes agree on, where they were asked before the last pass."""


class Clock:
    """Measures clips per second and the share of time spent waiting for data, since the last reading and in all.

    The clock is monotonic, so that setting the system's time changes nothing.

    Args:
        batch: clips of a step.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.waited = 0.0
        self.began = self.last_read = time.perf_counter()
        self.steps = self.all_steps = 0
        self.pauses = 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def step(self) -> None:
        self.steps += 1
        self.all_steps += 1

    def paused(self, seconds: float) -> None:
        """Leave out time spent on checkpoints, figures and probes."""
        self.last_read += seconds
        self.pauses += seconds

    def rate(self) -> float:
        """Return clips per second over all steps."""
        return self.all_steps * self.batch / max(1e-9, self.seconds - self.pauses)

    def read(self) -> tuple[float, float]:
        """Return clips per second and the share of waiting since the last call."""
        elapsed = max(1e-9, time.perf_counter() - self.last_read)
        out = self.steps * self.batch / elapsed, min(1.0, self.waited / elapsed)
        self.last_read, self.steps, self.waited = time.perf_counter(), 0, 0.0
        return out


@dataclass(kw_only=True)
class Loop:
    """One call of a run: `run` trains from step `step` to the end of the plan, or until a signal asks to stop.

    Attributes:
        task: the method.
        batches: micro-batches on the CPU, `accumulate` for each step, from step `step` on.
        plan: how long and how often.
        world: processes and device.
        precision: arithmetic of the networks.
        records: metrics, log and progress.
        step: steps done; `task` holds their weights.
        optimiser_state: what `save` was given under the prefix "optimiser/", when resuming.
        save: called with the steps done and all tensors; in processes other than the main one there are none. What
            it returns writes them atomically, and runs in the background of the next steps: the tensors do not
            change until it has ended.
        hooks: (every, call) pairs; called with the steps done, in each process that has them.
    """

    task: Trainable
    batches: Iterator[Any]
    plan: Plan
    world: World
    precision: Precision
    records: Records
    step: int = 0
    optimiser_state: Mapping[str, Tensor] = field(default_factory=dict)
    save: Save = lambda step, tensors: None
    hooks: Sequence[tuple[int, Hook]] = ()

    def run(self) -> Outcome:
        """Train.

        Raises:
            TrainingError: a loss or gradient is not finite; raised before the weights change. On a CUDA device it is
                raised up to one step later, and the trained weights have not changed.
            AsitError: what `batches` raised, in any process, after a checkpoint of the last complete step; or what the
                writer of a checkpoint raised, up to one step later.
        """
        with stopping.Signals() as self.signals, Saver(self.plan.save_in_background) as self.saver:
            self._begin()
            return self._train()

    def _begin(self) -> None:
        """Get the method ready for the processes, and the optimiser for its first step."""
        self.task.distribute(self.world)
        module = self.task.trainable()
        self.optimiser = optim.adamw(module.named_parameters(), self.plan.betas, self.task.lr_scale)
        optim.load_optimiser_tensors(self.optimiser, distributed.like(module, self.optimiser_state))
        self.parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
        self.saved = self.step
        self.clock = Clock(self.plan.batch)
        self.failures = stopping.Failures(self.plan.most_failures, self.records, self.world)
        self.late = stopping.checks_late(self.world.device)
        self.check = stopping.FiniteCheck(self.task.suspects, self.world, late=self.late)
        self.last: Micro | None = None

    def _train(self) -> Outcome:
        plan, clock = self.plan, self.clock
        end = min(plan.total, plan.stop_after) if plan.stop_after else plan.total
        stop = False
        while self.step < end and not stop:
            measure = (self.step + 1) % plan.log_every == 0 or self.step + 1 == end
            now = Now(self.step, plan.total, plan.steps_per_epoch, measure)
            rates = self.task.rates(now)
            optim.set_rates(self.optimiser, rates.lr, rates.weight_decay)
            self.optimiser.zero_grad(set_to_none=True)
            passes = self._passes(now)
            asked = self._agree(passes, now)
            self.optimiser.step()
            self.task.after_update(now, self.world)
            self.step = step = self.step + 1
            clock.step()
            due = [hook for every, hook in self.hooks if every and (step % every == 0 or step == end)]
            if measure or due:
                self.check.read()
            if measure:
                self._log(passes.parts, rates, end)
            # Alone, what came during the line above counts for this step.
            stop = asked if self.world.size > 1 else self.signals.caught is not None
            began = time.perf_counter()
            if step % plan.checkpoint_every == 0 or step == end or stop:
                self._checkpoint()
            for hook in due:
                hook(step)
            clock.paused(time.perf_counter() - began)
        self._written()
        # Which process the signal met does not matter: all of them stop, and all say why.
        caught: str | None = next((found for found in self.world.gather(self.signals.caught) if found), None)
        return Outcome(self.step, self.step == plan.total, caught, clock.seconds, clock.rate())

    def _log(self, parts: Mapping[str, Tensor], rates: Rates, end: int) -> None:
        """Write the step to metrics.jsonl and show progress, with the means over all processes."""
        stacked = torch.stack([value.reshape(()) for value in parts.values()])
        self.world.sum_(stacked)
        values = dict(zip(parts, (stacked / self.world.size).tolist(), strict=True))  # waits for the device
        clips, wait = self.clock.read()
        loss = values.pop("loss")
        record = {"epoch": self.step / self.plan.steps_per_epoch, "loss": loss, "parts": values}
        record |= {"lr": rates.lr, "weight_decay": rates.weight_decay, **rates.others}
        record |= {"clips_per_second": clips, "data_wait": wait, "seconds": self.clock.seconds}
        self.records.write("train", self.step, record)
        losses = ("global", "local", "reconstruction", "objective")
        shown = [f"{name} {values[name]:.3f}" for name in losses if name in values]
        left = (end - self.step) * self.clock.batch / clips if clips > 0 else math.inf
        details = f"{clips:.1f} clips/s  waits for data {wait:.0%}  {'  '.join(shown)}"
        self.records.progress(self.step, f"loss {loss:.3f}", left, details)

    def _passes(self, now: Now) -> _Passes:
        """Forward and backward passes of a step."""
        plan, out = self.plan, _Passes()
        for i in range(plan.accumulate):
            batch = self._next(out)
            if batch is None:
                return out
            out.micros.append(batch)
            final = i + 1 == plan.accumulate
            if final and self.late:
                # The answer is there long before the device has done this pass.
                out.answer = self._ask(out)
            with contextlib.nullcontext() if final else self.task.no_sync():
                output = self.task.step(batch, now, self.precision, self.world)
                (output.loss / plan.accumulate).backward()
            for name, value in {"loss": output.loss, **output.parts}.items():
                share = value.detach().float() / plan.accumulate
                out.parts[name] = out.parts[name] + share if name in out.parts else share
        return out

    def _next(self, passes: _Passes) -> Micro | None:
        """The next micro-batch on the device; None where there is none and no other process waits for this one."""
        # Where others do, they are in the middle of a step with its exchanges: it is completed with the last batch,
        # and discarded by all.
        if passes.ended is None:
            waited = time.perf_counter()
            try:
                batch = next(self.batches)
                self.clock.waited += time.perf_counter() - waited
                self.failures.add(batch.failures, self.step)
                self.last = batch.to(self.world.device)
            except AsitError as error:
                passes.ended = error
                if self.world.size > 1 and self.last is None:
                    raise
        return None if passes.ended is not None and self.world.size == 1 else self.last

    def _agree(self, passes: _Passes, now: Now) -> bool:
        """Clip the gradients and go on to the update, or raise in all processes; gives whether to stop after it."""
        parts = passes.parts
        if parts:
            self.task.gradients_ready(now)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            parts["gradient_norm"] = optim.clip(gradients, self.plan.clip, self.plan.clip_per_parameter)
        bad = not self.late and passes.ended is None and self.check.gate(self.step, passes.micros, parts)
        ended, stop, unwritten, unfit, met = (passes.answer or self._ask(passes, bad))()
        if met:
            self.failures.share(self.step)
        if ended:
            self._out_of_data(passes.ended)
        if unwritten:
            self._written()
        if unfit:
            self.check.refuse()
        if self.late:
            self.check.read()
            self.check.gate(self.step, passes.micros, parts, self.optimiser)
        return stop

    def _ask(self, passes: _Passes, bad: bool = False) -> Callable[[], list[bool]]:
        signalled = self.signals.caught is not None
        return self.world.ask([passes.ended is not None, signalled, self.saver.failed, bad, self.failures.unshared])

    def _out_of_data(self, error: AsitError | None) -> NoReturn:
        """Keep the last complete step and raise, in all processes, what came instead of a batch in one of them."""
        found = next(text for text in self.world.gather(None if error is None else error.found) if text is not None)
        if self.step > self.saved:
            self._checkpoint()
        self._written()
        self.records.event(self.step, f"stopped: {found}; step {self.saved} is kept")
        raise error or TrainingError(f"another process of this run got no more data: {found}", remedy="see its message")

    def _checkpoint(self) -> None:
        """Copy all tensors, and let them be written beside the next steps."""
        self.check.read()
        held = {f"task/{name}": value for name, value in self.task.state().items()}
        held |= {f"optimiser/{name}": value for name, value in optim.optimiser_tensors(self.optimiser).items()}
        held = distributed.gathered(held, self.world.main)
        busy, began = self.saver.busy, time.perf_counter()
        self._written()
        if busy:
            waited = f"waited {time.perf_counter() - began:.1f} s until the checkpoint of step {self.saved} was written"
            log.info(f"step {self.step}: {waited}")
        if self.world.main:
            held = self.saver.copy(held)
        write = self.save(self.step, held)
        if write is not None:
            self.saver.start(write)
        self.saved = self.step

    def _written(self) -> None:
        """Wait until the last checkpoint is on the disk; raises in all processes where it could not be written."""
        error: BaseException | None = None
        try:
            self.saver.settle()
        except Exception as caught:
            error = caught
        if self.world.any(error is not None):
            found = "the main process of this run could not write a checkpoint"
            raise error or TrainingError(found, remedy="see its message")
