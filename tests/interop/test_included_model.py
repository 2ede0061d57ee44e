"""The model that is part of asit: its files, its card, every verb that takes it by name or by default, one score."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import asit
from asit import cli, hear, xares
from asit.demo.demo_dataset import build_dataset
from asit.errors import ConfigError
from asit.evaluate.frozen import evaluate_frozen, labelled_clips
from asit.evaluate.frozen_scores import FrozenSettings
from asit.interop import loading, model_names, model_registry
from asit.interop.model_registry import INCLUDED
from asit.runtime import World
from asit.tools.model_info import describe

FOLDER = loading.locate(INCLUDED)
FILES = ["CREDITS.md", "LICENSE", "README.md", "card.json", "model.safetensors"]
CLOSE = 1e-3
"""Difference of two ridge scores, whose targets are 0 and 1, below which rounding may swap them: features in float32
differ by some 1e-5 of their size between processors, which the ridge multiplies by at most about 100."""


def test_files_and_sizes() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6
    assert asit.list_models()[0].name == INCLUDED
    for word in ("CC BY-SA 4.0", "https://creativecommons.org/licenses/by-sa/4.0/legalcode"):
        assert word in (FOLDER / "LICENSE").read_text("utf-8")


def test_the_card() -> None:
    card = json.loads((FOLDER / "card.json").read_text("utf-8"))
    training = card["training"]
    assert card["sha256"] == hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert (training["license"], training["step"]) == ("cc-by-sa-4.0", training["steps"])
    known = model_registry.MODELS[INCLUDED]
    assert known.license is not None
    assert known.license.value == training["license"]
    facts = describe(INCLUDED)
    network, input_ = facts["network"], facts["input"]
    shape = (
        f"{network['depth']} blocks, width {network['width']}, {network['encoder_parameters'] / 1e6:.1f} M parameters"
    )
    patches = "patches of " + " x ".join(map(str, network["patch"])) + " (frames x mel bins)"
    assert known.size.value == f"{shape}; {patches}"
    frames = f"{input_['frames']} frames ({input_['frames'] / 100:.2f} s)"
    assert known.input.value == f"{input_['rate'] // 1000} kHz, {input_['mels']} mel bins, {frames}"
    assert known.data.value.startswith(f"{training['hours']:.1f} h ")
    readme = (FOLDER / "README.md").read_text("utf-8")
    for score in known.scores:
        assert score.value in [round(value, 3) for value in training["scores"].values()]
        assert f"{score.value:.3f}" in readme
    credited = (FOLDER / "CREDITS.md").read_text("utf-8")
    assert all(name.partition(" (")[0] in credited for name in training["data"]["collections"])


def test_weights_are_half_precision_and_computed_in_float32() -> None:
    from safetensors.torch import load_file

    stored = load_file(FOLDER / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    held = asit.load(INCLUDED).encoder.state_dict()
    assert all(torch.equal(held[name], value.float()) for name, value in stored.items())


def test_the_licences_are_in_the_package(repository: Path, tmp_path: Path) -> None:
    paths = [str(FOLDER / name) for name in FILES]
    ignored = subprocess.run(["git", "check-ignore", *paths], cwd=repository, capture_output=True, text=True)
    assert not ignored.stdout
    pytest.importorskip("hatchling")
    from hatchling.builders.wheel import WheelBuilder

    built = next(WheelBuilder(str(repository)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(built) as wheel:
        names = wheel.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        assert "License-Expression: Apache-2.0 AND CC-BY-SA-4.0" in wheel.read(metadata).decode()
    assert {f"asit/models/{INCLUDED}/{name}" for name in FILES} <= set(names)
    assert any(name.endswith(f"/licenses/src/asit/models/{INCLUDED}/LICENSE") for name in names)


@pytest.fixture
def sounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of work, with labelled noises in sounds/ and table.csv; there is no network."""

    def refused(*given: Any, **options: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "sounds").mkdir()
    rows = ["path,label,split"]
    for i in range(12):
        wave = 0.1 * np.random.default_rng(i).standard_normal(9600)
        soundfile.write(tmp_path / "sounds" / f"{i}.wav", np.cumsum(wave) / 50 if i % 2 else wave, 16000)
        rows.append(f"sounds/{i}.wav,{'low' if i % 2 else 'high'},{'train' if i < 8 else 'test'}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_every_verb_without_a_network(sounds: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["--device", "cpu", "--workers", "0", "--threads", "1", "--batch-size", "4", "--stop-after", "1"]
    for line, default in (
        (["info", INCLUDED], False),
        (["embed", INCLUDED, "sounds", "--out", "named.npz"], False),
        (["embed", "sounds", "--out", "folder.npz"], True),
        (["embed", "sounds/0.wav", "sounds/1.wav", "--out", "files.npz"], True),
        (["embed", "sounds/*.wav", "--out", "pattern.npz"], True),
        (["index", "sounds", "--out", "INDEX"], True),
        (["index", "--add", "--out", "INDEX"], False),  # the index's own
        (["similar", "INDEX", "sounds/0.wav"], False),
        (["evaluate", "--data", "table.csv"], True),
        (["evaluate", "--data", "table.csv", "--save", "HEAD"], True),
        (["probe", INCLUDED, "table.csv"], False),
        (["export", INCLUDED, "--to", "torch", "--out", "m.pt2"], False),
        (["pretrain", "--model", INCLUDED, "--data", "sounds", "--out", "RUN", *run], False),
        (["finetune", "--data", "table.csv", "--out", "FT", *run], True),
    ):
        assert cli.main(line) == 0, line
        assert (f"no model is named: {INCLUDED}" in capsys.readouterr().err) == default, line
    vectors = [np.load(f"{name}.npz")["vectors"] for name in ("named", "folder", "pattern")]
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])
    assert json.loads((sounds / "INDEX" / "card.json").read_text())["model"]["path"] == INCLUDED
    assert cli.main(["tag", INCLUDED, "sounds"]) == 2
    assert "it is an encoder" in capsys.readouterr().err
    monkeypatch.setenv("ASIT_MODEL", INCLUDED)
    assert hear.load_model("").scene_embedding_size == 192
    assert xares.AsitEncoder().output_dim == 192


def test_what_is_no_model(sounds: Path, capsys: Any) -> None:
    assert cli.main(["embed", INCLUDED]) == 2
    assert "no input" in capsys.readouterr().err
    assert cli.main(["embed", "sound", "sounds"]) == 2  # misspelled: no recordings, so it has to be a model
    assert "sound does not exist" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no model was given to start from"):
        asit.finetune("table.csv", "FT", "")


def test_recordings_are_told_from_models(sounds: Path) -> None:
    asit.load(INCLUDED).save("RUN/model")
    (sounds / "set" / "model").mkdir(parents=True)
    (sounds / "set" / "config.json").write_text("{}")
    for model in (INCLUDED, "RUN", "RUN/model", "RUN/model/model.safetensors", "owner/name", "nowhere", "ast"):
        assert not model_names.is_recordings(model), model
    for inputs in ("sounds", "set", "sounds/0.wav", "table.csv", "sounds/*.wav", "s3://bucket/shards"):
        assert model_names.is_recordings(inputs), inputs


def test_a_stored_score_is_reproduced(tmp_path: Path) -> None:
    """On clips that the demo renders: its stored accuracy, up to clips whose two best scores are as good as equal."""
    pytest.importorskip("pretty_midi")
    build_dataset(tmp_path / "data", seed=0, train_clips=300, test_clips=120)
    clips = labelled_clips(tmp_path / "data" / "labelled.csv", 1000, 0)
    margins = []

    def keep(_: dict[str, Any], scores: Any) -> None:
        best = np.sort(scores.scores, axis=1)
        margins.extend(best[:, -1] - best[:, -2])

    settings = FrozenSettings(probes=("linear",), validation=(), allow_shared_groups=True)
    found = evaluate_frozen(asit.load(INCLUDED), clips, settings, world=World(0, 1, torch.device("cpu"), ""), keep=keep)
    assert found is not None
    stored = json.loads((FOLDER / "card.json").read_text("utf-8"))["training"]["scores"]
    value = found.records[0]["metrics"]["accuracy"]["value"]
    assert len(margins) == 120
    undecided = np.mean(np.array(margins) < CLOSE)
    assert undecided < 0.05
    assert value == pytest.approx(stored["instruments of the demo, 240 and 120 clips, linear"], abs=undecided + 1e-9)
