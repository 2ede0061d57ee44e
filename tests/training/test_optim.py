"""Schedules against closed forms, groups as sets, clipping against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from asit.config import EncoderSettings, HeadSettings
from asit.errors import CheckpointError
from asit.model.vit import Encoder
from asit.pretrain.heads import ProjectionHead, ReconstructionHead
from asit.training import optim

# schedules


def test_cosine_and_linear_at_their_ends_and_between() -> None:
    for start, end in ((0.04, 0.4), (0.996, 1.0), (5e-4, 1e-6)):
        assert optim.cosine(start, end, 0.0) == pytest.approx(start, rel=1e-12)
        assert optim.cosine(start, end, 1.0) == end
        assert optim.cosine(start, end, 0.5) == pytest.approx((start + end) / 2, rel=1e-12)
        assert optim.cosine(start, end, -3.0) == optim.cosine(start, end, 0.0)
        assert optim.cosine(start, end, 7.0) == end
        assert optim.linear(start, end, 0.0) == start
        assert optim.linear(start, end, 1.0) == pytest.approx(end, rel=1e-12)
        assert optim.linear(start, end, 0.25) == pytest.approx(start + (end - start) / 4, rel=1e-12)
        assert optim.linear(start, end, -1.0) == start
        assert optim.linear(start, end, 9.0) == pytest.approx(end, rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (100, 0), (7, 1), (50, 49), (3, 2), (1, 0)])
def test_warmup_is_numpys_line_and_then_the_closed_form(total: int, warmup: int, shape: optim.Schedule) -> None:
    peak, end, at = 3e-3, 1e-6, np.arange(total - warmup) / (total - warmup)
    left = {
        "cosine": np.cos(np.pi * at / 2) ** 2,
        "linear": 1 - at,
        "wsd": 1 - np.sqrt(np.interp(at, [0.0, 0.8, 1.0], [0.0, 0.0, 1.0])),  # a shelf, and a root
    }[shape]
    found = [optim.warmup_then(shape, peak, end, step, warmup, total) for step in range(total)]
    want = [*np.linspace(0, peak, warmup), *(end + (peak - end) * left)]
    rtol, atol = (1e-6, 1e-10) if shape == "wsd" else (1e-9, 1e-18)
    np.testing.assert_allclose(found, want, rtol=rtol, atol=atol)
    if warmup > 1:
        assert found[warmup - 1] == pytest.approx(peak)  # the border: the line ends where the fall begins
    for step in (total, 3 * total):
        assert optim.warmup_then(shape, peak, end, step, warmup, total) == pytest.approx(end)


# groups


def network(train_norm: bool = True) -> nn.ModuleDict:
    encoder = Encoder(EncoderSettings(size="custom", width=32, depth=2, heads=2), 32, 32)
    heads = HeadSettings(hidden=64, bottleneck=32, class_prototypes=64, patch_prototypes=64, train_norm=train_norm)
    parts = {"encoder": encoder, "projection": ProjectionHead(32, heads)}
    return nn.ModuleDict({**parts, "reconstruction": ReconstructionHead(32, heads, (16, 16))})


def test_groups_are_a_partition_of_what_is_trained() -> None:
    model = network()
    model["encoder"].cls_token.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = optim.adamw(model.named_parameters(), (0.9, 0.999))
    groups = [set(group["names"]) for group in optimiser.param_groups]
    assert len(groups) == 2
    assert groups[0] & groups[1] == set()
    assert groups[0] | groups[1] == set(trained)
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in trained.values()}
    for group in optimiser.param_groups:
        assert [id(trained[name]) for name in group["names"]] == [id(p) for p in group["params"]]


def test_no_decay_on_biases_and_one_dimensional_parameters() -> None:
    model = network()
    optimiser = optim.adamw(model.named_parameters(), (0.9, 0.999))
    optim.set_rates(optimiser, 1e-3, 0.3)
    decay = {name: group["weight_decay"] for group in optimiser.param_groups for name in group["names"]}
    assert {group["lr"] for group in optimiser.param_groups} == {1e-3}
    for name, parameter in model.named_parameters():
        flat = sum(size > 1 for size in parameter.shape) < 1 or parameter.ndim == 1 or name.endswith(".bias")
        assert decay[name] == (0.0 if flat else 0.3), name
    assert decay["encoder.blocks.0.norm1.weight"] == 0
    assert decay["encoder.blocks.0.attn.qkv.bias"] == 0
    assert decay["encoder.pos_embed"] == 0.3
    assert decay["projection.class_layer.weight_g"] == 0.3  # v2 decays it
    optim.set_rates(optimiser, 1e-3, 0.0)
    optim.set_rates(optimiser, 1e-3, 0.2)  # 0 on the way does not make the groups one
    assert sorted({group["weight_decay"] for group in optimiser.param_groups}) == [0.0, 0.2]


def test_steps_equal_adamw_by_hand() -> None:
    """Three steps in float64, from the formula of arXiv 1711.05101 with a rate and a decay of their own each."""
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(5, 4)
    start = {name: p.detach().clone().double() for name, p in layer.named_parameters()}
    optimiser = optim.adamw(layer.named_parameters(), (0.9, 0.99))
    first = {name: torch.zeros_like(p) for name, p in start.items()}
    second = {name: torch.zeros_like(p) for name, p in start.items()}
    for t, (lr, decay) in enumerate([(1e-2, 0.04), (2e-2, 0.2), (5e-3, 0.4)], 1):
        optim.set_rates(optimiser, lr, decay)
        for name, p in layer.named_parameters():
            p.grad = torch.randn(p.shape, generator=g)
            d = p.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * d
            second[name] = 0.99 * second[name] + 0.01 * d * d
            start[name] *= 1 - lr * (decay if name == "weight" else 0)
            root = (second[name] / (1 - 0.99**t)).sqrt() + 1e-8
            start[name] -= lr * first[name] / (1 - 0.9**t) / root
        optimiser.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach().double(), start[name], rtol=1e-5, atol=1e-6)


# clipping


def gradients(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g) * scale for shape, scale in (((40, 30), 5), ((30,), 0.01), ((), 1), ((7, 1), 2))
    ]


def parameters(values: list[Tensor]) -> list[nn.Parameter]:
    out = [nn.Parameter(torch.zeros_like(v)) for v in values]
    for parameter, value in zip(out, values, strict=True):
        parameter.grad = value.clone()
    return out


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e6])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_clipping_equals_torchs(per_parameter: bool, limit: float) -> None:
    ours, theirs = gradients(), parameters(gradients())
    norm = torch.nn.utils.clip_grad_norm_(theirs, 1e30)
    if per_parameter:
        for parameter in theirs:
            torch.nn.utils.clip_grad_norm_([parameter], limit)
    else:
        torch.nn.utils.clip_grad_norm_(theirs, limit)
    found = optim.clip(ours, limit, per_parameter)
    torch.testing.assert_close(found, norm)
    for mine, parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-6, atol=0)
        if per_parameter:
            assert float(mine.norm()) <= limit * (1 + 1e-5)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_gradients_below_the_limit_do_not_change(per_parameter: bool) -> None:
    for limit in (0.0, 1e9):
        values = gradients()
        optim.clip(values, limit, per_parameter)
        assert all(torch.equal(a, b) for a, b in zip(values, gradients(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_gradient_that_is_not_finite_is_seen_in_the_norm(per_parameter: bool, bad: float) -> None:
    values = gradients()
    values[3][2] = bad
    assert not math.isfinite(float(optim.clip(values, 3.0, per_parameter)))


# state


def trained(steps: int, optimiser_of: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[nn.Module, Any]:
    layer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    optimiser = optimiser_of(layer)
    for step in range(steps):
        walk(layer, optimiser, step)
    return layer, optimiser


def walk(layer: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> None:
    optim.set_rates(optimiser, 1e-2, 0.1)
    for i, p in enumerate(layer.parameters()):
        # The last layer is frozen at first, and so has no state of its own.
        frozen = i > 1 and step < 2
        p.grad = None if frozen else torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
    optimiser.step()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_optimisers_state_goes_through_tensors(steps: int) -> None:
    def make(layer: nn.Module) -> torch.optim.Optimizer:
        return optim.adamw(layer.named_parameters(), (0.9, 0.999))

    layer, optimiser = trained(steps, make)
    held = {name: value.clone() for name, value in optim.optimiser_tensors(optimiser).items()}
    moving = {0: set(), 1: {"0.weight", "0.bias"}, 3: {"0.weight", "0.bias", "1.weight", "1.bias"}}[steps]
    assert {name.rsplit("/", 1)[0] for name in held} == moving
    other, _ = trained(0, make)
    other.load_state_dict(layer.state_dict())
    again = make(other)
    optim.load_optimiser_tensors(again, held)
    for step in range(steps, steps + 3):
        walk(layer, optimiser, step)
        walk(other, again, step)
    assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="not here: nonsense"):
        optim.load_optimiser_tensors(again, {"nonsense/exp_avg": torch.zeros(1)})
    squares = held.get("0.weight/exp_avg_sq", torch.zeros(1))
    for field, value in (
        ("exp_avg", None),
        ("exp_avg_sq", squares.half()),
        ("exp_avg", torch.zeros(3)),
        ("step", torch.tensor([1.0, 2.0])),
        ("step", torch.tensor(-1.0)),
        ("exp_avg", held.get("0.weight/exp_avg", torch.zeros(1)) * float("nan")),
        ("max", torch.zeros(1)),
    ):
        changed = {name: v for name, v in {**held, f"0.weight/{field}": value}.items() if v is not None}
        if steps:
            with pytest.raises(CheckpointError, match=rf"AdamW state of 0\.weight is not that of .*: {field}\n"):
                optim.load_optimiser_tensors(make(other), changed)


# fine-tuning


@pytest.mark.parametrize(
    ("epochs", "milestones", "factor", "settings"),
    [
        (30, range(5, 1000), 0.85, (5, 1)),  # ESC-50 and Speech Commands
        (25, [10, 15, 20, 25], 0.5, (10, 5)),  # AudioSet-20K
        (5, [2, 3, 4, 5], 0.5, (2, 1)),  # AudioSet-2M
    ],
)
def test_stepped_is_asts_multi_step_schedule(epochs: int, milestones: Any, factor: float, settings: Any) -> None:
    """torch's MultiStepLR, stepped after each epoch as AST does."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimiser, list(milestones), factor)
    for epoch in range(epochs):
        for within in (0.0, 0.5, 0.99):
            found = optim.stepped(1e-4, epoch + within, *settings, factor)
            assert found == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimiser.step()
        theirs.step()


def test_stepped_does_not_lose_steps_to_rounding() -> None:
    """0.3 is not a whole number of tenths in binary."""
    for first, every in ((0.1, 0.1), (1.1, 0.1), (0.7, 0.7)):
        for count in range(1, 30):
            assert optim.stepped(1.0, first + (count - 1) * every, first, every, 0.5) == 0.5**count
