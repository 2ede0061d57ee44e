"""Ways to pretrain at equal CPU time: how well their encoders do on labelled tables.

    python bench/quality.py DATA OUT --tables TABLE ... [--arms paper speech ... | --grid FILE.yaml]
        [--minutes 15 60] [--seeds 0 1] [--scratch-rates 5e-4 1e-3 2e-3] [--part I/N]

DATA is what is pretrained on, a folder or catalogue; each TABLE is labelled, with splits or folds. Every arm is run for
each number of minutes of CPU time, on one thread, loader included; its epochs are what the minutes hold, which short
runs of all arms in turn measure first. It is a study of `asit study` (docs/study.md) with fine-tuning: finished parts
are skipped, begun ones resumed, and processes may share OUT. Scores are the linear, nearest-neighbour and prototype
probes, and fine-tuning with 10 % and all of the labels, beside the untrained encoder, log-mel statistics and the best
rate of a classifier from scratch. OUT/table.md and table.csv have intervals and paired differences, OUT/figure.png the
scores against CPU minutes. `--grid` names arms of one's own (docs/study.md).
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {"size": "custom", "width": 192, "depth": 6, "heads": 3}
"""The encoder of every arm, that of the preset `speech`, but for its patches."""
# The paper's method with lengths and loudness of the clips at hand; its warm-ups, meant for 100 epochs, in proportion.
PAPER = {
    "preset": "paper", "front_end.rate": 16000, "front_end.mean": "auto", "front_end.std": "auto",
    "optim.warmup": "auto", "losses.teacher_warmup": "auto", "views.seconds": "auto",
}  # fmt: skip
# Whole columns of patches are wiped, and half of all columns are not seen by the student's encoder.
KEEP = {"masking.align": True, "masking.keep": 0.5, "masking.replace_probability": 0}
LEAN = {"losses.local_share": 0.5, "losses.reconstruction_tokens": "masked"}
ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": PAPER,
    "default-keep-share": {**KEEP, **LEAN},
}
"""Arms by default, besides those of the study `strategies`."""


def main() -> None:
    """Measure the steps, run what is not finished, write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--tables", nargs="+", default=[])
    parser.add_argument("--arms", nargs="+", default=[], help="by default all")
    parser.add_argument("--grid", help="YAML file of arms")
    parser.add_argument("--minutes", type=float, nargs="+", default=[15.0], help="CPU time of a run on one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 1.0], help="of the labels, for fine-tuning")
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning with all labels")
    parser.add_argument("--scratch-rates", type=float, nargs="*", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--rounds", type=int, default=2, help="of the measurement of steps")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th run, from the I-th")
    parser.add_argument("--toy", action="store_true", help="tiny sizes on made-up tones")
    given = parser.parse_args()
    if given.toy:
        with tempfile.TemporaryDirectory() as folder:
            toy(given, Path(folder))
        return
    if given.data is None or given.out is None or not given.tables:
        parser.error("give DATA, OUT and --tables")
    measure(given, {"encoder": SMALL}, steps=(10, 40))


def measure(given: argparse.Namespace, settings: dict[str, Any], steps: tuple[int, int]) -> None:
    """Run the study; `settings` are of all arms."""
    from asit import logs
    from asit.config import PretrainSettings, presets
    from asit.study import study_plan, study_report, study_run

    own = {"data": given.data, "out": str(given.out), "threads": 1, "workers": 0}
    arms = grid_of(given)
    request = study_plan.Request(
        grid=arms,
        base=presets.build(PretrainSettings, None, None, {**settings, **own}),
        tables=tuple(given.tables),
        minutes=max(given.minutes),
        scoring=study_plan.Scoring(
            shares=tuple(given.shares), epochs=given.epochs, scratch_rates=tuple(given.scratch_rates)
        ),
        steps=steps,
        rounds=given.rounds,
    )
    first, last = (int(number) for number in given.part.split("/"))
    with logs.console():
        study = study_plan.prepare(request)
        ended = study_run.run(study, given.seeds, list(arms.arms), (first, last))
        print(study_report.write(study))
    for name, why in ended.failed.items():
        print(f"{name} failed: {why}")


def grid_of(given: argparse.Namespace) -> Any:
    """The arms, each once for every number of minutes: a multiple of the longest."""
    from asit.study import grids

    if given.grid:
        held = grids.read(given.grid, tuple(given.arms))
        arms, reference = held.arms, held.reference
    else:
        strategies = grids.read("strategies").arms
        every = ARMS | {name: settings for name, settings in strategies.items() if settings}
        arms = {name: every[name] for name in given.arms or every}
        reference = next(iter(arms))
    longest = max(given.minutes)
    each = {
        f"{arm}-{minutes:g}": {**settings, "epochs": f"x{minutes / longest:.6f}"}
        for arm, settings in arms.items()
        for minutes in given.minutes
    }
    return grids.Grid("quality", "bench/quality.py", each, f"{reference}-{longest:g}", grids.COST)


def toy(given: argparse.Namespace, folder: Path) -> None:
    """Everything once, on tones of half a second, with an encoder of one block."""
    import soundfile

    rng, rows = np.random.default_rng(0), []
    for i in range(16):
        wave = np.sin(2 * np.pi * (300, 1500)[i % 2] * np.arange(4000) / 8000) + rng.standard_normal(4000)
        soundfile.write(folder / f"{i}.wav", (0.1 * wave).astype(np.float32), 8000)
        rows.append([f"{i}.wav", ("low", "high")[i % 2], str(i // 2 % 2), f"g{i // 2}"])
    with (folder / "tones.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "fold", "group"], *rows])
    given.data, given.out, given.tables = str(folder), folder / "out", [str(folder / "tones.csv")]
    given.arms, given.minutes, given.seeds, given.rounds = ["default"], [0.002, 0.004], [0], 1
    given.shares, given.epochs, given.scratch_rates = [1.0], 1, [1e-3]
    measure(
        given,
        {
            "batch_size": 4,
            "device": "cpu",
            "encoder": {"size": "custom", "width": 16, "depth": 1, "heads": 1},
            "heads": {"hidden": 16, "bottleneck": 8, "class_prototypes": 16, "patch_prototypes": 16},
            "records": {"figure_every": 0, "tensorboard": False},
        },
        steps=(1, 4),
    )


if __name__ == "__main__":
    main()
