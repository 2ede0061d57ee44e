"""Compiled blocks against plain ones, and the fallback to plain ones where the compiler is missing or fails."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering

from asit.config import EncoderSettings
from asit.model.blocks import Block
from asit.model.vit import Encoder
from asit.training import compilation


def encoder() -> Encoder:
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2)
    made = Encoder(settings, 32, 32)
    made.init_weights(torch.Generator().manual_seed(0))
    return made


def gradients(made: Encoder, x: Tensor, drop: Tensor) -> list[Tensor]:
    made.zero_grad()
    tokens = made(x, drop)
    # Not the squares, whose sum the last norm fixes: their gradient would be rounding alone.
    pull = torch.randn(tokens.patches.shape, generator=torch.Generator().manual_seed(2)).to(x.device)
    ((tokens.cls[:, None] + tokens.patches) * pull).sum().backward()  # type: ignore[no-untyped-call]
    return [tokens.patches.detach(), *(p.grad.clone() for p in made.parameters() if p.grad is not None)]


def inputs(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drop = (torch.rand(2, 2, rows, generator=generator) > 0.4).float() / 0.6
    return torch.randn(rows, 1, 32, 32, generator=generator), drop


@pytest.mark.slow
def test_compiled_is_eager_within_rounding(caplog: pytest.LogCaptureFixture) -> None:
    """Values and gradients, stochastic depth and both kinds of views; names of parameters stay; a copy is plain."""
    caplog.set_level("INFO", "asit")
    plain, made = encoder(), encoder()
    compilation.compiled(made.blocks)
    assert caplog.messages == ["compile: 2 modules, one by one (torch.compile, inductor)"]
    assert list(made.state_dict()) == list(plain.state_dict())
    for rows in (4, 3):
        x, drop = inputs(rows)
        for ours, expected in zip(gradients(made, x, drop), gradients(plain, x, drop), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, expected in zip(gradients(made, *inputs()), gradients(plain, *inputs()), strict=True):
            assert float((ours - expected).norm() / expected.norm()) < 0.03
    assert len(caplog.messages) == 1
    twin = copy.deepcopy(made)
    assert all(block._compiled_call_impl is None for block in twin.blocks)


@pytest.fixture
def few_and_uncached() -> Iterator[None]:
    """By torch's own patch: after pytest's a setting of torch's is gone."""
    with torch._dynamo.config.patch(recompile_limit=2), inductor.patch(force_disable_caches=True):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("few_and_uncached")
def test_many_shapes_are_all_compiled() -> None:
    """Beyond torch's own limit, here 2, it runs the plain code."""
    torch._dynamo.reset()
    block = Block(8, 1, 8)
    compilation.compiled([block])
    before = counters["stats"]["unique_graphs"]
    for rows in range(2, 6):
        block(torch.ones(rows, 3, 8)).sum().backward()
    assert counters["stats"]["unique_graphs"] - before == 4


@pytest.mark.slow
@pytest.mark.usefixtures("few_and_uncached")
def test_a_compiler_that_fails_at_the_gradient_of_a_later_shape_gives_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The gradient is compiled in the forward pass, where the plain module can still run."""
    caplog.set_level("INFO", "asit")
    torch._dynamo.reset()  # blocks of another test have the same code
    made = encoder()
    compilation.compiled(made.blocks)
    gradients(made, *inputs())
    run = GraphLowering.run

    def failing_backward(self: GraphLowering, *given: Any) -> Any:
        if self.is_backward:
            raise RuntimeError("no such kernel")
        return run(self, *given)

    monkeypatch.setattr(GraphLowering, "run", failing_backward)
    for ours, expected in zip(gradients(made, *inputs(5)), gradients(encoder(), *inputs(5)), strict=True):
        assert torch.equal(ours, expected)
    failed = caplog.messages[-1]  # torch has its own say before it
    assert failed.startswith("compile: off, torch.compile does not work here: ")
    assert "no such kernel" in failed


@pytest.mark.slow
def test_without_a_compiler_it_says_so_and_goes_on(tmp_path: Path) -> None:
    code = """
import torch
from asit import logs
from asit.training import compilation
from asit.model.blocks import Block
block = Block(32, 2, 64)
with logs.console():
    compilation.compiled([block])
    block(torch.ones(1, 3, 32)).sum().backward()
print(block.mlp.fc1.weight.grad is not None)
"""
    env = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1].startswith("warning: compile: off, torch.compile does not work here: ")
    assert "C++ compiler" in done.stderr
    assert done.stdout == "True\n"


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Compiled modules fail when they are called; gives the calls."""
    calls = list[int]()

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    return calls


def test_a_compiler_that_fails_later_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asit")
    calls = failing(monkeypatch, BackendCompilerFailed(lambda: None, RuntimeError("no such target"), None))
    made = encoder()
    compilation.compiled(made.blocks)
    x, drop = inputs()
    for ours, expected in zip(gradients(made, x, drop), gradients(encoder(), x, drop), strict=True):
        assert torch.equal(ours, expected)
    gradients(made, x, drop)
    assert len(calls) == 1
    _, failed = caplog.messages
    assert failed.startswith("compile: off, torch.compile does not work here: ")
    assert "no such target" in failed


def test_a_mistake_in_the_module_is_not_taken_for_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ValueError("of the module"))
    block = nn.Linear(2, 2)
    compilation.compiled([block])
    with pytest.raises(ValueError, match="of the module"):
        block(torch.ones(1, 2))


def test_evaluation_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, ValueError("called"))
    block = nn.Linear(2, 2)
    compilation.compiled([block])
    block.eval()
    block(torch.ones(1, 2))
    assert not calls


@pytest.mark.parametrize(("setting", "device", "expected"), [
    (True, "cpu", True), (False, "cuda", False), ("auto", "cpu", False), ("auto", "cuda", True), ("auto", "mps", False),
])  # fmt: skip
def test_auto_compiles_on_a_gpu(setting: bool | str, device: str, expected: bool) -> None:
    assert compilation.wanted(setting, torch.device(device)) is expected


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    device = torch.device("cuda")
    plain, made = encoder().to(device), encoder().to(device)
    compilation.compiled(made.blocks)
    x, drop = (value.to(device) for value in inputs())
    with torch.autocast("cuda", torch.bfloat16):
        for ours, expected in zip(gradients(made, x, drop), gradients(plain, x, drop), strict=True):
            assert float((ours - expected).norm() / expected.norm()) < 0.03
