"""Nodes and constants of an ONNX graph as it is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class Nodes:
    """Nodes and constants of a graph; a name is made from what a node is for."""

    def __init__(self) -> None:
        from onnx import helper, numpy_helper

        self._node, self._tensor = helper.make_node, numpy_helper.from_array
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.room = ""
        self._count: dict[str, int] = {}

    def constant(self, value: npt.ArrayLike, name: str = "") -> str:
        """A constant; without a name of its own it is called by its values, and equal ones are kept once."""
        array = np.asarray(value)
        if not name:
            name = f"{array.dtype}{list(array.shape)}:{','.join(map(str, array.ravel().tolist()))}".replace(" ", "")
        elif name in self.constants:
            raise ValueError(f"two constants are named {name}")
        if name not in self.constants:
            self.constants[name] = self._tensor(array, name)
        return name

    def __call__(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node of one output, which is called as the node is: by the room it is in and its name or kind."""
        name = f"{self.room}/{name or kind}"
        self._count[name] = at = self._count.get(name, 0) + 1
        name = name if at == 1 else f"{name}_{at}"
        self.nodes.append(self._node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def ints(self, *values: int) -> str:
        """A constant (n,) int64."""
        return self.constant(np.array(values, np.int64))

    def real(self, value: float) -> str:
        """A constant () float32."""
        return self.constant(np.float32(value))

    def cut(self, x: str, first: str, end: str, axis: int) -> str:
        """x from `first` to `end`, int64 tensors (1,), along an axis."""
        return self("Slice", x, first, end, self.ints(axis))
