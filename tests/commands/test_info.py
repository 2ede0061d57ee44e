"""asit info: what a model is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import asit
from asit import cli

Captured = pytest.CaptureFixture[str]


def test_facts_of_a_classifier(models: Path, capsys: Captured) -> None:
    folder = models / "multi"
    assert cli.main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = asit.load(folder)
    assert facts["kind"] == "audio-classifier"
    assert facts["network"]["encoder_parameters"] == sum(p.numel() for p in model.encoder.parameters())
    assert facts["network"]["grid"] == [6, 4]
    assert facts["network"]["tokens"] == 25
    assert facts["input"] == {
        "rate": 16000,
        "frames": 48,
        "mels": 32,
        "seconds": 0.495,
        "column_seconds": 0.08,
        "padding": "silence",
    }
    assert facts["labels"]["classes"] == list(model.classes or ())
    assert facts["labels"]["multi"] is True
    assert (facts["license"], facts["data"]) == ("CC0-1.0", "noise")
    assert facts["training"] == {"method": "drawn", "steps": 7}
    by_name = {one["name"]: one for one in facts["files"]}
    assert set(by_name) == {"card.json", "model.safetensors"}
    weights = (folder / "model.safetensors").read_bytes()
    assert by_name["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert by_name["model.safetensors"]["bytes"] == len(weights)


def test_it_reads_well(models: Path, capsys: Captured) -> None:
    assert cli.main(["info", str(models / "single")]) == 0
    printed = capsys.readouterr().out
    assert "4; a clip has one (softmax); read from mean" in printed
    assert "نباح كلب" in printed
    assert "license     CC0-1.0" in printed
    assert "0.495 s at 16000 Hz" in printed
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert cli.main(["info", str(models / "single"), "--labels"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["dog", "rain"]


def test_an_encoder_says_how_it_gets_labels(models: Path, capsys: Captured) -> None:
    assert cli.main(["info", str(models / "encoder")]) == 0
    assert "none: an encoder" in capsys.readouterr().out
    assert cli.main(["info", str(models / "encoder"), "--labels"]) == 2
    assert "has no labels" in capsys.readouterr().err


def test_a_run_s_folder_tells_its_model_and_its_scores(models: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(models / "single", tmp_path / "run" / "model")
    metrics = {"accuracy": {"value": 0.75, "interval": [0.7, 0.8]}, "mAP": {"value": None}}
    results = [
        {"split": split, "weights": weights, "clips": 12, "list": "ab", "metrics": metrics}
        for split in ("validation", "test")
        for weights in ("last", "best")
    ]
    (tmp_path / "run" / "results.json").write_text(json.dumps({"results": results}))
    for given in ("run", "run/model"):
        assert cli.main(["info", str(tmp_path / given)]) == 0
        printed = capsys.readouterr().out
        assert "scored      validation, 12 clips: accuracy 0.7500\n" in printed
        assert printed.count("scored") == 2, "of the last weights alone: these are they"


def test_a_card_cannot_steer_the_terminal(models: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(models / "single", tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    card["training"]["license"] = "MIT\x1b[2J"
    (tmp_path / "model" / "card.json").write_text(json.dumps(card))
    assert cli.main(["info", str(tmp_path / "model")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "MIT\\x1b[2J" in printed


def two_labels(content: bytes) -> bytes:
    card = json.loads(content)
    return json.dumps(card | {"labels": card["labels"] | {"classes": ["dog", "rain"]}}).encode()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", lambda held: held[:-100], "model.safetensors is damaged: its SHA-256 is not the one in"),
        ("model.safetensors", lambda held: held[:-5] + bytes([held[-5] ^ 1]) + held[-4:], "is damaged: its SHA-256"),
        ("card.json", lambda held: held.replace(b'"depth": 2', b'"depth": 3'), "the Encoder: 12 missing (blocks.2."),
        ("card.json", two_labels, "does not fit the Head"),
        ("card.json", lambda held: b"{", "card.json is damaged"),
        (None, None, "does not exist"),
    ],
)
def test_damage_is_said(
    models: Path, tmp_path: Path, capsys: Captured, file: str | None, damage: Callable[[bytes], bytes], message: str
) -> None:
    if file is not None:
        shutil.copytree(models / "single", tmp_path / "model")
        (tmp_path / "model" / file).write_bytes(damage((tmp_path / "model" / file).read_bytes()))
    assert cli.main(["info", str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert (captured.out, message in captured.err) == ("", True)
