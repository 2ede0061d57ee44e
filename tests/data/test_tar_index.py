"""Sidecars in tars: which label belongs to which recording, and what is refused instead of guessed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from archives import write_tar

from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.shards import tar_index
from asit.errors import CatalogueError


def write(path: Path, members: list[tuple[str, Any]]) -> Path:
    """A tar; a member without content is a recording, one that is no text is JSON."""
    sound = io.BytesIO()
    soundfile.write(sound, np.random.default_rng(0).uniform(-0.1, 0.1, 800), 16000, format="WAV")
    texts = [(name, content if isinstance(content, str) else json.dumps(content)) for name, content in members]
    given = [(name, text.encode() if text != "null" else sound.getvalue()) for name, text in texts]
    return write_tar(path, given, "w")


def build(tmp_path: Path, *members: tuple[str, Any]) -> Catalogue:
    path = write(tmp_path / "s.tar", list(members))
    return tar_index.build([str(path)], FrontEndSettings(), statistics_clips=0)


def labels(made: Catalogue) -> dict[str, str | None]:
    return {clip.path.rpartition("s.tar/")[2]: clip.label for clip in made}


def test_each_recording_has_its_own_label(tmp_path: Path) -> None:
    made = build(
        tmp_path,
        *(("a.2024-01.wav", None), ("a.2024-01.cls", "dog"), ("a.2024-02.wav", None), ("a.2024-02.cls", "cat\n")),
        *(("b.wav", None), ("b.cls", "1.0"), ("in/b.wav", None), ("in/b.cls", "e\u0301")),
        *(("c.first.wav", None), ("c.cls", "of the key"), ("d.wav", None), ("d.label.cls", "by the key")),
        *(("e.wav", None), ("e.flac", None), ("e.cls", "both")),
        *(("f.wav", None), ("f.cls", "same "), ("f.json", {"label": "same"}), ("g.wav", None)),
        *(("._g.cls", "fork"), ("._g.json", "\x00fork")),
    )
    assert labels(made) == {
        **{"a.2024-01.wav": "dog", "a.2024-02.wav": "cat", "b.wav": "1", "in/b.wav": "é"},
        **{"c.first.wav": "of the key", "d.wav": "by the key", "e.wav": "both", "e.flac": "both", "f.wav": "same"},
        "g.wav": None,
    }


def test_a_tar_cut_off_in_a_sidecar_keeps_its_recordings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "s.tar", [("a.wav", None), ("a.cls", "dog"), ("b.wav", None), ("b.cls", "c" * 2000)])
    with tarfile.open(path) as archive:
        end = archive.getmember("b.cls").offset_data + 700
    path.write_bytes(path.read_bytes()[:end])
    made = tar_index.build([str(path)], FrontEndSettings(), bad_files=0.5, statistics_clips=0)
    assert labels(made) == {"a.wav": "dog", "b.wav": None}
    assert "b.cls: cut off" in caplog.text


def test_what_json_beside_a_recording_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = {"label": ["dog", 1.0, None], "split": " Test ", "fold": 1.0, "group": "x\u00a0y", "other": {"a": 1}}
    made = build(
        tmp_path,
        *(("a.wav", None), ("a.json", said), ("b.wav", None), ("b.json", '{"label": NaN}')),
        *(("c.wav", None), ("c.json", {"label": {"dog": 0.5}}), ("d.wav", None), ("d.json", "[1]")),
        *(("e.wav", None), ("e.json", "{broken"), ("f.wav", None), ("f.json", {"label": "cat", "group": [1]})),
    )
    assert [clip.label for clip in made] == ["dog;1", None, "dog:0.5", None, None, "cat"]
    assert (made[0].split, made[0].fold, made[0].group) == ("Test", "1", "x y")
    assert [message.rpartition("s.tar: ")[2][:50] for message in caplog.messages] == [
        "2 sidecars are damaged, the first e.json: it is no"
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            ["a.1.wav", "a.2.wav", ("a.cls", "x")],
            r"2 recordings have the key 'a'(.|\n)*a\.2\.wav; and a\.cls",
        ),
        ([("in/a.cls", "x"), "in/a.1.wav", "in/a.2.wav", ("in/a.1.cls", "y")], "the key 'in/a'"),
        (["a.wav", ("a.cls", "3"), ("a.json", {"label": "dog"})], "a.json says the label of a.wav is 'dog', another"),
        (["a.wav", "a.wav"], "holds 1 names twice: a.wav"),
        (["a.wav", ("a.cls", "x"), ("a.cls", "y")], "holds 1 names twice: a.cls"),
    ],
)
def test_keys_that_several_recordings_share(
    tmp_path: Path, members: list[Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = [(name, None) if isinstance(name, str) else name for name in members]
    with pytest.raises(CatalogueError, match=message):
        build(tmp_path, *given)
    # Pretraining needs no labels, and goes on without them.
    made = tar_index.build([str(tmp_path / "s.tar")], FrontEndSettings(), labelled=False, statistics_clips=0)
    assert len(made) == len([name for name, content in given if content is None])
    assert made.column("label") is None
    assert "labels, splits, folds and groups are not taken over" in caplog.text


def test_one_bad_tar_does_not_take_the_others_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = write(tmp_path / "a.tar", [(f"{i}.wav", None) for i in range(12)])
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    made = tar_index.build([str(good), str(tmp_path / "b.tar")], FrontEndSettings(), statistics_clips=0)
    assert len(made) == 12
    assert made.header["skipped"] == {"unreadable": 1}
    assert "b.tar is left out with all its recordings" in caplog.text
    with pytest.raises(CatalogueError, match="no tar file"):
        tar_index.build([str(tmp_path / "b.tar")], FrontEndSettings(), statistics_clips=0)


def test_labels_of_sidecars_and_what_is_wrong_with_a_tar(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = [
        ("x/1.wav", None),
        ("x/1.cls", "dog\n"),
        ("2.wav", None),
        ("2.json", {"label": "cat"}),
        ("3.wav", None),
    ]
    members += [("3.json", "no json"), ("3.png", "1"), ("._4.wav", "1"), ("5.wav", "no sound")]
    tar = write(tmp_path / "a.tar", members)
    made = tar_index.build([str(tar)], FrontEndSettings(), bad_files=0.5, statistics_clips=2)
    assert made.labels.tolist() == ["dog", "cat", None]
    assert made.header["skipped"] == {"unreadable": 1}
    assert made.header["ignored"] == {".png": 1}
    assert made.header["statistics_clips"] == 2
    with pytest.raises(
        CatalogueError, match=r"1 of the 4 recordings in 1 tars cannot be used: 1 unreadable\n    unreadable: a\.tar/5"
    ):
        tar_index.build([str(tar)], FrontEndSettings(), bad_files=0.1)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(tar.read_bytes()[:5600])
    made = tar_index.build([str(cut)], FrontEndSettings(), bad_files=0.5)
    assert (len(made), made.header["skipped"]) == (1, {"truncated": 1})
    with pytest.raises(CatalogueError, match=r"holds no audio; 1 files: 1 \.txt"):
        tar_index.build([str(write(tmp_path / "b.tar", [("a.txt", "1")]))], FrontEndSettings())
    with pytest.raises(CatalogueError, match="matches 0 names, and no tar"):
        tar_index.tars_of(str(tmp_path / "z*.tar"))
    assert tar_index.tars_of(str(tmp_path / "none.tar")) == []


def test_braces_are_those_of_webdataset():
    expand = tar_index.expand_braces
    assert expand("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert expand("{train,test}-{1..2}.tar") == ["train-1.tar", "train-2.tar", "test-1.tar", "test-2.tar"]
    assert expand("s-{10..9}.tar") == ["s-10.tar", "s-9.tar"]
    assert expand("a{}b{c}d.tar") == ["a{}b{c}d.tar"]
    with pytest.raises(CatalogueError, match="names 100,000,000 files"):
        expand("{0..99999999}.tar")


def test_braces_name_shards_and_absent_ones_are_refused(tmp_path):
    for number in range(2):
        (tmp_path / f"s-00{number}.tar").write_bytes(b"\0" * 1024)
    given = f"{tmp_path}/s-{{000..001}}.tar"
    assert tar_index.tars_of(given) == [f"{tmp_path}/s-000.tar", f"{tmp_path}/s-001.tar"]
    with pytest.raises(CatalogueError, match=r"names 3 files, of which 1 are no tar, such as .*s-002\.tar"):
        tar_index.tars_of(f"{tmp_path}/s-{{000..002}}.tar")
    assert tar_index.tars_of("hf://datasets/me/set/{a,b}.tar") == [f"hf://datasets/me/set/{x}.tar" for x in "ab"]
