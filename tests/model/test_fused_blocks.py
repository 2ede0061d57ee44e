"""A block's branches as one function each, against the layers one after another, and against float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from asit.model import blocks
from asit.model.blocks import Block

from .conftest import noise  # type: ignore[import-not-found]

DROPS = {
    "none": None,
    "ones": [[1.0] * 4, [1.0] * 4],
    "all kept": [[1.25] * 4, [1.5, 1.0, 1.25, 2.0]],
    "some": [[0.0, 1.25, 1.25, 0.0], [2.0, 0.0, 1.25, 1.25]],
    "no row": [[0.0] * 4, [0.0] * 4],
}


def block() -> Block:
    made = Block(32, 2, 96)
    for i, parameter in enumerate(made.parameters()):
        with torch.no_grad():
            parameter.copy_(noise(*parameter.shape, seed=i + 1) * 0.2 + (1.0 if i in (0, 6) else 0.0))
    return made.train()


def passed(
    module: Block, drop: list[list[float]] | None, low: bool, monkeypatch: pytest.MonkeyPatch, fused: bool = True
) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    module = copy.deepcopy(module)
    x = noise(4, 19, 32).requires_grad_(True)
    with monkeypatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=low):
        if not fused:
            patch.setattr(blocks, "bf16_on_cpu", lambda x: False)
        out = module(x, None if drop is None else torch.tensor(drop))
    assert out.dtype is torch.float32
    out.backward(noise(4, 19, 32, seed=9))
    found = [out.detach(), x.grad, *(p.grad for p in module.parameters())]
    assert all(f is not None and f.dtype is torch.float32 and f.is_contiguous() for f in found)
    return found


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS)
def test_as_near_to_float32_as_the_layers_one_by_one(
    drop: list[list[float]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = block()
    want = passed(module, drop, False, monkeypatch)
    ours = passed(module, drop, True, monkeypatch)
    layers = passed(module, drop, True, monkeypatch, fused=False)
    if drop == DROPS["no row"]:
        for got in (ours, layers, want):
            assert torch.equal(got[0], noise(4, 19, 32)), "what no branch is added to stays as it is"
            assert not any(f.any() for f in got[2:])
        return
    one, other, size = (
        torch.cat([(a - b).flatten() for a, b in zip(left, right, strict=True)]).norm()
        for left, right in ((ours, want), (layers, want), (want, [torch.zeros_like(w) for w in want]))
    )
    assert 0 < one < 1.1 * other
    assert one < 0.01 * size
    for name, got, exact in zip(["out", "x", *(n for n, _ in module.named_parameters())], ours, want, strict=True):
        assert (got - exact).norm() < 0.03 * exact.norm() + 1e-4, name


def test_rows_left_out_are_not_computed_and_rows_do_not_see_each_other() -> None:
    module, x = block(), noise(4, 19, 32)
    drop = torch.tensor([[1.25, 0.0, 1.25, 1.25], [1.25, 0.0, 0.0, 1.25]])
    x[1] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, drop)
        first = module(x[:1], drop[:, :1])
    assert torch.isfinite(out[[0, 2, 3]]).all()
    assert (out[:1] - first).abs().max() < 1e-2 * first.abs().max()


def test_what_is_frozen_has_no_gradient() -> None:
    module, x = block(), noise(2, 5, 32)
    for frozen in (module.norm1.weight, module.attn.qkv.weight, module.mlp.fc2.weight, module.mlp.fc1.bias):
        frozen.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        module(x).sum().backward()
    assert x.grad is None
    for name, parameter in module.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name
        assert parameter.grad is None or parameter.grad.any(), name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not module(x).requires_grad, "the teacher's pass"


def test_only_training_in_bf16_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(blocks, "branch", lambda x, *_: asked.append(1) or x)
    module, x = block(), noise(2, 5, 32)
    module(x)
    with torch.autocast("cpu", torch.bfloat16):
        module.eval()(x)
        module.train()(x, mask=torch.ones(2, 1, 1, 5, dtype=torch.bool))
        module(x.bfloat16())
        assert not asked
        module(x)
    assert len(asked) == 2, "attention and MLP"
