"""What several measurements share: processes that take turns, times of a step's parts, the rate of matrix products.

    python bench/measure.py [--toy] [--threads 2] [--rounds 7]

By itself it prints the rates of bf16 matrix products that the other tables' shares are of.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
ALLOCATORS: dict[str, dict[str, str]] = {
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept": KEPT,
    "kept, huge": KEPT | {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
"""Environments of other allocator settings: huge pages, and freed memory that is not given back to the system."""


class Helper:
    """A process that does one piece of work each time it is asked; `parent`: it may start processes of its own."""

    def __init__(
        self, work: Callable[..., None], *args: Any, env: dict[str, str] | None = None, parent: bool = False
    ) -> None:
        before = dict(os.environ)
        os.environ.update(env or {})  # glibc and torch read their settings when the process starts
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *args), daemon=not parent)
        self.process.start()
        theirs.close()
        os.environ.clear()
        os.environ.update(before)

    def ask(self) -> dict[str, float]:
        self.pipe.send("go")
        answer: dict[str, float] = self.pipe.recv()
        return answer

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()


def asked(pipe: Connection) -> bool:
    """Wait for the next request; whether there is one."""
    try:
        return bool(pipe.recv() == "go")
    except EOFError:
        return False


def memory() -> float:
    """Most memory this process ever held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def used() -> dict[str, float]:
    """CPU seconds of this process, those among them in the system, and pages that had to be fetched."""
    u = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu": u.ru_utime + u.ru_stime, "system": u.ru_stime, "faults": float(u.ru_minflt)}


class Watched:
    """A method of learning, with the times at which the loop comes by.

    Args:
        task: the method, a `Trainable`.
        forward: name of the part that ends with the method's step.
        update: name of the part that ends with what follows the optimiser.
    """

    def __init__(self, task: Any, forward: str, update: str) -> None:
        self.task, self.forward, self.update = task, forward, update
        self.at = dict[str, tuple[float, float]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def mark(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.at[name] = time.perf_counter(), time.process_time()

        return hook

    def step(self, *args: Any) -> Any:
        out = self.task.step(*args)
        self.mark(self.forward)()
        return out

    def gradients_ready(self, now: Any) -> None:
        self.mark("backward")()
        self.task.gradients_ready(now)

    def after_update(self, *args: Any) -> None:
        self.task.after_update(*args)
        self.mark(self.update)()

    def spent(self, parts: Sequence[str]) -> dict[str, float]:
        """Seconds of each part, and under "PART, CPU" those of the processor; "start" is marked by the caller."""
        out = {}
        for before, name in itertools.pairwise(("start", *parts)):
            out[name], out[f"{name}, CPU"] = (b - a for a, b in zip(self.at[before], self.at[name], strict=True))
        return out


def products(pipe: Connection, threads: int, tokens: int, toy: bool, kind: str = "bfloat16") -> None:
    """Rates of products of a few shapes, in FLOP/s by the clock and, under "NAME, CPU", by CPU time."""
    import torch

    torch.set_num_threads(threads)
    shapes = [(4096, 4096, 4096), (2048, 2048, 2048), (tokens, 768, 3072), (tokens, 3072, 768), (tokens, 768, 768)]
    pairs = {}
    for m, k, n in [(256, 256, 256)] if toy else shapes:
        a, b = (torch.randn(shape).to(getattr(torch, kind)) for shape in ((m, k), (k, n)))
        pairs[f"{m} x {k} x {n}"] = (a, b, 2 * m * k * n)
        a @ b
    while asked(pipe):
        rates = {}
        for name, (a, b, flops) in pairs.items():
            # The best of a few, a fifth of a second together: what disturbs only ever slows.
            clock, cpu, until = [], [], time.perf_counter() + 0.2
            while not clock or time.perf_counter() < until:
                start, began = time.perf_counter(), time.process_time()
                a @ b
                clock.append(time.perf_counter() - start)
                cpu.append(time.process_time() - began)
            rates[name], rates[f"{name}, CPU"] = flops / min(clock), flops * threads / statistics.median(cpu)
        pipe.send(rates)


def ceilings(rates: Sequence[dict[str, float]]) -> tuple[str, str]:
    """Print the table of rates over rounds; the fastest product's name by the clock, and its key by CPU time."""
    typical = {name: statistics.median(r[name] for r in rates) for name in rates[0]}
    shapes = [name for name in typical if not name.endswith(", CPU")]
    ceiling = max(shapes, key=lambda name: typical[name])
    of_cpu = max(shapes, key=lambda name: typical[f"{name}, CPU"]) + ", CPU"
    print("\n| matrix product | TFLOP/s | by CPU time |\n|---|---|---|")
    for name in shapes:
        told_as = f"{name} (the ceiling)" if name == ceiling else name
        print(f"| {told_as} | {typical[name] / 1e12:.2f} | {typical[f'{name}, CPU'] / 1e12:.2f} |")
    return ceiling, of_cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny product: whether it runs")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    helper = Helper(products, options.threads, 8 * 505, options.toy)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    ceilings([helper.ask() for _ in range(2 if options.toy else options.rounds)])
    helper.end()


if __name__ == "__main__":
    main()
