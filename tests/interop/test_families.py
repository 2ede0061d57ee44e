"""Checkpoints of other families: each is named by its tensors, refused plainly, and never taken for an ASiT."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asit.cli import main
from asit.errors import CheckpointError
from asit.interop import convert
from asit.interop.convert import SourceOptions, families

WIDTH = 64


def vit(
    positions: int | Tensor, patch: tuple[int, int] = (16, 16), channels: int = 1, **more: Any
) -> dict[str, Tensor]:
    """An encoder with timm's names, its positions learned or given."""
    learned = isinstance(positions, int)
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, WIDTH), "patch_embed.proj.weight": (WIDTH, channels, *patch)}
    shapes |= {"patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= {f"blocks.0.norm{n}.{kind}": (WIDTH,) for n in (1, 2) for kind in ("weight", "bias")}
    for name, (out, inn) in {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}.items():
        shapes |= {f"blocks.0.{name}.weight": (out * WIDTH, inn * WIDTH), f"blocks.0.{name}.bias": (out * WIDTH,)}
    out = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    out["pos_embed"] = 0.02 * torch.randn(1, 1 + positions, WIDTH, generator=generator) if learned else positions
    return {**out, **more}


def sines(rows: int, columns: int, prefix: int = 1) -> Tensor:
    """Positions of MAE (arXiv 2111.06377): half of the width for each coordinate, sines, then cosines."""
    rate = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH / 4))
    y, x = np.mgrid[:rows, :columns].reshape(2, -1)
    halves = [function(at[:, None] * rate) for at in (x, y) for function in (np.sin, np.cos)]
    table = np.concatenate([np.zeros((prefix, WIDTH)), np.concatenate(halves, 1)])
    return torch.from_numpy(table).float()[None]


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2) for name in names}


BEATS = named(
    "post_extract_proj.weight", "patch_embedding.weight", "encoder.layers.0.self_attn.grep_linear.weight",
    "encoder.layers.0.self_attn.grep_a", "encoder.layers.0.self_attn.k_proj.weight",
)  # fmt: skip
EAT = named(
    "modality_encoders.IMAGE.extra_tokens", "modality_encoders.IMAGE.local_encoder.proj.weight",
    "modality_encoders.IMAGE.fixed_positional_encoder.positions", "blocks.0.attn.qkv.weight",
)  # fmt: skip
FAIRSEQ = named("mask_emb", "feature_extractor.conv_layers.0.0.weight", "encoder.layers.0.self_attn.k_proj.weight")
DASHENG = named("encoder.init_bn.1.weight", "encoder.time_pos_embed", "encoder.freq_pos_embed", "outputlayer.1.weight")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"cfg": {"encoder_layers": 12}, "model": BEATS}, "BEATs"),
        (BEATS, "BEATs"),
        (under("model.beats.", BEATS), "BEATs"),
        ({"model": EAT, "cfg": {"seed": 1}}, "EAT"),
        (named("model.local_encoder.proj.weight", "model.extra_tokens", "model.blocks.0.norm1.weight"), "EAT"),
        ({"state_dict": named("model.teacher.encoder.norm_frame.weight", "model.teacher.encoder.mask_embed")}, "ATST"),
        ({"model": named("cls_token", "patch_embed.patch_embed.weight", "blocks.0.norm1.weight")}, "ATST"),
        (vit(190, norm_stats=torch.tensor([-7.1, 4.2])), "M2D"),
        ({"model": under("module.ar.runtime.backbone.", vit(190))}, "M2D"),
        (vit(512, **named("mask_token", "decoder_embed.weight", "decoder_blocks.0.x")), "AudioMAE"),
        ({"model": vit(512, **named("fc_norm.weight", "head.weight"))}, "AudioMAE"),
        (named("cls_token", "new_pos_embed", "freq_new_pos_embed", "time_new_pos_embed", "blocks.0.x"), "PaSST"),
        (under("net.", named("cls_token", "freq_new_pos_embed", "time_new_pos_embed")), "PaSST"),
        ({"model": DASHENG}, "Dasheng"),
        ({"model": {**FAIRSEQ, **named("quantizer.vars", "project_q.weight")}}, "wav2vec2"),
        ({"model": {**FAIRSEQ, **named("label_embs_concat", "final_proj.weight")}}, "HuBERT"),
        ({"model": FAIRSEQ}, "wav2vec2 or HuBERT"),
        ({"model_state_dict": named("encoder.conv1.weight", "encoder.blocks.0.attn.query.weight")}, "Whisper"),
        ({"state_dict": named("module.audio_branch.layers.0.blocks.0.norm1.weight", "module.text_branch.x")}, "CLAP"),
        (named("audio_encoder.base.htsat.norm.weight", "caption_encoder.base.x"), "CLAP"),
        (named("patch_embed_a.proj.weight", "blocks_a.0.norm1.weight"), "CAV-MAE"),
        ({"model": named("spectrogram_extractor.stft.conv_real.weight", "conv_block1.conv1.weight")}, "PANNs"),
        (vit(256, channels=3, **named("blocks.0.ls1.gamma")), "DINOv2"),
        (vit(196, channels=3, **named("decoder_embed.weight")), "masked autoencoder of images"),
        ({"encoder": {"weights": EAT}}, "EAT"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_a_family_is_named_and_refused(tmp_path: Path, content: Any, name: str, suffix: str) -> None:
    for kind in ("auto", "asit"):
        with pytest.raises(CheckpointError, match=f"by the names in it, .*{name}(.|\n)*does not support") as caught:
            convert.convert(saved(tmp_path / f"x{suffix}", content), SourceOptions(kind=kind))
        assert "--kind" not in str(caught.value)
        assert "no option converts it" in str(caught.value)


def of_transformers() -> Iterable[tuple[str, nn.Module]]:
    import transformers as hf

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    wave = {**size, "conv_dim": (8,) * 7}
    yield "wav2vec2", hf.Wav2Vec2Model(hf.Wav2Vec2Config(**wave))
    yield "wav2vec2", hf.Wav2Vec2ForPreTraining(hf.Wav2Vec2Config(**wave))
    yield "HuBERT", hf.HubertModel(hf.HubertConfig(**wave))
    yield "HuBERT", hf.HubertForCTC(hf.HubertConfig(**wave))
    yield "WavLM", hf.WavLMModel(hf.WavLMConfig(**wave))
    yield "data2vec", hf.Data2VecAudioModel(hf.Data2VecAudioConfig(**wave))
    depth = {
        f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads", "ffn_dim")
    }
    whisper = hf.WhisperModel(hf.WhisperConfig(d_model=16, vocab_size=51000, **depth))
    yield "Whisper", whisper
    yield "Whisper", whisper.encoder
    clap = {"depths": [1, 1], "num_attention_heads": [1, 1], "num_hidden_layers": 2, "patch_embeds_hidden_size": 16}
    audio = hf.ClapAudioConfig(hidden_size=32, window_size=2, spec_size=32, **clap)
    yield "CLAP", hf.ClapAudioModel(audio)
    yield "ViT of Hugging Face", hf.ViTModel(hf.ViTConfig(**size))


@pytest.mark.slow
def test_the_names_of_transformers_are_known(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name, model in of_transformers():
        with pytest.raises(CheckpointError, match=f"{name}.*does not support"):
            convert.convert(saved(tmp_path / "x.bin", model.state_dict()), SourceOptions())
    for kind in ("wav2vec2", "whisper", "clap", "\x1b[31mx"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(CheckpointError, match=r"says model_type .*, which asit does not support") as caught:
            convert.convert(tmp_path, SourceOptions())
        assert "\x1b" not in str(caught.value)


class Foreign:
    """What fairseq keeps beside the tensors: a class that reading would have to import."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Foreign, ()


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_family_is_named_where_the_file_cannot_be_read(tmp_path: Path, how: dict[str, bool]) -> None:
    path = tmp_path / "eat.pt"
    torch.save({"cfg": Foreign(), "model": EAT}, path, **how)
    with pytest.raises(CheckpointError, match="EAT, which asit does not support"):
        convert.convert(path, SourceOptions())
    torch.save({"cfg": Foreign(), "model": named("x")}, path, **how)
    with pytest.raises(CheckpointError, match=r"Foreign.*, and reading that could run code"):
        convert.convert(path, SourceOptions())


@pytest.mark.parametrize("positions", [sines(64, 8), sines(5, 38), sines(5, 32), sines(37, 8), sines(8, 37)])
@pytest.mark.parametrize("wrap", ["", "module.", "model"])
def test_positions_of_sines_are_no_asits(tmp_path: Path, positions: Tensor, wrap: str) -> None:
    content: Any = {"model": vit(positions)} if wrap == "model" else under(wrap, vit(positions))
    for ask in (SourceOptions(), SourceOptions(kind="asit", mels=128), SourceOptions(mels=80)):
        with pytest.raises(CheckpointError, match=r"sines and cosines: it is AudioMAE, .*M2D.*does not support"):
            convert.convert(saved(tmp_path / "x.pth", content), ask)


def test_learned_positions_and_other_layouts_of_sines() -> None:
    for scale in (0.02, 0.2, 0.5):
        assert not families.are_sines(scale * torch.randn(1, 97, 64, generator=torch.Generator().manual_seed(1)), 1)
    at, rate = torch.arange(50.0)[:, None], torch.logspace(0, -4, 32)
    one = torch.stack([(at * rate).sin(), (at * rate).cos()], 2).flatten(1)
    assert families.are_sines(torch.cat([torch.zeros(1, 64), one])[None], 1)
    assert families.are_sines(torch.cat([(at * rate).sin(), (at * rate).cos()], 1)[None], 0)
    assert families.are_sines(sines(8, 4, 2).half(), 2)
    assert not families.are_sines(torch.zeros(1, 1, 64), 1)


def test_bare_names_say_what_they_were_taken_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "x.pth", vit(296))
    assert main(["convert", str(path), "--out", str(tmp_path / "m")]) == 0
    assert "Assumed to be ASiT, by its names alone: AudioMAE, M2D, MSM-MAE, DINO and iBOT name" in caplog.text
    assert "Mean -4.2677393 and std 4.5689974 are assumed" in caplog.text
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["training"]["source"]["taken_for"].startswith("ASiT, by its names alone: AudioMAE, M2D")
    caplog.clear()
    teacher = {**under("backbone.", vit(296)), **named("head_recons.mlp.0.weight")}
    convert.convert(saved(tmp_path / "y.pth", {"teacher": teacher}), SourceOptions())
    assert "by its names alone" not in caplog.text


@pytest.mark.parametrize(
    ("positions", "patch", "text"),
    [
        (160, (16, 16), "40 x 4 over 64, 32 x 5 over 80, 20 x 8 over 128"),  # of 80 x 512
        (190, (16, 16), "38 x 5 over 80"),  # of 80 x 608
        (65, (16, 16), "13 x 5 over 80"),  # of 80 x 208
        (1024, (8, 8), "64 x 16 over 128"),
        (7, (16, 16), "none divides"),
    ],
)
def test_a_grid_that_no_published_asit_has_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, positions: int, patch: tuple[int, int], text: str
) -> None:
    path = saved(tmp_path / "x.pth", vit(positions, patch))
    with pytest.raises(
        CheckpointError, match=f"{positions} positions of patches(.|\n)*{text}(.|\n)*--kind asit --mels"
    ):
        convert.convert(path, SourceOptions())
    if positions != 7:
        mels = 80 if positions % 5 == 0 else 128
        done = convert.convert(path, SourceOptions(kind="asit", mels=mels))
        assert done.model.encoder.grid[1] == mels // patch[1]
        assert "Assumed to be ASiT, by its names alone" in caplog.text


def test_an_image_network_of_other_patches_is_refused(tmp_path: Path) -> None:
    dino = vit(28 * 28, (8, 8), 3)
    with pytest.raises(CheckpointError, match=r"has patches of 8x8 pixels(.|\n)*16x16"):
        convert.convert(saved(tmp_path / "x.pth", dino), SourceOptions(frames=592))
    head = named("head.mlp.0.weight", "head.last_layer.weight_g", "head.last_layer.weight_v")
    whole = {"student": {**under("module.backbone.", dino), **under("module.", head)}, "epoch": 3}
    whole["teacher"] = {**under("backbone.", dino), **head}
    for which in ("teacher", "student"):
        with pytest.raises(CheckpointError, match=r"3 channels and 784 positions of patches of 8x8: it is an image"):
            convert.convert(saved(tmp_path / "y.pth", whole), SourceOptions(which=which))
    square = {"teacher": {**under("backbone.", vit(576, channels=3)), **head}}
    with pytest.raises(CheckpointError, match="it is an image network"):
        convert.convert(saved(tmp_path / "z.pth", square), SourceOptions())
    with pytest.raises(CheckpointError, match=r"has patches of 14x14 pixels"):
        convert.convert(saved(tmp_path / "w.pth", vit(256, (14, 14), 3)), SourceOptions(frames=592))


def test_a_lightning_checkpoint_is_its_network(tmp_path: Path) -> None:
    want = convert.convert(saved(tmp_path / "x.pth", vit(296)), SourceOptions()).model.encoder.state_dict()
    state = {"epoch": 3, "loops": {"fit_loop": {"state_dict": {}}}, "pytorch-lightning_version": "2.5.0"}
    for prefix in ("model.", "net.encoder.", "asit.module.", "model.v.", "model.backbone."):
        for name in ("y.ckpt", "y.pth"):
            content = {**state, "state_dict": under(prefix, vit(296))}
            done = convert.convert(saved(tmp_path / name, content), SourceOptions(kind="asit"))
            assert all(torch.equal(value, want[key]) for key, value in done.model.encoder.state_dict().items())
            assert set(done.left_out) == set(state)
            assert done.model.training["source"]["kind"] == "asit"


@pytest.mark.parametrize("prefix", ["", "model."])
def test_an_unknown_head_is_left_out_on_request(tmp_path: Path, prefix: str) -> None:
    odd = {**under(prefix, vit(296)), **under(prefix, named("proj.0.weight", "classifier.weight", "temperature"))}
    content = {"state_dict": odd, "pytorch-lightning_version": "2"} if prefix else odd
    path = saved(tmp_path / "x.ckpt", content)
    with pytest.raises(CheckpointError, match=r"3 unknown tensors(.|\n)*pass --no-head"):
        convert.convert(path, SourceOptions())
    done = convert.convert(path, SourceOptions(no_head=True))
    assert {name for name, why in done.left_out.items() if "--no-head" in why} == {
        "proj.0.weight", "classifier.weight", "temperature"
    }  # fmt: skip
    assert done.model.head is None
    changed = {**odd, f"{prefix}blocks.0.lora.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.lora\.weight(.|\n)*a modified network"):
        convert.convert(saved(tmp_path / "y.pth", changed), SourceOptions(no_head=True))
    known = {**vit(296), "head.weight": torch.ones(3, WIDTH), "head.bias": torch.ones(3)}
    kept = convert.convert(saved(tmp_path / "z.pth", known), SourceOptions())
    assert (kept.model.classes, kept.model.head is None) == (("class 0", "class 1", "class 2"), False)
    assert convert.convert(saved(tmp_path / "z.pth", known), SourceOptions(no_head=True)).model.head is None


@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (527, "are assumed, AudioSet's as published with the code: the file has none$"),
        (35, r"its 35 classes are not AudioSet's.*--mean -6\.845978 --std 5\.5654526 for Speech Commands$"),
        (50, r"its 50 classes are not AudioSet's.*--mean -6\.6268077 --std 5\.358466 for ESC-50$"),
        (10, "its 10 classes are not AudioSet's: pass the --mean and --std of its recipe$"),
    ],
)
def test_assumed_statistics_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: int, text: str) -> None:
    head = {"mlp_head.0.weight": torch.ones(WIDTH), "mlp_head.0.bias": torch.zeros(WIDTH)}
    head |= {"mlp_head.1.weight": torch.ones(classes, WIDTH), "mlp_head.1.bias": torch.zeros(classes)}
    body = vit(24, dist_token=torch.zeros(1, 1, WIDTH))
    body["pos_embed"] = torch.zeros(1, 26, WIDTH)
    path = saved(tmp_path / "x.pth", {**under("module.v.", body), **under("module.", head)})
    convert.convert(path, SourceOptions(stride=(16, 16)))
    assert [note for note in caplog.messages if "assumed, AudioSet" in note and re.search(text, note)]
    caplog.clear()
    convert.convert(path, SourceOptions(stride=(16, 16), mean=-6.0, std=5.0))
    assert "assumed, AudioSet" not in caplog.text
