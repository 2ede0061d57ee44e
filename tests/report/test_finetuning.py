"""Pages of fine-tuning runs and cross-validations."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from asit.errors import AsitError, ConfigError
from asit.report import audio_player, report
from asit.report.audio_player import Recordings
from asit.report.class_results import calibration, class_table, confusion
from asit.report.score_records import ResultRecord, Scores, spread

HOSTILE = '<script>alert("x")</script>&'


def test_a_finished_run(tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any) -> None:
    example = make.example(words, 120, 3.0)
    run = make.run(tmp_path / "run", example, root=tmp_path / "data", best=True)
    page = page_of(run)
    accuracy = (example.scores.argmax(1) == example.truth).mean()
    low, high = example.record()["metrics"]["accuracy"]["interval"]
    assert "Finished: 200 steps in 10 min." in page.text
    rows = [row for row in page.rows if row and row[0] == "test"]
    assert [row[1] for row in rows] == [
        "the last weights (step 200)",
        "the weights that scored best on validation (step 150)",
    ]
    assert rows[0][2] == f"{accuracy:.1%} {low:.1%} to {high:.1%}"
    assert rows[0][-2:] == ["120", example.record()["list"]]
    charts = {str(a["aria-label"]).split(".")[0]: str(a["aria-label"]) for a in page.all("svg") if a.get("aria-label")}
    assert "validation: from 2 at step 50 to 0.5 at step 200" in charts["Loss"]
    assert "validation: from 12.5% at step 50 to 50.0% at step 200" in charts["Accuracy"]
    assert "training: from 4.0% at step 10 to 80.0% at step 200" in charts["Accuracy"]
    assert {"Learning rate", "Throughput", "Calibration", "Scores"} <= charts.keys()
    # classes: the worst first, as counted here
    recalls = {w: (example.scores.argmax(1)[example.truth == i] == i).mean() for i, w in enumerate(words)}
    start = page.rows.index(next(r for r in page.rows if r[:2] == ["class", "recall"])) + 1
    listed = [row[:2] for row in page.rows[start : start + 10]]
    assert [row[1] for row in listed] == [f"{value:.1%}" for value in sorted(recalls.values())]
    assert all(f"{recalls[name]:.1%}" == value for name, value in listed)
    assert "Confusion matrix of 10 classes" in page.html
    # settings that differ from the defaults
    assert page.row("epochs")[1:3] == ["4", "50"]
    assert page.row("epochs")[3] == "Passes over the training clips."
    assert not list(run.glob(".*"))


def test_mistakes_are_played(tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any) -> None:
    example = make.example(words, 120, 3.0)
    run = make.run(tmp_path / "run", example, root=tmp_path / "data")
    wrong = np.flatnonzero(example.scores.argmax(1) != example.truth)
    worst = wrong[np.argmax(example.scores[wrong].max(1))]
    (tmp_path / "data" / example.ids[worst]).unlink()
    page = page_of(run)
    players = page.all("audio")
    assert len(players) == min(20, len(wrong)) - 1
    pictures = [a for a in page.all("img") if str(a["alt"]).startswith("spectrogram of ")]
    assert len(pictures) == len(players)
    size = Image.open(io.BytesIO(base64.b64decode(str(pictures[0]["src"]).split("base64,")[1]))).size
    assert size == (48, 64)  # of half a second: 25 ms every 10 ms; mel bins
    assert f"No sound: {tmp_path / 'data' / example.ids[worst]} is not there" in page.text
    sound, rate = soundfile.read(io.BytesIO(base64.b64decode(str(players[0]["src"]).split("base64,")[1])))
    assert (rate, len(sound)) == (16000, pytest.approx(8000, abs=2500))
    assert np.abs(sound).max() == pytest.approx(0.1, abs=0.02)


def test_the_page_is_self_contained_and_escapes_names(
    tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any
) -> None:
    run = make.run(tmp_path / "run", make.example(words, 120, 2.0), root=tmp_path / "data", model=HOSTILE)
    page = page_of(run)
    page.check_offline()
    assert "<script>alert" not in page.html
    assert page.text.count(HOSTILE) >= 5


def test_several_labels(tmp_path: Path, make: SimpleNamespace, page_of: Any) -> None:
    names = [f"sound {i}" for i in range(20)]
    example = make.example(names, 200, 2.0, multi=True)
    run = make.run(tmp_path / "run", example, root=tmp_path / "data")
    page = page_of(run)
    record = example.record()
    assert f"mAP, test, last {record['metrics']['mAP']['value']:.1%}" in page.text
    assert "Confusions" not in page.text
    worst = min(record["per_class"], key=lambda row: row["AP"])
    assert page.rows[page.rows.index(page.row("class")) + 1][0] == worst["class"]
    # the worst class's highest score without its label, and lowest with it, found by a plain loop
    column = names.index(worst["class"])
    there = [column in example.indices[example.indptr[i] : example.indptr[i + 1]] for i in range(200)]
    false = max((i for i in range(200) if not there[i]), key=lambda i: example.scores[i, column])
    missed = min((i for i in range(200) if there[i]), key=lambda i: example.scores[i, column])
    cards = re.findall(r'<div class="clip">(.*?)</div>', page.html)
    assert f"<b>{example.scores[false, column]:.3f}</b>" in cards[0]
    assert Path(example.ids[false]).name in cards[0]
    assert f"scored lowest with the label: <b>{example.scores[missed, column]:.3f}</b>" in cards[3]
    assert Path(example.ids[missed]).name in cards[3]
    assert len(page.all("audio")) == 20


def test_a_run_without_scores_yet(tmp_path: Path, make: SimpleNamespace, page_of: Any) -> None:
    page = page_of(make.run(tmp_path / "run", None))
    assert "Still running, or cut off: the last record is of step 50 of 200." in page.text
    assert "Not scored yet" in page.text
    assert page.row("metrics.accuracy") == ["metrics.accuracy", "0.125"]


def test_missing_and_damaged_parts_are_named(
    tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any
) -> None:
    run = make.run(tmp_path / "run", make.example(words, 60, 2.0))
    (run / "scores" / "test-last.npz").write_bytes(b"PK torn")
    (run / "catalogue.jsonl").unlink()
    text = page_of(run).text
    assert "test-last.npz cannot be read" in text
    assert "holds no catalogue" in text
    assert re.search(r"No sound: .*\.wav is not there", text)
    (run / "results.json").write_text('{"results": [1]}')
    with pytest.raises(AsitError, match=r"results\.json holds results that are not records"):
        report(run)
    (run / "results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"results\.json cannot be read"):
        report(run)


def test_too_many_classes_for_a_picture(tmp_path: Path, make: SimpleNamespace, page_of: Any) -> None:
    example = make.example([f"id{i}" for i in range(230)], 460, 3.0)
    assert "confusion" not in example.record()
    page = page_of(make.run(tmp_path / "run", example))
    assert "230 classes are too many for a picture" in page.text
    assert not [a for a in page.all("svg") if "Confusion" in str(a.get("aria-label"))]
    answers = example.scores.argmax(1)
    pairs = {(t, a) for t, a in zip(example.truth, answers, strict=True) if t != a}
    assert f"of {len(pairs)} pairs" in page.text


def test_a_cross_validation(tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any) -> None:
    examples = [make.example(words, 50, 3.0, seed=i, prefix=f"fold{i}") for i in range(3)]
    run = make.folds(tmp_path / "cv", examples)
    page = page_of(run)
    values = np.array([(e.scores.argmax(1) == e.truth).mean() for e in examples])
    assert "Finished: 3 folds." in page.text
    assert page.row("mean")[1] == f"{values.mean():.1%}"
    assert page.row("standard deviation")[1] == f"{values.std(ddof=1):.1%}"
    assert page.row("2")[1] == f"{values[1]:.1%}"
    links = [str(a["href"]) for a in page.all("a") if not str(a["href"]).startswith("#")]
    assert links == ["fold-1/report.html", "fold-2/report.html", "fold-3/report.html"]
    assert all((run / link).is_file() for link in links)
    right = sum(int((e.scores.argmax(1) == e.truth).sum()) for e in examples)
    assert f"{right} of 150 clips right ({right / 150:.1%})" in page.text
    elsewhere = page_of(run, tmp_path / "pages" / "cv.html")
    assert "../cv/fold-1/report.html" in [a["href"] for a in elsewhere.all("a")]


def test_a_cross_validation_that_goes_on(tmp_path: Path, make: SimpleNamespace, words: list[str], page_of: Any) -> None:
    run = make.folds(tmp_path / "cv", [make.example(words, 50, 3.0, seed=i) for i in range(2)], finished=False)
    make.run(run / "fold-10", None)
    page = page_of(run)
    assert "Still running, or cut off: 2 folds are scored, 1 begun and not scored." in page.text
    assert [row[0] for row in page.rows if row][2:5] == ["1", "2", "10 not finished"]


def test_class_table_puts_the_worst_first_and_the_unknown_last(parse: Any) -> None:
    rows = [{"class": "a", "clips": 3, "AP": 0.9}, {"class": "b", "clips": 0, "AP": None}, {"class": "c", "AP": 0.1}]
    page = parse(class_table(rows))
    assert page.rows[1:] == [["class", "AP", "clips"], ["c", "10.0%", "none"], ["a", "90.0%", "3"], ["b", "none", "0"]]
    assert page.all("th")[1]["aria-sort"] == "ascending"
    assert "No results by class" in class_table([])


def test_confusion_says_each_entry_and_the_worst_pairs(parse: Any) -> None:
    matrix = np.array([[5, 0, 1], [4, 6, 0], [0, 0, 0]])
    page = parse(confusion(matrix, ["a", "b", "c"]))
    assert "b, taken for a: 4 of 10 (40.0%)" in page.text
    assert page.rows[2:] == [["b", "a", "4 of 10", "40.0%"], ["a", "c", "1 of 6", "16.7%"]]
    assert "No clip was given a wrong class" in confusion(np.diag([2, 3]), ["a", "b"])


def test_calibration_by_hand() -> None:
    scores = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 1.0])
    right = np.array([True, True, False, False, True, True])
    mean, share, error = calibration(scores, right)
    assert mean.tolist() == pytest.approx([0.55, 0.96])
    assert share.tolist() == [1.0, 0.6]
    assert error == pytest.approx((abs(1 - 0.55) * 1 + abs(0.6 - 0.96) * 5) / 6)


def test_scores_are_checked(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    path = tmp_path / "test-last.npz"
    with pytest.raises(AsitError, match="is not there"):
        Scores.read(path)
    ends, labels, weights = np.array([0, 2, 2, 3]), np.array([1, 0, 2]), np.array([0.4, 0.6, 1.0])
    arrays = {"ids": np.array(["a", "b", "c"]), "scores": np.eye(3), "indptr": ends, "indices": labels}
    np.savez(path, **arrays, weights=weights)
    held = Scores.read(path)
    assert held.truth.tolist() == [0, -1, 2]
    assert held.positives.tolist() == [[True, False, False], [False] * 3, [False, False, True]]
    assert held.exclusive
    np.savez(path, **arrays | {"indices": np.array([1, 0, 3])}, weights=weights)
    with pytest.raises(AsitError, match="does not hold together: 3 clips"):
        Scores.read(path)


def test_numbers_of_records() -> None:
    metrics = {"accuracy": {"value": 0.5, "interval": None}, "mAP": 0.25, "EER": {"value": None}}
    record = ResultRecord.of({"metrics": metrics})
    assert record.metric("accuracy").value == 0.5
    assert not record.metric("accuracy").known
    assert record.metric("mAP").value == 0.25
    assert np.isnan(record.metric("EER").value)
    assert np.isnan(record.metric("other").value)
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert np.isnan(spread([1.0])[1])


def test_sound_has_a_limit(
    tmp_path: Path, make: SimpleNamespace, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = make.example(words, 10, 2.0)
    recordings = Recordings(make.run(tmp_path / "run", example, root=tmp_path / "data"))
    recordings.find(example.ids)
    monkeypatch.setattr(audio_player, "MOST_BYTES", 1)
    assert "<audio" in recordings.player(example.ids[0])
    assert "No sound: left out" in recordings.player(example.ids[1])
    assert "no/such.wav is not in the run" in recordings.player("no/such.wav")


def test_real_recordings_are_played(
    tmp_path: Path, make: SimpleNamespace, words: list[str], shared_data: Path, page_of: Any
) -> None:
    found = sorted(shared_data.glob("free-spoken-digit-dataset/**/*.wav"))[:3]
    assert found
    example = make.example(words, 10, 2.0)
    run = make.run(tmp_path / "run", example)
    held = json.loads((run / "results.json").read_text())
    held["results"][0]["mistakes"] = [
        {"path": str(path), "truth": "yes", "predicted": "no", "score": 0.9 - i / 10} for i, path in enumerate(found)
    ]
    (run / "results.json").write_text(json.dumps(held))
    page = page_of(run)
    assert [a["aria-label"] for a in page.all("audio")] == [path.name for path in found]
