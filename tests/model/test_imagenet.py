"""Weights of image transformers: against a plain ViT written here, and files that cannot be used."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from asit.config import EncoderSettings
from asit.errors import CheckpointError
from asit.model.imagenet import load_imagenet
from asit.model.vit import Encoder

SETTINGS = EncoderSettings(size="custom", width=128, depth=2, heads=2)
SIDE = 4


def weights(width: int = 128, blocks: int = 2, distilled: bool = False, side: int = SIDE) -> dict[str, Tensor]:
    """Random tensors named as in timm, for 3 channels and a square grid, with a classification head."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + distilled + side**2, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (10, width),
        "head.bias": (10,),
    }
    if distilled:
        shapes |= {"dist_token": (1, 1, width), "head_dist.weight": (10, width), "head_dist.bias": (10,)}
    for i in range(blocks):
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, inn) in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * width, inn * width)
            shapes[f"blocks.{i}.{name}.bias"] = (out * width,)
        shapes |= {f"blocks.{i}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def plain_vit(w: dict[str, Tensor], pictures: Tensor, blocks: int, heads: int) -> Tensor:
    """A ViT over pictures (R, 3, H, W), in float64, one head at a time: tokens (R, 1 + P, D)."""
    w = {name: value.double() for name, value in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(pictures.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=16)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    size = x.shape[2] // heads
    for i in range(blocks):
        q, k, v = layer(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            out.append((q[..., part] @ k[..., part].mT / size**0.5).softmax(-1) @ v[..., part])
        x = x + layer(torch.cat(out, -1), f"blocks.{i}.attn.proj")
        hidden = layer(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + layer(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")


def encoder(state: dict[str, Tensor], frames: int = 64, mels: int = 64) -> Encoder:
    made = Encoder(SETTINGS, frames, mels).eval()
    made.load_state_dict(state)
    return made


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("how", ["x.safetensors", "x.pth", "x.bin", "model", "state_dict"])
def test_the_encoder_is_that_vit_on_grey_pictures(tmp_path: Path, how: str) -> None:
    w = weights()
    path = write(tmp_path / how, w) if "." in how else write(tmp_path / "x.pth", {how: w, "epoch": 3})
    state, left_out = load_imagenet(path, SETTINGS, 64, 64)
    x = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    want = plain_vit(w, x.expand(-1, 3, -1, -1), 2, 2)
    with torch.no_grad():
        got = encoder(state)(x)
    torch.testing.assert_close(got.cls.double(), want[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.patches.double(), want[:, 1:], atol=1e-5, rtol=1e-5)
    assert set(left_out) == {"head.weight", "head.bias"}


def test_rows_of_the_picture_are_time_and_columns_mel(tmp_path: Path) -> None:
    w = weights()
    rows, columns = torch.arange(4.0)[:, None].expand(4, 4), torch.arange(4.0)[None].expand(4, 4)
    w["pos_embed"][0, 1:, 0], w["pos_embed"][0, 1:, 1] = rows.reshape(16), columns.reshape(16)
    state, _ = load_imagenet(write(tmp_path / "x.pth", w), SETTINGS, 592, 128)
    grid = state["pos_embed"][0, 1:].unflatten(0, (37, 8))
    torch.testing.assert_close(grid[:, :1, 0].expand(-1, 8), grid[..., 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grid[:1, :, 1].expand(37, -1), grid[..., 1], atol=1e-5, rtol=1e-5)
    assert (grid[1:, 0, 0] - grid[:-1, 0, 0]).sum() > 2.5
    assert (grid[0, 1:, 1] - grid[0, :-1, 1]).sum() > 2.5
    own = w["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    want = F.interpolate(own, size=(37, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(grid, want[0].permute(1, 2, 0))
    assert torch.equal(state["pos_embed"][:, 0], w["pos_embed"][:, 0])


def test_a_distilled_deit_loses_its_distillation_token(tmp_path: Path) -> None:
    w = weights(distilled=True)
    state, left_out = load_imagenet(write(tmp_path / "x.pth", {"model": w}), SETTINGS, 64, 64)
    assert set(left_out) == {
        *("head.weight", "head.bias", "head_dist.weight", "head_dist.bias", "dist_token"),
        "pos_embed[1], the distillation token's",
    }
    plain = {**w, "pos_embed": torch.cat([w["pos_embed"][:, :1], w["pos_embed"][:, 2:]], 1)}
    x = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = encoder(state)(x)
    want = plain_vit(plain, x.expand(-1, 3, -1, -1), 2, 2)
    torch.testing.assert_close(got.cls.double(), want[:, 0], atol=1e-5, rtol=1e-5)


def test_half_precision_weights_become_float32_and_strides_get_their_positions(tmp_path: Path) -> None:
    w = weights()
    half = {name: value.half() for name, value in w.items()}
    settings = SETTINGS.model_copy(update={"patch_stride_frames": 10, "patch_stride_mels": 10})
    state, _ = load_imagenet(write(tmp_path / "x.safetensors", half), settings, 1026, 128)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert state["pos_embed"].shape == (1, 1 + 102 * 12, 128)
    Encoder(settings, 1026, 128).load_state_dict(state)


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_more_than_tensors_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth holds (posix|nt)\.mkdir, and reading that could run code"):
        load_imagenet(write(tmp_path / "x.pth", {**weights(), "y": Runs(tmp_path / "made")}), SETTINGS, 64, 64)
    assert not (tmp_path / "made").exists()
    holds = {"model": weights(), "args": argparse.Namespace(lr=1)}
    with pytest.raises(CheckpointError, match=r"holds argparse\.Namespace(.|\n)*safetensors\.torch\.save_file"):
        load_imagenet(write(tmp_path / "y.bin", holds), SETTINGS, 64, 64)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.npz", b"PK", r"ends in \.npz(.|\n)*\.safetensors"),
        ("x.pth", b"garbage", "cannot be read as tensors alone"),
        ("x.pth", b"", "cannot be read: "),
        ("x.safetensors", b"garbage garbage", "cannot be read: "),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        load_imagenet(tmp_path / name, SETTINGS, 64, 64)


def test_a_file_cut_short_and_one_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", weights())
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"x\.pth cannot be read: "):
        load_imagenet(path, SETTINGS, 64, 64)
    with pytest.raises(CheckpointError, match=r"y\.pth is not there"):
        load_imagenet(tmp_path / "y.pth", SETTINGS, 64, 64)
    with pytest.raises(CheckpointError, match="is a folder"):
        load_imagenet(tmp_path, SETTINGS, 64, 64)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([torch.zeros(1)], "holds a list and no named tensors"),
        ({"cls_token": torch.zeros(1, 1, 8), "epoch": 3}, r"1 entries that are no tensors \(epoch\)"),
        ({"conv1.weight": torch.zeros(1)}, r"1 tensors \(conv1.weight, ...\), and no cls_token, no pos_embed"),
        ({k: v for k, v in weights().items() if "blocks" not in k}, r"and no blocks\.0\.\*"),
        (weights(width=64), "64 wide and has 2 blocks; the encoder is 128 wide and has 2"),
        (weights(blocks=3), "128 wide and has 3 blocks; .* has 2"),
        ({**weights(), "blocks.0.ls1.gamma": torch.ones(128)}, r"1 unexpected \(blocks\.0\.ls1\.gamma\)"),
        ({k: v for k, v in weights().items() if k != "norm.bias"}, r"1 missing \(norm\.bias\)"),
        ({**weights(), "patch_embed.proj.weight": torch.ones(128, 3, 32, 32)}, "patches of 32x32, .* of 16x16"),
        ({**weights(), "pos_embed": torch.ones(1, 16, 128)}, "16 position embeddings(.|\n)*square"),
    ],
)
def test_other_weights_are_refused_by_name(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_imagenet(write(tmp_path / "x.pth", content), SETTINGS, 64, 64)


def test_heads_of_another_width(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"heads": 4})
    with pytest.raises(CheckpointError, match=r"4 heads of 32(.|\n)*set encoder.heads to 2"):
        load_imagenet(write(tmp_path / "x.pth", weights()), settings, 64, 64)


@pytest.mark.parametrize("name", ["vit_tiny", "deit_tiny_distilled"])
def test_the_real_sizes(tmp_path: Path, name: str) -> None:
    w = weights(192, 12, "distilled" in name, 14 if name == "vit_tiny" else 24)
    path = write(tmp_path / "x.safetensors", w)
    settings = EncoderSettings(size="tiny")
    state, _ = load_imagenet(path, settings, 592, 128)
    Encoder(settings, 592, 128).load_state_dict(state)
    assert torch.equal(state["blocks.11.mlp.fc2.weight"], w["blocks.11.mlp.fc2.weight"])
