"""Grids by counting, and positions resized to another grid, with time and mel kept apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.positions import adapt_positions, grid_of, resize_positions, round_up_frames, stride_of
from asit.model.vit import Encoder

TASKS = (98, 128, 498, 512, 592, 998, 1024)
"""Frames of the tasks' clips: 1 s, 5 s, the pretraining view, 10 s, and what others fill them up to."""
TINY = EncoderSettings(size="custom", width=3, depth=1, heads=1)
RNG = np.random.default_rng(3)
IN_TIME, IN_MEL = RNG.standard_normal(37), RNG.standard_normal(8)


def strided(frames: int | None = 10, mels: int | None = 10) -> EncoderSettings:
    return TINY.model_copy(update={"patch_stride_frames": frames, "patch_stride_mels": mels})


def cubic(old: int, new: int) -> np.ndarray:
    """Weights of cubic convolution (Keys 1981, a = -0.75), pixel centres aligned, edges repeated: (new, old)."""
    out = np.zeros((new, old))
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            t, a = abs(at - j), -0.75
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            out[i, min(max(j, 0), old - 1)] += near if t <= 1 else far if t < 2 else 0.0
    return out


def planted() -> Tensor:
    """Positions on a 37 x 8 grid whose features are f(time), g(mel) and f(time) + g(mel); the class token's is 7."""
    grid = np.stack([np.repeat(IN_TIME[:, None], 8, 1), np.repeat(IN_MEL[None], 37, 0)], -1)
    grid = np.concatenate([grid, grid.sum(-1, keepdims=True)], -1)
    return torch.cat([torch.full((1, 3), 7.0), torch.from_numpy(grid.reshape(-1, 3)).float()])[None]


def check_straight(positions: Tensor, in_time: np.ndarray, in_mel: np.ndarray) -> None:
    """The planted pattern on another grid: the new f along time alone, the new g along mel alone, and their sum."""
    assert positions.shape == (1, 1 + len(in_time) * len(in_mel), 3)
    assert (positions[0, 0] == 7.0).all()
    got = positions[0, 1:].detach().double().numpy().reshape(len(in_time), len(in_mel), 3)
    time, mel = np.broadcast_arrays(in_time[:, None], in_mel[None])
    np.testing.assert_allclose(got[..., 0], time, atol=1e-4)
    np.testing.assert_allclose(got[..., 1], mel, atol=1e-4)
    np.testing.assert_allclose(got[..., 2], time + mel, atol=1e-4)


@pytest.mark.parametrize("frames", TASKS)
@pytest.mark.parametrize("settings", [TINY, strided(), strided(10, None), strided(None, 10)])
def test_time_and_mel_stay_apart_at_every_tasks_length(frames: int, settings: EncoderSettings) -> None:
    frames = round_up_frames(frames, settings)
    time, mel = grid_of(frames, 128, (16, 16), stride_of(settings))
    got = resize_positions(planted(), (37, 8), (time, mel))
    check_straight(got, cubic(37, time) @ IN_TIME, cubic(8, mel) @ IN_MEL)


@pytest.mark.parametrize("grid", [(6, 2), (9, 2), (3, 2), (6, 5), (4, 3), (1, 1)])
def test_positions_are_resized_bicubically(grid: tuple[int, int]) -> None:
    own = np.random.default_rng(1).standard_normal((6, 2, 3))
    old = torch.from_numpy(np.concatenate([np.full((1, 3), 7.0), own.reshape(12, 3)])).float()[None]
    got = resize_positions(old, (6, 2), grid)
    assert torch.equal(got[:, 0], old[:, 0])
    want = np.einsum("ti,mj,ijd->tmd", cubic(6, grid[0]), cubic(2, grid[1]), own)
    np.testing.assert_allclose(got[0, 1:].numpy().reshape(*grid, 3), want, atol=1e-5)


@pytest.mark.parametrize("frames", TASKS)
def test_an_encoder_and_an_adapted_one_have_the_same_positions(frames: int) -> None:
    encoder = Encoder(TINY, 592, 128)
    encoder.load_state_dict({**encoder.state_dict(), "pos_embed": planted()})
    frames = round_up_frames(frames, TINY)
    state = adapt_positions(encoder.state_dict(), TINY, TINY, old_frames=592, frames=frames, mels=128)
    columns = frames // 16
    cut = IN_TIME[:columns] if columns < 37 else cubic(37, columns) @ IN_TIME
    check_straight(state["pos_embed"], cut, IN_MEL)
    adapted = Encoder(TINY, frames, 128)
    adapted.load_state_dict(state)
    torch.testing.assert_close(adapted.pos_embed, encoder.positions((columns, 8), False))
    x = torch.randn(1, 1, frames, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapted(x).patches, encoder(x, stretch=False).patches)


@pytest.mark.parametrize(
    ("frames", "columns", "new"),
    [(106, 7, 10), (576, 36, 57), (596, 37, 59), (1026, 37, 102)],
)
def test_a_stride_keeps_columns_near_their_time(frames: int, columns: int, new: int) -> None:
    # Of a shorter input the old columns that it covers, and no more, are spread over the new ones.
    state = adapt_positions({"pos_embed": planted()}, TINY, strided(), old_frames=592, frames=frames, mels=128)
    check_straight(state["pos_embed"], cubic(columns, new) @ IN_TIME[:columns], cubic(8, 12) @ IN_MEL)


def test_only_the_positions_change_and_may_be_saved() -> None:
    encoder = Encoder(TINY, 592, 128)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = adapt_positions(encoder.state_dict(), TINY, strided(), old_frames=592, frames=1026, mels=128)
    assert {name for name, value in state.items() if not torch.equal(value, before[name])} == {"pos_embed"}
    assert state["pos_embed"].is_contiguous()
    Encoder(strided(), 1026, 128).load_state_dict(state)
    same = adapt_positions(encoder.state_dict(), TINY, TINY, old_frames=592, frames=592, mels=128)
    assert all(torch.equal(value, before[name]) for name, value in same.items())


def test_encoders_that_differ_in_more_are_refused() -> None:
    other = TINY.model_copy(update={"depth": 2, "patch_mels": 8, "drop_path": 0.3, "patch_stride_frames": 10})
    with pytest.raises(ConfigError, match="differ in depth 1 and 2, patch_mels 16 and 8\n"):
        adapt_positions({"pos_embed": planted()}, TINY, other, old_frames=592, frames=592, mels=128)


def test_positions_of_another_grid_than_said() -> None:
    with pytest.raises(ValueError, match="297 position embeddings"):
        resize_positions(planted(), (36, 8), (10, 8))


def test_no_bf16_in_positions() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = resize_positions(planted(), (37, 8), (64, 8))
    assert got.dtype == torch.float32
    assert torch.equal(got, resize_positions(planted(), (37, 8), (64, 8)))


@pytest.mark.parametrize("stride", [(16, 16), (10, 10), (7, 3), (1, 16)])
def test_the_grid_counts_the_patches_that_fit(stride: tuple[int, int]) -> None:
    for frames in range(1, 120):
        starts = [s for s in range(0, frames, stride[0]) if s + 16 <= frames]
        mel = len([s for s in range(0, 128, stride[1]) if s + 16 <= 128])
        if starts and starts[-1] + 16 == frames:
            assert grid_of(frames, 128, (16, 16), stride) == (len(starts), mel)
        else:
            with pytest.raises(ConfigError, match=f"a spectrogram of {frames} frames, patches of 16"):
                grid_of(frames, 128, (16, 16), stride)
        settings = strided(*stride)
        whole = round_up_frames(frames, settings)
        grid_of(whole, 128, (16, 16), stride)
        assert frames <= whole < max(16, frames) + stride[0]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((598, 128, (16, 16)), r"598 frames, patches of 16\n.*multiple of 16 frames\n.*use 592 or 608 frames"),
        ((592, 100, (16, 16)), "use 96 or 112 mel bins"),
        ((10, 128, (16, 16)), "use 16 frames"),
        (
            (1024, 128, (16, 16), (10, 10)),
            r"patches of 16 every 10\n.*16 frames and a multiple of 10.*\n.*1016 or 1026",
        ),
        ((10, 128, (16, 16), (10, 10)), "use 16 frames"),
        ((592, 12, (16, 16), (16, 10)), "use 16 mel bins"),
    ],
)
def test_lengths_that_do_not_come_out_even_name_the_nearest(given: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        grid_of(*given)


@pytest.mark.parametrize(("given", "text"), [((17, 10), "patch_stride_frames is 17"), ((10, 20), "stride_mels is 20")])
def test_strides_that_leave_gaps(given: tuple[int, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Encoder(strided(*given), 592, 128)


@pytest.mark.parametrize("frames", [320, 1008])
def test_both_tokens_of_a_distilled_encoder_keep_their_positions(frames: int) -> None:
    two = TINY.model_copy(update={"distilled": True})
    positions = torch.cat([torch.full((1, 1, 3), 5.0), planted()], 1)
    state = adapt_positions({"pos_embed": positions}, two, two, old_frames=592, frames=frames, mels=128)
    one = adapt_positions({"pos_embed": planted()}, TINY, TINY, old_frames=592, frames=frames, mels=128)
    assert (state["pos_embed"][:, 0] == 5.0).all()
    assert torch.equal(state["pos_embed"][:, 1:], one["pos_embed"])
    with pytest.raises(ConfigError, match="differ in distilled True and False"):
        adapt_positions({"pos_embed": positions}, two, TINY, old_frames=592, frames=592, mels=128)
