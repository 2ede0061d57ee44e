"""What every kind of training run does around its steps: begin, go on from a checkpoint, leave a model behind."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from asit import logs, runtime
from asit.config import FinetuneSettings, PretrainSettings, RecordSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, CatalogueError, CheckpointError, ConfigError, TrainingError
from asit.io import atomic, checkpoint, lock
from asit.model.audio_model import AudioModel
from asit.model.cpu import bf16
from asit.progress import duration
from asit.runtime import Precision, World
from asit.training import loop, open_data, rank_consistency, run_dir
from asit.training.metrics_log import Records
from asit.training.stopping import NotFiniteError

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]
S = TypeVar("S", bound=PretrainSettings | FinetuneSettings)
Resume = bool | Literal["auto"]
"""Whether to go on with the run that is in the folder; auto: where there is one."""


@dataclass(frozen=True)
class Run:
    """A run, prepared: all that its steps need and its folder tells."""

    out: Path
    settings: PretrainSettings | FinetuneSettings
    catalogue: Catalogue
    frames: int
    task: loop.Trainable
    precision: Precision
    plan: loop.Plan
    records: RecordSettings
    model: Callable[[int], AudioModel]
    """The model as it stands after a number of steps, with its card."""
    log: MemoryHandler | None
    """What was logged so far, for log.txt; None in all processes but the main one."""


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


@contextlib.contextmanager
def processes(settings: PretrainSettings | FinetuneSettings) -> Iterator[World]:
    """The processes of a run; where one of them dies or hangs, the others end and say so.

    Raises:
        ConfigError: the device is not there.
        TrainingError: another process was lost.
    """
    try:
        with runtime.world(settings.device, settings.threads, settings.process_timeout) as world:
            yield world
    except RuntimeError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not _is_of_processes(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"rank {os.environ.get('RANK', '0')} lost another process of this run: {first}",
            f"all processes to live, and to answer within {settings.process_timeout:g} minutes (process_timeout)",
            "see why the other one ended: its message, or the system's log where it ran out of memory; then "
            f"{next_start(Path(settings.out))} (torchrun --max-restarts does so by itself)",
        ) from error


def _is_of_processes(error: RuntimeError) -> bool:
    """Whether it tells of the exchange between processes; gloo has no class of error of its own."""
    if isinstance(error, torch.distributed.DistError):
        return True
    signs = (
        "gloo",
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "NCCL",
        "Timed out waiting",
    )
    return any(sign in str(error) for sign in signs)


@dataclass(frozen=True)
class Opened(Generic[S]):
    """A run's folder, claimed, and what is in it.

    Attributes:
        settings: those asked for, with each auto as it was resolved when the run began.
        before: those the run was begun with; None where it begins.
        log: collects what is logged until log.txt is open; None in all processes but the main one.
    """

    settings: S
    before: S | None
    log: MemoryHandler | None

    @property
    def going_on(self) -> bool:
        return self.before is not None


@contextlib.contextmanager
def opened(settings: S, out: Path, world: World, *, resume: Resume, overwrite: bool) -> Iterator[Opened[S]]:
    """Claim the folder for all processes and keep other runs out of it until the end.

    Args:
        settings: as asked for; all processes must have been asked for the same.
        out: the run's folder.
        world: the processes.
        resume: go on with the run that is there; "auto": where there is one.
        overwrite: delete the run that is there.

    A worker that torchrun's agent started again goes on with what the same torchrun began, whatever the two say.

    Raises:
        ConfigError: the folder is not free to use, a live run has it, it holds another kind of run, or there is nothing
            to go on with.
        TrainingError: the processes were asked for different things, or see different folders.
    """
    asked = {"--resume": resume, "--overwrite": overwrite}
    rank_consistency.agree(
        world, rank_consistency.of_code() | asked | rank_consistency.of_settings(settings) if world.size > 1 else {}
    )
    again = _restarted(out, world)

    def claim() -> bool:
        if again:
            return run_dir.claim(out, resume=True, overwrite=False)
        if resume == "auto" and not overwrite:
            return run_dir.claim(out, resume=(out / run_dir.CONFIG).exists(), overwrite=False)
        return run_dir.claim(out, resume=bool(resume), overwrite=overwrite)

    going_on = together(world, claim)
    rank_consistency.agree(world, {f"a run in {out}": going_on})
    with contextlib.ExitStack() as stack:
        log_ = stack.enter_context(logs.run_log()) if world.main else None
        if world.main:
            held = lock.held(out, world.size)
        together(world, lambda: stack.enter_context(held), world.main)
        together(world, lambda: run_dir.tidy(out), world.main)
        # Another run may have ended here since.
        going_on = together(world, claim)
        before = together(world, lambda: run_dir.read_settings(out, type(settings)) if going_on else None)
        if before is not None:
            _threads(settings.threads, run_dir.began_with(out), world)
        yield Opened(settings if before is None else run_dir.settle(settings, before), before, log_)


def _threads(asked: int, began: tuple[int, int] | None, world: World) -> None:
    """Take as many CPU threads as the run began with, unless a number was asked for: its last bits depend on them.

    With another number of processes the bits are others anyway, and a core may have another share of them.

    Args:
        asked: threads; 0: none were asked for.
        began: processes of the run's beginning, and threads of each; None: not known.
    """
    if world.device.type != "cpu" or began is None or began[0] != world.size:
        return
    now, then = torch.get_num_threads(), began[1]
    if asked and now != then:
        log.info(f"Using {now} CPU threads as requested; only the {then} that the run began with resume it bit for bit")
    elif now != then:
        torch.set_num_threads(then)
        log.info(
            f"Using {then} CPU threads, as when the run began, for bit-identical results (--threads {now} for more)"
        )


def _restarted(out: Path, world: World) -> bool:
    """Whether torchrun's agent started these processes again, after they had begun the run that is in the folder."""
    restarts = world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if not max(restarts):  # a machine that joined later has not been restarted itself
        return False
    began = world.gather(run_dir.begun_under(out) if world.main else None)[0]
    mine = world.gather(_elastic() if world.main else None)[0]
    return began is not None and began == mine


def _elastic() -> str | None:
    """What tells one call of torchrun from another: its id; where it was given none, its own process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name


def catalogue(wanted: open_data.Wanted, out: Path, world: World, *, going_on: bool) -> Catalogue:
    """The run's catalogue: made by the main process where there is none, and read by the others."""
    made: Catalogue | None = together(world, lambda: open_data.catalogue(wanted, out, anew=not going_on), world.main)
    read = together(world, lambda: open_data.catalogue(wanted, out), made is None)
    return read if made is None else made


def start(run: Run, opened: Opened[S], world: World) -> tuple[int, Tensors]:
    """Begin the run, or load its last checkpoint; gives the steps done and the optimiser's state.

    Raises:
        ConfigError: the run was begun with other settings.
        CatalogueError, CheckpointError: as `restore`; or not every process sees the recordings.
        TrainingError: the processes do not hold the same settings, recordings or checkpoint.
    """
    before = opened.before
    if before is not None:
        together(world, lambda: run_dir.check_same(before, run.settings))
    step, optimiser_state = together(world, lambda: restore(run)) if before is not None else (0, {})
    facts = {"list of recordings (SHA-256)": run.catalogue.digest, "steps done": step, "steps in all": run.plan.total}
    rank_consistency.agree(world, facts | rank_consistency.of_settings(run.settings) if world.size > 1 else {})
    rank_consistency.have_files(world, run.catalogue)
    if before is None:
        together(world, lambda: begin(run, world), world.main)
    return step, optimiser_state


def begin(run: Run, world: World) -> None:
    """Clear the folder and write what a run is told by; config.yaml comes last and makes it count as begun."""
    run.out.mkdir(parents=True, exist_ok=True)
    run_dir.clear(run.out)
    run.catalogue.write(run.out / run_dir.CATALOGUE)
    reasons = {
        "steps": run.plan.total,
        "device": str(world.device),
        "device_reason": world.reason,
        "processes": world.size,
        "elastic": _elastic(),
    }
    precision = {"precision": run.precision.name, "precision_reason": run.precision.reason}
    atomic.write_json(run.out / run_dir.ENVIRONMENT, runtime.environment() | reasons | precision)
    run_dir.write_settings(run.out, run.settings)


def next_start(out: Path) -> str:
    """What to do after a run in `out` was interrupted: resume from a checkpoint, if there is one."""
    last = checkpoint.latest_state(out / run_dir.CHECKPOINTS)
    if last is None:
        return AGAIN
    return f"give the same command with --resume, which goes on from step {checkpoint.step_of(last)}"


AGAIN = "give the same command again, from step 0: no checkpoint was written yet"


def _ended(error: AsitError | OSError, out: Path) -> AsitError | OSError:
    """The error that a run ends by, with what the next start resumes from in its fix."""
    if isinstance(error, OSError):
        if not atomic.is_disk_full(error):
            return error
        found = f"the disk is full: {error.filename or out} was not written"
        error = CheckpointError(found, "room for the run's files", f"free space on the disk of {out}")
    # After a loss that is not finite the same settings would come to the same end.
    if isinstance(error, NotFiniteError):
        return error
    return type(error)(error.found, error.expected, "; then ".join([*filter(None, [error.remedy]), next_start(out)]))


@contextlib.contextmanager
def free_if_nothing_came(out: Path, world: World, going_on: bool) -> Iterator[None]:
    """With no checkpoint there is nothing to go on with: after a failure the next start must find the folder free."""
    try:
        yield
    except BaseException:
        if world.main and not going_on and checkpoint.latest_state(out / run_dir.CHECKPOINTS) is None:
            (out / run_dir.CONFIG).unlink(missing_ok=True)
        raise


def restore(run: Run) -> tuple[int, Tensors]:
    """Load the last checkpoint into the task; gives its step and the optimiser's state: step 0 where there is none.

    Raises:
        CatalogueError: it was made with other recordings.
        CheckpointError: it is damaged.
    """
    last = checkpoint.latest_state(run.out / run_dir.CHECKPOINTS)
    if last is None:
        return 0, {}
    tensors, meta = checkpoint.load_state(last)
    if meta.get("catalogue") != run.catalogue.digest:
        raise CatalogueError(
            f"{last} was made with another list of recordings ({run.out / run_dir.CATALOGUE})",
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
    (first, optimiser_state) = begun
    plan = replace(run.plan, save_in_background=run.records.save_in_background)
    folder_ = run.out if world.main else None
    records = Records(folder_, plan.total, first, tensorboard=run.records.tensorboard, log=run.log)
    with contextlib.closing(data), records:
        if world.device.type == "cpu":
            log.debug(bf16.keep_freed_memory())
        records.event(first, f"resumed from step {first}" if going_on else "started")

        def save(step: int, tensors: Tensors) -> Callable[[], None] | None:
            if not (world.main or run.settings.parallel == "fsdp"):
                return None
            meta = {
                "step": step,
                "catalogue": run.catalogue.digest,
                "frames": run.frames,
                "world": world.size,
            }
            model = run.model(step)  # a copy: what is written is that of this step, whatever the steps go on to
            if not world.main:  # its part in gathering the shards is done
                return None

            def write() -> None:
                # The model first: a run that dies between the two repeats the steps, and writes the model again.
                model.save(run.out / run_dir.MODEL, overwrite=True)
                checkpoint.save_state(run.out / run_dir.CHECKPOINTS, step, tensors, meta, run.records.keep)

            return write

        try:
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
        except (AsitError, OSError) as error:
            ended = _ended(error, run.out)
            # For log.txt alone: the caller shows the error. A full disk takes no more lines.
            with contextlib.suppress(OSError):
                log.debug(f"ended by an error: {ended.found if isinstance(ended, AsitError) else ended}")
            if ended is error:
                raise
            raise ended from error
        if outcome.stopped_by:
            records.event(outcome.step, f"stopped by {outcome.stopped_by} at step {outcome.step} of {plan.total}")
        elif outcome.finished:
            records.event(outcome.step, f"finished: {outcome.step} steps in {duration(outcome.seconds)}")
        else:
            records.event(outcome.step, f"stopped after step {outcome.step} of {plan.total}, as requested")
        after(records, outcome)
    return outcome
