"""Describe a model as JSON: its card, network and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from asit.errors import CheckpointError
from asit.interop import loading
from asit.io import parsing
from asit.io.local_files import sha256
from asit.training.run_dir import BEST, MODEL, RESULTS


def describe(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a model and return its facts as JSON; sizes in bytes, lengths in seconds.

    Args:
        source: model folder, run folder, Hugging Face folder or hub id.

    Raises:
        AsitError: as `asit.interop.loading.load`.
    """
    folder = loading.locate(source)
    model = loading.load(folder)
    encoder, front_end, labels = model.encoder, model.front_end, model.labelling
    training = dict(model.training)
    written = _json(folder / "card.json") or _json(folder / "config.json")
    covered = front_end.samples_for(model.frames) / model.rate
    return {
        "source": str(source),
        "folder": str(folder),
        "kind": model.card["kind"],
        "network": {
            "size": encoder.settings.size,
            "width": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "patch": list(encoder.patch),
            "stride": list(encoder.stride),
            "grid": list(encoder.grid),
            "axes": "(time, mel)",
            "tokens": encoder.pos_embed.shape[1],
            "tokens_before_patches": encoder.prefix,
            "encoder_parameters": _size(encoder),
            "head_parameters": _size(model.head) if model.head else 0,
        },
        "input": {
            "rate": model.rate,
            "frames": model.frames,
            "mels": encoder.mels,
            "seconds": round(covered if labels is None else labels.seconds, 6),
            "column_seconds": round(encoder.stride[0] * front_end.shift / model.rate, 6),
            "padding": front_end.settings.padding,
        },
        "front_end": front_end.settings.model_dump(mode="json"),
        "labels": labels
        and {
            "count": len(labels.classes),
            "multi": labels.multi,
            "pooling": labels.pooling,
            "classes": list(labels.classes),
        },
        "license": training.pop("license", None),
        "data": training.pop("data", None),
        "training": training,
        "scores": _scores(folder),
        "files": [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
            if path.is_file()
        ],
        "format": written.get("format"),
        "asit": written.get("asit"),
    }


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _scores(folder: Path) -> list[dict[str, Any]]:
    """Return the scores of these weights in the model's run: split, clips and metrics."""
    weights = {MODEL: "last", BEST: "best"}.get(folder.resolve().name)
    held = _json(folder.resolve().parent / RESULTS) if weights else {}
    out = []
    for one in held.get("results") or []:
        if one.get("weights") == weights:
            metrics = {name: value.get("value") for name, value in one.get("metrics", {}).items()}
            out.append({name: one.get(name) for name in ("split", "clips", "list")} | {"metrics": metrics})
    return out


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parsing.json_object(path, CheckpointError, "a JSON object", "copy it again from where it was saved")
