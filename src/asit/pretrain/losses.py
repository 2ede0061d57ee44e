"""The three losses of ASiT (arXiv 2211.13189), their centring, and the gauge of collapse.

N rows (class or patch tokens), K prototypes, V views, B clips, R = B * V rows, P patches. The student's row of
prototype logits is s, the teacher's t; p = softmax((t - centre) / teacher temperature) carries no gradient,
q = softmax(s / student temperature), and the loss of a row is H(p, q) = - sum p log q. All sums and exponentials
are float32, whatever the arithmetic of the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _CrossEntropy(torch.autograd.Function):
    """H(p, softmax(s / temperature)) of each row; its gradient (q sum(p) - p) / temperature makes the softmax again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, probs: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(student, probs)
        ctx.temperature = temperature
        log_q = (student.float() / temperature).log_softmax(-1)
        return -log_q.mul_(probs).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, probs = ctx.saved_tensors
        q = (student.float() / ctx.temperature).softmax(-1)
        # The sum is 1 but for rounding, or, in the global loss, the number of teacher views.
        q.mul_(probs.sum(-1, keepdim=True, dtype=torch.float32)).sub_(probs)
        return q.mul_((grads[0] / ctx.temperature).unsqueeze(-1)).to(student.dtype), None, None


def cross_entropy(student_logits: Tensor, teacher_probs: Tensor, temperature: float) -> Tensor:
    """H(p, q) = - sum p log softmax(s / temperature) of each row, in nats.

    Args:
        student_logits: (N, K), any floating type; the gradient has the same type.
        teacher_probs: (N, K), not differentiated; rows may sum to any number.
        temperature: the student's.

    Returns:
        (N,) float32.
    """
    loss: Tensor = _CrossEntropy.apply(student_logits, teacher_probs.detach(), temperature)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def teacher_distribution(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """softmax((logits - centre) / temperature), computed in float32, without gradient.

    Args:
        logits: (..., K).
        centre: (K,) float32.
        temperature: the teacher's at this step.

    Returns:
        (..., K) float32.
    """
    return (logits.float() - centre).div_(temperature).softmax(-1)


class Centre(nn.Module):
    """EMA of the teacher's mean logits over the global batch; centring by it keeps all prototypes in use.

    The official code updates its centre within the loss. Here logits are collected through all micro-batches
    of a step and the centre moves once, after the optimiser's step, so accumulation changes nothing.

    Attributes:
        value: (K,) float32, subtracted from teacher logits.
    """

    value: Tensor

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(prototypes))
        self._pending: Tensor | None = None

    @torch.no_grad()
    def collect(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Add the teacher's logits (..., K) of one micro-batch to those of this step.

        Args:
            x: the logits, or (N, D), of which the last layer makes them.
            weight: (K, D) of that layer; the logits x weight' are not computed, since their sum is weight sum(x).
        """
        flat = x.reshape(-1, x.shape[-1])
        total = flat.sum(0, dtype=torch.float32)
        total = total if weight is None else weight.float() @ total
        found = torch.cat([total, self.value.new_full((1,), len(flat))])
        self._pending = found if self._pending is None else self._pending + found

    def taken(self) -> Tensor:
        """Return sums and count of the collected logits (K + 1,), and reset them."""
        pending, self._pending = self._pending, None
        return self.value.new_zeros(len(self.value) + 1) if pending is None else pending


@torch.no_grad()
def update_centres(
    centres: Sequence[Centre], momentum: float, world_reduce: Callable[[Tensor], None] = lambda x: None
) -> None:
    """Set each centre to momentum * value + (1 - momentum) * mean of its collected logits (EMA), and reset these.

    Args:
        centres: those that have collected nothing, in any process, do not change.
        momentum: share of the old value.
        world_reduce: sums a float32 tensor over all processes in place; every process must call this.
    """
    sums = [centre.taken() for centre in centres]
    together = torch.cat(sums)
    world_reduce(together)
    for centre, found in zip(centres, together.split([len(x) for x in sums]), strict=True):
        total, count = found[:-1], found[-1]
        moved = centre.value * momentum + total / count.clamp(min=1) * (1 - momentum)
        centre.value.copy_(torch.where(count > 0, moved, centre.value))


@torch.no_grad()
def entropy(probs: Tensor) -> Tensor:
    """Return the entropy of distributions (..., K) in nats, (...) float32. 0: one prototype; log K: uniform."""
    return torch.special.entr(probs.float()).sum(-1)


def global_loss(
    student_logits: Tensor | Sequence[Tensor], teacher_probs: Tensor, temperature: float, copies: int = 1
) -> Tensor:
    """Return the mean of H(teacher view i, student view j) over clips and over all pairs with i != j.

    v1: 2 pairs (two views each); v2: 10 (2 teacher views, 6 student views). Of several masked copies of the views
    each is paired with the teacher's other views.

    Args:
        student_logits: class-token logits (V_s, B, K), or a sequence of V_s tensors (B, K); the teacher's views
            come first, in the same order, as many times as there are copies.
        teacher_probs: (V_t, B, K).
        temperature: the student's.
        copies: of the teacher's views among the student's.
    """
    students = len(student_logits)
    teachers, clips = teacher_probs.shape[:2]
    pairs = students * teachers - min(students, copies * teachers)
    if pairs == 0:
        raise ValueError("the global loss needs two different views of a clip")
    everyone = teacher_probs.sum(0, dtype=torch.float32)
    total = everyone.new_zeros(())
    for j, logits in enumerate(student_logits):
        # H is linear in p: one pass over the student's logits serves all teacher views but its own.
        target = everyone if j >= copies * teachers else everyone - teacher_probs[j % teachers]
        total = total + cross_entropy(logits, target, temperature).sum()
    return total / (pairs * clips)


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """Return the reconstruction loss: sum of |prediction - target| where the mask is set, over `count`.

    Args:
        prediction: any shape, any floating type; the sum is float32.
        target: of the same shape.
        mask: bool, of the same shape; what is outside, NaN too, reaches neither loss nor gradient.
        count: masked values of all processes, as in `chunked_loss.local_loss`; 0: the loss is 0.
    """
    # Filled, not multiplied by the mask: NaN times 0 is NaN.
    total = (prediction.float() - target.float()).masked_fill(~mask, 0.0).abs().sum()
    # The count is not read from the device.
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), total * 0.0)
