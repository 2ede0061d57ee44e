"""Write an ONNX file: graph, comparison with the model, loss in int8, metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from asit.errors import CheckpointError, ConfigError
from asit.interop.exportable import check_waveforms, compare, extent_of, facts_of, on_cpu, output_of
from asit.interop.onnx.trace import INPUT, OPSETS, in_int8, trace
from asit.io.atomic import check_free, disk_errors, write_file
from asit.model.audio_model import AudioModel

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]
"""A graph as a function of waveforms (B, S) at the model's rate."""
Measure = Callable[[Run, Run], dict[str, Any]]
"""Measure the loss, given the float32 and the int8 graph; see `agreement`."""
TOLERANCE = 1e-4
"""Largest difference between a float32 file and the model."""
LEAST_COSINE = 0.9
"""Mean cosine of int8 and float32 outputs below which no int8 file is written."""
LAYERS = 6
"""Linear layers of a block: query, key, value, projection, and two of the MLP."""
_LARGEST = 2**31 - 2**20  # a protobuf message ends at 2 GiB


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
    _check_opset(opset)
    check_free(out, overwrite)
    helper = _need()
    model = on_cpu(model)
    _check_size(model)
    exact = trace(model, chosen, opset)
    run = _session(exact, opset)
    facts = {**facts_of(model, chosen, license), "opset": opset, "precision": "int8" if int8 else "float32"}
    facts["check"] = compare(model, chosen, run, TOLERANCE, f"the graph for {out.name}")
    kept = exact
    if int8:
        kept = in_int8(exact, LAYERS * model.encoder.depth)
        coarse = _session(kept, opset)
        if measure is None:
            waves = [row[None] for rows in check_waveforms(extent_of(model, chosen), model.rate) for row in rows]
            pairs = ((run(wave)[0], coarse(wave)[0]) for wave in waves)
            facts["loss"] = agreement(pairs, chosen in ("scores", "logits"), "synthetic sounds")
        else:
            facts["loss"] = measure(run, coarse)
        _check_loss(facts["loss"], out)
    texts = {name: value if isinstance(value, str) else _json(value) for name, value in facts.items()}
    helper.set_model_props(kept, texts)
    content = kept.SerializeToString()
    check_free(out, overwrite)
    with disk_errors(out), write_file(out) as draft:
        draft.write_bytes(content)
    return {**facts, "file": str(out), "bytes": len(content)}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _need() -> Any:
    try:
        import onnxruntime  # noqa: F401  # needed later; fail before the work
        import onnxscript  # noqa: F401  # needed by torch's exporter
        from onnx import helper
    except ImportError as error:
        raise ConfigError(
            f"ONNX files need {error.name}, which is not installed",
            "the packages onnx, onnxscript and onnxruntime",
            "pip install 'asit-audio[onnx]'",
        ) from error
    return helper


def _check_opset(opset: int) -> None:
    if opset not in OPSETS:
        raise ConfigError(
            f"opset {opset}",
            f"one from {OPSETS[0]} to {OPSETS[-1]}",
            "omit it: opset 20 is read by onnxruntime 1.17 and newer, 18 by 1.14 and newer",
        )


def _check_size(model: AudioModel) -> None:
    parts = [model.encoder] if model.head is None else [model.encoder, model.head]
    size = sum(4 * parameter.numel() for part in parts for parameter in part.parameters())
    if size > _LARGEST:
        raise ConfigError(
            f"weights of {size / 1e9:.1f} GB", "at most 2 GB in one ONNX file", "export with --to torch instead"
        )


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
