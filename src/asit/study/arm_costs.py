"""What a step of each arm costs, by short runs of all arms in turn."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from asit.config import PretrainSettings, yaml
from asit.errors import TrainingError
from asit.runtime import world

log = logging.getLogger(__name__)


def seconds_per_step(
    arms: Mapping[str, PretrainSettings], data: str, *, steps: tuple[int, int] = (10, 40), rounds: int = 2
) -> dict[str, float]:
    """Measure the seconds of a step of each arm: what a run takes beyond a shorter one, the median over rounds.

    Each run is a process of its own, and arms take turns: steps that were taken in one process, arm after arm, differed
    from those of runs by up to a third. Seconds are of CPU time, loading included, where the arms train on a CPU, so
    that a busy machine does not matter; on another device they are of the clock.

    Arms that differ in their epochs alone are measured once.

    Args:
        arms: name -> settings.
        data: catalogue to train on.
        steps: of the two runs.
        rounds: of all arms.

    Raises:
        TrainingError: a run failed.
    """
    few, more = steps
    alike: dict[str, list[str]] = {}
    for arm, settings in arms.items():
        kind = settings.model_dump(mode="json", exclude={"epochs"})
        alike.setdefault(json.dumps(kind, sort_keys=True), []).append(arm)
    first = {names[0]: arms[names[0]] for names in alike.values()}
    found: dict[str, list[float]] = {arm: [] for arm in first}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for arm, settings in first.items():
                log.info(f"measuring {arm}, round {i + 1} of {rounds}")
                spent = [_short_run(arm, settings, data, Path(folder), count) for count in (few, more)]
                found[arm].append((spent[1] - spent[0]) / (more - few))
    # On a busy machine a few cheap steps may measure as nothing.
    return {arm: max(1e-4, statistics.median(found[names[0]])) for names in alike.values() for arm in names}


@contextlib.contextmanager
def clock(device: str) -> Iterator[Callable[[], float]]:
    """Give a function that returns the seconds since the block began: CPU time on a CPU, children's included."""
    with world(device) as here:
        spent = _cpu_seconds if here.device.type == "cpu" else time.monotonic
    began = spent()
    yield lambda: spent() - began


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of this process and its ended children, in user and system mode


def _short_run(arm: str, settings: PretrainSettings, data: str, folder: Path, steps: int) -> float:
    out, file = folder / "run", folder / "config.yaml"
    # So many epochs hold the steps even where each has one; the schedules are those of a run's beginning.
    short = {"data": data, "out": str(out), "epochs": max(40, steps), "stop_after": steps}
    quiet = {"records": {"figure_every": 0, "checkpoint_every": 2**31 - 1, "tensorboard": False}}
    file.write_text(yaml.to_yaml(settings.changed({**short, **quiet, "optim": {"warmup": "auto"}})), "utf-8")
    command = [sys.executable, "-m", "asit", "pretrain", "--config", str(file), "--out", str(out), "--overwrite"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with clock(settings.device) as seconds:
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise TrainingError(
            f"the arm {arm} failed while its steps were measured:\n{ended.stderr[-2000:].strip()}",
            "a run that takes its first steps",
            "change its settings, leave it out with --arms, or give --epochs in place of --minutes",
        )
    return seconds()
