"""What a fine-tuning step costs, as a share of what this machine's matrix products can do.

    python bench/finetune.py [--toy] [--threads 2] [--rounds 7] [--batch 8] [--plain 2] [--only step sizes]
                              [--precision float32]

The step is the real one: `asit.training.loop.Loop` over `asit.finetune.supervised`, the base encoder and a head of 527
classes, settings of the recipe audioset-20k on 10 s clips. Beside it stand, each in a process of its own and taken
in turn, round by round: bf16 matrix products of several shapes; the step with freed memory given back to the system;
the step fed by the loader from 10 s FLAC files; and torch's own transformer layers in float32 and under bf16
autocast. Ratios are taken within a round. A share counts the products that are computed: branches that stochastic
depth drops are not. Then come clips a second of three sizes at three lengths, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import Helper, Watched, asked, ceilings, memory, products, used

CLASSES, MELS, PATCH = 527, 128, 16
PARTS = ("forward", "backward", "clip", "optimiser", "rest")
SIZES = {"tiny": 64, "small": 32, "base": 8}
"""Clips of 10 s in a step of the table of sizes; shorter ones are more by as much."""


def settings_of(size: str, batch: int, precision: str = "bf16") -> Any:
    from asit.config import FinetuneSettings, presets

    front_end = {"mean": -4.2677393, "std": 4.5689974}
    given = {"model": "none", "encoder": {"size": size}, "front_end": front_end, "batch_size": batch, "workers": 1}
    return presets.build(FinetuneSettings, "audioset-20k", None, {**given, "precision": precision})


def task_of(settings: Any, frames: int) -> Any:
    import torch

    from asit.config.finetune_settings import resolve
    from asit.finetune import supervised
    from asit.model.classifier import Classifier, Head
    from asit.model.vit import Encoder

    drop_path = settings.network.drop_path
    found = {"input": {"seconds": 10.0, "keep_gb": 0.0}, "encoder": {"drop_path": drop_path}}
    settings = resolve(settings, multi=True, found=found)
    encoder = Encoder(settings.encoder, frames, MELS)
    encoder.init_weights(torch.Generator().manual_seed(0))
    head = Head(encoder.width, CLASSES, settings.network.pooling)
    return supervised.Supervised(Classifier(encoder, head), settings, torch.device("cpu"))


def batch_of(settings: Any, frames: int, clips: int) -> Any:
    import numpy as np
    import torch

    from asit.finetune.finetune_dataset import FinetuneBatch
    from asit.model import vit

    rng = np.random.default_rng(0)
    rates = vit.drop_path_rates(settings.encoder)
    return FinetuneBatch(
        x=torch.from_numpy(rng.normal(0, 0.5, (clips, 1, frames, MELS)).astype(np.float32)),
        target=torch.from_numpy((rng.random((clips, CLASSES)) < 0.004).astype(np.float32)),
        factors=torch.from_numpy(np.stack([vit.draw_drop_path(rng, rates) for _ in range(clips)], axis=-1)),
        ids=[f"clip {i}" for i in range(clips)],
    )


def flops(settings: Any, frames: int, factors: Any) -> float:
    """FLOP of a step's products: 2 for each multiplication and addition, the backward pass twice the forward.

    `factors`: (depth, 2, B) of stochastic depth; what it drops is not counted.
    """
    from asit.model.vit import shape_of

    width, _, _ = shape_of(settings.encoder)
    patches = frames // PATCH * MELS // PATCH
    tokens = patches + 1
    kept = (factors > 0).sum(dim=(0, 2)).tolist()
    attention = 2 * tokens * (4 * width**2 + 2 * tokens * width)
    mlp = 2 * tokens * 8 * width**2
    clips = factors.shape[2]
    embed, head = 2 * patches * PATCH**2 * width, 2 * 2 * width * CLASSES
    return float(3 * (kept[0] * attention + kept[1] * mlp + clips * head) + 2 * clips * embed)


def frames_of(settings: Any, seconds: float) -> int:
    from asit.finetune import init_model

    return init_model.frames_of(settings, seconds)


def ours(
    pipe: Connection,
    size: str,
    seconds: float,
    clips: int,
    threads: int,
    precision: str = "bf16",
    keep: bool = True,
    files: str = "",
    profile: bool = False,
) -> None:
    """A step for each request; `files`: a folder of recordings that a loader reads from; else one ready-made batch."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from asit import runtime
    from asit.model.cpu import bf16
    from asit.training import loop
    from asit.training.metrics_log import Records

    if keep:
        bf16.keep_freed_memory()
    torch.set_num_threads(threads)
    settings = settings_of(size, clips, precision)
    frames = frames_of(settings, seconds)
    task = task_of(settings, frames)
    settings = task.settings
    watched = Watched(task, forward="forward", update="rest")
    register_optimizer_step_pre_hook(watched.mark("clip"))
    register_optimizer_step_post_hook(watched.mark("optimiser"))
    same = batch_of(settings, frames, clips)
    loaded = loader_of(settings, files, frames) if files else None

    def batches() -> Iterator[Any]:
        yield same  # the first steps set up the optimiser's state and the heap, and are not counted
        yield same
        while asked(pipe):
            with torch.profiler.profile() if profile else nullcontext() as profiler:
                before = used()
                began = time.perf_counter()
                batch = same if loaded is None else next(loaded)
                waited = time.perf_counter() - began
                watched.mark("start")()
                yield batch
                after = used()
            if profile:
                found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
                for event in found[:40]:
                    print(f"{event.self_cpu_time_total / 1e3:9.1f} ms {event.count:5d} {event.key}", flush=True)
            spent = {name: after[name] - before[name] for name in after}
            took = time.perf_counter() - began
            counted = {"flops": flops(settings, frames, batch.factors), **scored(task, batch)}
            pipe.send(
                {"seconds": took, "waited": waited, "memory": memory(), **spent, **watched.spent(PARTS), **counted}
            )

    plan = loop.Plan(
        1 << 30, 100, clips, 1, settings.optim.betas, settings.optim.clip, False,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    records = Records(None, 0, 0)
    world = runtime.World(0, 1, torch.device("cpu"), "the bench")
    try:
        what = {"plan": plan, "world": world, "precision": runtime.Precision(precision, ""), "records": records}
        loop.Loop(task=watched, batches=batches(), step=5000, **what).run()
    except (StopIteration, RuntimeError):
        return
    finally:
        if loaded is not None:
            loaded.close()


def scored(task: Any, batch: Any) -> dict[str, float]:
    """Seconds of a forward pass without gradients, as in scoring; and those of the processor."""
    import torch

    clock, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=task.settings.precision == "bf16"):
        task.network.eval()(batch.x)
    return {"scored": time.perf_counter() - clock, "scored, CPU": time.process_time() - cpu}


def loader_of(settings: Any, folder: str, frames: int) -> Any:
    """Batches of the recipe's augmentations, from the recordings of a folder, without an end."""

    import numpy as np

    from asit.data.catalogue.catalogue import Catalogue, Clip
    from asit.data.catalogue.labels import read_labels
    from asit.data.loading import loader, sampler
    from asit.finetune.finetune_dataset import FinetuneDataset, collate

    rng = np.random.default_rng(0)
    # Every class is the label of some clip: targets are as wide as AudioSet's.
    names = np.array([f"class {i}" for i in range(CLASSES)])
    paths = sorted(Path(folder).glob("*.flac"))
    parted = np.array_split(rng.permutation(names), len(paths))
    clips = [Clip(str(p), 10.0, 16000, 1, label=";".join(own)) for p, own in zip(paths, parted, strict=True)]
    catalogue = Catalogue.from_clips(clips, root=folder)
    labels = read_labels(catalogue, "multi")
    samples = FinetuneDataset(catalogue, np.arange(len(clips)), labels, settings, frames)
    size = settings.batch_size
    count = max(len(clips), size)
    keys = sampler.MicroBatchSampler(
        order=sampler.weighted(0, np.ones(len(clips)), count), count=count, batch=size, micro=size, positions=True
    )
    return loader.loader(samples, keys, collate, workers=1, pin=False)


def plain(pipe: Connection, width: int, depth: int, frames: int, clips: int, threads: int, low: bool) -> None:
    """torch's own transformer layers and AdamW, one parameter at a time; `low`: under bf16 autocast."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    count = frames // PATCH * MELS // PATCH

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, width, PATCH, PATCH)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.zeros(1, count + 1, width))
            layer = nn.TransformerEncoderLayer(
                width, width // 64, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions)
            return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], 1))

    network = Network()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-6, foreach=False)
    x, target = torch.randn(clips, 1, frames, MELS) * 0.5, (torch.rand(clips, CLASSES) < 0.004).float()
    while asked(pipe):
        start, before = time.perf_counter(), used()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = network(x)
        F.binary_cross_entropy_with_logits(logits.float(), target).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimiser.step()
        optimiser.zero_grad()
        spent = {name: value - before[name] for name, value in used().items()}
        pipe.send({"seconds": time.perf_counter() - start, "memory": memory(), **spent})


# The tables


Told = dict[str, list[dict[str, float]]]


def turns(product: Helper, steps: dict[str, Helper], rounds: int) -> tuple[Told, list[dict[str, float]]]:
    """What each process tells in each round, and the rates of products in it."""
    told: Told = {name: [] for name in steps}
    rates = []
    for _ in range(rounds):
        before = product.ask()
        for name, helper in steps.items():
            told[name].append(helper.ask())
        after = product.ask()
        rates.append({name: max(before[name], after[name]) for name in before})
    return told, rates


def row(name: str, told: Told, rates: list[dict[str, float]], keys: tuple[str, str], clips: int, threads: int) -> str:
    """One row of the table of steps; `keys`: of the product that is the ceiling, by the clock and by CPU time."""
    found, ours = told[name], told["ours"]
    typically = {key: statistics.median(f[key] for f in found) for key in found[0]}
    # Torch's own layers drop nothing, and are held against what we compute.
    counted = [f.get("flops", o["flops"]) for f, o in zip(found, ours, strict=True)]
    shares = sorted(n / f["seconds"] / r[keys[0]] for n, f, r in zip(counted, found, rates, strict=True))
    by_cpu = [n * threads / f["cpu"] / r[keys[1]] for n, f, r in zip(counted, found, rates, strict=True)]
    ratios = [
        statistics.median(f[key] / o[key] for f, o in zip(found, ours, strict=True)) for key in ("seconds", "cpu")
    ]
    cells = [
        f"{typically['seconds']:.2f}",
        f"{clips / typically['seconds']:.2f}",
        f"{statistics.median(shares):.2f}",
        f"{shares[0]:.2f}, {shares[-1]:.2f}",
        f"{typically['cpu']:.2f}",
        f"{typically['system']:.2f}",
        f"{typically['faults']:.0f}",
        f"{clips * threads / typically['cpu']:.2f}",
        f"{statistics.median(by_cpu):.2f}",
        f"{typically['memory']:.1f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def step_table(
    size: str, clips: int, threads: int, precision: str, rounds: int, slow: int, toy: bool, folder: str
) -> None:
    from asit.model.vit import shape_of

    settings = settings_of(size, clips)
    seconds = 1.0 if toy else 10.0
    frames = frames_of(settings, seconds)
    width, depth, _ = shape_of(settings.encoder)
    tokens = clips * (frames // PATCH * MELS // PATCH + 1)
    product = Helper(products, threads, tokens, toy, "bfloat16" if precision == "bf16" else precision)
    steps = {
        "ours": Helper(ours, size, seconds, clips, threads, precision),
        "ours, freed memory given back": Helper(ours, size, seconds, clips, threads, precision, False),
        "ours, from FLAC files": Helper(ours, size, seconds, clips, threads, precision, True, folder, parent=True),
    }
    told, rates = turns(product, steps, rounds)
    for name in list(steps)[1:]:
        steps[name].end()  # their memory is wanted for what comes
    keys = ceilings(rates)
    print(
        f"\n| step of {clips} clips of {seconds:g} s, {size} | s | clips/s | share of the ceiling | lowest, highest | "
        "CPU s | of these system | faults | clips/s of CPU time | share, by CPU time | memory, GB | s to ours | "
        "CPU s to ours |"
    )
    print("|---" * 13 + "|")
    for name in told:
        print(row(name, told, rates, keys, clips, threads), flush=True)
    for name in ("bf16 autocast", "float32") if slow else ():
        helper = Helper(plain, width, depth, frames, clips, threads, name == "bf16 autocast")
        called = f"torch's own layers, {name}"
        beside, then = turns(product, {"ours": steps["ours"], called: helper}, slow)
        helper.end()
        print(row(called, beside, then, keys, clips, threads), flush=True)
    print("\n| part, ms (CPU ms) | " + " | ".join(steps) + " |\n|---|" + "---|" * len(steps))
    for part in PARTS:
        both = [[statistics.median(f[key] for f in told[n]) * 1e3 for key in (part, f"{part}, CPU")] for n in steps]
        print(f"| {part} | " + " | ".join(f"{clock:.0f} ({cpu:.0f})" for clock, cpu in both) + " |")
    waited = statistics.median(f["waited"] for f in told["ours, from FLAC files"])
    count = told["ours"][0]["flops"] / clips / 1e9
    print(f"\nGFLOP a clip that are computed: {count:.1f}. Waiting for the loader: {waited * 1e3:.0f} ms a step.")
    for helper in (product, steps["ours"]):
        helper.end()


def size_table(threads: int, rounds: int, toy: bool) -> None:
    print("\n| clips/s by the clock (by CPU time) | batch | fine-tuning | scoring |\n|---|---|---|---|")
    for size, batch in SIZES.items():
        for seconds in (1.0, 5.0, 10.0):
            clips = 2 if toy else min(128, round(batch * 10 / seconds))
            helper = Helper(ours, size, seconds, clips, threads)
            found = [helper.ask() for _ in range(1 if toy else rounds)]
            helper.end()
            typically = {key: clips / statistics.median(f[key] for f in found) for key in found[0] if found[0][key]}
            both = [
                f"{typically[clock]:.2f} ({typically[cpu] * threads:.2f})"
                for clock, cpu in (("seconds", "cpu"), ("scored", "scored, CPU"))
            ]
            cells = f"{clips} | " + " | ".join(both)
            print(f"| {size}, {seconds:g} s | {cells} |", flush=True)
            if toy:
                break


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="the tiny encoder: whether it runs, in seconds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every process")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed")
    parser.add_argument("--batch", type=int, default=8, help="clips a step")
    parser.add_argument("--plain", type=int, default=2, help="rounds with a step of torch's own layers")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"], help="of the table of steps")
    parser.add_argument("--only", nargs="*", default=["step", "sizes"], choices=["step", "sizes"], help="these tables")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of one step, and nothing else")
    options = parser.parse_args()
    toy, threads = options.toy, options.threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    size, clips = ("tiny", 2) if toy else ("base", options.batch)
    if options.profile:
        Helper(ours, size, 1.0 if toy else 10.0, clips, threads, options.precision, True, "", True).ask()
        return
    rounds, slow = (2, 1) if toy else (options.rounds, options.plain)
    import torch
    from views import recordings

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}")
    if "step" in options.only:
        with tempfile.TemporaryDirectory() as folder:
            recordings(Path(folder), 4 if toy else 32)
            step_table(size, clips, threads, options.precision, rounds, slow, toy, folder)
    if "sizes" in options.only:
        size_table(threads, min(rounds, 3), toy)


if __name__ == "__main__":
    main()
