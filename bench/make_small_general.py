"""Make asit-small-general, a small encoder that may be given away: recordings, pretraining, packaged folder.

    python bench/make_small_general.py recordings GENERAL COMMANDS DIGITS OUT
    python bench/make_small_general.py pretrain OUT
    python bench/make_small_general.py package OUT SCORES FOLDER

GENERAL holds unlabelled.csv and the files that it lists; COMMANDS are the Arabic Speech Commands as distributed
(train.csv and dataset/); DIGITS is the Free Spoken Digit Dataset (recordings/). `recordings` writes 16 kHz WAV files
and their list, OUT/recordings.csv: all of GENERAL, the odd rounds of COMMANDS' training speakers, every third round of
DIGITS. `pretrain` makes the run OUT/run, one core for about 80 minutes, and resumes it. `package` writes FOLDER: the
teacher's encoder alone, as float16, and its card with licence, data and SCORES, a JSON object of name and value;
README.md, LICENSE and CREDITS.md go beside them before it is given away.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile
import soxr

import asit

RATE = 16000
SETTINGS = {
    "preset": "default",
    "batch-size": 32,
    "optim.lr": 5.66e-3,
    "epochs": 16,
    "views.segment-seconds": 5,
    "views.seconds": 1.815,
    "views.local-seconds": 1.095,
    "seed": 0,
    "threads": 1,
    "workers": 0,
    "records.figure-every": 0,
    "records.checkpoint-every": 200,
}
"""Of `asit pretrain`; the encoder (192 wide, 6 blocks, patches of 4 x 128) is the preset's."""
LICENSE = "cc-by-sa-4.0"
DATA = {
    "collections": [
        "megaglest-data",
        "SuperTuxKart data",
        "CC-Sounds (Cataclysm: DDA)",
        "Sonic Pi samples",
        "Donate-a-cry",
        "Picovoice wake-word and intent benchmarks",
        "Asterisk core sounds (en, es)",
        "Arabic Speech Commands (odd rounds of the training speakers)",
        "Free Spoken Digit Dataset (every third round)",
    ],
    "labels": "none",
    "credits": "CREDITS.md",
}
"""For the card."""


def main() -> None:
    """Do one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["recordings", "pretrain", "package"], nargs="?")
    parser.add_argument("paths", type=Path, nargs="*")
    parser.add_argument("--toy", action="store_true", help="do nothing: there is no small version of this")
    given = parser.parse_args()
    if given.toy:
        print("nothing to measure here")
        return
    match given.step, given.paths:
        case "recordings", [general, commands, digits, out]:
            recordings(general, commands, digits, out)
        case "pretrain", [out]:
            pretrain(out)
        case "package", [out, scores, folder]:
            package(out, scores, folder)
        case _:
            parser.error("see --help for the paths of each step")


def recordings(general: Path, commands: Path, digits: Path, out: Path) -> None:
    """Write the recordings as 16 kHz WAV files, and the list of them."""
    (out / "wav").mkdir(parents=True, exist_ok=True)
    with (out / "recordings.csv").open("w", newline="") as table:
        lines = csv.writer(table)
        lines.writerow(["path"])
        for number, source in enumerate(chosen(general, commands, digits)):
            wave, rate = soundfile.read(source, dtype="float32")
            path = out / "wav" / f"{number:05d}.wav"
            soundfile.write(path, wave if rate == RATE else soxr.resample(wave, rate, RATE), RATE, subtype="PCM_16")
            lines.writerow([path.resolve()])


def chosen(general: Path, commands: Path, digits: Path) -> Iterator[Path]:
    """Yield the files that the encoder is pretrained on."""
    with (general / "unlabelled.csv").open(newline="") as table:
        yield from (general / row["path"] for row in csv.DictReader(table))
    with (commands / "train.csv").open(newline="") as table:
        files = [commands / row["file"] for row in csv.DictReader(table)]
    yield from (file for file in files if turn(file) % 2)
    yield from (file for file in sorted((digits / "recordings").glob("*.wav")) if turn(file) % 3 == 0)


def turn(file: Path) -> int:
    """Return the number of the round, with which the names of both keyword sets end."""
    return int(file.stem.rpartition("_")[2])


def pretrain(out: Path) -> None:
    """Pretrain, or resume."""
    options = [text for name, value in SETTINGS.items() for text in (f"--{name}", str(value))]
    where = ["--data", str(out / "recordings.csv"), "--out", str(out / "run"), "--auto-resume"]
    subprocess.run([sys.executable, "-m", "asit", "pretrain", *where, *options], check=True)


def package(out: Path, scores: Path, folder: Path) -> None:
    """Write the model folder."""
    model = asit.load(out / "run")
    model.training |= {"license": LICENSE, "data": DATA, "scores": json.loads(scores.read_text("utf-8"))}
    model.encoder.half()
    model.save(folder)
    print(f"{folder}: {(folder / 'model.safetensors').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
