"""Augmentations: neutral parameters change nothing, others do what they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from asit.audio import augment
from asit.config import ViewSettings

X = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0)) * 4 - 5


def resized(logmel: torch.Tensor, frames: int, lengths: list[int]) -> torch.Tensor:
    """The first frames of each row, (R, frames, F)."""
    rows = torch.arange(len(logmel))
    return augment.crop_time(logmel, rows, torch.zeros_like(rows), torch.tensor(lengths), frames)


def test_neutral_parameters_give_the_input_bit_for_bit() -> None:
    ones, zeros = torch.ones(3), torch.zeros(3)
    assert torch.equal(augment.gain(X, 0.0), X)
    assert torch.equal(augment.gain(X, zeros), X)
    assert torch.equal(augment.warp_mel(X, 1.0), X)
    assert torch.equal(augment.warp_mel(X, ones), X)
    assert torch.equal(augment.resize_time(X, 50), X)
    assert torch.equal(resized(X, 50, [50, 50, 50]), X)
    assert torch.equal(augment.roll(X[0], 0.0), X[0])


def test_an_hour_long_row_of_the_same_length_stays_bit_for_bit() -> None:
    long = torch.randn(1, 100_000, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(resized(long, 100_000, [100_000]), long)


def test_gain_is_that_of_the_power() -> None:
    power = X.double().abs() + 0.1
    for db in (-12.0, 3.0):
        wanted = (power * 10 ** (db / 10)).log()
        torch.testing.assert_close(augment.gain(power.log(), db), wanted, rtol=1e-12, atol=1e-12)
    each = augment.gain(power.log(), torch.tensor([-6.0, 0.0, 6.0], dtype=torch.float64))
    torch.testing.assert_close(each[2], (power[2] * 10**0.6).log(), rtol=1e-12, atol=1e-12)
    assert torch.equal(each[1], power[1].log())


def test_gain_of_a_waveform_shows_in_its_power_spectrum() -> None:
    wave = X[0].double().flatten()[:400]
    log_power = torch.fft.rfft(wave).abs().square().log()
    louder = torch.fft.rfft(wave * 10 ** (6 / 20)).abs().square().log()
    torch.testing.assert_close(augment.gain(log_power.unsqueeze(0), 6.0)[0], louder, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [1, 2, 37, 50, 51, 120])
def test_resize_in_time_equals_numpy_interpolation(frames: int) -> None:
    found = augment.resize_time(X, frames)
    assert found.shape == (3, frames, 40)
    position = np.linspace(0, 49, frames)
    for r in range(3):
        for f in range(0, 40, 7):
            wanted = np.interp(position, np.arange(50), X[r, :, f].double().numpy())
            np.testing.assert_allclose(found[r, :, f].numpy(), wanted, rtol=1e-4, atol=2e-4)


def test_rows_of_different_lengths_are_resized_as_if_alone() -> None:
    lengths = [30, 50, 41]
    found = resized(X, 44, lengths)
    assert found.shape == (3, 44, 40)
    for r, n in enumerate(lengths):
        torch.testing.assert_close(found[r], augment.resize_time(X[r, :n], 44), rtol=1e-5, atol=1e-5)


def test_frames_after_a_rows_length_are_never_read() -> None:
    x = X.clone()
    x[0, 30:] = float("nan")
    assert resized(x, 44, [30, 50, 50]).isfinite().all()


@pytest.mark.parametrize("factor", [0.75, 0.9, 1.1, 1.3])
def test_a_spectral_peak_moves_by_the_factor(factor: float) -> None:
    bins = torch.arange(128.0)
    for at in (20.0, 50.0, 80.0):
        peak = -((bins - at) ** 2) / 50
        moved = augment.warp_mel(peak.expand(4, 128), factor)
        assert abs(float(moved[0].argmax()) - factor * at) <= 1.0


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.7])
def test_warp_equals_numpy_interpolation_with_held_edges(factor: float) -> None:
    position = np.arange(40) / factor
    found = augment.warp_mel(X, factor)
    for t in (0, 20, 49):
        wanted = np.interp(position, np.arange(40), X[1, t].double().numpy())
        np.testing.assert_allclose(found[1, t].numpy(), wanted, rtol=1e-4, atol=1e-4)
    rows = augment.warp_mel(X, torch.tensor([1.0, factor, 1.0]))
    torch.testing.assert_close(rows[1], found[1])
    assert torch.equal(rows[0], X[0])


@given(factor=st.floats(0.2, 1.9), frames=st.integers(1, 90))
@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
def test_order_along_an_axis_and_range_of_values_are_kept(factor: float, frames: int) -> None:
    rising = torch.linspace(-15, 3, 64).expand(30, 64)
    warped = augment.warp_mel(rising, factor)
    assert (warped.diff(dim=-1) >= -1e-5).all()
    assert warped.min() >= -15.001
    assert warped.max() <= 3.001
    resized = augment.resize_time(rising.T.contiguous(), frames)
    assert resized.shape == (frames, 30)
    assert (resized.diff(dim=0) >= -1e-5).all()
    assert resized.min() >= -15.001
    assert resized.max() <= 3.001


def test_roll_moves_the_end_to_the_start() -> None:
    wave = torch.arange(10.0)
    assert augment.roll(wave, 0.25).tolist() == [8.0, 9.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert augment.roll(wave.expand(2, 10), 0.5)[1].tolist() == np.roll(np.arange(10.0), 5).tolist()


def test_draws_are_neutral_when_switched_off() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert augment.draw_view(rng, ViewSettings()) == augment.ViewDraw(0.0, 1.0, 1.0)
        assert augment.draw_roll(rng, ViewSettings(roll=0.0)) == 0.0


def test_draws_fill_their_ranges() -> None:
    rng = np.random.default_rng(1)
    settings = ViewSettings(gain_db=6.0, stretch=0.2, mel_warp=0.1, roll=0.5)
    views = [augment.draw_view(rng, settings) for _ in range(2000)]
    for values, low, high in (
        ([v.gain_db for v in views], -6.0, 6.0),
        ([v.stretch for v in views], 0.8, 1.2),
        ([v.mel_warp for v in views], 0.9, 1.1),
    ):
        edge = (high - low) / 100
        assert low <= min(values) < low + edge
        assert high - edge < max(values) <= high
        assert np.std(values) == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    rolls = np.array([augment.draw_roll(rng, settings) for _ in range(2000)])
    assert 0.45 < (rolls > 0).mean() < 0.55
    assert rolls.max() > 0.98


def test_switching_one_change_on_leaves_the_other_draws_alone() -> None:
    alone = augment.draw_view(np.random.default_rng(2), ViewSettings(mel_warp=0.1))
    both = augment.draw_view(np.random.default_rng(2), ViewSettings(mel_warp=0.1, gain_db=3.0, stretch=0.3))
    assert alone.mel_warp == both.mel_warp != 1.0
    assert both.gain_db != 0.0


@pytest.mark.parametrize(("size", "largest"), [(40, 12), (10, 30), (7, 0), (1, 1)])
def test_stripes_are_on_the_axis(size: int, largest: int) -> None:
    rng = np.random.default_rng(3)
    drawn = [augment.draw_stripe(rng, size, largest) for _ in range(4000)]
    assert all(first >= 0 and first + width <= size for first, width in drawn)
    counts = np.bincount([width for _, width in drawn], minlength=min(size, largest) + 1)
    assert len(counts) == min(size, largest) + 1
    if largest <= size:  # U{0..largest}
        np.testing.assert_allclose(counts / 4000, 1 / (largest + 1), atol=0.03)
    else:  # what is wider than the axis wipes all of it
        assert counts[-1] / 4000 == pytest.approx((largest - size + 1) / (largest + 1), abs=0.03)
    reached = {position for first, width in drawn for position in range(first, first + width)}
    assert reached == (set(range(size)) if largest else set())


def test_stripes_wipe_to_the_mean_and_nothing_else() -> None:
    x = torch.rand(20, 12, generator=torch.Generator().manual_seed(0)) + 1
    found = augment.mask_stripes(x.clone(), [(3, 4), (15, 5)], [(0, 2), (5, 0)])
    wiped = torch.zeros(20, 12, dtype=torch.bool)
    wiped[3:7] = wiped[15:20] = True
    wiped[:, 0:2] = True
    assert torch.equal(found == 0, wiped)
    assert torch.equal(found[~wiped], x[~wiped])
    assert torch.equal(augment.mask_stripes(x.clone(), [], []), x)


def test_mixup_is_the_weighted_sum_of_centred_waves() -> None:
    a, b = torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor([5.0, 1.0])
    want = 0.3 * torch.tensor([-2.0, -1.0, 0.0, 3.0]) + 0.7 * torch.tensor([2.0, -2.0, 0.0, 0.0])
    torch.testing.assert_close(augment.mix(a, b, 0.3), want)
    torch.testing.assert_close(augment.mix(b, a, 0.7), want)
    torch.testing.assert_close(augment.mix(a, b, 1.0), a - a.mean())
