"""Describe a model as JSON: its card, network and files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from asit.errors import CheckpointError
from asit.interop import loading
from asit.io import parsing
from asit.io.local_files import sha256
from asit.model.audio_model import AudioModel
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
    training = dict(model.training)
    written = _json(folder / "card.json") or _json(folder / "config.json")
    return {
        "source": str(source),
        "folder": str(folder),
        "kind": model.card["kind"],
        "network": _network(model),
        "input": _input(model),
        "front_end": model.front_end.settings.model_dump(mode="json"),
        "labels": _labels(model),
        "license": training.pop("license", None),
        "data": training.pop("data", None),
        "training": training,
        "scores": _scores(folder),
        "files": _files(folder),
        "format": written.get("format"),
        "asit": written.get("asit"),
    }


def _network(model: AudioModel) -> dict[str, Any]:
    encoder = model.encoder
    return {
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
        "encoder_parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "head_parameters": sum(parameter.numel() for parameter in model.head.parameters()) if model.head else 0,
    }


def _input(model: AudioModel) -> dict[str, Any]:
    front_end, encoder = model.front_end, model.encoder
    step = encoder.stride[0] * front_end.shift / model.rate
    covered = front_end.samples_for(model.frames) / model.rate
    return {
        "rate": model.rate,
        "frames": model.frames,
        "mels": encoder.mels,
        "seconds": round(covered if model.labelling is None else model.labelling.seconds, 6),
        "column_seconds": round(step, 6),
        "padding": front_end.settings.padding,
    }


def _labels(model: AudioModel) -> dict[str, Any] | None:
    if model.labelling is None:
        return None
    return {
        "count": len(model.labelling.classes),
        "multi": model.labelling.multi,
        "pooling": model.labelling.pooling,
        "classes": list(model.labelling.classes),
    }


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


def _files(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parsing.json_object(path, CheckpointError, "a JSON object", "copy it again from where it was saved")
