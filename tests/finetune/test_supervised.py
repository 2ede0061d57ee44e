"""Losses on soft labels, layer-wise rates, schedules and averaged weights, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.config import EncoderSettings, FinetuneSettings, ResolvedFinetuneSettings
from asit.config.finetune_settings import ResolvedFinetuneOptim, check, resolve
from asit.errors import CheckpointError, ConfigError
from asit.finetune import supervised
from asit.finetune.finetune_dataset import FinetuneBatch
from asit.io.checkpoint import load_strict
from asit.model.classifier import Classifier, Head
from asit.model.vit import Encoder
from asit.runtime import Precision, World
from asit.training import optim
from asit.training.trainable import Now

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, "as asked")
FLOAT = Precision("float32", "as asked")


INPUT = {"input": {"seconds": 1.0, "keep_gb": 0.0}}


def settings(**over: Any) -> ResolvedFinetuneSettings:
    return resolve(FinetuneSettings(**{"epochs": 4, **over}), multi=over.get("labels") == "multi", found=INPUT)


def network(seed: int = 0, pooling: Any = "class+mean") -> Classifier:
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(EncoderSettings(size="custom", width=32, depth=2, heads=2), 32, 32)
    encoder.init_weights(generator)
    head = Head(32, 3, pooling)
    head.init_weights(generator)
    return Classifier(encoder, head)


def batch(target: list[list[float]]) -> FinetuneBatch:
    rows = len(target)
    x = torch.randn(rows, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = [str(i) for i in range(rows)]
    return FinetuneBatch(x=x, target=torch.tensor(target), factors=torch.ones(2, 2, rows), ids=ids)


# losses

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], requires_grad=True)
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.1, 0.2, 0.4]])


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_soft_labels_stay_soft(kind: Any) -> None:
    """AST's peer fault: hard indices under mixup."""
    x, t = LOGITS.detach().double().numpy(), SOFT.double().numpy()
    if kind == "ce":
        logs = x - np.log(np.exp(x).sum(1, keepdims=True))
        want, slope = -(t * logs).sum() / 2, (np.exp(logs) * t.sum(1, keepdims=True) - t) / 2
    else:
        p = 1 / (1 + np.exp(-x))
        want, slope = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(), (p - t) / 6
    found = supervised.classification_loss(LOGITS, SOFT, kind)
    assert found.item() == pytest.approx(want, rel=1e-6)
    (gradient,) = torch.autograd.grad(found, LOGITS)
    np.testing.assert_allclose(gradient, slope, atol=1e-6)


def test_losses_are_float32_and_finite_at_the_ends() -> None:
    for kind in ("ce", "bce"):
        found = supervised.classification_loss(
            torch.tensor([[300.0, -300.0]]).bfloat16(), torch.tensor([[0.0, 1.0]]), kind
        )
        assert found.dtype == torch.float32
        assert found.isfinite()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_smoothing_keeps_the_mass(share: float) -> None:
    found = supervised.smooth(SOFT, share)
    torch.testing.assert_close(found.sum(1), SOFT.sum(1))
    torch.testing.assert_close(found, (1 - share) * SOFT + share * SOFT.sum(1, keepdim=True) / 3)
    if not share:
        assert found is SOFT
    hard = torch.eye(3)
    torch.testing.assert_close(
        supervised.classification_loss(LOGITS, supervised.smooth(hard[:2], share), "ce"),
        torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 1]), label_smoothing=share),
    )


@pytest.mark.parametrize(("kind", "smoothing"), [("ce", 0.1), ("bce", 0.0)])
def test_a_step(kind: Any, smoothing: float) -> None:
    task = supervised.Supervised(network(), settings(loss={"kind": kind, "smoothing": smoothing}), CPU)
    shown = batch([[0.6, 0.4, 0.0], [0.0, 0.0, 1.0]])
    out = task.step(shown, Now(0, 8, 2, measure=True), FLOAT, ALONE)
    logits = task.network(shown.x, drop=shown.factors)
    want = supervised.classification_loss(logits, supervised.smooth(shown.target, smoothing), kind)
    torch.testing.assert_close(out.loss, want)
    hits = (logits.argmax(1) == torch.tensor([0, 2])).float().mean()
    assert out.parts["train_accuracy"] == hits
    assert task.step(shown, Now(0, 8, 2), FLOAT, ALONE).parts == {}
    several = supervised.Supervised(network(), settings(labels="multi"), CPU)
    assert several.step(shown, Now(0, 8, 2, measure=True), FLOAT, ALONE).parts == {}  # no one class to be right about


# learning rates


def test_layers_are_a_partition_with_factors_by_hand() -> None:
    task = supervised.Supervised(network(), settings(optim={"layer_decay": 0.5, "head_lr": 3.0}), CPU)
    named = dict(task.trainable().named_parameters())
    optimiser = optim.adamw(named.items(), (0.9, 0.999), task.lr_scale)
    held = [name for group in optimiser.param_groups for name in group["names"]]
    assert len(held) == len(set(held))
    assert set(held) == set(named)
    scale = {name: group["scale"] for group in optimiser.param_groups for name in group["names"]}
    for name in named:
        by_hand = (
            *[("head.", 3.0), ("encoder.norm.", 1.0), ("encoder.blocks.1.", 1.0), ("encoder.blocks.0.", 0.5)],
            *[("encoder.cls_token", 0.25), ("encoder.pos_embed", 0.25), ("encoder.patch_embed.", 0.25)],
        )
        (wanted,) = [factor for start, factor in by_hand if name.startswith(start)]
        assert scale[name] == wanted, name
    assert {group["scale"] for group in optimiser.param_groups} == {3.0, 1.0, 0.5, 0.25}
    assert optim.layer_scales(["encoder.dist_token"], 2, 0.5) == {"encoder.dist_token": 0.25}
    deep = optim.layer_scales([f"encoder.blocks.{i}.attn.qkv.weight" for i in range(12)], 12, 0.75)
    assert list(deep.values()) == pytest.approx([0.75**n for n in range(11, -1, -1)])
    assert set(optim.layer_scales(named, 2, 1.0).values()) == {1.0}
    with pytest.raises(ValueError, match=r"encoder\.extra"):
        optim.layer_scales(["encoder.extra"], 2, 0.5)


def test_adamw_steps_are_scaled() -> None:
    """The first step of AdamW is lr times the sign of the gradient: each layer moves by its factor."""
    task = supervised.Supervised(network(), settings(optim={"layer_decay": 0.5, "head_lr": 2.0}), CPU)
    named = dict(task.trainable().named_parameters())
    optimiser = optim.adamw(named.items(), (0.9, 0.999), task.lr_scale)
    before = {name: value.detach().clone() for name, value in named.items()}
    for value in named.values():
        value.grad = torch.ones_like(value)
    optim.set_rates(optimiser, 1e-3, 0.0)
    optimiser.step()
    for name, value in named.items():
        torch.testing.assert_close(
            before[name] - value, torch.full_like(value, 1e-3 * task.lr_scale(name)), rtol=1e-3, atol=1e-7
        )


def test_the_schedules() -> None:
    cosine = ResolvedFinetuneOptim(lr=1e-3, min_lr=1e-5, warmup=2.0, average_from=0.0)
    rate = [supervised.learning_rate(cosine, Now(step, 50, 5)) for step in range(50)]
    assert rate[0] == 0.0
    assert rate[9] == rate[10] == pytest.approx(1e-3)
    assert rate[:10] == sorted(rate[:10])
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert rate[30] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5))
    steps = ResolvedFinetuneOptim(
        lr=1e-3, warmup=1.0, average_from=0.0, schedule="step", step_from=3.0, step_every=2.0, step_factor=0.5
    )
    rate = [supervised.learning_rate(steps, Now(step, 50, 5)) for step in range(50)]
    assert rate[4] == pytest.approx(1e-3)
    assert [rate[5 * epoch] * 1e3 for epoch in range(1, 10)] == pytest.approx(
        [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.0625]
    )
    assert all(len(set(rate[5 * epoch : 5 * epoch + 5])) == 1 for epoch in range(1, 10))
    with_small_peak = ResolvedFinetuneOptim(lr=1e-7, min_lr=1e-6, warmup=0.0, average_from=0.0)
    assert max(supervised.learning_rate(with_small_peak, Now(step, 50, 5)) for step in range(50)) == pytest.approx(1e-7)


# averages


def train(task: supervised.Supervised, steps: int, first: int = 0) -> list[dict[str, Tensor]]:
    """Move the weights by numbers, as an optimiser would; gives them after each step."""
    seen = []
    for step in range(first, steps):
        with torch.no_grad():
            for value in task.network.parameters():
                value.add_(math.sin(step + 1.0))
        task.after_update(Now(step, 8, 2), ALONE)
        seen.append({name: value.clone() for name, value in task.network.state_dict().items()})
    return seen


def close(found: Classifier, want: dict[str, Tensor]) -> None:
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-6)


def test_moving_average_by_hand() -> None:
    task = supervised.Supervised(network(), settings(optim={"average": "ema", "ema": 0.8}), CPU)
    assert task.scored() is task.network
    mean: dict[str, Tensor] = {}
    for n, weights in enumerate(train(task, 8)):
        share = max(0.2, 1 / (n + 1))  # the mean of all until there are five
        mean = {name: value * share + mean.get(name, 0.0) * (1 - share) for name, value in weights.items()}
    assert task.scored() is task.averaged
    close(task.scored(), mean)


@pytest.mark.parametrize(("start", "ends"), [(1, (1, 3, 5, 7)), (3, (5, 7)), ("auto", (3, 5, 7))])
def test_mean_over_the_ends_of_epochs_by_hand(start: Any, ends: tuple[int, ...]) -> None:
    task = supervised.Supervised(network(), settings(optim={"average": "epochs", "average_from": start}), CPU)
    before = train(task, ends[0])
    assert task.scored() is task.network
    weights = before + train(task, 8, first=ends[0])
    assert int(task.seen) == len(ends)
    close(task.scored(), {name: torch.stack([weights[i][name] for i in ends]).mean(0) for name in weights[0]})


def test_nothing_is_averaged_unasked() -> None:
    task = supervised.Supervised(network(), settings(), CPU)
    train(task, 4)
    assert task.scored() is task.network
    assert not [name for name in task.state() if not name.startswith("network.")]


@pytest.mark.parametrize("average", ["none", "ema", "epochs"])
def test_the_state_goes_round(average: Any) -> None:
    given = settings(optim={"average": average, "ema": 0.7, "average_from": 1})
    one, other = (supervised.Supervised(network(seed), given, CPU) for seed in (0, 1))
    train(one, 3)
    state = {name: value.clone() for name, value in one.state().items()}
    other.load_state(state)
    train(one, 6, first=3)
    train(other, 6, first=3)
    ours, theirs = other.state(), one.state()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    lacking = {name: value for name, value in state.items() if name != "network.head.linear.bias"}
    with pytest.raises(CheckpointError, match=r"head\.linear\.bias"):
        other.load_state(lacking)
    load_strict(network(2), {n.removeprefix("network."): v for n, v in state.items() if n.startswith("network.")}, "x")


def test_suspects() -> None:
    task = supervised.Supervised(network(), settings(), CPU)
    shown = batch([[1.0, 0.0, 0.0]] * 3)
    assert task.suspects(shown) == ["0", "1", "2"]
    shown.x[1, 0, 3, 4] = float("nan")
    assert task.suspects(shown) == ["1"]


# settings


def test_autos() -> None:
    found = resolve(FinetuneSettings(epochs=40, seed=5), multi=True, found=INPUT)
    assert (found.optim.warmup, found.optim.average_from) == (4.0, 20.0)
    assert (found.loss.kind, found.validation.metric, found.label_seed) == ("bce", "mAP", 5)
    found = resolve(FinetuneSettings(epochs=400, label_seed=2), multi=False, found=INPUT)
    assert (found.optim.warmup, found.loss.kind, found.validation.metric, found.label_seed) == (
        10.0,
        "ce",
        "accuracy",
        2,
    )
    kept = resolve(FinetuneSettings(optim={"warmup": 3}, loss={"kind": "bce"}), multi=False, found=INPUT)
    assert (kept.optim.warmup, kept.loss.kind) == (3.0, "bce")


def test_all_conflicting_settings_are_reported_at_once() -> None:
    wrong = FinetuneSettings(
        epochs=5,
        batch_size=10,
        accumulate=4,
        model="none",
        fresh=True,
        optim={"warmup": 5, "average": "epochs", "average_from": 6},
        sampling={"share": 0.5, "per_class": 2, "epoch_clips": 100},
    )
    with pytest.raises(ConfigError, match="6 combinations of settings cannot be") as caught:
        check(wrong)
    for problem in (
        "epochs is 5 and optim.warmup is 5: the warm-up must end before the run",
        "optim.average_from is 6: there would be no average",
        "sampling.share is 0.5 and sampling.per_class 2: take one",
        "sampling.epoch_clips is 100 and sampling.order shuffle",
        "batch_size is 10, which accumulate 4 does not divide",
        "model is none and fresh is on",
    ):
        assert problem in str(caught.value)
    with pytest.raises(ConfigError, match=r"1 combination of settings cannot be(.|\n)*average_from 0"):
        check(FinetuneSettings(optim={"average": "epochs", "average_from": 0}))
    check(FinetuneSettings())
