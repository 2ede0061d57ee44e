"""What several processes cost: clips a second of two and four gloo processes to those of one with as many threads.

    python bench/processes.py [--toy] [--rounds 5] [--encoder small] [--batch 16] [--seconds 10]

The step is the real one, `asit.training.loop.Loop` over the pretraining method with `asit.runtime.world`, on batches
that are there already: the same clips a step whatever the processes. 1 x 2 threads stands beside 2 x 1, and 1 x 4
beside 4 x 1, which on fewer than four cores is more threads than cores. Groups of processes stay up and take turns, a
group that waits uses no core; ratios are of the same round, medians over rounds. By the clock, and by CPU time of all
processes of a group, which a busy machine stretches less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import asked

PAIRS = ((2, 2), (4, 4))
"""(processes, threads of the one process beside them)."""
TINY = {"size": "custom", "width": 64, "depth": 2, "heads": 2}
HEADS = {"hidden": 64, "bottleneck": 32, "class_prototypes": 64, "patch_prototypes": 64}


def settings_of(options: dict[str, Any], threads: int) -> Any:
    from asit.config import PretrainSettings

    toy = options["toy"]
    return PretrainSettings.model_validate(
        {
            "batch_size": options["batch"],
            "device": "cpu",
            "threads": threads,
            "workers": 0,
            "precision": "float32" if toy else options["precision"],
            "encoder": TINY if toy else {"size": options["encoder"]},
            **({"heads": HEADS} if toy else {}),
            "front_end": {"mean": -8.0, "std": 4.0},
            "views": {"keep_gb": 0},
        }
    )


def process(pipe: Connection | None, options: dict[str, Any], threads: int, env: dict[str, str]) -> None:
    """One process of a group; the first of them is asked by `pipe`, the others follow it."""
    os.environ.update(env)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from asit import runtime
    from asit.data.loading.sampler import permutation
    from asit.model.cpu import bf16
    from asit.pretrain.pretrain_setup import prepare
    from asit.tools.run_estimate import noise
    from asit.training import loop
    from asit.training.metrics_log import Records

    bf16.keep_freed_memory()
    settings = settings_of(options, threads)
    with runtime.world("cpu", threads) as world, tempfile.TemporaryDirectory() as scratch:
        listed = noise(Path(scratch), settings.front_end.rate, options["seconds"], 64)
        setup = prepare(settings, listed, world)
        micro = options["batch"] // world.size
        picked = permutation(0, 0, len(setup.clips))[world.rank * micro :][:micro]
        batch = setup.batch_of([setup.clips[0, int(i)] for i in picked])

        def batches() -> Iterator[Any]:
            yield batch
            yield batch
            if pipe is None:
                while True:
                    yield batch
            while asked(pipe):
                began = time.perf_counter()
                for _ in range(options["steps"]):
                    yield batch
                pipe.send((time.perf_counter() - began) / options["steps"])

        many = 1 << 30
        plan = loop.Plan(
            many, 1000, options["batch"], 1, (0.9, 0.999), 3.0, True, log_every=many, checkpoint_every=many
        )
        records = Records(None, many, 0)
        try:
            what = {"plan": plan, "world": world, "precision": setup.precision, "records": records}
            loop.Loop(task=setup.task, batches=batches(), step=5000, **what).run()
        except (StopIteration, RuntimeError):
            return


class Group:
    """Processes that train together."""

    def __init__(self, options: dict[str, Any], size: int, threads: int) -> None:
        self.steps = options["steps"]
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        self.pipe, theirs = context.Pipe()
        self.members = []
        for rank in range(size):
            env = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (theirs if rank == 0 else None, options, threads, env)
            self.members.append(context.Process(target=process, args=given, daemon=True))
            self.members[-1].start()
        theirs.close()

    def cpu(self) -> float:
        """CPU seconds so far, of all of them (Linux)."""
        ticks = 0
        for member in self.members:
            fields = Path(f"/proc/{member.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def ask(self) -> dict[str, float]:
        before = self.cpu()
        self.pipe.send("go")
        seconds: float = self.pipe.recv()
        return {"seconds": seconds, "cpu": (self.cpu() - before) / self.steps}

    def end(self) -> None:
        for member in self.members:
            member.kill()
            member.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny encoder, two processes: whether it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--encoder", default="small", help="size of the encoder")
    parser.add_argument("--batch", type=int, default=16, help="clips a step, over all processes")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clips")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--pairs", type=int, nargs="*", default=[2, 4], help="numbers of processes")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    if given.toy:
        given.batch, given.seconds, given.rounds, given.pairs = 4, 1.0, 2, [2]
    options = {k: getattr(given, k) for k in ("toy", "steps", "encoder", "batch", "seconds", "precision")}
    cores = os.cpu_count() or 1
    print(
        f"{cores} cores, load {os.getloadavg()[0]:.1f}; {given.encoder}, {given.batch} clips of {given.seconds:g} s\n"
    )
    print("| processes x threads | s a step | clips/s | CPU s a step | efficiency by the clock | by CPU time | load |")
    print("|---|---|---|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for size in given.pairs:
        one, several = Group(options, 1, size), Group(options, size, 1)
        try:
            rounds = [(one.ask(), several.ask()) for _ in range(given.rounds + 1)][1:]
        finally:
            one.end()
            several.end()
        note = "" if size <= cores else f", {size} threads on {cores} cores"
        for place, name in ((0, f"1 x {size}{note}"), (1, f"{size} x 1{note}")):
            row = {key: statistics.median(r[place][key] for r in rounds) for key in ("seconds", "cpu")}
            for key in ("seconds", "cpu"):
                row[f"efficiency, {key}"] = statistics.median(r[0][key] / r[place][key] for r in rounds)
            found[name] = row
            print(
                f"| {name} | {row['seconds']:.2f} | {given.batch / row['seconds']:.2f} | {row['cpu']:.2f} | "
                f"{row['efficiency, seconds']:.2f} | {row['efficiency, cpu']:.2f} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
