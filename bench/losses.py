"""The local loss from logits held whole and from the projections a chunk of rows at a time: CPU time and memory.

    python bench/losses.py [--threads 1] [--rounds 5] [--toy]

Forward and backward pass, both last layers included, in bfloat16; each form in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

CASES = {"official-v2, 4 clips": (2368, 8192, 256), "speech, 64 clips": (2560, 512, 64)}
TOY = {"toy": (64, 128, 16)}


def measure(form: str, rows: int, prototypes: int, width: int, threads: int) -> tuple[float, float]:
    """CPU seconds, the least of three, and GB of memory above what was there before."""
    import torch
    from torch.nn import functional as F

    from asit.model.cpu import bf16
    from asit.pretrain import chunked_loss, losses
    from asit.pretrain.chunked_loss import Projected

    torch.set_num_threads(threads)
    bf16.keep_freed_memory()
    g = torch.Generator().manual_seed(0)
    student, teacher = (
        Projected(*(F.normalize(torch.randn(n, width, generator=g), dim=-1) for n in (rows, prototypes)))
        for _ in range(2)
    )
    for x in student:
        x.requires_grad_()
    centre = torch.zeros(prototypes)

    def whole() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                taught = F.linear(*teacher)
            seen = bf16.linear(*student)
        probs = losses.teacher_distribution(taught, centre, 0.04)
        return losses.cross_entropy(seen, probs, 0.1).mean()

    def chunks() -> torch.Tensor:
        return chunked_loss.local_loss(student, teacher, centre, (0.1, 0.04), dtype=torch.bfloat16)[0]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = []
    for _ in range(3):
        for x in student:
            x.grad = None
        began = time.process_time()
        {"whole": whole, "chunks": chunks}[form]().backward()
        taken.append(time.process_time() - began)
    return min(taken), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def main() -> None:
    """Run both forms in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="a small case, one round")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        form, *size = given.one
        print(*measure(form, *(int(x) for x in size)))
        return
    print("| case | form | CPU ms (range) | to whole | memory, GB |\n|---|---|---|---|---|")
    for name, size in (TOY if given.toy else CASES).items():
        found: dict[str, list[tuple[float, ...]]] = {"whole": [], "chunks": []}
        for _ in range(1 if given.toy else given.rounds):
            for form, answers in found.items():
                call = [sys.executable, __file__, "--one", form, *map(str, (*size, given.threads))]
                said = subprocess.run(call, check=True, capture_output=True, text=True).stdout
                answers.append(tuple(float(x) for x in said.split()))
        base = statistics.median(seconds for seconds, _ in found["whole"])
        for form, answers in found.items():
            times = [seconds for seconds, _ in answers]
            middle, memory = statistics.median(times), statistics.median(m for _, m in answers)
            span = f"{1e3 * min(times):.0f} to {1e3 * max(times):.0f}"
            print(f"| {name} | {form} | {1e3 * middle:.0f} ({span}) | {middle / base:.2f} | {memory:.3f} |")


if __name__ == "__main__":
    main()
