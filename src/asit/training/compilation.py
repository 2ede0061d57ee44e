"""torch.compile of the blocks of a network, or plain blocks and the reason in the log where it does not work.

Blocks are compiled one by one. The code of one block serves all blocks of the same shapes, so a network of any depth
takes a few compilations; gradients are ready block by block, so that DDP sends those of one block while the next are
computed; and FSDP2 and activation checkpointing wrap compiled blocks. Names of parameters do not change.
"""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_LIMIT = 64
"""Shapes that a block is compiled for. Torch's own limit is 8, which views, local views, teacher and the sizes that
`asit plan` measures soon exceed; later shapes would run plain without notice."""


def wanted(setting: bool | str, device: torch.device) -> bool:
    """Whether to compile; "auto": on a GPU, where runs are long enough to gain from it."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def compiled(modules: Collection[nn.Module]) -> None:
    """Compile modules in place, for training only: in evaluation, with its many shapes, they run plain.

    Each is compiled for up to 64 shapes and runs plain for others. If the compiler fails at the first call, all modules
    run plain from then on, which is logged once.

    Args:
        modules: such as the blocks of an encoder, before they are wrapped for several processes.
    """
    shared = _Shared()
    for module in modules:
        module.compile(dynamic=False)
        module._compiled_call_impl = _Guarded(module, module._compiled_call_impl, shared)  # type: ignore[assignment]
    log.info(f"compile: {len(modules)} modules, one by one (torch.compile, inductor)")


class _Shared:
    """State of the modules of one call: shapes seen, and whether the compiler has failed."""

    def __init__(self) -> None:
        self.failed, self.seen = False, set[Any]()


class _Guarded:
    """The call of a module: compiled in training, plain in evaluation and after the compiler has failed."""

    def __init__(self, module: nn.Module, call: Any, shared: _Shared) -> None:
        self.module, self.call, self.shared = module, call, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.failed or not self.module.training:
            return self.module._call_impl(*args, **kwargs)
        given = (*args, *kwargs.values())
        key = (torch.is_grad_enabled(), *((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in given))
        try:
            with contextlib.nullcontext() if key in self.shared.seen else _with_gradient():
                made = self.call(*args, **kwargs)
            self.shared.seen.add(key)
            return made
        except Exception as error:
            if not _of_the_compiler(error):
                raise
            self.shared.failed = True
            text = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
            log.warning(f"compile: off, torch.compile does not work here: {textwrap.shorten(text, 200)}")
            return self.module._call_impl(*args, **kwargs)


@contextlib.contextmanager
def _with_gradient() -> Iterator[None]:
    """Compile modules together with their gradients, and in one piece."""
    # By default torch compiles the gradient in the first backward pass, where a compiler that fails would end the run.
    # Under DDP torch splits what it compiles; a block is such a piece already, and recomputed blocks cannot be split.
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    with (
        dynamo.patch({"optimize_ddp": False, "recompile_limit": _LIMIT}),  # type: ignore[attr-defined]
        functorch.patch(force_non_lazy_backward_lowering=True),  # type: ignore[attr-defined]
    ):
        yield


def _of_the_compiler(error: BaseException) -> bool:
    """Whether dynamo or inductor failed, and not the module itself."""
    from torch._dynamo import exc

    if isinstance(error, exc.TorchDynamoException):
        return True
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
            return True
        seen = seen.__cause__
    return False


def attention_backends(device: torch.device) -> str:
    """Return a sentence on the fused attention kernels that torch may choose from on a CUDA device."""
    backends = torch.backends.cuda
    flags = {
        "flash": backends.flash_sdp_enabled() and backends.is_flash_attention_available(),
        "cuDNN": backends.cudnn_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
    }
    allowed = ", ".join(name for name, on in flags.items() if on) or "none: plain products"
    major, minor = torch.cuda.get_device_capability(device)
    return f"attention: fused kernels allowed: {allowed} (compute capability {major}.{minor})"
