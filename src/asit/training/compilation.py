"""torch.compile where it works, and the plain module, with a word on why, where it does not.

Blocks are compiled one by one, not the network as a whole. One block's code serves all blocks of a shape, so a run
compiles a handful of times whatever its depth; gradients come out block by block, so that DDP still sends one block's
while the next is computed (a network compiled whole gives them all at its end); and sharded or recomputed blocks
(FSDP2, activation checkpointing) wrap the compiled ones. Names of parameters stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_LIMIT = 64
"""Shapes that the blocks' one code is compiled for. Torch's 8 are soon reached: views, local views and teacher count
apart, and so does each size that `asit plan` tries; what comes later would run plain without a word."""
_TRIED: dict[str, str | None] = {}


def wanted(setting: bool | str, device: torch.device) -> bool:
    """Whether to compile: as asked, and by "auto" on a GPU, where a run is long enough to pay for it."""
    return device.type == "cuda" if setting == "auto" else bool(setting)


def failure(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on a device, found by compiling a small function and its gradient; None: it can.

    Tried once in a process for each kind of device.
    """
    if device.type not in _TRIED:
        _TRIED[device.type] = _try(device)
    return _TRIED[device.type]


def compiled(modules: Iterable[nn.Module], device: torch.device) -> bool:
    """Compile modules in place, for training only: in evaluation, with its many shapes, they run as they are.

    A module that the compiler refuses when it is first called runs as it is from then on, and so do the others, which
    is logged once. What is called with other shapes is compiled anew, up to 64 times, and runs as it is beyond that.

    Args:
        modules: such as the blocks of an encoder, before they are wrapped for several processes.
        device: where they run.

    Returns:
        Whether anything was compiled.
    """
    reason = failure(device)
    if reason is not None:
        log.warning(f"compile: off, torch.compile does not work here: {reason}")
        return False
    shared = _Shared()
    count = 0
    for module in modules:
        module.compile(dynamic=False)
        module._compiled_call_impl = _Guarded(module, module._compiled_call_impl, shared)  # type: ignore[assignment]
        count += 1
    log.info(f"compile: {count} modules, each by itself (torch.compile, inductor)")
    return count > 0


class _Shared:
    """What the guarded modules of one call know together: shapes that were met, and whether the compiler has failed."""

    def __init__(self) -> None:
        self.failed, self.met = False, set[Any]()


class _Guarded:
    """A module's call: compiled in training, plain in evaluation and after the compiler has failed."""

    def __init__(self, module: nn.Module, call: Any, shared: _Shared) -> None:
        self.module, self.call, self.shared = module, call, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.shared.failed or not self.module.training:
            return self.module._call_impl(*args, **kwargs)
        given = (torch.is_grad_enabled(), *map(_shape, (*args, *kwargs.values())))
        try:
            with contextlib.nullcontext() if given in self.shared.met else _at_once():
                made = self.call(*args, **kwargs)
            self.shared.met.add(given)
            return made
        except Exception as error:
            if not _of_the_compiler(error):
                raise
            self.shared.failed = True
            log.warning(f"compile: off from here on, torch.compile failed: {_line(error)}")
            return self.module._call_impl(*args, **kwargs)


def _shape(x: object) -> object:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else type(x)


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """What is compiled within is compiled whole, together with its gradient.

    By default torch compiles the gradient when it is first asked for: a compiler that fails there would end the run in
    the middle of the backward pass, where there is no way back to the plain module. And under DDP it cuts what it
    compiles into pieces for the exchange of gradients; a block is such a piece, and recomputed ones cannot be cut.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    with contextlib.ExitStack() as stack:
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        stack.enter_context(dynamo.patch({"optimize_ddp": False, limit: _LIMIT}))  # type: ignore[attr-defined]
        if hasattr(functorch, "force_non_lazy_backward_lowering"):  # torch 2.8 or so and later
            stack.enter_context(functorch.patch(force_non_lazy_backward_lowering=True))  # type: ignore[attr-defined]
        yield


def _try(device: torch.device) -> str | None:
    def small(x: Tensor, weight: Tensor) -> Tensor:
        return nn.functional.gelu(nn.functional.linear(x, weight)).square().sum()

    x = torch.ones(4, 8, device=device)
    weight = torch.full((8, 8), 0.01, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            torch.compile(small, dynamic=False)(x, weight).backward()
    except Exception as error:  # a compiler can fail in any way, and each of them means the same here
        return _line(error)
    return None


def _of_the_compiler(error: BaseException) -> bool:
    """Whether dynamo or inductor, rather than the module itself, failed."""
    from torch._dynamo import exc

    if isinstance(error, exc.TorchDynamoException):
        return True
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__module__.startswith(("torch._inductor", "torch._dynamo", "triton")):
            return True
        seen = seen.__cause__
    return False


def _line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    text = " ".join(str(error).split("\n\n")[0].split()[:60]) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def attention_backends(device: torch.device) -> str:
    """Which fused attention kernels torch may choose from on a device, and why, in one sentence."""
    if device.type != "cuda":
        return f"attention: torch's fused kernel of {device.type}"
    backends = torch.backends.cuda
    flags = {
        "flash": backends.flash_sdp_enabled() and torch.backends.cuda.is_flash_attention_available(),
        "cuDNN": backends.cudnn_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
    }
    allowed = ", ".join(name for name, on in flags.items() if on) or "none: plain products"
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"attention: fused kernels allowed: {allowed} (compute capability {major}.{minor}; flash needs 8.0 and bf16 or "
        "half precision, float32 and masks take the memory-efficient one)"
    )
