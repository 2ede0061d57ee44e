"""Trace a model to an ONNX graph with torch's exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from asit.errors import CheckpointError, ConfigError
from asit.interop.exportable import Output, Waveform, check_waveforms, extent_of
from asit.model.audio_model import AudioModel

if TYPE_CHECKING:
    import onnx

INPUT = "waveform"
OPSETS = range(18, 24)
"""Supported versions of ONNX's operators."""


def trace(model: AudioModel, output: Output, opset: int) -> onnx.ModelProto:
    """Return the float32 graph of a model on the CPU: input "waveform" (batch, samples), output named `output`.

    Dynamic axes are "batch", "samples" and, for frames, "columns". Weights keep their names, such as
    "blocks.0.query.weight" (out, in).

    Raises:
        ConfigError: this version of torch cannot export the model.
    """
    extent = extent_of(model, output)
    # Two rows: the exporter would specialise one.
    example = torch.from_numpy(np.concatenate([next(iter(check_waveforms(extent, model.rate)))] * 2))
    try:
        with torch.no_grad(), _quiet():
            program: Any = torch.onnx.export(
                Waveform(model, output).eval(),
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[output],
                dynamic_shapes=(("batch", "samples"),),
                opset_version=opset,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(
            f"torch {torch.__version__} could not write the model as ONNX: {str(error).splitlines()[0]}",
            "a version of torch and onnxscript whose exporter can",
            "pip install --upgrade torch onnxscript, or export with --to torch",
        ) from error
    graph: onnx.ModelProto = program.model_proto
    _clean(graph)
    _name_axes(graph, output)
    for node in graph.graph.node:
        if "columns" in node.input:  # the table's lookup, whose name the runtime prints for longer inputs
            node.name = f"inputs_may_have_{extent.longest / model.rate:.2f}_seconds_at_most"
    return graph


def _name_axes(model: onnx.ModelProto, output: Output) -> None:
    """Rename torch's symbol of the dynamic axis to "columns"."""
    graph = model.graph
    sizes = [size for value in (*graph.output, *graph.value_info) for size in value.type.tensor_type.shape.dim]
    symbols = {found for size in sizes for found in re.findall(r"\bu\d+\b", size.dim_param)}
    if len(symbols) == 1:
        for size in sizes:
            if size.dim_param:
                size.dim_param = re.sub(rf"\b{symbols.copy().pop()}\b", "columns", size.dim_param)
    axes = graph.output[0].type.tensor_type.shape.dim
    for size, name in zip(axes, ("batch", "columns") if output == "frames" else ("batch",), strict=False):
        size.dim_param = name


def _clean(model: onnx.ModelProto) -> None:
    """Remove the exporter's comments, which hold paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks on its internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


LEVELS = 63
"""Largest int8 weight. Kernels for CPUs without VNNI add pairs of products in 16 bits, at most 255 x 64 x 2, so with
7-bit weights all CPUs give the same result."""
ZERO = np.array(128, np.uint8)
"""Zero point of the quantised input."""
LAYERS = "blocks."
"""Prefix of the weights' names."""


def in_int8(model: onnx.ModelProto, count: int) -> onnx.ModelProto:
    """Return a copy of a graph with the `count` linear layers of its blocks in int8 and the rest in float32.

    Raises:
        CheckpointError: another number of layers was found, so that the exporter's graph is not understood.
    """
    from onnx import ModelProto

    out = ModelProto()
    out.CopyFrom(model)
    graph = out.graph
    held = {one.name: one for one in graph.initializer}
    writer = _Writer(held)
    found = 0
    for node in model.graph.node:
        if node.op_type == "Gemm" and node.input[1] in held and node.input[1].startswith(LAYERS):
            writer.layer(node)
            found += 1
        else:
            writer.nodes.append(node)
    if found != count:
        raise CheckpointError(
            f"{found} linear layers in the exporter's graph",
            f"{count}, of the blocks",
            "export without --int8, and report it with the versions of `asit doctor`",
        )
    del graph.node[:], graph.initializer[:]
    graph.node.extend(writer.nodes)
    read = {name for node in writer.nodes for name in node.input}
    graph.initializer.extend(one for name, one in held.items() if name in read)
    return out


class _Writer:
    """Write the nodes of the new graph; constants go to `held`."""

    def __init__(self, held: dict[str, Any]) -> None:
        self.held = held
        self.nodes: list[Any] = []
        self._rows: dict[str, tuple[str, str]] = {}

    def layer(self, gemm: onnx.NodeProto) -> None:
        """Replace a linear layer on rows (B N, in) by nodes with a result of the same name."""
        from onnx import TensorProto, numpy_helper

        x, weight, *bias = gemm.input  # the exporter omits a bias of zeros
        values, scales = quantised(numpy_helper.to_array(self.held[weight]))
        if x not in self._rows:
            self._rows[x] = self._quantise(x)
        rows, scale = self._rows[x]
        product = self._node("MatMulInteger", rows, self._constant(weight, values), self._constant("zero", ZERO))
        real = self._node("Mul", self._node("Cast", product, to=TensorProto.FLOAT), scale)
        last = gemm.output[0]
        real = self._node("Mul", real, self._constant(f"{weight}:scale", scales), name="" if bias else last)
        if bias:
            self._node("Add", real, *bias, name=last)

    def _quantise(self, x: str) -> tuple[str, str]:
        """Quantise rows of x from [-max |x|, max |x|] to uint8 around `ZERO`; return them and their scales (B N, 1)."""
        from onnx import numpy_helper

        axis = self._constant("axis", np.array([1]))
        largest = self._node("ReduceMax", self._node("Abs", x), axis, keepdims=0)
        scale = self._node("Mul", largest, self._constant("share", np.float32(1 / 127)))
        scale = self._node("Max", scale, self._constant("least", np.float32(1e-30)))
        zeros = self._node("ConstantOfShape", self._node("Shape", scale), value=numpy_helper.from_array(ZERO[None]))
        return self._node("QuantizeLinear", x, scale, zeros, axis=0), self._node("Unsqueeze", scale, axis)

    def _node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = name or f"int8_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        from onnx import numpy_helper

        name = f"int8:{name}"
        self.held[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def quantised(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantise a weight (out, in) symmetrically per output, as onnxruntime's `quantize_dynamic` does per channel.

    Returns:
        int8 values (in, out) of at most `LEVELS`, and scales (out,).
    """
    scale = np.maximum(np.abs(weight).max(1) / LEVELS, np.float32(1e-30)).astype(np.float32)
    values = np.rint(weight / scale[:, None]).clip(-LEVELS, LEVELS).astype(np.int8)
    return np.ascontiguousarray(values.T), scale
