"""What the training loop asks of a method, and what methods share: work over processes, and state in checkpoints."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from asit.io.checkpoint import load_strict
from asit.runtime import Precision, World
from asit.training import distributed


@dataclass(frozen=True)
class Now:
    """The state of a run that schedules and gauges may depend on."""

    step: int
    total: int
    steps_per_epoch: int
    measure: bool = False
    """Whether gauges are wanted at this step."""

    @property
    def epoch(self) -> float:
        """Epochs done, with the fraction of the present one."""
        return self.step / self.steps_per_epoch


@dataclass
class StepOutput:
    """The loss, and by name its parts and the gauges."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Rates:
    """The schedules at one step; `others` are kept in the records."""

    lr: float
    weight_decay: float
    others: Mapping[str, float] = field(default_factory=dict)


class Trainable(ABC):
    """A training method. The loop owns the optimiser; the method owns its networks and its schedules."""

    _forward: nn.Module
    """What is called in a step; wrapped by `distribute`."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass, and recompute the rest."""

    @abstractmethod
    def trainable(self) -> nn.Module:
        """The module whose parameters are trained."""

    def followers(self) -> Sequence[nn.Module]:
        """Networks without gradients that run in each step, as large as the trained one."""
        return ()

    @abstractmethod
    def modules(self) -> list[tuple[str, nn.Module]]:
        """All modules whose tensors are needed to resume, by the prefix of their names in checkpoints."""

    @abstractmethod
    def rates(self, now: Now) -> Rates:
        """The schedules at this step: pure functions of it."""

    @abstractmethod
    def step(self, batch: Any, now: Now, precision: Precision, world: World) -> StepOutput:
        """Forward pass of one micro-batch."""

    @abstractmethod
    def after_update(self, now: Now, world: World) -> None:
        """Called after the optimiser's step: EMA of the teacher, centring, averaged weights."""

    @abstractmethod
    def suspects(self, batch: Any) -> list[str]:
        """The clips of a micro-batch that may have caused a loss that is not finite."""

    def lr_scale(self, name: str) -> float:
        """The learning rate of a parameter of `trainable`, by its name, over the step's."""
        return 1.0

    def gradients_ready(self, now: Now) -> None:  # noqa: B027
        """Called after the backward passes and before clipping, to freeze what must not move yet."""

    def distribute(self, world: World) -> None:
        """Share the work between the processes of the world."""
        if self.checkpoint_activations:
            distributed.recompute(self.trainable())
        if world.size == 1:
            return
        if self.parallel == "fsdp":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for module in (self.trainable(), *self.followers()):
                distributed.shard(module, mesh)
        elif not isinstance(self._forward, DistributedDataParallel):
            # Buckets are the gradients' own memory: no copy in and out. They are exchanged while the backward pass
            # goes on, the last layers' first. Buffers are constants here, and the name of that option has changed.
            options = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
            constant: dict[str, Any] = {name: False}
            self._forward = DistributedDataParallel(self._forward, gradient_as_bucket_view=True, **constant)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context in which backward passes do not exchange gradients between processes."""
        if isinstance(self._forward, DistributedDataParallel):
            with self._forward.no_sync():
                yield
        elif set_sync := getattr(self.trainable(), "set_requires_gradient_sync", None):  # FSDPModule's
            set_sync(False)
            try:
                yield
            finally:
                set_sync(True)
        else:
            yield

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to resume, weights included, each once."""
        out: dict[str, Tensor] = {}
        for part, module in self.modules():
            aliases = _aliases(module)
            out |= {f"{part}.{name}": value for name, value in module.state_dict().items() if name not in aliases}
        return out

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put `state` back.

        Raises:
            CheckpointError: anything is missing, unknown or of another shape.
        """
        for part, module in self.modules():
            prefix = part + "."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            aliases = _aliases(module)
            load_strict(module, own | {alias: own[name] for alias, name in aliases.items() if name in own}, part)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Names in the state that stand for a tensor that has another name already (a shared last layer)."""
    seen: dict[int, str] = {}
    out = {}
    for name, value in module.state_dict(keep_vars=True).items():
        first = seen.setdefault(id(value), name)
        if first != name:
            out[name] = first
    return out


def not_finite(inputs: Tensor, ids: Sequence[str]) -> list[str]:
    """Return the clips with inputs (V * B, ...), view by view, that are not finite; all B where every input is."""
    good = torch.isfinite(inputs).flatten(1).all(1).view(-1, len(ids)).all(0)
    return [name for name, fine in zip(ids, good.tolist(), strict=True) if not fine] or list(ids)
