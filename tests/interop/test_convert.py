"""Converted weights against networks written here with the sources' own axes, names and operations."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_oracles import timm_blocks
from torch import Tensor
from torch.nn import functional as F

from asit.errors import CheckpointError, ConfigError
from asit.interop import convert
from asit.interop.convert import Converted, SourceOptions
from asit.model.audio_model import AudioModel

WIDTH, BLOCKS = 128, 2


def vit(patches: int, kernel: tuple[int, int] = (16, 16), tokens: int = 1, channels: int = 1) -> dict[str, Tensor]:
    """Random tensors of a transformer, norms and biases not trivial, kernel as the source's convolution has it."""
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, tokens + patches, WIDTH)}
    if tokens == 2:
        shapes["dist_token"] = (1, 1, WIDTH)
    shapes |= {"patch_embed.proj.weight": (WIDTH, channels, *kernel), "patch_embed.proj.bias": (WIDTH,)}
    shapes |= timm_blocks(WIDTH, BLOCKS) | {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return draw(shapes)


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: value + 1 if "norm" in name and name.endswith("weight") else value for name, value in out.items()}


def mlp_head(classes: int) -> dict[str, Tensor]:
    shapes = {"mlp_head.0.weight": (WIDTH,), "mlp_head.0.bias": (WIDTH,)}
    out = draw({**shapes, "mlp_head.1.weight": (classes, WIDTH), "mlp_head.1.bias": (classes,)}, seed=1)
    return {**out, "mlp_head.0.weight": out["mlp_head.0.weight"] + 1}


def norm(x: Tensor, w: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def through(w: Mapping[str, Tensor], x: Tensor, stride: tuple[int, int], positions: Tensor | None = None) -> Tensor:
    """The source's network over its own image (R, C, height, width), in float64 and one head at a time: (R, N, D)."""
    w = {name: value.double() for name, value in w.items()}
    x = F.conv2d(x.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=stride)
    x = x.flatten(2).transpose(1, 2)
    first = [w[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in w]
    x = torch.cat([*first, x], 1) + (w["pos_embed"] if positions is None else positions.double())
    for i in range(BLOCKS):
        y = norm(x, w, f"blocks.{i}.norm1", 1e-6)
        q, k, v = (y @ w[f"blocks.{i}.attn.qkv.weight"].T + w[f"blocks.{i}.attn.qkv.bias"]).chunk(3, -1)
        heads = [slice(64 * h, 64 * h + 64) for h in range(WIDTH // 64)]
        y = torch.cat([(q[..., h] @ k[..., h].mT / 8).softmax(-1) @ v[..., h] for h in heads], -1)
        x = x + y @ w[f"blocks.{i}.attn.proj.weight"].T + w[f"blocks.{i}.attn.proj.bias"]
        y = norm(x, w, f"blocks.{i}.norm2", 1e-6) @ w[f"blocks.{i}.mlp.fc1.weight"].T + w[f"blocks.{i}.mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        x = x + y @ w[f"blocks.{i}.mlp.fc2.weight"].T + w[f"blocks.{i}.mlp.fc2.bias"]
    return norm(x, w, "norm", 1e-6)


def classified(head: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
    w = {name: value.double() for name, value in head.items()}
    return norm(pooled, w, "mlp_head.0", 1e-5) @ w["mlp_head.1.weight"].T + w["mlp_head.1.bias"]


def image(*shape: int) -> Tensor:
    return torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(5))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def agree(done: Converted, ours: Tensor, want: Tensor, turned: bool) -> None:
    """Our tokens of `ours` (R, 1, T, F) against the source's (R, N, D); `turned`: the source's are mel-major."""
    tokens = done.model.encoder(ours)
    prefix = done.model.encoder.prefix
    time, mel = tokens.grid
    torch.testing.assert_close(tokens.cls.double(), want[:, :prefix].mean(1), atol=1e-5, rtol=1e-5)
    patches = want[:, prefix:]
    if turned:
        rows = [patches[:, m * time + t] for t in range(time) for m in range(mel)]
        patches = torch.stack(rows, 1)
    torch.testing.assert_close(tokens.patches.double(), patches, atol=1e-5, rtol=1e-5)


def under(prefix: str, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in w.items()}


def pretraining_heads(version: int, names: tuple[str, str]) -> dict[str, Tensor]:
    last = {1: ("head_cls.cls_layer", "head_cls.data_layer"), 2: ("head.last_layer",)}[version]
    mlp = {1: "head_cls.mlp", 2: "head.mlp"}[version]
    out = [f"{mlp}.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    out += [f"{layer}.{name}" for layer in last for name in names]
    out += [f"head_recons.mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")]
    return {name: torch.zeros(2) for name in [*out, "head_recons.convTrans.weight", "head_recons.convTrans.bias"]}


def official(version: int, names: tuple[str, str] = ("weight_g", "weight_v")) -> dict[str, Any]:
    teacher, heads = vit(6 * 8), pretraining_heads(version, names)
    student = {name: value + 0.01 for name, value in teacher.items()}
    return {
        "student": {**under("module.backbone.", student), **under("module.", heads)},
        "teacher": {**under("backbone.", teacher), **heads},
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": np.float64(5e-4), "betas": (0.9, 0.999)}]},
        "epoch": 7,
        "args": argparse.Namespace(num_mel_bins=128, data_mean=-4.5, data_std=4.0, arch="vit_base", lr=5e-4),
        "CLS_PATCH_loss": {"center": torch.zeros(1, 4)},
        "fp16_scaler": {"scale": 65536.0, "_growth_tracker": 0},
    }


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "names", [("weight_g", "weight_v"), tuple(f"parametrizations.weight.original{i}" for i in "01")]
)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_official_asit(tmp_path: Path, version: int, names: Any, which: Any) -> None:
    content = official(version, names)
    done = convert.convert(saved(tmp_path / "x.pth", content), SourceOptions(which=which))
    own = {n.removeprefix("module.").removeprefix("backbone."): v for n, v in content[which].items() if "backbone" in n}
    x = image(96, 128)
    agree(done, x, through(own, x, (16, 16)), turned=False)
    settings, source = done.model.front_end.settings, done.model.card["training"]["source"]
    assert (settings.mean, settings.std, settings.rate) == (-4.5, 4.0, {1: 32000, 2: 16000}[version])
    assert (source["kind"], source["version"], source["which"], source["epoch"]) == ("asit", f"v{version}", which, 7)
    assert (source["grid"], source["stride"], source["file"]) == ([6, 8], [16, 16], "x.pth")
    assert len(source["sha256"]) == 64
    assert done.mapped == len(own)
    other = "student" if which == "teacher" else "teacher"
    assert set(done.left_out) == {
        *(name.removeprefix("module.") for name in content[which] if "backbone" not in name),
        *("optimizer", "epoch", "args", "CLS_PATCH_loss", "fp16_scaler", other),
    }


@pytest.mark.parametrize("layout", ["teacher", "finetuned"])
def test_fine_tuned_asit_keeps_its_head(tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture) -> None:
    w, head = vit(6 * 8), mlp_head(5)
    x = image(96, 128)
    if layout == "teacher":
        plain = {"head.weight": head["mlp_head.1.weight"], "head.bias": head["mlp_head.1.bias"]}
        content: dict[str, Any] = {"teacher": under("backbone.", {**w, **plain})}
        want = through(w, x, (16, 16))[:, 0] @ plain["head.weight"].double().T + plain["head.bias"].double()
    else:
        content = under("module.", {**under("v.", w), **head})
        want = classified(head, through(w, x, (16, 16))[:, 0])
    done = convert.convert(saved(tmp_path / "x.pth", content), SourceOptions(kind="asit"))
    torch.testing.assert_close(done.model.logits(x).double(), want, atol=1e-5, rtol=1e-5)
    assert done.model.classes == tuple(f"class {i}" for i in range(5))
    assert "pass --labels" in caplog.text


def test_an_asit_of_three_channels_reads_the_sum(tmp_path: Path) -> None:
    w = vit(6 * 8, channels=3)
    head = draw({"head.weight": (2, WIDTH), "head.bias": (2,)})
    path = saved(tmp_path / "x.pth", under("module.", {**w, **head}))
    x = image(96, 128)
    want = through(w, x.expand(-1, 3, -1, -1), (16, 16))[:, 0]
    got = convert.convert(path, SourceOptions(kind="asit")).model.logits(x).double()
    torch.testing.assert_close(got, want @ head["head.weight"].double().T + head["head.bias"], atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="49 position embeddings"):
        convert.convert(path, SourceOptions(frames=96))


@pytest.mark.parametrize("finetuned", [False, True])
def test_pretrained_sed(tmp_path: Path, finetuned: bool) -> None:
    w = vit(37 * 8)
    content = under("model.asit." if finetuned else "model.", w)
    if finetuned:
        content |= {"strong_head.weight": torch.zeros(447, WIDTH), "strong_head.bias": torch.zeros(447)}
    done = convert.convert(saved(tmp_path / "ASIT_strong_1.pt", content), SourceOptions())
    source = done.model.card["training"]["source"]
    if not finetuned:
        x = image(592, 128)
        agree(done, x, through(w, x, (16, 16)), turned=False)
        assert source["grid"] == [37, 8]
        return
    # Its code takes the positions for 8 rows of 37 and makes 62 rows of 8 of them.
    x = image(998, 128)
    rows = torch.stack([w["pos_embed"][0, 1 + 37 * i : 1 + 37 * (i + 1)] for i in range(8)]).permute(2, 0, 1)[None]
    new = F.interpolate(rows, size=(62, 8), mode="bicubic", align_corners=False)
    positions = torch.cat([w["pos_embed"][:, :1], new.flatten(2).transpose(1, 2)], 1)
    agree(done, x[:, :, :992], through(w, x, (16, 16), positions), turned=False)
    assert source["grid"] == [62, 8]
    assert "read as 8x37 and resized to 62x8" in source["positions"]
    assert set(done.left_out) == {"strong_head.weight", "strong_head.bias"}


def ast_file(tmp_path: Path, columns: int = 13, rows: int = 12, classes: int = 5) -> tuple[Path, Any, Any]:
    w, head = vit(columns * rows, tokens=2), mlp_head(classes)
    image_heads = {"head.weight": torch.zeros(3), "head.bias": torch.zeros(3), "head_dist.weight": torch.zeros(3)}
    return saved(tmp_path / "ast.pth", under("module.", {**under("v.", {**w, **image_heads}), **head})), w, head


def test_original_ast(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, w, head = ast_file(tmp_path)
    done = convert.convert(path, SourceOptions())
    x = image(128, 136)  # (mel, time)
    want = through(w, x, (10, 10))
    ours = x.transpose(2, 3)
    agree(done, ours, want, turned=True)
    got = done.model.logits(ours).double()
    torch.testing.assert_close(got, classified(head, (want[:, 0] + want[:, 1]) / 2), atol=1e-5, rtol=1e-5)
    assert set(done.left_out) == {"v.head.weight", "v.head.bias", "v.head_dist.weight"}
    card = done.model.card
    assert (card["grid"], card["padding"], card["encoder"]["distilled"]) == ([13, 12], "zero", True)
    assert card["training"]["source"]["axes"] == "(mel, time), transposed to (time, mel)"
    assert caplog.messages[0].startswith("Assumed to be AST")
    assert "the file does not say" in caplog.text


@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed"])
def test_an_axis_turned_wrongly_is_seen(tmp_path: Path, name: str) -> None:
    path, w, _ = ast_file(tmp_path)
    done = convert.convert(path, SourceOptions())
    done.model.encoder.load_state_dict({name: w[name]}, strict=False)
    x = image(128, 136)
    with pytest.raises(AssertionError):
        agree(done, x.transpose(2, 3), through(w, x, (10, 10)), turned=True)


@pytest.mark.parametrize(
    ("patches", "stride", "grid"), [(1212, 10, [101, 12]), (850, 12, [85, 10]), (512, 16, [64, 8])]
)
def test_published_asts_tell_their_stride(tmp_path: Path, patches: int, stride: int, grid: list[int]) -> None:
    path, _, _ = ast_file(tmp_path, patches, 1, classes=527)
    done = convert.convert(path, SourceOptions(kind="ast"))
    assert (done.model.card["grid"], done.model.encoder.stride) == (grid, (stride, stride))
    assert done.model.frames == (grid[0] - 1) * stride + 16
    assert done.model.multi


def test_a_stride_that_is_given_goes_first(tmp_path: Path) -> None:
    path, w, _ = ast_file(tmp_path, 18, 8)
    done = convert.convert(path, SourceOptions(stride=(16, 16)))
    x = image(128, 288)
    agree(done, x.transpose(2, 3), through(w, x, (16, 16)), turned=True)
    with pytest.raises(CheckpointError, match="stride 7x7 makes 17 rows"):
        convert.convert(path, SourceOptions(stride=(7, 7)))


@pytest.mark.parametrize(("kernel", "columns", "rows"), [((16, 16), 6, 8), ((128, 2), 48, 1)])
@pytest.mark.parametrize("tokens", [1, 2])
def test_pretrained_ssast(tmp_path: Path, kernel: tuple[int, int], columns: int, rows: int, tokens: int) -> None:
    w = vit(columns * rows, kernel, tokens)
    extra = {f"{layer}.{i}.{kind}": torch.zeros(2) for layer in ("cpredlayer", "gpredlayer") for i in (0, 2)
             for kind in ("weight", "bias")}  # fmt: skip
    extra |= {
        "mask_embed": torch.zeros(1, 1, WIDTH),
        "p_input_fdim": torch.tensor(128),
        "p_input_tdim": torch.tensor(96),
    }
    done = convert.convert(saved(tmp_path / "x.pth", under("module.", {**under("v.", w), **extra})), SourceOptions())
    x = image(128, 96)
    agree(done, x.transpose(2, 3), through(w, x, kernel), turned=True)
    assert done.model.card["training"]["source"]["kind"] == "ssast"
    assert set(done.left_out) == set(extra)
    assert done.model.head is None


@pytest.mark.parametrize(
    ("kernel", "stride", "columns", "rows"), [((16, 16), (10, 10), 9, 12), ((128, 2), (128, 1), 95, 1)]
)
def test_fine_tuned_ssast(tmp_path: Path, kernel: Any, stride: Any, columns: int, rows: int) -> None:
    w, head = vit(columns * rows, kernel, 2), mlp_head(5)
    path = saved(tmp_path / "x.pth", under("module.", {**under("v.", w), **head}))
    x = image(128, 96)
    want = through(w, x, stride)
    done = convert.convert(path, SourceOptions(kind="ssast"))
    agree(done, x.transpose(2, 3), want, turned=True)
    got = done.model.logits(x.transpose(2, 3)).double()
    torch.testing.assert_close(got, classified(head, want[:, 2:].mean(1)), atol=1e-5, rtol=1e-5)
    by_token = (
        convert.convert(path, SourceOptions(kind="ssast", pooling="class")).model.logits(x.transpose(2, 3)).double()
    )
    torch.testing.assert_close(by_token, classified(head, want[:, :2].mean(1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2])
def test_image_transformers(tmp_path: Path, tokens: int) -> None:
    w = vit(16, tokens=tokens, channels=3)
    head = {"head.weight": torch.zeros(10, WIDTH), "head.bias": torch.zeros(10)}
    path = saved(tmp_path / "x.pth", {"model": {**w, **head}})
    with pytest.raises(ConfigError, match="no length in time is given"):
        convert.convert(path, SourceOptions())
    done = convert.convert(path, SourceOptions(frames=64, mels=64))
    x = image(64, 64)
    agree(done, x, through(w, x.expand(-1, 3, -1, -1), (16, 16)), turned=False)
    assert set(done.left_out) == set(head)
    assert convert.convert(path, SourceOptions(seconds=1.0)).model.card["grid"] == [7, 8]


def test_positions_are_resized_on_request_alone(tmp_path: Path) -> None:
    path, w, _ = ast_file(tmp_path)
    assert convert.convert(path, SourceOptions()).model.frames == 136
    shorter = convert.convert(path, SourceOptions(frames=96))
    x = image(128, 96)
    own = w["pos_embed"][:, 2:].unflatten(1, (12, 13))[:, :, :9].flatten(1, 2)
    want = through(w, x, (10, 10), torch.cat([w["pos_embed"][:, :2], own], 1))
    agree(shorter, x.transpose(2, 3), want, turned=True)
    assert "first columns" in shorter.model.card["training"]["source"]["positions"]
    longer = convert.convert(path, SourceOptions(seconds=2.0))
    assert longer.model.card["grid"] == [20, 12]
    with pytest.raises(ConfigError, match="one of them"):
        convert.convert(path, SourceOptions(seconds=2.0, frames=96))


def test_a_converted_model_is_saved_and_hears(tmp_path: Path, shared_data: Path) -> None:
    path, _, _ = ast_file(tmp_path)
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    done = convert.convert(path, SourceOptions(labels=tmp_path / "names.txt", license="BSD-3-Clause", mean=-5.0))
    done.model.save(tmp_path / "model")
    model = AudioModel.load(tmp_path / "model")
    clip = sorted((shared_data / "free-spoken-digit-dataset" / "recordings").glob("*.wav"))[0]
    found = model.embed(clip)
    assert found.clip.isfinite().all()
    torch.testing.assert_close(found.clip, done.model.embed(clip).clip)
    assert model.classes == ("a", "b", "c", "d", "e")
    assert model.head is not None
    assert model.head.norm is not None
    assert model.head.norm.eps == 1e-5
    x = image(136, 128)
    assert torch.equal(model.logits(x), done.model.logits(x))
    assert model.card["training"]["license"] == "BSD-3-Clause"
    assert (model.front_end.settings.mean, model.front_end.settings.std) == (-5.0, 4.5689974)
