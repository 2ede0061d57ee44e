"""Claiming a run's folder for all processes of a run: lock, start or resume, CPU threads."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TypeVar

import torch

from asit import logs
from asit.config import RunSettings
from asit.config.presets import Resume
from asit.errors import ConfigError
from asit.io import lock
from asit.runtime import World
from asit.training import rank_consistency, run_dir

log = logging.getLogger(__name__)

S = TypeVar("S", bound=RunSettings)


def together(world: World, call: Callable[[], Any], mine: bool = True) -> Any:
    """Call in this process, if it is `mine` to do, and raise in all processes if one fails, so that none waits."""
    error: BaseException | None = None
    result = None
    if mine:
        try:
            result = call()
        except BaseException as caught:
            error = caught
    if world.any(error is not None):
        raise error or ConfigError("another process of this run failed", remedy="see its message")
    return result


@contextlib.contextmanager
def claimed(
    settings: S, out: Path, world: World, *, resume: Resume, overwrite: bool
) -> Iterator[tuple[S, S | None, MemoryHandler | None]]:
    """Claim the folder for all processes and keep other runs out of it until the end.

    Yields:
        The settings with each auto as it was resolved when the run started, the settings that it started with (None:
        it starts now), and the collector of log lines, None in all processes but the main one.
    """
    given = {"--resume": resume, "--overwrite": overwrite}
    rank_consistency.agree(
        world, rank_consistency.of_code() | given | rank_consistency.of_settings(settings) if world.size > 1 else {}
    )
    restarted = _restarted(out, world)

    def claim() -> bool:
        if restarted:
            return run_dir.claim(out, resume=True, overwrite=False)
        if resume == "auto" and not overwrite:
            return run_dir.claim(out, resume=(out / run_dir.CONFIG).exists(), overwrite=False)
        return run_dir.claim(out, resume=bool(resume), overwrite=overwrite)

    rank_consistency.agree(world, {f"a run in {out}": together(world, claim)})
    with contextlib.ExitStack() as stack:
        log_lines = stack.enter_context(logs.run_log()) if world.main else None
        together(world, lambda: stack.enter_context(lock.held(out)), world.main)
        together(world, lambda: run_dir.tidy(out), world.main)
        # Another run may have ended here since.
        resumed = together(world, claim)
        before: S | None = together(world, lambda: run_dir.read_settings(out, type(settings)) if resumed else None)
        if before is not None:
            _use_same_threads(settings.threads, run_dir.environment(out), world)
            settings = run_dir.settle(settings, before)
        yield settings, before, log_lines


def _use_same_threads(wanted: int, began: Mapping[str, Any], world: World) -> None:
    """Use as many CPU threads as the run began with, unless a number (not 0) is `wanted`: last bits depend on them."""
    now, then = torch.get_num_threads(), began.get("threads", 0)
    # With another number of processes the bits differ anyway.
    known = type(then) is int and 0 < then < 1 << 16 and began.get("processes") == world.size
    if world.device.type != "cpu" or not known or then == now:
        return
    if wanted:
        log.info(f"Using {now} CPU threads as requested; only the {then} that the run began with resume it bit for bit")
    else:
        torch.set_num_threads(then)
        log.info(
            f"Using {then} CPU threads, as when the run began, for bit-identical results (--threads {now} for more)"
        )


def _restarted(out: Path, world: World) -> bool:
    """Return whether torchrun's agent restarted these processes after they had started the run in the folder."""
    restarts = world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))
    if not max(restarts):  # a machine that joined later has not been restarted itself
        return False
    began = run_dir.environment(out).get("elastic") if (out / run_dir.CONFIG).exists() else None
    return bool(world.gather(began is not None and began == torchrun_id())[0])


def torchrun_id() -> str | None:
    """Return what identifies a call of torchrun: its id; where it was given none, its process."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()} {os.getppid()}" if name == "none" else name
