"""What was made of parameters is kept until one of them is written to, moved or replaced."""

from __future__ import annotations

import weakref

from torch import Tensor


class Stamp:
    """Parameters as they were when something was made of them.

    Torch counts writes to a tensor in its version; a write by way of `.data`, or one that puts other values at the same
    place in memory without counting (`Module.to` and its like), is not seen: modules that keep something let go of it
    in `_apply`. A stamp holds no parameter alive.
    """

    __slots__ = ("_facts",)

    def __init__(self, *parameters: Tensor) -> None:
        # Numbers of objects are given anew once an object is gone, so the objects themselves are compared.
        self._facts = [(weakref.ref(p), p.data_ptr(), p._version) for p in parameters]

    def holds(self, *parameters: Tensor) -> bool:
        """Whether these are the same parameters, unchanged."""
        return len(parameters) == len(self._facts) and all(
            kept() is p and place == p.data_ptr() and version == p._version
            for p, (kept, place, version) in zip(parameters, self._facts, strict=True)
        )


def can_be_stamped(*parameters: Tensor) -> bool:
    """Whether writes are counted: those of tensors made in inference mode are not."""
    return not any(p.is_inference() for p in parameters)
