"""asit convert: what it prints and writes, which files it refuses, and that no other family is taken for an ASiT."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_oracles import timm_blocks
from torch import Tensor, nn

from asit.cli import main
from asit.errors import AsitError, CheckpointError, ConfigError
from asit.interop import convert
from asit.interop.convert import SourceOptions, families
from asit.model.audio_model import AudioModel

WIDTH = 64


def vit(
    positions: int | Tensor, patch: tuple[int, int] = (16, 16), channels: int = 1, **more: Any
) -> dict[str, Tensor]:
    """An encoder with timm's names, its positions learned or given."""
    learned = isinstance(positions, int)
    generator = torch.Generator().manual_seed(0)
    shapes = {"cls_token": (1, 1, WIDTH), "patch_embed.proj.weight": (WIDTH, channels, *patch)}
    shapes |= {"patch_embed.proj.bias": (WIDTH,), "norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    shapes |= timm_blocks(WIDTH, 1)
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


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def named(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2) for name in names}


def encoder(distilled: bool = False) -> dict[str, Tensor]:
    """3 x 8 patches."""
    return vit(25, dist_token=torch.zeros(1, 1, WIDTH)) if distilled else vit(24)


def head(classes: int = 3) -> dict[str, Tensor]:
    norm = {"mlp_head.0.weight": torch.ones(WIDTH), "mlp_head.0.bias": torch.zeros(WIDTH)}
    return {**norm, "mlp_head.1.weight": torch.ones(classes, WIDTH), "mlp_head.1.bias": torch.zeros(classes)}


def ast(classes: int = 3) -> dict[str, Tensor]:
    return under("module.", {**under("v.", encoder(distilled=True)), **head(classes)})


def official() -> dict[str, Any]:
    teacher = {
        **under("backbone.", encoder()),
        "head.last_layer.weight_g": torch.ones(1),
        "head.mlp.0.bias": torch.ones(1),
    }
    return {"teacher": teacher, "epoch": 3, "args": argparse.Namespace(lr=1.0)}


def test_a_file_becomes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = saved(tmp_path / "asit.pth", official()), tmp_path / "model"
    assert main(["convert", str(path), "--out", str(out), "--license", "CC-BY-4.0"]) == 0
    said = capsys.readouterr().out
    assert "asit: 18 tensors mapped, 4 entries left out" in said
    assert "left out: projection head of pretraining (2: head.last_layer.weight_g, head.mlp.0.bias)" in said
    assert "left out: training state (2: epoch, args)" in said
    assert (
        "custom encoder, width 64, 1 blocks, 3 x 8 patches (time x mel) of 48 frames\nfront end: 16000 Hz, 128 mel bins"
        in said
    )
    assert f"Model: {out}" in said
    model = AudioModel.load(out)
    assert model.card["training"]["license"] == "CC-BY-4.0"
    assert model.card["training"]["source"]["left_out"]["epoch"] == "training state"
    assert torch.equal(model.encoder.pos_embed, official()["teacher"]["backbone.pos_embed"])
    assert main(["convert", str(path), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["convert", str(path), "--out", str(out), "--overwrite", "--frames", "96"]) == 0
    assert AudioModel.load(out).frames == 96
    capsys.readouterr()


def test_list_names_every_tensor_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "ast.pth", ast())
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(path), "--list", "--stride", "16"]) == 0
    said = capsys.readouterr()
    assert "blocks.0.mlp.fc2.weight (64, 256)" in said.out
    assert "head.linear.weight (3, 64)" in said.out
    assert "Assumed to be AST as its authors save it; else pass --kind ssast" in said.err
    assert "3 classes, named by number" in said.err
    assert "Assumed one class per clip (softmax) of 3 classes: else pass --answer multi" in said.err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "no output folder was given"),
        (["--out", "m", "--list"], "--list and --out are both given"),
        (["--out", "m", "--stride", "ten"], "--stride ten"),
        (["--out", "m", "--frames", "0"], "--frames 0"),
        (["--out", "m", "--kind", "bert"], "there is no kind 'bert'"),
        (["--out", "m", "--which", "student"], "holds the teacher and no student"),
        (["--out", "m", "--kind", "vit"], "looks like ASiT's own pretraining"),
        (["--out", "m", "--labels", "names.txt"], "has no head to convert, and --labels is given"),
        (["--out", "m", "--frames", "100"], "use 96 or 112 frames"),
        (["--out", "m", "--mels", "80"], r"makes 5 rows"),
        (["--out", "m", "--std", "-1"], "a front end of mean -4.2677393, std -1.0"),
        (["--out", "m", "--mean", "nan"], "a front end of mean nan"),
        (["--out", "m", "--rate", "900000000"], "rate 900000000"),
        (["--out", "m", "--seconds", "1e8"], "positions for 10000000000 frames are requested"),
        (["--out", "m", "--frames", "96", "--seconds", "2"], "frames and seconds are both given"),
        (["--out", "m", "--stride", "20"], "encoder.patch_stride_frames is 20, patches have 16"),
        (["--out", "data", "--overwrite"], "exists and is no model"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(Path("asit.pth"), official())
    Path("names.txt").write_text("a\nb\n")
    Path("data").mkdir()
    Path("data/mine.wav").write_bytes(b"")
    assert main(["convert", "asit.pth", *given]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["asit.pth", "data", "names.txt"]
    assert Path("data/mine.wav").exists()


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def nan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = state["module.v.norm.bias"].clone()
    bad[0] = float("nan")
    return {**state, "module.v.norm.bias": bad}


def quantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(torch.int8) if "fc1" in name else value for name, value in state.items()}


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"conv1.weight": torch.zeros(1)}, r"of no known kind \(conv1\.weight\)(.|\n)*ssast: SSAST"),
        ({**ast(), "module.v.blocks.0.lora": torch.zeros(1)}, r"1 unknown tensors \(v\.blocks\.0\.lora\)"),
        (nan(ast()), r"1 tensors with numbers that are not finite \(norm\.bias\)"),
        (without(ast(), "module.v.norm.bias"), r"1 missing \(norm\.bias\)"),
        (without(ast(), "module.mlp_head.1.bias"), r"of a head only mlp_head\.0\.bias"),
        (without(ast(), "module.v.blocks.0.attn.qkv.weight"), r"no blocks\.0\.attn\.qkv\.weight"),
        ({**ast(), "module.v.patch_embed.proj.weight": torch.ones(512, 1, 16, 16)}, "its patches are 512 wide"),
        ({**ast(), "module.v.pos_embed": torch.ones(1, 2 + 25, WIDTH)}, "positions of 25 patches"),
        ({**ast(), "module.mlp_head.1.weight": torch.ones(3, 32)}, r"\(its head\) does not fit"),
        (quantised(ast()), r"2 tensors that are no plain .*blocks\.0\.mlp\.fc1\.weight of torch\.int8"),
        (
            {**ast(), "p_input_fdim": torch.tensor(float("nan")), "p_input_tdim": torch.tensor(2.0)},
            "that are no two whole numbers",
        ),
        ({**ast(), "p_input_fdim": torch.tensor(128)}, "that are no two whole numbers"),
        (under("v.", encoder()), r"its names are ambiguous(.|\n)*--kind asit or --kind ssast"),
        ({**ast(), "x": Runs(Path("made"))}, r"holds (posix|nt)\.mkdir, and reading that could run code"),
        ({"v.cls_token": torch.zeros(1), "v.patch_embed.proj.weight": torch.zeros(1)}, "with 4 axes"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        convert.convert(saved(Path("x.pth"), content), SourceOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        (
            "class_labels_indices.csv",
            'index,mid,display_name\n0,/m/a,Speech\n1,/m/b,"Dog, bark"\n2,/m/c,Rain\n',
            "Dog, bark",
        ),
        ("x.json", json.dumps({"id2label": {"0": "Speech", "1": "Dog", "2": "Rain"}}), "Dog"),
        ("x.json", json.dumps({"classes": ["Speech", "Dog", "Rain"]}), "Dog"),
        ("x.tsv", "label\tn\nSpeech\t1\nDog\t2\nRain\t3\n", "Dog"),
    ],
)
def test_names_of_classes(tmp_path: Path, name: str, text: str, want: str) -> None:
    (tmp_path / name).write_text(text)
    done = convert.convert(
        saved(tmp_path / "x.pth", ast()), SourceOptions(kind="ast", labels=tmp_path / name, answer="multi")
    )
    assert done.model.classes == ("Speech", want, "Rain")
    assert done.model.multi
    assert done.model.card["training"]["source"]["labels"] == name


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("x.txt", "a\nb\n", r"x\.txt has 2 names \(a, b\), the head has 3 outputs"),
        ("x.txt", "a\nb\na\n", "'a' more than once"),
        ("x.csv", "index,display_name\n0,a\n2,b\n1,c\n", "has the index 0, 2, 1"),
        ("x.csv", "number,text\n0,a\n", "has the columns number, text"),
        ("x.json", "[1, 2]", r'holds a list\n.*a list under "classes"'),
        ("x.json", "[" * 100_000, r"x\.json is damaged: it is nested more than 100 deep(.|\n)*one name a line"),
        ("x.json", '{"classes": ["\\ud800", "b", "c"]}', r"holds '\\ud800', half of a surrogate pair"),
        ("x.csv", "index,display_name\n0,a\n1\n2,c\n", r"x\.csv has no display_name in row 2"),
        ("x.csv", 'display_name\n"' + "x" * 200_000 + '"\n', r"x\.csv cannot be read: field larger than"),
        ("x.csv", 'display_name\n"a\n', r"x\.csv cannot be read: unexpected end of data"),
        ("x.txt", "a\x1b[2J\nb\n", r"has 2 names \('a\\x1b\[2J', b\)"),
        ("x.json", '{"classes": 3}', "has no names"),
        ("", "", "is a folder"),
        ("missing.csv", None, "is not there"),
    ],
)
def test_names_that_do_not_fit(tmp_path: Path, name: str, text: str | None, error: str) -> None:
    if name and text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(AsitError, match=error):
        convert.convert(saved(tmp_path / "x.pth", ast()), SourceOptions(kind="ast", labels=tmp_path / name))


def test_folders(tmp_path: Path) -> None:
    convert.convert(saved(tmp_path / "x.pth", official()), SourceOptions()).model.save(tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        with pytest.raises(CheckpointError, match=r"model is an asit model already(.|\n)*use it as it is"):
            convert.convert(place, SourceOptions())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is in an asit model folder"):
        convert.convert(tmp_path / "run" / "model" / "model.safetensors", SourceOptions())
    with pytest.raises(CheckpointError, match=r"config\.json is not there"):
        convert.convert(tmp_path, SourceOptions())
    (tmp_path / "names.txt").write_text("a\n")
    path = saved(tmp_path / "y.pth", ast(527))
    with pytest.raises(ConfigError, match=r"of AudioSet that is class_labels_indices\.csv"):
        convert.convert(path, SourceOptions(labels=tmp_path / "names.txt"))


def test_what_a_file_cannot_be_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flat = saved(tmp_path / "flat.pth", encoder())
    with pytest.raises(CheckpointError, match="holds one network and no student"):
        convert.convert(flat, SourceOptions(which="student"))
    fine = saved(tmp_path / "fine.pth", {**encoder(), "head.weight": torch.ones(3, WIDTH), "head.bias": torch.ones(3)})
    with pytest.raises(ConfigError, match=r"--pooling mean, and the head of .*fine\.pth reads class"):
        convert.convert(fine, SourceOptions(kind="asit", pooling="mean"))
    with pytest.raises(
        CheckpointError, match=r"24 positions(.|\n)*6 x 4 over 64, 4 x 6 over 96, 3 x 8 over 128(.|\n)*--kind asit"
    ):
        convert.convert(fine, SourceOptions())
    normed = saved(tmp_path / "normed.pth", {**under("v.", encoder()), **head()})
    assert convert.convert(normed, SourceOptions(kind="asit", pooling="mean")).model.card["labels"]["pooling"] == "mean"
    converted = convert.convert(normed, SourceOptions(kind="asit"))
    assert converted.model.card["labels"]["pooling"] == "class"
    assert "Assumed that the head reads the class token" in caplog.text
    peer = saved(tmp_path / "ast.pth", ast())
    with pytest.raises(ConfigError, match="is of kind ast, and --which student is given"):
        convert.convert(peer, SourceOptions(which="student"))
    sizes = {"p_input_fdim": torch.tensor(128), "p_input_tdim": torch.tensor(48)}
    ssast = saved(tmp_path / "ssast.pth", {**under("v.", encoder(distilled=True)), **sizes})
    with pytest.raises(CheckpointError, match="says 128 mel bins, and its stride is that of the patches, 16x16"):
        convert.convert(ssast, SourceOptions(stride=(10, 10)))
    assert convert.convert(ssast, SourceOptions()).model.card["grid"] == [3, 8]
    wrong = saved(
        tmp_path / "w.pth", {**under("v.", encoder(distilled=True)), **sizes, "p_input_tdim": torch.tensor(96)}
    )
    with pytest.raises(CheckpointError, match="says that its input had 96 frames by 128"):
        convert.convert(wrong, SourceOptions())


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
        with pytest.raises(
            CheckpointError, match=f"by the names in it, .*{name}(.|\n)*(does not support|not AudioMAE)"
        ) as caught:
            convert.convert(saved(tmp_path / f"x{suffix}", content), SourceOptions(kind=kind))
        assert re.search("no option converts (it|another)", str(caught.value))


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
    torch.save({"cfg": Foreign(), "model": FAIRSEQ}, path, **how)
    with pytest.raises(CheckpointError, match="wav2vec2 or HuBERT, which asit does not support"):
        convert.convert(path, SourceOptions())
    for tensors in (EAT, named("x")):
        torch.save({"cfg": Foreign(), "model": tensors}, path, **how)
        with pytest.raises(CheckpointError, match=r"Foreign.*, and reading that could run code"):
            convert.convert(path, SourceOptions())


@pytest.mark.parametrize("positions", [sines(64, 8), sines(5, 38), sines(5, 32), sines(37, 8), sines(8, 37)])
@pytest.mark.parametrize("wrap", ["", "module.", "model"])
def test_positions_of_sines_are_no_asits(tmp_path: Path, positions: Tensor, wrap: str) -> None:
    content: Any = {"model": vit(positions)} if wrap == "model" else under(wrap, vit(positions))
    for ask in (SourceOptions(), SourceOptions(kind="asit", mels=128), SourceOptions(mels=80)):
        with pytest.raises(CheckpointError, match=r"sines and cosines: it is AudioMAE, .*M2D(.|\n)*--kind audiomae"):
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
    path = saved(tmp_path / "x.pth", ast(classes))
    convert.convert(path, SourceOptions(stride=(16, 16)))
    assert [note for note in caplog.messages if "assumed, AudioSet" in note and re.search(text, note)]
    caplog.clear()
    convert.convert(path, SourceOptions(stride=(16, 16), mean=-6.0, std=5.0))
    assert "assumed, AudioSet" not in caplog.text
