"""The processes of a run, their device and their precision; every choice has a reason."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asit.errors import ConfigError, TrainingError


@dataclass
class World:
    """The processes that train together; one process is a world of size 1."""

    rank: int
    size: int
    device: torch.device
    reason: str
    control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> None:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; every process must call this."""
        return self.ask([flag])()[0]

    def ask(self, flags: Sequence[bool]) -> Callable[[], list[bool]]:
        """Start to find out whether each flag is set in any process; every process must call this.

        Returns:
            A function that waits for the answers. Until it was called, no other collective call may be made.
        """
        if self.size == 1:
            return lambda: list(flags)
        x = torch.tensor([int(flag) for flag in flags])
        work = dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> list[bool]:
            work.wait()
            return [bool(value) for value in x.tolist()]

        return answer

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.control)
        return out


@contextlib.contextmanager
def world(device: str = "auto", threads: int = 0, timeout: float = 30.0) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Args:
        device: auto, cpu, cuda or mps.
        threads: CPU threads of this process; 0: torch's choice.
        timeout: minutes that a process waits for the others.

    Raises:
        ConfigError: the device is not there.
        TrainingError: another process did not join.
    """
    if threads:
        torch.set_num_threads(threads)
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen, reason = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        yield World(0, 1, chosen, reason)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    how: dict[str, Any] = {"timeout": timedelta(minutes=timeout)}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _fresh_store(rank, size, timeout)
        _same_devices(store, rank, size, chosen)
        how |= {"store": store, "rank": rank, "world_size": size}
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", **how)
    try:
        # Flags and messages go over the CPU, so that they never wait for the accelerator's queue. The timeout is long,
        # since the other processes wait while the first one checks millions of recordings.
        control = dist.new_group(backend="gloo", timeout=timedelta(days=1, minutes=timeout))
        yield World(rank, size, chosen, f"{reason}; {size} processes", control)
    finally:
        dist.destroy_process_group()


def _fresh_store(rank: int, size: int, timeout: float) -> Any:
    """Return a part of the store of torchrun's agent that no earlier start of these processes has used."""
    # The agent keeps one store over all restarts, and torch (2.13) stores the addresses of every start under the same
    # names, so that a restarted process may read the address of one that was killed, and try it for ever. Here rank 0
    # draws a name; the other ranks request it under fresh names of their own, and confirm that they have it.
    within = timedelta(minutes=timeout)
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, within)  # type: ignore[attr-defined]
    end, mine = time.monotonic() + within.total_seconds(), uuid.uuid4().hex
    others, answered = set(range(1, size)) if rank == 0 else {0}, set[str]()
    if rank:
        store.set(f"asit/asks/{rank}", mine)
    while others:
        if rank == 0:
            for other in others:
                # Requests left by an earlier start are answered too, and nobody reads the answers.
                if store.check([f"asit/asks/{other}"]):
                    asked = store.get(f"asit/asks/{other}").decode()
                    if asked not in answered:
                        store.set(f"asit/answer/{asked}", mine)
                        answered.add(asked)
            others = {other for other in others if not store.check([f"asit/{mine}/{other}"])}
        elif store.check([f"asit/answer/{mine}"]):
            mine, others = store.get(f"asit/answer/{mine}").decode(), set()
            store.set(f"asit/{mine}/{rank}", "here")
        if others and time.monotonic() > end:
            named = ", ".join(map(str, sorted(others)[:8]))
            raise TrainingError(
                f"rank {rank}: no sign of rank {named} within {timeout:g} minutes (process_timeout)",
                f"all {size} processes to start",
                "see why the others do not start: their messages, and whether the machines reach each other",
            )
        time.sleep(0.02 if others else 0.0)
    return dist.PrefixStore(f"asit/{mine}", store)  # type: ignore[attr-defined]


def _same_devices(store: Any, rank: int, size: int, device: torch.device) -> None:
    """Raise a TrainingError in every process if they have different kinds of devices, before they wait in vain."""
    store.set(f"device/{rank}", f"{device.type} on {platform.node()}")
    devices = [store.get(f"device/{other}").decode() for other in range(size)]
    if len({one.split()[0] for one in devices}) > 1:
        ranks: dict[str, list[int]] = {}
        for other, one in enumerate(devices):
            ranks.setdefault(one, []).append(other)
        raise TrainingError(
            f"the {size} processes of this run have different devices: "
            + "; ".join(f"{one} (rank {', '.join(map(str, which[:8]))})" for one, which in list(ranks.items())[:8]),
            "the same kind everywhere",
            "see there why torch finds no accelerator (asit doctor), or pass --device cpu",
        )


def existing_device(wanted: str | torch.device) -> torch.device:
    """Return a device that torch sees here.

    Args:
        wanted: cpu, cuda, cuda:1, mps, or any other kind that torch knows.

    Raises:
        ConfigError: torch knows no such kind, or sees none of it.
    """
    there = _seen()
    try:
        device = torch.device(wanted)
        missing = not there.get(device.type, True)
        if device.type == "cuda" and not missing:
            missing = (device.index or 0) >= torch.cuda.device_count()
    except RuntimeError:
        missing = True
    if missing:
        raise ConfigError(
            f"device {str(wanted)!r}, and this torch ({torch.__version__}) sees none",
            "one of " + ", ".join(name for name, seen in there.items() if seen),
            "use one of these, or install the torch build for the device",
        )
    return device


def _seen() -> dict[str, bool]:
    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}


def _device(wanted: str, local_rank: int) -> tuple[torch.device, str]:
    if wanted != "auto":
        name, reason = existing_device(wanted).type, "as requested"
    else:
        name = next(name for name, seen in _seen().items() if seen)
        reason = f"torch sees {name}" if name != "cpu" else "torch sees no accelerator"
    if name == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"process {local_rank + 1} of this machine, and torch sees {count} GPU{'s' * (count != 1)} here",
                "a GPU for each process",
                f"start {count} on each machine (--nproc-per-node {count}), or pass --device cpu",
            )
        return torch.device("cuda", local_rank), f"{reason}: {torch.cuda.get_device_name(local_rank)}"
    return torch.device(name), reason


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the networks; weights, optimiser and losses stay float32."""

    name: str
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which the networks run."""
        return autocast(self.name, device)


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which a network runs in "float32" or "bf16", whatever the surrounding context is."""
    if precision == "float32" and not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32")


def precision(wanted: str, here: World) -> Precision:
    """Resolve "auto": bf16 where an accelerator has it, or where a matrix product measured on this CPU is faster in it.

    All processes get the main process's answer, since measurements differ.
    """
    chosen: Precision = here.gather(_precision(wanted, here.device) if here.main else None)[0]
    return chosen


def _precision(wanted: str, device: torch.device) -> Precision:
    if wanted != "auto":
        return Precision(wanted, "as requested")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU has bf16 units")
        return Precision("float32", "this GPU has no bf16 units")
    if device.type != "cpu":
        return Precision("float32", f"bf16 is not tried on {device.type}")
    ratio = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    reason = f"bf16 is {ratio:.1f} times as fast as float32 on this CPU (measured)"
    return Precision("bf16" if ratio > 1.3 else "float32", reason)


@functools.cache
def best_precision(device: str) -> Precision:
    """Resolve the precision "auto" of inference on a kind of device; measured once in a process.

    Args:
        device: cpu, cuda or mps.
    """
    return _precision("auto", torch.device(device))


def _product_seconds(dtype: torch.dtype, size: int = 1024, repeats: int = 5) -> float:
    a = torch.ones(size, size, dtype=dtype, device="cpu")
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best


def environment() -> dict[str, Any]:
    """Return versions and machine, for environment.json of a run."""
    packages = ("asit-audio", "torch", "numpy", "soundfile", "soxr", "safetensors", "pydantic", "scipy")
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": " ".join(sys.argv),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
    }
