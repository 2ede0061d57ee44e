"""asit convert: what it says, what it writes, and what it refuses in one line."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asit.cli import main
from asit.config import EncoderSettings
from asit.errors import AsitError, CheckpointError, ConfigError
from asit.interop import convert
from asit.interop.convert import SourceOptions
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

WIDTH = 64


def encoder(distilled: bool = False, frames: int = 48, mels: int = 128) -> dict[str, Tensor]:
    settings = EncoderSettings(size="custom", width=WIDTH, depth=1, heads=1, distilled=distilled)
    made = Encoder(settings, frames, mels)
    made.init_weights(torch.Generator().manual_seed(0))
    return made.state_dict()


def head(classes: int = 3) -> dict[str, Tensor]:
    norm = {"mlp_head.0.weight": torch.ones(WIDTH), "mlp_head.0.bias": torch.zeros(WIDTH)}
    return {**norm, "mlp_head.1.weight": torch.ones(classes, WIDTH), "mlp_head.1.bias": torch.zeros(classes)}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


def ast(classes: int = 3) -> dict[str, Tensor]:
    return under("module.", {**under("v.", encoder(distilled=True)), **head(classes)})


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


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
    told = convert.convert(normed, SourceOptions(kind="asit"))
    assert told.model.card["labels"]["pooling"] == "class"
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
