"""asit tag: what it prints, writes and draws."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

import asit
from asit import cli, logs
from asit.data.catalogue.inputs import Item
from asit.infer import embed_rows as tagging
from asit.io.local_files import file_name
from asit.model.inference.tagging import Tagger

Captured = pytest.CaptureFixture[str]


def lines(capsys: Captured, *arguments: str | Path, status: int = 0) -> list[dict[str, Any]]:
    """What the verb wrote as JSON lines."""
    assert cli.main(["tag", *map(str, arguments), "--precision", "float32"]) == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def fails(capsys: Captured, message: str, *arguments: str | Path) -> None:
    """The verb ends with status 2 and this message."""
    assert cli.main(["tag", *map(str, arguments)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_scores_of_a_file_are_those_of_the_python_api(models: Path, sounds: Path, capsys: Captured, kind: str) -> None:
    model = asit.load(models / kind)
    files = [sounds / name for name in ("short.wav", "two.flac", "long.wav")]
    found = lines(capsys, models / kind, *files, "--top", "4")
    assert [one["path"] for one in found] == [str(path) for path in files]
    for one, path, seconds in zip(found, files, (0.3, 2.0, 21.0), strict=True):
        expected = model.tag(path, precision="float32")
        assert [label["label"] for label in one["labels"]] == [tag.label for tag in expected.top(4)]
        np.testing.assert_allclose(
            [label["score"] for label in one["labels"]], [tag.score for tag in expected.top(4)], atol=2e-6
        )
        assert (one["start"], one["end"]) == (0.0, pytest.approx(seconds, abs=1e-4))


def test_top_and_threshold_choose_labels(models: Path, sounds: Path, capsys: Captured) -> None:
    (whole,) = lines(capsys, models / "multi", sounds / "short.wav", "--top", "4")
    scores = [label["score"] for label in whole["labels"]]
    assert len(scores) == 4
    (two,) = lines(capsys, models / "multi", sounds / "short.wav", "--top", "2")
    assert two["labels"] == whole["labels"][:2]
    (above,) = lines(capsys, models / "multi", sounds / "short.wav", "--threshold", str((scores[0] + scores[1]) / 2))
    assert above["labels"] == whole["labels"][:1]
    (none,) = lines(capsys, models / "multi", sounds / "short.wav", "--threshold", "1")
    assert none["labels"] == []


def test_windows_are_rows_with_their_times(models: Path, sounds: Path, capsys: Captured) -> None:
    model = asit.load(models / "single")
    found = lines(capsys, models / "single", sounds / "long.wav", "--window", "0.4", "--hop", "0.2", "--top", "1")
    expected = model.tag(sounds / "long.wav", precision="float32", window=0.4, hop=0.2)
    assert len(found) == len(expected.windows) > 32, "of several batches"
    np.testing.assert_allclose([row["start"] for row in found], expected.starts, atol=1e-3)
    np.testing.assert_allclose([row["end"] for row in found], expected.ends, atol=1e-3)
    best, which = expected.windows.max(1)
    assert [row["labels"][0]["label"] for row in found] == [model.classes[i] for i in which]  # type: ignore[index]
    np.testing.assert_allclose([row["labels"][0]["score"] for row in found], best, atol=1e-5)
    whole = lines(capsys, models / "single", sounds / "long.wav", "--windows")
    assert [row["start"] for row in whole[:3]] == [0.0, 0.495, 0.99]


def test_segments_merge_neighbouring_windows(models: Path, sounds: Path, capsys: Captured) -> None:
    model = asit.load(models / "single")
    found = lines(capsys, models / "single", sounds / "long.wav", "--segments")
    tags = model.tag(sounds / "long.wav", precision="float32")
    best = tags.windows.argmax(1).tolist()
    changes = sum(a != b for a, b in pairwise(best))
    assert 1 < len(found) == changes + 1 < len(best)
    assert found[0]["label"] == model.classes[best[0]]  # type: ignore[index]
    assert found[0]["start"] == 0.0
    assert max(row["end"] for row in found) == pytest.approx(21.0)
    middle = float(tags.windows.max(1).values.median())
    above = lines(capsys, models / "single", sounds / "long.wav", "--segments", "--threshold", f"{middle:.6f}")
    assert above
    assert sum(row["end"] - row["start"] for row in above) < 20.0
    assert all(row["score"] >= middle - 1e-5 for row in above)


@pytest.mark.parametrize("packed", [False, True])
def test_a_recording_that_cannot_be_read_is_one_line_and_the_others_go_on(
    models: Path, sounds: Path, tmp_path: Path, capsys: Captured, packed: bool
) -> None:
    inputs, folder = [sounds / "no.wav", sounds / "short.wav"], str(sounds)
    if packed:
        with tarfile.open(tmp_path / "shard.tar", "w") as shard:
            for path in inputs:
                shard.add(path, arcname=f"in/{path.name}")
        inputs, folder = [tmp_path / "shard.tar"], f"{tmp_path / 'shard.tar'}/in"
    assert cli.main(["tag", str(models / "single"), *map(str, inputs)]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["path"] for line in out.splitlines()] == [f"{folder}/short.wav"]
    first, second = err.splitlines()
    assert first.startswith(f"warning: {folder}/no.wav")
    assert "is a web page or XML" in first
    assert second == "warning: 1 of 2 inputs failed"


def test_a_folder_is_walked_in_order_and_times_of_parts_count_from_the_file(
    models: Path, sounds: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert [row["path"] for row in lines(capsys, models / "single", sounds, status=2)] == [
        "long.wav",
        "short.wav",
        "two.flac",
    ]
    (tmp_path / "parts.csv").write_text(f"path,start,end\n{sounds / 'long.wav'},1.5,3.0\n{sounds / 'long.wav'},0,1\n")
    first, second = lines(capsys, models / "single", tmp_path / "parts.csv")
    assert (first["start"], first["end"]) == (1.5, pytest.approx(3.0))
    assert (second["start"], second["end"]) == (0.0, pytest.approx(1.0))
    wave, rate = soundfile.read(sounds / "long.wav", dtype="float32")
    expected = asit.load(models / "single").tag(wave[24000:48000], rate=rate, precision="float32").top(1)[0]
    assert first["labels"][0] == {"label": expected.label, "score": pytest.approx(expected.score, abs=2e-6)}


def test_a_terminal_gets_a_table_of_its_width(
    models: Path, sounds: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for more in ([], ["--windows"], ["--segments"]):
        names = [str(sounds / name) for name in ("short.wav", "long.wav")]
        assert cli.main(["tag", str(models / "multi"), *names, *more]) == 0
        table = capsys.readouterr().out.splitlines()
        assert table[0].endswith("short.wav  0.30 s")
        assert max(map(logs.width, table)) <= 80
        assert any("█" in line for line in table) is (more != ["--windows"])


def test_a_locale_that_lacks_a_label_s_script_is_no_error(
    models: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in ("table", "json", "csv"):
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr("sys.stdout", out)
        short = str(sounds / "short.wav")
        assert cli.main(["tag", str(models / "multi"), short, "--top", "4", "--format", form]) == 0
        written = out.buffer.getvalue()
        if form == "table":
            assert b"\\u0646\\u0628" in written
            assert b" #" in written
        else:
            assert "نباح كلب" in written.decode("utf-8")


def test_csv_has_a_line_for_each_label(models: Path, sounds: Path, capsys: Captured) -> None:
    names = [str(sounds / name) for name in ("short.wav", "two.flac")]
    assert cli.main(["tag", str(models / "single"), *names, "--format", "csv", "--top", "3"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == [names[0]] * 3 + [names[1]] * 3
    assert set(rows[0]) == {"path", "start", "end", "label", "score"}


def test_a_file_is_written_atomically(models: Path, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    single, short, out = str(models / "single"), str(sounds / "short.wav"), tmp_path / "tags.csv"
    assert cli.main(["tag", single, short, "--out", str(out)]) == 0
    assert out.read_text().startswith("path,start,end,label,score\n")
    before = out.read_bytes()
    fails(capsys, f"{out} already exists", single, short, "--out", str(out), "--top", "1")
    fails(capsys, "all 1 inputs failed", single, str(sounds / "no.wav"), "--out", str(out), "--overwrite")
    assert out.read_bytes() == before
    assert cli.main(["tag", single, short, "--out", str(out), "--top", "1", "--overwrite"]) == 0
    assert len(out.read_text().splitlines()) == 2
    fails(capsys, "says no format", single, short, "--out", str(tmp_path / "tags.xlsx"))
    fails(capsys, "is no folder", single, short, "--out", str(tmp_path / "none" / "tags.csv"))
    assert [path.name for path in tmp_path.iterdir()] == ["tags.csv"]


def test_timelines_are_drawn_for_one_and_for_many(models: Path, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    single, names = str(models / "single"), [str(sounds / name) for name in ("short.wav", "long.wav")]
    one = tmp_path / "one.png"
    assert cli.main(["tag", single, names[1], "--timeline", str(one)]) == 0
    assert imread(one).shape[1] == 1200
    fails(capsys, f"{one} already exists", single, names[1], "--timeline", str(one))
    fails(capsys, "--timeline-dir", single, *names, "--timeline", str(tmp_path / "two.png"))
    fails(capsys, "ends in .png", single, names[0], "--timeline", str(tmp_path / "one.gif"))
    folder = tmp_path / "many"
    assert cli.main(["tag", single, str(sounds), "--timeline-dir", str(folder)]) == 2, "no.wav fails"
    assert sorted(path.name for path in folder.iterdir()) == ["long.wav.png", "short.wav.png", "two.flac.png"]


def test_a_model_without_labels_is_refused_before_any_file_is_read(
    models: Path, sounds: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Item, "sound", lambda self: pytest.fail("a file was read"))
    assert cli.main(["tag", str(models / "encoder"), str(sounds / "short.wav")]) == 2
    said = capsys.readouterr().err
    assert "no labels: it is an encoder" in said
    assert "asit finetune" in said
    assert "asit embed" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--threshold", "1.5"], "--threshold 1.5"),
        (["--top", "0"], "--top 0"),
        (["--window", "-1"], "--window -1"),
        (["--hop", "nan"], "--hop nan"),
        (["--window", "3"], "windows of 3 s"),
        (["--segments", "--windows"], "--segments and --windows"),
        (["--timeline", "a.png", "--timeline-dir", "b"], "--timeline and --timeline-dir"),
    ],
)
def test_options_that_do_not_fit(models: Path, sounds: Path, capsys: Captured, more: list[str], said: str) -> None:
    assert cli.main(["tag", str(models / "single"), str(sounds / "short.wav"), *more]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_order_holds_over_batches_long_recordings_and_failures(models: Path, sounds: Path) -> None:
    model = asit.load(models / "single")
    names = ["short.wav", "no.wav", "two.flac", "long.wav"] * 6 + ["no.wav"] * 9
    items = [Item(f"{i} {name}", str(sounds / name)) for i, name in enumerate(names)]
    found = list(tagging.tag_items(model.tagger("float32"), items, batch=3))
    expected = {name: model.tag(sounds / name, precision="float32").clip for name in set(names) - {"no.wav"}}
    for one, name in zip(found, names, strict=True):
        if name == "no.wav":
            assert isinstance(one, str)
        else:
            assert not isinstance(one, str)
            torch.testing.assert_close(one.clip, expected[name], atol=2e-6, rtol=1e-5)


def test_a_pipe_is_read_once_however_long(models: Path, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes((sounds / "long.wav").read_bytes()))
    writer.start()
    (found,) = lines(capsys, models / "single", pipe)
    writer.join()
    (expected,) = lines(capsys, models / "single", sounds / "long.wav")
    assert found == {**expected, "path": str(pipe)}
    fails(capsys, f"{pipe} is a pipe", models / "single", str(pipe), "--timeline", str(tmp_path / "a.png"))


def test_a_file_is_written_with_progress_and_stopped_without_a_rest(
    models: Path, sounds: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ["tag", str(models / "single"), str(sounds), "--out", str(tmp_path / "tags.csv")]
    assert cli.main(call) == 2
    assert "tag: 4/4  1 bad" in capsys.readouterr().err
    (tmp_path / "tags.csv").unlink()
    before, calls, run = threading.active_count(), list[int](), Tagger.run

    def stopped(self: Tagger, windows: Any) -> Any:
        calls.append(len(windows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, windows)

    monkeypatch.setattr(Tagger, "run", stopped)
    assert cli.main([*call, "--batch", "4"]) == 130
    assert calls == [4, 4, 4]
    assert threading.active_count() == before
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_no_text_is_the_same_everywhere(
    models: Path, sounds: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.wav")
    os.symlink(sounds / "short.wav", path)  # noqa: PTH211
    for form, written in (("json", b'caf\\\\xe9.wav"'), ("csv", b"caf\\xe9.wav,"), ("table", b"caf\\xe9.wav  0.30 s")):
        assert cli.main(["tag", str(models / "single"), path, "--format", form]) == 0
        assert written in capsysbinary.readouterr().out
    assert Item(path, path).text == f"{tmp_path}/caf\\xe9.wav"


def test_every_csv_keeps_any_name_and_guards_it_with_spreadsheet(
    models: Path, sounds: Path, tmp_path: Path, capsys: Captured
) -> None:
    folder, name = tmp_path / "in", "=cmd\r,x.wav"
    folder.mkdir()
    (folder / name).symlink_to(sounds / "short.wav")
    assert cli.main(["index", str(models / "encoder"), str(folder), "--out", str(tmp_path / "index")]) == 0

    def first_cells(given: list[str], out: Path | None = None) -> set[str]:
        capsys.readouterr()
        assert cli.main(given) == 0
        said = capsys.readouterr().out
        text = said if out is None else out.read_bytes().decode()
        rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        assert len({len(row) for row in rows}) == 1
        return {cell for row in rows[1:] for cell in row if cell.endswith("x.wav")}

    for number, (guard, wanted) in enumerate((((), name), (("--spreadsheet",), "'" + name))):
        out = tmp_path / f"{number}.csv"
        embed = ["embed", str(models / "encoder"), str(folder), "--out", str(out)]
        assert first_cells([*embed, *guard], out) == {wanted}
        assert first_cells(["tag", str(models / "single"), str(folder), "--format", "csv", *guard]) == {wanted}
        similar = ["similar", str(tmp_path / "index"), str(folder), "--include-self", "--format", "csv", *guard]
        assert wanted in first_cells(similar)
    for given in (
        ["embed", str(models / "encoder"), str(folder), "--out", str(tmp_path / "e.npz")],
        ["tag", str(models / "single"), str(folder), "--format", "json"],
        ["similar", str(tmp_path / "index"), str(folder)],
        ["compare", str(tmp_path), "--out", str(tmp_path / "c.md")],
    ):
        assert cli.main([*given, "--spreadsheet"]) == 2
        assert "--spreadsheet" in capsys.readouterr().err


def test_pictures_of_names_that_a_disk_forbids() -> None:
    assert file_name("a/b\x1b:c.wav") == "a_b__c.wav"
    assert file_name("../x") == "_x"
    assert len(file_name("é" * 300).encode()) <= 200
