"""Data sets of `asit download`: addresses, published sizes and checksums, and what they must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from asit.io.csv_lines import write_csv


@dataclass(frozen=True)
class Archive:
    """One archive of a set.

    Attributes:
        url: http or https.
        name: of the file on this machine.
        size: bytes; roughly, where no checksum is published.
        unpacked: bytes that it unpacks to, roughly.
        recordings: number of files that `sounds` matches, hidden ones left out.
        sha256: hexadecimal; None where nothing is published.
        folder: where it goes, below the set's folder; "": the folder itself.
        strip: leading folders inside it that are left out.
        sounds: pattern of the recordings below `folder`.
        digest: SHA-256 of the lines "MD5  name" of the recordings in the order of their names; for archives without a
            published checksum. It finds damage and other versions; it does not protect against forgery.
    """

    url: str
    name: str
    size: int
    unpacked: int
    recordings: int
    sha256: str | None = None
    folder: str = ""
    strip: int = 0
    sounds: str = "**/*.wav"
    digest: str | None = None


@dataclass(frozen=True)
class DownloadSource:
    """A data set that may be fetched.

    Attributes:
        name: as `asit download` takes it.
        title, licence: for people.
        archives: see these.
        catalogue: source of the next command, `asit catalogue ...`, with {} for the folder.
        finish: last step on the unpacked folder: a file that is derived.
    """

    name: str
    title: str
    licence: str
    archives: tuple[Archive, ...]
    catalogue: str
    finish: Callable[[Path], None] | None = None


def _table_of_digits(folder: Path) -> None:
    """Write table.csv: path, label (the digit) and group (the speaker) from the names, such as 7_jackson_32.wav."""
    rows = [
        (f"recordings/{path.name}", *path.stem.split("_")[:2]) for path in sorted((folder / "recordings").glob("*.wav"))
    ]
    write_csv(folder / "table.csv", [("path", "label", "group"), *rows])


_GITHUB = "https://github.com/"
_GOOGLE = "https://storage.googleapis.com/download.tensorflow.org/data/"

_ALL = (
    # GitHub packs archives when asked and promises no fixed bytes (three MD5s of this one are in public code), so
    # commits are fixed and the recordings' own digest is compared. That of ESC-50 is made of the MD5s in the index of
    # the package soundata 0.1.3; that of the digits of the files of the commit itself.
    DownloadSource(
        name="esc50",
        title="ESC-50",
        licence="CC BY-NC 3.0, each recording with a licence of its own (LICENSE)",
        archives=(
            Archive(
                url=_GITHUB + "karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip",
                name="ESC-50.zip",
                size=650_000_000,
                unpacked=890_000_000,
                recordings=2_000,
                strip=1,
                sounds="audio/*.wav",
                digest="7dac98ebb302b554321c1ceacd9ab75bb0769516f66d19b4f3a6a6874355c2f2",
            ),
        ),
        catalogue="esc50 {}",
    ),
    # Sizes and SHA-256: dataset_infos.json of `superb` in Hugging Face datasets (V1 and its test set) and
    # url_checksums/speech_commands.txt of TensorFlow Datasets (V2); torchaudio has the same SHA-256 of V1 and V2.
    # Counts: 64,721 and 105,829 words (the data set's paper, arXiv:1804.03209), 6 background recordings each.
    DownloadSource(
        name="speech-commands-v1",
        title="Speech Commands V1 with its test set",
        licence="CC BY 4.0",
        archives=(
            Archive(
                url=_GOOGLE + "speech_commands_v0.01.tar.gz",
                name="speech_commands_v0.01.tar.gz",
                size=1_489_096_277,
                unpacked=2_200_000_000,
                recordings=64_727,
                sha256="743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d",
                folder="speech_commands_v0.01",
            ),
            Archive(
                url=_GOOGLE + "speech_commands_test_set_v0.01.tar.gz",
                name="speech_commands_test_set_v0.01.tar.gz",
                size=71_271_436,
                unpacked=120_000_000,
                recordings=3_081,
                sha256="baa084f6b62c91de660ff0588ae4dfc4e4d534aa99ac0e5f406cba75836cbd00",
                folder="speech_commands_test_set_v0.01",
            ),
        ),
        catalogue="speech-commands-v1 {}",
    ),
    DownloadSource(
        name="speech-commands-v2",
        title="Speech Commands V2",
        licence="CC BY 4.0",
        archives=(
            Archive(
                url=_GOOGLE + "speech_commands_v0.02.tar.gz",
                name="speech_commands_v0.02.tar.gz",
                size=2_428_923_189,
                unpacked=3_800_000_000,
                recordings=105_835,
                sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
            ),
        ),
        catalogue="speech-commands-v2 {}",
    ),
    DownloadSource(
        name="free-spoken-digit",
        title="Free Spoken Digit Dataset 1.0.10",
        licence="CC BY-SA 4.0",
        archives=(
            Archive(
                url=_GITHUB
                + "Jakobovski/free-spoken-digit-dataset/archive/d6938f9bf1545aa66d8489fc9f1385a7abd64282.zip",
                name="free-spoken-digit-dataset-1.0.10.zip",
                size=17_000_000,
                unpacked=40_000_000,
                recordings=3_000,
                strip=1,
                sounds="recordings/*.wav",
                digest="8dd4cec632507842ba5923cf478bf1c132e7fea112a3b9bb34fcfd6a4da80b4d",
            ),
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
