"""Encoders of other families against float64 networks in the sources' axes, names and order of operations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import family_oracles as oracles
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import CheckpointError, ConfigError
from asit.interop import convert, huggingface, initial_encoder
from asit.interop.convert import SourceOptions
from asit.interop.exportable import Waveform, compare
from asit.model.audio_model import AudioModel
from asit.model.beats import relative_buckets
from asit.model.classifier import Classifier, Head
from asit.model.encoders import empty_encoder, meta_encoder
from asit.model.imagenet import load_imagenet
from asit.training.optim import layer_scales

Answer = tuple[Tensor, Tensor | None]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """A sweep over noise, so that no mel bin is near the floor."""
    rng, t = np.random.default_rng(seed), np.arange(round(seconds * 16000)) / 16000
    sweep = np.sin(2 * np.pi * (100 * t + 300 * t**2)) * (0.5 + 0.5 * np.sin(3 * t))
    return (0.05 * sweep + 0.15 * rng.standard_normal(len(t))).astype(np.float32)


def agree(model: AudioModel, ours: Tensor, x: Tensor, whole: Answer, network: Answer) -> None:
    """Compare our input with the source's, and our tokens and logits with those of both inputs.

    In float32 a bin whose energy nearly cancels has an error of up to 1e-4, here as in torchaudio.
    """
    torch.testing.assert_close(ours.double(), x, atol=2e-4, rtol=0)
    got = model.encoder(ours)
    first = 0 if model.encoder.prefix == 0 else 1
    for want, close in ((network, CLOSE), (whole, {"atol": 1e-4, "rtol": 0.0})):
        torch.testing.assert_close(got.patches.double(), want[0][:, first:], **close)
        if first:
            torch.testing.assert_close(got.cls.double(), want[0][:, 0], **close)
    if whole[1] is not None:
        for want in (whole, network):
            torch.testing.assert_close(model.logits(ours).double(), want[1], **CLOSE)


def audiomae(tmp_path: Path, head: int | None = None, columns: int = 64, **options: Any) -> tuple[AudioModel, Any]:
    weights = oracles.audiomae_weights(columns, head=head)
    extra = {"optimizer": {}, "epoch": 3, "scaler": {}, "args": argparse.Namespace(output_dir=Path("/experiments/7"))}
    path = saved(tmp_path / "audiomae.pth", {"model": weights, **extra})
    return convert.convert(path, SourceOptions(**options)).model, weights


@pytest.mark.parametrize(("head", "seconds"), [(None, 10.5), (527, 10.0), (5, 4.0)])
def test_audiomae_from_the_waveform(tmp_path: Path, head: int | None, seconds: float) -> None:
    model, weights = audiomae(tmp_path, head)
    wave = sound(seconds)
    x = oracles.padded(oracles.logmel(wave), 1024)
    ours = model.input(torch.from_numpy(wave[: model.front_end.samples_for(1024)])[None])
    agree(model, ours, x, oracles.audiomae(weights, x), oracles.audiomae(weights, ours))
    assert model.multi == (head == 527)
    assert model.card["training"]["source"]["kind"] == "audiomae"


def test_audiomae_keeps_the_first_columns_for_shorter_inputs_and_has_no_longer_ones(tmp_path: Path) -> None:
    model, weights = audiomae(tmp_path)
    x = torch.randn(2, 1, 320, 128, generator=torch.Generator().manual_seed(1))
    tokens, _ = oracles.audiomae(weights, x)
    for stretch in (False, True):
        torch.testing.assert_close(model.encoder(x, stretch=stretch).patches.double(), tokens[:, 1:], **CLOSE)
    with pytest.raises(ConfigError, match=r"an input of 65 x 8 patches.*fixed positions of 64 x 8"):
        model.encoder(torch.zeros(1, 1, 1040, 128))
    shorter, _ = audiomae(tmp_path, frames=320)
    assert torch.equal(shorter.encoder(x).patches, model.encoder(x).patches)
    with pytest.raises(ConfigError, match="audiomae has no other positions"):
        audiomae(tmp_path, seconds=12.0)
    long = model.embed(sound(13.0))  # two windows instead of one of 1.3 views
    first = model.embed(sound(13.0)[: model.front_end.samples_for(1024)])
    assert long.grid[0] > 64
    torch.testing.assert_close(long.frames[:40], first.frames[:40], **CLOSE)


@pytest.mark.parametrize("columns", [32, 8])
def test_audiomae_of_other_lengths_by_its_positions(tmp_path: Path, columns: int) -> None:
    model, weights = audiomae(tmp_path, 50, columns)  # ESC-50 and Speech Commands: 512 and 128 frames
    x = torch.randn(1, 1, 16 * columns, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(x).double(), oracles.audiomae(weights, x)[1], **CLOSE)
    assert (model.frames, model.multi) == (16 * columns, False)


def check_round_trip_padding_and_rows(model: AudioModel, folder: Path, clips: int) -> None:
    """Saved and loaded the model is the same; a row depends neither on the others nor on what is not valid."""
    model.save(folder)
    again = AudioModel.load(folder)
    assert again.card == model.card
    waves = torch.from_numpy(np.stack([sound(3.0, seed) for seed in range(clips)]))
    both = model.scores(waves)
    assert torch.equal(both, again.scores(waves))
    torch.testing.assert_close(both[1:2], model.scores(waves[1:2]), **CLOSE)
    x = torch.randn(2, 1, 320, 128, generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(160) < torch.tensor([[160], [80]])).bool()
    x[1, :, 160:] = 1e4  # not read
    got = model.encoder(x, valid=valid)
    torch.testing.assert_close(got.patches[1:, :80], model.encoder(x[1:, :, :160]).patches, **CLOSE)
    assert not got.patches[1, 80:].any()


def test_audiomae_round_trip_padding_and_rows(tmp_path: Path) -> None:
    model, _ = audiomae(tmp_path, 5)
    check_round_trip_padding_and_rows(model, tmp_path / "m", 3)
    assert model.card["encoder"]["family"] == "audiomae-finetuned"


def test_fresh_fixed_positions_equal_the_published_ones(tmp_path: Path) -> None:
    model, weights = audiomae(tmp_path)
    model.encoder.init_weights(torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encoder.pos_embed, weights["pos_embed"], atol=1e-6, rtol=0)
    assert "pos_embed" not in dict(model.encoder.named_parameters())


@pytest.mark.parametrize(("width", "blocks", "head"), [(768, 12, None), (768, 12, 527), (1024, 24, None)])
def test_the_published_geometry_of_audiomae(tmp_path: Path, width: int, blocks: int, head: int | None) -> None:
    from asit.interop.convert.detect import KINDS, choose

    with torch.device("meta"):
        shapes = oracles.timm_blocks(width, blocks)
    state = {name: torch.empty(1).expand(shape) for name, shape in shapes.items()}
    small = oracles.audiomae_weights(64, width=width, blocks=0, head=head)
    content = {"model": {**small, **state}}
    assert choose(tmp_path / "x", content, "auto") == "audiomae"
    source = KINDS["audiomae"][1](tmp_path / "x", content, SourceOptions())
    meta = meta_encoder(source.settings, source.frames, source.front_end.mels).state_dict()
    assert {name: tuple(value.shape) for name, value in meta.items()} == {
        name: tuple(value.shape) for name, value in source.state.items()
    }
    assert (source.frames, source.front_end.padding, source.front_end.rate) == (1024, "zero", 16000)
    assert source.settings.size == {768: "base", 1024: "large"}[width]


def test_damaged_and_unknown_audiomaes_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = oracles.audiomae_weights(4, head=5)
    path = tmp_path / "x.pth"

    def refused(state: dict[str, Any], text: str, kind: str = "audiomae") -> None:
        with pytest.raises(CheckpointError, match=text):
            convert.convert(saved(path, {"model": state}), SourceOptions(kind=kind))

    def without(*names: str) -> dict[str, Any]:
        return {name: value for name, value in whole.items() if name not in names}

    refused(without("blocks.1.norm2.bias"), r"1 missing \(blocks.1.norm2.bias\)")
    refused(without("head.bias"), "has of a head only")
    refused(without("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"), "neither norm nor fc_norm")
    refused(
        {**whole, "norm.weight": torch.ones(128), "norm.bias": torch.ones(128)}, "norm and fc_norm", kind="audiomae"
    )
    refused({**whole, "blocks.0.ls1.gamma": torch.ones(128)}, "1 unknown tensors|does not support")
    refused(
        {**whole, "blocks.0.mlp.fc1.weight": torch.ones(8, 128)}, "blocks.1.mlp.fc1.weight of shape", kind="audiomae"
    )
    refused({**whole, "pos_embed": whole["pos_embed"][:, :30]}, "positions of 29 patches")
    refused({**whole, "norm_stats": torch.ones(2)}, "M2D, which asit does not support", "auto")
    learned = {**whole, "pos_embed": 0.1 * torch.randn(1, 33, 128, generator=torch.Generator().manual_seed(0))}
    refused(learned, "and its positions are not AudioMAE's(.|\n)*pass --kind audiomae", "auto")
    model = convert.convert(saved(path, learned), SourceOptions(kind="audiomae")).model
    assert "Positions are not those of AudioMAE's formula: kept" in caplog.text
    x = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(x).double(), oracles.audiomae(learned, x)[1], **CLOSE)


def eat(tmp_path: Path, head: int | None = None, hub: bool = False, **options: Any) -> tuple[AudioModel, Any]:
    weights = oracles.eat_weights(head=head, hub=hub)
    if hub:
        folder = tmp_path / "hub"
        folder.mkdir(exist_ok=True)
        save_file(weights, folder / "model.safetensors")
        config = {"model_type": "eat", "layer_norm_first": False, "num_heads": 2, "norm_eps": 1e-6}
        (folder / "config.json").write_text(json.dumps({**config, "img_size": [1024, 128]}))
        return convert.convert(folder, SourceOptions(**options)).model, weights
    if head is None:
        teacher = {"blocks.0.norm1.weight": torch.ones(128)}
        content = {"args": None, "cfg": {"task": {"target_length": 1024}}, "model": {**weights, "_ema": teacher}}
    else:
        cfg = {"model": {"prediction_mode": "CLS_TOKEN", "target_length": 1024}, "task": {"target_length": 512}}
        content = {"cfg": cfg, "model": weights, "extra_state": {"epoch": 2}}
    return convert.convert(saved(tmp_path / "eat.pt", content), SourceOptions(**options)).model, weights


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize(("head", "seconds"), [(None, 10.0), (527, 4.0)])
def test_eat_from_the_waveform(tmp_path: Path, head: int | None, seconds: float, hub: bool) -> None:
    model, weights = eat(tmp_path, head, hub)
    wave, eps = sound(seconds), 1e-5 if hub else 1e-6
    x = oracles.padded(oracles.logmel(wave), 1024, -4.268, 4.569)
    ours = model.input(torch.from_numpy(wave)[None])
    agree(model, ours, x, oracles.eat(weights, x, eps), oracles.eat(weights, ours, eps))
    assert model.card["training"]["source"]["kind"] == "eat"


def test_eat_reads_other_lengths(tmp_path: Path) -> None:
    model, weights = eat(tmp_path)
    for frames in (320, 1280):  # fewer columns than the view, and more, which the file has positions for
        x = torch.randn(1, 1, frames, 128, generator=torch.Generator().manual_seed(1))
        tokens, _ = oracles.eat(weights, x)
        torch.testing.assert_close(model.encoder(x).patches.double(), tokens[:, 1:], **CLOSE)
        other, _ = eat(tmp_path, frames=frames)
        assert other.frames == frames
        torch.testing.assert_close(other.encoder(x).patches.double(), tokens[:, 1:], **CLOSE)
    longer, _ = eat(tmp_path, frames=1600)  # beyond the file: by the formula
    torch.testing.assert_close(longer.encoder(x).patches.double(), tokens[:, 1:], **CLOSE)


def test_eat_round_trip_padding_and_rows(tmp_path: Path) -> None:
    model, _ = eat(tmp_path, 5)
    check_round_trip_padding_and_rows(model, tmp_path / "m", 2)
    assert torch.isfinite(model.attention(sound(1.0)).map).all()


def test_damaged_and_unknown_eats_are_refused(tmp_path: Path) -> None:
    whole, path = oracles.eat_weights(head=5), tmp_path / "x.pt"

    def refused(content: dict[str, Any], text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            convert.convert(saved(path, content), SourceOptions())

    def without(name: str) -> dict[str, Any]:
        return {own: value for own, value in whole.items() if own != name}

    image = "model.modality_encoders.IMAGE."
    refused(without("model.blocks.1.mlp.fc1.bias"), r"1 missing \(blocks.1.mlp.fc1.bias\)")
    refused(without(f"{image}context_encoder.norm.bias"), r"1 missing \(norm.bias\)")
    refused(without(f"{image}fixed_positional_encoder.positions"), "has no pos_embed")
    refused(without("head.bias"), "has of a head only")
    refused({**whole, "model.norm.weight": torch.ones(128), f"{image}alibi_scale": torch.ones(1)}, "alibi_scale")
    refused({**whole, f"{image}extra_tokens": torch.ones(1, 2, 128)}, "2 extra tokens")
    refused({**whole, f"{image}fixed_positional_encoder.positions": torch.ones(1, 63, 128)}, "63 positions")
    for cfg in ({"layer_norm_first": True}, {"prediction_mode": "LIN_SOFTMAX"}, {"num_heads": "x"}, {"norm_eps": 0}):
        refused({"model": whole, "cfg": {"model": cfg}}, f"says {next(iter(cfg))}")
    mean = {"model": whole, "cfg": {"model": {"prediction_mode": "PredictionMode.MEAN_POOLING"}}}
    model = convert.convert(saved(path, mean), SourceOptions()).model
    x = torch.randn(1, 1, 1024, 128, generator=torch.Generator().manual_seed(1))
    assert model.head is not None
    assert model.head.pooling == "mean"
    torch.testing.assert_close(model.logits(x).double(), oracles.eat(whole, x, pooling="mean")[1], **CLOSE)


@pytest.mark.parametrize("family", ["audiomae", "eat"])
@pytest.mark.parametrize("head", [None, 5])
def test_the_exported_network_is_the_encoders(tmp_path: Path, family: str, head: int | None) -> None:
    model, _ = {"audiomae": audiomae, "eat": eat}[family](tmp_path, head)
    output: Any = "embedding" if head is None else "scores"
    network = Waveform(model, output).eval()
    with torch.no_grad():
        compare(model, output, lambda waves: network(torch.from_numpy(waves)).numpy(), 1e-5, "the network")
    with pytest.raises(ConfigError, match=r"of family (.|\n)*--to onnx"):
        huggingface.write(model, tmp_path / "hf")


@pytest.mark.parametrize("family", ["audiomae", "eat"])
def test_a_family_is_fine_tuned_with_layer_decay_and_stochastic_depth(tmp_path: Path, family: str) -> None:
    model, _ = {"audiomae": audiomae, "eat": eat}[family](tmp_path)
    settings = model.encoder.settings.changed({"drop_path": 0.5})
    encoder = empty_encoder(settings, 320, 128)
    initial_encoder.fill(encoder, "the model", model, "a page")
    assert model.head is None
    network = Classifier(encoder, Head(128, 5, "class+mean")).train()
    scales = layer_scales((name for name, _ in network.named_parameters()), 2, 0.5)
    assert scales["encoder.patch_embed.proj.weight"] == 0.25
    assert "encoder.pos_embed" not in scales
    x = torch.randn(3, 1, 320, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(encoder(x).patches, model.encoder(x).patches, **CLOSE)
    keep = torch.tensor([[[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 2.0, 1.0]]])
    network(x, drop=keep).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    dropped = encoder(x[1:2], drop=torch.tensor([[[0.0], [1.0]], [[0.0], [2.0]]]))
    torch.testing.assert_close(encoder(x, drop=keep).patches[1:2], dropped.patches, atol=1e-4, rtol=1e-4)
    for changed in ({"patch_stride_frames": 8}, {"patch_stride_mels": 8}):
        with pytest.raises(ConfigError, match="and fixed positions"):
            initial_encoder.fill(empty_encoder(settings.changed(changed), 320, 128), "the model", model, "a page")


CFG = {"encoder_layers": 2, "encoder_embed_dim": 128, "activation_fn": "gelu", "layer_norm_first": False,
       "deep_norm": True, "relative_position_embedding": True, "num_buckets": 320, "max_distance": 800,
       "gru_rel_pos": True, "conv_pos": 128, "conv_pos_groups": 16, "conv_bias": False, "embed_dim": 512}  # fmt: skip


def beats(tmp_path: Path, head: int | None = None, **options: Any) -> tuple[AudioModel, Any]:
    weights = oracles.beats_weights(head=head)
    content: dict[str, Any] = {"cfg": CFG, "model": weights}
    if head is not None:
        content["label_dict"] = {i: f"/m/{i}" for i in range(head)}
    return convert.convert(saved(tmp_path / "beats.pt", content), SourceOptions(**options)).model, weights


@pytest.mark.parametrize(("head", "seconds"), [(None, 10.0), (527, 10.0), (5, 3.2)])
def test_beats_from_the_waveform(tmp_path: Path, head: int | None, seconds: float) -> None:
    model, weights = beats(tmp_path, head)
    wave = sound(seconds)
    whole = oracles.logmel(wave, "povey", 32768.0)
    frames = len(whole) // 16 * 16  # the last frames, which fill no patch, are not read
    x = ((whole[:frames] - 15.41663) / (2 * 6.55582))[None, None]
    ours = model.front_end(torch.from_numpy(wave)[None])[:, :, :frames]
    agree(model, ours, x, oracles.beats(weights, x), oracles.beats(weights, ours))
    if seconds == 10.0 and head is not None:
        assert torch.equal(model.input(torch.from_numpy(wave)[None]), ours)
    if head == 527:
        assert model.classes is not None
        assert (model.classes[3], model.multi) == ("/m/3", True)
        scores = model.scores(torch.from_numpy(wave)[None]).double()
        torch.testing.assert_close(scores, oracles.beats(weights, x)[1].sigmoid(), **CLOSE)
    assert (model.frames, model.card["training"]["source"]["kind"]) == (992, "beats")


@pytest.mark.parametrize("distance", [800, 1280])
def test_relative_buckets(distance: int) -> None:
    at = torch.arange(-1500, 1501)
    want = [oracles.bucket(int(one), distance) for one in at]
    assert relative_buckets(at, distance).tolist() == want


def test_beats_round_trip_padding_rows_and_lengths(tmp_path: Path) -> None:
    model, weights = beats(tmp_path, 5)
    model.save(tmp_path / "m")
    again = AudioModel.load(tmp_path / "m")
    assert again.card == model.card
    assert (again.card["encoder"]["family"], again.card["front_end"]["window"]) == ("beats", "povey")
    x = torch.randn(2, 1, 320, 128, generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(160) < torch.tensor([[160], [80]])).bool()
    x[1, :, 160:] = 1e4  # not read
    got = again.encoder(x, valid=valid)
    short = model.encoder(x[1:, :, :160])
    torch.testing.assert_close(got.patches[1:, :80], short.patches, **CLOSE)
    torch.testing.assert_close(got.cls[1:], short.cls, **CLOSE)
    assert not got.patches[1, 80:].any()
    long = torch.randn(1, 1, 1120, 128, generator=torch.Generator().manual_seed(2))  # beyond the training length
    torch.testing.assert_close(model.encoder(long).patches.double(), oracles.beats(weights, long)[0], **CLOSE)
    waves = torch.from_numpy(np.stack([sound(3.0, seed) for seed in range(2)]))
    torch.testing.assert_close(model.scores(waves)[1:], again.scores(waves[1:]), **CLOSE)


def test_beats_is_fine_tuned_and_says_what_it_cannot_do(tmp_path: Path) -> None:
    model, _ = beats(tmp_path)
    encoder = empty_encoder(model.encoder.settings, 320, 128)
    initial_encoder.fill(encoder, "the model", model, "a page")
    network = Classifier(encoder, Head(128, 5, "mean")).train()
    scales = layer_scales((name for name, _ in network.named_parameters()), 2, 0.5)
    assert (scales["encoder.pos_conv.weight"], scales["encoder.blocks.1.attn.gate.weight"]) == (0.25, 1.0)
    x = torch.randn(3, 1, 320, 128, generator=torch.Generator().manual_seed(1))
    keep = torch.tensor([[[1.0, 0.0, 2.0], [1.0, 1.0, 0.0]], [[2.0, 0.0, 0.0], [0.0, 2.0, 1.0]]])
    network(x, drop=keep).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    for what, text in (
        (lambda: Classifier(encoder, Head(128, 5)), "has no class token"),
        (lambda: model.attention(sound(1.0)), "one with a class token"),
        (lambda: Waveform(model, "embedding"), "relative positions are not exported"),
        (lambda: huggingface.write(model, tmp_path / "hf"), "family beats, window povey"),
        (lambda: encoder(x, keep=torch.zeros(3, 2, dtype=torch.int64)), "all of them"),
        (lambda: initial_encoder.fill(empty_encoder(encoder.settings.changed({"patch_stride_frames": 8}), 320, 128),
                                      "the model", model, "a page"), "and fixed positions"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            what()


def test_damaged_and_unknown_beats_are_refused(tmp_path: Path) -> None:
    whole, path = oracles.beats_weights(head=5), tmp_path / "x.pt"

    def refused(state: dict[str, Any], text: str, **cfg: Any) -> None:
        with pytest.raises(CheckpointError, match=text):
            convert.convert(saved(path, {"cfg": CFG | cfg, "model": state}), SourceOptions())

    def without(name: str) -> dict[str, Any]:
        return {own: value for own, value in whole.items() if own != name}

    refused(without("encoder.layers.1.fc2.bias"), r"1 missing \(blocks.1.mlp.fc2.bias\)")
    refused(without("encoder.layers.1.self_attn.k_proj.bias"), r"only \['q', 'v'\]")
    refused(without("predictor.bias"), "has of a head only weight")
    refused(without("post_extract_proj.weight"), "no patch_embed.project.weight")
    refused(without("encoder.layers.0.self_attn.grep_linear.weight"), "1 missing")
    refused({**whole, "quantize.embedding.weight": torch.ones(2, 2)}, "1 unknown tensors")
    other = {"encoder.layers.1.self_attn.relative_attention_bias.weight": torch.ones(320, 2)}
    refused({**whole, **other}, "another encoder.layers.1.*than in layer 0")
    for name, value in (("layer_norm_first", True), ("deep_norm", False), ("gru_rel_pos", False), ("num_buckets", 32),
                        ("activation_fn", "glu"), ("max_distance", 10)):  # fmt: skip
        refused(whole, f"says {name}", **{name: value})


@pytest.mark.parametrize("head", [None, 527])
def test_the_published_geometry_of_beats(tmp_path: Path, head: int | None) -> None:
    from asit.interop.convert.detect import KINDS, choose

    content = {"cfg": CFG, "model": oracles.beats_weights(768, 12, head)}
    assert choose(tmp_path / "x", content, "auto") == "beats"
    source = KINDS["beats"][1](tmp_path / "x", content, SourceOptions())
    meta = meta_encoder(source.settings, source.frames, source.front_end.mels).state_dict()
    assert {name: tuple(value.shape) for name, value in meta.items()} == {
        name: tuple(value.shape) for name, value in source.state.items()
    }
    assert (source.settings.size, source.settings.norm_eps, len(source.left_out)) == ("base", 1e-5, 11)


@pytest.mark.parametrize("family", ["audiomae", "eat", "beats"])
def test_image_weights_are_of_another_family(tmp_path: Path, family: str) -> None:
    settings = EncoderSettings(size="custom", width=64, depth=1, heads=1).changed({"family": family})
    path = saved(tmp_path / "vit.pth", {"cls_token": torch.ones(1, 1, 64)})
    with pytest.raises(ConfigError, match=f"image weights for an encoder of family {family}"):
        load_imagenet(path, settings, 320, 128)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["audiomae", "eat"])
def test_a_family_in_onnxruntime(tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime")
    from asit.interop.onnx import export

    model, _ = {"audiomae": audiomae, "eat": eat}[family](tmp_path, 5)
    export(model, tmp_path / "m.onnx", int8=True)  # compares the float32 graph with the model
    with pytest.raises(ConfigError, match="relative positions are not exported"):
        export(beats(tmp_path)[0], tmp_path / "b.onnx")
