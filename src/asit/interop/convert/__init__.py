"""Weights of others as asit models: ASiT, AST, SSAST, image transformers.

A file goes through four steps: `foreign.read` (nothing in it is run), `detect` (what it is), one module a kind (every
name has its place; axes are turned), and here the model with its card, whose `training.source` says where it is from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from asit.audio.fbank import FrontEnd
from asit.errors import CheckpointError, ConfigError
from asit.interop.convert import families, hf_ast, label_names
from asit.interop.convert.converted import FINE_TUNED, MEAN, PUBLISHED, STD, Ask, Taken, whole
from asit.interop.convert.detect import KINDS, choose
from asit.interop.loading import load
from asit.io import safe_load
from asit.io.checkpoint import check_fit, check_numbers, load_strict
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder, blank, shell

__all__ = ["KINDS", "Ask", "Converted", "convert"]


@dataclass(frozen=True)
class Converted:
    """A converted model, and what the user is to be told.

    Attributes:
        model: on the CPU.
        mapped: tensors of the file that are in it.
        left_out: other entries of the file, and why.
        notes: what was assumed or changed.
    """

    model: AudioModel
    mapped: int
    left_out: dict[str, str]
    notes: list[str]

    def reasons(self) -> list[tuple[str, list[str]]]:
        """What was left out, by reason: (reason, names)."""
        return [(why, [n for n, w in self.left_out.items() if w == why]) for why in Counter(self.left_out.values())]


def convert(path: Path, ask: Ask) -> Converted:
    """An asit model from a file of another's weights, or from a folder of Hugging Face's AST.

    Args:
        path: the file or folder; the kinds are in `KINDS`.
        ask: what the user says about it.

    Returns:
        the model, whose outputs are the source's to about 1e-5 in float32 unless positions were resized.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or has tensors without a place.
        ConfigError: what was asked for does not go together.
    """
    path = Path(path)
    file = _file(path)
    if file is None:
        return _own(path, ask)
    try:
        content = safe_load.read(file, training_state=True)
    except CheckpointError:
        # fairseq's and others' files hold more than tensors: what they are is in their texts all the same.
        if (known := families.family(safe_load.texts(file))) is not None:
            families.refuse(file, known, KINDS)
        raise
    content, notes, beside = _unwrap(file, content)
    kind, told = choose(file, content, ask.kind)
    notes += told
    if ask.which == "student" and kind != "asit":
        raise ConfigError(
            f"{file} is of kind {kind}, and --which student is given", "an ASiT pretraining", "leave --which out"
        )
    taken = KINDS[kind][1](file, content, ask)
    taken.left_out |= beside
    notes += _assumed(taken)
    of_head = {} if taken.head is None else {f"head.{name}": value for name, value in taken.head.state.items()}
    check_numbers(str(file), {**taken.state, **of_head})
    if kind != "vit":
        notes += _resize(taken, ask)
    encoder = _encoder(file, taken)
    head, labelling, said = _head(file, taken, ask)
    source: dict[str, Any] = {
        **taken.source,
        "file": file.name,
        "sha256": _sha256(file),
        "tensors": taken.mapped,
        "left_out": taken.left_out,
    }
    if labelling is not None:
        source["labels"] = said[0]
    training: dict[str, Any] = {"source": source}
    if ask.license:
        training["license"] = ask.license
    model = AudioModel(encoder, FrontEnd(taken.front_end), training, head, labelling)
    return Converted(model, taken.mapped, taken.left_out, [*notes, *taken.notes, *said[1:]])


def _unwrap(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """The content of a Lightning checkpoint as the network alone would have been saved; others as they are.

    Its tensors lie under "state_dict" with the name that the network has in its module, such as "model.", before each.

    Returns:
        the content, notes, and what else was in the file, with the reason why it is left out.
    """
    nest = content.get("state_dict")
    if not isinstance(nest, dict) or not (path.suffix == ".ckpt" or "pytorch-lightning_version" in content):
        return content, [], {}
    marks = [str(name) for name in nest if str(name).endswith("cls_token")]
    prefix = ""
    if len(marks) == 1:
        ends = (f"{hf_ast.PREFIX}embeddings.cls_token", "embeddings.cls_token", "v.cls_token", "backbone.cls_token")
        inner = next((end for end in ends if marks[0].endswith(end)), "cls_token")
        prefix = marks[0].removesuffix(inner).removesuffix("module.")
    others = [str(name) for name in content if name not in ("state_dict", "args")]
    beside = dict.fromkeys(others, "state of the training")
    held = {str(name).removeprefix(prefix): value for name, value in nest.items()}
    args = {"args": content["args"]} if "args" in content else {}
    notes = [f"a Lightning checkpoint: the network is what is called {prefix}*"] if prefix else []
    return {"state_dict": held, **args}, notes, beside


def _assumed(taken: Taken) -> list[str]:
    """A note where mean and std are AudioSet's for want of better, and what else is published for this many classes."""
    if PUBLISHED not in taken.source.get("statistics", ""):
        return []
    classes = None if taken.head is None else taken.head.state["linear.bias"].numel()
    told = f"mean {MEAN} and std {STD} are assumed, AudioSet's as published with the code: the file has none"
    if classes in (None, label_names.AUDIOSET):
        return [told]
    other = FINE_TUNED.get(classes)
    also = f", such as --mean {other[1]} --std {other[2]} for {other[0]}" if other else ""
    return [f"{told}; its {classes} classes are not AudioSet's: pass the --mean and --std of its recipe{also}"]


def _file(path: Path) -> Path | None:
    """The file of weights; None: a folder that asit wrote for Hugging Face."""
    if not path.is_dir():
        if (path.parent / "card.json").is_file():
            raise CheckpointError(
                f"{path} lies in an asit model folder, whose card says how it hears",
                "weights of another kind",
                f"use the folder as it is: {path.parent}",
            )
        return path
    inner = [place for place in (path, path / "model") if (place / "card.json").is_file()]
    if inner:
        raise CheckpointError(
            f"{inner[0]} is an asit model already", "weights of another kind", f"use it as it is: {inner[0]}"
        )
    kind = hf_ast.read_json(path / "config.json").get("model_type")
    if kind == "asit":
        return None
    if kind != hf_ast.MODEL_TYPE:
        raise CheckpointError(
            f"{path / 'config.json'} says model_type {safe_load.shown(str(kind))!r}, which asit does not support",
            f"{hf_ast.MODEL_TYPE!r} (AST) or 'asit'",
            "give a file of weights of one of the kinds " + ", ".join(KINDS),
        )
    return hf_ast.weights_in(path)


def _own(path: Path, ask: Ask) -> Converted:
    """A model of ours from a folder that was written for Hugging Face."""
    if ask != Ask(license=ask.license):
        raise ConfigError(
            f"{path} is a model of asit's for Hugging Face, and more than --out and --license is given",
            "a model that is taken as it is: its config.json says all",
            "leave the other options out",
        )
    model = load(path)
    if ask.license:
        model.training["license"] = ask.license
    head = 0 if model.head is None else len(model.head.state_dict())
    mapped = len(model.encoder.state_dict()) + head
    return Converted(model, mapped, {}, ["a model of asit's, written for Hugging Face: taken as it is"])


def _resize(taken: Taken, ask: Ask) -> list[str]:
    """Positions for another length, where asked for; what was done."""
    frames = whole(ask, taken.settings, taken.front_end)
    if frames is None or frames == taken.frames:
        return []
    before = taken.frames
    mels = taken.front_end.mels
    taken.state = positions.adapt(
        taken.state, taken.settings, taken.settings, old_frames=before, frames=frames, mels=mels
    )
    taken.frames = frames
    how = "those of the first columns" if frames < before else "stretched, bicubic"
    taken.source["positions"] = f"resized from {before} to {frames} frames: {how}"
    return [f"positions of {before} frames made into those of {frames}: {how}"]


def _encoder(path: Path, taken: Taken) -> Encoder:
    size = taken.settings, taken.frames, taken.front_end.mels
    check_fit(shell(*size), taken.state, str(path))  # before there is memory for an encoder of this size
    encoder = blank(*size)
    load_strict(encoder, taken.state, str(path))
    return encoder


def _head(path: Path, taken: Taken, ask: Ask) -> tuple[Head | None, Labelling | None, list[str]]:
    """The head, what its outputs mean, and what is to be told: first where the names are from."""
    if taken.head is None:
        asked = [name for name in ("labels", "answer", "pooling") if getattr(ask, name) not in (None, "auto")]
        if asked:
            raise ConfigError(
                f"{path} has no head that is taken over, and {', '.join('--' + name for name in asked)} is given",
                "a fine-tuned network, with a head",
                "leave it out, or give a fine-tuned file",
            )
        return None, None, [""]
    state = {name: value.float() for name, value in taken.head.state.items()}
    if state["linear.weight"].ndim != 2 or state["linear.bias"].shape != state["linear.weight"].shape[:1]:
        raise CheckpointError(
            f"{path} has a head of shape {tuple(state['linear.weight'].shape)}",
            "(classes, width)",
            "get the file again",
        )
    if ask.pooling not in ("auto", taken.head.pooling):
        raise ConfigError(
            f"--pooling {ask.pooling}, and the head of {path} reads {taken.head.pooling}",
            "what the head was trained on",
            "leave --pooling out",
        )
    names, origin = label_names.names_for(taken.head, ask.labels)
    notes = [f"{len(names)} classes, named by {origin}"]
    multi = taken.head.multi
    if ask.answer != "auto":
        multi = ask.answer == "multi"
    elif multi is None:
        multi = len(names) == label_names.AUDIOSET
        scores = "several classes a clip (sigmoids)" if multi else "one class a clip (softmax)"
        notes.append(
            f"{scores} is assumed of {len(names)} classes: else pass --answer {'single' if multi else 'multi'}"
        )
    width, pooling, norm = state["linear.weight"].shape[1], taken.head.pooling, "norm.weight" in state
    with torch.device("meta"):
        head = Head(width, len(names), pooling, norm=norm, norm_eps=taken.head.eps)
    head.to_empty(device="cpu")
    load_strict(head, state, f"{path} (its head)")
    front_end = FrontEnd(taken.front_end)
    seconds = front_end.samples_for(taken.frames) / front_end.settings.rate
    eps = taken.head.eps if norm else 1e-6
    return head, Labelling(names, multi, pooling, seconds, eps), [origin, *notes]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
