"""Fewer tokens: left-out patches, several masks of a view, losses on a share; each against plain arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asit.config import LossSettings, MaskingSettings, PretrainSettings, ResolvedPretrainSettings
from asit.model import vit
from asit.pretrain import masking, token_selection
from asit.pretrain.masking import ViewMask
from asit.pretrain.method import ASiT
from asit.pretrain.pretrain_dataset import GLOBAL_VIEWS, PretrainBatch
from asit.pretrain.pretrain_resolve import resolve
from asit.runtime import Precision, World
from asit.training.trainable import Now

CPU = torch.device("cpu")
WORLD, FLOAT32 = World(0, 1, CPU, ""), Precision("float32", "")
NOW = Now(step=35, total=100, steps_per_epoch=10, measure=True)
CLIPS, FRAMES, MELS, PATCH = 3, 64, 32, (16, 8)
GRID = 16
LOSSES = {"teacher_warmup": 3}


def settings(**over: Any) -> ResolvedPretrainSettings:
    given: dict[str, Any] = {
        "epochs": 10,
        "batch_size": CLIPS,
        "front_end": {"mels": MELS, "mean": -8.0, "std": 3.5},
        "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_mels": 8},
        "heads": {"hidden": 32, "bottleneck": 16, "class_prototypes": 64, "patch_prototypes": 40},
        "optim": {"warmup": 1, "freeze_last_layer": 0},
        "losses": LOSSES | over.pop("losses", {}),
    }
    return resolve(PretrainSettings(**given, **over))


def batch(chosen: ResolvedPretrainSettings, seed: int = 0) -> PretrainBatch:
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    copies, locals_ = chosen.masking.copies, chosen.views.local_views * CLIPS
    drawn = []
    for _ in range(CLIPS):
        masks = [masking.draw(rng, FRAMES, MELS, chosen.masking, PATCH) for _ in range(copies * GLOBAL_VIEWS)]
        drawn.append(token_selection.choose(rng, masks, chosen.masking, chosen.losses, PATCH))

    def rows(parts: list[Any]) -> Tensor:
        return torch.from_numpy(np.stack([np.stack(part) for part in parts], axis=1)).flatten(0, 1)

    donor = masking.donor_rows(rng.random((CLIPS, copies * GLOBAL_VIEWS)), 4) % (GLOBAL_VIEWS * CLIPS)
    return PretrainBatch(
        clean=torch.randn(GLOBAL_VIEWS * CLIPS, 1, FRAMES, MELS, generator=g),
        local=torch.randn(locals_, 1, 16, MELS, generator=g) if locals_ else None,
        drop=rows([[m.drop for m in one.masks] for one in drawn])[:, None],
        replace=rows([[m.replace for m in one.masks] for one in drawn])[:, None],
        donor=torch.from_numpy(donor),
        factors=torch.ones(2, 2, copies * GLOBAL_VIEWS * CLIPS + locals_),
        ids=[str(i) for i in range(CLIPS)],
        keep=None if drawn[0].keep is None else rows([one.keep for one in drawn]),
        tokens=None if drawn[0].local is None else rows([one.local for one in drawn]),
    )


def build(chosen: ResolvedPretrainSettings) -> ASiT:
    """Networks and centres that differ, as after many steps."""
    task = ASiT(chosen, FRAMES, torch.Generator().manual_seed(0), CPU)
    with torch.no_grad():
        for i, parameter in enumerate(itertools.chain(*(module.parameters() for _, module in task.modules()))):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        task.patch_centre.value.copy_(torch.linspace(-0.3, 0.3, 40))
    return task


def learn(task: ASiT, data: PretrainBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The parts of the loss, and the gradients."""
    task.student.zero_grad()
    out = task.step(data, NOW, FLOAT32, WORLD)
    out.loss.backward()
    return {name: float(value.detach()) for name, value in out.parts.items()}, {
        name: p.grad for name, p in task.student.named_parameters() if p.grad is not None
    }


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=2e-6, msg=lambda t, name=name: f"{name}: {t}")


# what is drawn


def test_what_is_wiped_most_is_left_out_first_and_exactly_so_many() -> None:
    settings = MaskingSettings(drop=0.6)
    for seed in range(20):
        mask = masking.draw(np.random.default_rng(seed), FRAMES, MELS, settings, PATCH, replace=False)
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
    empty = ViewMask(np.zeros((FRAMES, MELS), bool), np.zeros((FRAMES, MELS), bool))
    kept = [token_selection.leave_out(np.random.default_rng(i), empty, 4, PATCH)[1] for i in range(2000)]
    share = np.bincount(np.concatenate(kept), minlength=GRID) / 2000
    assert np.abs(share - 0.25).max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    assert np.array_equal(kept[7], token_selection.leave_out(np.random.default_rng(7), empty, 4, PATCH)[1])


def test_with_aligned_blocks_what_is_left_out_was_wiped_whole() -> None:
    chosen = MaskingSettings(align=True, replace_probability=0.0, keep=0.5)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        masks = [masking.draw(rng, FRAMES, MELS, chosen, PATCH) for _ in range(2)]
        found = token_selection.choose(rng, masks, chosen, LossSettings(), PATCH)
        for before, after in zip(masks, found.masks, strict=True):
            assert np.array_equal(before.drop, after.drop)  # at least half of the view is wiped: nothing more is


def test_where_all_tokens_are_wanted_nothing_is_drawn() -> None:
    rng = np.random.default_rng(0)
    masks = [masking.draw(rng, FRAMES, MELS, MaskingSettings(), PATCH) for _ in range(2)]
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
        masks = [masking.draw(rng, FRAMES, MELS, mask, PATCH, replace=False) for _ in range(4)]
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
    mask, x = torch.rand(2, 1, FRAMES, MELS, generator=g) < 0.01, torch.randn(2, 1, FRAMES, MELS, generator=g)
    found, areas = token_selection.touched(mask, PATCH), vit.cut(x, PATCH).flatten(0, 1)
    for r, t, m in itertools.product(range(2), range(4), range(4)):
        at = (r, 0, slice(16 * t, 16 * t + 16), slice(8 * m, 8 * m + 8))
        assert found[r, 4 * t + m] == mask[at].any()
        assert torch.equal(areas[r * GRID + 4 * t + m], x[at].flatten())
    assert 0 < found.float().mean() < 1
    assert torch.equal(token_selection.copied(x, 3), torch.cat([x, x, x]))


# what is computed with it


def test_the_encoder_with_left_out_patches_by_hand() -> None:
    chosen = settings(masking={"keep": 0.5})
    encoder, data = build(chosen).student.encoder, batch(chosen)
    found = encoder(data.clean, keep=data.keep)
    embedded = encoder.patch_embed(data.clean) + encoder.pos_embed[:, 1:]
    for row, keep in enumerate(data.keep):
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1])[0], embedded[row, keep]])[None]
        for block in encoder.blocks:
            x = block(x)
        torch.testing.assert_close(torch.cat([found.cls[row, None], found.patches[row]]), encoder.norm(x)[0])
    assert found.patches.shape == (6, 8, 32)
    everything = torch.arange(GRID).expand(6, -1)
    whole, plain = encoder(data.clean, keep=everything), encoder(data.clean)
    torch.testing.assert_close(whole.patches, plain.patches)
    torch.testing.assert_close(whole.cls, plain.cls)


def test_what_is_left_out_reaches_the_losses_through_targets_alone() -> None:
    """The student's outputs do not change with what lies under a left-out patch, though the blanks are never zeros."""
    chosen = settings(masking={"keep": 0.5, "replace_probability": 0.0})
    task, data = build(chosen), batch(chosen)
    outside = torch.ones(6, GRID, dtype=torch.bool).scatter(1, data.keep, False)
    hidden = outside.view(6, 4, 1, 4, 1).expand(6, 4, 16, 4, 8).reshape(6, 1, FRAMES, MELS)
    assert data.drop[hidden].all()
    changed = torch.where(hidden, 9.0, data.clean)
    one, other = (task.student(x, keep=data.keep) for x in (data.clean, changed))
    assert torch.equal(one.patches.z, other.patches.z)
    assert torch.equal(one.reconstruction, other.reconstruction)


@pytest.mark.parametrize("masked", ["all", "masked"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize(("keep", "share"), [(1.0, 0.5), (0.5, 1.0), (0.4, 0.3)])
def test_the_losses_by_hand(keep: float, share: float, copies: int, masked: str) -> None:
    """Copy by copy and token by token, with logits whole."""
    chosen = settings(
        masking={"keep": keep, "copies": copies, "decoder_depth": 2},
        losses={"local_share": share, "local_tokens": masked},
        views={"local_views": 1},
    )
    task, data = build(chosen), batch(chosen)
    found, _ = learn(task, data)
    student, teacher, rows = task.student, task.teacher, GLOBAL_VIEWS * CLIPS
    assert teacher is not None
    assert student.projection is not None
    assert teacher.projection is not None
    pairs, local, gaps = [], [], []

    def against(p: Tensor, s: Tensor) -> Tensor:
        return -(p * (s / 0.1).log_softmax(-1)).sum(-1)

    with torch.no_grad():
        t = teacher.encoder(data.clean)
        t_class, t_patch = teacher.projection(t.cls, t.patches)
        p_class = ((t_class - task.class_centre.value) / 0.07).softmax(-1)
        p_patch = ((t_patch - task.patch_centre.value) / 0.07).softmax(-1).view(rows, GRID, -1)
        short = student.encoder(data.local)
        s_short = student.projection(short.cls, short.patches)[0]
        for copy in range(copies):
            part = slice(copy * rows, (copy + 1) * rows)
            drop, replace = data.drop[part], data.replace[part]
            seen = torch.where(replace, data.clean[data.donor[part]], data.clean).masked_fill(drop, 0)
            patches = (s := student.encoder(seen, keep=data.keep[part] if keep < 1 else None)).patches
            if keep < 1:
                assert student.decoder is not None
                patches = student.decoder(s.cls, patches, data.keep[part])
            s_class, s_patch = student.projection(s.cls, patches)
            for i, j in itertools.permutations(range(2), 2):
                pairs.append(against(p_class.view(2, CLIPS, -1)[i], s_class.view(2, CLIPS, -1)[j]))
            each = against(p_patch, s_patch.view(rows, GRID, -1))
            cover = nn.functional.avg_pool2d((drop | replace).float(), PATCH).flatten(1) > 0.5
            for row in range(rows):
                places = data.tokens[row].tolist() if share < 1 else range(GRID)
                local += [each[row, i] for i in places if masked == "all" or cover[row, i]]
            assert student.reconstruction is not None
            gaps.append((student.reconstruction(patches, s.grid) - data.clean).abs()[drop | replace])
        pairs += [against(p_class.view(2, CLIPS, -1)[i], s_short) for i in range(2)]
    assert found["global"] == pytest.approx(float(torch.cat(pairs).mean()), rel=1e-4)
    assert found["local"] == pytest.approx(float(torch.stack(local).mean()), rel=1e-4)
    assert found["reconstruction"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-4)
    if share < 1:
        assert data.tokens.shape == (rows, round(share * GRID))


def test_equal_copies_are_one() -> None:
    chosen = settings(masking={"keep": 0.5})
    twice = settings(masking={"keep": 0.5, "copies": 2})
    data = batch(chosen)
    double = dataclasses.replace(
        data,
        **{name: torch.cat([getattr(data, name)] * 2) for name in ("drop", "replace", "donor", "keep")},
        factors=torch.cat([data.factors] * 2, dim=2),
    )
    one, other = learn(build(chosen), data), learn(build(twice), double)
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    alike(other[1], one[1])


def test_all_tokens_named_are_all_tokens() -> None:
    chosen = settings(masking={"copies": 2})
    data = batch(chosen)
    named = dataclasses.replace(data, tokens=torch.arange(GRID).expand(len(data.clean), -1))
    one, other = learn(build(chosen), data), learn(build(chosen), named)
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    alike(other[1], one[1])


@pytest.mark.parametrize("over", [{}, {"keep": 0.5, "copies": 2}, {"drop": 0.0, "replace": 0.0}], ids=str)
def test_reconstruction_of_touched_patches_alone_is_the_same_loss(over: dict[str, Any]) -> None:
    given = {"align": True, **over}
    plain, fewer = (settings(masking=given, losses={"reconstruction_tokens": kind}) for kind in ("all", "masked"))
    data = batch(plain)
    calls: list[int] = []
    task = build(fewer)
    assert task.student.reconstruction is not None
    task.student.reconstruction.mlp.register_forward_hook(lambda _, given, out: calls.append(out[..., 0].numel()))
    one, other = learn(build(plain), data), learn(task, data)
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    alike(other[1], one[1])
    touched = int(token_selection.touched(data.drop | data.replace, PATCH).sum())
    assert calls == [touched]
    assert touched < len(data.drop) * GRID


@pytest.mark.parametrize("kind", ["glr", "gl", "gr", "g", "l", "r"])
def test_every_parameter_has_a_gradient(kind: str) -> None:
    """The decoder is there for the losses that need it, and for no other."""
    weights = {name: float(name[0] in kind) for name in ("global_weight", "local_weight", "reconstruction_weight")}
    chosen = settings(
        masking={"keep": 0.5, "copies": 2}, losses=weights | {"local_share": 0.5, "reconstruction_tokens": "masked"}
    )
    task = build(chosen)
    _, gradients = learn(task, batch(chosen))
    assert (task.student.decoder is not None) == (kind != "g")
    assert {name for name, p in task.student.named_parameters() if p.requires_grad} == gradients.keys()
    assert [name for name, value in gradients.items() if not value.any()] == []


def test_the_decoder_is_the_students_and_in_the_state() -> None:
    task = build(settings(masking={"keep": 0.5, "decoder_depth": 3}))
    names = {name for name in task.state() if ".decoder." in name}
    assert {name.split(".")[0] for name in names} == {"student"}
    assert len({name.split(".")[3] for name in names if ".blocks." in name}) == 3
    again = build(settings(masking={"keep": 0.5, "decoder_depth": 3}))
    again.load_state(task.state())
    data = batch(task.settings)
    assert learn(task, data)[0] == learn(again, data)[0]
    assert not any("decoder" in name for name in task.encoder().state_dict())


def test_the_picture_of_left_out_patches() -> None:
    chosen = settings(masking={"keep": 0.5, "copies": 2})
    task, data = build(chosen), batch(chosen)
    shown = task.picture(data, FLOAT32)
    assert shown["reconstructed"].shape == (CLIPS, FRAMES, MELS)
    assert torch.equal(shown["mask"], (data.drop | data.replace)[:CLIPS, 0])


def test_stochastic_depth_takes_a_factor_for_each_copy() -> None:
    chosen = settings(masking={"copies": 2, "keep": 0.5})
    task, data = build(chosen), batch(chosen)
    rng = np.random.default_rng(0)
    factors = np.stack([vit.draw_drop_path(rng, np.array([0.5, 0.5])) for _ in range(12)])
    dropped = dataclasses.replace(data, factors=torch.from_numpy(factors).permute(1, 2, 0).contiguous())
    assert learn(task, dropped)[0]["reconstruction"] != learn(task, data)[0]["reconstruction"]
