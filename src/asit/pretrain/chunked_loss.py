"""The local loss from the projections: logits, softmax and gradient of some rows at a time, never all logits at once.

N student rows, n teacher rows, K prototypes, D the bottleneck's width. The plain form holds the logits of both networks
(N, K), the teacher's distribution in float32 and the gradient of the logits: with 8192 prototypes and 592 patches a
clip 48 MB a clip in bfloat16 arithmetic. Here the gradient with respect to the projections and to the last layer's
weight is made in the forward pass, as fused linear cross-entropy kernels do (for instance arXiv 2411.09009), and the
backward pass only scales it: arrays of (N, D) and (K, D) are all that stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CPU_CHUNK = 1 << 22
_GPU_CHUNK = 1 << 26
"""Logits of a network at once, 512 rows of 8192 on a CPU: large enough for the products."""
_CPU_CACHE = 1 << 18
"""Of them what is worked on in float32 at once on a CPU: it stays in the cache."""


class Projected(NamedTuple):
    """Tokens before the last layer, and that layer."""

    z: Tensor
    """(N, D), of unit length."""
    weight: Tensor
    """(K, D)."""


def local_loss(
    student: Projected,
    teacher: Projected,
    centre: Tensor,
    temperatures: tuple[float, float],
    *,
    dtype: torch.dtype,
    counted: tuple[Tensor, Tensor] | None = None,
    measure: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mean of H(teacher, student) over patch tokens at the same position of the same view; logits are z weight'.

    Args:
        student: (N, D), with gradient; N may be several times n: copies of the teacher's rows, one after the other.
        teacher: (n, D), without gradient.
        centre: (K,) float32, taken off the teacher's logits.
        temperatures: the student's and the teacher's.
        dtype: of the products' factors and results; softmax and sums are float32. Call it outside of autocast.
        counted: (N,) bool, rows that count (`masking.token_mask`), and the number that the sum is divided by. Processes
            with different numbers give the same gradient as one process when each passes the all-process number over
            the number of processes. 0 gives a loss of 0. None: all rows.
        measure: whether the teacher's mean entropy is wanted.

    Returns:
        The loss, and the mean entropy of the teacher's rows in nats (0 where it is not wanted); float32 scalars.
    """
    wide = torch.promote_types(student.z.dtype, torch.float32)
    if counted is None:
        share = student.z.new_full((len(student.z),), 1.0 / len(student.z), dtype=wide)
    else:
        rows, number = counted
        share = rows.to(wide) / torch.where(number > 0, number, 1)
    taught = Projected(*(x.detach() for x in teacher))
    loss, spread = _Fused.apply(*student, taught, centre, temperatures, share, (dtype, measure))  # type: ignore[no-untyped-call]
    return loss, spread


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        teacher: Projected,
        centre: Tensor,
        temperatures: tuple[float, float],
        share: Tensor,
        how: tuple[torch.dtype, bool],
    ) -> tuple[Tensor, Tensor]:
        dtype, measure = how
        device, wide = z.device.type, share.dtype
        cold, warm = temperatures
        low, kernel, columns = z.detach().to(dtype), weight.detach().to(dtype), teacher.weight.to(dtype).t()
        mine = kernel.t()
        turned = low.t().contiguous() if device == "cpu" else low.t()
        loss, spread = share.new_zeros(()), share.new_zeros(())
        grad_z = torch.empty(z.shape, dtype=wide, device=z.device)
        grad_weight = torch.zeros(weight.shape[::-1], dtype=wide, device=z.device)
        chunk = max(1, (_CPU_CHUNK if device == "cpu" else _GPU_CHUNK) // len(weight))
        given = len(teacher.z)
        fine = max(1, (_CPU_CACHE if device == "cpu" else _GPU_CHUNK) // len(weight))
        for first in range(0, given, chunk):
            taught = teacher.z[first : first + chunk].to(dtype) @ columns
            ours = [slice(start, start + len(taught)) for start in range(first, len(z), given)]
            seen = [low[rows] @ mine for rows in ours]
            for at in range(0, len(taught), fine):
                p = taught[at : at + fine].to(wide).sub_(centre).div_(warm).softmax(-1)
                if measure:
                    spread += torch.special.entr(p).sum()
                for rows, logits in zip(ours, seen, strict=True):
                    log_q = logits[at : at + fine].to(wide).div_(cold).log_softmax(-1)
                    weights = share[rows][at : at + fine]
                    loss -= torch.linalg.vecdot(p, log_q) @ weights
                    # dH/ds = (q - p) / temperature, as p sums to 1; it replaces the logits.
                    logits[at : at + fine] = log_q.exp_().sub_(p).mul_((weights / cold)[:, None])
            for rows, slope in zip(ours, seen, strict=True):
                grad_z[rows] = slope @ kernel
                # The narrow factor is the one that is turned: products of a turned wide one are slow on a CPU.
                grad_weight += turned[:, rows] @ slope
        ctx.save_for_backward(grad_z, grad_weight)
        ctx.types = z.dtype, weight.dtype
        spread /= given
        ctx.mark_non_differentiable(spread)
        return loss, spread

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_z, grad_weight = ctx.saved_tensors
        grad = grads[0]
        wide = grad_weight.t().contiguous().mul_(grad)
        return (grad_z * grad).to(ctx.types[0]), wide.to(ctx.types[1]), *(None,) * 5
