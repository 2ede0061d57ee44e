"""Loading a model from wherever it is: a folder of asit's, a run's, one for transformers, or a repository of the hub.

Nothing that is loaded is run: weights are safetensors, all else is JSON.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from asit.errors import CheckpointError, ConfigError
from asit.interop import huggingface
from asit.model.audio_model import AudioModel

OWN, THEIRS = ("card.json", "model.safetensors"), ("config.json", "preprocessor_config.json", "model.safetensors")
"""Files of a model as asit saves it, and as transformers does; the first of each tells that it is one."""

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(?:@([\w.\-/]+))?")


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
    """The model that a folder or a repository of the Hugging Face hub holds.

    Args:
        source: a model folder (RUN/model), a run's folder, a folder written by `asit export --to huggingface`, or the
            hub's "owner/name" or "owner/name@revision" (branch, tag or commit). A folder goes before a repository of
            the same name. A repository is fetched once into huggingface_hub's cache, its weights and JSON alone, and
            used from there without a network.
        device: where the model goes.

    Raises:
        CheckpointError: there is no such folder or repository, it may not be read, it holds no model of asit's, or
            its files are damaged.
        ConfigError: the hub is asked, and huggingface_hub is not installed.
    """
    folder = locate(source)
    model = AudioModel.load(folder) if (folder / OWN[0]).is_file() else huggingface.read(folder)
    return model.to(device)


def locate(source: str | os.PathLike[str]) -> Path:
    """The folder that holds the files of a model, after fetching them where the source is a repository of the hub.

    Args:
        source: as for `load`.

    Raises:
        CheckpointError, ConfigError: as `load`, but for what is in the files.
    """
    name = os.fsdecode(source)
    try:
        path = Path(name).expanduser()
        there, folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or of a user that is not there
        raise CheckpointError(
            f"{name[:200]} cannot be looked at: {error}", "a model's folder, or the hub's owner/name", "check the path"
        ) from error
    if folder:
        return _of_model(path)
    if there:
        raise CheckpointError(f"{path} is a file", "a model's folder, or the hub's owner/name", _instead(path))
    found = _HUB_ID.fullmatch(name) if isinstance(source, str) else None
    if found is None or Path(found[1]).parent.is_dir():  # "runs/first" beside a folder "runs" is a path
        raise CheckpointError(
            f"{name} does not exist",
            "a model's folder, such as RUN/model, or the hub's owner/name",
            "check the path" + _beside(path),
        )
    return _of_model(_fetched(found[1], found[2]))


def _instead(file: Path) -> str:
    """What to give instead of a file."""
    if any((file.parent / names[0]).is_file() and file.name in names for names in (OWN, THEIRS)):
        return f"give the folder that it lies in: {file.parent}"
    if file.suffix.lower() in (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".npz"):
        return f"weights of other projects are converted with: asit convert {file} --out DIR"
    return "give a model's folder, such as RUN/model"


def _of_model(folder: Path) -> Path:
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
        raise CheckpointError(
            f"{folder} is a run that has saved no model yet", "a run that is finished", "go on with it: --resume"
        )
    raise CheckpointError(
        f"{folder} holds no model: " + (", ".join(there[:5]) + (", ..." if len(there) > 5 else "") or "it is empty"),
        f"{' and '.join(OWN)} (asit's), or {', '.join(THEIRS)} (transformers')",
        "give a model's folder, such as RUN/model; weights of others are brought in with asit convert",
    )


def _beside(path: Path) -> str:
    """What lies where the path's last part was looked for."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return f": {parent} has {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else ""


def _fetched(repository: str, revision: str | None) -> Path:
    """The folder in huggingface_hub's cache that holds the repository's model files."""
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"there is no folder {repository}, and huggingface_hub, which would look on the hub, is not installed",
            "a model's folder, or the extra huggingface",
            "check the path, or: pip install 'asit-audio[huggingface]'",
        ) from error
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    named = repository if revision is None else f"{repository}@{revision}"
    missing: list[EntryNotFoundError] = []
    # What was fetched before is tried first: without a network huggingface_hub tries for long before it gives up.
    try:
        known = huggingface_hub.try_to_load_from_cache(repository, OWN[0], revision=revision)
    except HFValidationError as error:
        raise CheckpointError(
            f"there is no folder {repository}, and the hub has no such names: {_first_line(error)}",
            "a model's folder, or the hub's owner/name",
            "check the path",
        ) from error
    for names in (OWN, THEIRS) if isinstance(known, str) else (THEIRS, OWN):
        away = any(isinstance(error, LocalEntryNotFoundError) for error in missing)
        try:
            first = Path(_file(huggingface_hub, repository, names[0], revision, local_files_only=away))
        except EntryNotFoundError as error:
            missing.append(error)
            continue
        if names is THEIRS:
            huggingface.check(first)
        # The other files come from the commit that the first was of, whatever is pushed meanwhile.
        for name in names[1:]:
            try:
                _file(huggingface_hub, repository, name, first.parent.name)
            except EntryNotFoundError as error:
                _not_there(named, name, error)
        return first.parent
    _not_there(named, f"{THEIRS[0]} or {OWN[0]}", *missing)


def _file(hub: Any, repository: str, name: str, revision: str | None, local_files_only: bool = False) -> str:
    """The path of one file in the cache.

    Raises:
        huggingface_hub's EntryNotFoundError: the repository has no such file, or the cache has not and the network
            cannot be reached.
        CheckpointError: anything else that keeps it from coming.
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
            f"ask for access on its page of the hub, then log in (hf auth login): {_first_line(error)}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no folder {repository}, and the hub has no such repository, or not for you",
            "a model's folder, or the hub's owner/name",
            "check the name; for a private one log in first (hf auth login)",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repository} has no revision {revision}", "a branch, tag or commit of it", "leave out @ for the newest"
        ) from error
    except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
        raise CheckpointError(
            f"{name} of {named} could not be fetched: {type(error).__name__}: {_first_line(error)}",
            "a hub that answers, and room in the cache",
            "try again, or get the folder another way and give its path",
        ) from error


def _not_there(named: str, wanted: str, *errors: Exception) -> NoReturn:
    from huggingface_hub.errors import LocalEntryNotFoundError

    away = next((error for error in errors if isinstance(error, LocalEntryNotFoundError)), None)
    if away is not None:
        reason = away.__cause__ or away
        raise CheckpointError(
            f"there is no folder {named.partition('@')[0]}, the hub cannot be reached, and its cache does not have "
            f"{wanted} of {named} ({type(reason).__name__}: {_first_line(reason)})",
            "a network, or a repository that was fetched before",
            "check the name and the network (HF_HUB_OFFLINE keeps huggingface_hub from using it)",
        ) from away
    raise CheckpointError(
        f"{named} on the hub has no {wanted}",
        f"{', '.join(THEIRS)}, or {' and '.join(OWN)}",
        "give a repository that holds a model of asit's; fetch others yourself and bring them in with asit convert",
    ) from errors[0]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
