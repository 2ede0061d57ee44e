"""What ends a run before its last step: signals, values that are not finite, too many recordings that fail to read."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from asit.errors import TrainingError
from asit.runtime import World
from asit.training.metrics_log import Records

Suspects = Callable[[Any], list[str]]
"""Returns the clips of a micro-batch that may have caused a value that is not finite."""


class NotFiniteError(TrainingError):
    """A loss or gradient that is not finite: resuming with the same settings would reach it again."""


AGAIN_SECONDS = 5.0
"""A SIGTERM that comes this long after the first one ends the process at once."""


class Signals:
    """Turns the first SIGINT, SIGTERM or SIGUSR1 into a request to stop after the step.

    A second SIGINT ends the process at once, as does a second SIGTERM that comes `AGAIN_SECONDS` after the first:
    schedulers send SIGTERM to every process of a job, and torchrun's agent sends it to its processes once more. Under
    torchrun a second SIGTERM is ignored, since the agent kills what does not end. Schedulers can be told to send
    SIGUSR1 ahead of a job's end.
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


def checks_late(device: torch.device) -> bool:
    """Whether values are checked one step late, since reading a number from the device would stall the steps."""
    return device.type == "cuda"


class _Step(NamedTuple):
    """A step whose flag is being copied to the host."""

    step: int
    micros: Sequence[Any]
    parts: Mapping[str, Tensor]
    flag: Tensor
    copied: torch.cuda.Event | None


class FiniteCheck:
    """The check for values that are not finite, before the update or, without a wait for the device, one step late.

    Late, a step's flag prevents its update on the device (`found_inf` of the fused optimiser: weights and optimiser
    state do not change) and is copied to the host, which reads it before the next update, when the device already has
    the next step's work. What follows the update of such a step (teacher, centres) does change: the run ends when the
    flag is read, before any of it is saved.

    Args:
        suspects: of the method.
        world: the processes.
        late: see `checks_late`.
    """

    def __init__(self, suspects: Suspects, world: World, *, late: bool) -> None:
        self.suspects, self.world, self.late = suspects, world, late
        self._open: _Step | None = None

    def gate(self, step: int, micros: Sequence[Any], parts: Mapping[str, Tensor], optimiser: Any | None = None) -> bool:
        """Look at a step before its update: return whether a part is not finite in this process, or late, False.

        Args:
            step: steps done before this one, for the message.
            micros: its micro-batches, kept until the flag is read.
            parts: () tensors, the gradient's norm among them.
            optimiser: late, a fused one of torch, whose update then changes nothing in any process.
        """
        finite = torch.isfinite(torch.stack([value.float().reshape(()) for value in parts.values()])).all()
        flag, copied = (~finite).float(), None
        if optimiser is not None:
            self.world.sum_(flag)
            optimiser.grad_scale, optimiser.found_inf = None, flag.clamp(max=1.0)
        if self.late and flag.device.type == "cuda":
            bad, flag = flag, torch.empty((), pin_memory=True)
            flag.copy_(bad, non_blocking=True)
            copied = torch.cuda.current_stream(bad.device).record_event()
        self._open = _Step(step, micros, parts, flag, copied)
        return not self.late and bool(flag)

    def read(self) -> None:
        """Late, wait for the last flag.

        Raises:
            NotFiniteError: it is set; names the step that set it.
        """
        last, self._open = self._open, None
        if last is None or not self.late:
            return
        if last.copied is not None:
            last.copied.synchronize()
        if float(last.flag):
            self.refuse(last)

    def refuse(self, last: _Step | None = None) -> NoReturn:
        """Raise a NotFiniteError that names step, parts and clips; every process must call this."""
        last = last or self._open
        assert last is not None, "no step was looked at"
        found = sorted(name for name, value in last.parts.items() if not bool(torch.isfinite(value)))
        found = [name for name in found if name not in ("loss", "gradient_norm")]
        mine = (found, [clip for micro in last.micros for clip in self.suspects(micro)] if found else [])
        everyone = self.world.gather(mine)
        parts = sorted({part for names, _ in everyone for part in names}) or ["gradient"]
        clips = list(dict.fromkeys(clip for _, names in everyone for clip in names))
        if not clips:
            ids = self.world.gather([clip for micro in last.micros for clip in micro.ids])
            clips = list(dict.fromkeys(clip for group in ids for clip in group))
        shown = ", ".join(clips[:8]) + (f" and {len(clips) - 8} more" if len(clips) > 8 else "")
        raise NotFiniteError(
            f"step {last.step}: not finite: {', '.join(parts)}; clips: {shown}",
            "finite losses and gradients; the weights were not changed",
            "listen to these clips; or start again with a lower optim.lr or optim.clip, or with precision float32",
        )


class Failures:
    """Recordings that any process could not read.

    Args:
        most: recordings that may fail before the run stops.
        records: of this process; only the main process writes them.
        world: the processes.
    """

    def __init__(self, most: int, records: Records, world: World) -> None:
        self.most, self.records, self.world = most, records, world
        self._known: dict[str, None] = {}
        self._new: list[str] = []

    @property
    def unshared(self) -> bool:
        """Whether this process has failures that the other processes do not know of."""
        return bool(self._new)

    def add(self, found: Sequence[str], step: int) -> None:
        """Count the failures of a batch; a recording counts once, however many epochs it fails in.

        Raises:
            TrainingError: more than `most` have failed; those of other processes count after `share`.
        """
        new = [text for text in dict.fromkeys(found) if text not in self._known]
        self._known |= dict.fromkeys(new)
        if self.world.size == 1:
            self._log(new, step)
        else:
            self._new += new
        if len(self._known) > self.most:
            raise TrainingError(
                f"{len(self._known)} recordings could not be read, the last: {next(reversed(self._known))}",
                f"at most {self.most}, from the setting bad_files",
                "see log.txt for their names; repair the storage, or raise bad_files",
            )

    def share(self, step: int) -> None:
        """Exchange new failures between the processes; every process must call this."""
        mine, self._new = self._new, []
        shared = dict.fromkeys(text for one in self.world.gather(mine) for text in one)
        self._known |= shared
        self._log(list(shared), step)

    def _log(self, texts: Sequence[str], step: int) -> None:
        for text in texts:
            self.records.event(step, f"left out: {text}; another clip stands in for it")
