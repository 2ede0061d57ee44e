"""One tiny walk through the verbs, as a user goes: list, look, pretrain, stop, go on, probe, report; then with labels:
fine-tune, score, compare, and put the model to use, here and in other programs."""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import asit
from asit import cli
from asit.config import EncoderSettings
from asit.model.classifier import Labelling
from asit.model.vit import Encoder

pytestmark = pytest.mark.usefixtures("few_draws")

RATE = 16000
SETTINGS = """
epochs: 4
batch_size: 8
device: cpu
precision: float32
threads: 1
front_end: {mels: 32}
views: {seconds: 0.4, local_views: 1, local_seconds: 0.2}
encoder: {size: custom, width: 32, depth: 1, heads: 2}
heads: {hidden: 64, bottleneck: 32, class_prototypes: 64, patch_prototypes: 64}
records: {log_every: 1, figure_every: 12, checkpoint_every: 4}
probe: {every: 6, table: labels.csv}
"""


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a verb that must succeed and return what it prints; `say.log` is what it logs."""
    monkeypatch.chdir(tmp_path)

    def call(command: str) -> str:
        code = cli.main(shlex.split(command))
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "Traceback" not in err
        call.log = err  # type: ignore[attr-defined]
        return str(out)

    return call


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Low and high notes in three formats, a broken file, an empty one, and a table of labels."""
    folder, rng = tmp_path / "my sounds", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for i in range(24):
        high, suffix = i % 2, ("wav", "flac", "ogg")[i % 3]
        t = np.arange(round((0.5 + 0.02 * i) * RATE)) / RATE
        note = 0.3 * np.sin(2 * np.pi * (2000 if high else 200) * (1 + 0.01 * i) * t)
        wave = note + 0.02 * rng.standard_normal(len(t))
        soundfile.write(folder / f"{i:02d}.{suffix}", wave, RATE)
        rows.append([f"my sounds/{i:02d}.{suffix}", ("low", "high")[high], "train" if i < 16 else "test"])
    (folder / "broken.flac").write_bytes(b"fLaC and nothing more")
    (folder / "empty.wav").touch()
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split"], *rows])
    (tmp_path / "mine.yaml").write_text(SETTINGS)
    return folder


def test_the_walk(say: Callable[..., str], sounds: Path, tmp_path: Path) -> None:
    output = say("catalogue 'my sounds' --out c.jsonl --workers 1 --front-end.mels 32")
    assert "c.jsonl: 24 clips" in output
    assert "left out: " in output
    assert "log-mel mean" in output
    skipped = [json.loads(line) for line in (tmp_path / "c.skipped.jsonl").read_text().splitlines()]
    assert {row["path"] for row in skipped} == {"broken.flac", "empty.wav"}

    before = sorted(tmp_path.iterdir())
    output = say("pretrain --config mine.yaml --data c.jsonl --out run --dry-run")
    assert "12 steps: 4 epochs of 3 steps of 8 clips" in say.log  # type: ignore[attr-defined]
    assert "GB" in output
    assert "nothing was written" in output
    assert sorted(tmp_path.iterdir()) == before

    output = say("plan --config mine.yaml --data c.jsonl --budget 1 --json")
    assert json.loads(output)["prediction"]["work"]["steps"] == 12
    output = say("shard c.jsonl --out shards --clips 10 --workers 1")
    assert {path.name for path in (tmp_path / "shards").glob("*.tar")} == {f"shard-{i:06d}.tar" for i in range(3)}
    assert "24" in output

    output = say("pretrain --config mine.yaml --data shards --out run --stop-after 5 --records.figure-every 0")
    assert "5 of 12 steps" in output
    (go_on,) = (line.removeprefix("resume: asit ") for line in output.splitlines() if line.startswith("resume:"))
    output = say(f"{go_on} --stop-after 0 --records.figure-every 12")
    assert "12 of 12 steps" in output
    assert "asit report run" in output

    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    probes = [line for line in lines if line["kind"] == "probe"]
    assert {6, 12} <= {line["step"] for line in probes}
    assert all(0 <= line["accuracy"] <= 1 and line["clips"] == 8 for line in probes)
    assert list((run / "tensorboard").glob("events*"))
    assert list((run / "figures").iterdir())
    assert {path.name for path in (run / "model").iterdir()} == {"model.safetensors", "card.json"}

    say("pretrain --config mine.yaml --model run --data c.jsonl --out adapted --epochs 1 --records.figure-every 0")
    assert "Continuing from run: encoder 32 wide with 1 blocks" in say.log  # type: ignore[attr-defined]

    output = say("probe run/model labels.csv --out probe.json")
    compared = json.loads((tmp_path / "probe.json").read_text())
    assert {"pretrained", "untrained", "log-mel statistics"} == set(compared)
    assert compared["log-mel statistics"]["mean+std of log-mel"]["accuracy"] == 1.0
    assert "on 8 test clips" in output

    output = say("embed run/model 'my sounds/00.wav' 'my sounds/01.flac'")
    vectors = [json.loads(line) for line in output.splitlines()]
    assert [v["path"] for v in vectors] == ["my sounds/00.wav", "my sounds/01.flac"]

    output = say("report run")
    page = Path(output.strip())
    assert page.name == "report.html"
    text = page.read_text("utf-8")
    assert len(text) > 20_000
    assert 'src="http' not in text

    output = say("settings --preset paper")
    assert "teacher_momentum: 0.996" in output

    model = asit.load(run / "model")
    found = model.embed("my sounds/00.wav")
    np.testing.assert_allclose(found.clip.numpy(), vectors[0]["clip"], atol=1e-5)
    wave, rate = soundfile.read(sounds / "00.wav", dtype="float32")
    torch.testing.assert_close(model.embed(wave, rate).clip, found.clip)
    torch.testing.assert_close(model.embed(torch.from_numpy(wave), rate).clip, found.clip)


TUNING = """
epochs: 6
batch_size: 8
device: cpu
precision: float32
threads: 1
input: {seconds: 0.4}
optim: {lr: 0.003}
augment: {mel_mask: 0, time_mask: 4, mel_warp: 0.0}
records: {log_every: 1, checkpoint_every: 4, tensorboard: false}
"""


def put_to_use(say: Callable[..., str]) -> None:
    """Labels, vectors, what the model is, and the nearest recordings."""
    found = [json.loads(line) for line in say("tag tuned/model notes --top 1").splitlines()]
    assert [Path(row["path"]).parent.name for row in found] == ["high"] * 12 + ["low"] * 12
    # Other processors train another model: one whose test clips are right may miss a clip of training.
    assert sum(row["labels"][0]["label"] == Path(row["path"]).parent.name for row in found) >= 22
    output = say("embed tuned/model notes --out v.npz --precision float32")
    assert "24 vectors of 32 values from 24 files" in output
    kept = np.load("v.npz")
    model = asit.load("tuned")
    np.testing.assert_allclose(
        kept["vectors"][0], model.embed("notes/high/01.flac", precision="float32").clip, atol=1e-5
    )
    assert "high" in say("info tuned/model")
    output = say("index tuned/model notes --out notes-index")
    assert "24 recordings" in output
    (found,) = (json.loads(line) for line in say("similar notes-index notes/low/00.wav -k 3").splitlines())
    assert all("low" in one["name"] for one in found["neighbours"])


def to_other_programs(say: Callable[..., str]) -> None:
    """The model written for transformers, read back, and weights of others brought in.

    Exporters of torch take 12 s: tests/interop has --to onnx, and the slow test below both.
    """
    model = asit.load("tuned/model")
    wave, _ = soundfile.read("notes/low/00.wav", dtype="float32")
    waves = wave[None, : round(0.4 * RATE)]
    want = model.scores(torch.from_numpy(waves)).numpy()
    say("export tuned/model --to huggingface --out hf")
    np.testing.assert_allclose(asit.load("hf").scores(torch.from_numpy(waves)), want, atol=1e-6)

    settings = EncoderSettings(size="custom", width=64, depth=1, heads=1)
    theirs = Encoder(settings, 64, 32)
    teacher = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"teacher": teacher, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, "official.pth")
    output = say("convert official.pth --out converted --mels 32")
    assert f"{len(teacher)} tensors mapped" in output
    assert torch.equal(asit.load("converted").encoder.pos_embed, theirs.pos_embed)


def in_a_browser(say: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The server started by its verb, asked once, and stopped."""
    from asit.serve import server

    made, really = [], server.server
    monkeypatch.setattr(server, "server", lambda app: made.append(really(app)) or made[-1])
    listen, sockets = server.listen, []
    monkeypatch.setattr(server, "listen", lambda *at: sockets.append(listen(*at)) or sockets[-1])
    output: list[str] = []
    thread = threading.Thread(target=lambda: output.append(say("serve tuned/model --index notes-index --port 0")))
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not (made and made[0].started):
            assert thread.is_alive(), output
            assert time.monotonic() < deadline
            time.sleep(0.01)
        request = urllib.request.Request(
            server.address(sockets[0]) + "api/analyse", Path("notes/low/00.wav").read_bytes()
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as reply:
            analysis = json.load(reply)
    finally:
        if made:
            made[0].should_exit = True
        thread.join(60)
    assert "asit serves tuned/model at http://127.0.0.1:" in output[0]
    assert analysis["labels"]["tags"][0]["label"] == "low"
    assert len(analysis["neighbours"]) > 0


def test_the_walk_with_labels(
    say: Callable[..., str], sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of classes and a table; a pretrained encoder and none; one run and folds; the page and the table."""
    notes = tmp_path / "notes"
    rows = []
    for i in range(24):
        name = f"{i:02d}.{('wav', 'flac', 'ogg')[i % 3]}"
        pitch = ("low", "high")[i % 2]
        (notes / pitch).mkdir(parents=True, exist_ok=True)
        (sounds / name).rename(notes / pitch / name)
        rows.append([f"notes/{pitch}/{name}", pitch, ("train", "validation", "train", "test")[i // 2 % 4], i // 2 % 2])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "fold"], *rows])
    (tmp_path / "tune.yaml").write_text(TUNING)
    output = say("catalogue notes --labels folder --out n.jsonl --workers 1 --front-end.mels 32")
    assert "next: asit finetune --model PRETRAINED/model --data n.jsonl --out RUN" in output
    say("pretrain --config mine.yaml --data n.jsonl --out pre --epochs 1 --probe.table '' --records.figure-every 0")

    output = say(
        "finetune --config tune.yaml --model pre/model --data n.jsonl --out held --sides.hold-out 0.3 --epochs 1"
    )
    assert "validation, last weights: accuracy" in output

    output = say("finetune --config tune.yaml --model pre/model --data labels.csv --out tuned --stop-after 3")
    (go_on,) = (line.removeprefix("resume: asit ") for line in output.splitlines() if line.startswith("resume:"))
    output = say(f"{go_on} --stop-after 0")
    assert "test, last weights: accuracy 1.0000" in output
    assert "test, best weights: accuracy" in output
    assert "page:   asit report tuned" in output
    fresh = "--encoder.size custom --encoder.width 32 --encoder.depth 1 --encoder.heads 2 --front-end.mels 32"
    say(f"finetune --config tune.yaml --model none {fresh} --data labels.csv --out scratch --epochs 2")
    output = say(
        "finetune --config tune.yaml --model pre/model --data labels.csv --out folds --sides.fold all --epochs 1"
    )
    assert "test last accuracy: mean " in output
    assert "over 2 folds" in output
    for run in ("tuned", "folds"):
        page = Path(say(f"report {run}").strip())
        text = page.read_text("utf-8")
        assert "accuracy" in text
        assert 'src="http' not in text
    output = say("compare tuned scratch")
    assert "tuned" in output
    assert "scratch" in output

    model = asit.load("tuned/model")
    assert model.classes == ("high", "low")
    wave, _ = soundfile.read("notes/low/06.wav", dtype="float32")
    scores = model.scores(torch.from_numpy(wave[: round(0.4 * RATE)])[None])
    assert scores.argmax(1).tolist() == [1]

    output = say("evaluate tuned/model --data labels.csv --out score")
    assert "accuracy 1.0000" in output
    put_to_use(say)
    to_other_programs(say)
    in_a_browser(say, monkeypatch)

    result = asit.finetune("labels.csv", "again", "pre/model", config="tune.yaml", epochs=1)
    assert [(r["split"], r["weights"]) for r in result.results][-1] == ("test", "best")
    assert asit.FinetuneSettings().task == "any"


def test_the_same_from_python(sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"probe": {}, "records": {"figure_every": 0, "tensorboard": False}}
    result = asit.pretrain(sounds, "run", config="mine.yaml", epochs=1, stop_after=1, **small)
    assert (result.step, result.total, result.finished) == (1, 3, False)
    result = asit.pretrain(sounds, "run", resume=True, stop_after=0)
    assert result.finished
    assert asit.load(result.model).embed("my sounds/00.wav").clip.shape == (32,)
    with pytest.raises(asit.AsitError, match="--overwrite"):
        asit.pretrain(sounds, "run", config="mine.yaml")
    with pytest.raises(asit.AsitError, match="epoch: no such setting, did you mean epochs"):
        asit.pretrain(sounds, "other", epoch=3)


@pytest.mark.slow
def test_exporters_of_torch(say: Callable[..., str], small_model: Callable[..., Any]) -> None:
    import onnxruntime

    small_model(Labelling(("low", "high"), False, "class+mean", 0.495)).save(Path("model"))
    model = asit.load("model")
    waves = np.random.default_rng(0).normal(0, 0.1, (1, round(0.4 * RATE))).astype(np.float32)
    expected = model.scores(torch.from_numpy(waves)).numpy()
    say("export model --to onnx --out m.onnx")
    session = onnxruntime.InferenceSession("m.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"waveform": waves})[0], expected, atol=1e-4)
    say("export model --to torch --out m.pt2")
    program = torch.export.load("m.pt2").module()
    np.testing.assert_allclose(program(torch.from_numpy(waves)), expected, atol=1e-4)


@pytest.mark.slow
def test_the_demo(say: Callable[..., str]) -> None:
    pytest.importorskip("pretty_midi")
    output = say("demo --toy --out demo")
    assert "toy size: the comparison is not meaningful" in output
    page = next(Path(line.split(":", 1)[1].strip()) for line in output.splitlines() if line.startswith("page:"))
    assert "Pretrained against untrained" in page.read_text("utf-8")
    assert "toy size" in say("demo --toy --out demo")  # what is whole there is taken up
