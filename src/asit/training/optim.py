"""Schedules as pure functions of the step, AdamW and its parameter groups, gradient clipping, optimiser state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from asit.errors import CheckpointError
from asit.training import distributed


def cosine(start: float, end: float, at: float) -> float:
    """Return half a cosine from `start` (at = 0) to `end` (at = 1), constant outside."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(at, 0.0), 1.0)))


def linear(start: float, end: float, at: float) -> float:
    """Return a straight line from `start` (at = 0) to `end` (at = 1), constant outside."""
    return start + (end - start) * min(max(at, 0.0), 1.0)


Schedule = Literal["cosine", "linear", "wsd"]
COOLDOWN = 0.2
"""Share of a wsd run, after its warm-up, in which the rate falls (arXiv 2405.18392: does as well as a cosine)."""


def warmup_then(shape: Schedule, peak: float, end: float, step: int, warmup: int, total: int) -> float:
    """Learning rate at a step: linear from 0 to `peak` over `warmup` steps, then down to `end`.

    As in DINO's and ASiT's schedule, step 0 has a rate of 0 where there is a warm-up, and the last step, total - 1,
    is one short of `end`.

    Args:
        shape: half a cosine (DINO, ASiT); a straight line; or wsd (warm-up, stable, decay): `peak` is held and left in
            the last fifth, by one minus a square root (arXiv 2405.18392).
        peak: the rate after the warm-up.
        end: the rate that step `total` would have.
        step: from 0 on.
        warmup: steps.
        total: steps.
    """
    if step < warmup:
        # linspace(0, peak, warmup): the last warm-up step is at the peak.
        return peak * step / max(1, warmup - 1)
    at = (step - warmup) / max(1, total - warmup)
    if shape == "cosine":
        return cosine(peak, end, at)
    if shape == "linear":
        return linear(peak, end, at)
    fallen = min(max((at - 1.0 + COOLDOWN) / COOLDOWN, 0.0), 1.0)
    return end + (peak - end) * (1.0 - math.sqrt(fallen))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not to biases and one-dimensional parameters (DINO, ASiT)."""
    return parameter.ndim > 1 and not name.endswith("bias")


def adamw(
    named: Iterable[tuple[str, nn.Parameter]],
    betas: tuple[float, float],
    scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """Return AdamW over groups of one learning-rate factor each, with and without weight decay.

    Together the groups hold each trainable parameter once.

    Args:
        named: parameters by name.
        betas: of AdamW.
        scale: a parameter's learning rate over the run's, by its name.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            key = (scale(name), decays(name, parameter))
            group = groups.setdefault(key, {"params": [], "names": [], "scale": key[0], "decays": key[1]})
            group["params"].append(parameter)
            group["names"].append(name)
    # Sorted, so that the order of groups does not depend on that of parameters.
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    fused = ordered[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(ordered, lr=0.0, betas=betas, weight_decay=0.0, fused=fused)


def set_rates(optimiser: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate, times its factor, on all groups and the weight decay on those that have one."""
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


EMBEDDINGS = ("cls_token", "dist_token", "pos_embed", "patch_embed", "pos_conv", "relative_bias")
"""Parts of an encoder below its first block."""


def layer_scales(names: Iterable[str], depth: int, decay: float, head: float = 1.0) -> dict[str, float]:
    """Return the learning-rate factor of each parameter of a classifier (layer decay), by name.

    The head has `head`, the final norm and the last block 1, each block below `decay` times the one above it, and
    the patch, position and class embeddings `decay` times the first block (BEiT, arXiv 2106.08254; AudioMAE).

    Args:
        names: "head.*", "encoder.blocks.N.*", "encoder.norm.*" and the embeddings, which are "encoder.*" too.
        depth: blocks of the encoder.

    Raises:
        ValueError: a name of another kind.
    """
    out = {}
    for name in names:
        part = name.split(".")
        if part[0] == "head":
            out[name] = head
        elif part[:2] == ["encoder", "blocks"]:
            out[name] = decay ** (depth - 1 - int(part[2]))
        elif part[:2] == ["encoder", "norm"]:
            out[name] = 1.0
        elif part[0] == "encoder" and part[1] in EMBEDDINGS:
            out[name] = decay**depth
        else:
            raise ValueError(f"no layer is known for the parameter {name}")
    return out


def stepped(start: float, at: float, first: float, every: float, factor: float) -> float:
    """`start` until `first`; from there on multiplied by `factor`, and once more each `every` (AST's schedules)."""
    # Epochs are fractions: rounding must not miss a step of the schedule.
    steps = math.floor((at - first) / every + 1e-9) + 1
    return start * factor ** max(0, steps)


def clip(gradients: Sequence[Tensor], limit: float, per_parameter: bool) -> Tensor:
    """Scale gradients in place so that their norm is at most `limit`; gives the norm of them all before.

    Args:
        gradients: any number of tensors; where they are sharded, their norms are those of the complete tensors.
        limit: largest norm; 0: nothing is changed.
        per_parameter: limit each tensor's norm by itself (v1, v2) instead of the norm of all together.

    Returns:
        () float32, on the gradients' device; not finite if any gradient is not.
    """
    local = distributed.own(gradients)
    norms = torch.stack(torch._foreach_norm(local))
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        # A process may have no row of a small tensor: its norm is 0.
        squares = norms.float().square()
        dist.all_reduce(squares)
        norms = squares.sqrt()
    total = torch.linalg.vector_norm(norms)
    if limit > 0:
        factors = (limit / ((norms if per_parameter else total.expand(len(norms))) + 1e-6)).clamp(max=1.0)
        # Multiplying by one is exact, so only what is over the limit changes; on a CPU that is known for free.
        if local[0].device.type == "cpu":
            for gradient, factor in zip(local, factors.tolist(), strict=True):
                if factor < 1.0:
                    gradient.mul_(factor)
        else:
            torch._foreach_mul_(local, list(factors.unbind()))
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
    """Load what `optimiser_tensors` returned; a parameter without state keeps none, as before its first step.

    Raises:
        CheckpointError: state of parameters that do not exist, or tensors of a parameter that are missing, unknown, of
            another shape or type, or not finite.
    """
    by_name: dict[str, dict[str, Any]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        by_name.setdefault(name, {})[field] = value
    for group in optimiser.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in by_name:
                _check_moments(name, parameter, by_name[name])
                # The step counter of a fused optimiser lives with its parameter, of others on the CPU.
                optimiser.state[parameter] = {
                    field: value.to("cpu" if field == "step" and not group["fused"] else parameter.device, copy=True)
                    for field, value in by_name.pop(name).items()
                }
    if by_name:
        names = ", ".join(sorted(by_name)[:3])
        raise CheckpointError(
            f"the checkpoint has an optimiser's state for parameters that are not here: {names}",
            "state of the parameters that are trained",
            "resume from an older checkpoint: remove this one's folder and resume again",
        )


def _check_moments(name: str, parameter: Tensor, held: Mapping[str, Tensor]) -> None:
    shapes = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
    wrong = sorted(held.keys() - shapes.keys())
    for field, shape in shapes.items():
        value = held.get(field)
        if (
            value is None
            or value.dtype != torch.float32
            or tuple(value.shape) != shape
            or not value.isfinite().all()
            or (field != "exp_avg" and (value < 0).any())
        ):
            wrong.append(field)
    if wrong:
        raise CheckpointError(
            f"the checkpoint's AdamW state of {name} is not that of this parameter: {', '.join(wrong)}",
            f"finite step, exp_avg and exp_avg_sq in float32, the last two of shape {tuple(parameter.shape)}",
            "resume from an older checkpoint: remove this one's folder and resume again",
        )
