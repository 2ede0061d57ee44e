"""Ways to pretrain at equal cost: what each has learnt by the time another would have, on the Arabic Speech Commands.

    python bench/arabic_budget.py CATALOGUE TABLES OUT [--arms paper speech ...] [--minutes 15] [--seeds 0 1]

CATALOGUE lists the training clips (`asit catalogue TABLES/train.csv`); TABLES is what bench/arabic_tables.py wrote.
Each arm is a call of `asit pretrain`, printed before it starts, on one thread, loader included. Its epochs are what the
minutes hold: the CPU time of steps is measured first, in short runs of all arms in turn. Then `asit evaluate` and
`asit finetune` score what came out. Finished parts are skipped and begun ones gone on with. The table at the end has
the CPU time that each run took in fact.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = (10, 40)
"""Steps of the two short runs between which an arm's step is measured."""
SMALL = {"size": "custom", "width": 192, "depth": 6, "heads": 3}
# The paper's method and settings, with the encoder of the other arms, and lengths and loudness of these clips.
FRONT_END = {"rate": 16000, "mean": "auto", "std": "auto"}
# Its warm-ups of 10 and 30 epochs are for 100: here they are the same part of the run.
SHORT = {"optim": {"warmup": "auto"}, "losses": {"teacher_warmup": "auto"}, "views": {"seconds": "auto"}}
PAPER = {"preset": "paper", "front_end": FRONT_END, "encoder": SMALL, **SHORT}
DEFAULT = {"preset": "default", "front_end": FRONT_END, "encoder": SMALL}
# Whole columns of patches are wiped, and half of all columns are not seen by the student's encoder.
KEEP = {"align": True, "keep": 0.5, "replace_probability": 0.0}
LEAN = {"local_share": 0.5, "reconstruction_tokens": "masked"}
ARMS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "speech": {"preset": "speech"},
    "share": {"preset": "speech", "losses": LEAN},
    "keep": {"preset": "speech", "masking": KEEP},
    "keep-share": {"preset": "speech", "masking": KEEP, "losses": LEAN},
    "keep-copies": {
        "preset": "speech", "masking": KEEP | {"copies": 2}, "losses": LEAN, "views": {"local_views": 0}
    },
    "one-local": {"preset": "speech", "losses": LEAN, "views": {"local_views": 1}},
    # Twice the steps; the rate of a step goes down by the root of two, not by two.
    "half-batch": {"preset": "speech", "batch_size": 32, "optim": {"lr": 5.66e-3}},
    "linear": {"preset": "speech", "optim": {"schedule": "linear"}},
    "wsd": {"preset": "speech", "optim": {"schedule": "wsd"}},
    "long-patches": {"preset": "speech", "encoder": {"patch_frames": 8}},
    "default": DEFAULT,
    "default-keep-share": DEFAULT | {"masking": KEEP, "losses": LEAN},
    "default-batch-32": DEFAULT | {"batch_size": 32, "optim": {"lr": 2e-3}},
}  # fmt: skip


def main() -> None:
    """Measure the steps, run what is not finished, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalogue", nargs="?")
    parser.add_argument("tables", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--minutes", type=float, default=15.0, help="CPU time of a run on one thread")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=2, help="of the measurement of steps")
    parser.add_argument("--only", choices=["steps", "train", "score"], help="one part of the work")
    parser.add_argument("--toy", action="store_true", help="print the runs and do nothing")
    given = parser.parse_args()
    if given.toy:
        print("\n".join(f"{arm}: asit pretrain {shlex.join(flags(arm))}" for arm in ARMS))
        return
    if given.catalogue is None or given.tables is None or given.out is None:
        parser.error("give CATALOGUE, TABLES and OUT")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.only == "steps":
        print(json.dumps(measured(given), indent=1))
        return
    table = str(thinned(given.tables / "labelled.csv", given.out / "labelled.csv"))
    for seed in given.seeds:
        for arm in given.arms:
            out = given.out / f"{arm}-{given.minutes:g}-s{seed}"
            if given.only != "score":
                pretrain(arm, out, given, seed)
            if given.only != "train" and (out / "model").exists():
                score(out, table, str(given.tables / "keywords.jsonl"), seed)
    show(given.out)


def thinned(table: Path, out: Path) -> Path:
    """The table with every third of its training clips: the probe reads clips one by one, which takes its time."""
    with table.open(newline="") as lines:
        header, *rows = csv.reader(lines)
    training = [row for row in rows if row[2] == "train"]
    with out.open("w", newline="") as file:
        csv.writer(file).writerows([header, *training[::3], *(row for row in rows if row[2] == "test")])
    return out


def pretrain(arm: str, out: Path, given: argparse.Namespace, seed: int) -> None:
    """One run, unless it is finished; its CPU time is added up over interruptions."""
    log = beside(out, ".log")
    spent = beside(out, ".cpu")
    if log.exists() and "finished:" in log.read_text():
        return
    call = [*begin(arm, given), "--seed", str(seed)]
    begun = (out / "config.yaml").exists()
    if begun:
        call = ["pretrain", "--resume"]
    else:
        call += ["--epochs", str(epochs(arm, given))]
    seconds = asit([*call, "--out", str(out)], log)
    spent.write_text(str(float(spent.read_text() if begun and spent.exists() else 0) + seconds))


def beside(run: Path, suffix: str) -> Path:
    """A file next to a run's folder, whose name may hold a dot of its own (15.5 minutes)."""
    return run.with_name(run.name + suffix)


def begin(arm: str, given: argparse.Namespace) -> list[str]:
    """The call of an arm's run, without its length and place."""
    return ["pretrain", "--data", given.catalogue, *flags(arm), "--workers", "0", "--threads", "1"]


def flags(arm: str) -> list[str]:
    """An arm as options of `asit pretrain`."""
    out: list[str] = []

    def add(held: dict[str, Any], prefix: str) -> None:
        for name, value in held.items():
            flag = f"{prefix}{name.replace('_', '-')}"
            if isinstance(value, dict):
                add(value, flag + ".")
            else:
                out.extend([f"--{flag}"] if value is True else [f"--{flag}", str(value)])

    add(ARMS[arm], "")
    return out


def epochs(arm: str, given: argparse.Namespace) -> int:
    """Passes over the clips that the minutes hold."""
    kept = given.out / "steps.json"
    steps = json.loads(kept.read_text()) if kept.exists() else {}
    if any(name not in steps for name in given.arms):
        steps |= measured(given)
        kept.write_text(json.dumps(steps, indent=1))
    return max(1, round(given.minutes * 60 / steps[arm]))


def measured(given: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of an epoch of each arm: what short runs take beyond still shorter ones, medians of rounds in turn.

    Steps taken in one process, arm after arm, do not tell: there a step of `speech` took 1.37 times that of `share`, in
    runs of their own the same.
    """
    from asit.data.catalogue.catalogue import Catalogue

    few, more = STEPS
    clips = len(Catalogue.read(given.catalogue))
    found: dict[str, list[float]] = {arm: [] for arm in given.arms}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            for arm, seconds in found.items():
                call = [*begin(arm, given), "--epochs", "20", "--records.figure-every", "0"]
                call += ["--out", f"{folder}/run", "--overwrite"]
                spent = [asit([*call, "--stop-after", str(steps)], Path(folder, "log")) for steps in (few, more)]
                seconds.append((spent[1] - spent[0]) / (more - few))
    return {arm: statistics.median(values) * steps_per_epoch(arm, clips) for arm, values in found.items()}


def steps_per_epoch(arm: str, clips: int) -> int:
    """Whole batches that so many clips give."""
    from asit.config import PretrainSettings, presets

    settings = dict(ARMS[arm])
    return clips // presets.build(PretrainSettings, settings.pop("preset"), None, settings).batch_size


def score(out: Path, table: str, keywords: str, seed: int) -> None:
    """The linear probe with a third of the labels, and fine-tuning with 10 %."""
    probed, tuned = beside(out, ".probe.json"), Path(f"{out}-ten")
    if not probed.exists():
        options = ["--data", table, "--probe", "linear", "--seed", str(seed), "--threads", "1"]
        asit(["evaluate", str(out / "model"), *options, "--out", str(probed)], beside(out, ".probe.log"))
    if not (tuned / "results.json").exists():
        options = ["--sampling.share", "0.1", "--epochs", "30", "--seed", str(seed), "--validation.every", "0"]
        begun = ["--resume"] if (tuned / "config.yaml").exists() else []
        call = ["finetune", "--data", keywords, "--model", str(out / "model"), *options, "--threads", "1", *begun]
        asit([*call, "--out", str(tuned)], beside(tuned, ".log"))


def asit(options: list[str], log: Path) -> float:
    """Run a verb; gives its CPU seconds, its children's included."""
    print("asit", shlex.join(options), flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("a") as text:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "asit", *options]
        subprocess.run(command, check=True, stdout=text, stderr=text, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(out: Path) -> None:
    """One line for each finished run, as Markdown."""
    print("| run | CPU minutes | steps | linear probe, a third of the labels | fine-tuned, 10 % of the labels |")
    print("|---|---|---|---|---|")
    for run in sorted(path for path in out.iterdir() if (path / "model").is_dir() and not path.name.endswith("-ten")):
        spent = beside(run, ".cpu")
        minutes = f"{float(spent.read_text()) / 60:.1f}" if spent.exists() else ""
        steps = json.loads((run / "model" / "card.json").read_text())["training"]["step"]
        probes = scores(beside(run, ".probe.json"))
        tuned = scores(Path(f"{run}-ten", "results.json"), weights="last")
        print(f"| {run.name} | {minutes} | {steps} | {accuracy(probes)} | {accuracy(tuned)} |")


def scores(path: Path, **wanted: Any) -> list[dict[str, Any]]:
    """The records of the test side in a file of results; none where it is not there yet."""
    found = json.loads(path.read_text())["results"] if path.exists() else []
    return [one for one in found if one["split"] == "test" and all(one[key] == wanted[key] for key in wanted)]


def accuracy(found: list[dict[str, Any]]) -> str:
    """Accuracy and its interval."""
    if not found:
        return ""
    (one,) = found
    held = one["metrics"]["accuracy"]
    low, high = held["interval"]
    return f"{held['value']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
