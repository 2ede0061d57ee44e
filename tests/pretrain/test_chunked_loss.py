"""The chunked local loss equals the plain one, in value and gradient, for any chunk size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from asit.pretrain import chunked_loss, losses
from asit.pretrain.chunked_loss import Projected

ROWS, WIDE, PROTOTYPES = 23, 8, 31
TEMPERATURES = (0.1, 0.05)


@pytest.fixture(params=["whole", "chunks", "fine"], autouse=True)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once; five at a time; five at a time of which two are worked on at once."""
    if request.param != "whole":
        monkeypatch.setattr(chunked_loss, "_CPU_CHUNK", 5 * PROTOTYPES)
        monkeypatch.setattr(chunked_loss, "_CPU_CACHE", (5 if request.param == "chunks" else 2) * PROTOTYPES)


def given(dtype: torch.dtype, copies: int = 1) -> tuple[Projected, Projected, Tensor]:
    g = torch.Generator().manual_seed(3)

    def draw(*size: int) -> Tensor:
        return F.normalize(torch.randn(*size, generator=g, dtype=torch.float64), dim=-1).to(dtype)

    student = Projected(draw(copies * ROWS, WIDE).requires_grad_(), draw(PROTOTYPES, WIDE).requires_grad_())
    return student, Projected(draw(ROWS, WIDE), draw(PROTOTYPES, WIDE)), draw(1, PROTOTYPES)[0]


def plain(
    student: Projected, teacher: Projected, centre: Tensor, counted: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The oracle: logits whole."""
    p = ((teacher.z @ teacher.weight.T - centre) / TEMPERATURES[1]).softmax(-1)
    copies = len(student.z) // len(p)
    log_q = (student.z @ student.weight.T / TEMPERATURES[0]).log_softmax(-1)
    each = -(p.repeat(copies, 1) * log_q).sum(-1)
    loss = each.mean() if counted is None else (each * counted[0]).sum() / counted[1].clamp(min=1e-9)
    return loss, torch.special.entr(p).sum(-1).mean()


def gradients(loss: Tensor, of: Projected) -> list[Tensor]:
    return list(torch.autograd.grad(loss * 1.7, list(of)))


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient_are_the_plain_ones_in_float64(masked: bool, copies: int) -> None:
    student, teacher, centre = given(torch.float64, copies)
    counted = None
    if masked:
        rows = torch.rand(copies * ROWS, generator=torch.Generator().manual_seed(5)) < 0.4
        counted = rows, rows.sum() * 0.8
    loss, entropy = chunked_loss.local_loss(
        student, teacher, centre, TEMPERATURES, dtype=torch.float64, counted=counted, measure=True
    )
    want, want_entropy = plain(student, teacher, centre, counted)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=0)
    for found, wanted in zip(gradients(loss, student), gradients(want, student), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision_costs_its_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, centre = given(torch.float32)
    loss, _ = chunked_loss.local_loss(student, teacher, centre, TEMPERATURES, dtype=dtype)
    exact = Projected(*(x.detach().double().requires_grad_() for x in student))
    want, _ = plain(exact, Projected(*(x.double() for x in teacher)), centre.double())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), rel=tolerance)
    for found, wanted in zip(gradients(loss, student), gradients(want, exact), strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - wanted).norm() <= tolerance * wanted.norm()


def test_no_row_that_counts_costs_nothing() -> None:
    student, teacher, centre = given(torch.float32)
    none = torch.zeros(ROWS, dtype=torch.bool), torch.zeros(())
    loss, _ = chunked_loss.local_loss(student, teacher, centre, TEMPERATURES, dtype=torch.float32, counted=none)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(loss, student))


def test_two_processes_with_their_own_counts_are_one() -> None:
    student, teacher, centre = given(torch.float64)
    rows = torch.rand(ROWS, generator=torch.Generator().manual_seed(6)) < 0.5
    whole, _ = plain(student, teacher, centre, (rows, rows.sum()))
    count = rows.sum() / 2
    parts = [
        chunked_loss.local_loss(
            Projected(student.z[part], student.weight),
            Projected(teacher.z[part], teacher.weight),
            centre,
            TEMPERATURES,
            dtype=torch.float64,
            counted=(rows[part], count),
        )[0]
        for part in (slice(0, 9), slice(9, None))
    ]
    assert (sum(parts) / 2).item() == pytest.approx(whole.item(), rel=1e-12)  # type: ignore[union-attr]


class _Largest(TorchDispatchMode):
    """The most values of any one result that is as wide as the prototypes."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == PROTOTYPES:
            self.rows = max(self.rows, out.shape[0])
        return out


def test_logits_are_never_whole(request: pytest.FixtureRequest) -> None:
    student, teacher, centre = given(torch.float32)
    with _Largest() as seen:
        loss, _ = chunked_loss.local_loss(student, teacher, centre, TEMPERATURES, dtype=torch.float32)
        loss.backward()
    # Five rows at a time, and (WIDE, PROTOTYPES) is the gradient of the weight.
    assert seen.rows == (ROWS if "[whole]" in request.node.name else max(5, WIDE))


def test_the_centre_needs_no_logits() -> None:
    _, teacher, start = given(torch.float32)
    one, other = losses.Centre(PROTOTYPES), losses.Centre(PROTOTYPES)
    for centre in (one, other):
        centre.value.copy_(start)
    for rows in (slice(0, 10), slice(10, None)):
        one.collect(teacher.z[rows] @ teacher.weight.T)
        other.collect(teacher.z[rows], teacher.weight)
    losses.update_centres([one], 0.9)
    losses.update_centres([other], 0.9)
    assert not torch.equal(one.value, start)
    torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=1e-7)
