"""Faster bfloat16 linear layers and attention on CPUs, with the arithmetic of torch's own.

Torch's gradient of a weight is a product with a transposed matrix, at half the speed of oneDNN's bfloat16 kernels, and
its fused attention's backward pass takes three times as long as plain products. Without gradients torch's attention is
faster (505 tokens of the base encoder: 3.4 against 8.6 ms), and frozen layers cache their weights in bfloat16, since
casting them costs the base encoder 45 ms per call. Used only under CPU autocast to bfloat16; see docs/speed.md.

In training a branch of a block (norm, linear, attention or GELU, linear, sum) is one function with fewer passes over
memory: a column of ones in the norm's output makes the bias a row of the product (alone it costs a quarter of one),
rows dropped by stochastic depth are removed once, and gradients of the residual stream are summed in place. Products
are in bfloat16; residual stream, norms and gradients of weights in float32.

Letters: R rows, r kept rows, N tokens, D width, H hidden or 3 D.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEP = 16
"""Tokens are padded to a multiple of this: products of odd sizes are slow."""
_FILL = 32
"""Columns added for the bias, the block size of the bfloat16 units."""
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: free memory kept at the end of the heap, and mapped allocations."""
_trim: Callable[[int], Any] | None = None
"""glibc's malloc_trim, once `keep_freed_memory` has been called."""


class Stamp:
    """Identity and version of parameters, held by weak references.

    Writes through `.data`, or in place by `Module.to` and the like, are not counted by torch and not seen here; modules
    with a cache drop it in `_apply`.
    """

    __slots__ = ("_facts",)

    def __init__(self, *parameters: Tensor) -> None:
        # An id() may be reused, so the objects are compared.
        self._facts = [(weakref.ref(p), p.data_ptr(), p._version) for p in parameters]

    def holds(self, *parameters: Tensor) -> bool:
        """Whether these are the same parameters, unchanged."""
        return len(parameters) == len(self._facts) and all(
            kept() is p and address == p.data_ptr() and version == p._version
            for p, (kept, address, version) in zip(parameters, self._facts, strict=True)
        )


def can_be_stamped(*parameters: Tensor) -> bool:
    """Whether writes are counted, which they are not for tensors made in inference mode."""
    return not any(p.is_inference() for p in parameters)


def keep_freed_memory() -> str:
    """Make glibc keep freed memory instead of returning it to the system; call before the first step.

    A step on a CPU frees and allocates gigabytes. glibc maps large blocks each time, and the system zeroes their pages
    on first use: a sixth of a fine-tuning step of the base encoder (docs/speed.md). The process keeps about its peak.

    Returns:
        What was done, or why not: another allocator or C library, or environment variables.
    """
    given = [name for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD") if os.environ.get(name)]
    if given:
        return f"memory: set by {given[0]}"
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return "memory: the system's allocator is not glibc's"
    # See glibc's malloc.h: map no block by itself, and never return the heap's end.
    if not (library.mallopt(_MMAP_MAX, 0) and library.mallopt(_TRIM_THRESHOLD, -1)):
        return "memory: glibc refused to keep freed memory"
    global _trim
    _trim = getattr(library, "malloc_trim", None)
    return "memory: freed pages are kept for reuse"


def return_freed_memory() -> None:
    """Return the pages that are free now to the system, if `keep_freed_memory` made glibc keep them.

    Tensors whose sizes differ between steps (masked tokens, crops) leave gaps that fit no later one, and the process
    grows: call this every so many steps. The next step then touches its pages again.
    """
    if _trim is not None:
        _trim(0)


def bf16_on_cpu(x: Tensor) -> bool:
    """Whether CPU autocast computes with `x` in bfloat16."""
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Linear):
    """nn.Linear with a fast bfloat16 gradient on CPUs: (..., in) -> (..., out).

    In evaluation mode a frozen layer caches bfloat16 copies of its parameters. They are renewed after a write to a
    parameter (except through `.data`), and dropped when the layer is moved or set to training mode.
    """

    _low: tuple[Stamp, Tensor, Tensor | None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if bf16_on_cpu(x) and not self.training:
            given = [self.weight] if self.bias is None else [self.weight, self.bias]
            if can_be_stamped(*given) and not any(p.requires_grad for p in given):
                weight, bias = self._lowered(given)
                return F.linear(x.bfloat16(), weight, bias)
        return linear(x, self.weight, self.bias)

    def _lowered(self, given: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        kept = self._low
        if kept is None or not kept[0].holds(*given):
            stamp = Stamp(*given)  # taken first, so that a concurrent write is noticed
            with torch.inference_mode(False), torch.no_grad():  # usable in and out of inference mode
                bias = None if self.bias is None else self.bias.bfloat16()
                # One assignment, for other threads.
                kept = self._low = (stamp, self.weight.bfloat16(), bias)
        return kept[1], kept[2]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._low = None
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._low = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)  # copies and pickles make their own
        state.pop("_low", None)
        return state


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear with a fast bfloat16 gradient on CPUs: (..., in) -> (..., out)."""
    if bf16_on_cpu(x) and torch.is_grad_enabled() and weight.requires_grad:
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def attention(qkv: Tensor) -> Tensor:
    """Return self-attention without a mask: qkv (R, N, 3, H, D / H) bfloat16 -> (R, N, D)."""
    if torch.is_grad_enabled() and qkv.requires_grad:
        out: Tensor = _Attention.apply(qkv)
        return out
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        low, kernel = x.bfloat16(), weight.bfloat16()
        ctx.save_for_backward(low, kernel)
        ctx.dtype = x.dtype
        return F.linear(low, kernel, None if bias is None else bias.bfloat16())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x = (grad @ weight).to(ctx.dtype) if need_x else None
        grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        if need_weight:
            # Transpose the narrower factor in memory, so that the product is of plain matrices.
            grad_weight = torch.empty(weight.shape, dtype=torch.float32)
            if grad.shape[1] > x.shape[1]:
                # Rows of ones make the bias's gradient a row of the product, which costs less than a sum.
                transposed = x.new_ones(x.shape[1] + _STEP, len(x))
                transposed[:-_STEP] = x.t()
                product = transposed @ grad
                grad_weight.copy_(product[:-_STEP].t())
                grad_bias = product[-1]
            else:
                grad_weight.copy_(grad.t().contiguous() @ x)
        if not need_bias:
            return grad_x, grad_weight, None
        return grad_x, grad_weight, (grad.sum(0) if grad_bias is None else grad_bias).float()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        out, parts, weights = attend(qkv)
        ctx.save_for_backward(parts, weights)
        ctx.shape = qkv.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts, weights = ctx.saved_tensors
        return attend_backward(grad, parts, weights, ctx.shape)


def attend(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return attention (R, N, 3, H, d) -> (R, N, H d), with q, k, v (3, R H, N', d) and weights (R H, N', N') for the
    gradient; N' is N padded, and padded keys get no attention."""
    rows, tokens, _, heads, size = qkv.shape
    filled = -(-tokens // _STEP) * _STEP
    parts = qkv.new_empty(3, rows, heads, filled, size)
    parts[:, :, :, :tokens] = qkv.permute(2, 0, 3, 1, 4)
    parts[:, :, :, tokens:] = 0.0
    parts = parts.flatten(1, 2)
    scores = _scaled(parts[0], parts[1].transpose(1, 2), size)
    scores[:, :, tokens:] = -torch.inf
    weights = scores.softmax(-1)
    out = (weights @ parts[2]).view(rows, heads, filled, size)[:, :, :tokens]
    return out.transpose(1, 2).reshape(rows, tokens, heads * size), parts, weights


def attend_backward(grad: Tensor, parts: Tensor, weights: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the gradient of qkv, contiguous, from that of `attend`'s output."""
    rows, tokens, _, heads, size = shape
    q, k, v = parts
    outer = grad.new_empty(rows, heads, q.shape[1], size)
    outer[:, :, :tokens] = grad.view(rows, tokens, heads, size).transpose(1, 2)
    outer[:, :, tokens:] = 0.0
    outer = outer.flatten(0, 1)
    scores = torch._softmax_backward_data(outer @ v.transpose(1, 2), weights, -1, weights.dtype)
    out = grad.new_empty(shape)
    found = _scaled(scores, k, size), _scaled(scores.transpose(1, 2), q, size), weights.transpose(1, 2) @ outer
    for i, part in enumerate(found):
        out[:, :, i] = part.view(rows, heads, -1, size)[:, :, :tokens].transpose(1, 2)
    return out


def _scaled(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Return a @ b / sqrt(size): (n, i, j), (n, j, k) -> (n, i, k)."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=size**-0.5)


def add(x: Tensor, branch: Tensor) -> Tensor:
    """Return x + branch in x's type; on a CPU a cast and a sum take half the time of a mixed sum."""
    if x.device.type == "cpu" and branch.dtype is torch.bfloat16 and x.dtype is torch.float32:
        return branch.float().add_(x)
    return x + branch


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
            middle, parts, weights = attend(hidden.view(*rows.shape[:2], 3, heads, -1))
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
            inner = attend_backward(inner, saved[0], saved[1], shape).view(len(low), -1)
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
