"""AudioSet: lists, names of files, labels, and what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from asit.data import corpora
from asit.data.catalogue.labels import read_labels
from asit.data.corpora import audioset
from asit.errors import CatalogueError

Lay = Callable[..., None]

INDEX = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/m/0bt9lr,"Dog"
3,/t/dd00088,"Gush"
"""
BALANCED = (
    "# Segments csv created Sun Mar  5 10:54:31 2017\n"
    "# num_ytids=4, num_segs=4, num_unique_labels=4, num_positive_labels=6\n"
    "# YTID, start_seconds, end_seconds, positive_labels\n"
    '-0xzrMun0Rs, 30.000, 40.000, "/m/0bt9lr,/m/09x0r"\n'
    '_-abcdefghi, 0.000, 7.000, "/t/dd00088"\n'
    'Yabcdefghij, 239.800, 249.800, "/m/05zppz"\n'
    '--PJHxphWEs, 5.000, 15.000, "/m/09x0r,/t/dd00088"\n'
)
UNBALANCED = (
    '# num_ytids=2, num_segs=2\nabcdefghij_, 30.000, 40.000, "/m/09x0r"\nid_bcdefgh-, 0.000, 10.000, "/m/0bt9lr"\n'
)
TEST = (
    "# num_ytids=2, num_segs=2\n"
    '-_---------, 420.000, 430.000, "/m/0bt9lr,/m/09x0r"\n'
    '0123456789a, 10.000, 20.000, "/m/09x0r"\n'
)
SMALL = {"balanced": 4, "unbalanced": 2, "test": 2}
FILES = {
    "-0xzrMun0Rs": "balanced_train_segments/-0xzrMun0Rs.wav",
    "_-abcdefghi": "balanced_train_segments/Y_-abcdefghi.wav",
    "Yabcdefghij": "balanced_train_segments/Yabcdefghij_239.wav",
    "--PJHxphWEs": "balanced_train_segments/--PJHxphWEs_5000_15000.flac",
    "abcdefghij_": "unbalanced_train_segments/unbalanced_train_segments_part00/Yabcdefghij__30.000_40.000.wav",
    "id_bcdefgh-": "unbalanced_train_segments/unbalanced_train_segments_part01/id_bcdefgh-.wav",
    "-_---------": "eval_segments/id_-_---------_420.000_430.000.ogg",
    "0123456789a": "eval_segments/0123456789a_10-20.mp3",
}


def make(root: Path, lay: Lay, leave: tuple[str, ...] = (), end: str = "\n", mark: str = "") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    texts = {
        "class_labels_indices.csv": INDEX,
        "balanced_train_segments.csv": BALANCED,
        "unbalanced_train_segments.csv": UNBALANCED,
        "eval_segments.csv": TEST,
    }
    for name, text in texts.items():
        (root / name).write_text(mark + text.replace("\n", end), encoding="utf-8", newline="")
    lay(root, [path for video, path in FILES.items() if video not in leave])
    return root


def read(root: Path, **more: Any) -> corpora.Corpus:
    with mock.patch.multiple(audioset, EXPECTED=SMALL, CLASSES=4):
        return audioset.read(root, **more)


def paths(found: corpora.Corpus) -> list[str]:
    return [Path(row.path).relative_to(found.root).as_posix() for row in found.rows()]


@pytest.mark.parametrize(("end", "mark"), [("\n", ""), ("\r\n", "\ufeff")])
def test_each_name_leads_to_its_video(tmp_path: Path, lay: Lay, end: str, mark: str) -> None:
    found = read(make(tmp_path, lay, end=end, mark=mark))
    assert paths(found) == [*FILES.values()]
    assert [row.split for row in found.rows()] == ["balanced"] * 4 + ["unbalanced"] * 2 + ["test"] * 2
    assert [row.label for row in found.rows()] == [
        "Speech;Dog",  # in the official order, not the line's
        "Gush",
        "Male speech, man speaking",
        "Speech;Gush",
        "Speech",
        "Dog",
        "Speech;Dog",
        "Speech",
    ]
    assert {row.group for row in found.rows()} == {None}
    assert found.classes == ("Speech", "Male speech, man speaking", "Dog", "Gush")
    assert found.found == SMALL
    assert (found.missing, found.notes) == (0, ())


@pytest.mark.parametrize(
    "name",
    [
        "-0xzrMun0Rs.wav",
        "Y-0xzrMun0Rs.wav",
        "id_-0xzrMun0Rs.wav",
        "-0xzrMun0Rs_30.wav",
        "-0xzrMun0Rs_30.000.wav",
        "-0xzrMun0Rs_30000.wav",
        "Y-0xzrMun0Rs_30_40.flac",
        "Y-0xzrMun0Rs_30.000_40.000.wav",
        "-0xzrMun0Rs_30000_40000.WAV",
        "-0xzrMun0Rs_30-40.mp3",
        "audio/bal_train/deep/-0xzrMun0Rs.ogg",
        *("Y-0xzrMun0Rs.m4a", "Y-0xzrMun0Rs.opus", "Y-0xzrMun0Rs.webm"),
    ],
)
def test_naming_styles(tmp_path: Path, lay: Lay, name: str) -> None:
    make(tmp_path, lay, leave=("-0xzrMun0Rs",))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"")  # files are listed, not opened
    assert paths(read(tmp_path))[0] == name


def test_a_video_that_begins_with_y_is_not_cut(tmp_path: Path, lay: Lay) -> None:
    # Both "Yabcdefghij" and "abcdefghij_" are listed; only the length and what follows tell them apart.
    make(tmp_path, lay, leave=("Yabcdefghij", "abcdefghij_"))
    lay(tmp_path, ["YYabcdefghij.wav", "Yabcdefghij_.wav"])
    at = {path: row.label for path, row in zip(paths(read(tmp_path)), read(tmp_path).rows(), strict=True)}
    assert at["YYabcdefghij.wav"] == "Male speech, man speaking"
    assert at["Yabcdefghij_.wav"] == "Speech"


def test_two_files_of_one_video_are_reported(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    lay(tmp_path, ["more/-0xzrMun0Rs.flac", "more/Y-0xzrMun0Rs_30.wav"])
    found = read(tmp_path)
    assert paths(found) == [*FILES.values()]
    assert found.notes == (
        "2 files are a second copy of a clip and were left out: more/-0xzrMun0Rs.flac, more/Y-0xzrMun0Rs_30.wav",
    )


def test_another_part_of_the_video_is_not_the_clip(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay, leave=("-0xzrMun0Rs",))
    lay(tmp_path, ["-0xzrMun0Rs_130.000.wav", "music.wav"])
    found = read(tmp_path)
    assert found.missing == 1
    assert found.found == {**SMALL, "balanced": 3}
    assert found.notes == (
        "1 files have another start in their name than in the lists and were left out: -0xzrMun0Rs_130.000.wav",
        "1 recordings are in none of the lists and were left out",
        "1 of 8 segments have no clip: -0xzrMun0Rs",
    )
    assert "3 of         4" in found.table()


def test_too_many_missing(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay, leave=("-0xzrMun0Rs", "_-abcdefghi"))
    (tmp_path / "unbalanced_train_segments_part02").mkdir()
    (tmp_path / "eval_segments.zip.part").write_bytes(b"")
    with pytest.raises(CatalogueError) as error:
        read(tmp_path)
    said = str(error.value)
    assert "balanced 2 of 4 clips (50.0% missing); unbalanced 2 of 2 clips (0.0% missing)" in said
    assert "no clip of -0xzrMun0Rs, _-abcdefghi" in said
    assert "at most 30% missing" in said
    assert "an unfinished download: eval_segments.zip.part" in said
    assert "1 empty folders: unbalanced_train_segments_part02" in said
    assert read(tmp_path, most_missing=0.5).missing == 2
    assert read(tmp_path, incomplete=True).missing == 2
    with pytest.raises(CatalogueError, match=r"most_missing is 1\.5"):
        read(tmp_path, most_missing=1.5)


def test_a_split_without_any_clip(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay, leave=("abcdefghij_", "id_bcdefgh-"))
    with pytest.raises(CatalogueError, match=r"unbalanced 0 of 2 clips \(100.0% missing\)"):
        read(tmp_path, most_missing=1.0)
    assert read(tmp_path, incomplete=True).found["unbalanced"] == 0
    with pytest.raises(CatalogueError, match="test 0 of 2") as error:
        read(make(tmp_path / "bare", lambda *_: None), incomplete=True)
    assert "--incomplete" not in str(error.value)


def test_without_a_list(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    (tmp_path / "unbalanced_train_segments.csv").unlink()
    with pytest.raises(CatalogueError, match=r"has no unbalanced_train_segments\.csv; it holds 8 recordings") as error:
        read(tmp_path)
    assert "--incomplete" in str(error.value)
    found = read(tmp_path, incomplete=True)
    assert found.found == {"balanced": 4, "unbalanced": 0, "test": 2}
    assert found.notes[0] == "there is no unbalanced_train_segments.csv: its split is left out"
    assert len([*found.rows()]) == 6
    (tmp_path / "class_labels_indices.csv").unlink()
    with pytest.raises(CatalogueError, match=r"no class_labels_indices\.csv") as error:
        read(tmp_path, incomplete=True)
    assert "--incomplete" not in str(error.value)


def test_a_list_cut_short(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    cut = BALANCED[: BALANCED.rindex("--PJ")]
    (tmp_path / "balanced_train_segments.csv").write_text(cut)
    said = r"balanced_train_segments\.csv holds 3 of 4 segments, and its header says 4"
    with pytest.raises(CatalogueError, match=said):
        read(tmp_path)
    assert "holds 3 of 4 segments" in read(tmp_path, incomplete=True).notes[0]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("class_labels_indices.csv", "2,/m/0bt9lr", "3,/m/0bt9lr", "line 4: index 3 where 2 should come"),
        ("class_labels_indices.csv", '"Dog"', '"Dog;Cat"', "line 4: 'Dog;Cat' cannot be a label"),
        ("class_labels_indices.csv", '"Dog"', '"Dog:0.5"', "line 4: 'Dog:0.5' cannot be a label"),
        ("class_labels_indices.csv", '"Dog"', '"Speech"', "line 4: /m/0bt9lr, Speech is listed twice"),
        ("class_labels_indices.csv", '3,/t/dd00088,"Gush"\n', "", "has 3 classes"),
        ("class_labels_indices.csv", "display_name", "name", "no column display_name"),
        ("eval_segments.csv", "/m/0bt9lr", "/m/nothing", "use 1 labels that class_labels_indices.csv does not have"),
        ("eval_segments.csv", "0123456789a", "0123456789", "segment 2: '0123456789,10.000,20.000,/m/09x0r' is not"),
        ("eval_segments.csv", "10.000", "ten", "segment 2: '0123456789a,ten,"),
        ("eval_segments.csv", ', "/m/09x0r"', "", "segment 2: '0123456789a,10.000,20.000' is not VIDEO"),
    ],
)
def test_damaged_lists(tmp_path: Path, lay: Lay, name: str, old: str, new: str, said: str) -> None:
    make(tmp_path, lay)
    text = (tmp_path / name).read_text()
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(CatalogueError) as error:
        read(tmp_path)
    assert said in str(error.value)


def test_two_copies_of_a_list(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "eval_segments.csv").write_text(TEST)
    assert read(tmp_path).found == SMALL
    (tmp_path / "csv" / "eval_segments.csv").write_text(TEST + "\n")
    with pytest.raises(CatalogueError, match=r"holds 2 different eval_segments\.csv"):
        read(tmp_path)


def test_a_video_listed_twice_gets_one_clip(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    (tmp_path / "unbalanced_train_segments.csv").write_text(UNBALANCED.replace("abcdefghij_", "-0xzrMun0Rs"))
    found = read(tmp_path, incomplete=True)
    assert paths(found).count(FILES["-0xzrMun0Rs"]) == 1
    assert "1 segments are of a video that is listed before; they get no clip" in found.notes


def test_from_the_command_line(tmp_path: Path, lay: Lay, catalogue: Any) -> None:
    root = make(tmp_path / "audioset", lay, leave=("0123456789a",))
    more = "".join(f'{i},/m/x{i},"class, {i}"\n' for i in range(4, 527))
    (root / "class_labels_indices.csv").write_text(INDEX + more)
    lay(root, ["0123456789a.wav"], silent=True)
    refused, _, made = catalogue("audioset", root)
    assert "balanced_train_segments.csv holds 4 of 22,160 segments" in refused
    names = [Path(clip.path).relative_to(root).as_posix() for clip in made]
    assert names == [*[*FILES.values()][:7], "0123456789a.wav"]
    assert made.texts("split")[-1] == "test", "a silent clip of the test set is scored like any other"
    assert made.labels[0] == "Speech;Dog"
    assert len(made.header["classes"]) == 527
    labels = read_labels(made)
    assert labels.multi
    assert labels.matrix([0])[0].nonzero()[0].tolist() == [0, 2]
    assert labels.matrix([2])[0].nonzero()[0].tolist() == [1], "'Male speech, man speaking' is one name"
    assert made.header["corpus"]["found"] == {"balanced": 4, "unbalanced": 2, "test": 2}
