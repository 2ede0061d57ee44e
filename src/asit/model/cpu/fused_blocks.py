"""Fused branches of a block on a CPU in bfloat16: norm, linear, attention or GELU, linear and sum in one function.

The arithmetic equals that of the layers in `asit.model.blocks`: products in bfloat16; residual stream, norms and
gradients of weights in float32. It makes fewer passes over memory: a column of ones in the norm's output makes the bias
a row of the product (alone it costs a quarter of one), rows dropped by stochastic depth are removed once, and gradients
of the residual stream are summed in place. See docs/speed.md.

Letters: R rows, r kept rows, N tokens, D width, H hidden or 3 D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from asit.model.cpu import bf16

_FILL = 32
"""Columns added for the bias, the block size of the bfloat16 units."""


def branch(
    x: Tensor,
    norm: tuple[Tensor, Tensor, float],
    inner: tuple[Tensor, Tensor],
    outer: tuple[Tensor, Tensor],
    heads: int,
    kept: Tensor | None,
    factors: Tensor | None,
) -> Tensor:
    """Return x + factors * outer(middle(inner(norm(x)))).

    Args:
        x: (R, N, D) float32, the residual stream.
        norm: weight, bias and epsilon.
        inner: weight (H, D) and bias of the first linear layer.
        outer: weight (D, .) and bias of the second.
        heads: of self-attention between them; 0: GELU.
        kept: (r,) rows to compute the branch for; None: all.
        factors: (r,) of the branch's rows; None: 1.
    """
    out: Tensor = _Branch.apply(x, kept, factors, (heads, norm[2]), *norm[:2], *inner, *outer)
    return out


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        factors: Tensor | None,
        options: tuple[int, float],
        *parameters: Tensor,
    ) -> Tensor:
        """Parameters are scale and shift of the norm, then weight and bias of the inner and of the outer layer."""
        heads, eps = options
        scale, shift, weight_in, bias_in, weight_out, bias_out = parameters
        width = x.shape[-1]
        rows = x if kept is None else x.index_select(0, kept)
        normed, mean, deviation = torch.native_layer_norm(rows, (width,), scale, shift, eps)
        low = _widened(normed.view(-1, width))
        low[:, width] = 1.0
        into, out_of = _widened(weight_in), weight_out.bfloat16()
        into[:, width] = bias_in
        hidden = low @ into.t()
        if heads:
            middle, parts, weights = bf16.attend(hidden.view(*rows.shape[:2], 3, heads, -1))
            middle, saved = middle.reshape(-1, width), [parts, weights]  # with one head it may be a view
        else:
            middle = F.gelu(hidden)
            saved = [hidden]
        made = F.linear(middle, out_of, bias_out.bfloat16()).float().view(rows.shape)
        if factors is not None:
            made.mul_(factors[:, None, None])
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, kept, factors, scale, shift, mean, deviation, low, into, middle, out_of, *saved)
            ctx.heads = heads
        return made.add_(x) if kept is None else x.index_add(0, kept, made)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, kept, factors, scale, shift, mean, deviation, low, into, middle, out_of, *saved = ctx.saved_tensors
        width, need = rows.shape[-1], ctx.needs_input_grad
        part = grad if kept is None else grad.index_select(0, kept)
        if factors is not None:
            part = part * factors[:, None, None]
        last = part.bfloat16().reshape(-1, width)
        found: list[Tensor | None] = [None] * len(need)
        if need[9]:
            found[9] = last.sum(0).float()
        if need[8]:
            # Transposed in memory: a product with a transposed matrix runs at half its speed.
            found[8] = (last.t().contiguous() @ middle).float()
        inner = last @ out_of
        if ctx.heads:
            shape = (*rows.shape[:2], 3, ctx.heads, width // ctx.heads)
            inner = bf16.attend_backward(inner, saved[0], saved[1], shape).view(len(low), -1)
        else:
            inner = torch.ops.aten.gelu_backward(inner, saved[0])
        if need[6] or need[7]:
            product = low.t().contiguous() @ inner
            found[6] = torch.empty(into.shape[0], width).copy_(product[:width].t())
            found[7] = product[width].float()
        if need[0] or need[4] or need[5]:
            normed = (inner @ into[:, :width]).float().view(rows.shape)
            back, found[4], found[5] = torch.ops.aten.native_layer_norm_backward(
                normed, rows, [width], mean, deviation, scale, shift, [need[0], need[4], need[5]]
            )
            if need[0]:
                found[0] = back.add_(grad) if kept is None else grad.index_add(0, kept, back)
        return tuple(found)


def _widened(x: Tensor) -> Tensor:
    """Return (n, D) float32 as (n, D + 32) bfloat16, with zeros in the added columns."""
    out = x.new_empty(len(x), x.shape[1] + _FILL, dtype=torch.bfloat16)
    out[:, : x.shape[1]] = x
    out[:, x.shape[1] :] = 0.0
    return out
