"""VoxCeleb1: the list of the identification split, and the layouts that the archives give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from asit.data import corpora
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import check_splits, make_splits
from asit.data.corpora import voxceleb1
from asit.errors import CatalogueError

Lay = Callable[..., None]

LIST = """3 id10003/na8-QEFmj44/00003.wav
1 id10003/tCq2LcKO6xY/00002.wav
1 id10001/-_xyzabcdef/00001.wav
2 id10001/Y8hIVOBuels/00001.wav
3 id10001/1zcIwhmdeo4/00001.wav
1 id10002/0_laIeN-Q44/00012.wav
"""
CLIPS = [line.split()[1] for line in LIST.splitlines()]
SMALL = {"train": 3, "validation": 1, "test": 2}


def make(root: Path, lay: Lay, where: Callable[[str], str] = "wav/{}".format, text: str = LIST) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "iden_split.txt").write_text(text, encoding="utf-8", newline="")
    lay(root, [where(clip) for clip in CLIPS])
    return root


def read(root: Path, **more: Any) -> corpora.Corpus:
    with mock.patch.multiple(voxceleb1, EXPECTED=SMALL, SPEAKERS=3):
        return voxceleb1.read(root, **more)


def halves(clip: str) -> str:
    return ("test/wav/" if clip.startswith("id10001") else "dev/wav/") + clip


@pytest.mark.parametrize("where", ["wav/{}".format, halves, "{}".format, "vox1_dev_wav/wav/{}".format])
@pytest.mark.parametrize("text", [LIST, "\ufeff" + LIST.replace("\n", "\r\n") + "\r\n"])
def test_complete(tmp_path: Path, lay: Lay, where: Callable[[str], str], text: str) -> None:
    found = read(make(tmp_path, lay, where, text))
    rows = [*found.rows()]
    assert [Path(row.path).relative_to(tmp_path).as_posix() for row in rows] == [where(clip) for clip in CLIPS]
    assert [row.split for row in rows] == ["test", "train", "train", "validation", "test", "train"]
    assert [row.label for row in rows] == ["id10003"] * 2 + ["id10001"] * 3 + ["id10002"]
    assert {row.group for row in rows} == {None}
    assert found.classes == ("id10001", "id10002", "id10003")
    assert found.header()["shared_groups"] is True
    assert (found.found, found.missing, found.notes) == (SMALL, 0, ())


def test_missing_utterances_and_speakers(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay, halves)
    for path in (tmp_path / "test").rglob("*.wav"):
        path.unlink()
    (tmp_path / "vox1_test_wav.zip").write_bytes(b"")
    with pytest.raises(CatalogueError) as error:
        read(tmp_path)
    said = str(error.value)
    assert "train 2 of 3 clips (1 missing); validation 0 of 1 clips (1 missing); test 1 of 2 clips (1 missing)" in said
    assert "missing: id10001/-_xyzabcdef/00001.wav, id10001/Y8hIVOBuels/00001.wav" in said
    assert "1 of 3 speakers have no recording: id10001" in said
    assert "perhaps not completely unpacked: vox1_test_wav.zip" in said
    found = read(tmp_path, incomplete=True)
    assert found.missing == 3
    assert found.classes == ("id10001", "id10002", "id10003"), "the order is that of the whole list"
    assert len([*found.rows()]) == 3


def test_files_that_are_not_listed_and_second_copies(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    lay(tmp_path, ["wav/id10009/zzzzzzzzzzz/00001.wav", "wav/noise.wav", f"copy/{CLIPS[0]}"])
    found = read(tmp_path)
    assert found.found == SMALL
    assert found.notes == (
        f"1 files are a second copy of a clip and were left out: wav/{CLIPS[0]}",
        "1 recordings are not in iden_split.txt and were left out",
    )


def test_trial_lists_stand_in_the_header(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    (tmp_path / "lists").mkdir()
    for name in ("veri_test2.txt", "list_test_hard.txt", "readme.txt"):
        (tmp_path / "lists" / name).write_text("")
    assert read(tmp_path).header()["trials"] == ["lists/list_test_hard.txt", "lists/veri_test2.txt"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LIST + "4 id10002/0_laIeN-Q44/00013.wav\n", "line 7: '4 id10002/0_laIeN-Q44/00013.wav' is not like"),
        (LIST + "id10002/0_laIeN-Q44/00013.wav\n", "line 7: "),
        (LIST + "1 id10002/00013.wav\n", "line 7: "),
        (LIST + "3 id10002/0_laIeN-Q44/00012.wav\n", "line 7: id10002/0_laIeN-Q44/00012.wav is listed twice"),
        (LIST[: LIST.rindex("1 id10002")], "train 2 of 3 clips (1 missing); the list names 2 speakers of 3"),
    ],
)
def test_a_damaged_list(tmp_path: Path, lay: Lay, text: str, said: str) -> None:
    with pytest.raises(CatalogueError) as error:
        read(make(tmp_path, lay, text=text))
    assert said in str(error.value)


def test_without_the_list(tmp_path: Path, lay: Lay) -> None:
    make(tmp_path, lay)
    (tmp_path / "iden_split.txt").unlink()
    with pytest.raises(CatalogueError, match=r"has no iden_split\.txt; it holds 6 recordings named idXXXXX"):
        read(tmp_path)


def test_from_the_command_line(tmp_path: Path, lay: Lay, catalogue: Any) -> None:
    refused, _, made = catalogue("voxceleb1", make(tmp_path / "vox", lay))
    assert "train 3 of 138,361 clips (138,358 missing)" in refused
    assert made.header["shared_groups"] is True
    assert made.header["classes"] == ["id10001", "id10002", "id10003"]
    splits = make_splits(made)
    check_splits(read_labels(made), splits, made.column("group"), allow_shared_groups=made.header["shared_groups"])
    assert [len(rows) for _, rows in splits.items()] == [3, 1, 2]
    assert list(made.texts("split")) == ["test", "train", "train", "validation", "test", "train"]
