"""Schedules as pure functions of the step, parameter groups that are a partition, clipping without host syncs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def cosine(start: float, end: float, at: float) -> float:
    """Half a cosine from `start` (at = 0) to `end` (at = 1); held outside."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(at, 0.0), 1.0)))


def linear(start: float, end: float, at: float) -> float:
    """A straight line from `start` (at = 0) to `end` (at = 1); held outside."""
    return start + (end - start) * min(max(at, 0.0), 1.0)


def warmup_cosine(peak: float, end: float, step: int, warmup: int, total: int) -> float:
    """Learning rate at a step: linear from 0 to `peak` over `warmup` steps, then half a cosine to `end`.

    As in DINO's and ASiT's schedule, step 0 has a rate of 0 where there is a warm-up, and the last step, total - 1,
    is one short of `end`.
    """
    if step < warmup:
        # linspace(0, peak, warmup): the last warm-up step is at the peak.
        return peak * step / max(1, warmup - 1)
    return cosine(peak, end, (step - warmup) / max(1, total - warmup))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases and one-dimensional parameters (DINO, ASiT)."""
    return parameter.ndim > 1 and not name.endswith("bias")


def adamw(named: Iterable[tuple[str, nn.Parameter]], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over two groups, with and without weight decay; together they hold each trainable parameter once."""
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trainable if decays(n, p)], "names": [n for n, p in trainable if decays(n, p)]},
        {
            "params": [p for n, p in trainable if not decays(n, p)],
            "names": [n for n, p in trainable if not decays(n, p)],
            "weight_decay": 0.0,
        },
    ]
    fused = trainable[0][1].device.type in ("cpu", "cuda")
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=fused)


def set_rates(optimiser: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate on all groups and its weight decay on those that have one."""
    for group in optimiser.param_groups:
        group["lr"] = lr
        if group["weight_decay"] != 0.0 or any(
            decays(n, p) for n, p in zip(group["names"], group["params"], strict=True)
        ):
            group["weight_decay"] = weight_decay


def clip(gradients: Sequence[Tensor], limit: float, per_parameter: bool) -> Tensor:
    """Scale gradients in place so that their norm is at most `limit`; gives the norm of them all before.

    Args:
        gradients: any number of tensors.
        limit: largest norm; 0: nothing is changed.
        per_parameter: limit each tensor's norm by itself (v1, v2) instead of the norm of all together.

    Returns:
        () float32, on the gradients' device; not finite if any gradient is not.
    """
    norms = torch.stack(torch._foreach_norm(list(gradients)))
    total = torch.linalg.vector_norm(norms)
    if limit > 0:
        factors = (limit / ((norms if per_parameter else total.expand(len(norms))) + 1e-6)).clamp(max=1.0)
        # Multiplying by one is exact, so only what is over the limit changes; on a CPU that is known for free.
        if gradients[0].device.type == "cpu":
            over = [(g, f) for g, f in zip(gradients, factors.tolist(), strict=True) if f < 1.0]
            for gradient, factor in over:
                gradient.mul_(factor)
        else:
            torch._foreach_mul_(list(gradients), list(factors.unbind()))
    return total


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name: "NAME/exp_avg" and so on."""
    out: dict[str, Tensor] = {}
    for group in optimiser.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimiser.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return out


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave; a parameter without state keeps none, as before its first step."""
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        by_name.setdefault(name, {})[field] = value
    for group in optimiser.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in by_name:
                # The step counter of a fused optimiser lives with its parameter, of others on the CPU.
                optimiser.state[parameter] = {
                    field: value.to("cpu" if field == "step" and not group["fused"] else parameter.device, copy=True)
                    for field, value in by_name.pop(name).items()
                }
    if by_name:
        raise ValueError(f"state for parameters that are not here: {sorted(by_name)[:3]}")
