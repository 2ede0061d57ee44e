"""What a checkpoint costs a run: seconds that the steps are held, written in turn with them and beside them.

    python bench/checkpoint.py [--toy] [--threads 1] [--every 4] [--seconds 1.5]

The loop is the real one (`asit.training.loop.Loop`) over the real state of pretraining, base encoder with the heads of
preset official-v2; a step is a stand-in that keeps the cores busy for `--seconds` and gives every parameter a
gradient. Each way runs in a process of its own, three checkpoints of student, teacher, centres and optimiser, and the
model beside them.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import Helper, asked, memory

CHECKPOINTS = 3


def work(pipe: Connection, toy: bool, threads: int, every: int, seconds: float, background: bool) -> None:
    import torch

    from asit import runtime
    from asit.config import PretrainSettings, presets
    from asit.io import checkpoint
    from asit.model.audio_model import AudioModel
    from asit.pretrain import method
    from asit.training import loop, trainable
    from asit.training.metrics_log import Records

    torch.set_num_threads(threads)
    small: dict[str, Any] = {}
    if toy:
        heads = {"hidden": 64, "class_prototypes": 256, "patch_prototypes": 256}
        small = {"encoder": {"size": "tiny"}, "heads": heads}
    given = {"batch_size": 4, "front_end": {"mean": -4.27, "std": 4.57}, "views": {"local_views": 0}, **small}
    settings = presets.build(PretrainSettings, "official-v2", None, given)
    world = runtime.World(0, 1, torch.device("cpu"), "")
    task: Any = method.ASiT(settings, 592, torch.Generator().manual_seed(0), world.device)
    taken: list[float] = []
    held: list[float] = []
    busy = torch.ones(512, 512)

    def step(*_: Any) -> trainable.StepOutput:
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            busy @ busy
        return trainable.StepOutput(sum(p.square().mean() for p in task.student.parameters() if p.requires_grad))

    def after(*_: Any) -> None:
        taken.append(time.perf_counter())

    task.step, task.after_update = step, after
    paused = loop.Clock.paused

    def note(clock: Any, spent: float) -> None:
        held.append(spent)
        paused(clock, spent)

    loop.Clock.paused = note  # type: ignore[method-assign]

    class Nothing:
        ids = ("clip",)
        failures = ()

        def to(self, device: torch.device) -> Nothing:
            return self

    def batches() -> Iterator[Any]:
        while True:
            yield Nothing()

    asked(pipe)
    with tempfile.TemporaryDirectory() as folder, Records(None, 1, 0) as records:
        root, written = Path(folder), list[float]()

        def save(at: int, tensors: dict[str, torch.Tensor]) -> Any:
            model = AudioModel.from_parts(task.encoder(), settings.front_end, settings.encoder, 592)

            def write() -> None:
                began = time.perf_counter()
                model.save(root / "model", overwrite=True)
                checkpoint.save_state(root / "checkpoints", at, tensors, {"step": at}, 1)
                written.append(time.perf_counter() - began)

            return write

        total = CHECKPOINTS * every
        plan = loop.Plan(total, total, 4, 1, (0.9, 0.999), 3.0, True, total + 1, every, save_in_background=background)
        loop.Loop(
            task=task,
            batches=batches(),
            plan=plan,
            world=world,
            precision=runtime.Precision("float32", ""),
            records=records,
            save=save,
        ).run()
        size = sum(f.stat().st_size for f in (root / "checkpoints").rglob("*.safetensors"))
    between = [b - a for a, b in itertools.pairwise(taken)]
    at = [i for i in range(len(between)) if (i + 1) % every]  # not those with a checkpoint within
    after_one = [between[i] for i in at if i % every == 0 and i]
    others = [between[i] for i in at if i % every]
    waits = [spent for spent in held if spent > 1e-3] or [0.0]
    pipe.send(
        {
            "first": waits[0],
            "held": statistics.median(waits[1:] or waits),
            "written": statistics.median(written),
            "step": statistics.median(others or between),
            "step after": statistics.median(after_one or between),
            "size": size / 1e9,
            "memory": memory(),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny encoder and short steps: whether it runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the steps")
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a step")
    options = parser.parse_args()
    if options.toy:
        options.every, options.seconds = 3, 0.01
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print("\n| checkpoint | held, first | held, later | written in | a step | the step after it | size | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for name, background in (("in turn", False), ("beside the steps", True)):
        helper = Helper(work, options.toy, options.threads, options.every, options.seconds, background)
        r = helper.ask()
        helper.end()
        print(
            f"| {name} | {r['first']:.2f} s | {r['held']:.2f} s | {r['written']:.2f} s | {r['step']:.2f} s "
            f"| {r['step after']:.2f} s | {r['size']:.2f} GB | {r['memory']:.2f} GB |"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
