"""Tables for the experiments on the Arabic Speech Commands and on the Free Spoken Digit Dataset.

    python bench/arabic_tables.py COMMANDS OUT [--digits DIGITS]

COMMANDS holds dataset/, train.csv, val.csv and test.csv as the data set is distributed. OUT gets

    train.csv       path                        the training clips, for pretraining without labels
    labelled.csv    path, label, split          word; the official speaker-disjoint split, train and test
    keywords.csv    path, label, split, group   the same with the validation clips, and the speaker as group
    speakers.csv    path, label, split          speaker; split by utterance: of a speaker's ten rounds of a word the
                                                ninth is validation and the tenth test

and, of DIGITS (with recordings/):

    digits.csv          path, label, fold, group   digit; fold and group are the speaker
    digit_speakers.csv  path, label, split         speaker; rounds 0 to 4 test, 5 to 9 validation, the others train
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--toy", action="store_true", help="do nothing: there is no small version of this")
    given = parser.parse_args()
    if given.toy:
        print("nothing to measure here")
        return
    if given.folder is None or given.out is None:
        parser.error("give COMMANDS and OUT")
    given.out.mkdir(parents=True, exist_ok=True)
    commands(given.folder, given.out)
    if given.digits:
        digits(given.digits, given.out)


def commands(folder: Path, out: Path) -> None:
    """Tables of the Arabic Speech Commands."""
    clips = []
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        with (folder / f"{name}.csv").open(newline="") as table:
            for row in csv.DictReader(table):
                speaker, _, turn = Path(row["file"]).stem.split("_")
                clips.append((str((folder / row["file"]).resolve()), row["class"], split, speaker, int(turn)))
    write(out / "train.csv", ["path"], ([path] for path, _, split, _, _ in clips if split == "train"))
    official = [(path, word, split, speaker) for path, word, split, speaker, _ in clips]
    write(out / "labelled.csv", ["path", "label", "split"], (row[:3] for row in official if row[2] != "validation"))
    write(out / "keywords.csv", ["path", "label", "split", "group"], official)
    sides = {9: "validation", 10: "test"}
    rows = [(path, speaker, sides.get(turn, "train")) for path, _, _, speaker, turn in clips]
    write(out / "speakers.csv", ["path", "label", "split"], rows)


def digits(folder: Path, out: Path) -> None:
    """Tables of the Free Spoken Digit Dataset."""
    clips = [(str(path.resolve()), *path.stem.split("_")) for path in sorted((folder / "recordings").glob("*.wav"))]
    by_speaker = [(path, digit, speaker, speaker) for path, digit, speaker, _ in clips]
    write(out / "digits.csv", ["path", "label", "fold", "group"], by_speaker)
    sides = {0: "test", 1: "validation"}
    rows = [(path, speaker, sides.get(int(turn) // 5, "train")) for path, _, speaker, turn in clips]
    write(out / "digit_speakers.csv", ["path", "label", "split"], rows)


def write(place: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table."""
    kept = list(rows)
    with place.open("w", newline="") as file:
        csv.writer(file).writerows([head, *kept])
    print(f"{place}: {len(kept)} clips")


if __name__ == "__main__":
    main()
