"""`asit evaluate --save`: the saved head is scikit-learn's, and tags, exports and scores are its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from sklearn.linear_model import LogisticRegression

import asit
from asit import cli
from asit.audio.windowing import window_counts, window_start
from asit.evaluate import saved_probe
from asit.model.audio_model import AudioModel

RATE = 16000
NAMES = ("high", "low", "mid")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., AudioModel]) -> Path:
    """A model with a view of half a second; 60 clips of 0.2 to 1.4 s of three pitches, and silence."""
    root = tmp_path_factory.mktemp("sounds")
    small_model().save(root / "model")
    rows = []
    for i in range(60):
        rng, t = np.random.default_rng(i), np.arange(round((0.2 + 0.02 * i) * RATE)) / RATE
        kind = i % 4
        pitch = (2500, 300, 900, 0)[kind] * rng.uniform(0.9, 1.1)
        noise = 0.03 * rng.standard_normal(len(t))
        name = f"{i:02d}.wav"
        soundfile.write(root / name, 0.3 * np.sin(2 * np.pi * pitch * t) * (kind < 3) + noise, RATE)
        rows.append({"path": name, "label": (*NAMES, "")[kind], "split": "test" if i % 5 == 0 else "train"})
    for name, kept in (("all", rows), ("tones", [row for row in rows if row["label"]])):
        with (root / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
    return root


def saved(sounds: Path, out: Path, *more: str, table: str = "tones.csv") -> AudioModel:
    given = ["evaluate", str(sounds / "model"), "--data", str(sounds / table), "--save", str(out), "--seconds", "0.4"]
    assert cli.main([*given, "--cache", str(sounds / "cache"), "--precision", "float32", *more]) == 0
    return asit.load(out)


@torch.no_grad()
def features(model: AudioModel, path: Path, pooling: str = "class+mean+std", layers: Any = (1,)) -> np.ndarray:
    """Windows of a recording, cut, padded and pooled by hand: (W, D) float64."""
    wave, rows = soundfile.read(path, dtype="float32")[0], []
    size = model.front_end.samples_for(model.frames)
    count = int(window_counts(np.array([len(wave)], float), size, size, model.front_end.shift / 2)[0])
    for w in range(count):
        first = round(window_start(w, count, len(wave), size, size))
        part = torch.from_numpy(wave[first : first + size])
        x = model.front_end.fbank(model.front_end.pad(part, size)[None])[:, : model.frames]
        x = model.front_end.pad_frames(x[0], model.frames)
        tokens = [model.encoder(model.front_end.normalise(x)[None, None], layer=layer) for layer in layers]
        cls = np.concatenate([one.cls[0].double() for one in tokens])
        patches = np.concatenate([one.patches[0].double() for one in tokens], 1)
        named = {"class": cls, "mean": patches.mean(0), "std": patches.std(0)}
        rows.append(np.concatenate([named[part] for part in pooling.split("+")]))
    return np.array(rows)


def rows_of(sounds: Path, table: str = "tones.csv") -> list[dict[str, str]]:
    with (sounds / table).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("pooling", "layers"), [("class+mean+std", ""), ("mean+std", "0,1")])
def test_tags_are_scikit_learns_on_features_made_by_hand(
    sounds: Path, tmp_path: Path, pooling: str, layers: str, few_draws: None
) -> None:
    """A logit's error is at most that of the weights, which `tests/evaluate/test_logistic.py` bounds, times the
    features; the fit here is precise to 0.1 per cent of a penalty of 0.1 or more."""
    model = saved(sounds, tmp_path / "out", "--pooling", pooling, "--layers", layers, "--out", str(tmp_path / "s.json"))
    assert model.classes == NAMES
    assert model.frames == 40 < asit.load(sounds / "model").frames
    read = [0, 1] if layers else (1,)
    table, penalty = rows_of(sounds), model.training["regularisation"]
    windows = {row["path"]: features(model, sounds / row["path"], pooling, read) for row in table}
    train = [row for row in table if row["split"] == "train"]
    x = np.concatenate([windows[row["path"]] for row in train])
    counts = [len(windows[row["path"]]) for row in train]
    assert max(counts) > 2
    weights = np.repeat([1 / count for count in counts], counts)
    truth = np.repeat([NAMES.index(row["label"]) for row in train], counts)
    mean = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=100_000).fit((x - mean) / scale, truth, weights)
    for row in table:
        want = theirs.predict_proba((windows[row["path"]] - mean) / scale).mean(0)
        got = model.tag(sounds / row["path"], precision="float32").clip
        np.testing.assert_allclose(got, want, atol=2e-3)
    record = json.loads((tmp_path / "s.json").read_text())["results"][0]
    tested = [row for row in table if row["split"] == "test"]
    right = sum(model.tag(sounds / row["path"], precision="float32").top(1)[0].label == row["label"] for row in tested)
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(right / len(tested))
    assert (record["probe"], record["train_clips"]) == ("logistic", len(train))


def test_evaluate_gives_a_saved_head_the_score_that_it_was_saved_with(
    sounds: Path, tmp_path: Path, few_draws: None, caplog: pytest.LogCaptureFixture
) -> None:
    saved(sounds, tmp_path / "out", "--out", str(tmp_path / "first.json"))
    again = ["evaluate", str(tmp_path / "out"), "--data", str(sounds / "tones.csv"), "--out", str(tmp_path / "2.json")]
    assert cli.main(again) == 0
    first, second = (json.loads((tmp_path / name).read_text())["results"][0] for name in ("first.json", "2.json"))
    assert first["list"] == second["list"]
    assert first["metrics"]["accuracy"]["value"] == second["metrics"]["accuracy"]["value"]
    assert not caplog.records
    # Clips that it was fitted on are no test, and this is said.
    assert cli.main([*again, "--test", "train"]) == 0
    assert "not a test" in caplog.text


@pytest.mark.slow
def test_exports_answer_as_the_saved_head(sounds: Path, tmp_path: Path, few_draws: None) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = saved(sounds, tmp_path / "out", "--layers", "0,1")
    wave = soundfile.read(sounds / "08.wav", dtype="float32")[0][:6000]
    want = model.scores(torch.from_numpy(wave)[None])
    assert cli.main(["export", str(tmp_path / "out"), "--to", "onnx", "--out", str(tmp_path / "m.onnx")]) == 0
    session = runtime.InferenceSession(tmp_path / "m.onnx")
    np.testing.assert_allclose(session.run(None, {"waveform": wave[None]})[0], want, atol=1e-4)
    assert cli.main(["export", str(tmp_path / "out"), "--to", "huggingface", "--out", str(tmp_path / "hf")]) == 0
    np.testing.assert_array_equal(asit.load(tmp_path / "hf").scores(torch.from_numpy(wave)[None]), want)
    pytest.importorskip("transformers")
    from asit.interop.huggingface.feature_extraction_asit import ASiTFeatureExtractor
    from asit.interop.huggingface.modeling_asit import ASiTForAudioClassification

    inputs = ASiTFeatureExtractor.from_pretrained(tmp_path / "hf")(wave, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        logits = ASiTForAudioClassification.from_pretrained(tmp_path / "hf").eval()(**inputs).logits
    np.testing.assert_allclose(logits.softmax(1), want, atol=1e-4)


def test_unlabelled_clips_are_the_background(
    sounds: Path, tmp_path: Path, few_draws: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Silence is called a pitch without the class, and background with it; segments leave it out."""
    model = saved(sounds, tmp_path / "out", "--missing-labels", "background", table="all.csv")
    assert model.classes == ("background", *NAMES)
    quiet = [row["path"] for row in rows_of(sounds, "all.csv") if not row["label"] and row["split"] == "test"]
    assert [model.tag(sounds / name).top(1)[0].label for name in quiet] == ["background"] * len(quiet)
    capsys.readouterr()
    assert cli.main(["tag", str(tmp_path / "out"), str(sounds / quiet[0]), "--segments", "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["path,start,end,label,score"]


def test_without_test_clips_all_are_fitted(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Two clips a class and no splits: a score is that of cross-validation, and scoring the same clips is warned of."""
    with (sounds / "few.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label"), *((row["path"], row["label"]) for row in rows_of(sounds)[:9])])
    model = saved(sounds, tmp_path / "out", table="few.csv")
    out = capsys.readouterr().out
    assert "no test split" in out
    assert "over 3 folds of the training clips: accuracy" in out
    assert (model.training["clips"], model.training["fitted_on"]) == (9, ["all clips"])
    assert cli.main(["evaluate", str(tmp_path / "out"), "--data", str(sounds / "few.csv")]) == 0
    assert "not a test" in caplog.text


def test_one_clip_of_each_class_has_a_fixed_penalty() -> None:
    clips = saved_probe.ProbeRows([np.eye(3, 5, dtype=np.float32)[i : i + 1] for i in range(3)], np.eye(3, dtype="f4"))
    head = saved_probe.fit_head(clips, multi=False, criterion="accuracy", seed=0)
    assert (head.penalty, head.held_out) == (saved_probe.FEW_CLIPS_PENALTY, None)
    assert "fixed" in head.chosen_by


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--probe", "knn"], "one of them"),
        (["--verify"], "one of them"),
        (["--per-class", "1,2"], "save the one to keep"),
        (["--baselines"], "save the one to keep"),
        (["--pooling", "time-mean"], "class+mean+std"),
        (["--layers", "7"], "blocks"),
        (["--save", "MODEL"], "free"),
    ],
)
def test_what_one_head_cannot_have(
    sounds: Path, tmp_path: Path, given: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(sounds / "model") if word == "MODEL" else word for word in given]
    start = ["evaluate", str(sounds / "model"), "--data", str(sounds / "tones.csv"), "--save", str(tmp_path / "out")]
    assert cli.main([*start, *given]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
