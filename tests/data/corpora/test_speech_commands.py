"""Speech Commands: the lists of version 0.02; the hash split, the twelve classes and the silence of version 0.01."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asit.data import corpora
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import check_splits, make_splits
from asit.data.corpora import speech_commands
from asit.data.corpora.speech_commands import SILENCE, UNKNOWN, split_of
from asit.errors import CatalogueError

Lay = Callable[..., None]

# Clips of the archives' own lists, those nearest to the bounds of 10 and 20 percent among them.
VALIDATION = ["yes/3bdf05d3_nohash_0.wav", "no/1942abd7_nohash_1.wav", "dog/3cc595de_nohash_4.wav"]
LEFT_OUT = ["yes/ffb86d3c_nohash_0.wav", "no/5f449e17_nohash_0.wav", "bed/b11a05d2_nohash_1.wav"]
TRAIN = ["yes/59fe87e6_nohash_0.wav", "no/b7669804_nohash_0.wav", "bed/3824c00e_nohash_0.wav"]

WORDS = {"yes": 3, "no": 3, "bed": 2, "dog": 1}
V1 = {"train": 5, "validation": 3, "test": 4}
V2 = {"train": 3, "validation": 3, "test": 3}
TESTS = [
    "_silence_/104.wav",
    "_unknown_/ffb86d3c_nohash_2.wav",
    "yes/ffb86d3c_nohash_1.wav",
    "no/5f449e17_nohash_0.wav",
]
NOISES = ["_background_noise_/dude_miaowing.wav", "_background_noise_/pink_noise.wav"]


def independent(name: str) -> str:
    """The rule in exact arithmetic."""
    speaker = re.sub(r"_nohash_.*$", "", name.split("/")[-1])
    rest = int.from_bytes(hashlib.sha1(speaker.encode()).digest(), "big") & (2**27 - 1)
    percent = Fraction(100 * rest, 2**27 - 1)
    return "validation" if percent < 10 else "test" if percent < 20 else "train"


@pytest.mark.parametrize(("names", "split"), [(VALIDATION, "validation"), (LEFT_OUT, "test"), (TRAIN, "train")])
def test_the_hash_gives_the_official_lists(names: list[str], split: str) -> None:
    assert [split_of(name) for name in names] == [split] * len(names)


@given(st.integers(0, 2**32 - 1))
def test_the_hash_in_exact_arithmetic(speaker: int) -> None:
    name = f"{speaker:08x}_nohash_0.wav"
    assert split_of(name) == split_of(f"yes/{name}") == split_of(f"no/{name[:-5]}7.wav") == independent(name)


def test_known_counts_add_up() -> None:
    assert sum(speech_commands.EXPECTED_V2.values()) == 105_829
    assert len(speech_commands.WORDS_V2) == 35
    assert len(speech_commands.WORDS_V1) == 30
    # 6,835 words are the hash's own testing part, and the six background recordings are in train.
    train, validation = (speech_commands.EXPECTED_V1[split] for split in ("train", "validation"))
    assert train - 6 + validation + 6_835 == 64_721


# version 0.01


TOP, TOP_OF_TESTS = "speech_commands_v0.01", "speech_commands_test_set_v0.01"


def v1(root: Path, lay: Lay, train: str = TOP, test: str = TOP_OF_TESTS) -> Path:
    lay(root / train, VALIDATION + LEFT_OUT + TRAIN)
    lay(root / train, NOISES, seconds=3.0)
    (root / train / "_background_noise_" / "README.md").write_text("noise")
    (root / train / "validation_list.txt").write_text("\n".join(VALIDATION))
    (root / train / "testing_list.txt").write_text("\r\n".join(LEFT_OUT))
    lay(root / test, TESTS)
    return root


def read_v1(root: Path, expected: dict[str, int] = V1, words: dict[str, int] = WORDS, **more: Any) -> corpora.Corpus:
    with mock.patch.multiple(speech_commands, EXPECTED_V1=expected, WORDS_V1=words):
        return speech_commands.read_v1(root, **more)


def test_twelve_classes(tmp_path: Path, lay: Lay) -> None:
    found = read_v1(v1(tmp_path, lay))
    rows = [(Path(row.path).relative_to(tmp_path).as_posix(), row.label, row.split, row.group) for row in found.rows()]
    top, tests = TOP + "/", TOP_OF_TESTS + "/"
    cut = [row for row in rows if row[1:3] == ("_silence_", "validation")]
    assert sorted(set(rows) - set(cut)) == sorted(
        [
            (top + "yes/3bdf05d3_nohash_0.wav", "yes", "validation", "3bdf05d3"),
            (top + "no/1942abd7_nohash_1.wav", "no", "validation", "1942abd7"),
            (top + "dog/3cc595de_nohash_4.wav", "_unknown_", "validation", "3cc595de"),
            (top + "yes/59fe87e6_nohash_0.wav", "yes", "train", "59fe87e6"),
            (top + "no/b7669804_nohash_0.wav", "no", "train", "b7669804"),
            (top + "bed/3824c00e_nohash_0.wav", "_unknown_", "train", "3824c00e"),
            (top + NOISES[0], "_silence_", "train", None),
            (top + NOISES[1], "_silence_", "train", None),
            (tests + "_silence_/104.wav", "_silence_", "test", None),
            (tests + "_unknown_/ffb86d3c_nohash_2.wav", "_unknown_", "test", "ffb86d3c"),
            (tests + "yes/ffb86d3c_nohash_1.wav", "yes", "test", "ffb86d3c"),
            (tests + "no/5f449e17_nohash_0.wav", "no", "test", "5f449e17"),
        ]
    )
    assert len(cut) == 1, "two clips of the ten words are in validation; a tenth, rounded up"
    assert found.classes == (
        *("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", "_unknown_", "_silence_"),
    )
    assert found.found == V1
    assert found.missing == 0
    assert found.notes == (
        "1 one-second parts of the background recordings are added to validation as _silence_, one for ten clips "
        "of the 10 words as in the test archive; seed 0",
    )


def test_silence_of_validation_is_fixed_and_inside_its_file(tmp_path: Path, lay: Lay) -> None:
    v1(tmp_path, lay)
    more = [f"up/3bdf05d3_nohash_{take}.wav" for take in range(398)]
    lay(tmp_path / "speech_commands_v0.01", more)

    def cuts(seed: int = 0) -> list[tuple[str, float, float]]:
        rows = read_v1(tmp_path, {**V1, "validation": 401}, {**WORDS, "up": 398}, seed=seed).rows()
        return [
            (row.path, row.start, row.end) for row in rows if row.label == "_silence_" and row.split == "validation"
        ]

    assert len(set(cuts())) == 40
    assert cuts() == cuts() != cuts(1)
    assert {Path(path).name for path, _, _ in cuts()} == {"dude_miaowing.wav", "pink_noise.wav"}
    assert all(0 <= start <= 2 and end == start + 1 for _, start, end in cuts())
    assert min(start for _, start, _ in cuts()) < 0.3
    assert max(start for _, start, _ in cuts()) > 1.7


@pytest.mark.parametrize(
    ("train", "test", "given"),
    [(TOP, TOP_OF_TESTS, "."), ("train", "test", "."), (TOP, TOP_OF_TESTS, TOP), ("a/b/train", "c/test", "a/b")],
)
def test_where_the_archives_may_lie(tmp_path: Path, lay: Lay, train: str, test: str, given: str) -> None:
    root, more = v1(tmp_path, lay, train, test) / given, {}
    if test == "c/test":
        with pytest.raises(CatalogueError, match=r"test archive .* is neither in .* nor beside [\s\S]*--test-root"):
            read_v1(root)
        more = {"test_root": tmp_path / test}
    found = read_v1(root, **more)
    assert found.root == str(tmp_path)
    assert len([*found.rows()]) == 13


def test_both_archives_in_one_folder(tmp_path: Path, lay: Lay) -> None:
    v1(tmp_path, lay, "all", "all")
    with pytest.raises(CatalogueError, match=r"both archives of version 0\.01 are unpacked into .*all"):
        read_v1(tmp_path / "all")


def test_version_one_incomplete(tmp_path: Path, lay: Lay) -> None:
    v1(tmp_path, lay)
    folder = tmp_path / "speech_commands_v0.01"
    for name in ("bed/3824c00e_nohash_0.wav", "bed/b11a05d2_nohash_1.wav", "dog/3cc595de_nohash_4.wav"):
        (folder / name).unlink()
    (tmp_path / "speech_commands_v0.01.tar.gz").write_bytes(b"")
    with pytest.raises(CatalogueError) as error:
        read_v1(tmp_path)
    said = str(error.value)
    assert "train 4 of 5 clips (1 missing); validation 2 of 3 clips (1 missing)" in said
    assert "missing: dog/3cc595de_nohash_4.wav, bed/b11a05d2_nohash_1.wav" in said
    assert "2 empty folders: bed, dog" in said
    assert "../speech_commands_v0.01.tar.gz" in said
    found = read_v1(tmp_path, incomplete=True)
    assert found.missing == 2
    assert found.found == {"train": 4, "validation": 2, "test": 4}


def test_a_list_that_the_hash_contradicts_is_reported(tmp_path: Path, lay: Lay) -> None:
    v1(tmp_path, lay)
    (tmp_path / "speech_commands_v0.01" / "validation_list.txt").write_text("\n".join([*VALIDATION, TRAIN[0]]))
    printed = read_v1(tmp_path).notes[0]
    assert (
        printed == f"1 clips of validation_list.txt are in another split by their hash: {TRAIN[0].removesuffix('.wav')}"
    )


def test_words_of_the_other_version(tmp_path: Path, lay: Lay) -> None:
    v1(tmp_path, lay)
    lay(tmp_path / "speech_commands_v0.01", ["visual/59fe87e6_nohash_0.wav"])
    with pytest.raises(CatalogueError, match="no class of speech-commands-v1: visual") as error:
        read_v1(tmp_path, incomplete=True)
    assert "asit catalogue speech-commands-v2" in str(error.value)
    lay(tmp_path / "speech_commands_test_set_v0.01", ["bed/59fe87e6_nohash_0.wav"])
    (tmp_path / "speech_commands_v0.01" / "visual" / "59fe87e6_nohash_0.wav").unlink()
    with pytest.raises(CatalogueError, match="no class of the test archive of speech-commands-v1: bed"):
        read_v1(tmp_path)


def test_version_one_from_the_command_line(tmp_path: Path, lay: Lay, catalogue: Any) -> None:
    root = v1(tmp_path / "a", lay, test="apart/tests")
    refused, _, made = catalogue("speech-commands-v1", root, "--test-root", str(root / "apart" / "tests"))
    assert "train 5 of 51,094 clips (51,089 missing)" in refused
    clips = [*made]
    assert Counter(zip(made.labels, made.texts("split"), strict=True)) == {
        **{("yes", "train"): 1, ("no", "train"): 1, ("_unknown_", "train"): 1, ("_silence_", "train"): 2},
        **{("yes", "validation"): 1, ("no", "validation"): 1, ("_unknown_", "validation"): 1},
        **{("_silence_", "validation"): 1, ("yes", "test"): 1, ("no", "test"): 1},
        **{("_unknown_", "test"): 1, ("_silence_", "test"): 1},
    }
    labels, splits = read_labels(made), make_splits(made)
    assert labels.names == ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", UNKNOWN, SILENCE)
    check_splits(labels, splits, made.column("group"))  # the recordings of silence are in two splits, and have no group
    assert [len(rows) for _, rows in splits.items()] == [5, 4, 4]
    [cut] = [clip for clip in clips if clip.label == "_silence_" and clip.split == "validation"]
    assert cut.seconds == pytest.approx(1.0)
    assert cut.start > 0
    assert {round(clip.seconds) for clip in clips if clip.label == "_silence_" and clip.split == "train"} == {3}


# version 0.02


def v2(root: Path, lay: Lay) -> Path:
    lay(root, VALIDATION + LEFT_OUT + TRAIN)
    lay(root, NOISES)
    (root / "validation_list.txt").write_text("\n".join(VALIDATION) + "\n")
    (root / "testing_list.txt").write_text("\ufeff" + "\r\n".join(LEFT_OUT) + "\r\n", encoding="utf-8", newline="")
    return root


def read_v2(root: Path, **more: Any) -> corpora.Corpus:
    with mock.patch.multiple(speech_commands, EXPECTED_V2=V2, WORDS_V2=WORDS):
        return speech_commands.read_v2(root, **more)


def test_version_two(tmp_path: Path, lay: Lay) -> None:
    found = read_v2(v2(tmp_path, lay))
    rows = [(Path(row.path).relative_to(tmp_path).as_posix(), row.label, row.split, row.group) for row in found.rows()]
    assert rows == sorted(
        (name, name.split("/")[0], split, re.split("[/_]", name)[1])
        for names, split in ((VALIDATION, "validation"), (LEFT_OUT, "test"), (TRAIN, "train"))
        for name in names
    )
    assert found.classes == ("bed", "dog", "no", "yes")
    assert (found.found, found.missing, found.notes) == (V2, 0, ())


def test_a_list_naming_a_clip_that_is_not_there(tmp_path: Path, lay: Lay) -> None:
    v2(tmp_path / "v2", lay)
    (tmp_path / "v2" / VALIDATION[0]).unlink()
    (tmp_path / "v2" / "happy").mkdir()
    with pytest.raises(CatalogueError) as error:
        read_v2(tmp_path)
    said = str(error.value)
    assert "validation 2 of 3 clips (1 missing); missing: yes/3bdf05d3_nohash_0.wav" in said
    assert "1 empty folders: happy" in said
    assert "missing: yes/3bdf05d3_nohash_0.wav" in read_v2(tmp_path, incomplete=True).notes[0]


def test_more_clips_than_there_are(tmp_path: Path, lay: Lay) -> None:
    lay(v2(tmp_path, lay), ["yes/59fe87e6_nohash_1.wav"])
    with pytest.raises(CatalogueError, match=r"train 4 of 3 clips \(1 too many\)"):
        read_v2(tmp_path)


def test_a_speaker_on_both_lists(tmp_path: Path, lay: Lay) -> None:
    v2(tmp_path, lay)
    lay(tmp_path, ["bed/3bdf05d3_nohash_1.wav"])
    with pytest.raises(CatalogueError, match=r"1 speakers are in more than one split: 3bdf05d3 \(train, validation\)"):
        read_v2(tmp_path, incomplete=True)
    (tmp_path / "testing_list.txt").write_text("bed/3bdf05d3_nohash_1.wav\n" + "\n".join(LEFT_OUT))
    with pytest.raises(CatalogueError, match=r"3bdf05d3 \(test, validation\)"):
        read_v2(tmp_path)
    (tmp_path / "testing_list.txt").write_text("\n".join([*LEFT_OUT, VALIDATION[0]]))
    with pytest.raises(CatalogueError, match=f"1 clips are on both lists: {VALIDATION[0].removesuffix('.wav')}"):
        read_v2(tmp_path)


def test_version_two_misread(tmp_path: Path, lay: Lay) -> None:
    v2(tmp_path, lay)
    (tmp_path / "testing_list.txt").write_text("\n".join([*LEFT_OUT, "nohash"]))
    with pytest.raises(CatalogueError, match="line 4: 'nohash' is not WORD/FILE"):
        read_v2(tmp_path)
    (tmp_path / "testing_list.txt").unlink()
    with pytest.raises(CatalogueError, match=r"has no testing_list\.txt and no validation_list\.txt"):
        read_v2(tmp_path)


def test_version_two_from_the_command_line(tmp_path: Path, lay: Lay, catalogue: Any) -> None:
    refused, _, made = catalogue("speech-commands-v2", v2(tmp_path / "v2", lay))
    assert "train 3 of 84,843 clips" in refused
    assert Counter(made.texts("split")) == {"train": 3, "validation": 3, "test": 3}
    assert len(made.header["classes"]) == 35
    assert "3824c00e" in set(made.texts("group"))
