"""Detect whether parameters changed since something was derived from them."""

from __future__ import annotations

import weakref

from torch import Tensor


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
