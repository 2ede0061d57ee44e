"""Networks over several processes: gradients averaged (DDP), or weights, gradients and optimiser sharded (FSDP2).

A sharded tensor (DTensor) is split in rows over the processes. Checkpoints hold unsharded tensors: the same file
whatever the number of processes and however they share the work.

Sources: `torch.nn.parallel.DistributedDataParallel`, `torch.distributed.fsdp.fully_shard` (FSDP2) and non-reentrant
`torch.utils.checkpoint`, by their documentation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from asit.runtime import World
from asit.training import optim

Parallel = Literal["ddp", "fsdp"]
M = TypeVar("M", bound=nn.Module)


class Distributed:
    """Base of methods: distributes the network in training over the processes."""

    _forward: nn.Module
    """What is called in a step; wrapped by `distribute`."""
    parallel: Parallel = "ddp"
    """How several processes share the work."""
    checkpoint_activations: bool = False
    """Keep only the input of each block for the backward pass, and recompute the rest."""

    def trainable(self) -> nn.Module:
        """The module whose parameters are trained."""
        raise NotImplementedError

    def followers(self) -> Sequence[nn.Module]:
        """Networks without gradients that run in each step, as large as the trained one."""
        return ()

    def distribute(self, world: World) -> None:
        """Share the work between the processes of the world."""
        if self.checkpoint_activations:
            recompute(self.trainable())
        if world.size == 1:
            return
        if self.parallel == "fsdp":
            mesh = init_device_mesh(world.device.type, (world.size,))
            for module in (self.trainable(), *self.followers()):
                shard(module, mesh)
        elif not isinstance(self._forward, DistributedDataParallel):
            # Buckets are the gradients' own memory: no copy in and out. They are exchanged while the backward pass
            # goes on, the last layers' first. Buffers are constants here, and the name of that option has changed.
            options = inspect.signature(DistributedDataParallel).parameters
            name = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"
            constant: dict[str, Any] = {name: False}
            self._forward = DistributedDataParallel(self._forward, gradient_as_bucket_view=True, **constant)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """No exchange of gradients within this context."""
        if isinstance(self._forward, DistributedDataParallel):
            with self._forward.no_sync():
                yield
        elif isinstance(module := self.trainable(), FSDPModule):
            module.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                module.set_requires_gradient_sync(True)
        else:
            yield


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks within a network."""
    return [
        block
        for part in module.modules()
        if isinstance(held := getattr(part, "blocks", None), nn.ModuleList)
        for block in held
    ]


def recompute(module: nn.Module) -> None:
    """Let each block keep only its input for the backward pass, and recompute the rest.

    Nothing in a block is drawn (the factors of stochastic depth are an input), so the second pass gives what the
    first gave, and the gradients are the same.
    """
    for block in blocks(module):
        forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = forward


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network's parameters over the mesh, in place: each block gathered when its turn comes, the rest at once.

    Every process must hold the same weights.
    """
    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    # Also where no backward pass follows, the parameters are shards again after the forward pass.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's rows of sharded tensors, sharing their memory; others as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
    """Gather sharded tensors on the CPU; return others as they are. Every process must call this with the same names.

    Args:
        wanted: whether this process keeps what was gathered; the others get an empty dict.
    """
    out = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if wanted else tensor
        if wanted:
            out[name] = tensor
    return out


def like(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard an optimiser's tensors ("NAME/exp_avg") as the parameters NAME of the module are."""
    parameters = dict(module.named_parameters())
    out = {}
    for key, tensor in tensors.items():
        parameter = parameters.get(key.rsplit("/", 1)[0])
        if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
            # Every process has the whole tensor, so none needs to send it.
            tensor = distribute_tensor(
                tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        out[key] = tensor
    return out


def clip(gradients: Sequence[Tensor], limit: float, per_parameter: bool) -> Tensor:
    """`optim.clip` for gradients that may be sharded: their norms are those of the whole tensors."""
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        return optim.clip(gradients, limit, per_parameter)
    local = own(gradients)
    # A process may have no row of a small tensor: its norm is 0.
    squares = torch.stack(torch._foreach_norm(local)).float().square()
    dist.all_reduce(squares)
    norms = squares.sqrt()
    total = torch.linalg.vector_norm(norms)
    if limit > 0:
        factors = (limit / ((norms if per_parameter else total.expand(len(norms))) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(local, list(factors.unbind()))
    return total


def unsharded(module: M, fresh: Callable[[], M]) -> M:
    """Return the module where it is not sharded, else an unsharded copy; every process must call this.

    Args:
        module: a network, or a part of one.
        fresh: makes one that is not sharded, with any weights.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    out = fresh()
    out.load_state_dict(whole(module.state_dict(), True))
    return out
