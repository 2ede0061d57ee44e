"""The registry, and the verb's own refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from asit import cli
from asit.data import corpora
from asit.errors import CatalogueError


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("esc-50", "esc50"),
        ("AudioSet", "audioset"),
        ("speech_commands_v2", "speech-commands-v2"),
        ("voxceleb", "voxceleb1"),
    ],
)
def test_the_nearest_name(name: str, near: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError) as error:
        corpora.read(name, tmp_path)
    assert f"{name} is not a data set that asit knows; did you mean {near}?" in str(error.value)
    assert "one of audioset, esc50, speech-commands-v1, speech-commands-v2, voxceleb1" in str(error.value)


def test_every_reader_refuses_an_empty_folder(tmp_path: Path) -> None:
    for name in corpora.NAMES:
        with pytest.raises(CatalogueError):
            corpora.read(name, tmp_path, incomplete=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("esc50", "esc50 is the name of a data set, and ROOT is not given"),
        ("esc49 sounds", "did you mean esc50?"),
        ("sounds --most-missing 0.5", "--most-missing for sounds"),
        ("esc50 sounds --most-missing 0.5", "only for audioset"),
        ("esc50 sounds --test-root sounds", "only for speech-commands-v1"),
        ("sounds --incomplete", "--incomplete for sounds"),
        ("esc50 sounds --labels folder", "data sets have labels"),
        ("esc50 sounds", "has no meta/esc50.csv and no audio; it holds nothing"),
    ],
)
def test_the_verb_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    assert cli.main(["catalogue", *arguments.split(), "--out", "c.jsonl"]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "fix:" in printed
    assert not (tmp_path / "c.jsonl").exists()
