"""Data sets of `asit download`: addresses, published sizes and checksums, and what they must hold."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asit.data.download.http import DownloadError, RemoteFile
from asit.data.download.unpack import Limits
from asit.io.csv_lines import write_csv


@dataclass(frozen=True)
class Archive:
    """One archive of a set.

    Attributes:
        file: its address and what was published of it.
        about: bytes, roughly, where the size is not published.
        limits: the most that it may unpack to.
        folder: where it goes, below the set's folder; "": the folder itself.
        strip: leading folders inside it that are left out.
    """

    file: RemoteFile
    limits: Limits
    about: int = 0
    folder: str = ""
    strip: int = 0


@dataclass(frozen=True)
class ExpectedContents:
    """What a folder of the set holds.

    Attributes:
        folder: below the set's folder.
        recordings: number of .wav files in it and below, hidden ones left out.
        digest: SHA-256 of the lines "MD5  name" of these files in the order of their names; for archives without a
            published checksum. It finds damage and other versions; it is no seal against forgery.
    """

    folder: str
    recordings: int
    digest: str | None = None


@dataclass(frozen=True)
class DownloadSource:
    """A data set that may be fetched.

    Attributes:
        name: as `asit download` takes it.
        title, licence: for people.
        unpacked: bytes on the disk, roughly.
        archives, contents: see these.
        finish: last step on the unpacked folder: checks of its own, or a file that is derived.
        catalogue: source of the next command, `asit catalogue ...`, with {} for the folder.
    """

    name: str
    title: str
    licence: str
    unpacked: int
    archives: tuple[Archive, ...]
    contents: tuple[ExpectedContents, ...]
    catalogue: str
    finish: Callable[[Path], None] | None = None


def _check_esc50(folder: Path) -> None:
    """meta/esc50.csv against the names of the files, which hold fold, source, take and class: 1-100032-A-0.wav."""
    table = folder / "meta" / "esc50.csv"
    try:
        with table.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
        cells_of = {row["filename"]: [str(row[key]) for key in ("fold", "src_file", "take", "target")] for row in rows}
    except (FileNotFoundError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise DownloadError(
            f"{table}: {type(error).__name__}: {error}", "the table of ESC-50", "this is another archive: delete it"
        ) from None
    audio = {path.name for path in (folder / "audio").iterdir()}
    wrong = sorted(audio ^ cells_of.keys())
    wrong += [name for name, cells in cells_of.items() if Path(name).stem != "-".join(cells)]
    if wrong or len(rows) != len(cells_of):
        raise DownloadError(
            f"{table}: {len(rows):,} lines, and {len(wrong):,} names that do not fit the files, such as "
            + ", ".join(wrong[:3]),
            "one line a recording, with the fold, source, take and class of its name",
            "this is another archive: delete it",
        )


def _table_of_digits(folder: Path) -> None:
    """table.csv: path, label (the digit) and group (the speaker) from the names, such as 7_jackson_32.wav."""
    rows = []
    for path in sorted((folder / "recordings").glob("*.wav")):
        parts = re.fullmatch(r"(\d)_(.+)_\d+", path.stem)
        if parts is None:
            raise DownloadError(
                f"{path}: not a name of this set", "DIGIT_SPEAKER_NUMBER.wav", "this is another archive: delete it"
            )
        rows.append((f"recordings/{path.name}", parts[1], parts[2]))
    write_csv(folder / "table.csv", [("path", "label", "group"), *rows])


def _speech_commands(name: str, size: int, sha256: str) -> RemoteFile:
    return RemoteFile("https://storage.googleapis.com/download.tensorflow.org/data/" + name, name, size, sha256)


_ALL = (
    # GitHub packs archives when asked and promises no fixed bytes (three MD5s of this one are in public code), so
    # commits are fixed and the recordings' own digest is compared. That of ESC-50 is made of the MD5s in the index of
    # the package soundata 0.1.3; that of the digits of the files of the commit itself.
    DownloadSource(
        name="esc50",
        title="ESC-50",
        licence="CC BY-NC 3.0, each recording with a licence of its own (LICENSE)",
        unpacked=890_000_000,
        archives=(
            Archive(
                RemoteFile(
                    "https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip",
                    "ESC-50.zip",
                ),
                Limits(files=2_200, bytes=1_000_000_000),
                about=650_000_000,
                strip=1,
            ),
        ),
        contents=(
            ExpectedContents("audio", 2_000, "7dac98ebb302b554321c1ceacd9ab75bb0769516f66d19b4f3a6a6874355c2f2"),
        ),
        catalogue="esc50 {}",
        finish=_check_esc50,
    ),
    # Sizes and SHA-256: dataset_infos.json of `superb` in Hugging Face datasets (V1 and its test set) and
    # url_checksums/speech_commands.txt of TensorFlow Datasets (V2); torchaudio has the same SHA-256 of V1 and V2.
    # Counts: 64,721 and 105,829 words (the data set's paper, arXiv:1804.03209), 6 background recordings each.
    DownloadSource(
        name="speech-commands-v1",
        title="Speech Commands V1 with its test set",
        licence="CC BY 4.0",
        unpacked=2_300_000_000,
        archives=(
            Archive(
                _speech_commands(
                    "speech_commands_v0.01.tar.gz",
                    1_489_096_277,
                    "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
                ),
                Limits(files=66_000, bytes=2_600_000_000),
                folder="speech_commands_v0.01",
            ),
            Archive(
                _speech_commands(
                    "speech_commands_test_set_v0.01.tar.gz",
                    71_271_436,
                    "baa084f6b62c91de660ff0588ae4dfc4e4d534aa99ac0e5f406cba75836cbd00",
                ),
                Limits(files=3_500, bytes=200_000_000),
                folder="speech_commands_test_set_v0.01",
            ),
        ),
        contents=(
            ExpectedContents("speech_commands_v0.01", 64_727),
            ExpectedContents("speech_commands_test_set_v0.01", 3_081),
        ),
        catalogue="speech-commands-v1 {}",
    ),
    DownloadSource(
        name="speech-commands-v2",
        title="Speech Commands V2",
        licence="CC BY 4.0",
        unpacked=3_800_000_000,
        archives=(
            Archive(
                _speech_commands(
                    "speech_commands_v0.02.tar.gz",
                    2_428_923_189,
                    "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
                ),
                Limits(files=108_000, bytes=4_500_000_000),
            ),
        ),
        contents=(ExpectedContents("", 105_835),),
        catalogue="speech-commands-v2 {}",
    ),
    DownloadSource(
        name="free-spoken-digit",
        title="Free Spoken Digit Dataset 1.0.10",
        licence="CC BY-SA 4.0",
        unpacked=40_000_000,
        archives=(
            Archive(
                RemoteFile(
                    "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/"
                    "d6938f9bf1545aa66d8489fc9f1385a7abd64282.zip",
                    "free-spoken-digit-dataset-1.0.10.zip",
                ),
                Limits(files=3_200, bytes=40_000_000),
                about=17_000_000,
                strip=1,
            ),
        ),
        contents=(
            ExpectedContents("recordings", 3_000, "8dd4cec632507842ba5923cf478bf1c132e7fea112a3b9bb34fcfd6a4da80b4d"),
        ),
        catalogue="{}/table.csv",
        finish=_table_of_digits,
    ),
)

SOURCES = {source.name: source for source in _ALL}
"""By name."""

_AUDIOSET_LISTS = "http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/"

ON_REQUEST = {
    "audioset": (
        "audioset cannot be fetched by asit: it is a list of segments of YouTube videos, whose sound is not given away "
        "with it",
        "four lists and your own copy of the clips, below one folder ROOT:\n"
        + "".join(
            f"      {_AUDIOSET_LISTS}{name}.csv\n"
            for name in [
                "balanced_train_segments",
                "unbalanced_train_segments",
                "eval_segments",
                "class_labels_indices",
            ]
        )
        + "      ROOT/.../VIDEOID.wav (or .flac, .mp3, .m4a ...), the 10 s of each segment, in any sub-folders",
        "put the lists into ROOT beside the clips, then: asit catalogue audioset ROOT --out audioset.jsonl "
        "(docs/tasks/audioset.md)",
    ),
    "voxceleb1": (
        "voxceleb1 cannot be fetched by asit: its owners ask each user to request it",
        "the recordings and the list of the identification task, below one folder ROOT:\n"
        "      request vox1_dev_wav (four parts) and vox1_test_wav.zip by the form at\n"
        "      https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html\n"
        "      join the parts: cat vox1_dev_wav_parta* > vox1_dev_wav.zip; unpack both into ROOT:\n"
        "      ROOT/wav/id10001/VIDEO/00001.wav\n"
        "      https://www.robots.ox.ac.uk/~vgg/data/voxceleb/meta/iden_split.txt goes to ROOT/iden_split.txt",
        "then: asit catalogue voxceleb1 ROOT --out voxceleb1.jsonl (docs/tasks/voxceleb1.md)",
    ),
}
"""Sets that only their owners may give away: found, expected and fix of the error that says so."""
