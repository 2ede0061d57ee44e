"""Claiming a run's folder for all processes: the same settings and code in each, lock, start or resume, CPU threads."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import asit
from asit import logs
from asit.config import RunSettings, Settings, yaml
from asit.config.presets import Resume
from asit.errors import ConfigError, TrainingError
from asit.io import lock
from asit.runtime import World
from asit.training import run_dir

log = logging.getLogger(__name__)

S = TypeVar("S", bound=RunSettings)

MAY_DIFFER = ("data", "workers", "threads", "views.keep_gb", "input.keep_gb")
"""Settings that may differ between machines: location of the recordings, processes, threads, memory."""
_SHOWN = 8


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
    agree(world, of_code() | given | of_settings(settings) if world.size > 1 else {})
    restarted = _restarted(out, world)

    def claim() -> bool:
        if restarted:
            return run_dir.claim(out, resume=True, overwrite=False)
        if resume == "auto" and not overwrite:
            return run_dir.claim(out, resume=(out / run_dir.CONFIG).exists(), overwrite=False)
        return run_dir.claim(out, resume=bool(resume), overwrite=overwrite)

    agree(world, {f"a run in {out}": together(world, claim)})
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


def agree(world: World, facts: Mapping[str, Any]) -> None:
    """Compare the facts of all processes, in one exchange; do nothing where there is one process.

    Args:
        world: the processes; each must call this.
        facts: name -> value, of plain comparable values.

    Raises:
        TrainingError: in every process, with the ranks and the values that differ.
    """
    if world.size == 1:
        return
    everyone = world.gather((socket.gethostname(), dict(facts)))
    hosts = [host for host, _ in everyone]
    found = []
    for name in dict.fromkeys(name for _, held in everyone for name in held):
        ranks: dict[str, list[int]] = defaultdict(list)
        for rank, (_, held) in enumerate(everyone):
            ranks[repr(held[name]) if name in held else "not there"].append(rank)
        if len(ranks) > 1:
            found.append(f"{name}: " + "; ".join(f"{value} on {_name(which, hosts)}" for value, which in ranks.items()))
    if found:
        more = f"\n    and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise TrainingError(
            f"the {world.size} processes of this run disagree about {len(found)} thing{'s' if len(found) > 1 else ''}:"
            "\n    " + "\n    ".join(found[:_SHOWN]) + more,
            "the same settings, data, code and versions everywhere; nothing was written",
            "start all of them by the same command, with the same installation of asit and the same --out, on storage "
            "that all machines see",
        )


def of_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings by dotted name, without those that may differ between machines."""
    flat = yaml.flat(settings.model_dump(mode="json"))
    return {name: value for name, value in flat if name not in MAY_DIFFER}


@functools.cache
def of_code() -> dict[str, str]:
    """Return the versions that a step's numbers depend on, and the SHA-256 of asit's source."""
    root = Path(asit.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return {
        "version of torch": torch.__version__,
        "version of numpy": np.__version__,
        "version of asit": asit.__version__,
        "source of asit (SHA-256)": digest.hexdigest()[:16],
    }


def _name(ranks: list[int], hosts: list[str]) -> str:
    where = dict.fromkeys(hosts[rank] for rank in ranks)
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    on = ", ".join(list(where)[:3]) + (", ..." if len(where) > 3 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown} ({on})"
