"""What `asit finetune` and `asit export` take of each family, and what they refuse: the table of docs/families.md."""

from __future__ import annotations

from pathlib import Path

import family_oracles as oracles
import numpy as np
import pytest
import soundfile
import torch

from asit.cli import main
from asit.config import EncoderSettings, FrontEndSettings
from asit.interop import convert
from asit.interop.convert import SourceOptions
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

FAMILIES = ("asit", "audiomae", "eat", "beats")


def model(family: str, path: Path) -> AudioModel:
    """An encoder of two blocks; ASiT's, which AST shares, with windows of a second."""
    if family == "asit":
        settings = EncoderSettings(size="custom", width=64, depth=2, heads=2)
        encoder = Encoder(settings, 96, 64)
        encoder.init_weights(torch.Generator().manual_seed(0))
        return AudioModel.from_parts(encoder, FrontEndSettings(mels=64, mean=-6.0, std=3.0), settings, 96)
    beats = {
        **{"encoder_layers": 2, "encoder_embed_dim": 128, "activation_fn": "gelu", "layer_norm_first": False},
        **{"deep_norm": True, "relative_position_embedding": True, "num_buckets": 320, "max_distance": 800},
        **{"gru_rel_pos": True, "conv_pos": 128, "conv_pos_groups": 16, "conv_bias": False, "embed_dim": 512},
    }
    content = {
        "audiomae": lambda: {"model": oracles.audiomae_weights(64)},
        "eat": lambda: {"args": None, "cfg": {"task": {"target_length": 1024}}, "model": oracles.eat_weights()},
        "beats": lambda: {"cfg": beats, "model": oracles.beats_weights()},
    }[family]()
    torch.save(content, path)
    return convert.convert(path, SourceOptions()).model


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family's name, and a table of twelve clips."""
    folder = tmp_path_factory.mktemp("families")
    rows = ["path,label,split"]
    for i in range(12):
        wave = 0.1 * np.random.default_rng(i).standard_normal(8000) * (1 + 2 * (i % 2))
        soundfile.write(folder / f"{i}.wav", np.clip(wave, -1, 1).astype(np.float32), 16000)
        rows.append(f"{i}.wav,{'ab'[i % 2]},{'train' if i < 8 else 'test'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    for family in FAMILIES:
        model(family, folder / f"{family}.pt").save(folder / family)
    return folder


def finetune(room: Path, family: str, out: Path, *more: str) -> int:
    how = f"--device cpu --workers 0 --threads 1 --batch-size 4 --epochs 1 --records.tensorboard False --out {out}"
    given = ["--model", str(room / family), "--data", str(room / "table.csv"), *how.split(), *more]
    return main(["finetune", *given, "--optim.layer-decay", "0.5", "--network.drop-path", "0.2"])


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_and_export(family: str, room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A beginning with layer decay and stochastic depth, another length, and exports of the result."""
    more = ["--network.pooling", "mean"] if family == "beats" else []
    if more:
        assert finetune(room, family, tmp_path / "refused") == 2
        assert "has no class token" in capsys.readouterr().err
    assert finetune(room, family, tmp_path / "FT", *more, "--input.seconds", "0.4") == 0, capsys.readouterr().err
    tuned = AudioModel.load(tmp_path / "FT" / "model")
    assert (tuned.classes, tuned.encoder.settings.drop_path) == (("a", "b"), 0.2)
    assert (room / family / "card.json").exists()
    assert main(["evaluate", str(tmp_path / "FT" / "model"), "--data", str(room / "table.csv"), "--device", "cpu"]) == 0
    capsys.readouterr()
    status = main(["export", str(tmp_path / "FT" / "model"), "--to", "huggingface", "--out", str(tmp_path / "hf")])
    said = capsys.readouterr().err
    if family == "asit":
        assert status == 0, said
    else:
        assert status == 2
        assert f"of family {tuned.encoder.settings.family}" in said
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_strides(family: str, room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--network.pooling", "mean"] if family == "beats" else []
    status = finetune(room, family, tmp_path / "FT", *more, "--network.stride-frames", "8", "--stop-after", "1")
    said = capsys.readouterr().err
    if family == "asit":
        assert status == 0, said
    else:
        assert status == 2
        assert "fixed positions" in said


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("torch", "pt2")])
def test_graphs(
    family: str, form: str, suffix: str, room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
    status = main(["export", str(room / family), "--to", form, "--out", str(tmp_path / f"m.{suffix}")])
    said = capsys.readouterr().err
    if family == "beats":
        assert status == 2
        assert "relative positions are not exported" in said
        assert not list(tmp_path.iterdir())
    else:
        assert status == 0, said
