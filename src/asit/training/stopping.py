"""What ends a run before its last step: signals, and values that are not finite."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from asit.errors import TrainingError
from asit.runtime import World


class NotFiniteError(TrainingError):
    """A loss or gradient that is not finite: the same settings come to it again."""


AGAIN_SECONDS = 5.0
"""A SIGTERM that comes this long after the first one acts at once."""


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a request to stop after the step.

    A second SIGINT acts at once. A second SIGTERM does when it comes `AGAIN_SECONDS` after the first: schedulers send
    it to every process of a job, and torchrun's agent sends it to its processes once more. Under torchrun it never
    does: the agent kills what does not end. SIGUSR1 is what schedulers are asked to send ahead of the end of a job.
    """

    def __init__(self) -> None:
        self.caught: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        wanted = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
        for number in wanted:
            # Only the main thread may set handlers; elsewhere the caller's remain.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        first, now = self.caught is None, time.monotonic()
        self.caught = self.caught or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.Signals(number)])
        elif first:
            self._since = now
        elif number == signal.SIGTERM and now - self._since > AGAIN_SECONDS and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, self._before[signal.Signals(number)])
            os.kill(os.getpid(), number)


class Suspects(Protocol):
    """Who can tell which clips of a micro-batch are behind a value that is not finite."""

    def suspects(self, batch: Any) -> list[str]: ...


def checks_late(device: torch.device) -> bool:
    """Whether reading a number from the device would hold the steps, so that it is read one step later."""
    return device.type == "cuda"


def spoilt(parts: Mapping[str, Tensor]) -> Tensor:
    """Whether any of these () tensors is not finite: () float32, 0 or 1, on their device."""
    return (~torch.isfinite(torch.stack([value.float().reshape(()) for value in parts.values()])).all()).float()


@dataclass
class _Step:
    """A step whose flag is on its way to the host."""

    step: int
    micros: Sequence[Any]
    parts: Mapping[str, Tensor]
    flag: Tensor
    copied: torch.cuda.Event | None


class LateCheck:
    """The check for values that are not finite, without asking the device in the step.

    The flag of a step gates its update on the device (`found_inf` of the fused optimiser: weights and optimiser stay
    as they are), and is copied to the host, which reads it before the next update, when the device has long been
    given the next step's work. What follows the update in a spoilt step (teacher, centres) is not gated: the run ends
    at the read, before anything of it is kept.
    """

    def __init__(self, task: Suspects, world: World) -> None:
        self.task, self.world = task, world
        self._open: _Step | None = None

    def gate(self, optimiser: Any, step: int, micros: Sequence[Any], parts: Mapping[str, Tensor]) -> None:
        """Make the optimiser's next step one that changes nothing, in all processes, if a part is not finite.

        Args:
            optimiser: a fused one of torch.
            step: the steps done before this one, for the message.
            micros: its micro-batches, kept until the flag has been read.
            parts: () tensors, the gradient's norm among them.
        """
        bad = spoilt(parts)
        self.world.sum_(bad)
        optimiser.grad_scale, optimiser.found_inf = None, bad.clamp(max=1.0)
        copied = None
        if bad.device.type == "cuda":
            flag = torch.empty((), pin_memory=True).copy_(bad, non_blocking=True)
            copied = torch.cuda.current_stream(bad.device).record_event()
        else:
            flag = bad.clone()
        self._open = _Step(step, micros, parts, flag, copied)

    def read(self) -> None:
        """Wait for the last flag.

        Raises:
            TrainingError: it is set; names the step that it was set in.
        """
        last, self._open = self._open, None
        if last is None:
            return
        if last.copied is not None:
            last.copied.synchronize()
        if float(last.flag):
            refuse(self.task, last.micros, broken(last.parts), last.step, self.world)


def broken(parts: Mapping[str, Tensor]) -> list[str]:
    """Names of the parts of the loss that are not finite; asks the device."""
    return [
        name
        for name, value in parts.items()
        if name not in ("loss", "gradient_norm") and not bool(torch.isfinite(value))
    ]


def refuse(task: Suspects, micros: Sequence[Any], found: Sequence[str], step: int, world: World) -> None:
    """Raise a TrainingError that names step, parts and clips; every process must call this.

    Args:
        micros: this process's micro-batches of the step.
        found: the parts that are not finite in this process.
    """
    mine = (sorted(found), [clip for micro in micros for clip in task.suspects(micro)] if found else [])
    everyone = world.gather(mine)
    parts = sorted({part for names, _ in everyone for part in names}) or ["gradient"]
    clips = list(dict.fromkeys(clip for _, names in everyone for clip in names))
    if not clips:
        clips = list(dict.fromkeys(c for group in world.gather([i for m in micros for i in m.ids]) for c in group))
    shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
    raise NotFiniteError(
        f"step {step}: not finite: {', '.join(parts)}; clips: {shown}",
        "finite losses and gradients; the weights were not changed",
        "look at these clips; or start again with a lower optim.lr or optim.clip, or with precision float32",
    )
