"""ONNX export: one file from waveform to output for onnxruntime and NumPy, in float32 or int8.

session = onnxruntime.InferenceSession("model.onnx")
scores = session.run(None, {"waveform": waveforms})[0]  # (B, S) float32 at the model's rate

In int8 each product of the blocks' linear layers becomes ONNX's MatMulInteger, with the input quantised at run time by
each token's largest value, so that a clip's result does not depend on its batch. onnxruntime's `quantize_dynamic` has
one scale per batch, and its blockwise products (MatMulNBits) take more than twice as long (docs/export.md).
"""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from asit.errors import CheckpointError, ConfigError, missing_extra
from asit.interop.exportable import (
    Output,
    Waveform,
    check_waveforms,
    compare,
    extent_of,
    facts_of,
    layers_of,
    on_cpu,
    output_of,
)
from asit.io.atomic import check_free, disk_errors, write_file
from asit.model.audio_model import AudioModel

if TYPE_CHECKING:
    import onnx

INPUT = "waveform"
OPSETS = range(18, 24)
"""Supported versions of ONNX's operators."""
LEVELS = 63
"""Largest int8 weight. Kernels for CPUs without VNNI add pairs of products in 16 bits, at most 255 x 64 x 2, so with
7-bit weights all CPUs give the same result."""
ZERO = np.array(128, np.uint8)
"""Zero point of the quantised input."""
LAYERS = "blocks."
"""Prefix of the weights' names."""
Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]
"""A graph as a function of waveforms (B, S) at the model's rate."""
Measure = Callable[[Run, Run], dict[str, Any]]
"""Measure the loss, given the float32 and the int8 graph; see `agreement`."""
TOLERANCE = 1e-4
"""Largest difference between a float32 file and the model."""
LEAST_COSINE = 0.9
"""Mean cosine of int8 and float32 outputs below which no int8 file is written."""
BLOCK_LAYERS = 6
"""Linear layers of a block: query, key, value, projection, and two of the MLP."""
_LARGEST = 2**31 - 2**20  # a protobuf message ends at 2 GiB


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


def export(
    model: AudioModel,
    out: Path,
    *,
    output: str | None = None,
    int8: bool = False,
    opset: int = 20,
    overwrite: bool = False,
    license: str | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Write a model as one ONNX file: input "waveform" (batch, samples) float32 at the model's rate, one output.

    The float32 graph is compared with the model at lengths from 0.05 to 1.3 times the training input, even if the int8
    one is written.

    Args:
        model: encoder or classifier.
        out: the file, ending in .onnx.
        output: see `exportable.Output`; None: scores of a classifier, the embedding of an encoder.
        int8: quantise the linear layers: a quarter of the size, and faster on CPUs with AVX-512 VNNI or AMX.
        opset: version of ONNX's operators.
        overwrite: replace an existing file.
        license: of the weights; None: that of the card.
        measure: measures the loss of int8; None: agreement of the outputs on synthetic audio.

    Returns:
        The file's metadata, "file" and "bytes".

    Raises:
        ConfigError: out exists or has another ending, no such output or opset, onnx or onnxruntime is not installed,
            or the weights exceed one file.
        CheckpointError: the graph differs from the model by more than 1e-4, int8 loses too much, or the disk is full.
    """
    chosen = output_of(model, output)
    if out.suffix != ".onnx":
        raise ConfigError(f"{out}", "a file that ends in .onnx", f"write to {out.with_suffix('.onnx')}")
    if opset not in OPSETS:
        raise ConfigError(
            f"opset {opset}",
            f"one from {OPSETS[0]} to {OPSETS[-1]}",
            "omit it: opset 20 is read by onnxruntime 1.17 and newer, 18 by 1.14 and newer",
        )
    check_free(out, overwrite)
    helper = _need()
    parts = [model.encoder] if model.head is None else [model.encoder, model.head]
    size = sum(4 * parameter.numel() for part in parts for parameter in part.parameters())
    if size > _LARGEST:
        found = f"weights of {size / 1e9:.1f} GB"
        raise ConfigError(found, "at most 2 GB in one ONNX file", "export with --to torch instead")
    model = on_cpu(model)
    exact = trace(model, chosen, opset)
    run = _session(exact, opset)
    facts = {**facts_of(model, chosen, license), "opset": opset, "precision": "int8" if int8 else "float32"}
    facts["check"] = compare(model, chosen, run, TOLERANCE, f"the graph for {out.name}")
    kept = exact
    if int8:
        kept = in_int8(exact, BLOCK_LAYERS * (max(layers_of(model, chosen)) + 1))
        coarse = _session(kept, opset)
        if measure is None:
            waves = [row[None] for rows in check_waveforms(extent_of(model, chosen), model.rate) for row in rows]
            pairs = ((run(wave)[0], coarse(wave)[0]) for wave in waves)
            facts["loss"] = agreement(pairs, chosen in ("scores", "logits"), "synthetic sounds")
        else:
            facts["loss"] = measure(run, coarse)
        _check_loss(facts["loss"], out)
    json_of = functools.partial(json.dumps, ensure_ascii=False)
    helper.set_model_props(kept, {name: v if isinstance(v, str) else json_of(v) for name, v in facts.items()})
    content = kept.SerializeToString()
    check_free(out, overwrite)
    with disk_errors(out), write_file(out) as draft:
        draft.write_bytes(content)
    return {**facts, "file": str(out), "bytes": len(content)}


def _need() -> Any:
    try:
        import onnxruntime  # noqa: F401  # needed later; fail before the work
        import onnxscript  # noqa: F401  # needed by torch's exporter
        from onnx import helper
    except ImportError as error:
        raise missing_extra("an ONNX file", error.name, "onnx") from error
    return helper


def _session(graph: onnx.ModelProto, opset: int) -> Run:
    """Return the graph as a function, run by onnxruntime on torch's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class
        raise ConfigError(
            f"onnxruntime {onnxruntime.__version__} does not load the graph of opset {opset}: {error}",
            "a runtime that knows its operators",
            "pip install --upgrade onnxruntime, or pass a lower --opset",
        ) from error

    return lambda waveforms: cast(Array, session.run(None, {INPUT: waveforms})[0])


def agreement(outputs: Iterable[tuple[Array, Array]], classes: bool, of: str) -> dict[str, Any]:
    """Return how far the float32 and the int8 outputs (..., D) of inputs agree, as JSON.

    Args:
        outputs: of each input; consumed once.
        classes: whether they are of classes, so that the largest counts.
        of: description of the inputs.
    """
    found = []
    for exact, coarse in outputs:
        a, b = exact.astype(np.float64), coarse.astype(np.float64)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = float(((a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)).mean())
        # NaN, or zeros instead of values, count as opposite.
        found.append((cosine if np.isfinite(cosine) else -1.0, np.abs(a - b).max(), a.argmax() == b.argmax()))
    cosines, differences, same = np.array(found, np.float64).T
    return {
        "of": of,
        "sounds": len(found),
        "cosine": float(cosines.mean()),
        "smallest_cosine": float(cosines.min()),
        "largest_difference": float(differences.max()),
        **({"same_top_class": float(same.mean())} if classes else {}),
    }


def _check_loss(loss: dict[str, Any], out: Path) -> None:
    if not loss["cosine"] >= LEAST_COSINE:
        raise CheckpointError(
            f"in int8 the outputs for {loss['sounds']} {loss['of']} have a mean cosine of {loss['cosine']:.3f} with "
            f"those in float32; {out} was not written",
            f"at least {LEAST_COSINE}",
            "int8 does not suit this model: export it without --int8",
        )
