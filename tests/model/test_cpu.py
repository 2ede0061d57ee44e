"""The CPU's bfloat16 layers against torch's own, and against float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.model import cpu


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", [(2, 7, 12, 40), (3, 5, 40, 12), (1, 1, 8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients(shape: tuple[int, int, int, int], bias: bool) -> None:
    rows, tokens, inner, outer = shape
    ours, theirs = cpu.Linear(inner, outer, bias=bias), nn.Linear(inner, outer, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x, grad = noise(rows, tokens, inner).requires_grad_(True), noise(rows, tokens, outer, seed=1)
    y = x.detach().clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(x)
    assert got.dtype == torch.bfloat16
    got.backward(grad.bfloat16())
    want = theirs(y)
    want.backward(grad)
    assert error(got, want) < 0.02
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.dtype == torch.float32
    assert error(x.grad, y.grad) < 0.02
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert a.grad.dtype == torch.float32
        assert a.grad.is_contiguous()
        assert error(a.grad, b.grad) < 0.02
    assert torch.equal(ours(x), theirs(x)), "without autocast it is torch's"


@pytest.mark.parametrize("tokens", [1, 15, 16, 33])
def test_attention_and_its_gradient(tokens: int) -> None:
    qkv = noise(2, tokens, 3, 4, 8).bfloat16().requires_grad_(True)
    plain = qkv.detach().float().requires_grad_(True)
    grad = noise(2, tokens, 32, seed=1)
    out = cpu.attention(qkv)
    out.backward(grad.bfloat16())
    want = F.scaled_dot_product_attention(*plain.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)
    want.backward(grad)
    assert out.shape == (2, tokens, 32)
    assert error(out, want) < 0.02
    assert qkv.grad is not None
    assert plain.grad is not None
    for part, ref in zip(qkv.grad.unbind(2), plain.grad.unbind(2), strict=True):
        assert (part.float() - ref).norm() < 0.03 * plain.grad.norm()
    with torch.no_grad():
        assert torch.equal(cpu.attention(qkv), out)
