"""Weights and run states on disk: written whole or not at all, versioned, and checked when read.

A model folder holds `model.safetensors` and `card.json`; a run state `step-00000123/` holds `state.safetensors` and
`state.json`. The JSON carries the format's version and the SHA-256 of the tensors beside it, so a truncated or altered
file is met at loading and not in the results. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from asit.errors import CheckpointError, ConfigError
from asit.io import atomic, parsing

FORMAT = 1
"""Version of the layout of model folders and run states; readers refuse newer ones."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_STATE = re.compile(r"step-(\d{8,})")


def write_folder(target: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Make the folder `target` atomically.

    `write` fills a hidden temporary neighbour, which is brought to the disk and then renamed, so that a crash at any
    moment leaves either the old folder or the new one. Left-overs of killed writers are removed. Several writers of
    one target do not disturb each other: with `overwrite` the last one to end replaces the others' folder, else the
    first one to end has written it and the others raise.

    Args:
        target: the folder to make; its parents are made too. An empty folder counts as absent.
        write: is given the temporary folder and puts everything in it.
        overwrite: replace what is there.

    Raises:
        CheckpointError: target exists and overwrite is off, the disk is full, or the place may not be written.
    """
    temporary = atomic.draft_of(target)
    replaced: list[Path] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.bring_back(target)
        if not overwrite and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise _exists(target)
        atomic.sweep(target.parent)
        temporary.mkdir()
        write(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        _take_name(temporary, target, overwrite, replaced)
        _fsync(target.parent)
        for aside in replaced:
            doomed = atomic.draft_of(target)  # a folder half deleted must not be brought back
            with contextlib.suppress(FileNotFoundError):
                aside.rename(doomed)
                atomic.remove(doomed)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced and replaced[-1].exists() and not target.exists():
            replaced[-1].rename(target)
        if refused := _refusal(error, target):
            raise refused from error
        raise


def _take_name(temporary: Path, target: Path, overwrite: bool, replaced: list[Path]) -> None:
    """Rename a finished folder to its target; what was there is renamed, noted in `replaced` before."""
    while True:
        if overwrite and target.exists():
            replaced.append(atomic.draft_of(target, "old"))
            with contextlib.suppress(FileNotFoundError):  # another writer has renamed it
                target.rename(replaced[-1])
        try:
            temporary.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not overwrite:
                raise _exists(target) from None
            # Another writer's folder has come there since: replace that one.


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(
        f"{target} already exists", "a path that is free", "give another path, or ask for it to be overwritten"
    )


def write_file(target: Path, write: Callable[[Path], None], overwrite: bool = False) -> None:
    """Make the file `target` atomically, as `write_folder` does a folder; its folder is made too.

    Args:
        target: the file to make.
        write: is given a temporary neighbour with the same ending, and fills it. What it raises goes on to the caller.
        overwrite: replace what is there.

    Raises:
        ConfigError: as `check_free`.
        CheckpointError: the disk is full, or the place may not be written.
    """
    check_free(target, overwrite)
    temporary = atomic.draft_of(target, ending=target.suffix)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(target.parent)
        write(temporary)
        _fsync(temporary)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if refused := _refusal(error, target):
            raise refused from error
        raise


def check_free(target: Path, overwrite: bool) -> None:
    """Say so before any work is done where the file `target` may not be written.

    Raises:
        ConfigError: it is a folder, or exists and overwrite is off.
    """
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", "the path of a file", f"give one in it, such as {target / 'model'}")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} already exists", "a path that is free", "give another path, or pass --overwrite")


def is_full(error: BaseException) -> bool:
    """Whether it says that a disk is full, or a user's share of it."""
    return _errno(error) in _FULL


def _refusal(error: BaseException, target: Path) -> CheckpointError | None:
    """The error for a user where the disk refused, or None."""
    number = _errno(error)
    if number in _FULL:
        return CheckpointError(
            f"the disk is full: {target} was not written",
            f"room for all of it{'; what was there before is untouched' if target.exists() else ''}",
            f"free space on the disk of {target.parent}, or write elsewhere",
        )
    if number in _FORBIDDEN:
        return CheckpointError(
            f"{target} may not be written: {error}",
            "a folder that this user may write",
            "give another path, or change the folder's permissions",
        )
    return None


def save_model(folder: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a model folder; `card` may hold any JSON fields, and gets `format`, `asit` and `sha256`.

    Raises:
        CheckpointError: as `write_folder`.
    """
    write_folder(folder, lambda to: _write_pair(to, "model.safetensors", "card.json", tensors, card), overwrite)


def load_model(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the card of a model folder.

    Raises:
        CheckpointError: no such folder, a file is missing, damaged or altered, or the format is newer than this reader.
    """
    folder = Path(folder)
    if not (folder / "card.json").exists() and (folder / "model" / "card.json").exists():
        raise CheckpointError(
            f"{folder} is a run's folder", "a model folder, with card.json in it", f"give {folder / 'model'}"
        )
    return _read_pair(
        folder, "model.safetensors", "card.json", "copy the model folder again from where it was saved, whole"
    )


def save_state(root: Path, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], keep: int) -> Path:
    """Write a run state `root/step-00000123` and keep the newest `keep` up to this step.

    Older ones are removed only after the new one is on the disk. States of later steps are left alone: they belong to
    another course of the run, and only a person can tell which is wanted.

    Args:
        root: the run's folder of checkpoints.
        step: steps done.
        tensors: everything that is a tensor, flat.
        meta: JSON fields; numbers come back exactly, NaN and infinity are refused (ValueError).
        keep: states kept, at least 1.

    Raises:
        CheckpointError: as `write_folder`.
    """
    target = root / f"step-{step:08d}"
    atomic.tidy(root)
    write_folder(target, lambda to: _write_pair(to, "state.safetensors", "state.json", tensors, meta), overwrite=True)
    until = [state for state in list_states(root) if step_of(state) <= step]
    for old in until[: -max(keep, 1)]:
        # Renamed first, so that a state half removed is never taken for a state.
        doomed = atomic.draft_of(old)
        old.rename(doomed)
        shutil.rmtree(doomed)
    return target


def list_states(root: Path) -> list[Path]:
    """The run states under `root`, oldest first; empty where there are none. Names only: nothing is read."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _STATE.fullmatch(p.name) and p.is_dir()), key=step_of)


def latest_state(root: Path) -> Path | None:
    """The run state of the highest step under `root`, or None."""
    return next(reversed(list_states(root)), None)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON fields of a run state.

    Raises:
        CheckpointError: a file is missing, damaged or altered, or of a newer format, or its field "step" is not that
            of its folder; names the next older state.
    """
    older = [s for s in list_states(path.parent) if _STATE.fullmatch(path.name) and step_of(s) < step_of(path)]
    remedy = (
        f"remove {path} and resume again, from {older[-1]}"
        if older
        else f"remove {path} and start the run anew: there is no older state beside it"
    )
    tensors, meta = _read_pair(path, "state.safetensors", "state.json", remedy)
    step = meta.get("step", step_of(path) if _STATE.fullmatch(path.name) else 0)
    if _STATE.fullmatch(path.name) and (type(step) is not int or step != step_of(path)):
        raise CheckpointError(
            f"{path / 'state.json'} says step {step!r}, and its folder is {path.name}",
            f"step {step_of(path)}: a state lies in the folder of its own step",
            f"give the folder its name back, or {remedy}",
        )
    return tensors, meta


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load `tensors` into `module`, every name and shape equal, or nothing at all.

    Args and errors are those of `check_fit` and `check_numbers`.
    """
    check_fit(module, tensors, what)
    check_numbers(what, tensors)
    module.load_state_dict(dict(tensors))


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Check that every name and shape of `tensors` is that of `module`, which may be on the meta device.

    Args:
        what: the name of the weights in the error, such as the path they came from.

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
    """Refuse weights that no training gives: whole numbers, and numbers that are not finite in float32.

    Args:
        what: the name of the weights in the error, such as the path they came from.

    Raises:
        CheckpointError: names the tensors.
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
    safetensors.torch.save_file(_apart(tensors), folder / weights)
    full = {**card, "format": FORMAT, "asit": _version(), "sha256": _sha256(folder / weights)}
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
            f"format {FORMAT} or older, which asit {_version()} reads",
            "upgrade asit: pip install --upgrade asit-audio",
        )
    if _sha256(folder / weights) != digest:
        raise CheckpointError(
            f"{folder / weights} is damaged: its SHA-256 is not the one in {facts}",
            f"SHA-256 {str(digest)[:64]}",
            remedy,
        )
    return read_tensors(folder / weights, remedy), card


def read_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: it cannot be read; `remedy` is the fix that the message names.
    """
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, RuntimeError, TypeError, MemoryError) as error:
        # A kind of number that torch has not is a KeyError; a shape that cannot be, a RuntimeError of torch.
        raise CheckpointError(f"{path} is damaged: {error}", "a safetensors file", remedy) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory, as safetensors wants them."""
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("asit-audio")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return "unknown"


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors writes in Rust and passes the system's number on in its text alone.
    if isinstance(error, safetensors.SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        return int(found[1])
    return None


def step_of(path: Path) -> int:
    """Steps done at a run state."""
    return int(path.name.removeprefix("step-"))


def _fsync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
