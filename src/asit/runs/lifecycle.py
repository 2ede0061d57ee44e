"""What every kind of training run does around its steps: begin, go on from a checkpoint, leave a model behind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

import torch

from asit import checkpoint, runtime
from asit.data.catalogue import Catalogue
from asit.engine import loop
from asit.engine.records import Records, duration
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.model import cpu
from asit.model.audio_model import AudioModel
from asit.runs import folder, source
from asit.runtime import Precision, World
from asit.settings import RecordSettings, Settings

Tensors = dict[str, torch.Tensor]
S = TypeVar("S", bound=Settings)


@dataclass(frozen=True)
class Run:
    """A run, prepared: all that its steps need and its folder tells."""

    out: Path
    settings: Settings
    catalogue: Catalogue
    frames: int
    task: loop.Trainable
    precision: Precision
    plan: loop.Plan
    notes: Sequence[str]
    records: RecordSettings
    model: Callable[[int], AudioModel]
    """The model as it stands after a number of steps, with its card."""


def together(world: World, call: Callable[[], Any], mine: bool = True) -> Any:
    """Do something in this process and fail in all processes if it fails in one, without leaving others waiting."""
    error: BaseException | None = None
    result = None
    if mine:
        try:
            result = call()
        except BaseException as caught:
            error = caught
    if world.any(error is not None):
        raise (
            error if error is not None else ConfigError("another process of this run failed", remedy="see its message")
        )
    return result


@dataclass(frozen=True)
class Opened(Generic[S]):
    """A run's folder, claimed, and what is in it.

    Attributes:
        settings: those asked for, with each auto as it was resolved when the run began.
        before: those the run was begun with; None where it begins.
    """

    settings: S
    before: S | None

    @property
    def going_on(self) -> bool:
        return self.before is not None


def claim(settings: S, out: Path, world: World, *, resume: bool, overwrite: bool) -> Opened[S]:
    """Claim the folder in all processes.

    Raises:
        ConfigError: it is not free to use, holds another kind of run, or there is nothing to go on with.
    """
    going_on = together(world, lambda: folder.claim(out, resume=resume, overwrite=overwrite))
    before = folder.read_settings(out, type(settings)) if going_on else None
    return Opened(settings if before is None else folder.settle(settings, before), before)


def catalogue(wanted: source.Wanted, out: Path, world: World, stream: TextIO | None, *, going_on: bool) -> Catalogue:
    """The run's catalogue: made by the main process where there is none, and read by the others."""
    made: Catalogue | None = together(
        world, lambda: source.catalogue(wanted, out, stream, anew=not going_on), world.main
    )
    return source.catalogue(wanted, out, None) if made is None else made


def start(run: Run, opened: Opened[S], world: World) -> tuple[int, Tensors]:
    """Begin the run, or load its last checkpoint; gives the steps done and the optimiser's state.

    Raises:
        ConfigError: the run was begun with other settings.
        CatalogueError, CheckpointError: as `restore`.
    """
    if opened.before is not None:
        folder.check_same(opened.before, run.settings)
        return restore(run)
    if world.main:
        begin(run, world)
    return 0, {}


def begin(run: Run, world: World) -> None:
    """Clear the folder and write what a run is told by; config.yaml comes last and makes it count as begun."""
    run.out.mkdir(parents=True, exist_ok=True)
    folder.clear(run.out)
    run.catalogue.write(run.out / folder.CATALOGUE)
    reasons = {
        "steps": run.plan.total,
        "device": str(world.device),
        "device_reason": world.reason,
        "processes": world.size,
    }
    precision = {"precision": run.precision.name, "precision_reason": run.precision.reason}
    folder.write_json(run.out / folder.ENVIRONMENT, runtime.environment() | reasons | precision)
    folder.write_settings(run.out, run.settings)


@contextlib.contextmanager
def free_if_nothing_came(out: Path, world: World, going_on: bool) -> Iterator[None]:
    """With no checkpoint there is nothing to go on with: after a failure the next start must find the folder free."""
    try:
        yield
    except BaseException:
        if world.main and not going_on and checkpoint.latest_state(out / folder.CHECKPOINTS) is None:
            (out / folder.CONFIG).unlink(missing_ok=True)
        raise


def restore(run: Run) -> tuple[int, Tensors]:
    """Load the last checkpoint into the task; gives its step and the optimiser's state: step 0 where there is none.

    Raises:
        CatalogueError: it was made with other recordings.
        CheckpointError: it is damaged.
    """
    last = checkpoint.latest_state(run.out / folder.CHECKPOINTS)
    if last is None:
        return 0, {}
    tensors, meta = checkpoint.load_state(last)
    if meta.get("catalogue") != run.catalogue.digest:
        raise CatalogueError(
            f"{last} was made with another list of recordings ({run.out / folder.CATALOGUE})",
            "the same recordings, of the same lengths, in the same order",
            "put the data back as they were, or start another run in a new --out",
        )
    for key in ("step", "frames"):
        if not isinstance(meta.get(key), int):
            raise CheckpointError(f"{last} does not say its {key}", "a checkpoint written by asit")
    task = {name.removeprefix("task/"): value for name, value in tensors.items() if name.startswith("task/")}
    run.task.load_state(task)
    prefix = "optimiser/"
    return meta["step"], {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def train(
    run: Run,
    data: Generator[Any],
    world: World,
    begun: tuple[int, Tensors],
    stream: TextIO | None,
    *,
    going_on: bool,
    hooks: Callable[[Records], Sequence[tuple[int, loop.Hook]]],
    after: Callable[[Records, loop.Outcome], None] = lambda records, outcome: None,
) -> loop.Outcome:
    """Train to the end of the plan or until a signal, with records, checkpoints and the model's folder.

    Args:
        data: micro-batches from the step on that it starts from; closed at the end.
        begun: the step it starts from, and the optimiser's state: of `start`.
        hooks: made with the records; see `loop.fit`.
        after: called with the records when the steps are done.
    """
    plan, (first, optimiser_state) = run.plan, begun
    folder_ = run.out if world.main else None
    records = Records(folder_, plan.total, first, tensorboard=run.records.tensorboard, stream=stream)
    with contextlib.closing(data), records:
        for note in run.notes:
            records.say(note)
        if world.device.type == "cpu":
            records.say(cpu.keep_freed_memory())
        records.event(first, f"goes on from step {first}" if going_on else "begins")

        def save(step: int, tensors: Tensors) -> None:
            meta = {
                "step": step,
                "catalogue": run.catalogue.digest,
                "frames": run.frames,
                "world": world.size,
            }
            # The model first: a run that dies between the two repeats the steps, and writes the model again.
            run.model(step).save(run.out / folder.MODEL, overwrite=True)
            checkpoint.save_state(run.out / folder.CHECKPOINTS, step, tensors, meta, run.records.keep)

        outcome = loop.fit(
            run.task,
            data,
            plan,
            world,
            run.precision,
            records,
            start=first,
            optimiser_state=optimiser_state,
            save=save,
            hooks=hooks(records),
        )
        if outcome.stopped_by:
            records.event(outcome.step, f"stopped by {outcome.stopped_by} at step {outcome.step} of {plan.total}")
        elif outcome.finished:
            records.event(outcome.step, f"finished: {outcome.step} steps in {duration(outcome.seconds)}")
        else:
            records.event(outcome.step, f"stopped as asked after step {outcome.step} of {plan.total}")
        after(records, outcome)
    return outcome
