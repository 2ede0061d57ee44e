"""Tables for the experiments on the Arabic Speech Commands: training clips without labels, and both sides with labels.

    python bench/arabic_tables.py FOLDER OUT

FOLDER holds dataset/, train.csv, val.csv and test.csv as the data set is distributed. OUT gets train.csv (path) and
labelled.csv (path, label, split): the official speaker-disjoint split, train and test; the validation clips are left
out of both.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path


def main() -> None:
    """Write the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--toy", action="store_true", help="do nothing: there is no small version of this")
    given = parser.parse_args()
    if given.toy:
        print("nothing to measure here")
        return
    if given.folder is None or given.out is None:
        parser.error("give FOLDER and OUT")
    given.out.mkdir(parents=True, exist_ok=True)
    sides = {}
    for split in ("train", "test"):
        with (given.folder / f"{split}.csv").open(newline="") as table:
            sides[split] = [
                (str((given.folder / row["file"]).resolve()), row["class"]) for row in csv.DictReader(table)
            ]
    with (given.out / "train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path",), *((path,) for path, _ in sides["train"])])
    with (given.out / "labelled.csv").open("w", newline="") as file:
        rows = [(path, label, split) for split, side in sides.items() for path, label in side]
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    print(f"{given.out}: {len(sides['train'])} training clips, {len(sides['test'])} test clips")


if __name__ == "__main__":
    main()
