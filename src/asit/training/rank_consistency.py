"""Checks that all processes of a run have the same settings, code, data and checkpoint, before anything is written."""

from __future__ import annotations

import functools
import hashlib
import socket
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import asit
from asit.config import Settings, yaml
from asit.errors import TrainingError
from asit.runtime import World

MAY_DIFFER = ("data", "workers", "threads", "views.keep_gb", "input.keep_gb")
"""Settings that may differ between machines: location of the recordings, processes, threads, memory."""
_SHOWN = 8


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
