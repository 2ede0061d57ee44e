"""ESC-50: its layout, its folds, and copies that are not whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from asit.config import FrontEndSettings
from asit.data import corpora
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.scan import build
from asit.data.catalogue.splits import check_splits, folds, make_splits
from asit.data.corpora import esc50
from asit.errors import CatalogueError

HEADER = "filename,fold,target,category,esc10,src_file,take"
SMALL = {f"fold {fold}": 2 for fold in range(1, 6)}
Lay = Callable[..., None]


def lines() -> list[str]:
    """Two classes, one clip in each of five folds; the first to come is not the first class."""
    out = []
    for fold in range(1, 6):
        for target, name in ((1, "rooster"), (0, "dog")):
            source = 1000 * fold + target
            out.append(f"{fold}-{source}-A-{target}.wav,{fold},{target},{name},True,{source},A")
    return out


def make(root: Path, lay: Lay, rows: list[str] | None = None, end: str = "\n", mark: str = "") -> Path:
    rows = lines() if rows is None else rows
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "esc50.csv").write_text(mark + end.join([HEADER, *rows]) + end, encoding="utf-8", newline="")
    lay(root, [f"audio/{row.split(',')[0]}" for row in rows])
    return root


def read(root: Path, **more: Any) -> corpora.Corpus:
    with mock.patch.multiple(esc50, EXPECTED=SMALL, CLASSES=2):
        return esc50.read(root, **more)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("given", ["ESC-50-master", "."])
def test_complete(tmp_path: Path, lay: Lay, end: str, mark: str, given: str) -> None:
    root = make(tmp_path / "ESC-50-master", lay, end=end, mark=mark)
    found = read(tmp_path / given)
    assert found.root == str(root)
    rows = [*found.rows()]
    assert [(Path(r.path).name, r.label, r.fold, r.group, r.split) for r in rows] == [
        (name, label, fold, source, None) for name, fold, _, label, _, source, _ in (row.split(",") for row in lines())
    ]
    assert all(Path(r.path).is_file() for r in rows)
    assert found.classes == ("dog", "rooster")
    assert found.found == SMALL == found.expected
    assert (found.missing, found.notes) == (0, ())
    assert found.header()["classes"] == ["dog", "rooster"]
    assert found.header()["task"] == "esc50"
    assert [*found.rows()] == rows, "rows can be read again"


def test_a_copy_in_flac_is_the_same_clip(tmp_path: Path, lay: Lay) -> None:
    root = make(tmp_path, lay)
    (root / "audio" / "1-1000-A-0.wav").unlink()
    lay(root, ["audio/1-1000-A-0.flac", "audio/1-1001-A-1.flac"])
    found = read(root)
    assert found.found == SMALL
    assert {Path(row.path).name for row in found.rows()} >= {"1-1000-A-0.flac", "1-1001-A-1.flac"}
    assert found.notes == ("1 files are a second copy of a clip and were left out: audio/1-1001-A-1.wav",)


def test_the_folds_serve_cross_validation(tmp_path: Path, lay: Lay) -> None:
    rows = [row.replace("2000,", "134049,").replace("3001,", "134049,") for row in lines()]
    found = read(make(tmp_path / "esc", lay, rows=rows))
    made = build(
        found.root,
        tmp_path / "c.jsonl",
        front_end=FrontEndSettings(mels=32),
        workers=1,
        statistics_clips=0,
        rows=found.rows(),
        facts=found.header(),
    )
    assert folds(made) == ["1", "2", "3", "4", "5"]
    for fold in folds(made):
        splits = make_splits(made, fold=fold)
        assert [len(rows) for _, rows in splits.items()] == [8, 0, 2]
        check_splits(read_labels(made), splits, made.column("group"))


def test_missing_clips_are_counted_and_named(tmp_path: Path, lay: Lay) -> None:
    root = make(tmp_path / "esc", lay)
    for name in ("1-1000-A-0.wav", "3-3001-A-1.wav", "3-3000-A-0.wav"):
        (root / "audio" / name).unlink()
    (tmp_path / "esc.zip").write_bytes(b"")
    (root / "audio" / "3-3001-A-1.wav.partial").write_bytes(b"")
    with pytest.raises(CatalogueError) as error:
        read(root)
    said = str(error.value)
    assert "fold 1 1 of 2 clips (1 missing); fold 3 0 of 2 clips (2 missing)" in said
    assert "missing: audio/1-1000-A-0.wav, audio/3-3001-A-1.wav, audio/3-3000-A-0.wav" in said
    assert "an unfinished download: audio/3-3001-A-1.wav.partial" in said
    assert "an archive, perhaps not completely unpacked: ../esc.zip" in said
    assert "--incomplete" in said
    found = read(root, incomplete=True)
    assert len([*found.rows()]) == 7
    assert found.missing == 3
    assert found.found == {"fold 1": 1, "fold 2": 2, "fold 4": 2, "fold 5": 2}
    assert "fold 3 0 of 2 clips (2 missing)" in found.notes[0]
    assert found.header()["corpus"]["missing"] == 3


def test_nothing_there_is_refused_even_as_incomplete(tmp_path: Path, lay: Lay) -> None:
    root = make(tmp_path, lay)
    for path in (root / "audio").iterdir():
        path.unlink()
    with pytest.raises(CatalogueError, match="1 empty folders: audio") as error:
        read(root, incomplete=True)
    assert "--incomplete" not in str(error.value)


def test_the_four_official_exceptions_are_groups_by_class(tmp_path: Path, lay: Lay) -> None:
    # Officially 3-134049-A-1.wav is a rooster and 2-134049-A-6.wav, of the same source, a hen.
    rows = [row.replace("2000,", "134049,").replace("3001,", "134049,") for row in lines()]
    found = read(make(tmp_path, lay, rows=rows))
    assert {row.group for row in found.rows() if "134049" in str(row.group)} == {"134049 dog", "134049 rooster"}
    assert found.notes == (
        "1 source recordings are officially in two folds under two classes: 134049; each is a group for each class",
    )
    within = [row.replace("2000,", "134049,").replace("3000,", "134049,") for row in lines()]
    with pytest.raises(CatalogueError, match="134049 dog"):
        read(make(tmp_path / "again", lay, rows=within))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:8], r"fold 5 0 of 2 clips \(2 missing\)"),
        (
            lambda rows: [row.replace(",2001,", ",1001,") for row in rows],
            r"1 source recordings are in more than one fold: 1001 \(folds 1, 2\)",
        ),
        (lambda rows: [*rows, rows[0]], "line 12: 1-1001-A-1.wav is listed twice"),
        (lambda rows: ["x.wav,6,0,dog,True,9,A", *rows], "line 2: target '0', fold '6'"),
        (lambda rows: ["x.wav,1,7,dog,True,9,A", *rows], "line 4: dog has two targets"),
        (lambda rows: ["x.wav,1,0", *rows], "line 2: 3 cells under 7 columns"),
        (lambda rows: [row.replace(",1,rooster", ",4,rooster") for row in rows], "none with target 1"),
    ],
)
def test_a_damaged_list(tmp_path: Path, lay: Lay, change: Callable[[list[str]], list[str]], said: str) -> None:
    with pytest.raises(CatalogueError, match=said):
        read(make(tmp_path, lay, rows=change(lines())))


def test_another_folder_is_reported_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "ESC-50-master.zip").write_bytes(b"")
    with pytest.raises(CatalogueError) as error:
        esc50.read(tmp_path)
    assert "has no meta/esc50.csv and no audio; it holds ESC-50-master.zip" in str(error.value)
    assert "not completely unpacked" in str(error.value)
    with pytest.raises(CatalogueError, match="is an archive"):
        esc50.read(tmp_path / "ESC-50-master.zip")
    with pytest.raises(CatalogueError, match="there is no folder"):
        esc50.read(tmp_path / "nowhere")


def test_from_the_command_line(tmp_path: Path, lay: Lay, catalogue: Any) -> None:
    root = tmp_path / "ESC-50-master"
    full = [
        f"{fold}-{100 * target + 10 * fold + take}-A-{target}.wav,{fold},{target},class {target},False,"
        f"{100 * target + 10 * fold + take},A"
        for target in range(50)
        for fold in range(1, 6)
        for take in range(8)
    ]
    make(root, lay, rows=full[:0])
    (root / "meta" / "esc50.csv").write_text("\n".join([HEADER, *full]))
    lay(root, [f"audio/{row.split(',')[0]}" for row in full[::40]])
    refused, printed, made = catalogue("esc50", root)
    assert "fold 1 50 of 400 clips (350 missing)" in refused
    assert "fold 1         50 of       400" in printed
    assert list(made.labels) == [f"class {target}" for target in range(50)]
    assert set(made.texts("fold")) == {"1"}
    assert made.texts("group")[3] == "310"
    assert made.header["classes"] == [f"class {target}" for target in range(50)]
    assert made.header["corpus"]["found"] == {"fold 1": 50}
    assert made.header["corpus"]["missing"] == 1950
