"""The method: what student and teacher see, losses and centres by hand, the EMA update, schedules and state."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asit.audio.fbank import FrontEnd
from asit.config import PretrainSettings, ResolvedPretrainSettings, presets
from asit.config.pretrain_settings import check, resolve
from asit.data.loading.crops import StackedCrops, pack
from asit.errors import CheckpointError, ConfigError
from asit.model import vit
from asit.model.positions import patch_of
from asit.pretrain import masking, method, pretrain_dataset, token_selection
from asit.pretrain.heads import ProjectionHead
from asit.pretrain.method import ASiT
from asit.pretrain.pretrain_dataset import PretrainBatch
from asit.runtime import Precision, World
from asit.training import optim
from asit.training.trainable import Now

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, "")
FLOAT32 = Precision("float32", "")
CLIPS, FRAMES, SHORT, MELS = 4, 48, 16, 32
GRID = 12
"""Patches of a view where they are 8 mel bins wide."""
TINY: dict[str, Any] = {
    "epochs": 10,
    "batch_size": CLIPS,
    "front_end": {"mels": MELS, "mean": -8.0, "std": 3.5},
    "views": {"local_views": 2},
    "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2},
    "heads": {"hidden": 64, "bottleneck": 32, "class_prototypes": 64, "patch_prototypes": 40},
    "optim": {"warmup": 1, "freeze_last_layer": 0},
    "losses": {"teacher_warmup": 3},
}
SHARED = {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True}
HALF = {"keep": 0.5, "copies": 2}
NOW = Now(step=35, total=100, steps_per_epoch=10, measure=True)


def settings(**over: Any) -> ResolvedPretrainSettings:
    groups = {name: {**TINY[name], **over.pop(name, {})} for name, value in TINY.items() if isinstance(value, dict)}
    losses = {"losses": {**TINY["losses"], **groups.pop("losses")}}
    return resolve(PretrainSettings(**{**TINY, **groups, **losses, **over}))


def build(chosen: ResolvedPretrainSettings, seed: int = 0) -> ASiT:
    return ASiT(chosen, FRAMES, torch.Generator().manual_seed(seed), CPU)


def batch(
    chosen: ResolvedPretrainSettings, seed: int = 0, clips: int = CLIPS, frames: int = FRAMES, short: int = SHORT
) -> PretrainBatch:
    """Views that are noise about a constant of their own, so that no two tokens are alike."""
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    rows, locals_, seen = 2 * clips, chosen.views.local_views * clips, 2 * chosen.masking.copies
    mels, patch, mask = chosen.front_end.mels, patch_of(chosen.encoder), chosen.masking
    drawn = []
    for _ in range(clips):
        masks = [masking.draw(rng, frames, mels, mask, patch) for _ in range(seen)]
        drawn.append(token_selection.choose(rng, masks, mask, chosen.losses, patch))

    def draw(count: int, length: int) -> Tensor:
        return torch.randn(count, 1, length, mels, generator=g) + torch.randn(count, 1, 1, 1, generator=g)

    def stacked(parts: list[Any]) -> Tensor | None:
        return None if parts[0] is None else torch.from_numpy(np.stack(parts, axis=1)).flatten(0, 1)

    donor = masking.donor_clips(rng.random((clips, seen)), 0, clips, pool=mask.donor_pool)
    return PretrainBatch(
        clean=draw(rows, frames),
        local=draw(locals_, short) if locals_ else None,
        drop=stacked([np.stack([m.drop for m in one.masks])[:, None] for one in drawn]),
        replace=stacked([np.stack([m.replace for m in one.masks])[:, None] for one in drawn]),
        donor=torch.from_numpy((donor + np.arange(seen) % 2 * clips).T.flatten()),
        factors=torch.ones(chosen.encoder.depth or 12, 2, seen * clips + locals_),
        noise=torch.randn(seen * clips, 1, frames, mels, generator=g) if mask.fill == "noise" else None,
        ids=[f"{i}.wav" for i in range(clips)],
        keep=stacked([one.keep for one in drawn]),
        tokens=stacked([one.local for one in drawn]),
    )


def logits(head: ProjectionHead | None, cls: Tensor, patches: Tensor) -> list[Tensor]:
    """Class and patch logits, (R, K) and (R * P, K2)."""
    assert head is not None
    pairs = ((cls, head.class_layer), (patches.flatten(0, 1), head.patch_layer))
    return [nn.functional.linear(head.embed(x), layer.weight()) for x, layer in pairs]


def learn(task: ASiT, data: PretrainBatch) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The parts of the loss, and the gradients."""
    task.student.zero_grad()
    out = task.step(data, NOW, FLOAT32, WORLD)
    out.loss.backward()
    return {name: float(value.detach()) for name, value in out.parts.items()} | {"loss": out.loss.item()}, {
        name: p.grad for name, p in task.student.named_parameters() if p.grad is not None
    }


def alike(one: tuple[dict[str, float], dict[str, Tensor]], other: tuple[dict[str, float], dict[str, Tensor]]) -> None:
    assert other[0] == pytest.approx(one[0], rel=1e-5)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-4, atol=2e-6, msg=lambda t, name=name: f"{name}: {t}")


def moved(chosen: ResolvedPretrainSettings) -> ASiT:
    task = build(chosen)
    move_apart(task)
    return task


def move_apart(task: ASiT) -> None:
    """Student, teacher and centres differ, as after many steps."""
    with torch.no_grad():
        for i, parameter in enumerate(itertools.chain(*(module.parameters() for _, module in task.modules()))):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
        for i, centre in enumerate((task.class_centre, task.patch_centre)):
            centre.value.copy_(0.3 * torch.randn(centre.value.shape, generator=torch.Generator().manual_seed(i)))


def weights_of(kind: str) -> dict[str, float]:
    """Terms by initials: "glr" all, "g" the global one alone."""
    return {name: float(name[0] in kind) for name in ("global_weight", "local_weight", "reconstruction_weight")}


KINDS = ["glr", "gl", "gr", "lr", "g", "l", "r"]


# teacher and student


@pytest.mark.parametrize("heads", [{}, SHARED])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "r"])
def test_teacher_and_student_are_paired_and_equal_at_the_start(kind: str, heads: dict[str, Any]) -> None:
    task = build(settings(losses=weights_of(kind), heads=heads))
    assert task.teacher is not None
    ours, theirs = dict(task.student.named_parameters()), dict(task.teacher.named_parameters())
    assert set(theirs) == {name for name in ours if not name.startswith("reconstruction.")}
    for name, parameter in theirs.items():
        assert torch.equal(parameter, ours[name]), name
        assert parameter.data_ptr() != ours[name].data_ptr(), name
        assert not parameter.requires_grad
    assert {name for name in ours if name.startswith("encoder.")} >= {"encoder.cls_token", "encoder.pos_embed"}
    assert any(name.startswith("reconstruction.") for name in ours) == ("r" in kind)


def test_without_its_losses_there_is_no_teacher() -> None:
    task = build(settings(losses=weights_of("r")))
    assert task.teacher is None
    assert task.student.projection is None
    assert task.encoder() is task.student.encoder
    assert build(settings()).encoder() is not task.student.encoder


@pytest.mark.parametrize("share", [False, True])
def test_one_step_of_the_teacher_by_hand(share: bool) -> None:
    chosen = settings(heads=SHARED if share else {})
    task = build(chosen)
    move_apart(task)
    before = {name: p.detach().double().clone() for name, p in task.teacher.named_parameters()}  # type: ignore[union-attr]
    task.step(batch(chosen), NOW, FLOAT32, WORLD)
    assert all(torch.equal(p, before[n].float()) for n, p in task.teacher.named_parameters())  # type: ignore[union-attr]
    task.after_update(NOW, WORLD)
    momentum = 1.0 - (1.0 - 0.996) * (math.cos(math.pi * 0.35) + 1) / 2
    student = dict(task.student.named_parameters())
    for name, parameter in task.teacher.named_parameters():  # type: ignore[union-attr]
        want = momentum * before[name] + (1 - momentum) * student[name].detach().double()
        assert not torch.equal(want.float(), before[name].float()), name
        torch.testing.assert_close(parameter.double(), want, rtol=0, atol=2e-7, msg=name)


# losses


def cross_entropy(p: Tensor, student: Tensor) -> Tensor:
    return -(p * (student / 0.1).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("masked", ["all", "masked"])
@pytest.mark.parametrize(
    ("keep", "share", "copies", "heads"),
    [
        *((1.0, 1.0, 1, heads) for heads in ({}, SHARED)),
        *((keep, share, copies, {}) for keep, share in ((1.0, 0.5), (0.5, 1.0), (0.4, 0.3)) for copies in (1, 3)),
    ],
)
def test_the_losses_by_hand(keep: float, share: float, copies: int, heads: dict[str, Any], masked: str) -> None:
    """Copy by copy and token by token, with logits whole: the teacher sees clean views, the student corrupted ones."""
    chosen = settings(
        masking={"keep": keep, "copies": copies, "decoder_depth": 2},
        losses={"local_share": share, "local_tokens": masked, "reconstruction_weight": 2},
        encoder={"patch_mels": 8},
        heads=heads,
    )
    task, data = moved(chosen), batch(chosen)
    found, _ = learn(task, data)
    student, teacher, rows = task.student, task.teacher, 2 * CLIPS
    assert teacher is not None
    assert student.reconstruction is not None
    pairs, local, gaps = [], [], []

    with torch.no_grad():
        t = teacher.encoder(data.clean)
        t_class, t_patch = logits(teacher.projection, t.cls, t.patches)
        # Epoch 3.5 of a warm-up of the temperature of 3.
        p_class = ((t_class - task.class_centre.value) / 0.07).softmax(-1).unflatten(0, (2, CLIPS))
        p_patch = ((t_patch - task.patch_centre.value) / 0.07).softmax(-1).view(rows, GRID, -1)
        short = student.encoder(data.local)
        s_short = logits(student.projection, short.cls, short.patches)[0].unflatten(0, (2, CLIPS))
        for copy in range(copies):
            part = slice(copy * rows, (copy + 1) * rows)
            drop, replace = data.drop[part], data.replace[part]
            seen = torch.where(replace, data.clean[data.donor[part]], data.clean).masked_fill(drop, 0)
            patches = (s := student.encoder(seen, keep=data.keep[part] if keep < 1 else None)).patches
            if keep < 1:
                assert student.decoder is not None
                patches = student.decoder(s.cls, patches, data.keep[part])
            s_class, s_patch = logits(student.projection, s.cls, patches)
            for i, j in itertools.permutations(range(2), 2):
                pairs.append(cross_entropy(p_class[i], s_class.unflatten(0, (2, CLIPS))[j]))
            each = cross_entropy(p_patch, s_patch.view(rows, GRID, -1))
            cover = nn.functional.avg_pool2d((drop | replace).float(), (16, 8)).flatten(1) > 0.5
            for row in range(rows):
                places = data.tokens[row].tolist() if share < 1 else range(GRID)
                local += [each[row, i] for i in places if masked == "all" or cover[row, i]]
            gaps.append((student.reconstruction(patches, s.grid) - data.clean).abs()[drop | replace])
        pairs += [cross_entropy(p_class[i], s_short[j]) for i, j in itertools.product(range(2), range(2))]
    assert found["global"] == pytest.approx(float(torch.cat(pairs).mean()), rel=1e-4)
    assert found["local"] == pytest.approx(float(torch.stack(local).mean()), rel=1e-4)
    assert found["reconstruction"] == pytest.approx(float(torch.cat(gaps).mean()), rel=1e-4)
    total = found["global"] + found["local"] + 2 * found["reconstruction"]
    assert found["loss"] == pytest.approx(total, rel=1e-5)
    assert found["mask_share"] == pytest.approx(float((data.drop | data.replace).float().mean()))
    if share < 1:
        assert data.tokens.shape == (rows, round(share * GRID))
        p_patch = p_patch[torch.arange(rows)[:, None], data.tokens]
    for name, probs in (("teacher_entropy_class", p_class), ("teacher_entropy_patch", p_patch)):
        assert found[name] == pytest.approx(float(torch.special.entr(probs).sum(-1).mean()), rel=1e-3)


def test_centres_by_hand() -> None:
    """0.9 of the old one and 0.1 of the mean teacher logit, through all passes of a step, moved after it."""
    chosen = settings()
    task = build(chosen)
    move_apart(task)
    before = task.class_centre.value.clone(), task.patch_centre.value.clone()
    passes = [batch(chosen, seed) for seed in (1, 2)]
    for data in passes:
        task.step(data, NOW, FLOAT32, WORLD)
    assert torch.equal(task.class_centre.value, before[0])
    with torch.no_grad():
        tokens = [task.teacher.encoder(data.clean) for data in passes]  # type: ignore[union-attr]
        both = [logits(task.teacher.projection, t.cls, t.patches) for t in tokens]  # type: ignore[union-attr]
    task.after_update(NOW, WORLD)
    for i, centre in enumerate((task.class_centre, task.patch_centre)):
        mean = torch.cat([each[i] for each in both]).double().mean(0)
        torch.testing.assert_close(centre.value.double(), 0.9 * before[i].double() + 0.1 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masks", [{}, HALF], ids=str)
@pytest.mark.parametrize(
    "heads", [{}, {"train_norm": True}, {"share_prototypes": True, "patch_prototypes": 64}], ids=str
)
@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_has_a_gradient(
    kind: str, views: int, heads: dict[str, Any], masks: dict[str, Any]
) -> None:
    """Whatever is switched off: several processes cannot average a gradient that is not there."""
    few = {"local_share": 0.5, "reconstruction_tokens": "masked"} if masks else {}
    chosen = settings(losses=weights_of(kind) | few, heads=heads, views={"local_views": views}, masking=masks)
    task = moved(chosen)
    parts, gradients = learn(task, batch(chosen))
    terms = {"global": "g", "local": "l", "reconstruction": "r"}
    assert {name for name in parts if name in terms} == {name for name, letter in terms.items() if letter in kind}
    assert {name for name, p in task.student.named_parameters() if p.requires_grad} == gradients.keys()
    assert [name for name, value in gradients.items() if not value.any()] == []
    assert math.isfinite(parts["loss"])
    assert (task.student.decoder is not None) == (bool(masks) and kind != "g")


@pytest.mark.parametrize("kind", KINDS)
def test_each_combination_learns(kind: str) -> None:
    chosen = settings(losses=weights_of(kind), optim={"lr": 0.05})
    task = build(chosen)
    optimiser = optim.adamw(task.trainable().named_parameters(), (0.9, 0.999))
    data, losses = batch(chosen), []
    for _ in range(12):
        optim.set_rates(optimiser, 2e-3, 0.0)
        optimiser.zero_grad()
        out = task.step(data, NOW, FLOAT32, WORLD)
        out.loss.backward()
        optimiser.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]


# schedules


def dino_cosine(start: float, end: float, count: int, warmup: int = 0) -> np.ndarray:
    """The arrays that the official code makes beforehand, from their description."""
    steps = np.arange(count - warmup)
    wave = end + 0.5 * (start - end) * (1 + np.cos(np.pi * steps / len(steps)))
    return np.concatenate([np.linspace(0, start, warmup), wave])


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
def test_schedules_are_the_official_arrays(shape: optim.Schedule) -> None:
    """The shape is of the learning rate alone."""
    chosen = settings(batch_size=64, optim={"lr": 5e-4, "warmup": 2, "min_lr": 1e-6, "schedule": shape})
    at = [method.schedules(chosen, Now(step, 100, 10)) for step in range(100)]
    rate = np.array([optim.warmup_then(shape, 5e-4 * 64 / 256, 1e-6, step, 20, 100) for step in range(100)])
    official = dino_cosine(5e-4 * 64 / 256, 1e-6, 100, 20)
    assert np.allclose(rate, official, rtol=1e-12, atol=0) == (shape == "cosine")
    assert [r.lr for r in at] == rate.tolist()
    np.testing.assert_allclose([r.weight_decay for r in at], dino_cosine(0.04, 0.4, 100), rtol=1e-12)
    np.testing.assert_allclose([r.others["teacher_momentum"] for r in at], dino_cosine(0.996, 1, 100), rtol=1e-12)
    temperature = np.minimum(0.04 + 0.03 * np.arange(100) / 30, 0.07)
    np.testing.assert_allclose([r.others["teacher_temperature"] for r in at], temperature, rtol=1e-12)


def test_schedules_at_their_ends() -> None:
    chosen = settings(batch_size=512, optim={"lr": 5e-4, "warmup": 1}, losses={"teacher_warmup": 0})
    first, border = (method.schedules(chosen, Now(step, 100, 10)) for step in (0, 10))
    assert first.lr == 0
    assert method.schedules(chosen, Now(9, 100, 10)).lr == border.lr == 5e-4 * 2  # scaled by batch / 256
    assert first.others == pytest.approx({"teacher_momentum": 0.996, "teacher_temperature": 0.07}, rel=1e-12)
    end = method.schedules(chosen, Now(100, 100, 10))
    assert (end.lr, end.weight_decay, end.others["teacher_momentum"]) == (1e-6, 0.4, 1.0)
    flat = settings(batch_size=4, optim={"lr": 1e-6, "warmup": 0, "min_lr": 1e-6})  # a peak below the floor
    rates = [method.schedules(flat, Now(step, 100, 10)).lr for step in range(0, 100, 9)]
    assert rates == pytest.approx([1e-6 * 4 / 256] * 12)


@pytest.mark.parametrize(
    ("epochs", "warmup", "freeze", "teacher"), [(100, 10, 1, 30), (400, 10, 1, 30), (20, 2, 0.2, 6)]
)
def test_autos_follow_the_length_of_the_run(epochs: int, warmup: float, freeze: float, teacher: float) -> None:
    given = PretrainSettings(epochs=epochs)
    found = resolve(given)
    assert found.optim.warmup == pytest.approx(warmup)
    assert found.optim.freeze_last_layer == pytest.approx(freeze)
    assert found.losses.teacher_warmup == pytest.approx(teacher)
    assert (given.optim.warmup, given.losses.teacher_warmup) == ("auto", "auto")
    check(found)


@pytest.mark.parametrize("heads", [{}, SHARED])
def test_the_last_layers_stay_fixed_at_first(heads: dict[str, Any]) -> None:
    chosen = settings(heads=heads, optim={"freeze_last_layer": 1})
    task, data = build(chosen), batch(chosen)
    frozen: dict[int, set[str]] = {}
    for step in (9, 10):
        task.student.zero_grad()
        task.step(data, Now(step, 100, 10), FLOAT32, WORLD).loss.backward()
        task.gradients_ready(Now(step, 100, 10))
        frozen[step] = {name for name, p in task.student.named_parameters() if p.grad is None}
    layers = {"class_layer.weight_v"} | ({"class_layer.weight_g"} if heads else {"patch_layer.weight_v"})
    assert frozen == {9: {f"projection.{name}" for name in layers}, 10: set()}


# state


@pytest.mark.parametrize("heads", [{}, SHARED])
@pytest.mark.parametrize("kind", ["glr", "g", "l", "r"])
def test_the_state_is_all_there_is(kind: str, heads: dict[str, Any]) -> None:
    chosen = settings(losses=weights_of(kind), heads=heads)
    task, other, data = build(chosen), build(chosen, seed=5), batch(chosen)
    move_apart(task)
    other.load_state({name: value.clone() for name, value in task.state().items()})
    for one in (task, other):
        one.step(data, NOW, FLOAT32, WORLD).loss.backward()
        one.after_update(NOW, WORLD)
    assert task.state().keys() == other.state().keys()
    assert all(torch.equal(value, other.state()[name]) for name, value in task.state().items())
    ours, theirs = dict(task.student.named_parameters()), dict(other.student.named_parameters())
    assert all(torch.equal(p.grad, theirs[name].grad) for name, p in ours.items())  # type: ignore[arg-type]
    storages = [value.untyped_storage().data_ptr() for value in task.state().values()]
    assert len(storages) == len(set(storages))  # each tensor once


def test_a_state_that_does_not_fit_is_refused() -> None:
    task = build(settings())
    state = dict(task.state())
    with pytest.raises(CheckpointError, match=r"the? ?student does not fit|student does not fit"):
        task.load_state({name: value for name, value in state.items() if name != "student.encoder.cls_token"})
    with pytest.raises(CheckpointError, match="1 missing"):
        task.load_state({name: value for name, value in state.items() if name != "patch_centre.value"})
    with pytest.raises(CheckpointError, match=r"1 unexpected \(nonsense\)"):
        task.load_state({**state, "teacher.nonsense": torch.zeros(1)})
    wide = build(settings(encoder={"width": 48}))
    with pytest.raises(CheckpointError, match="another size"):
        wide.load_state(state)


def test_initial_weights_hang_on_the_generator_alone() -> None:
    chosen = settings()
    before = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        one = build(chosen)
        torch.manual_seed(2)
        two = build(chosen)
    finally:
        torch.set_rng_state(before)
    other = build(chosen, seed=1)
    for name, value in one.state().items():
        assert torch.equal(value, two.state()[name]), name
        assert value.isfinite().all()
    assert not torch.equal(one.student.encoder.pos_embed, other.student.encoder.pos_embed)


# gauges, suspects, pictures


def test_spread() -> None:
    """1 for directions drawn evenly, 0 for a collapsed encoder, whatever the scale."""
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert float(method.spread(rows)) == pytest.approx(1.0, abs=0.02)
    assert float(method.spread(1e-3 * rows)) == pytest.approx(float(method.spread(rows)), rel=1e-5)
    assert float(method.spread(rows[:1].expand(50, -1))) == pytest.approx(0.0, abs=1e-6)


def test_suspects_are_the_clips_that_are_not_finite() -> None:
    chosen = settings()
    task, data = build(chosen), batch(chosen)
    assert task.suspects(data) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    data.clean[CLIPS + 2, 0, 3, 3] = float("inf")
    assert task.suspects(data) == ["2.wav"]
    data.clean[1] = float("nan")
    assert task.suspects(data) == ["1.wav", "2.wav"]


@pytest.mark.parametrize(("kind", "masks"), [("glr", {}), ("g", {}), ("glr", HALF)])
def test_the_picture(kind: str, masks: dict[str, Any]) -> None:
    chosen = settings(losses=weights_of(kind), masking=masks)
    task, data = build(chosen), batch(chosen)
    four = task.picture(data, FLOAT32)
    assert set(four) == {"clean", "corrupted", "reconstructed", "mask"}
    assert all(x.shape == (CLIPS, FRAMES, MELS) for x in four.values())
    assert torch.equal(four["clean"], data.clean[:CLIPS, 0])
    assert torch.equal(four["mask"], (data.drop | data.replace)[:CLIPS, 0])
    outside = ~four["mask"]
    assert torch.equal(four["corrupted"][outside], four["clean"][outside])
    assert not torch.equal(four["corrupted"], four["clean"])
    assert bool(four["reconstructed"].any()) == ("r" in kind)


# fewer tokens


def fewer(**masks: Any) -> ResolvedPretrainSettings:
    return settings(masking=masks, encoder={"patch_mels": 8}, views={"local_views": 0})


def test_the_encoder_with_left_out_patches_by_hand() -> None:
    chosen = fewer(keep=0.5)
    encoder, data = moved(chosen).student.encoder, batch(chosen)
    found = encoder(data.clean, keep=data.keep)
    embedded = encoder.patch_embed(data.clean) + encoder.pos_embed[:, 1:]
    for row, keep in enumerate(data.keep):
        x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1])[0], embedded[row, keep]])[None]
        for block in encoder.blocks:
            x = block(x)
        torch.testing.assert_close(torch.cat([found.cls[row, None], found.patches[row]]), encoder.norm(x)[0])
    assert found.patches.shape == (8, 6, 32)
    everything = torch.arange(GRID).expand(8, -1)
    whole, plain = encoder(data.clean, keep=everything), encoder(data.clean)
    torch.testing.assert_close(whole.patches, plain.patches)
    torch.testing.assert_close(whole.cls, plain.cls)


def test_what_is_left_out_reaches_the_losses_through_targets_alone() -> None:
    """The student's outputs do not change with what lies under a left-out patch, though the blanks are never zeros."""
    chosen = fewer(keep=0.5, replace_probability=0.0)
    task, data = moved(chosen), batch(chosen)
    outside = torch.ones(8, GRID, dtype=torch.bool).scatter(1, data.keep, False)
    hidden = outside.view(8, 3, 1, 4, 1).expand(8, 3, 16, 4, 8).reshape(8, 1, FRAMES, MELS)
    assert data.drop[hidden].all()
    changed = torch.where(hidden, 9.0, data.clean)
    one, other = (task.student(x, keep=data.keep) for x in (data.clean, changed))
    assert torch.equal(one.patches.z, other.patches.z)
    assert torch.equal(one.reconstruction, other.reconstruction)


def test_equal_copies_are_one() -> None:
    chosen = fewer(keep=0.5)
    twice = fewer(**HALF)
    data = batch(chosen)
    double = dataclasses.replace(
        data,
        **{name: torch.cat([getattr(data, name)] * 2) for name in ("drop", "replace", "donor", "keep")},
        factors=torch.cat([data.factors] * 2, dim=2),
    )
    alike(learn(moved(chosen), data), learn(moved(twice), double))


def test_all_tokens_named_are_all_tokens() -> None:
    chosen = fewer(copies=2)
    data = batch(chosen)
    named = dataclasses.replace(data, tokens=torch.arange(GRID).expand(len(data.clean), -1))
    alike(learn(moved(chosen), data), learn(moved(chosen), named))


@pytest.mark.parametrize("over", [{}, HALF, {"drop": 0.0, "replace": 0.0}], ids=str)
def test_reconstruction_of_touched_patches_alone_is_the_same_loss(over: dict[str, Any]) -> None:
    plain = fewer(align=True, **over)
    data, calls, task = batch(plain), list[int](), moved(plain.changed({"losses": {"reconstruction_tokens": "masked"}}))
    assert task.student.reconstruction is not None
    task.student.reconstruction.mlp.register_forward_hook(lambda _, given, out: calls.append(out[..., 0].numel()))
    alike(learn(moved(plain), data), learn(task, data))
    touched = int(token_selection.touched(data.drop | data.replace, (16, 8)).sum())
    assert calls == [touched]
    assert touched < len(data.drop) * GRID


def test_the_decoder_is_the_students_and_in_the_state() -> None:
    task = moved(fewer(keep=0.5, decoder_depth=3))
    names = {name for name in task.state() if ".decoder." in name}
    assert {name.split(".")[0] for name in names} == {"student"}
    assert len({name.split(".")[3] for name in names if ".blocks." in name}) == 3
    again = moved(fewer(keep=0.5, decoder_depth=3))
    again.load_state(task.state())
    data = batch(task.settings)
    assert learn(task, data)[0] == learn(again, data)[0]
    assert not any("decoder" in name for name in task.encoder().state_dict())


def test_stochastic_depth_takes_a_factor_for_each_copy() -> None:
    chosen = fewer(**HALF)
    task, data = moved(chosen), batch(chosen)
    rng = np.random.default_rng(0)
    factors = np.stack([vit.draw_drop_path(rng, np.array([0.5, 0.5])) for _ in range(16)])
    dropped = dataclasses.replace(data, factors=torch.from_numpy(factors).permute(1, 2, 0).contiguous())
    assert learn(task, dropped)[0]["reconstruction"] != learn(task, data)[0]["reconstruction"]


# a step asks nothing of the accelerator

META = torch.device("meta")
"""Tensors there take the path of those on a GPU, and refuse `.item()`, `nonzero`, `bool()` and copies to the host."""
WARPED = {"mel_warp": 0.1, "gain_db": 3.0, "stretch": 0.1}
FEW = {"local_share": 0.5, "local_tokens": "masked", "reconstruction_tokens": "masked"}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked tokens": {"losses": {"local_tokens": "masked"}, "masking": {"fill": "time", "combine": True}},
    "shared prototypes": {"heads": SHARED},
    "two views": {"views": {"local_views": 0}, "optim": {"clip_per_parameter": False}},
    "fewer tokens": {"masking": {"align": True, **HALF}, "losses": FEW},
}


def of_crops(chosen: ResolvedPretrainSettings, device: torch.device) -> PretrainBatch:
    """A batch as the loader gives it where log-mels are made on the device: crops, and bits of masks."""
    made, rng = batch(chosen), np.random.default_rng(0)
    lengths = np.repeat([FRAMES + 2, SHORT], [2 * CLIPS, chosen.views.local_views * CLIPS])
    made.crops = StackedCrops(
        torch.from_numpy(rng.normal(0, 0.1, (CLIPS, 16000)).astype(np.float32)),
        torch.full((CLIPS,), 98),
        torch.from_numpy(np.stack([rng.integers(0, 20, len(lengths)), lengths], 1)),
        torch.ones(len(lengths), 2),
    )
    made.clean, made.local = (None if x is None else x[:, :, :0] for x in (made.clean, made.local))
    made.drop, made.replace = pack(made.drop), pack(made.replace)
    return (made.pin_memory() if device.type == "cuda" else made).to(device)


def whole_step(given: dict[str, Any], device: torch.device, steps: int = 1) -> Tensor:
    """Whole steps but for the loop's own checks: views, losses, gradients, clipping, AdamW, teacher and centres."""
    chosen = settings(**{**given, "views": {**WARPED, **given.get("views", {})}})
    world, now = World(0, 1, device, "a test"), Now(50, 100, 50, measure=True)
    task = ASiT(chosen, FRAMES, torch.Generator().manual_seed(0), device)
    optimiser = optim.adamw(task.trainable().named_parameters(), chosen.optim.betas)
    views = pretrain_dataset.DeviceViews(chosen, (FRAMES, SHORT), device)
    precision, data = Precision("bf16" if device.type == "cuda" else "float32", ""), of_crops(chosen, device)
    for step in range(steps):
        if step:  # the first step sets up what may wait
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        optim.set_rates(optimiser, 1e-3, 0.1)
        output = task.step(views(data), now, precision, world)
        output.loss.backward()
        task.gradients_ready(now)
        gradients = [p.grad for p in task.trainable().parameters() if p.grad is not None]
        optim.clip(gradients, 3.0, per_parameter=chosen.optim.clip_per_parameter)
        optimiser.step()
        task.after_update(now, world)
    return output.loss.detach()


@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_nothing_of_the_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fused AdamW has no form without values; both forms leave the host alone (the gpu test has it).
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kw: adamw(*args, **{**kw, "fused": False}))
    loss = whole_step(CASES[name], META)
    assert (loss.device, loss.shape) == (META, ())


def test_the_proof_would_notice() -> None:
    x = torch.ones(3, device=META)
    for ask in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_for_the_gpu(name: str) -> None:
    try:
        loss = whole_step(CASES[name], torch.device("cuda"), steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(loss))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu_is_that_of_the_cpu(name: str) -> None:
    found, expected = (float(whole_step(CASES[name], torch.device(kind))) for kind in ("cuda", "cpu"))
    assert found == pytest.approx(expected, rel=2e-2)


# what cannot go together


def test_all_impossible_combinations_are_reported_at_once() -> None:
    chosen = settings(
        epochs=4,
        batch_size=10,
        accumulate=3,
        optim={"warmup": 4},
        front_end={"mels": 100},
        heads={"share_prototypes": True},
        masking={"drop": 0, "replace": 0},
        losses=weights_of("r"),
    )
    with pytest.raises(ConfigError) as caught:
        check(chosen)
    text = str(caught.value)
    assert "5 combinations of settings cannot be" in text
    for fault in (
        "optim.warmup is 4",
        "mels is 100",
        "accumulate 3",
        "class_prototypes is 64 and",
        "nothing is corrupted",
    ):
        assert fault in text
    with pytest.raises(ConfigError, match=r"^1 combination of(.|\n)*all 0: nothing would be learnt"):
        check(settings(losses=weights_of("")))


# presets


def shrunk(name: str) -> ResolvedPretrainSettings:
    """A preset with a small encoder and its own everything else."""
    encoder = {"size": "custom", "width": 32, "depth": 2, "heads": 2}
    small = {"encoder": encoder, "heads": {"hidden": 64, "bottleneck": 32}, "batch_size": 2}
    found = {"front_end": {"mean": -4.27, "std": 4.57}}
    return resolve(presets.build(PretrainSettings, name, None, small), found)


@pytest.fixture(params=presets.recipes(PretrainSettings))
def preset(request: pytest.FixtureRequest) -> PretrainSettings:
    return shrunk(request.param)


def test_presets_build_and_step(preset: PretrainSettings) -> None:
    check(preset)
    front_end = FrontEnd(preset.front_end)
    frames, short = pretrain_dataset.view_frames(preset.views, front_end, preset.encoder.patch_frames, typical=10.0)
    if preset.preset in ("paper", "official-v2"):
        assert frames == 592
        assert short == (192 if preset.preset == "official-v2" else 0)
    task = ASiT(preset, frames, torch.Generator().manual_seed(0), CPU)
    if preset.preset in ("paper", "official-v2"):
        assert task.student.encoder.grid == (37, 8)
        assert task.student.encoder.pos_embed.shape == (1, 297, 32)
    data = batch(preset, clips=2, frames=frames, short=short)
    out = task.step(data, Now(0, 100, 10, measure=True), FLOAT32, WORLD)
    out.loss.backward()
    assert math.isfinite(out.loss.item())
    parts = {name: out.parts[name].item() for name in ("global", "local", "reconstruction")}
    by_hand = {
        "paper": parts["global"] + parts["local"] + 2 * parts["reconstruction"],
        "official-v2": (parts["global"] + parts["local"]) / 2 + parts["reconstruction"],
    }
    if preset.preset in by_hand:
        assert out.loss.item() == pytest.approx(by_hand[preset.preset], rel=1e-5)


def test_the_published_heads() -> None:
    v1, v2 = (ASiT(shrunk(n), 592, torch.Generator().manual_seed(0), CPU).student for n in ("paper", "official-v2"))
    assert v1.projection is not None
    assert v2.projection is not None
    assert v1.projection.class_layer.weight_v.shape[0] == 8192
    assert v1.projection.patch_layer.weight_v.shape[0] == 1024
    assert not isinstance(v1.projection.class_layer.weight_g, nn.Parameter)
    assert v2.projection.class_layer is v2.projection.patch_layer
    assert isinstance(v2.projection.class_layer.weight_g, nn.Parameter)
    widths = [layer.out_features for layer in v1.reconstruction.mlp if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert widths == [768, 768, 128]
