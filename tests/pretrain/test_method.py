"""The method as a whole: who sees what, what is compared with what, and what follows whom."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asit.audio.fbank import FrontEnd
from asit.config import PretrainSettings, ResolvedPretrainSettings, presets
from asit.errors import CheckpointError, ConfigError
from asit.pretrain import masking, method, pretrain_dataset
from asit.pretrain.method import ASiT
from asit.pretrain.pretrain_dataset import PretrainBatch
from asit.pretrain.pretrain_resolve import check, resolve
from asit.runtime import Precision, World
from asit.training import optim
from asit.training.trainable import Now

CPU = torch.device("cpu")
WORLD = World(0, 1, CPU, "")
FLOAT32 = Precision("float32", "")
CLIPS, FRAMES, SHORT, MELS = 4, 48, 16, 32
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
    rows, locals_ = 2 * clips, chosen.views.local_views * clips
    mels = chosen.front_end.mels
    masks = [masking.draw(rng, frames, mels, chosen.masking) for _ in range(rows)]

    def draw(count: int, length: int) -> Tensor:
        return torch.randn(count, 1, length, mels, generator=g) + torch.randn(count, 1, 1, 1, generator=g)

    depth = chosen.encoder.depth or 12
    return PretrainBatch(
        clean=draw(rows, frames),
        local=draw(locals_, short) if locals_ else None,
        drop=torch.from_numpy(np.stack([m.drop for m in masks]))[:, None],
        replace=torch.from_numpy(np.stack([m.replace for m in masks]))[:, None],
        donor=torch.from_numpy(masking.donor_rows(rng.random((clips, 2)), chosen.masking.donor_pool)),
        factors=torch.ones(depth, 2, rows + locals_),
        noise=torch.randn(rows, 1, frames, mels, generator=g) if chosen.masking.fill == "noise" else None,
        ids=[f"{i}.wav" for i in range(clips)],
    )


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


@pytest.mark.parametrize("heads", [{}, {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True}])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "r"])
def test_teacher_and_student_are_paired_and_equal_at_the_start(kind: str, heads: dict[str, Any]) -> None:
    task = build(settings(losses=weights_of(kind), heads=heads))
    assert task.teacher is not None
    ours, theirs = dict(task.student.named_parameters()), dict(task.teacher.named_parameters())
    assert set(theirs) == {name for name in ours if not name.startswith("reconstruction.")}
    assert {name for name, *_ in task._pairs} == set(theirs)
    assert {id(t) for _, t, _ in task._pairs} == {id(p) for p in theirs.values()}
    assert all(s is ours[name] and t is theirs[name] for name, t, s in task._pairs)
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
    heads = {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True} if share else {}
    chosen = settings(heads=heads)
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


@pytest.mark.parametrize("heads", [{}, {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True}])
@pytest.mark.parametrize("tokens", ["all", "masked"])
def test_the_losses_by_hand(tokens: str, heads: dict[str, Any]) -> None:
    """In float64, from modules run one view at a time: the teacher sees clean views, the student corrupted ones."""
    chosen = settings(losses={"local_tokens": tokens, "reconstruction_weight": 2}, heads=heads)
    task = build(chosen)
    move_apart(task)
    data = batch(chosen)
    out = task.step(data, NOW, FLOAT32, WORLD)
    student, teacher = task.student.double(), task.teacher.double()  # type: ignore[union-attr]
    temperature = 0.07  # epoch 3.5 of a warm-up of 3
    clean = data.clean.double().unflatten(0, (2, CLIPS))
    corrupted = clean.clone()
    donor = data.donor.view(2, CLIPS) % CLIPS
    masks = (data.drop | data.replace).unflatten(0, (2, CLIPS))
    for v, b in itertools.product(range(2), range(CLIPS)):
        taken = data.replace.unflatten(0, (2, CLIPS))[v, b]
        corrupted[v, b] = torch.where(taken, clean[v, donor[v, b]], corrupted[v, b])
        corrupted[v, b][data.drop.unflatten(0, (2, CLIPS))[v, b]] = 0
    with torch.no_grad():
        class_p, patch_p, class_s, patch_s, made = [], [], [], [], []
        for v in range(2):
            t = teacher.encoder(clean[v])
            c, p = teacher.projection(t.cls, t.patches)  # type: ignore[misc]
            class_p.append(((c - task.class_centre.value.double()) / temperature).softmax(-1))
            patch_p.append(((p - task.patch_centre.value.double()) / temperature).softmax(-1))
            s = student.encoder(corrupted[v])
            c, p = student.projection(s.cls, s.patches)  # type: ignore[misc]
            class_s.append(c)
            patch_s.append(p)
            made.append(student.reconstruction(s.patches, s.grid))  # type: ignore[misc]
        for v in range(2):
            s = student.encoder(data.local.double()[v * CLIPS : (v + 1) * CLIPS])
            class_s.append(student.projection(s.cls, s.patches)[0])  # type: ignore[misc]
        pairs = [cross_entropy(class_p[i], class_s[j]).mean() for i in range(2) for j in range(4) if i != j]
        assert len(pairs) == 6
        per_token = torch.cat([cross_entropy(patch_p[v], patch_s[v]) for v in range(2)])
        if tokens == "masked":
            cover = nn.functional.avg_pool2d(masks.flatten(0, 1).double(), 16).flatten()
            per_token = per_token[cover > 0.5]
        gap = (torch.stack(made) - clean).abs()[masks]
    want = {"global": torch.stack(pairs).mean(), "local": per_token.mean(), "reconstruction": gap.mean()}
    for name, value in want.items():
        assert out.parts[name].item() == pytest.approx(float(value), rel=2e-4), name
    total = want["global"] + want["local"] + 2 * want["reconstruction"]
    assert out.loss.item() == pytest.approx(float(total), rel=2e-4)
    assert float(out.parts["mask_share"]) == pytest.approx(float(masks.double().mean()))
    for name, probs in (("teacher_entropy_class", class_p), ("teacher_entropy_patch", patch_p)):
        entropy = torch.special.entr(torch.cat(probs)).sum(-1).mean()
        assert out.parts[name].item() == pytest.approx(float(entropy), rel=1e-3)


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
        logits = [task.teacher.projection(t.cls, t.patches) for t in tokens]  # type: ignore[union-attr, misc]
    task.after_update(NOW, WORLD)
    for i, centre in enumerate((task.class_centre, task.patch_centre)):
        mean = torch.cat([both[i] for both in logits]).double().mean(0)
        torch.testing.assert_close(centre.value.double(), 0.9 * before[i].double() + 0.1 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "heads", [{}, {"train_norm": True}, {"share_prototypes": True, "patch_prototypes": 64}], ids=str
)
@pytest.mark.parametrize("views", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_parameter_has_a_gradient(kind: str, views: int, heads: dict[str, Any]) -> None:
    """Whatever is switched off: several processes cannot average a gradient that is not there."""
    chosen = settings(losses=weights_of(kind), heads=heads, views={"local_views": views})
    task = build(chosen)
    move_apart(task)
    out = task.step(batch(chosen), NOW, FLOAT32, WORLD)
    out.loss.backward()
    terms = {"global": "g", "local": "l", "reconstruction": "r"}
    assert {name for name in out.parts if name in terms} == {name for name, letter in terms.items() if letter in kind}
    without = [name for name, p in task.trainable().named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    still = [name for name, p in task.trainable().named_parameters() if p.grad is not None and not p.grad.any()]
    assert still == []
    assert math.isfinite(out.loss.item())


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


def test_schedules_are_the_official_arrays() -> None:
    chosen = settings(batch_size=64, optim={"lr": 5e-4, "warmup": 2, "min_lr": 1e-6})
    at = [method.schedules(chosen, Now(step, 100, 10)) for step in range(100)]
    np.testing.assert_allclose([r.lr for r in at], dino_cosine(5e-4 * 64 / 256, 1e-6, 100, 20), rtol=1e-12)
    np.testing.assert_allclose([r.weight_decay for r in at], dino_cosine(0.04, 0.4, 100), rtol=1e-12)
    np.testing.assert_allclose([r.others["teacher_momentum"] for r in at], dino_cosine(0.996, 1, 100), rtol=1e-12)
    temperature = np.minimum(0.04 + 0.03 * np.arange(100) / 30, 0.07)
    np.testing.assert_allclose([r.others["teacher_temperature"] for r in at], temperature, rtol=1e-12)


@pytest.mark.parametrize("shape", ["linear", "wsd"])
def test_the_way_down_is_that_of_the_settings(shape: optim.Schedule) -> None:
    chosen = settings(batch_size=64, optim={"lr": 5e-4, "warmup": 2, "min_lr": 1e-6, "schedule": shape})
    found = [method.schedules(chosen, Now(step, 100, 10)) for step in range(100)]
    plain = [method.schedules(settings(optim={"warmup": 2}), Now(step, 100, 10)) for step in range(100)]
    want = [optim.warmup_then(shape, 5e-4 * 64 / 256, 1e-6, step, 20, 100) for step in range(100)]
    assert [r.lr for r in found] == want
    assert want[40] != pytest.approx(dino_cosine(5e-4 * 64 / 256, 1e-6, 100, 20)[40], rel=0.02)
    assert [r.weight_decay for r in found] == [r.weight_decay for r in plain]  # the rate alone


def test_schedules_at_their_ends() -> None:
    chosen = settings(batch_size=512, optim={"lr": 5e-4, "warmup": 1}, losses={"teacher_warmup": 0})
    first, border, last = (method.schedules(chosen, Now(step, 100, 10)) for step in (0, 10, 99))
    assert first.lr == 0
    assert method.schedules(chosen, Now(9, 100, 10)).lr == border.lr == 5e-4 * 2  # scaled by batch / 256
    assert first.weight_decay == pytest.approx(0.04, rel=1e-12)
    assert first.others == pytest.approx({"teacher_momentum": 0.996, "teacher_temperature": 0.07}, rel=1e-12)
    assert last.lr == pytest.approx(1e-6, abs=1e-6)
    assert last.weight_decay == pytest.approx(0.4, abs=1e-3)
    assert last.others["teacher_momentum"] == pytest.approx(1.0, abs=1e-6)
    end = method.schedules(chosen, Now(100, 100, 10))
    assert (end.lr, end.weight_decay, end.others["teacher_momentum"]) == (1e-6, 0.4, 1.0)


def test_a_peak_below_the_floor_stays_flat() -> None:
    chosen = settings(batch_size=4, optim={"lr": 1e-6, "warmup": 0, "min_lr": 1e-6})
    rates = {method.schedules(chosen, Now(step, 100, 10)).lr for step in range(0, 100, 9)}
    assert max(rates) == pytest.approx(1e-6 * 4 / 256)
    assert min(rates) == pytest.approx(1e-6 * 4 / 256)


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


@pytest.mark.parametrize("heads", [{}, {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True}])
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


@pytest.mark.parametrize("heads", [{}, {"share_prototypes": True, "patch_prototypes": 64, "train_norm": True}])
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


@pytest.mark.parametrize("kind", ["glr", "g"])
def test_the_picture(kind: str) -> None:
    chosen = settings(losses=weights_of(kind))
    task, data = build(chosen), batch(chosen)
    four = task.picture(data, FLOAT32)
    assert set(four) == {"clean", "corrupted", "reconstructed", "mask"}
    assert all(x.shape == (CLIPS, FRAMES, MELS) for x in four.values())
    assert torch.equal(four["clean"], data.clean[:CLIPS, 0])
    outside = ~four["mask"]
    assert torch.equal(four["corrupted"][outside], four["clean"][outside])
    assert not torch.equal(four["corrupted"], four["clean"])
    assert bool(four["reconstructed"].any()) == ("r" in kind)


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
