"""The CPU's bfloat16 layers against torch's own, and against float32."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.model.cpu import bf16

from .conftest import noise  # type: ignore[import-not-found]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("shape", [(2, 7, 12, 40), (3, 5, 40, 12), (1, 1, 8, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients(shape: tuple[int, int, int, int], bias: bool) -> None:
    rows, tokens, inner, outer = shape
    ours, theirs = bf16.Linear(inner, outer, bias=bias), nn.Linear(inner, outer, bias=bias)
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
    out = bf16.attention(qkv)
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
        assert error(bf16.attention(qkv), want) < 0.02, "without a gradient it is torch's fused one"


@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_layer_keeps_its_weights_in_bf16_until_they_change(bias: bool) -> None:
    layer, x = bf16.Linear(24, 8, bias=bias).eval().requires_grad_(False), noise(2, 5, 24)

    def low() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            out: Tensor = layer(x)
        return out

    def plain() -> Tensor:
        return F.linear(x.bfloat16(), layer.weight.bfloat16(), None if layer.bias is None else layer.bias.bfloat16())

    assert torch.equal(low(), plain())
    kept = layer._low
    assert torch.equal(low(), plain())
    assert layer._low is kept is not None, "they were cast once"
    with torch.inference_mode():
        low()
    assert layer._low is kept
    for change in (
        lambda: layer.weight.mul_(2.0),
        lambda: torch._foreach_lerp_(list(layer.parameters()), [torch.ones_like(p) for p in layer.parameters()], 0.5),
        lambda: layer.load_state_dict(bf16.Linear(24, 8, bias=bias).state_dict()),
        lambda: setattr(layer, "weight", nn.Parameter(noise(8, 24, seed=3), requires_grad=False)),
    ):
        before = low()
        with torch.no_grad():
            change()
        assert torch.equal(low(), plain())
        assert not torch.equal(low(), before)
    layer.to(torch.float64).to(torch.float32)
    assert torch.equal(low(), plain())
    assert "_low" not in copy.deepcopy(layer).__dict__
    assert "_low" not in pickle.loads(pickle.dumps(layer)).__dict__
    x.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert x.grad is not None, "a gradient goes through it"


def test_a_layer_in_training_keeps_nothing() -> None:
    for layer in (bf16.Linear(24, 8).eval(), bf16.Linear(24, 8).requires_grad_(False)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(noise(3, 24))
        assert layer._low is None
    layer = bf16.Linear(24, 8).eval().requires_grad_(False)
    for put in (layer.train, lambda: layer.to("cpu")):
        layer.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            layer(noise(3, 24))
        assert layer._low is not None
        put()
        assert layer._low is None, "no memory is held for what is not used"
    layer.eval().bias.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        layer(noise(3, 24)).sum().backward()
    assert layer.bias.grad is not None, "a frozen weight does not freeze the bias"


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_that_come_and_go_at_the_same_place(bias: bool) -> None:
    layer, x = bf16.Linear(24, 8, bias=bias).eval().requires_grad_(False), noise(2, 5, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for seed in range(20):  # a new parameter often gets the number and the memory of one that is gone
            layer.weight = None
            layer.weight = nn.Parameter(noise(8, 24, seed=seed), requires_grad=False)
            want = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16() if bias else None)
            assert torch.equal(layer(x), want)
        with torch.inference_mode():
            layer.weight.mul_(2.0)
        assert not torch.equal(layer(x), want), "a write in inference mode counts"
        with torch.inference_mode():
            layer.weight = nn.Parameter(noise(8, 24, seed=1), requires_grad=False)
        before = layer(x)
        with torch.inference_mode():
            layer.weight.mul_(2.0)
        assert not torch.equal(layer(x), before), "writes to what was made in inference mode are not counted"


FAULTS = """
import resource, torch
from asit.model.cpu import bf16
def faults():
    for _ in range(8):  # until the heap has found its size
        work()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def work():
    return [torch.ones(12_000_000) for _ in range(3)]
print(faults(), bf16.keep_freed_memory(), faults(), sep="\\n")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_freed_memory_is_kept() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    before, printed, after = done.stdout.splitlines()
    pages = 4 * 3 * 48_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert int(before) > pages // 600, "huge pages may be on: then a fault fetches 512 pages"
    assert "kept" in printed
    assert int(after) < pages // 1000


def test_memory_is_left_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    monkeypatch.setattr(bf16.ctypes, "CDLL", lambda _: pytest.fail("the C library is asked"))
    assert "set by MALLOC_MMAP_MAX_" in bf16.keep_freed_memory()
