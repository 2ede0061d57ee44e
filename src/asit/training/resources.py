"""Resources of the machine: batch sizes that fit the processes, loader workers, recordings kept in memory."""

from __future__ import annotations

import logging
import os
from typing import Literal

from asit.data.catalogue.catalogue import Catalogue
from asit.errors import CatalogueError, ConfigError
from asit.io.child_process import usable_cpus
from asit.runtime import World

log = logging.getLogger(__name__)


def fit_batch(batch_size: int, accumulate: int, count: int, world: World) -> int:
    """Return the batch size, reduced where the `count` clips of an epoch are fewer.

    Raises:
        ConfigError: processes and accumulation steps do not divide it.
        CatalogueError: too few clips for them.
    """
    unit = world.size * accumulate
    if batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        raise ConfigError(
            f"batch_size is {batch_size}, with {world.size} processes and accumulate {accumulate}",
            f"a multiple of {unit}",
            f"use {above}" if below == 0 else f"use {below} or {above}",
        )
    if batch_size <= count:
        return batch_size
    shrunk = count // unit * unit
    if shrunk == 0:
        raise CatalogueError(
            f"{count} clips for {world.size} processes that accumulate {accumulate} batches each",
            f"at least {unit} clips",
            "add recordings, or use fewer processes or accumulation steps",
        )
    if world.main:
        log.warning(f"batch_size {batch_size} is larger than the {count} clips of an epoch: using {shrunk}")
    return shrunk


def loader_workers(wanted: int | Literal["auto"], world: World) -> int:
    """Loader processes of each training process, logged with the reason.

    On a CPU one loader is enough: a core reads and cuts two hundred clips of 10 s a second, and the step of the base
    encoder takes one or two (`docs/speed.md`); it sleeps while the step runs and wakes when a batch was taken.
    """
    if wanted != "auto":
        log.debug(f"Using {wanted} loader workers: as requested")
        return wanted
    cores = usable_cpus()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.device.type == "cpu":
        workers, why = 1, "one reads ahead on a CPU, the other cores run the networks"
    else:
        workers, why = max(1, min(8, cores // here - 1)), f"{cores} cores for {here} processes"
    log.debug(f"Using {workers} loader workers: {why}")
    return workers


def memory_limit(wanted: float | Literal["auto"]) -> float:
    """GB of decoded recordings that a loader process may keep; auto: a twentieth of the machine's memory."""
    if wanted != "auto":
        return wanted
    return round(machine_memory() / 20 / 1e9, 3)


def machine_memory() -> int:
    """Return the bytes of the machine's memory; 0 where they are unknown."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0


def fits_in_memory(catalogue: Catalogue, rate: int, limit: float, name: str) -> bool:
    """Whether decoded recordings are kept: the same answer for any number of processes and workers."""
    needed = catalogue.header["seconds"] * rate * 4 / 1e9
    if needed > limit:
        return False
    log.debug(f"Each loader keeps decoded recordings in memory: {needed:.2f} GB; {name} is {limit:g}")
    return True
