"""What a pretraining step costs, as a share of what this machine's matrix products can do.

    python bench/step.py [--toy] [--network base|speech] [--threads 2] [--rounds 7] [--official 2] [--allocator]
                         [--against SRC] [--profile]

The step is the real one: `asit.training.loop.Loop` over one synthetic batch of 4 clips, two views of 592 frames, the
base encoder with the losses of preset official-v2 without local views; or, as `speech`, that preset's encoder 192 wide
over 64 clips of 0.8 s with two local views. Freed memory is kept, as `asit` does. Beside it stand, each in a process
of its own and taken in turn, round by round: bf16 matrix products of several shapes; the official settings in float32,
written plainly; and, where asked, the step with other allocator settings, or of another copy of the sources. Ratios are
taken within a round. A share of the base encoder is counted with 475 GFLOP a clip; what the formula here counts is
printed too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

from measure import ALLOCATORS, Helper, Watched, asked, ceilings, memory, products, used

CLIP_FLOPS = 475e9
CLIPS, FRAMES, MELS = 4, 592, 128
SPEECH_CLIPS, SPEECH_FRAMES = 64, 80
PARTS = ("teacher", "student", "losses", "backward", "clip", "optimiser", "teacher's EMA", "rest")
# Our step


def settings_of(toy: bool, network: str = "base") -> Any:
    from asit.config import PretrainSettings, presets

    if network == "speech":
        given = {"batch_size": SPEECH_CLIPS, "front_end": {"mean": -8.78, "std": 4.29}, "precision": "bf16"}
        return presets.build(PretrainSettings, "speech", None, given)
    small: dict[str, Any] = {}
    if toy:
        small = {"encoder": {"size": "tiny"}, "heads": {"hidden": 64, "class_prototypes": 256, "patch_prototypes": 256}}
    front_end, views = {"mean": -4.27, "std": 4.57}, {"local_views": 0}
    given = {"batch_size": CLIPS, "front_end": front_end, "views": views, "precision": "bf16", **small}
    return presets.build(PretrainSettings, "official-v2", None, given)


def batch_of(settings: Any, frames: int) -> Any:
    import numpy as np
    import torch

    from asit.model import vit
    from asit.pretrain import masking
    from asit.pretrain.pretrain_dataset import PretrainBatch

    rng = np.random.default_rng(0)
    clips, others = settings.batch_size, settings.views.local_views
    rows = 2 * clips
    masks = [masking.draw(rng, frames, MELS, settings.masking) for _ in range(rows)]
    rates = vit.drop_path_rates(settings.encoder)
    factors = np.stack([vit.draw_drop_path(rng, rates) for _ in range(rows + others * clips)])
    local = rng.normal(0, 0.5, (others * clips, 1, frames // 2, MELS)).astype(np.float32)
    donor = masking.donor_clips(rng.random((clips, 2)), 0, clips, pool=4)
    return PretrainBatch(
        clean=torch.from_numpy(rng.normal(0, 0.5, (rows, 1, frames, MELS)).astype(np.float32)),
        local=torch.from_numpy(local) if others else None,
        drop=torch.from_numpy(np.stack([m.drop for m in masks]))[:, None],
        replace=torch.from_numpy(np.stack([m.replace for m in masks]))[:, None],
        donor=torch.from_numpy((donor + np.array([0, clips])).T.flatten()),
        factors=torch.from_numpy(factors).permute(1, 2, 0).contiguous(),
        ids=[f"clip {i}" for i in range(clips)],
    )


def ours(pipe: Connection, toy: bool, threads: int, source: str | None, profile: bool, network: str = "base") -> None:
    if source:
        sys.path.insert(0, source)
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    from asit import runtime
    from asit.config.pretrain_settings import resolve
    from asit.model.cpu import bf16
    from asit.pretrain import method
    from asit.training import loop
    from asit.training.metrics_log import Records

    bf16.keep_freed_memory()
    torch.set_num_threads(threads)
    settings = resolve(settings_of(toy, network))
    frames = SPEECH_FRAMES if network == "speech" else 64 if toy else FRAMES
    batch = batch_of(settings, frames)
    device = torch.device("cpu")
    task = method.ASiT(settings, frames, torch.Generator().manual_seed(0), device)
    watched = Watched(task, forward="losses", update="teacher's EMA")
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
            pipe.send({"seconds": seconds, "memory": memory(), **spent, **watched.spent(PARTS)})

    o = settings.optim
    plan = loop.Plan(
        1 << 30, 100, settings.batch_size, 1, o.betas, o.clip, o.clip_per_parameter,
        log_every=1 << 30, checkpoint_every=1 << 30,
    )  # fmt: skip
    records = Records(None, 0, 0)
    # Far enough into the schedule that nothing is frozen and every rate is above 0.
    world = runtime.World(0, 1, device, "the bench")
    try:
        what = {"plan": plan, "world": world, "precision": runtime.Precision("bf16", ""), "records": records}
        loop.Loop(task=watched, batches=batches(), step=5000, **what).run()
    except (StopIteration, RuntimeError):
        return


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


def formula(skipped: float = 0.0, network: str = "base") -> float:
    """FLOP of a clip in matrix products: 2 for each multiplication and addition, the backward pass twice the forward.

    `skipped`: share of the student's branches that stochastic depth leaves out and that need no computing.
    """
    if network == "speech":
        width, depth, area, views = 192, 6, 4 * MELS, {SPEECH_FRAMES // 4: 2, SPEECH_FRAMES // 8: 2}
        hidden, bottleneck, prototypes = 512, 64, 512
    else:
        width, depth, area, views = 768, 12, 256, {296: 2}
        hidden, bottleneck, prototypes = 2048, 256, 8192
    patches = next(iter(views))
    layers = {p: depth * (p + 1) * (12 * width**2 + 2 * (p + 1) * width) for p in views}
    of_token = width * hidden + hidden**2 + hidden * bottleneck + bottleneck * prototypes
    teacher = 2 * (layers[patches] + patches * area * width + (patches + 1) * of_token)
    branches = sum(count * layers[p] for p, count in views.items())
    embedded = sum(count * p for p, count in views.items()) * area * width
    tokens = 2 * (patches + 1) + sum(count for p, count in views.items() if p != patches)  # of local views the class's
    rebuilt = 2 * patches * (3 * width**2 + width * area)
    student = 3 * (branches * (1 - skipped) + tokens * of_token + rebuilt) + 2 * embedded
    return 2.0 * (teacher + student)


# The table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a tiny network: whether it runs, in seconds")
    parser.add_argument("--network", default="base", choices=("base", "speech"), help="which step; speech: ours alone")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every process")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed")
    parser.add_argument("--official", type=int, default=2, help="rounds with a step of the official settings")
    parser.add_argument("--allocator", nargs="*", default=[], choices=list(ALLOCATORS), help="also with these settings")
    parser.add_argument("--against", metavar="SRC", help="also the step of another copy of src/")
    parser.add_argument("--profile", action="store_true", help="print torch's profile of one step, and nothing else")
    options = parser.parse_args()
    toy, threads, network = options.toy, options.threads, options.network
    clips, clip_flops = (CLIPS, CLIP_FLOPS) if network == "base" else (SPEECH_CLIPS, formula(0.05, network))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if options.profile:
        helper = Helper(ours, toy, threads, None, True, network)
        helper.ask()
        return
    rounds, slow = (2, 1) if toy else (options.rounds, options.official)
    slow = slow if network == "base" else 0

    import torch

    tokens = 2 * CLIPS * (FRAMES // 16 * MELS // 16 + 1)
    product = Helper(products, threads, tokens, toy)
    steps = {"ours": Helper(ours, toy, threads, None, False, network)}
    for name in options.allocator:
        steps[f"ours, {name}"] = Helper(ours, toy, threads, None, False, network, env=ALLOCATORS[name])
    if options.against:
        steps["against"] = Helper(ours, toy, threads, options.against, False, network)
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
    ceiling, of_cpu = ceilings(rates)
    print(
        f"\n| step of {clips} clips | s | clips/s | share of the ceiling | lowest, highest | CPU s | of these system | "
        "faults | share, by CPU time | memory, GB | s to ours | CPU s to ours |"
    )
    print("|---" * 12 + "|")
    for name, found in told.items():
        if not found:
            continue
        typically = {key: statistics.median(f[key] for f in found) for key in found[0]}
        flops = clips * clip_flops
        shares = sorted(flops / f["seconds"] / r[ceiling] for f, r in zip(found, rates, strict=False))
        by_cpu = statistics.median(flops * threads / f["cpu"] / r[of_cpu] for f, r in zip(found, rates, strict=False))
        pairs = list(zip(found, told["ours"], strict=False))
        ratios = [statistics.median(f[key] / o[key] for f, o in pairs) for key in ("seconds", "cpu")]
        cells = [
            f"{typically['seconds']:.3f}",
            f"{clips / typically['seconds']:.2f}",
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
        f"\nGFLOP a clip: {clip_flops / 1e9:.3g} counted; the formula gives {formula(0, network) / 1e9:.4g}, and "
        f"{formula(0.05, network) / 1e9:.4g} without the branches that stochastic depth drops (5 % of them on average)."
    )
    for helper in (product, *steps.values(), *([plain] if plain else [])):
        helper.end()


if __name__ == "__main__":
    main()
