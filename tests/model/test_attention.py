"""The class token's attention, against the formula written out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.audio_model import AudioModel

from .conftest import FRAMES, filled, make_model  # type: ignore[import-not-found]

TINY = EncoderSettings(size="custom", width=32, depth=3, heads=4, patch_frames=8, patch_mels=8)


def model(distilled: bool = False) -> AudioModel:
    made: AudioModel = make_model(TINY.model_copy(update={"distilled": distilled}))
    filled(made.encoder, 0.4)
    return made


def wave(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def by_hand(m: AudioModel, samples: np.ndarray, layer: int) -> Tensor:
    """All rows of attention of the tokens before the patches: (heads, prefix, tokens), from the network's weights."""
    e = m.encoder
    x = m.front_end(torch.from_numpy(samples)[None])
    with torch.no_grad():
        positions = e.positions((x.shape[2] // 8, 4), stretch=x.shape[2] > FRAMES)
        first = torch.cat([e.cls_token, e.dist_token], 1) if e.prefix == 2 else e.cls_token
        tokens = torch.cat([first, e.patch_embed(x)], 1) + positions
        for block in e.blocks[:layer]:
            tokens = block(tokens)
        block = e.blocks[layer]
        q, k, _ = block.attn.qkv(block.norm1(tokens))[0].view(-1, 3, 4, 8).permute(1, 2, 0, 3)
        out = torch.zeros(4, e.prefix, q.shape[1])
        for head in range(4):
            for row in range(e.prefix):
                scores = (q[head, row] * k[head]).sum(1) / 8**0.5
                out[head, row] = scores.exp() / scores.exp().sum()
    return out


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("columns", [3, 6, 8])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_it_is_the_formulas(distilled: bool, columns: int, layer: int) -> None:
    m, sound = model(distilled), wave(240 + columns * 8 * 160)
    rows = by_hand(m, sound, layer)
    for asked in (layer, layer - 3):
        found = m.attention(sound, layer=asked)
        want = rows.mean(1)[:, m.encoder.prefix :].unflatten(1, (columns, 4))
        torch.testing.assert_close(found.map, want, atol=1e-5, rtol=1e-5)
        assert found.grid == (columns, 4)
    torch.testing.assert_close(rows.mean(1)[:, : m.encoder.prefix].sum(1) + found.map.sum((1, 2)), torch.ones(4))
    torch.testing.assert_close(found.times, m.embed(sound, precision="float32").times)


def test_of_a_long_sound_the_first_window() -> None:
    m, sound = model(), wave(60_000)
    found = m.attention(sound)
    assert found.grid == (6, 4)
    torch.testing.assert_close(found.map, m.attention(sound[: m.front_end.samples_for(FRAMES)]).map)
    near = m.attention(sound, precision="bf16").map
    assert 0 < (near - found.map).abs().max() < 0.05


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"layer 3 of an encoder of 3 blocks\n.*-3 to 2"):
        model().attention(wave(9000), layer=3)


def test_threads_get_their_own() -> None:
    m = model()
    sounds = [wave(2000 + 700 * i, i) for i in range(16)]
    want = [m.attention(sound).map for sound in sounds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda sound: m.attention(sound).map, sounds))
    assert all(torch.equal(one, other) for one, other in zip(found, want, strict=True))
    assert not any(module._forward_pre_hooks for module in m.encoder.modules())
