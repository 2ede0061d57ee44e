"""Windows of recordings: equal for every source, without gaps, the last one complete."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asit.errors import AudioError, ConfigError
from asit.model.audio_model import Embedding
from asit.search import embed_windows

RATE = 100


def by_hand(samples: int, size: int, step: int) -> list[tuple[int, int]]:
    """Starts and ends of the pieces, from the length alone."""
    if samples <= 1.5 * size:
        return [(0, samples)]
    starts = list(range(0, samples - size + 1, step))
    if starts[-1] + size < samples:
        starts.append(samples - size)
    return [(start, start + size) for start in starts]


@pytest.mark.parametrize("samples", [1, 99, 100, 149, 150, 151, 200, 201, 340, 1000, 1001, 1099])
@pytest.mark.parametrize("hop", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("block", [1, 37, 100, 5000])
def test_pieces_do_not_depend_on_the_blocks(samples: int, hop: float, block: int) -> None:
    wave = np.arange(samples, dtype=np.float32)
    blocks = [wave[at : at + block] for at in range(0, samples, block)]
    found = list(embed_windows.cut(blocks, RATE, 1.0, hop))
    expected = by_hand(samples, 100, round(hop * RATE))
    assert [(round(start * RATE), round(end * RATE)) for start, end, _ in found] == expected
    for (start, end), (_, _, piece) in zip(expected, found, strict=True):
        np.testing.assert_array_equal(piece, wave[start:end])


def test_a_long_sound_is_not_held() -> None:
    held = []

    def blocks():  # type: ignore[no-untyped-def]
        for _ in range(200):
            block = np.zeros(1000, np.float32)
            held.append(block.nbytes)
            yield block

    pieces = 0
    for _, _, piece in embed_windows.cut(blocks(), RATE, 1.0, 1.0):
        assert piece.base is None or piece.base.nbytes < 10_000
        pieces += 1
    assert pieces == 2000


@pytest.mark.parametrize(("window", "hop", "message"), [(0, 1, "window of 0"), (1, 0, "hop of 0"), (1, 2, "hop of 2")])
def test_invalid_windows(window: float, hop: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        embed_windows.check_windows(window, hop)


def test_vectors_have_length_one_and_the_given_pooling() -> None:
    ones, other = torch.ones(4), torch.tensor([3.0, 0.0, 0.0, 4.0])
    embedding = Embedding(ones, ones[None], None, (1, 1), torch.zeros(1), other)
    np.testing.assert_allclose(embed_windows.unit_vector(embedding, "mean"), [0.5] * 4)
    np.testing.assert_allclose(embed_windows.unit_vector(embedding, "class"), [0.6, 0, 0, 0.8])
    both = embed_windows.unit_vector(embedding, "class+mean")
    np.testing.assert_allclose(both, np.array([3, 0, 0, 4, 1, 1, 1, 1]) / 29**0.5, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_or_infinite_vectors_are_refused(value: float) -> None:
    bad = torch.full((4,), value)
    with pytest.raises(AudioError, match="not finite"):
        embed_windows.unit_vector(Embedding(bad, bad[None], None, (1, 1), torch.zeros(1), bad), "mean")
