"""Model card: write it, and read a model folder whose card and weights agree."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings, custom_classes, yaml
from asit.errors import CheckpointError, ConfigError
from asit.io import checkpoint
from asit.io.parsing import UNFIT
from asit.model.classifier import Head, Labelling, check_head
from asit.model.encoders import empty_encoder, meta_encoder
from asit.model.vit import Encoder, shape_of

ENCODER, CLASSIFIER = "audio-encoder", "audio-classifier"
"""Kinds of models in a card."""

AXES = "(time, mel)"

_LONGEST_WINDOW = 1 << 16
"""Largest window of the log-mel in a card, in samples: more than a second at 48 kHz."""


def write_card(
    encoder: Encoder,
    front_end: FrontEndSettings,
    training: Mapping[str, Any],
    head: Head | None,
    labels: Labelling | None,
) -> dict[str, Any]:
    """Return the model card, all that is needed to use the weights, as JSON."""
    card: dict[str, Any] = {
        "kind": ENCODER,
        "front_end": front_end.model_dump(mode="json"),
        "encoder": encoder.settings.model_dump(mode="json"),
        "frames": encoder.frames,
        "grid": list(encoder.grid),
        "axes": AXES,
        "padding": front_end.padding,
        "training": training,
    }
    if head is None or labels is None:
        return card
    of_head = {**dataclasses.asdict(labels), "classes": list(labels.classes), "norm": head.norm is not None}
    of_head |= {"layers": list(labels.layers)}
    if not labels.layers:  # as cards were before heads read other blocks than the last
        del of_head["layers"]
    return {**card, "kind": CLASSIFIER, "labels": of_head}


def read_folder(
    folder: Path,
) -> tuple[Encoder, FrontEnd, Mapping[str, Any] | None, Head | None, Labelling | None]:
    """Read a model folder: encoder, front end, facts of the training, head and labels.

    Raises:
        CheckpointError: files are missing, damaged, of a newer format, of another kind, or do not fit the card.
    """
    tensors, card = checkpoint.load_model(folder)
    where, weights = folder / "card.json", str(folder / "model.safetensors")
    kind = card.get("kind")
    if kind != (CLASSIFIER if "labels" in card else ENCODER) or card.get("axes") != AXES:
        labelled = "with" if "labels" in card else "without"
        raise CheckpointError(
            f"{where} says kind {kind!r}, {labelled} labels, axes {card.get('axes')!r}",
            f"kind {ENCODER!r}, or {CLASSIFIER!r} with labels, axes {AXES!r}",
            "give a model folder as asit wrote it",
        )
    of_head = {name: value for name, value in tensors.items() if name.startswith("head.")}
    of_encoder = {name: value for name, value in tensors.items() if kind == ENCODER or name not in of_head}
    try:
        settings = yaml.build(EncoderSettings, card["encoder"], "encoder")
        front_end_settings = yaml.build(FrontEndSettings, card["front_end"], "front_end")
        # Compare shapes first, so that a wrong card allocates no memory.
        if shape_of(settings)[1] > len(of_encoder):
            raise ValueError(f"an encoder of {shape_of(settings)[1]} blocks, and weights of {len(of_encoder)} tensors")
        checkpoint.check_fit(meta_encoder(settings, card["frames"], front_end_settings.mels), of_encoder, weights)
        check_front_end(front_end_settings)
        encoder = empty_encoder(settings, card["frames"], front_end_settings.mels)
        if list(encoder.grid) != card.get("grid"):
            raise ValueError(f"grid {card.get('grid')}, and {card['frames']} frames make {list(encoder.grid)}")
        with torch.device("cpu"):  # whatever the default device is
            front_end = FrontEnd(front_end_settings)
        labels, norm = _read_labels(card["labels"]) if kind == CLASSIFIER else (None, False)
        training = card.get("training")
        if not isinstance(training, dict | None):
            raise TypeError(f"training: {type(training).__name__} instead of facts by name")
    except custom_classes.NotImportedError:
        raise
    except (*UNFIT, ConfigError) as error:
        raise CheckpointError(
            f"{where} cannot be used: {_reason(error)}",
            "front_end, encoder, frames and labels as asit writes them",
            "copy the model folder again, or upgrade asit",
        ) from error
    head = None
    if labels is not None:
        with torch.device("meta"):  # no random initialisation
            head = head_of(encoder.width, labels, norm)
        head.to_empty(device="cpu")
        named = {name.removeprefix("head."): value for name, value in of_head.items()}
        checkpoint.load_strict(head, named, f"{weights} (its head.*)")
    checkpoint.load_strict(encoder, of_encoder, weights)
    return encoder, front_end, training, head, labels


def _reason(error: BaseException) -> str:
    """Return why a card cannot be used, without the fixes for a command line."""
    if isinstance(error, ConfigError) and not error.expected:
        return error.found
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or repr(error)


def check_labels(encoder: Encoder, head: Head | None, labels: Labelling | None) -> None:
    """Raise ConfigError if head and labels do not match, or the head is for another encoder."""
    if (head is None) != (labels is None):
        raise ConfigError(
            "a head without labels" if labels is None else "labels without a head",
            "both for a classifier, neither for an encoder",
            "pass the missing one",
        )
    if head is None or labels is None:
        return
    eps = labels.norm_eps if head.norm is None else head.norm.eps
    read, wanted = (head.pooling, head.layers), (labels.pooling, labels.layers)
    if (head.classes, read, eps) != (len(labels.classes), wanted, labels.norm_eps):
        raise ConfigError(
            f"a head of {head.classes} classes on {head.pooling} with epsilon {eps:g}, labels of {len(labels.classes)} "
            f"on {labels.pooling} with {labels.norm_eps:g}",
            "the same",
            "build the head from the labels",
        )
    check_head(encoder, head)


def head_of(width: int, labels: Labelling, norm: bool) -> Head:
    """Return a head for these labels on an encoder of this width."""
    return Head(width, len(labels.classes), labels.pooling, norm=norm, norm_eps=labels.norm_eps, layers=labels.layers)


def check_front_end(settings: FrontEndSettings) -> None:
    """Raise ValueError for implausible numbers."""
    wrong = [f"{name} {value}" for name, value in settings if isinstance(value, float) and not math.isfinite(value)]
    if not wrong and settings.rate * settings.window_ms > 1000.0 * _LONGEST_WINDOW:
        wrong = [f"rate {settings.rate} with window_ms {settings.window_ms:g}"]
    if wrong:
        raise ValueError("front_end: " + ", ".join(wrong))


def _read_labels(field: Mapping[str, Any]) -> tuple[Labelling, bool]:
    """Return the labels of a card, and whether its head has a norm."""
    classes, multi, norm = field["classes"], field["multi"], field["norm"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not isinstance(multi, bool) or not isinstance(norm, bool):
        raise TypeError("labels: classes is no list of names, or multi or norm is neither true nor false")
    eps = float(field.get("norm_eps", Labelling.norm_eps))
    layers = tuple(field.get("layers", ()))
    return Labelling(tuple(classes), multi, field["pooling"], float(field["seconds"]), eps, layers), norm
