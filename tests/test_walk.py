"""One tiny walk through every verb, as a user goes: list, look, pretrain, stop, go on, probe, embed, report."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import asit
from asit import cli

RATE = 16000
SETTINGS = """
epochs: 4
batch_size: 8
device: cpu
precision: float32
threads: 1
front_end: {mels: 32}
views: {seconds: 0.4, local_views: 1, local_seconds: 0.2}
encoder: {size: custom, width: 32, depth: 2, heads: 2}
heads: {hidden: 64, bottleneck: 32, class_prototypes: 64, patch_prototypes: 64}
records: {log_every: 1, figure_every: 4, checkpoint_every: 4}
probe: {every: 6, table: labels.csv}
"""


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a verb that must succeed; gives what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(command: str) -> str:
        code = cli.main(shlex.split(command))
        out, err = capsys.readouterr()
        assert code == 0, err
        assert "Traceback" not in err
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
    told = say("catalogue 'my sounds' --out c.jsonl --workers 1 --front-end.mels 32")
    assert "c.jsonl: 24 clips" in told
    assert "left out: " in told
    assert "log-mel mean" in told
    skipped = [json.loads(line) for line in (tmp_path / "c.skipped.jsonl").read_text().splitlines()]
    assert {row["path"] for row in skipped} == {"broken.flac", "empty.wav"}

    before = sorted(tmp_path.iterdir())
    told = say("pretrain --config mine.yaml --data c.jsonl --out run --dry-run")
    assert "12 steps: 4 epochs of 3 steps of 8 clips" in told
    assert "GB" in told
    assert "nothing was written" in told
    assert sorted(tmp_path.iterdir()) == before

    told = say("pretrain --config mine.yaml --data c.jsonl --out run --stop-after 5")
    assert "5 of 12 steps" in told
    (go_on,) = (line.removeprefix("go on:  asit ") for line in told.splitlines() if line.startswith("go on:"))
    told = say(f"{go_on} --stop-after 0")
    assert "12 of 12 steps" in told
    assert "asit report run" in told

    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    probes = [line for line in lines if line["kind"] == "probe"]
    assert {6, 12} <= {line["step"] for line in probes}
    assert all(0 <= line["accuracy"] <= 1 and line["clips"] == 8 for line in probes)
    assert list((run / "tensorboard").glob("events*"))
    assert list((run / "figures").iterdir())
    assert {path.name for path in (run / "model").iterdir()} == {"model.safetensors", "card.json"}

    told = say("probe run/model labels.csv --out probe.json")
    compared = json.loads((tmp_path / "probe.json").read_text())
    assert {"pretrained", "untrained", "log-mel statistics"} == set(compared)
    assert compared["log-mel statistics"]["mean+std of log-mel"]["accuracy"] == 1.0
    assert "on 8 test clips" in told

    told = say("embed run/model 'my sounds/00.wav' 'my sounds/01.flac'")
    vectors = [json.loads(line) for line in told.splitlines()]
    assert [v["path"] for v in vectors] == ["my sounds/00.wav", "my sounds/01.flac"]

    told = say("report run")
    page = Path(told.strip())
    assert page.name == "report.html"
    text = page.read_text("utf-8")
    assert len(text) > 20_000
    assert 'src="http' not in text

    told = say("settings --preset paper")
    assert "teacher_momentum: 0.996" in told

    model = asit.load(run / "model")
    found = model.embed("my sounds/00.wav")
    np.testing.assert_allclose(found.clip.numpy(), vectors[0]["clip"], atol=1e-5)
    wave, rate = soundfile.read(sounds / "00.wav", dtype="float32")
    torch.testing.assert_close(model.embed(wave, rate).clip, found.clip)
    torch.testing.assert_close(model.embed(torch.from_numpy(wave), rate).clip, found.clip)


def test_the_same_from_python(sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small: dict[str, Any] = {"probe": {}, "records": {"figure_every": 0, "tensorboard": False}}
    result = asit.pretrain(sounds, "run", config="mine.yaml", epochs=1, stop_after=1, stream=None, **small)
    assert (result.step, result.total, result.finished) == (1, 3, False)
    result = asit.pretrain(sounds, "run", resume=True, stop_after=0, stream=None)
    assert result.finished
    assert asit.load(result.model).embed("my sounds/00.wav").clip.shape == (32,)
    with pytest.raises(asit.AsitError, match="--overwrite"):
        asit.pretrain(sounds, "run", config="mine.yaml", stream=None)
    with pytest.raises(asit.AsitError, match="epoch: no such setting, did you mean epochs"):
        asit.pretrain(sounds, "other", epoch=3, stream=None)


@pytest.mark.slow
def test_the_demo(say: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("pretty_midi")
    told = say("demo --toy --out demo")
    assert "toy size: the comparison says nothing yet" in told
    page = next(Path(line.split(":", 1)[1].strip()) for line in told.splitlines() if line.startswith("page:"))
    assert "Pretrained against untrained" in page.read_text("utf-8")
    assert "toy size" in say("demo --toy --out demo")  # what is whole there is taken up
