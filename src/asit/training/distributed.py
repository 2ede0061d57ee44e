"""Networks over several processes: gradients averaged (DDP), or weights, gradients and optimiser sharded (FSDP2).

A sharded tensor (DTensor) is split in rows over the processes. Checkpoints hold unsharded tensors: the same file
whatever the number of processes and however they share the work.

Sources: `torch.nn.parallel.DistributedDataParallel`, `torch.distributed.fsdp.fully_shard` (FSDP2) and non-reentrant
`torch.utils.checkpoint`, by their documentation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

M = TypeVar("M", bound=nn.Module)


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
    from torch.distributed.fsdp import fully_shard  # takes most of a second to import

    for block in blocks(module):
        fully_shard(block, mesh=mesh)
    # Also where no backward pass follows, the parameters are shards again after the forward pass.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's rows of sharded tensors, sharing their memory; others as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def gathered(tensors: Mapping[str, Tensor], wanted: bool) -> dict[str, Tensor]:
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
            # Every process has the complete tensor, so none needs to send it.
            tensor = distribute_tensor(
                tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        out[key] = tensor
    return out


def unsharded(module: M, fresh: Callable[[], M]) -> M:
    """Return the module where it is not sharded, else an unsharded copy; every process must call this.

    Args:
        module: a network, or a part of one.
        fresh: makes one that is not sharded, with any weights.
    """
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    out = fresh()
    out.load_state_dict(gathered(module.state_dict(), True))
    return out
