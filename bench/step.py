"""What a pretraining step costs, as a share of what this machine's matrix products can do.

    python bench/step.py [--toy] [--threads 2] [--rounds 7] [--official 2] [--allocator] [--against SRC] [--profile]

The step is the real one: `asit.engine.loop.fit` over one synthetic batch of 4 clips, two views of 592 frames, the
base encoder with the losses of preset official-v2 without local views. Beside it stand, each in a process of its own
and taken in turn, round by round: bf16 matrix products of several shapes; the official settings in float32, written
plainly; and, where asked, the step with other allocator settings, or of another copy of the sources. Ratios are
taken within a round. A share is counted with 475 GFLOP a clip; what the formula here counts is printed too.
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

CLIP_FLOPS = 475e9
CLIPS, FRAMES, MELS = 4, 592, 128
PARTS = ("teacher", "student", "losses", "backward", "clip", "optimiser", "teacher's EMA", "rest")
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 26)}
ALLOCATORS: dict[str, dict[str, str]] = {
    "huge": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept": KEPT,
    "kept, huge": KEPT | {"THP_MEM_ALLOC_ENABLE": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
}
"""Environments of other allocator settings: huge pages, and freed memory that is not given back to the system."""


class Helper:
    """A process that does one piece of work each time it is asked."""

    def __init__(self, work: Callable[..., None], *args: Any, env: dict[str, str] | None = None) -> None:
        before = dict(os.environ)
        os.environ.update(env or {})  # glibc and torch read their settings when the process starts
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, *args), daemon=True)
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


# Our step


def settings_of(toy: bool) -> Any:
    from asit import recipes

    small: dict[str, Any] = {}
    if toy:
        small = {"encoder": {"size": "tiny"}, "heads": {"hidden": 64, "class_prototypes": 256, "patch_prototypes": 256}}
    front_end, views = {"mean": -4.27, "std": 4.57}, {"local_views": 0}
    given = {"batch_size": CLIPS, "front_end": front_end, "views": views, "precision": "bf16", **small}
    return recipes.pretrain_settings("official-v2", None, given)


def batch_of(settings: Any, frames: int) -> Any:
    import numpy as np
    import torch

    from asit.data.batches import Batch
    from asit.model import vit
    from asit.pretrain import masking

    rng = np.random.default_rng(0)
    rows = 2 * CLIPS
    masks = [masking.draw(rng, frames, MELS, settings.masking) for _ in range(rows)]
    rates = vit.drop_path_rates(settings.encoder)
    factors = np.stack([vit.draw_drop_path(rng, rates) for _ in range(rows)])
    return Batch(
        clean=torch.from_numpy(rng.normal(0, 0.5, (rows, 1, frames, MELS)).astype(np.float32)),
        local=torch.zeros(0),
        drop=torch.from_numpy(np.stack([m.drop for m in masks]))[:, None],
        replace=torch.from_numpy(np.stack([m.replace for m in masks]))[:, None],
        donor=torch.from_numpy(masking.donor_rows(rng.random((CLIPS, 2)), 4)),
        factors=torch.from_numpy(factors).permute(1, 2, 0).contiguous(),
        noise=torch.zeros(0),
        ids=[f"clip {i}" for i in range(CLIPS)],
        failures=[],
    )


class Watched:
    """The method, with the times at which the loop comes by."""

    def __init__(self, task: Any) -> None:
        self.task, self.at = task, dict[str, tuple[float, float]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def mark(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.at[name] = time.perf_counter(), time.process_time()

        return hook

    def step(self, *args: Any) -> Any:
        out = self.task.step(*args)
        self.mark("losses")()
        return out

    def gradients_ready(self, now: Any) -> None:
        self.mark("backward")()
        self.task.gradients_ready(now)

    def after_update(self, *args: Any) -> None:
        self.task.after_update(*args)
        self.mark("teacher's EMA")()

    def spent(self) -> dict[str, float]:
        """Seconds of each part, and under "PART, CPU" those of the processor."""
        out = {}
        for before, name in itertools.pairwise(("start", *PARTS)):
            out[name], out[f"{name}, CPU"] = (b - a for a, b in zip(self.at[before], self.at[name], strict=True))
        return out


def ours(pipe: Connection, toy: bool, threads: int, source: str | None, profile: bool) -> None:
    if source:
        sys.path.insert(0, source)
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from asit import runtime
    from asit.engine import loop
    from asit.engine.records import Records
    from asit.pretrain import method

    torch.set_num_threads(threads)
    settings = method.resolve(settings_of(toy))
    frames = 64 if toy else FRAMES
    batch = batch_of(settings, frames)
    device = torch.device("cpu")
    task = method.ASiT(settings, frames, torch.Generator().manual_seed(0), device)
    watched = Watched(task)
    task.teacher.register_forward_hook(watched.mark("teacher"))
    task.student.register_forward_hook(watched.mark("student"))
    register_optimizer_step_pre_hook(watched.mark("clip"))
    register_optimizer_step_post_hook(watched.mark("optimiser"))

    def batches() -> Iterator[Any]:
        yield batch  # the first step sets the optimiser's state up and is not counted
        while asked(pipe):
            with torch.profiler.profile() if profile else nullcontext() as profiler:
                before = used()
                watched.mark("start")()
                yield batch
                watched.mark("rest")()
                after = used()
            if profile:
                found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
                for event in found[:40]:
                    print(f"{event.self_cpu_time_total / 1e3:9.1f} ms {event.count:5d} {event.key}", flush=True)
            seconds = watched.at["rest"][0] - watched.at["start"][0]
            spent = {name: after[name] - before[name] for name in after}
            pipe.send({"seconds": seconds, "memory": memory(), **spent, **watched.spent()})

    plan = loop.Plan(
        1 << 30, 100, CLIPS, 1, settings.optim.betas, settings.optim.clip, settings.optim.clip_per_parameter,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    records = Records(None, 0, 0, tensorboard=False, stream=None)
    # Far enough into the schedule that nothing is frozen and every rate is above 0.
    world = runtime.World(0, 1, device, "the bench")
    try:
        loop.fit(watched, batches(), plan, world, runtime.Precision("bf16", ""), records, start=5000)
    except (StopIteration, RuntimeError):
        return


# Matrix products


def products(pipe: Connection, toy: bool, threads: int) -> None:
    """Rates of bf16 products of a few shapes, in FLOP/s by the clock and, under "NAME, CPU", by CPU time."""
    import torch

    torch.set_num_threads(threads)
    tokens = 2 * CLIPS * 297
    shapes = {
        "4096 x 4096 x 4096": (4096, 4096, 4096),
        "2048 x 2048 x 2048": (2048, 2048, 2048),
        f"{tokens} x 768 x 3072": (tokens, 768, 3072),
        f"{tokens} x 3072 x 768": (tokens, 3072, 768),
        f"{tokens} x 768 x 768": (tokens, 768, 768),
    }
    if toy:
        shapes = {"256 x 256 x 256": (256, 256, 256)}
    pairs = {}
    for name, (m, k, n) in shapes.items():
        a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
        pairs[name] = (a, b, 2 * m * k * n)
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


# The official settings, plainly


def official(pipe: Connection, toy: bool, threads: int) -> None:
    """float32, softmax attention written out, one parameter at a time in clipping, AdamW and EMA."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings, frames = settings_of(toy), 64 if toy else FRAMES
    width, depth, heads = (192, 12, 3) if toy else (768, 12, 12)
    hidden, bottleneck, prototypes = settings.heads.hidden, settings.heads.bottleneck, settings.heads.class_prototypes
    count = frames // 16 * MELS // 16

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            r, n, d = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(r, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * (d // heads) ** -0.5).softmax(-1)
            x = x + self.proj((weights @ v).transpose(1, 2).reshape(r, n, d)) * keep[0, :, None, None]
            return x + self.mlp(self.norm2(x)) * keep[1, :, None, None]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, width, 16, 16)
            self.cls = nn.Parameter(torch.zeros(1, 1, width))
            self.positions = nn.Parameter(torch.zeros(1, count + 1, width))
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Sequential(
                nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
            )
            self.last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
            self.recons = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.GELU())))
            self.back = nn.ConvTranspose2d(width, 1, 16, 16)

        def forward(self, x: torch.Tensor, keep: torch.Tensor, reconstruct: bool) -> Any:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
            for block, factors in zip(self.blocks, keep, strict=True):
                x = block(x, factors)
            x = self.norm(x)
            logits = self.last(F.normalize(self.head(x), dim=-1))
            if not reconstruct:
                return logits
            y = self.recons(x[:, 1:]).transpose(1, 2).unflatten(2, (frames // 16, MELS // 16))
            return logits, self.back(y)

    student, teacher = Network(), Network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    decayed = [p for p in student.parameters() if p.ndim > 1]
    plain = [p for p in student.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=1e-6, foreach=False)
    batch = batch_of(settings, frames)
    mask = batch.drop | batch.replace
    clean, corrupted = batch.clean, batch.clean.masked_fill(mask, 0.0)
    centre_cls, centre_patch = torch.zeros(prototypes), torch.zeros(prototypes)
    ones = torch.ones_like(batch.factors)

    def entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return -(p * F.log_softmax(q / 0.1, -1)).sum(-1).mean()

    while asked(pipe):
        start, before = time.perf_counter(), used()
        with torch.no_grad():
            taught = teacher(clean, ones, False)
        seen, rebuilt = student(corrupted, batch.factors, True)
        p_cls = ((taught[:, 0] - centre_cls) / 0.04).softmax(-1).chunk(2)
        p_patch = ((taught[:, 1:] - centre_patch) / 0.04).softmax(-1)
        q_cls = seen[:, 0].chunk(2)
        loss = (entropy(p_cls[0], q_cls[1]) + entropy(p_cls[1], q_cls[0])) / 4 + entropy(p_patch, seen[:, 1:]) / 2
        loss = loss + (rebuilt - clean).abs()[mask].mean()
        centre_cls = centre_cls * 0.9 + taught[:, 0].mean(0) * 0.1
        centre_patch = centre_patch * 0.9 + taught[:, 1:].mean((0, 1)) * 0.1
        optimiser.zero_grad()
        loss.backward()
        for parameter in student.parameters():
            factor = 3.0 / (parameter.grad.norm(2) + 1e-6)
            if factor < 1:
                parameter.grad.mul_(factor)
        optimiser.step()
        with torch.no_grad():
            for theirs, own in zip(teacher.parameters(), student.parameters(), strict=True):
                theirs.mul_(0.996).add_(0.004 * own)
        spent = {name: value - before[name] for name, value in used().items()}
        pipe.send({"seconds": time.perf_counter() - start, "memory": memory(), **spent})


# Counting


def formula(skipped: float = 0.0) -> float:
    """FLOP of a clip in matrix products: 2 for each multiplication and addition, the backward pass twice the forward.

    `skipped`: share of the student's branches that stochastic depth leaves out and that need no computing.
    """
    width, depth, patches = 768, 12, 296
    tokens = patches + 1
    branches = depth * 2 * tokens * (12 * width**2 + 2 * tokens * width)
    embed = 2 * patches * 256 * width
    projection = 2 * tokens * (width * 2048 + 2048 * 2048 + 2048 * 256 + 256 * 8192)
    rebuilt = 2 * patches * (3 * width**2 + width * 256)
    teacher = branches + embed + projection
    student = 3 * (branches * (1 - skipped) + projection + rebuilt) + 2 * embed
    return 2.0 * (teacher + student)


# The table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny network: whether it runs, in seconds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every process")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed")
    parser.add_argument("--official", type=int, default=2, help="rounds with a step of the official settings")
    parser.add_argument("--allocator", nargs="*", default=[], choices=list(ALLOCATORS), help="also with these settings")
    parser.add_argument("--against", metavar="SRC", help="also the step of another copy of src/")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of one step, and nothing else")
    options = parser.parse_args()
    toy, threads = options.toy, options.threads
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if options.profile:
        helper = Helper(ours, toy, threads, None, True)
        helper.ask()
        return
    rounds, slow = (2, 1) if toy else (options.rounds, options.official)

    import torch

    product = Helper(products, toy, threads)
    steps = {"ours": Helper(ours, toy, threads, None, False)}
    for name in options.allocator:
        steps[f"ours, {name}"] = Helper(ours, toy, threads, None, False, env=ALLOCATORS[name])
    if options.against:
        steps["against"] = Helper(ours, toy, threads, options.against, False)
    plain = Helper(official, toy, threads) if slow else None
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}")
    rates: list[dict[str, float]] = []
    told: dict[str, list[dict[str, float]]] = {name: [] for name in [*steps, "official"]}
    for i in range(rounds):
        before = product.ask()
        for name, helper in steps.items():
            told[name].append(helper.ask())
        after = product.ask()
        rates.append({name: max(before[name], after[name]) for name in before})
        if plain is not None and i < slow:
            told["official"].append(plain.ask())
    typical = {name: statistics.median(r[name] for r in rates) for name in rates[0]}
    shapes = [name for name in typical if not name.endswith(", CPU")]
    ceiling = max(shapes, key=lambda name: typical[name])
    of_cpu = max(shapes, key=lambda name: typical[f"{name}, CPU"]) + ", CPU"
    print("\n| bf16 matrix product | TFLOP/s | by CPU time |\n|---|---|---|")
    for name in shapes:
        told_as = f"{name} (the ceiling)" if name == ceiling else name
        print(f"| {told_as} | {typical[name] / 1e12:.2f} | {typical[f'{name}, CPU'] / 1e12:.2f} |")
    print(
        "\n| step of 4 clips | s | clips/s | share of the ceiling | lowest, highest | CPU s | of these system | "
        "faults | share, by CPU time | memory, GB | s to ours | CPU s to ours |"
    )
    print("|---" * 12 + "|")
    for name, found in told.items():
        if not found:
            continue
        typically = {key: statistics.median(f[key] for f in found) for key in found[0]}
        flops = CLIPS * CLIP_FLOPS
        shares = sorted(flops / f["seconds"] / r[ceiling] for f, r in zip(found, rates, strict=False))
        by_cpu = statistics.median(flops * threads / f["cpu"] / r[of_cpu] for f, r in zip(found, rates, strict=False))
        pairs = list(zip(found, told["ours"], strict=False))
        ratios = [statistics.median(f[key] / o[key] for f, o in pairs) for key in ("seconds", "cpu")]
        cells = [
            f"{typically['seconds']:.3f}",
            f"{CLIPS / typically['seconds']:.2f}",
            f"{statistics.median(shares):.2f}",
            f"{shares[0]:.2f}, {shares[-1]:.2f}",
            f"{typically['cpu']:.2f}",
            f"{typically['system']:.2f}",
            f"{typically['faults']:.0f}",
            f"{by_cpu:.2f}",
            f"{typically['memory']:.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    names = [name for name in told if name != "official"]
    print("\n| part, ms (CPU ms) | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for part in PARTS:
        both = [[statistics.median(f[key] for f in told[n]) * 1e3 for key in (part, f"{part}, CPU")] for n in names]
        cells = [f"{seconds:.0f} ({cpu:.0f})" for seconds, cpu in both]
        print(f"| {part} | " + " | ".join(cells) + " |")
    print(
        f"\nGFLOP a clip: {CLIP_FLOPS / 1e9:.0f} counted; the formula gives {formula() / 1e9:.1f}, and "
        f"{formula(0.05) / 1e9:.1f} without the branches that stochastic depth drops (5 % of them on average)."
    )
    for helper in (product, *steps.values(), *([plain] if plain else [])):
        helper.end()


if __name__ == "__main__":
    main()
