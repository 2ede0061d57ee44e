"""asit export: what is written and printed, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import soundfile

from asit.cli import main
from asit.tools import int8_accuracy

pytestmark = pytest.mark.usefixtures("one_trace_a_model")

NEED = 47 * 160 + 400  # samples of 48 frames


@pytest.fixture
def folder(make_model: Any, tmp_path: Path) -> str:
    make_model().save(tmp_path / "model")
    return str(tmp_path / "model")


def kept(path: Path) -> dict[str, str]:
    facts: dict[str, str] = onnxruntime.InferenceSession(str(path)).get_modelmeta().custom_metadata_map
    return facts


def test_onnx(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.onnx"
    assert main(["export", folder, "--to", "onnx", "--out", str(out), "--license", "mit"]) == 0
    printed = capsys.readouterr().out
    assert "waveform (batch, samples) at 16000 Hz to scores (batch, 3)" in printed
    assert "of the model, at 0.025, 0.05, 0.247, 0.495, 0.643 s" in printed
    assert (kept(out)["precision"], kept(out)["license"]) == ("float32", "mit")
    assert main(["export", folder, "--to", "onnx", "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["export", folder, "--to", "onnx", "--out", str(out), "--overwrite"]) == 0
    assert kept(out)["license"] == "cc0-1.0"


@pytest.mark.parametrize("multi", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_loss_of_int8_on_labelled_recordings(
    make_model: Any, make_waves: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], multi: bool
) -> None:
    m = make_model(multi=multi)
    m.save(tmp_path / "model")
    lines = ["path,label,split"]
    for i in range(12):
        wave = make_waves(NEED if i % 3 else 2 * NEED, seed=i)[0]
        soundfile.write(tmp_path / f"{i}.wav", wave, 16000, subtype="FLOAT")
        best = m.tag(wave, precision="float32").top(1)[0].label if not multi else m.classes[i % 3]
        wrong = next(name for name in m.classes if name != best)
        label = wrong if i % 4 == 3 and not multi else best
        lines.append(f"{i}.wav,{label},{'train' if i >= 8 else 'test'}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    out = tmp_path / "m.onnx"
    given = ["export", str(tmp_path / "model"), "--to", "onnx", "--out", str(out), "--int8"]
    assert main([*given, "--check-data", str(table)]) == 0
    printed = capsys.readouterr().out
    loss = json.loads(kept(out)["loss"])
    assert (loss["of"], loss["sounds"]) == ("clips of t.csv", 8)
    assert loss["metric"] == ("mAP" if multi else "accuracy")
    if not multi:
        assert loss["float32"] == 0.75
    assert abs(loss["int8"] - loss["float32"]) <= 0.2
    assert 0.98 < loss["smallest_cosine"] < 1.0
    assert f"int8 on 8 clips of t.csv: {loss['metric']} {loss['int8']:.4f} (float32" in printed


@pytest.mark.parametrize("output", ["scores", pytest.param("frames", marks=pytest.mark.slow)])
def test_the_loss_on_recordings_without_labels(
    folder: str, make_waves: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str
) -> None:
    (tmp_path / "sounds").mkdir()
    for i in range(12):
        soundfile.write(tmp_path / "sounds" / f"{i}.wav", make_waves(9000, seed=i)[0], 16000)
    (tmp_path / "sounds" / "3.wav").write_bytes((tmp_path / "sounds" / "4.wav").read_bytes()[:300])
    out = tmp_path / "m.onnx"
    given = ["export", folder, "--to", "onnx", "--out", str(out), "--int8", "--check-data", str(tmp_path / "sounds")]
    assert main([*given, "--output", output]) == 0
    printed, loss = capsys.readouterr().out, json.loads(kept(out)["loss"])
    assert "metric" not in loss
    assert loss["sounds"] == 11
    if output == "scores":
        assert "int8 on 11 clips of sounds: same top class" in printed
        assert main([*given, "--overwrite", "--check-clips", "5"]) == 0
        assert json.loads(kept(out)["loss"])["sounds"] == 5
    else:
        assert "to frames (batch, columns, width)" in printed
        assert "same_top_class" not in loss


def test_labels_that_the_model_does_not_know(
    folder: str, make_waves: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dog", "cat"):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        soundfile.write(tmp_path / "sounds" / name / "1.wav", make_waves(9000)[0], 16000)
    out = tmp_path / "m.onnx"
    given = ["export", folder, "--to", "onnx", "--out", str(out), "--int8", "--check-data", str(tmp_path / "sounds")]
    assert main(given) == 2
    assert "cat" in capsys.readouterr().err
    assert not out.exists()


def test_recordings_that_cannot_be_read_are_too_many(
    folder: str, make_waves: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sounds").mkdir()
    soundfile.write(tmp_path / "sounds" / "1.wav", make_waves(9000)[0], 16000)

    def gone(_: object, clip: Any, *__: float) -> None:
        raise int8_accuracy.AudioError(f"{clip.path} has gone")

    monkeypatch.setattr(int8_accuracy.WaveformReader, "read", gone)
    out = tmp_path / "m.onnx"
    given = ["export", folder, "--to", "onnx", "--out", str(out), "--int8", "--check-data", str(tmp_path / "sounds")]
    assert main(given) == 2
    assert "1 of 1 clips of sounds could not be read" in capsys.readouterr().err
    assert not out.exists()


def test_hugging_face(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from asit.interop import huggingface

    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface, "write", lambda model, out, **options: asked.update(options, out=out))
    (tmp_path / "results.json").write_text("[]")
    given = ["export", folder, "--to", "huggingface", "--out", str(tmp_path / "hf"), "--license", "mit"]
    assert main([*given, "--title", "Doors"]) == 0
    assert asked == {
        "out": tmp_path / "hf", "license": "mit", "title": "Doors", "overwrite": False, "run": tmp_path,
    }  # fmt: skip
    assert str(tmp_path / "hf") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--to", "torch", "--int8"], "--int8 with --to torch\n  expected: --int8 goes with --to onnx"),
        (["--to", "huggingface", "--output", "logits"], "--output goes with --to onnx or --to torch"),
        (["--to", "torch", "--opset", "20"], "--opset goes with --to onnx"),
        (["--to", "onnx", "--title", "x"], "--title goes with --to huggingface"),
        (["--to", "onnx", "--check-data", "x"], "--check-data without --int8"),
        (["--to", "onnx", "--int8", "--check-data", "nowhere"], "nowhere"),
        (["--to", "onnx", "--opset", "7"], "opset 7"),
    ],
)
def test_options_that_do_not_go_together(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    assert main(["export", folder, "--out", str(tmp_path / "m.onnx"), *given]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("name", "value"), [("--to", "tflite"), ("--output", "label")])
def test_an_unknown_value_says_which_there_are(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    given = ["export", folder, "--out", str(tmp_path / "m"), "--to", "onnx", name, value]
    with pytest.raises(SystemExit) as stopped:
        main(given)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert ("huggingface" if name == "--to" else "embedding") in said.out + said.err
