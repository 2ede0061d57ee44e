"""The one training loop: it sees a method only through `Trainable`, and data only as batches.

A step is a pure function of the weights, the step's number and its batch, so a resumed run equals one that was
never stopped: on the CPU bit for bit.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from asit.errors import AsitError, TrainingError
from asit.runtime import Precision, World
from asit.training import distributed, optim, stopping
from asit.training.async_checkpoint import Saver
from asit.training.metrics_log import Records
from asit.training.read_failures import Failures
from asit.training.throughput import Clock, log_step

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Now:
    """The state of a run that schedules and gauges may depend on."""

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
    """The loss, and by name its parts and the gauges."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """The schedules at one step; `others` are kept in the records."""

    lr: float
    weight_decay: float
    others: Mapping[str, float] = field(default_factory=dict)


class Micro(Protocol):
    """One forward pass' worth of clips."""

    ids: Sequence[str]
    failures: Sequence[str]

    def to(self, device: torch.device) -> Micro: ...


class Trainable(Protocol):
    """A training method. The loop owns the optimiser; the method owns its networks and its schedules."""

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
        """Called after the optimiser's step: EMA of the teacher, centring, averaged weights."""

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, weights included."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `state` back, strictly."""

    def suspects(self, batch: Any) -> list[str]:
        """The clips of a micro-batch that may have caused a loss that is not finite."""

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which backward passes do not exchange gradients between processes."""


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
    save: Save = lambda step, tensors: None,
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
        save: called with the steps done and all tensors; in processes other than the main one there are none. What
            it returns writes them atomically, and runs in the background of the next steps: the tensors do not
            change until it has ended.
        hooks: (every, call) pairs; called with the steps done, in each process that has them.

    Raises:
        TrainingError: a loss or gradient is not finite; raised before the weights change. On a CUDA device it is
            raised up to one step later, and the trained weights have not changed.
        AsitError: what `batches` raised, in any process, after a checkpoint of the last whole step; or what the
            writer of a checkpoint raised, up to one step later.
    """
    with stopping.Signals() as signals, Saver(plan.save_in_background) as saver:
        fitting = _Fit(task, batches, plan, world, precision, records, signals, saver, start, save)
        fitting.begin(optimiser_state)
        return fitting.go(hooks)


@dataclass
class _Passes:
    """What the forward and backward passes of a step gave."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    micros: list[Micro] = field(default_factory=list)
    ended: AsitError | None = None
    """Why there was no batch; then the step counts for nothing."""
    answer: Callable[[], list[bool]] | None = None
    """What the processes agree on, where they were asked before the last pass."""


@dataclass
class _Fit:
    """One call of `fit`."""

    task: Trainable
    batches: Iterator[Micro]
    plan: Plan
    world: World
    precision: Precision
    records: Records
    signals: stopping.Signals
    saver: Saver
    step: int
    save: Save

    def begin(self, optimiser_state: Mapping[str, Tensor] | None) -> None:
        """Get the method ready for the processes, and the optimiser for its first step."""
        self.task.distribute(self.world)
        module = self.task.trainable()
        self.optimiser = optim.adamw(module.named_parameters(), self.plan.betas, self.task.lr_scale)
        if optimiser_state:
            optim.load_optimiser_tensors(self.optimiser, distributed.like(module, optimiser_state))
        self.parameters = [p for g in self.optimiser.param_groups for p in g["params"]]
        self.saved = self.step
        self.clock = Clock(self.plan.batch)
        self.failures = Failures(self.plan.most_failures, self.records, self.world)
        late = stopping.checks_late(self.world.device)
        self.late = stopping.LateCheck(self.task.suspects, self.world) if late else None
        self.last: Micro | None = None

    def go(self, hooks: Sequence[tuple[int, Hook]]) -> Outcome:
        plan, clock = self.plan, self.clock
        end = min(plan.total, plan.stop_after) if plan.stop_after else plan.total
        stop = False
        while self.step < end and not stop:
            step = self.step
            measure = (step + 1) % plan.log_every == 0 or step + 1 == end
            now = Now(step, plan.total, plan.steps_per_epoch, measure)
            rates = self.task.rates(now)
            optim.set_rates(self.optimiser, rates.lr, rates.weight_decay)
            self.optimiser.zero_grad(set_to_none=True)
            passes = self._passes(now)
            asked = self._agree(passes, now)
            self.optimiser.step()
            self.task.after_update(now, self.world)
            self.step = step = step + 1
            clock.step()
            due = [hook for every, hook in hooks if every and (step % every == 0 or step == end)]
            if measure:
                self._settled()
                learning = {"lr": rates.lr, "weight_decay": rates.weight_decay, **rates.others}
                log_step(step, now.steps_per_epoch, passes.parts, learning, clock, end, self.records, self.world)
            # Alone, what came during the line above counts for this step.
            stop = asked if self.world.size > 1 else self.signals.caught is not None
            began = time.perf_counter()
            if step % plan.checkpoint_every == 0 or step == end or stop:
                self._checkpoint()
            if due:
                self._settled()
            for hook in due:
                hook(step)
            clock.paused(time.perf_counter() - began)
        self._written()
        # Which process the signal met does not matter: all of them stop, and all say why.
        caught: str | None = next((found for found in self.world.gather(self.signals.caught) if found), None)
        return Outcome(self.step, self.step == plan.total, caught, clock.seconds, clock.rate())

    def _passes(self, now: Now) -> _Passes:
        """Forward and backward passes of a step."""
        plan, out = self.plan, _Passes()
        for i in range(plan.accumulate):
            batch = self._next(out)
            if batch is None:
                return out
            out.micros.append(batch)
            final = i + 1 == plan.accumulate
            if final and self.late is not None:
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
        """The next micro-batch on the device; None where there is none and no other process waits for this one.

        Where others do, they are in the middle of a step with its exchanges: it is gone through with the batch at
        hand, and thrown away by all.
        """
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
        parts, bad, spoilt = passes.parts, False, list[str]()
        if passes.parts:
            self.task.gradients_ready(now)
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            parts["gradient_norm"] = distributed.clip(gradients, self.plan.clip, self.plan.clip_per_parameter)
        if self.late is None and passes.ended is None:
            spoilt = stopping.broken(parts)
            bad = bool(spoilt) or not bool(torch.isfinite(parts["gradient_norm"]))
        ended, stop, unwritten, unfit, met = (passes.answer or self._ask(passes, bad))()
        if met:
            self.failures.share(self.step)
        if ended:
            self._out_of_data(passes.ended)
        if unwritten:
            self._written()
        # After the exchange of gradients a value that is not finite has reached every process.
        if unfit:
            stopping.refuse(self.task.suspects, passes.micros, spoilt, self.step, self.world)
        if self.late is not None:
            self._settled()
            self.late.gate(self.optimiser, self.step, passes.micros, parts)
        return stop

    def _ask(self, passes: _Passes, bad: bool = False) -> Callable[[], list[bool]]:
        mine = [
            passes.ended is not None,
            self.signals.caught is not None,
            self.saver.failed,
            bad,
            self.failures.unshared,
        ]
        return self.world.ask(mine)

    def _out_of_data(self, error: AsitError | None) -> NoReturn:
        """Keep the last whole step and raise, in all processes, what came instead of a batch in one of them."""
        found = next(text for text in self.world.gather(None if error is None else error.found) if text is not None)
        if self.step > self.saved:
            self._checkpoint()
        self._written()
        self.records.event(self.step, f"stopped: {found}; step {self.saved} is kept")
        raise error or TrainingError(
            f"another process of this run got no more data: {found}",
            remedy="see its message",
        )

    def _settled(self) -> None:
        """Make sure that the last step was no spoilt one, where that is not known yet."""
        if self.late is not None:
            self.late.read()

    def _checkpoint(self) -> None:
        """Copy all tensors, and let them be written beside the next steps."""
        self._settled()
        held = {f"task/{name}": value for name, value in self.task.state().items()}
        held |= {f"optimiser/{name}": value for name, value in optim.optimiser_tensors(self.optimiser).items()}
        held = distributed.whole(held, self.world.main)
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
            raise error or TrainingError(
                "the main process of this run could not write a checkpoint", remedy="see its message"
            )
