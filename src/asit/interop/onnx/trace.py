"""Trace a model to an ONNX graph with torch's exporter."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asit.errors import ConfigError
from asit.interop.exportable import Output, check_waveforms, extent_of
from asit.interop.waveform_model import Waveform
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
