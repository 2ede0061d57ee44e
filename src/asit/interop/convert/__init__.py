"""Convert weights of other projects to asit models: ASiT, AST, SSAST, AudioMAE, EAT, BEATs, image transformers.

`safe_load.read` reads a file without running it, `detect` finds its kind, and one module per kind maps its tensors to
asit's names and axes. The model's card records the origin under `training.source`.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asit.audio.fbank import FrontEnd
from asit.errors import CheckpointError, ConfigError
from asit.interop import huggingface
from asit.interop.convert import families, hf_ast, label_names, official_eat
from asit.interop.convert.detect import KINDS, choose
from asit.interop.convert.official_heads import PretrainingHeads
from asit.interop.convert.source_model import (
    FINE_TUNED,
    PUBLISHED,
    SourceModel,
    SourceOptions,
    requested_frames,
)
from asit.io import safe_load
from asit.io.checkpoint import check_fit, check_numbers, load_strict
from asit.io.local_files import sha256
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.encoders import empty_encoder, meta_encoder

log = logging.getLogger(__name__)

MODEL_TYPES = {hf_ast.MODEL_TYPE: "AST", official_eat.MODEL_TYPE: "EAT"}
"""The `model_type` of Hugging Face folders that are converted."""

__all__ = ["KINDS", "MODEL_TYPES", "Converted", "SourceOptions", "convert"]


@dataclass(frozen=True)
class Converted:
    """A converted model on the CPU.

    Attributes:
        model: the model.
        mapped: number of tensors of the file that it uses.
        left_out: the file's other entries, with the reason.
        heads: of the pretraining, where they were to be kept.
    """

    model: AudioModel
    mapped: int
    left_out: dict[str, str]
    heads: PretrainingHeads | None = None

    def save(self, folder: Path, overwrite: bool = False) -> None:
        """Write the model folder, with the heads of pretraining where they are kept; errors as `AudioModel.save`."""
        heads = None if self.heads is None else (self.heads.state, self.heads.settings)
        self.model.save(folder, overwrite, heads)

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Return what was left out as (reason, names)."""
        return [(why, [n for n, w in self.left_out.items() if w == why]) for why in Counter(self.left_out.values())]


def convert(path: Path, options: SourceOptions) -> Converted:
    """Convert a file of weights, or a Hugging Face folder.

    Args:
        path: the file or folder, of one of `KINDS`.
        options: what the user specifies.

    Returns:
        The model. Its outputs equal the source's to about 1e-5 in float32 unless positions were resized.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or has unknown tensors.
        ConfigError: contradicting options.
    """
    path = Path(path)
    file = _file(path)
    if file is None:
        return _own(path, options)
    try:
        content = safe_load.read(file, training_state=True)
    except CheckpointError:
        # Files of fairseq and others hold more than tensors, but their strings still show the family.
        known = families.family(safe_load.texts(file))
        if known is not None and known.lower() not in KINDS:
            families.refuse(file, known, KINDS)
        raise
    content, training_state = _unwrap(file, content)
    kind = choose(file, content, options.kind)
    if options.which == "student" and kind != "asit":
        raise ConfigError(
            f"{file} is of kind {kind}, and --which student is given", "an ASiT pretraining", "omit --which"
        )
    source = KINDS[kind][1](file, content, options)
    source.left_out |= training_state
    if options.keep_heads and source.pretraining is None:
        raise ConfigError(
            f"{file} has no heads of an ASiT pretraining, and --keep-heads is given",
            "an official checkpoint of pretraining (kind asit)",
            "omit --keep-heads",
        )
    _log_statistics(source)
    of_head = {} if source.head is None else {f"head.{name}": value for name, value in source.head.state.items()}
    kept = {} if source.pretraining is None else source.pretraining.state
    check_numbers(str(file), {**source.state, **of_head, **kept})
    if kind != "vit":
        _resize(source, options)
    size = source.settings, source.frames, source.front_end.mels
    check_fit(meta_encoder(*size), source.state, str(file))  # before memory is allocated
    encoder = empty_encoder(*size)
    load_strict(encoder, source.state, str(file))
    head, labelling, origin = _head(file, source, options)
    facts: dict[str, Any] = {
        **source.facts,
        "file": file.name,
        "sha256": sha256(file),
        "tensors": source.mapped,
        "left_out": source.left_out,
    }
    if labelling is not None:
        facts["labels"] = origin
    training: dict[str, Any] = {"source": facts}
    if options.license:
        training["license"] = options.license
    model = AudioModel(encoder, FrontEnd(source.front_end), training, head, labelling)
    return Converted(model, source.mapped, source.left_out, source.pretraining)


def _unwrap(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Take the network out of a Lightning checkpoint: its tensors, without the prefix of the module that held it.

    Also return its other entries with the reason to leave them out. Other files are returned unchanged.
    """
    nest = content.get("state_dict")
    if not isinstance(nest, dict) or not (path.suffix == ".ckpt" or "pytorch-lightning_version" in content):
        return content, {}
    tokens = [str(name) for name in nest if str(name).endswith("cls_token")]
    prefix = ""
    if len(tokens) == 1:
        ends = (f"{hf_ast.PREFIX}embeddings.cls_token", "embeddings.cls_token", "v.cls_token", "backbone.cls_token")
        inner = next((end for end in ends if tokens[0].endswith(end)), "cls_token")
        prefix = tokens[0].removesuffix(inner).removesuffix("module.")
    others = [str(name) for name in content if name not in ("state_dict", "args")]
    left_out = dict.fromkeys(others, "training state")
    held = {str(name).removeprefix(prefix): value for name, value in nest.items()}
    args = {"args": content["args"]} if "args" in content else {}
    if prefix:
        log.info(f"Lightning checkpoint: used the tensors named {prefix}*")
    return {"state_dict": held, **args}, left_out


def _log_statistics(source: SourceModel) -> None:
    """Log that AudioSet's mean and std are assumed, and those published for this number of classes."""
    if PUBLISHED not in source.facts.get("statistics", ""):
        return
    classes = label_names.AUDIOSET if source.head is None else source.head.state["linear.bias"].numel()
    front = source.front_end
    note = (
        f"Mean {front.mean} and std {front.std} are assumed, AudioSet's as published with the code: the file has none"
    )
    if classes != label_names.AUDIOSET:
        note += f"; its {classes} classes are not AudioSet's: pass the --mean and --std of its recipe"
    if classes in FINE_TUNED:
        note += ", such as --mean {1} --std {2} for {0}".format(*FINE_TUNED[classes])
    log.info(note)


def _file(path: Path) -> Path | None:
    """Return the file of weights, or None for a folder that asit exported for Hugging Face."""
    if not path.is_dir():
        if (path.parent / "card.json").is_file():
            raise CheckpointError(
                f"{path} is in an asit model folder, whose card describes its input",
                "weights of another kind",
                f"use the folder as it is: {path.parent}",
            )
        return path
    inner = [folder for folder in (path, path / "model") if (folder / "card.json").is_file()]
    if inner:
        raise CheckpointError(
            f"{inner[0]} is an asit model already", "weights of another kind", f"use it as it is: {inner[0]}"
        )
    kind = hf_ast.read_json(path / "config.json").get("model_type")
    if kind == "asit":
        return None
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{path / 'config.json'} says model_type {safe_load.shown(str(kind))!r}, which asit does not support",
            f"{', '.join(f'{one!r} ({name})' for one, name in MODEL_TYPES.items())} or 'asit'",
            "give a file of weights of one of the kinds " + ", ".join(KINDS),
        )
    return hf_ast.weights_in(path)


def _own(path: Path, options: SourceOptions) -> Converted:
    """Read an asit model from a folder that was exported for Hugging Face."""
    if options != SourceOptions(license=options.license):
        raise ConfigError(
            f"{path} is an asit model exported for Hugging Face, and more than --out and --license is given",
            "no other option: its config.json describes the model",
            "omit the other options",
        )
    model = huggingface.read(path)
    if options.license:
        model.training["license"] = options.license
    head = 0 if model.head is None else len(model.head.state_dict())
    mapped = len(model.encoder.state_dict()) + head
    log.info("An asit model exported for Hugging Face, unchanged")
    return Converted(model, mapped, {})


def _resize(source: SourceModel, options: SourceOptions) -> None:
    """Resize the positions to the requested length."""
    frames, before = requested_frames(options, source.settings, source.front_end), source.frames
    if frames is None or frames == before:
        return
    mels = source.front_end.mels
    source.state = positions.adapt_positions(
        source.state, source.settings, source.settings, old_frames=before, frames=frames, mels=mels
    )
    source.frames = frames
    if source.settings.family == "beats":
        return  # nothing depends on the length
    longer = "stretched, bicubic" if source.settings.family == "vit" else "by their formula"
    how = "those of the first columns" if frames < before else longer
    source.facts["positions"] = f"resized from {before} to {frames} frames: {how}"
    log.info(f"Positions {source.facts['positions']}")


def _head(path: Path, source: SourceModel, options: SourceOptions) -> tuple[Head | None, Labelling | None, str]:
    """Return the head, its labelling, and the origin of the class names."""
    if source.head is None:
        given = [
            f"--{name}" for name in ("labels", "answer", "pooling") if getattr(options, name) not in (None, "auto")
        ]
        if given:
            raise ConfigError(
                f"{path} has no head to convert, and {', '.join(given)} is given",
                "a fine-tuned network, with a head",
                "omit it, or give a fine-tuned file",
            )
        return None, None, ""
    state = {name: value.float() for name, value in source.head.state.items()}
    if state["linear.weight"].ndim != 2 or state["linear.bias"].shape != state["linear.weight"].shape[:1]:
        raise CheckpointError(
            f"{path} has a head of shape {tuple(state['linear.weight'].shape)}",
            "(classes, width)",
            "get the file again",
        )
    if options.pooling not in ("auto", source.head.pooling):
        raise ConfigError(
            f"--pooling {options.pooling}, and the head of {path} reads {source.head.pooling}",
            "what the head was trained on",
            "omit --pooling",
        )
    names, origin = label_names.names_for(source.head, options.labels)
    log.info(f"{len(names)} classes, named by {origin}")
    multi = source.head.multi
    if options.answer != "auto":
        multi = options.answer == "multi"
    elif multi is None:
        multi = len(names) == label_names.AUDIOSET
        scores = "several classes per clip (sigmoid)" if multi else "one class per clip (softmax)"
        log.info(f"Assumed {scores} of {len(names)} classes: else pass --answer {'single' if multi else 'multi'}")
    width, pooling, norm = state["linear.weight"].shape[1], source.head.pooling, "norm.weight" in state
    with torch.device("meta"):
        head = Head(width, len(names), pooling, norm=norm, norm_eps=source.head.eps)
    head.to_empty(device="cpu")
    load_strict(head, state, f"{path} (its head)")
    front_end = FrontEnd(source.front_end)
    seconds = source.head.seconds or front_end.samples_for(source.frames) / front_end.settings.rate
    eps = source.head.eps if norm else 1e-6
    return head, Labelling(names, multi, pooling, seconds, eps), origin
