"""Export a model with `torch.export`: from waveform to output, loaded by torch alone.

program = torch.export.load("model.pt2")
scores = program.module()(waveforms)  # (B, S) float32 at the model's rate
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asit.errors import ConfigError
from asit.interop.exportable import Waveform, check_waveforms, compare, extent_of, facts_of, on_cpu, output_of
from asit.io.atomic import check_free, disk_errors, write_file
from asit.model.audio_model import AudioModel

TOLERANCE = 1e-5
FACTS = "asit.json"
"""Extra file in the archive with rate, classes, card and so on."""


def export(
    model: AudioModel,
    out: Path,
    *,
    output: str | None = None,
    overwrite: bool = False,
    license: str | None = None,
) -> dict[str, Any]:
    """Write a .pt2 file, after comparing its outputs with the model's.

    Args:
        model: encoder or classifier.
        out: the file, ending in .pt2.
        output: scores, logits, embedding or frames; None: scores of a classifier, the embedding of an encoder.
        overwrite: replace an existing file.
        license: of the weights; None: that of the card.

    Returns:
        The file's metadata (`torch.export.load(path, extra_files={"asit.json": ""})`), "file" and "bytes".

    Raises:
        ConfigError: out exists, has another ending, or there is no such output.
        CheckpointError: the program differs from the model by more than 1e-5, or the disk is full.
    """
    chosen = output_of(model, output)
    if out.suffix != ".pt2":
        raise ConfigError(f"{out}", "a file that ends in .pt2", f"write to {out.with_suffix('.pt2')}")
    check_free(out, overwrite)
    model = on_cpu(model)
    extent = extent_of(model, chosen)
    # Two rows and an odd length: torch would specialise one row, or a length equal to another size.
    example = torch.from_numpy(np.concatenate([next(iter(check_waveforms(extent, model.rate)))] * 2))
    batch, samples = torch.export.Dim("batch", min=1), torch.export.Dim("samples", min=1, max=extent.longest)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's internals
        program = torch.export.export(
            Waveform(model, chosen).eval(), (example,), dynamic_shapes=({0: batch, 1: samples},)
        )
        for part in program.graph_module.modules():  # the graph and those within it
            if isinstance(part, torch.fx.GraphModule):
                for node in part.graph.nodes:  # it holds paths of this machine
                    node.meta.pop("stack_trace", None)
        buffer = io.BytesIO()
        facts = facts_of(model, chosen, license)
        torch.export.save(program, buffer)
        buffer.seek(0)
        again = torch.export.load(buffer).module()

        def run(waveforms: npt.NDArray[np.float32]) -> Any:
            return again(torch.from_numpy(waveforms)).numpy()

        facts["check"] = compare(model, chosen, run, TOLERANCE, f"the program for {out.name}")
        # Written through memory, since torch's writer reports a full disk as RuntimeError.
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={FACTS: json.dumps(facts, ensure_ascii=False)})
    check_free(out, overwrite)
    with disk_errors(out), write_file(out) as draft:
        draft.write_bytes(content.getbuffer())
    return {**facts, "file": str(out), "bytes": out.stat().st_size}
