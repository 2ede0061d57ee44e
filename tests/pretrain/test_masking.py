"""GMML: covered shares, uniform cover, alignment, donors, and what the student is shown."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from asit.config import LossSettings, MaskingSettings
from asit.data.loading.sampler import DonorGroups, MicroBatchSampler
from asit.model import vit
from asit.pretrain import masking, token_selection
from asit.pretrain.masking import ViewMask

T, F = 592, 128
BLOCK = 0.3 * 0.3


def covers(settings: MaskingSettings, replace: bool, n: int = 1000, size: tuple[int, int] = (T, F)) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.array([masking.draw(rng, *size, settings, replace=replace).any.mean() for _ in range(n)])


def profile(settings: MaskingSettings, n: int, size: tuple[int, int], patch: tuple[int, int] = (16, 16)) -> np.ndarray:
    rng = np.random.default_rng(2)
    return sum(masking.draw(rng, *size, settings, patch, replace=True).replace.astype(float) for _ in range(n)) / n


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize(("drop", "low"), [(0.7, 0.5), (0.5, 0.5), (0.3, 0.3), (None, 0.3)])
def test_covered_share_over_1000_draws(drop: float | None, low: float, align: bool) -> None:
    """Of what is wiped, a share drawn each time, and, without a drop, of what is replaced."""
    high = drop or 0.3
    share = covers(MaskingSettings(drop=high, align=align), replace=drop is None)
    middle = (low + high) / 2
    assert share.min() >= low
    assert share.max() < high + BLOCK
    assert middle < share.mean() < middle + BLOCK / 2
    if high > low:
        # The wanted share is uniform, so its ends are met: a fixed share would fail here.
        assert share.min() < low + 0.03
        assert share.max() > high
        assert 0.05 < share.std() < 0.07


@pytest.mark.parametrize(("fill", "axis", "block"), [("time", 1, 0.3), ("freq", 0, 0.3)])
def test_stripes_cover_whole_frames_or_bins(fill: str, axis: int, block: float) -> None:
    rng = np.random.default_rng(3)
    settings = MaskingSettings(fill=fill)
    for _ in range(200):
        mask = masking.draw(rng, T, F, settings, replace=False).drop
        assert np.array_equal(mask.all(axis), mask.any(axis))
        assert 0.5 <= mask.mean() < 0.7 + block
    replaced = masking.draw(rng, T, F, settings, replace=True).replace
    assert not np.array_equal(replaced.all(axis), replaced.any(axis)), "replaced areas are blocks whatever the fill"


@pytest.mark.parametrize(
    ("settings", "size"), [(MaskingSettings(), (60, 40)), (MaskingSettings(align=True, max_block=0.5), (64, 48))]
)
def test_every_row_and_column_is_masked_equally_often(settings: MaskingSettings, size: tuple[int, int]) -> None:
    cover = profile(settings, 3000, size, (8, 8))
    for axis in (0, 1):
        line = cover.mean(axis)
        assert np.abs(line / line.mean() - 1).max() < 0.1


def official(rng: np.random.Generator, height: int, width: int, share: float, a: int, biggest: float) -> np.ndarray:
    """The published bounds, one block at a time: starts and sizes below exclusive bounds, cut at the far border."""
    mask = np.zeros((height, width))
    while mask.sum() < share * height * width:
        r = int(rng.integers(0, height - a)) // a * a
        c = int(rng.integers(0, width - a)) // a * a
        h = min(int(rng.integers(a, int(height * biggest))), height - r)
        w = min(int(rng.integers(a, int(width * biggest))), width - c)
        mask[r : r + round(h / a) * a, c : c + round(w / a) * a] = 1
    return mask


@pytest.mark.parametrize("a", [1, 8])
def test_official_bounds_give_the_official_cover(a: int) -> None:
    size, n = (64, 48), 2500
    settings = MaskingSettings(official_bounds=True, align=a > 1, max_block=0.6)
    ours = profile(settings, n, size, (8, 8))
    rng = np.random.default_rng(4)
    theirs = sum(official(rng, *size, 0.3, a, 0.6) for _ in range(n)) / n
    for axis in (0, 1):
        assert np.abs(ours.mean(axis) - theirs.mean(axis)).max() < 0.03
        assert ours.mean(axis)[0] < 0.6 * ours.mean(axis).max(), "the first rows are hardly masked, as officially"


@pytest.mark.parametrize("size", [(592, 128), (96, 100)])
def test_aligned_masks_hold_whole_patches(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    seen = np.zeros(size, dtype=bool)
    for _ in range(100):
        mask = masking.draw(rng, *size, MaskingSettings(align=True), (16, 8), replace=False).any
        seen |= mask
        for t in range(0, size[0], 16):
            for f in range(0, size[1], 8):
                patch = mask[t : t + 16, f : f + 8]
                assert patch.all() or not patch.any()
    assert seen.all()


def test_single_blocks_have_the_sizes_and_places_asked_for() -> None:
    rng = np.random.default_rng(6)
    heights, widths = [], []
    for _ in range(3000):
        mask = masking.draw(rng, 100, 50, MaskingSettings(replace=1e-9), replace=True).replace
        rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.sum() == len(rows) * len(cols) == (rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)
        if rows[0] > 0 and rows[-1] < 99:
            heights.append(len(rows))
        if cols[0] > 0 and cols[-1] < 49:
            widths.append(len(cols))
    assert set(heights) == set(range(1, 31))
    assert set(widths) == set(range(1, 16))


@given(
    frames=st.integers(1, 70),
    mels=st.integers(1, 40),
    share=st.floats(0, 1),
    block=st.floats(0.001, 1),
    align=st.booleans(),
    bounds=st.booleans(),
    fill=st.sampled_from(["zeros", "noise", "time", "freq"]),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(max_examples=150, deadline=None, derandomize=True)
def test_any_settings_end_with_a_mask(
    frames: int, mels: int, share: float, block: float, align: bool, bounds: bool, fill: str, seed: int
) -> None:
    settings = MaskingSettings(
        drop=share, replace=share, max_block=block, align=align, official_bounds=bounds, fill=fill, combine=True
    )
    view = masking.draw(np.random.default_rng(seed), frames, mels, settings, replace=True)
    assert view.drop.shape == view.replace.shape == (frames, mels)
    if not bounds:
        assert view.replace.mean() >= share - 1e-9
        assert view.drop.mean() >= min(0.5, share) - 1e-9


@pytest.mark.parametrize("align", [False, True])
def test_a_share_of_one_covers_everything(align: bool) -> None:
    settings = MaskingSettings(drop=1.0, replace=1.0, align=align)
    assert masking.draw(np.random.default_rng(0), T, F, settings, replace=True).replace.all()


def test_official_bounds_that_never_reach_the_end_still_stop() -> None:
    # Blocks of one patch never start in the last patch: officially this loops for ever.
    settings = MaskingSettings(replace=1.0, align=True, official_bounds=True, max_block=0.1)
    mask = masking.draw(np.random.default_rng(0), 96, 96, settings, replace=True).replace
    assert mask[:80, :80].all()
    assert not mask[80:].any()
    assert not mask[:, 80:].any()


def test_the_same_seed_gives_the_same_mask_and_no_global_generator_is_used() -> None:
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = masking.draw(np.random.default_rng([7, 1, 2]), T, F, MaskingSettings())
    again = masking.draw(np.random.default_rng([7, 1, 2]), T, F, MaskingSettings())
    other = masking.draw(np.random.default_rng([7, 1, 3]), T, F, MaskingSettings())
    assert np.array_equal(first.drop, again.drop)
    assert np.array_equal(first.replace, again.replace)
    assert not np.array_equal(first.any, other.any)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_before, torch.get_rng_state())


def kinds(settings: MaskingSettings, replace: bool | None = None, n: int = 400) -> dict[tuple[bool, bool], float]:
    """Share of views by (anything wiped, anything replaced)."""
    rng = np.random.default_rng(8)
    views = [masking.draw(rng, 32, 32, settings, replace=replace) for _ in range(n)]
    found = [(bool(v.drop.any()), bool(v.replace.any())) for v in views]
    return {kind: found.count(kind) / n for kind in set(found)}


def test_kinds_of_corruption_and_how_they_are_switched_off() -> None:
    half = kinds(MaskingSettings())
    assert set(half) == {(True, False), (False, True)}
    assert 0.42 < half[False, True] < 0.58
    assert kinds(MaskingSettings(replace_probability=0.0)) == {(True, False): 1.0}
    assert kinds(MaskingSettings(replace_probability=1.0)) == {(False, True): 1.0}
    assert kinds(MaskingSettings(replace=0.0)) == {(True, False): 1.0}
    assert set(kinds(MaskingSettings(drop=0.0))) == {(False, False), (False, True)}
    assert kinds(MaskingSettings(drop=0.0, replace=0.0)) == {(False, False): 1.0}
    assert kinds(MaskingSettings(replace_probability=1.0), replace=False) == {(True, False): 1.0}
    both = kinds(MaskingSettings(combine=True))
    assert set(both) == {(True, False), (True, True)}
    assert 0.42 < both[True, True] < 0.58


def random_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    clean = torch.randn(6, 1, 20, 8, generator=g)
    drop = torch.rand(6, 1, 20, 8, generator=g) < 0.4
    replace = torch.rand(6, 1, 20, 8, generator=g) < 0.4
    return clean, drop, replace, torch.tensor([1, 2, 0, 5, 3, 4])


@pytest.mark.parametrize("fill", ["zeros", "noise", "time", "freq"])
def test_the_student_sees_each_pixel_from_the_right_source(fill: str) -> None:
    clean, drop, replace, donor = random_case()
    kept = clean.clone()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)) if fill == "noise" else None
    seen = masking.corrupt(clean, drop, replace, donor, fill, noise)
    assert torch.equal(clean, kept)
    for r, _, t, f in np.ndindex(*clean.shape):
        if drop[r, 0, t, f]:
            expected = 0.0 if noise is None else float(noise[r, 0, t, f]) / 2
        elif replace[r, 0, t, f]:
            expected = float(clean[int(donor[r]), 0, t, f])
        else:
            expected = float(clean[r, 0, t, f])
        assert float(seen[r, 0, t, f]) == expected


def test_noise_has_the_spread_of_normalised_input() -> None:
    clean = torch.zeros(4, 1, 200, 100)
    all_, none = torch.ones_like(clean, dtype=torch.bool), torch.zeros_like(clean, dtype=torch.bool)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    assert masking.corrupt(clean, all_, none, torch.arange(4), "noise", noise).std().item() == pytest.approx(0.5, 0.02)
    with pytest.raises(ValueError, match="needs the drawn noise"):
        masking.corrupt(clean, all_, none, torch.arange(4), "noise", None)


def test_empty_masks_leave_the_input_as_it_is() -> None:
    clean, _, _, donor = random_case()
    none = torch.zeros_like(clean, dtype=torch.bool)
    assert torch.equal(masking.corrupt(clean, none, none, donor, "zeros", None), clean)


@given(clips=st.integers(2, 40), views=st.integers(1, 3), pool=st.integers(2, 9), seed=st.integers(0, 2**31))
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_a_donor_is_another_clip_of_the_block_in_the_same_view(clips: int, views: int, pool: int, seed: int) -> None:
    draws = np.random.default_rng(seed).random((clips, views))
    donors = masking.donor_clips(draws, 0, clips, pool=pool)
    assert donors.shape == (clips, views)
    blocks = [list(range(i, min(i + pool, clips))) for i in range(0, clips, pool)]
    if len(blocks) > 1 and len(blocks[-1]) < 2:
        blocks[-2:] = [blocks[-2] + blocks[-1]]
    block_of = {clip: block for block in blocks for clip in block}
    for (clip, _), donor in np.ndenumerate(donors):
        assert donor != clip
        assert donor in block_of[clip]


def test_all_others_of_a_block_are_drawn_equally_often() -> None:
    n = 4000
    draws = np.random.default_rng(9).random((4, n))
    donors = masking.donor_clips(draws, 0, 4, pool=4)
    for clip in range(4):
        counts = np.bincount(donors[clip], minlength=4)
        assert counts[clip] == 0
        assert np.abs(np.delete(counts, clip) / n - 1 / 3).max() < 0.03


@pytest.mark.parametrize("pool", [2, 3, 4, 5, 7, 50])
@pytest.mark.parametrize("batch", [2, 3, 5, 6, 8, 9, 12, 13, 20, 21])
def test_donors_do_not_depend_on_how_a_step_is_divided(batch: int, pool: int) -> None:
    """Any number of processes and passes, of one clip too: what a pass asks for holds the donors of its clips."""
    draws = np.random.default_rng(0).random((batch, 4))
    whole = masking.donor_clips(draws, 0, batch, pool=pool)
    for micro in (m for m in range(1, batch + 1) if batch % m == 0):
        for rank in range(batch // micro):
            step = next(
                iter(
                    MicroBatchSampler(
                        order=lambda _: np.arange(batch),
                        count=batch,
                        batch=batch,
                        micro=micro,
                        rank=rank,
                        size=batch // micro,
                        start=0,
                        donor_pool=pool,
                    )
                )
            )
            mine = list(range(rank * micro, (rank + 1) * micro))
            if not isinstance(step, DonorGroups):
                step = DonorGroups(step, 0, micro)
            assert step.own == [(0, i) for i in mine]
            places = masking.donor_clips(draws[mine], step.first, len(step.keys), pool=pool)
            assert np.array_equal(places + step.keys[0][1], whole[mine])
            assert micro % pool or len(step.keys) <= micro + 1


def test_a_single_clip_has_no_donor() -> None:
    assert masking.donor_clips(np.array([[0.3, 0.9]]), 0, 1, pool=4).tolist() == [[0, 0]]


def test_a_token_is_masked_when_more_than_half_of_its_patch_is() -> None:
    rng = np.random.default_rng(11)
    mask = rng.random((3, 1, 37, 16)) < 0.5
    mask[0, 0, :4, :8] = False
    mask[0, 0, :2, :8] = True
    found = masking.token_mask(torch.from_numpy(mask), (4, 8))
    assert found.shape == (3, 18)
    assert not found[0, 0], "exactly half is not more than half"
    for r in range(3):
        wanted = [mask[r, 0, t : t + 4, f : f + 8].sum() > 16 for t in range(0, 36, 4) for f in range(0, 16, 8)]
        assert found[r].tolist() == wanted


# which tokens are computed with

PATCH, GRID = (16, 8), 16
"""Of views of 64 frames and 32 mel bins."""


def test_what_is_wiped_most_is_left_out_first_and_exactly_so_many() -> None:
    settings = MaskingSettings(drop=0.6)
    for seed in range(20):
        mask = masking.draw(np.random.default_rng(seed), 64, 32, settings, PATCH, replace=False)
        wiped = mask.drop.reshape(4, 16, 4, 8).mean((1, 3)).reshape(-1)
        made, keep = token_selection.leave_out(np.random.default_rng(seed), mask, 7, PATCH)
        out = np.setdiff1d(np.arange(GRID), keep)
        assert len(np.unique(keep)) == 7
        assert keep.tolist() == sorted(keep.tolist())
        assert wiped[out].min() >= wiped[keep].max()
        after = made.drop.reshape(4, 16, 4, 8).mean((1, 3)).reshape(-1)
        assert (after[out] == 1).all()
        assert (after[keep] == wiped[keep]).all()
        assert made.replace is mask.replace
    assert not np.shares_memory(made.drop, mask.drop)


def test_equals_are_left_out_evenly_and_by_the_generator_alone() -> None:
    empty = ViewMask(np.zeros((64, 32), bool), np.zeros((64, 32), bool))
    kept = [token_selection.leave_out(np.random.default_rng(i), empty, 4, PATCH)[1] for i in range(2000)]
    share = np.bincount(np.concatenate(kept), minlength=GRID) / 2000
    assert np.abs(share - 0.25).max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert np.array_equal(kept[7], token_selection.leave_out(np.random.default_rng(7), empty, 4, PATCH)[1])


def test_with_aligned_blocks_what_is_left_out_was_wiped_whole() -> None:
    chosen = MaskingSettings(align=True, replace_probability=0.0, keep=0.5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        masks = [masking.draw(rng, 64, 32, chosen, PATCH) for _ in range(2)]
        found = token_selection.choose(rng, masks, chosen, LossSettings(), PATCH)
        for before, after in zip(masks, found.masks, strict=True):
            assert np.array_equal(before.drop, after.drop)  # at least half of the view is wiped: nothing more is


def test_where_all_tokens_are_wanted_nothing_is_drawn() -> None:
    rng = np.random.default_rng(0)
    masks = [masking.draw(rng, 64, 32, MaskingSettings(), PATCH) for _ in range(2)]
    before = rng.bit_generator.state
    found = token_selection.choose(rng, masks, MaskingSettings(), LossSettings(), PATCH)
    assert rng.bit_generator.state == before
    assert all(a is b for a, b in zip(found.masks, masks, strict=True))
    assert (found.keep, found.local) == (None, None)


@pytest.mark.parametrize("kind", ["all", "masked"])
def test_tokens_of_the_local_loss(kind: str) -> None:
    mask = MaskingSettings(copies=2, align=True)
    losses = LossSettings(local_share=0.25, local_tokens=kind)  # type: ignore[arg-type]
    seen = np.zeros(GRID)
    for seed in range(400):
        rng = np.random.default_rng(seed)
        masks = [masking.draw(rng, 64, 32, mask, PATCH, replace=False) for _ in range(4)]
        found = token_selection.choose(rng, masks, mask, losses, PATCH).local
        assert found.shape == (2, 4)
        for view in range(2):
            assert len(set(found[view])) == 4
            seen[found[view]] += 1
            times = sum((token_selection.areas(m.any, PATCH) > 0.5).astype(int) for m in masks[view::2])
            if kind == "masked":
                others = np.setdiff1d(np.arange(GRID), found[view])
                assert np.min(times[found[view]]) >= np.max(times[others])
    assert seen.min() > 100  # of 200 expected: every place has its turn


def test_touched_cut_and_copied_by_loops() -> None:
    g = torch.Generator().manual_seed(1)
    mask, x = torch.rand(2, 1, 64, 32, generator=g) < 0.01, torch.randn(2, 1, 64, 32, generator=g)
    found, areas = token_selection.touched(mask, PATCH), vit.cut(x, PATCH).flatten(0, 1)
    for r, t, m in itertools.product(range(2), range(4), range(4)):
        at = (r, 0, slice(16 * t, 16 * t + 16), slice(8 * m, 8 * m + 8))
        assert found[r, 4 * t + m] == mask[at].any()
        assert torch.equal(areas[r * GRID + 4 * t + m], x[at].flatten())
    assert 0 < found.float().mean() < 1
    assert torch.equal(token_selection.copied(x, 3), torch.cat([x, x, x]))
