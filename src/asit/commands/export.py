"""The verb export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from asit.errors import ConfigError
from asit.terminal.options import Count, Model, Threads, parse

if TYPE_CHECKING:
    from asit.model.audio_model import AudioModel


@dataclass
class ExportOptions:
    model: Model
    to: Literal["onnx", "torch", "huggingface"]
    """onnx: one file for onnxruntime; torch: one file of torch.export; huggingface: a folder for transformers."""
    out: str
    """File (.onnx, .pt2) or folder to write."""
    output: Literal["scores", "logits", "embedding", "frames"] | None = None
    """Output of an onnx or torch file: scores or logits of the classes, the clip's embedding, or a vector per frame. By
    default scores of a model with labels, else the embedding."""
    int8: bool = False
    """Quantise an onnx file's linear layers to int8: smaller and faster; the loss is measured."""
    check_data: str | None = None
    """Recordings to measure the loss of --int8 on: a catalogue, table or folder; labelled ones give accuracy or mAP. By
    default synthetic audio."""
    check_clips: Count = 500
    """Most of them to use, drawn with seed 0 from the test split if there is one."""
    opset: int | None = None
    """Version of ONNX's operators; by default 20."""
    license: str | None = None
    """Licence of the weights; by default that of the model's card."""
    title: str | None = None
    """Title of the model card for huggingface; by default the folder's name."""
    overwrite: bool = False
    """Replace existing output."""
    threads: Threads = 0


def export(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ExportOptions, prog, summary, given)
    _check(options)
    import asit
    from asit import runtime

    with runtime.world("cpu", options.threads):
        model = asit.load(options.model)
        out = Path(options.out)
        if options.to == "huggingface":
            _huggingface(options, model, out)
            return 0
        if options.to == "torch":
            from asit.interop import torch_export

            facts = torch_export.export(
                model, out, output=options.output, overwrite=options.overwrite, license=options.license
            )
        else:
            from asit.interop import onnx

            measure = None
            if options.check_data is not None:
                from asit.tools.int8_accuracy import on_recordings

                measure = on_recordings(model, options.output, options.check_data, options.check_clips)
            facts = onnx.export(
                model,
                out,
                output=options.output,
                int8=options.int8,
                opset=20 if options.opset is None else options.opset,
                overwrite=options.overwrite,
                license=options.license,
                measure=measure,
            )
    print(_summary(facts))
    return 0


def _check(options: ExportOptions) -> None:
    """Refuse options of another format."""
    only: dict[str, tuple[object, tuple[str, ...]]] = {
        "--output": (options.output, ("onnx", "torch")),
        "--int8": (options.int8, ("onnx",)),
        "--opset": (options.opset, ("onnx",)),
        "--check-data": (options.check_data, ("onnx",)),
        "--title": (options.title, ("huggingface",)),
    }
    wrong = [name for name, (value, formats) in only.items() if value and options.to not in formats]
    if wrong:
        allowed = " or ".join(f"--to {name}" for name in only[wrong[0]][1])
        raise ConfigError(
            f"{', '.join(wrong)} with --to {options.to}",
            f"{wrong[0]} goes with {allowed}",
            f"omit {'it' if len(wrong) == 1 else 'them'}, or pass {allowed}",
        )
    if options.check_data is not None and not options.int8:
        raise ConfigError(
            "--check-data without --int8",
            "both, to measure the loss of int8",
            "pass --int8 too; a float32 file is always compared with the model",
        )


def _huggingface(options: ExportOptions, model: AudioModel, out: Path) -> None:
    from asit.interop import huggingface

    source = Path(options.model)
    run = next((folder for folder in (source, source.parent) if (folder / "results.json").is_file()), None)
    huggingface.write(model, out, license=options.license, title=options.title, overwrite=options.overwrite, run=run)
    print(f"{out}: a folder for transformers; load it with trust_remote_code=True, or push it to the hub")


def _summary(facts: dict[str, Any]) -> str:
    output, rate, check = facts["output"], facts["rate"], facts["check"]
    shapes = {"embedding": "(batch, width)", "frames": "(batch, columns, width)"}
    shape = shapes.get(output, f"(batch, {len(facts['classes'])})")
    lengths = ", ".join(f"{seconds:g}" for seconds in check["seconds"])
    lines = [
        f"{facts['file']}: {facts['bytes'] / 1e6:.1f} MB, {facts.get('precision', 'float32')}; "
        f"waveform (batch, samples) at {rate} Hz to {output} {shape}",
        f"float32 within {check['largest_difference']:.1e} of the model, at {lengths} s, batches of 1 and 2",
        f"inputs: {facts['window'] / rate:.2f} s in training, at most {facts['longest'] / rate:.2f} s; "
        "split longer recordings into windows",
    ]
    if "loss" in facts:
        lines.append(_loss(facts["loss"]))
    return "\n".join(lines)


def _loss(loss: dict[str, Any]) -> str:
    parts = []
    if "metric" in loss:
        parts.append(f"{loss['metric']} {loss['int8']:.4f} (float32 {loss['float32']:.4f})")
    if "same_top_class" in loss:
        parts.append(f"same top class {100 * loss['same_top_class']:.1f} %")
    parts.append(f"mean cosine {loss['cosine']:.5f}, least {loss['smallest_cosine']:.5f}")
    return f"int8 on {loss['sounds']} {loss['of']}: {'; '.join(parts)}"
