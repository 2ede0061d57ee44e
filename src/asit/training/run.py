"""The launcher of training runs: claim the folder, start or resume, train, and leave a model behind."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from asit import runtime
from asit.config import FrontEndSettings, RunSettings
from asit.config.presets import Resume
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, CatalogueError, CheckpointError, ConfigError, TrainingError
from asit.io import atomic, checkpoint
from asit.model.cpu import bf16
from asit.progress import duration
from asit.runtime import World
from asit.training import callbacks, loop, open_data, run_dir, trackers
from asit.training.metrics_log import Records
from asit.training.run_claim import agree, claimed, of_settings, together, torchrun_id
from asit.training.setup import Setup
from asit.training.stopping import NotFiniteError

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
S = TypeVar("S", bound=RunSettings)
T = TypeVar("T", bound=Setup[Any])
OpenCatalogue = Callable[[FrontEndSettings | None], Catalogue]
"""Opens the run's catalogue, or makes it, under the front end of the model that the run starts from, if any."""
Prepare = Callable[[S, OpenCatalogue, World, bool], T]
"""Settings, checked, to all parts of a run; the flag says that the weights will be those of a checkpoint."""
Hooks = Callable[[Records], Sequence[tuple[int, loop.Hook]]]
_TRIM_STEPS = 50
"""Steps of a CPU between two returns of freed memory: each costs about a sixth of a step."""
AGAIN = "give the same command again, from step 0: no checkpoint was written yet"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a call of a training run ended.

    Attributes:
        out: the run's folder.
        model: the model's folder, for `asit.load`.
        step: optimiser steps done.
        total: steps of the schedule.
        finished: whether all steps are done.
        stopped_by: the signal that stopped it, or None.
    """

    out: Path
    model: Path
    step: int
    total: int
    finished: bool
    stopped_by: str | None


def need_out(settings: RunSettings) -> None:
    """Raise a ConfigError where no folder for the run was given; it names missing data in the same message."""
    if not settings.out:
        raise ConfigError(
            "no folder for the run was given" if settings.data else "neither data nor a folder for the run were given",
            "recordings to train on, and a folder that gets the run",
            f"{settings.VERB} --data {settings.data or 'FOLDER'} --out RUN",
        )


@contextlib.contextmanager
def launch(
    settings: S, check: Callable[[S], None], prepare: Prepare[S, T], *, resume: Resume, overwrite: bool
) -> Iterator[Launched[T]]:
    """Set up a run in its folder, started or resumed; all processes must be given the same settings.

    A worker that torchrun's agent restarted resumes what the same torchrun started, whatever `resume` and `overwrite`.

    Args:
        settings: `data` and `out` are needed.
        check: refuses settings that cannot go together; called before anything else.
        prepare: makes the set-up.
        resume: resume the run in `out`; "auto": where there is one.
        overwrite: delete the run in `out`.

    Raises:
        ConfigError: the folder is not free to use, another process has it, it holds another kind of run or one with
            other settings, or there is nothing to resume; the device is not there.
        CatalogueError, CheckpointError: the data or the checkpoint do not fit.
        TrainingError: the processes differ in settings, code, data or folder, or one was lost.
    """
    need_out(settings)
    check(settings)
    out = Path(settings.out)
    with (
        _processes(settings) as world,
        claimed(settings, out, world, resume=resume, overwrite=overwrite) as (settled, before, log_lines),
    ):
        resumed = before is not None
        last = checkpoint.latest_state(out / run_dir.CHECKPOINTS) if resumed else None
        open_catalogue = functools.partial(_catalogue, settled, world, resumed)
        setup = prepare(settled, open_catalogue, world, last is not None)
        step, optimiser_state = _start(setup, before, last)
        try:
            yield Launched(setup=setup, resumed=resumed, step=step, optimiser_state=optimiser_state, log=log_lines)
        except BaseException:  # a new run without a checkpoint frees its folder: there is nothing to resume
            if world.main and not resumed and checkpoint.latest_state(out / run_dir.CHECKPOINTS) is None:
                (out / run_dir.CONFIG).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _processes(settings: RunSettings) -> Iterator[World]:
    """Join the processes of a run; where one of them dies or hangs, the others raise."""
    try:
        with runtime.world(settings.device, settings.threads, settings.process_timeout) as world:
            yield world
    except RuntimeError as error:
        # gloo has no error class of its own.
        signs = ("gloo", "NCCL", "Timed out waiting", "Connection closed by peer", "Connection reset by peer")
        exchange = isinstance(error, torch.distributed.DistError) or any(
            sign in str(error) for sign in (*signs, "Broken pipe")
        )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not exchange:
            raise
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"rank {os.environ.get('RANK', '0')} lost another process of this run: {first}",
            f"all processes to live, and to answer within {settings.process_timeout:g} minutes (process_timeout)",
            "see why the other one ended: its message, or the system's log where it ran out of memory; then "
            f"{next_start(Path(settings.out))} (torchrun --max-restarts does so by itself)",
        ) from error


def _catalogue(settings: RunSettings, world: World, resumed: bool, front_end: FrontEndSettings | None) -> Catalogue:
    """Return the run's catalogue: the main process makes it where there is none, and the others read it."""
    read = functools.partial(open_data.of_run, settings, Path(settings.out), front_end)
    own: Catalogue = together(world, functools.partial(read, rescan=not resumed), world.main)
    others: Catalogue = together(world, read, not world.main)
    return own if world.main else others


def _start(setup: Setup[Any], before: RunSettings | None, last: Path | None) -> tuple[int, Tensors]:
    """Write a new run's folder, or load the last checkpoint; return the steps done and the optimiser's state."""
    world, step, optimiser_state = setup.world, 0, dict[str, torch.Tensor]()
    if before is not None:
        together(world, lambda: run_dir.check_same(before, setup.settings))
    if last is not None:
        step, optimiser_state = together(world, lambda: _restore(setup, last))
    digest = setup.catalogue.digest
    facts = {"list of recordings (SHA-256)": digest, "steps done": step, "steps in all": setup.plan.total}
    agree(world, facts | of_settings(setup.settings) if world.size > 1 else {})
    if before is None:
        together(world, lambda: _write_folder(setup), world.main)
    return step, optimiser_state


def _write_folder(setup: Setup[Any]) -> None:
    """Write the files that a run starts with; config.yaml comes last and makes it count as started."""
    out, world, precision = setup.out, setup.world, setup.precision
    out.mkdir(parents=True, exist_ok=True)
    run_dir.clear(out)
    setup.catalogue.write(out / run_dir.CATALOGUE)
    facts = {
        "steps": setup.plan.total,
        "device": str(world.device),
        "device_reason": world.reason,
        "processes": world.size,
        "elastic": torchrun_id(),
        "precision": precision.name,
        "precision_reason": precision.reason,
    }
    atomic.write_json(out / run_dir.ENVIRONMENT, runtime.environment() | facts)
    run_dir.write_settings(out, setup.settings)


def _restore(setup: Setup[Any], last: Path) -> tuple[int, Tensors]:
    """Load a checkpoint of the same recordings into the task; return its step and the optimiser's state."""
    tensors, meta = checkpoint.load_state(last)
    if meta.get("catalogue") != setup.catalogue.digest:
        raise CatalogueError(
            f"{last} was made with another list of recordings ({setup.out / run_dir.CATALOGUE})",
            "the same recordings, of the same lengths, in the same order",
            "put the data back as they were, or start another run in a new --out",
        )
    for key in ("step", "frames"):
        if not isinstance(meta.get(key), int):
            raise CheckpointError(f"{last} does not say its {key}", "a checkpoint written by asit")
    task, optimiser = (
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("task/", "optimiser/")
    )
    setup.task.load_state(task)
    return meta["step"], optimiser


def next_start(out: Path) -> str:
    """Return how to continue an interrupted run in `out`: by resuming from a checkpoint, if there is one."""
    last = checkpoint.latest_state(out / run_dir.CHECKPOINTS)
    if last is None:
        return AGAIN
    return f"give the same command with --resume, which resumes from step {checkpoint.step_of(last)}"


def _ended(error: AsitError | OSError, out: Path) -> AsitError | OSError:
    """Return the error that ends a run, with the next start in its fix."""
    if isinstance(error, OSError):
        if not atomic.is_disk_full(error):
            return error
        found = f"the disk is full: {error.filename or out} was not written"
        error = CheckpointError(found, "room for the run's files", f"free space on the disk of {out}")
    # After a loss that is not finite the same settings would end the same way.
    if isinstance(error, NotFiniteError):
        return error
    return type(error)(error.found, error.expected, "; then ".join([*filter(None, [error.remedy]), next_start(out)]))


@dataclass(frozen=True, kw_only=True)
class Launched(Generic[T]):
    """A run that is set up in its folder, with the weights of its last checkpoint.

    Attributes:
        setup: its parts.
        resumed: whether the run was started before.
        step: steps done.
        optimiser_state: by name; empty at step 0.
        log: lines logged so far, for log.txt; None in all processes but the main one.
    """

    setup: T
    resumed: bool
    step: int
    optimiser_state: Tensors
    log: MemoryHandler | None

    def train(
        self, hooks: Hooks, finish: Callable[[Records, loop.Outcome], None] = lambda records, outcome: None
    ) -> loop.Outcome:
        """Train to the end of the plan or until a signal, with records, checkpoints and the model's folder.

        Args:
            hooks: made with the records; see `loop.Loop`.
            finish: called with the records when the steps are done.
        """
        setup, world = self.setup, self.setup.world
        folder, total = setup.out if world.main else None, setup.plan.total
        chosen = trackers.chosen(setup.settings) if world.main else []
        with (
            contextlib.closing(setup.feed(self.step)) as data,
            Records(folder, total, self.step, callbacks=chosen, log=self.log) as records,
            callbacks.started(chosen, setup.out, setup.settings.model_dump(mode="json"), self.step) as finished,
        ):
            own: list[tuple[int, loop.Hook]] = [(1, one.on_step) for one in chosen if callbacks.wants_steps(one)]
            if world.device.type == "cpu":
                log.debug(bf16.keep_freed_memory())
                own.append((_TRIM_STEPS, lambda step: bf16.return_freed_memory()))
            records.event(self.step, f"resumed from step {self.step}" if self.resumed else "started")
            try:
                outcome = loop.Loop(
                    task=setup.task,
                    batches=data,
                    plan=setup.plan,
                    world=world,
                    precision=setup.precision,
                    records=records,
                    step=self.step,
                    optimiser_state=self.optimiser_state,
                    save=functools.partial(self._save, chosen),
                    hooks=[*hooks(records), *own],
                ).run()
            except (AsitError, OSError) as error:
                ended = _ended(error, setup.out)
                # For log.txt alone: the caller shows the error. A full disk takes no more lines.
                with contextlib.suppress(OSError):
                    log.debug(f"ended by an error: {ended.found if isinstance(ended, AsitError) else ended}")
                if ended is error:
                    raise
                raise ended from error
            if outcome.stopped_by:
                text = f"stopped by {outcome.stopped_by} at step {outcome.step} of {total}"
            elif outcome.finished:
                text = f"finished: {outcome.step} steps in {duration(outcome.seconds)}"
            else:
                text = f"stopped after step {outcome.step} of {total}, as requested"
            records.event(outcome.step, text)
            finish(records, outcome)
            finished(outcome.finished)
        return outcome

    def _save(self, chosen: Sequence[callbacks.Callback], step: int, tensors: Tensors) -> Callable[[], None] | None:
        """Copy the model of this step; return what writes it and the checkpoint, in the main process."""
        setup, world = self.setup, self.setup.world
        if not (world.main or setup.settings.parallel == "fsdp"):
            return None
        meta = {"step": step, "catalogue": setup.catalogue.digest, "frames": setup.frames, "world": world.size}
        model = setup.model(step)
        if not world.main:  # it has taken part in gathering the shards
            return None

        def write() -> None:
            # The model first: a run that dies between the two repeats the steps, and writes the model again.
            model.save(setup.out / run_dir.MODEL, overwrite=True)
            checkpoint.save_state(setup.out / run_dir.CHECKPOINTS, step, tensors, meta, setup.settings.records.keep)
            for callback in chosen:
                callback.on_checkpoint(step, setup.out / run_dir.MODEL)

        return write

    def result(self, outcome: loop.Outcome) -> dict[str, Any]:
        """Return the fields of `RunResult`."""
        return {
            "out": self.setup.out,
            "model": self.setup.out / run_dir.MODEL,
            "step": outcome.step,
            "total": self.setup.plan.total,
            "finished": outcome.finished,
            "stopped_by": outcome.stopped_by,
        }
