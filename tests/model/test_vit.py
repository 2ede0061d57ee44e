"""The encoder against torch's own transformer layer, convolution and loops in float64."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from family_oracles import timm_blocks
from torch import Tensor, nn

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.vit import Encoder, draw_drop_path, drop_path_rates

from .conftest import filled  # type: ignore[import-not-found]

TINY = EncoderSettings(size="custom", width=24, depth=3, heads=3, patch_frames=4, patch_mels=8)


def make(frames: int = 24, mels: int = 16, settings: EncoderSettings = TINY, seed: int = 0) -> Encoder:
    encoder: Encoder = filled(Encoder(settings, frames, mels), 0.3, first=1000 * seed)
    return encoder.eval()


def spectrogram(rows: int = 2, frames: int = 24, mels: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(rows, 1, frames, mels, generator=torch.Generator().manual_seed(seed))


def reference(encoder: Encoder, x: Tensor, blocks: int) -> Tensor:
    """The first `blocks` blocks by nn.Conv2d and nn.TransformerEncoderLayer, in float64: (R, 1 + P, D)."""
    state = {name: value.detach().double() for name, value in encoder.state_dict().items()}
    size = state["patch_embed.proj.weight"].shape[0]
    conv = nn.Conv2d(1, size, encoder.patch, encoder.stride).double()
    conv.load_state_dict({k: state[f"patch_embed.proj.{k}"] for k in ("weight", "bias")})
    tokens = conv(x.double()).flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], 1) + state["pos_embed"]
    names = {
        "self_attn.in_proj_weight": "attn.qkv.weight",
        "self_attn.in_proj_bias": "attn.qkv.bias",
        "self_attn.out_proj.weight": "attn.proj.weight",
        "self_attn.out_proj.bias": "attn.proj.bias",
        **{f"linear{n}.{k}": f"mlp.fc{n}.{k}" for n in (1, 2) for k in ("weight", "bias")},
        **{f"norm{n}.{k}": f"norm{n}.{k}" for n in (1, 2) for k in ("weight", "bias")},
    }
    for i in range(blocks):
        layer = nn.TransformerEncoderLayer(
            size, encoder.heads, 4 * size, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
            norm_first=True, dtype=torch.float64,
        )  # fmt: skip
        layer.load_state_dict({theirs: state[f"blocks.{i}.{ours}"] for theirs, ours in names.items()})
        tokens = layer(tokens)
    return nn.functional.layer_norm(tokens, (size,), state["norm.weight"], state["norm.bias"], 1e-6)


@pytest.mark.parametrize(
    ("stride", "grid"), [((4, 8), (7, 2)), ((3, 8), (9, 2)), ((2, 5), (13, 2)), ((4, 1), (7, 9)), ((1, 3), (25, 3))]
)
def test_equals_torchs_convolution_and_transformer_layers(stride: tuple[int, int], grid: tuple[int, int]) -> None:
    settings = TINY.model_copy(update={"patch_stride_frames": stride[0], "patch_stride_mels": stride[1]})
    encoder, x = make(28, 16, settings), spectrogram(2, 28)
    out, want = encoder(x), reference(encoder, x, 3)
    assert (out.grid, encoder.grid, encoder.stride) == (grid, grid, stride)
    torch.testing.assert_close(out.cls.double(), want[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.patches.double(), want[:, 1:], atol=1e-4, rtol=1e-4)
    assert encoder.span(grid[0]) == 28


def test_a_stride_of_the_patch_is_no_overlap() -> None:
    same = TINY.model_copy(update={"patch_stride_frames": 4, "patch_stride_mels": 8})
    x = spectrogram()
    assert torch.equal(make(settings=same)(x).patches, make()(x).patches)


def test_overlapping_patches_train_in_bf16_and_keep_padding_out() -> None:
    settings = EncoderSettings(
        size="custom", width=32, depth=2, heads=2, patch_frames=16, patch_mels=16, patch_stride_frames=10,
        patch_stride_mels=10,
    )  # fmt: skip
    encoder, x = make(96, 32, settings).train(), spectrogram(2, 96, 32)
    assert encoder.grid == (9, 2)
    valid = torch.ones(2, 18, dtype=torch.bool)
    valid[1, 10:] = False  # 5 of 9 columns: frames 0 to 55
    want = encoder(x[1:, :, :56], stretch=False)
    x[1, :, 56:] = float("nan")
    exact = encoder(x, valid=valid)
    torch.testing.assert_close(exact.patches[1, :10], want.patches[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exact.cls[1], want.cls[0], atol=1e-4, rtol=1e-4)
    assert (exact.patches[1, 10:] == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(x, valid=valid)
    assert torch.nn.functional.cosine_similarity(half.patches[0].float(), exact.patches[0], dim=-1).min() > 0.99
    half.patches.float().square().sum().backward()
    low = encoder.patch_embed.proj.weight.grad
    assert low is not None
    encoder.zero_grad()
    exact.patches.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    full = encoder.patch_embed.proj.weight.grad
    assert full is not None
    assert torch.nn.functional.cosine_similarity(low.flatten(), full.flatten(), dim=0) > 0.9


@pytest.mark.parametrize(("layer", "blocks"), [(0, 1), (1, 2), (2, 3), (-1, 3), (-3, 1)])
def test_a_layer_is_that_blocks_output_through_the_final_norm(layer: int, blocks: int) -> None:
    encoder, x = make(), spectrogram()
    want = reference(encoder, x, blocks)
    torch.testing.assert_close(encoder(x, layer=layer).patches.double(), want[:, 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "count"), [("tiny", 5.4e6), ("small", 21.5e6), ("base", 85.5e6)])
def test_sizes_have_the_papers_parameter_counts(size: str, count: float) -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings.model_validate({"size": size}), 592, 128)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(count, rel=0.01)


def test_names_and_shapes_are_the_official_ones() -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderSettings(size="tiny"), 592, 128)
    d = 192
    want = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, 297, d),
        "patch_embed.proj.weight": (d, 1, 16, 16),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    want |= timm_blocks(d, 12)
    assert {name: tuple(value.shape) for name, value in encoder.state_dict().items()} == want


def test_init_sets_every_number_and_is_seeded() -> None:
    encoder = Encoder(TINY, 24, 16)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    encoder.init_weights(torch.Generator().manual_seed(1))
    first = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.init_weights(torch.Generator().manual_seed(1))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, first[name]), name
        assert value.isfinite().all(), name
    assert first["blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["blocks.0.mlp.fc1.bias"].abs().max() == 0
    assert (first["norm.weight"] == 1).all()


def test_dropping_every_branch_leaves_the_embedding() -> None:
    encoder, x = make(), spectrogram()
    out = encoder(x, drop=torch.zeros(3, 2, 2))
    torch.testing.assert_close(out.patches.double(), reference(encoder, x, 0)[:, 1:], atol=1e-4, rtol=1e-4)


def test_drop_factors_belong_to_block_branch_and_row() -> None:
    encoder, x = make(), spectrogram()
    plain = encoder(x)
    torch.testing.assert_close(encoder(x, drop=torch.ones(3, 2, 2)).patches, plain.patches)
    drop = torch.ones(3, 2, 2)
    drop[2, :, 1] = 0  # the last block, both branches, second row: that row is as after two blocks
    out = encoder(x, drop=drop)
    torch.testing.assert_close(out.patches[0], plain.patches[0])
    torch.testing.assert_close(out.patches[1].double(), reference(encoder, x, 2)[1, 1:], atol=1e-4, rtol=1e-4)
    scaled = Encoder(TINY, 24, 16).eval()
    scaled.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        scaled.blocks[1].mlp.fc2.weight *= 2.5
        scaled.blocks[1].mlp.fc2.bias *= 2.5
    drop = torch.ones(3, 2, 2)
    drop[1, 1] = 2.5
    torch.testing.assert_close(encoder(x, drop=drop).patches, scaled(x).patches)


def test_drop_path_rates_are_linear_and_draws_keep_the_mean() -> None:
    rates = drop_path_rates(EncoderSettings(size="tiny", drop_path=0.22))
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    draws = np.stack([draw_drop_path(np.random.default_rng([7, i]), rates) for i in range(4000)])
    assert draws.shape == (4000, 12, 2)
    assert draws.dtype == np.float32
    assert (draws[:, 0] == 1).all()
    np.testing.assert_allclose((draws == 0).mean((0, 2)), rates, atol=4 * math.sqrt(0.2 / 8000))
    np.testing.assert_allclose(draws.mean((0, 2)), 1.0, atol=0.03)
    both = (draws[:, 11] == 0).all(1).mean()
    assert both == pytest.approx(0.22**2, abs=0.015), "the two branches are drawn apart"
    assert np.array_equal(draws[3], draw_drop_path(np.random.default_rng([7, 3]), rates))


def test_training_mode_draws_nothing() -> None:
    encoder, x = make().train(), spectrogram()
    before = torch.get_rng_state()
    first, second = encoder(x), encoder(x)
    assert torch.equal(first.patches, second.patches)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_reaches_no_output_and_no_gradient(poison: float) -> None:
    encoder = make()
    x = spectrogram(3)
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 6:] = False  # 3 of 6 columns
    valid[2, 2:] = False
    want = [encoder(x[i : i + 1, :, : 4 * n], stretch=False) for i, n in enumerate((6, 3, 1))]
    x[1, :, 12:] = poison
    x[2, :, 4:] = poison
    x.requires_grad_(True)
    out = encoder(x, valid=valid)
    for i, n in enumerate((12, 6, 2)):
        torch.testing.assert_close(out.patches[i, :n], want[i].patches[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.cls[i], want[i].cls[0], atol=1e-5, rtol=1e-5)
        assert (out.patches[i, n:] == 0).all()
    encoder.requires_grad_(True)
    (out.patches.square().sum() + out.cls.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert (x.grad[2, :, 4:] == 0).all()


def test_resized_positions_follow_the_weights() -> None:
    encoder = make()
    x = spectrogram(1, 12)
    with torch.no_grad():
        before = encoder(x).patches
        assert torch.equal(before, encoder(x).patches)
        encoder.pos_embed.add_(torch.randn(encoder.pos_embed.shape, generator=torch.Generator().manual_seed(5)))
        after = encoder(x).patches
    fresh = make()
    fresh.load_state_dict(encoder.state_dict())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh(x).patches)


def test_kept_positions_belong_to_their_encoder_and_weights() -> None:
    encoder, x = make().requires_grad_(False), spectrogram(frames=32)

    def fresh(of: Encoder) -> Tensor:
        other = make()
        other.load_state_dict(of.state_dict())
        return other(x).cls.detach()

    before = encoder(x).cls
    copied = copy.deepcopy(encoder)
    for _ in range(encoder.pos_embed._version):  # as often as the original was written to when it kept its positions
        copied.pos_embed.add_(1.0)
    assert torch.equal(copied(x).cls, fresh(copied))
    for seed in range(5):  # replaced, not written to
        encoder.load_state_dict(make(seed=seed + 1).requires_grad_(False).state_dict(), assign=True)
        assert torch.equal(encoder(x).cls, fresh(encoder))
    assert not torch.equal(encoder(x).cls, before)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(x).cls, encoder(x).cls)
    for frames in range(28, 28 + 4 * 200, 4):
        encoder.positions((frames // 4, 2))
    assert len(encoder._resized) <= 64


def test_positions_kept_in_inference_mode_can_be_trained_on() -> None:
    encoder, x = make().requires_grad_(False), spectrogram(frames=32)
    with torch.inference_mode():
        want = encoder(x).cls.clone()
        made_there = make()
    encoder.cls_token.requires_grad_(True)
    out = encoder(x).cls
    out.sum().backward()
    assert encoder.cls_token.grad is not None
    torch.testing.assert_close(out, want)
    with torch.no_grad():
        assert made_there(x).cls.isfinite().all()


def test_gradient_reaches_the_positions_through_the_resize() -> None:
    encoder = make().train()
    encoder(spectrogram(1, 12)).patches.sum().backward()
    assert encoder.pos_embed.grad is not None
    assert (encoder.pos_embed.grad[0, 1:].abs().sum(-1) > 0).all()


def test_other_lengths_and_bf16() -> None:
    encoder = make()
    for frames, mels in ((4, 8), (40, 16), (24, 32)):
        out = encoder(spectrogram(2, frames, mels))
        assert out.grid == (frames // 4, mels // 8)
        assert out.patches.shape == (2, frames * mels // 32, 24)
    encoder = Encoder(EncoderSettings(size="custom", width=192, depth=4, heads=3), 96, 128).eval()
    x = spectrogram(2, 96, 128)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = encoder(x)
    assert torch.nn.functional.cosine_similarity(half.patches.float(), encoder(x).patches, dim=-1).min() > 0.999


def test_input_of_a_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="25 frames, patches of 4"):
        make()(spectrogram(1, 25))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"size": "custom", "width": 64}, "without depth, heads"),
        ({"size": "custom", "width": 64, "depth": 2, "heads": 3}, "a multiple of 3, such as 66"),
        ({"size": "tiny", "depth": 2}, "size is tiny, and depth 2 is set too"),
    ],
)
def test_sizes_that_cannot_be(given: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Encoder(EncoderSettings.model_validate(given), 96, 128)


def test_a_distilled_encoder_has_two_tokens_before_the_patches_and_gives_their_mean() -> None:
    settings = TINY.model_copy(update={"distilled": True, "norm_eps": 1e-2})
    encoder, x = make(settings=settings), spectrogram()
    assert (encoder.prefix, make().prefix) == (2, 1)
    assert tuple(encoder.pos_embed.shape) == (1, 2 + 12, 24)
    state = {name: value.detach().double() for name, value in encoder.state_dict().items()}
    tokens = nn.functional.conv2d(x.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], (4, 8))
    first = torch.cat([state["cls_token"], state["dist_token"]], 1).expand(2, -1, -1)
    tokens = torch.cat([first, tokens.flatten(2).transpose(1, 2)], 1) + state["pos_embed"]
    for i in range(3):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        normed = nn.functional.layer_norm(tokens, (24,), w["norm1.weight"], w["norm1.bias"], 1e-2)
        attended, _ = nn.functional.multi_head_attention_forward(
            normed.transpose(0, 1), normed.transpose(0, 1), normed.transpose(0, 1), 24, 3, w["attn.qkv.weight"],
            w["attn.qkv.bias"], None, None, False, 0.0, w["attn.proj.weight"], w["attn.proj.bias"],
        )  # fmt: skip
        tokens = tokens + attended.transpose(0, 1)
        normed = nn.functional.layer_norm(tokens, (24,), w["norm2.weight"], w["norm2.bias"], 1e-2)
        hidden = nn.functional.gelu(normed @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
        tokens = tokens + hidden @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]
    want = nn.functional.layer_norm(tokens, (24,), state["norm.weight"], state["norm.bias"], 1e-2)
    out = encoder(x)
    torch.testing.assert_close(out.cls.double(), want[:, :2].mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.patches.double(), want[:, 2:], atol=1e-4, rtol=1e-4)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 6:] = False
    cut = encoder(x[1:, :, :12], stretch=False)
    x[1, :, 12:] = float("nan")
    masked = encoder(x, valid=valid)
    torch.testing.assert_close(masked.cls[1], cut.cls[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.patches[1, :6], cut.patches[0], atol=1e-5, rtol=1e-5)
    assert encoder.positions((9, 2)).shape == (1, 2 + 18, 24)
    assert torch.equal(encoder.positions((9, 2))[:, :2], encoder.pos_embed[:, :2])
    with pytest.raises(ValueError, match="greater than or equal to"):
        EncoderSettings(norm_eps=0.0)
