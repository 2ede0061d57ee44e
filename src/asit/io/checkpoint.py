"""Checkpoints: model folders and run states, written atomically, versioned, and checked when read.

A model folder holds `model.safetensors` and `card.json`; a run state `step-00000123/` holds `state.safetensors` and
`state.json`. The JSON has the format's version and the SHA-256 of the tensors. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from asit import __version__
from asit.errors import CheckpointError
from asit.io import atomic, parsing
from asit.io.local_files import sha256

FORMAT = 1
"""Version of the layout of model folders and run states; readers refuse newer ones."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_STATE = re.compile(r"step-(\d{8,})")


Heads = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors and settings of the heads of pretraining."""


def save_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
    overwrite: bool = False,
    heads: Heads | None = None,
) -> None:
    """Write a model folder; `card` may hold any JSON fields, and gets `format`, `asit` and `sha256`.

    Raises:
        CheckpointError: as `asit.io.atomic.write_folder`.
    """
    with atomic.write_folder(folder, overwrite=overwrite) as draft:
        _write_pair(draft, "model.safetensors", "card.json", tensors, card)
        if heads is not None:
            _write_pair(draft, "heads.safetensors", "heads.json", heads[0], {"settings": heads[1]})


def load_heads(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and settings of the heads that a model folder keeps; None: it keeps none.

    Raises:
        CheckpointError: a file is missing, damaged or altered, or the format is newer than this reader.
    """
    if not (folder / "heads.json").exists():
        return None
    remedy = "copy the complete model folder again from where it was saved"
    tensors, facts = _read_pair(folder, "heads.safetensors", "heads.json", remedy)
    settings = facts.get("settings")
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{folder / 'heads.json'} is damaged: it has no settings", "settings of the heads", remedy
        )
    return tensors, settings


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the card of a model folder.

    Raises:
        CheckpointError: no such folder, a file is missing, damaged or altered, or the format is newer than this reader.
    """
    folder = Path(folder)
    if not (folder / "card.json").exists() and (folder / "model" / "card.json").exists():
        raise CheckpointError(
            f"{folder} is a run's folder", "a model folder, with card.json in it", f"give {folder / 'model'}"
        )
    return _read_pair(
        folder, "model.safetensors", "card.json", "copy the complete model folder again from where it was saved"
    )


def save_state(root: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    """Write a run state `root/step-00000123` and keep the newest `keep` up to this step.

    Older ones are removed only after the new one is on the disk. States of later steps are kept, since only a person
    can decide which course of the run is wanted.

    Args:
        root: the run's folder of checkpoints.
        step: steps done.
        tensors: by name.
        meta: JSON fields; numbers are restored exactly, NaN and infinity raise ValueError.
        keep: at least 1.

    Raises:
        CheckpointError: as `asit.io.atomic.write_folder`.
    """
    target = root / f"step-{step:08d}"
    atomic.sweep(root, locked=True)
    with atomic.write_folder(target, overwrite=True) as draft:
        _write_pair(draft, "state.safetensors", "state.json", tensors, meta)
    until = [state for state in list_states(root) if step_of(state) <= step]
    for old in until[: -max(keep, 1)]:
        atomic.delete_folder(old)
    return target


def list_states(root: Path) -> list[Path]:
    """Return the run states under `root`, oldest first, by their names alone."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _STATE.fullmatch(p.name) and p.is_dir()), key=step_of)


def latest_state(root: Path) -> Path | None:
    """Return the run state of the highest step under `root`, or None."""
    return next(reversed(list_states(root)), None)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors (on the CPU) and the JSON fields of a run state.

    Raises:
        CheckpointError: a file is missing, damaged or altered, of a newer format or of another step than its folder;
            names the next older state.
    """
    older = [s for s in list_states(path.parent) if _STATE.fullmatch(path.name) and step_of(s) < step_of(path)]
    remedy = (
        f"remove {path} and resume again, from {older[-1]}"
        if older
        else f"remove {path} and start the run again: there is no older state beside it"
    )
    tensors, meta = _read_pair(path, "state.safetensors", "state.json", remedy)
    step = meta.get("step", step_of(path) if _STATE.fullmatch(path.name) else 0)
    if _STATE.fullmatch(path.name) and (type(step) is not int or step != step_of(path)):
        raise CheckpointError(
            f"{path / 'state.json'} says step {step!r}, and its folder is {path.name}",
            f"step {step_of(path)}: a state in the folder of its own step",
            f"give the folder its name back, or {remedy}",
        )
    return tensors, meta


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module` if all names and shapes are equal; see `check_fit` and `check_numbers`."""
    check_fit(module, tensors, what)
    check_numbers(what, tensors)
    module.load_state_dict(dict(tensors))


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that all names and shapes of `tensors` are those of `module`, which may be on the meta device.

    Args:
        what: the name of the weights in the error, such as their path.

    Raises:
        CheckpointError: names the first missing, unexpected and wrong-shaped tensors, with counts.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in own if name not in tensors]
    unexpected = [name for name in tensors if name not in own]
    shaped = [
        f"{name} {tuple(tensors[name].shape)} instead of {shape}"
        for name, shape in own.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unexpected or shaped:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
            if names
        ]
        raise CheckpointError(
            f"{what} does not fit the {type(module).__name__}: " + "; ".join(parts),
            f"the {len(own)} tensors of this {type(module).__name__}: probably a checkpoint of another size",
            "use the settings that the checkpoint was made with, or another checkpoint",
        )


def check_numbers(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not floating-point or not finite in float32.

    Raises:
        CheckpointError: names `what`, such as a path, and the tensors.
    """
    odd = [f"{name} of {value.dtype}" for name, value in tensors.items() if value.dtype not in _FLOATS]
    if odd:
        raise CheckpointError(
            f"{what} has {len(odd)} tensors that are no plain floating-point numbers ({', '.join(odd[:3])})",
            "weights in float32, float16, bfloat16 or float64",
            "take the file from before it was quantised",
        )
    bad = [name for name, value in tensors.items() if not (value.is_meta or value.float().isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{what} has {len(bad)} tensors with numbers that are not finite ({', '.join(bad[:3])})",
            "finite weights",
            "take an earlier checkpoint: this one is of a training that diverged",
        )


def _write_pair(folder: Path, weights: str, facts: str, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    safetensors.torch.save_file(_unshared(tensors), folder / weights)
    full = {**card, "format": FORMAT, "asit": __version__, "sha256": sha256(folder / weights)}
    (folder / facts).write_text(json.dumps(full, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_pair(folder: Path, weights: str, facts: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    expected = f"a folder with {weights} and {facts}"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist", expected)
    absent = [name for name in (facts, weights) if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder} has no {' and no '.join(absent)}", expected, remedy)
    card = parsing.json_object(folder / facts, CheckpointError, "JSON with the fields format and sha256", remedy)
    lacks = [name for name in ("format", "sha256") if name not in card]
    if lacks:
        raise CheckpointError(
            f"{folder / facts} is damaged: it has no {' and no '.join(lacks)}",
            "JSON with the fields format and sha256",
            remedy,
        )
    version, digest = card["format"], card["sha256"]
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise CheckpointError(
            f"{folder} has format {version!r}, written by asit {card.get('asit', 'unknown')}",
            f"format {FORMAT} or older, which asit {__version__} reads",
            "upgrade asit: pip install --upgrade asit-audio",
        )
    if sha256(folder / weights) != digest:
        raise CheckpointError(
            f"{folder / weights} is damaged: its SHA-256 is not the one in {facts}",
            f"SHA-256 {str(digest)[:64]}",
            remedy,
        )
    return read_tensors(folder / weights, remedy), card


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it cannot be read; `remedy` is its fix.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        # A kind of number that torch has not is a KeyError; a shape that cannot be, a RuntimeError of torch.
        raise CheckpointError(f"{path} is damaged: {error}", "a safetensors file", remedy) from error


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous, none sharing memory, as safetensors requires."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def step_of(path: Path) -> int:
    """Return the steps done at a run state."""
    return int(path.name.removeprefix("step-"))
