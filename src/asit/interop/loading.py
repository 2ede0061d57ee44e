"""Load a model from a model folder, a run, a folder for transformers, or a repository of the Hugging Face hub.

No code is executed: weights are safetensors, everything else is JSON.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from asit.errors import CheckpointError, ConfigError
from asit.interop import huggingface
from asit.model.audio_model import AudioModel

OWN, THEIRS = ("card.json", "model.safetensors"), ("config.json", "preprocessor_config.json", "model.safetensors")
"""Files of a model saved by asit and by transformers; the first of each identifies it."""

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(?:@([\w.\-/]+))?")


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
    """Load a model.

    Args:
        source: a model folder (RUN/model), a run's folder, a folder written by `asit export --to huggingface`, or the
            hub's "owner/name" or "owner/name@revision" (branch, tag or commit). A folder takes precedence over a
            repository of the same name. Weights and JSON of a repository are fetched once into huggingface_hub's cache
            and then used offline.
        device: of the model.

    Raises:
        CheckpointError: no such folder or repository, no access, no asit model in it, or damaged files.
        ConfigError: huggingface_hub is needed and not installed.
    """
    folder = locate(source)
    model = AudioModel.load(folder) if (folder / OWN[0]).is_file() else huggingface.read(folder)
    return model.to(device)


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a model's files, fetched if necessary; source and errors as for `load`."""
    name = os.fsdecode(source)
    try:
        path = Path(name).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # from Python 3.14 on `exists` hides all other errors too
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, or an unknown user
        raise CheckpointError(
            f"{name[:200]} cannot be accessed: {error}", "a model's folder, or the hub's owner/name", "check the path"
        ) from error
    if is_folder:
        return _model_folder(path)
    if exists:
        raise CheckpointError(f"{path} is a file", "a model's folder, or the hub's owner/name", _instead(path))
    found = _HUB_ID.fullmatch(name) if isinstance(source, str) else None
    if found is None or Path(found[1]).parent.is_dir():  # "runs/first" beside a folder "runs" is a path
        raise CheckpointError(
            f"{name} does not exist",
            "a model's folder, such as RUN/model, or the hub's owner/name",
            "check the path" + _beside(path),
        )
    return _model_folder(_fetched(found[1], found[2]))


def _instead(file: Path) -> str:
    """Return what to pass instead of a file."""
    if any((file.parent / names[0]).is_file() and file.name in names for names in (OWN, THEIRS)):
        return f"give its folder: {file.parent}"
    if file.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".npz"):
        return f"convert weights of other projects with: asit convert {file} --out DIR"
    return "give a model's folder, such as RUN/model"


def _model_folder(folder: Path) -> Path:
    if (folder / "rows.npy").is_file() and (folder / "vectors.npy").is_file():
        raise CheckpointError(
            f"{folder} is an index of recordings",
            "a model's folder, such as RUN/model",
            f"give the model that made it; to search the index: asit similar {folder} FILE",
        )
    if (folder / OWN[0]).is_file() or (folder / THEIRS[0]).is_file():
        return folder
    if (folder / "model" / OWN[0]).is_file():
        return folder / "model"
    there = sorted(path.name for path in folder.iterdir())
    if "config.yaml" in there and "checkpoints" in there:
        raise CheckpointError(f"{folder} is a run that has saved no model yet", "a finished run", "resume it: --resume")
    raise CheckpointError(
        f"{folder} holds no model: " + (", ".join(there[:5]) + (", ..." if len(there) > 5 else "") or "it is empty"),
        f"{' and '.join(OWN)} (asit's), or {', '.join(THEIRS)} (transformers')",
        "give a model's folder, such as RUN/model; convert other weights with asit convert",
    )


def _beside(path: Path) -> str:
    """List the folders beside a missing path."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return f": {parent} has {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else ""


def _fetched(repository: str, revision: str | None) -> Path:
    """Fetch a repository's model files; return their folder in huggingface_hub's cache."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"there is no folder {repository}, and huggingface_hub is not installed",
            "a model's folder, or the extra huggingface",
            "check the path, or: pip install 'asit-audio[huggingface]'",
        ) from error
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    named = repository if revision is None else f"{repository}@{revision}"
    missing: list[EntryNotFoundError] = []
    # Try cached files first: without a network huggingface_hub takes long to give up.
    try:
        known = huggingface_hub.try_to_load_from_cache(repository, OWN[0], revision=revision)
    except HFValidationError as error:
        raise CheckpointError(
            f"there is no folder {repository}, and it is no valid name on the hub: {_first_line(error)}",
            "a model's folder, or the hub's owner/name",
            "check the path",
        ) from error
    for names in (OWN, THEIRS) if isinstance(known, str) else (THEIRS, OWN):
        offline = any(isinstance(error, LocalEntryNotFoundError) for error in missing)
        try:
            first = Path(_file(huggingface_hub, repository, names[0], revision, local_files_only=offline))
        except EntryNotFoundError as error:
            missing.append(error)
            continue
        if names is THEIRS:
            huggingface.check(first)
        # Fetch the other files from the same commit.
        for name in names[1:]:
            try:
                _file(huggingface_hub, repository, name, first.parent.name)
            except EntryNotFoundError as error:
                _raise_missing(named, name, error)
        return first.parent
    _raise_missing(named, f"{THEIRS[0]} or {OWN[0]}", *missing)


def _file(hub: Any, repository: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
    """Fetch one file; return its path in the cache.

    Raises:
        EntryNotFoundError: of huggingface_hub: no such file, or it is not cached and the hub cannot be reached.
        CheckpointError: any other failure.
    """
    from huggingface_hub import errors

    named = repository if revision is None else f"{repository}@{revision}"
    try:
        path: str = hub.hf_hub_download(repository, name, revision=revision, local_files_only=local_files_only)
        return path
    except errors.EntryNotFoundError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{named} is gated: its owner decides who may read it",
            "access to it",
            f"request access on its hub page, then log in (hf auth login): {_first_line(error)}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repository}, and the hub has no such repository, or it is private",
            "a model's folder, or the hub's owner/name",
            "check the name; log in for a private one (hf auth login)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision}", "a branch, tag or commit of it", "omit @ for the newest"
        ) from error
    except Exception as error:  # of huggingface_hub's HTTP library, which varies
        raise CheckpointError(
            f"{name} of {named} could not be fetched: {type(error).__name__}: {_first_line(error)}",
            "access to the hub, and space in the cache",
            "try again, or download the folder yourself and give its path",
        ) from error


def _raise_missing(named: str, wanted: str, *errors: Exception) -> NoReturn:
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = next((error for error in errors if isinstance(error, LocalEntryNotFoundError)), None)
    if offline is not None:
        reason = offline.__cause__ or offline
        raise CheckpointError(
            f"there is no folder {named.partition('@')[0]}, the hub cannot be reached, and its cache does not have "
            f"{wanted} of {named} ({type(reason).__name__}: {_first_line(reason)})",
            "a network, or a repository that was fetched before",
            "check the name and the network (HF_HUB_OFFLINE keeps huggingface_hub from using it)",
        ) from offline
    raise CheckpointError(
        f"{named} on the hub has no {wanted}",
        f"{', '.join(THEIRS)}, or {' and '.join(OWN)}",
        "give a repository with an asit model; download others and use asit convert",
    ) from errors[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
