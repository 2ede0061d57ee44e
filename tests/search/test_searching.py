"""The verbs index and similar: output, formats and errors."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asit import cli, logs
from asit.commands import index
from asit.search import Index, Neighbour

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a verb in the test's folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> tuple[int, str, str]:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def made(run: Run, archive: Path, model_folder: Path) -> Index:
    assert run("index", model_folder, "sounds", "--out", "index")[0] == 0
    return Index.read("index")


def test_from_a_folder_to_neighbours(run: Run, archive: Path, model_folder: Path) -> None:
    code, out, err = run("index", model_folder, "sounds", "--out", "index")
    assert code == 0, err
    assert "index: 9 recordings in 16 rows (9 read)\n" in out
    code, out, _ = run("similar", "index", "sounds/3.wav", "-k", "2")
    assert code == 0
    (line,) = map(json.loads, out.splitlines())
    assert line["query"] == "sounds/3.wav"
    assert len(line["neighbours"]) == 2
    assert set(line["neighbours"][0]) == {"path", "start", "end", "similarity", "name", "label"}
    assert "3.wav" not in {hit["name"] for hit in line["neighbours"]}
    code, out, _ = run("similar", "index", "sounds/3.wav", "sounds/4.wav", "--include-self", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["query"] for row in rows] == ["sounds/3.wav"] * 10 + ["sounds/4.wav"] * 10
    assert (rows[0]["path"], rows[0]["name"]) == (str((archive / "3.wav").resolve()), "3.wav")
    assert float(rows[0]["similarity"]) > 0.99


def test_a_part_of_a_recording(run: Run, made: Index) -> None:
    _, out, _ = run("similar", "index", "sounds/long.wav", "--at", "1.2", "-k", "1", "--include-self")
    assert json.loads(out)["neighbours"][0]["start"] == 1.2
    _, out, _ = run("similar", "index", "sounds/long.wav", "--at", 1.2, "--seconds", 0.4, "-k", 50)
    starts = {hit["start"] for hit in json.loads(out)["neighbours"] if hit["name"] == "long.wav"}
    assert 1.2 not in starts
    assert 0.8 in starts
    code, _, err = run("similar", "index", "sounds/3.wav", "--at", "7")
    assert code == 2
    assert "sounds/3.wav" in err


def test_the_table(run: Run, made: Index) -> None:
    code, out, _ = run("similar", "index", "sounds/3.wav", "sounds/long.wav", "-k", "3", "--format", "table")
    assert code == 0
    first, *hits, empty, second = out.splitlines()[:6]
    assert (first, empty, second) == ("sounds/3.wav", "", "sounds/long.wav")
    assert [hit.split()[0] for hit in hits] == ["1", "2", "3"]
    assert all(" - 0:0" in hit for hit in hits)


def test_names_of_every_kind_fit_a_line() -> None:
    def hit(name: str, start: float = 0.0, label: str | None = None) -> Neighbour:
        return Neighbour(0, "/" + name, name, start, start + 1, label, None, 0.5)

    table = index._table("question", [hit("a" * 200 + ".wav"), hit("كلمة.wav", 4000, "كلمة"), hit("日本語.wav")])
    lines = table.splitlines()[1:]
    assert all(logs.width(line) < 110 for line in lines)
    assert len({logs.width(ended[0]) for line in lines if (ended := re.match(r".* - [\d:.]+", line))}) == 1
    assert "1:06:40.00 - 1:06:41.00  كلمة" in lines[1]
    assert "\x1b" not in index._table("q\x1b[2J", [hit("red\x1b[31m\r\nname.wav", label="\x07bell")])
    odd = os.fsdecode(b"caf\xe9.wav")
    # As standard output is encoded: what is no valid Unicode is escaped, and read back as it was.
    assert json.loads(json.dumps(odd, ensure_ascii=False).encode("utf-8", "backslashreplace")) == odd
    index._table(odd, [hit(odd)]).encode("utf-8")


def test_bad_recordings_give_status_2_and_the_rest_goes_on(run: Run, archive: Path, model_folder: Path) -> None:
    (archive / "2.wav").write_bytes(b"no sound")
    code, out, err = run("index", model_folder, "sounds", "--out", "index")
    assert (code, "8 recordings" in out, "1 could not be read" in out) == (2, True, True)
    assert "warning: 2.wav " in err
    code, out, err = run("similar", "index", "sounds/2.wav", "sounds/3.wav")
    assert (code, len(out.splitlines())) == (2, 1)
    assert "2.wav" in err
    code, out, _ = run("index", model_folder, "sounds", "--out", "index", "--add")
    assert (code, "8 kept" in out) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("index MODEL --out new", "no recordings were given"),
        ("index MODEL nowhere --out new", "nowhere"),
        ("index MODEL sounds", "--out"),
        ("index MODEL sounds --out new --window 0", "window of 0 s"),
        ("index MODEL sounds --out new --window 0.3 --hop 0.4", "hop of 0.4 s"),
        ("index MODEL sounds --out new --pooling max", "pooling"),
        ("index MODEL sounds --out new --layer 9", "layer"),
        ("index MODEL sounds --out new --batch 0", "--batch 0"),
        ("index MODEL sounds --out new --threads -1", "--threads -1"),
        ("similar index sounds/1.wav --threads -1", "--threads -1"),
        ("index MODEL sounds --out new --add", "an index to add to"),
        ("index MODEL sounds --out index", "--add to update it"),
        ("index MODEL sounds --out index --add --overwrite", "choose one"),
        ("index MODEL sounds --out index --add --window 0.3", "other settings: window 0.4 in the index"),
        ("index MODEL sounds --out sounds --overwrite", "is no index"),
        ("index nowhere sounds --out new", "nowhere"),
        ("similar nowhere sounds/1.wav", "nowhere does not exist"),
        ("similar sounds sounds/1.wav", "has no card.json"),
        ("similar MODEL sounds/1.wav", "is no index"),
        ("similar index nowhere.wav", "nowhere.wav"),
        ("similar index sounds/1.wav -k 0", "-k 0"),
        ("similar index sounds/1.wav --at -1", "--at -1"),
        ("similar index sounds/1.wav --at nan", "--at nan"),
        ("similar index sounds/1.wav --seconds 0", "--seconds 0"),
        ("similar index sounds/1.wav --model nowhere", "nowhere"),
    ],
)
@pytest.mark.usefixtures("archive", "copied")
def test_mistakes(run: Run, model_folder: Path, tmp_path: Path, arguments: str, message: str) -> None:
    before = sorted(tmp_path.iterdir())
    given = [str(model_folder) if word == "MODEL" else word for word in arguments.split()]
    code, out, err = run(*given)
    assert code == 2
    assert message in out + err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
