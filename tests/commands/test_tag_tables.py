"""asit tag for other programs: Raven, Audacity, Praat, Parquet, clips that are cut out, and DataFrames."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import asit
from asit import cli
from asit.data.annotations.annotation_files import read_annotations
from asit.data.catalogue.inputs import Item
from asit.errors import ConfigError
from asit.finetune.cross_validation import CrossValidation
from asit.finetune.finetune_run import FinetuneResult
from asit.infer.detection_files import Annotator, textgrid_lines
from asit.model.audio_model import AudioModel
from asit.model.inference.tagging import Tag, Tags

Captured = pytest.CaptureFixture[str]

FOUND = [Tag("wren", 0.875, 0.5, 2.0), Tag('a "robin"\tor two', 0.5, 1.0, 3.0), Tag("wren", 0.75, 3.0, 3.5)]
TAGS = Tags(("wren",), True, torch.ones(1), torch.ones(1, 1), torch.zeros(1), torch.tensor([4.0]))

RAVEN = """\
Selection	View	Channel	Begin Time (s)	End Time (s)	Low Freq (Hz)	High Freq (Hz)	Begin Path	Begin File	\
File Offset (s)	Annotation	Score
1	Spectrogram 1	1	0.500000	2.000000	20	8000	/in/a.wav	a.wav	0.500000	wren	0.875000
2	Spectrogram 1	1	1.000000	3.000000	20	8000	/in/a.wav	a.wav	1.000000	a "robin" or two	0.500000
3	Spectrogram 1	1	3.000000	3.500000	20	8000	/in/a.wav	a.wav	3.000000	wren	0.750000
4	Spectrogram 1	1	4.250000	4.750000	20	8000	/in/c.wav	c.wav	0.250000	wren	1.000000
"""
"""By Raven Pro's manual; with the columns that BirdNET-Analyzer writes for several recordings. The second recording,
which has no detection, is no part of the sequence."""

AUDACITY = """\
0.500000	2.000000	wren	0.875000
1.000000	3.000000	a "robin" or two	0.500000
3.000000	3.500000	wren	0.750000
"""
"""By Audacity's manual; it reads three columns, and ignores the fourth, where BirdNET-Analyzer has the score too."""

TEXTGRID = """\
File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 4.000000
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "wren"
        xmin = 0
        xmax = 4.000000
        intervals: size = 5
        intervals [1]:
            xmin = 0.000000
            xmax = 0.500000
            text = ""
        intervals [2]:
            xmin = 0.500000
            xmax = 2.000000
            text = "wren"
        intervals [3]:
            xmin = 2.000000
            xmax = 3.000000
            text = ""
        intervals [4]:
            xmin = 3.000000
            xmax = 3.500000
            text = "wren"
        intervals [5]:
            xmin = 3.500000
            xmax = 4.000000
            text = ""
    item [2]:
        class = "IntervalTier"
        name = "a ""robin"" or two"
        xmin = 0
        xmax = 4.000000
        intervals: size = 3
        intervals [1]:
            xmin = 0.000000
            xmax = 1.000000
            text = ""
        intervals [2]:
            xmin = 1.000000
            xmax = 3.000000
            text = "a ""robin"" or two"
        intervals [3]:
            xmin = 3.000000
            xmax = 4.000000
            text = ""
"""
"""By Praat's manual, "TextGrid file formats"."""


def text_of(form: Any, *recordings: tuple[str, list[Tag]]) -> str:
    annotator = Annotator(form, (20.0, 8000.0))
    lines = [annotator.header] if annotator.header else []
    for name, found in recordings:
        lines += annotator.lines(Item(name, f"/in/{name}"), TAGS, found)
    return "".join(f"{line}\n" for line in lines)


def test_files_of_other_programs_are_as_their_manuals_say() -> None:
    others = [("b.wav", []), ("c.wav", [Tag("wren", 1.0, 0.25, 0.75)])]
    assert text_of("raven", ("a.wav", FOUND), *others) == RAVEN
    assert text_of("audacity", ("a.wav", FOUND)) == AUDACITY
    assert text_of("textgrid", ("a.wav", FOUND)) == TEXTGRID


def test_one_tier_where_a_clip_has_one_label() -> None:
    one, two = Tag("wren", 0.9, 0.0, 1.0), Tag("robin", 0.8, 0.75, 1.75)
    lines = list(textgrid_lines(4.0, [one, two], multi=False))
    assert "size = 1" in lines
    times = [float(line.split("=")[1]) for line in lines if line.startswith("            xm")]
    texts = [line.split("=")[1].strip() for line in lines if "text =" in line]
    assert (times, texts) == ([0.0, 1.0, 1.0, 1.75, 1.75, 4.0], ['"wren"', '"robin"', '""'])


def test_intervals_of_a_textgrid_never_overlap_and_cover_the_recording() -> None:
    windows = [Tag("wren", 0.9, start, start + 1.0) for start in (0.0, 0.5, 1.0, 3.0)]
    lines = text_of("textgrid", ("a.wav", windows)).splitlines()
    times = [float(line.split("=")[1]) for line in lines if line.startswith("            xm")]
    assert times == [0.0, 1.0, 1.0, 1.5, 1.5, 2.0, 2.0, 3.0, 3.0, 4.0]
    empty = text_of("textgrid", ("a.wav", []))
    assert "size = 1\n" in empty
    assert 'text = ""\n' in empty


def run(*arguments: str | Path, status: int = 0) -> None:
    assert cli.main(["tag", *map(str, arguments), "--precision", "float32"]) == status


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.mark.parametrize("merged", [False, True])
def test_a_table_of_several_recordings_for_raven(
    models: Path, sounds: Path, tmp_path: Path, capsys: Captured, merged: bool
) -> None:
    names = [sounds / "long.wav", sounds / "two.flac"]
    more = ["--segments"] if merged else []
    run(models / "single", *names, *more, "--format", "raven", "--out", tmp_path / "all.txt")
    rows = table((tmp_path / "all.txt").read_text("utf-8"))
    assert [row["Selection"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    model, at, before = asit.load(models / "single"), 0, 0.0
    for path in names:
        tags = model.tag(path, precision="float32")
        expected = tags.segments(0.0, k=1)
        if not merged:
            best = tags.windows.argmax(1).tolist()
            expected = [
                Tag(tags.classes[i], float(row[i]), float(start), float(end))
                for i, row, start, end in zip(best, tags.windows, tags.starts, tags.ends, strict=True)
            ]
        for tag in expected:
            row, at = rows[at], at + 1
            assert (row["Begin Path"], row["Begin File"], row["Annotation"]) == (str(path), path.name, tag.label)
            assert float(row["File Offset (s)"]) == pytest.approx(tag.start, abs=2e-6)
            assert float(row["Begin Time (s)"]) == pytest.approx(before + tag.start, abs=2e-6)
            assert float(row["End Time (s)"]) == pytest.approx(before + tag.end, abs=2e-6)
            assert float(row["Score"]) == pytest.approx(tag.score, abs=2e-6)
        before += float(tags.ends[-1])
    assert at == len(rows)
    capsys.readouterr()
    run(models / "single", *names, *more, "--format", "raven")
    assert capsys.readouterr().out == (tmp_path / "all.txt").read_text("utf-8")


def test_a_file_for_each_recording_in_a_folder(models: Path, sounds: Path, tmp_path: Path, capsys: Captured) -> None:
    endings = {"raven": ".Table.1.selections.txt", "audacity": ".txt", "textgrid": ".TextGrid"}
    for form, ending in endings.items():
        out = tmp_path / form
        run(models / "multi", sounds, "--format", form, "--out", out, "--threshold", "0.3", status=2)
        assert sorted(path.name for path in out.iterdir()) == [f"{name}{ending}" for name in ("long", "short", "two")]
        capsys.readouterr()
        run(models / "multi", sounds, "--format", form, "--out", out, status=2)
        assert f"{out / 'long'}{ending} already exists" in capsys.readouterr().err
        run(models / "multi", sounds, "--format", form, "--out", out, "--overwrite", status=2)
    rows = table((tmp_path / "raven" / "two.Table.1.selections.txt").read_text("utf-8"))
    assert {row["Begin File"] for row in rows} == {"two.flac"}
    assert all(row["Begin Time (s)"] == row["File Offset (s)"] for row in rows)


def test_a_part_of_a_recording_keeps_its_place_in_it(models: Path, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "parts.csv").write_text(f"path,start,end\n{sounds / 'long.wav'},3,4\n{sounds / 'long.wav'},1.5,2\n")
    run(models / "single", tmp_path / "parts.csv", "--format", "raven", "--out", tmp_path / "parts.txt")
    rows = table((tmp_path / "parts.txt").read_text("utf-8"))
    assert [float(row["Begin Time (s)"]) for row in rows] == [float(row["File Offset (s)"]) for row in rows]
    assert float(rows[0]["Begin Time (s)"]) == 3.0
    (tmp_path / "one.csv").write_text(f"path,start,end\n{sounds / 'long.wav'},3,4\n")
    run(models / "single", tmp_path / "one.csv", "--out", tmp_path / "one.TextGrid")
    assert "xmax = 21.000000\n" in (tmp_path / "one.TextGrid").read_text("utf-8")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--format", "audacity"], "--format audacity of 2 recordings in one file"),
        (["--out", "x.TextGrid"], "--format textgrid of 2 recordings in one file"),
        (["--format", "parquet"], "--format parquet on standard output"),
        (["--format", "raven", "--spreadsheet"], "--spreadsheet with raven"),
        (["--clip-padding", "1"], "--save-clips"),
        (["--save-clips", "full"], "full exists and is not empty"),
    ],
)
def test_outputs_that_do_not_fit(
    models: Path,
    sounds: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    said: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.wav").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)
    run(models / "single", sounds / "short.wav", sounds / "two.flac", *more, status=2)
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.wav"]


@pytest.mark.parametrize("more", [[], ["--segments"], ["--windows"]])
def test_parquet_holds_the_rows_of_the_csv(models: Path, sounds: Path, tmp_path: Path, more: list[str]) -> None:
    files = [tmp_path / "tags.parquet", tmp_path / "tags.csv"]
    for file in files:
        run(models / "single", sounds / "long.wav", sounds / "two.flac", *more, "--out", file)
    found = pq.read_table(files[0]).to_pylist()
    expected = list(csv.DictReader(io.StringIO(files[1].read_text("utf-8"))))
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert (one["path"], one["label"]) == (other["path"], other["label"])
        numbers = [one[name] for name in ("start", "end", "score")]
        np.testing.assert_allclose(numbers, [float(other[name]) for name in ("start", "end", "score")], atol=6e-5)


def stereo(path: Path, subtype: str) -> np.ndarray:
    """Write 3 s of two channels at 22,050 Hz, and return them as soundfile reads them."""
    x = np.random.default_rng(0).normal(0, 0.2, (66150, 2)).clip(-0.99, 0.99)
    soundfile.write(path, x, 22050, subtype)
    return soundfile.read(path, dtype="float32")[0]


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8"])
def test_clips_are_the_recording_s_own_samples(models: Path, tmp_path: Path, subtype: str, capsys: Captured) -> None:
    whole = stereo(tmp_path / "a.b.wav", subtype)
    out = tmp_path / "clips"
    run(models / "single", tmp_path / "a.b.wav", "--format", "json", "--segments", "--save-clips", out)
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    names = [f"{row['label']}/a.b_{row['start']:.3f}s_{row['label']}_{row['score']:.3f}.wav" for row in rows]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.wav")) == sorted(names)
    assert f"clips: {len(rows)} clips" in captured.err
    for row, name in zip(rows, names, strict=True):
        found, rate = soundfile.read(out / name, dtype="float32")
        assert (rate, found.shape[1]) == (22050, 2)
        assert soundfile.info(out / name).subtype == (subtype if subtype != "PCM_U8" else "PCM_16")
        first, last = round(row["start"] * rate), round(row["end"] * rate)
        begin = next(i for i in (first, first - 1, first + 1) if np.array_equal(whole[i : i + len(found)], found))
        assert abs(begin + len(found) - last) <= 2, "times of JSON are rounded"


def test_clips_with_padding_and_the_best_of_each_label(models: Path, sounds: Path, tmp_path: Path) -> None:
    few, out = ["--clip-padding", "0.25", "--clips-per-label", "1"], tmp_path / "clips"
    run(models / "single", sounds / "long.wav", "--save-clips", out, *few, "--out", tmp_path / "tags.csv")
    tags = asit.load(models / "single").tag(sounds / "long.wav", precision="float32")
    best: dict[str, Tag] = {}
    for tag in tags.segments(0.0, k=1, merge=False):
        if tag.label not in best or tag.score > best[tag.label].score:
            best[tag.label] = tag
    files = sorted(out.rglob("*.wav"))
    assert len(files) == len(best)
    for path in files:
        tag = best[path.parent.name]
        start, end = max(0.0, tag.start - 0.25), min(21.0, tag.end + 0.25)
        assert soundfile.info(path).duration == pytest.approx(end - start, abs=2e-4)
        assert path.name == f"long_{tag.start:.3f}s_{tag.label}_{tag.score:.3f}.wav"


def test_clips_of_names_that_are_equal_on_a_disk(models: Path, sounds: Path, tmp_path: Path) -> None:
    for folder in ("a", "A"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "x.wav").symlink_to(sounds / "short.wav")
    run(models / "single", tmp_path / "in", "--save-clips", tmp_path / "clips", "--out", tmp_path / "tags.csv")
    names = sorted(path.name for path in (tmp_path / "clips").rglob("*.wav"))
    assert len(names) == 2
    assert names[0].startswith("A_x_0.000s_")
    assert names[1].endswith("-2.wav")


def test_tags_and_embeddings_as_data_frames(models: Path, sounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    model: AudioModel = asit.load(models / "multi")
    tags, found = model.tag(sounds / "two.flac"), model.embed(sounds / "two.flac")
    frame = tags.to_frame()
    assert list(frame) == ["start", "end", *tags.classes]
    np.testing.assert_array_equal(frame[list(tags.classes)].to_numpy(), tags.windows)
    np.testing.assert_array_equal(frame["start"], tags.starts)
    np.testing.assert_array_equal(frame["end"], tags.ends)
    assert list(pandas.DataFrame(tags.segments(0.5))) == ["label", "score", "start", "end"]
    frame = found.to_frame()
    assert list(frame)[:2] == ["time", "v0"]
    np.testing.assert_array_equal(frame.to_numpy()[:, 1:], found.frames)
    np.testing.assert_array_equal(frame["time"], found.times)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    for result in (tags, found):
        with pytest.raises(ConfigError, match=r"pip install 'asit-audio\[pandas\]'"):
            result.to_frame()


def test_reprs_are_one_line_that_says_what_it_is(models: Path, sounds: Path) -> None:
    model = asit.load(models / "multi")
    tags = model.tag(sounds / "long.wav")
    best = ", ".join(f"{tag.label} {tag.score:.3f}" for tag in tags.top(3))
    for result, expected in (
        (model, "AudioModel(32 wide, 2 blocks, windows of 0.49 s at 16000 Hz, 4 classes: dog, rain, نباح كلب, ...)"),
        (asit.load(models / "encoder"), "AudioModel(32 wide, 2 blocks, windows of 0.49 s at 16000 Hz, no labels)"),
        (tags, f"Tags(21.00 s, 43 windows, 4 classes, several labels a clip; {best})"),
        (model.embed(sounds / "short.wav"), "Embedding(4 frames of 32 values, 16 patches, 0.05 to 0.29 s)"),
        (model.attention(sounds / "short.wav"), "AttentionMap(2 heads, 4 columns of 4 bands, to 0.29 s)"),
    ):
        assert repr(result) == expected
    result = FinetuneResult(
        out=Path("run"),
        model=Path("run/model"),
        step=3,
        total=9,
        finished=False,
        stopped_by="SIGINT",
        results=[],
    )
    assert repr(result) == "FinetuneResult('run', 3 of 9 steps; no scores)"
    folds = CrossValidation(Path("cv"), True, None, {"test averaged accuracy": {"mean": 0.5, "std": 0.1}})
    assert repr(folds) == "CrossValidation('cv', finished; test averaged accuracy 0.5000)"


@pytest.mark.parametrize("form", ["raven", "audacity", "textgrid"])
def test_what_is_written_is_read_back(models: Path, sounds: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("long.wav", "two.flac"):
        (folder / name).symlink_to(sounds / name)
    run(models / "single", folder, "--segments", "--format", form, "--out", folder)
    model = asit.load(models / "single")
    rows, recordings = read_annotations(folder)
    assert sorted(Path(path).name for path in recordings) == ["long.wav", "two.flac"]
    for name in ("long.wav", "two.flac"):
        expected = model.tag(sounds / name, precision="float32").segments(0.0, k=1)
        found = [row for row in rows if Path(row.path).name == name]
        assert [row.label for row in found] == [tag.label for tag in expected]
        last = 0.0
        for row, tag in zip(found, expected, strict=True):
            start = max(tag.start, last) if form == "textgrid" else tag.start
            assert (row.start, row.end) == (pytest.approx(start, abs=2e-6), pytest.approx(tag.end, abs=2e-6))
            last = tag.end
