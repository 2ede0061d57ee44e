"""The fine-tuning runs of docs/experiments.md, one after the other, and their table.

    python bench/arabic_runs.py MODEL TABLES OUT [--part ten one hundred long speakers digits] [--threads 1]

MODEL is the pretrained model's folder; TABLES is what bench/arabic_tables.py wrote, each table catalogued
(`asit catalogue keywords.csv --out keywords.jsonl`). Each run is a call of `asit finetune`, printed before it starts.
Finished runs are skipped and begun ones gone on with, so the script may be stopped at any time. At the end
`asit compare` prints the table of each part.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

Run = tuple[str, list[str]]
SIDES = {"pretrained": [], "scratch": ["--fresh"]}
# From scratch every layer learns at the same rate: with decay the lower ones would stay random.
OPTIM = {"pretrained": [], "scratch": ["--optim.layer-decay", "1.0"]}


def keywords(share: str, name: str, budgets: tuple[int, ...], seeds: tuple[int, ...]) -> Iterator[Run]:
    """40 words, a share of the labels."""
    for epochs, seed, side in itertools.product(budgets, seeds, SIDES):
        yield (
            f"{name}-{side}-{epochs}-s{seed}",
            ["keywords.jsonl", "--sampling.share", share, "--epochs", str(epochs), "--seed", str(seed)]
            + ["--validation.every", str(max(5, epochs // 10))]
            + SIDES[side]
            + OPTIM[side],
        )


def plain(table: str, name: str, epochs: int, extra: list[str]) -> Iterator[Run]:
    """Another task with all its labels, from the pretrained encoder and from scratch."""
    for side in SIDES:
        yield f"{name}-{side}-{epochs}", [table, "--epochs", str(epochs), *extra, *SIDES[side], *OPTIM[side]]


PARTS: dict[str, list[Run]] = {
    "ten": [*keywords("0.1", "ten", (30, 100), (0, 1, 2))],
    "one": [*keywords("0.01", "one", (100, 400), (0, 1, 2))],
    "hundred": [*keywords("1.0", "hundred", (8,), (0,))],
    "long": [*keywords("0.1", "ten", (300,), (0,))],
    "speakers": [*plain("speakers.jsonl", "speakers", 3, ["--validation.every", "3"])],
    "digits": [
        *plain("digits.jsonl", "digits", 8, ["--sides.fold", "all", "--validation.every", "0"]),
        *plain("digit_speakers.jsonl", "digit-speakers", 8, ["--validation.every", "4"]),
    ],
}


def main() -> None:
    """Run what is not finished, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("tables", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", default="1")
    parser.add_argument("--toy", action="store_true", help="print the runs and do nothing")
    given = parser.parse_args()
    if given.toy:
        print("\n".join(f"{name}: {shlex.join(options)}" for runs in PARTS.values() for name, options in runs))
        return
    if given.model is None or given.tables is None or given.out is None:
        parser.error("give MODEL, TABLES and OUT")
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.part:
        for name, options in PARTS[part]:
            out = given.out / name
            if (out / "results.json").exists():
                continue
            call = ["finetune", "--data", str(given.tables / options[0]), "--model", given.model, *options[1:]]
            begun = ["--resume"] if (out / "config.yaml").exists() else []
            command = [*call, "--out", str(out), "--threads", given.threads, *begun]
            print("asit", shlex.join(command), flush=True)
            with (given.out / f"{name}.log").open("w") as log:
                subprocess.run([sys.executable, "-m", "asit", *command], check=True, stdout=log, stderr=log)
        runs = [str(given.out / name) for name, _ in PARTS[part]]
        subprocess.run([sys.executable, "-m", "asit", "compare", *runs], check=True)


if __name__ == "__main__":
    main()
