"""Load a model from a model folder, a run, a folder for transformers, or a repository of the Hugging Face hub.

No code is executed: weights are safetensors, everything else is JSON.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

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
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetched(name: str, revision: str | None) -> Path:
        # After one failure to reach the hub only the cache is asked: huggingface_hub takes long to give up.
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision, local_files_only=offline))

    named = repository if revision is None else f"{repository}@{revision}"
    offline, missing, wanted = False, list[EntryNotFoundError](), f"{THEIRS[0]} or {OWN[0]}"
    try:
        known = huggingface_hub.try_to_load_from_cache(repository, OWN[0], revision=revision)
        for names in (OWN, THEIRS) if isinstance(known, str) else (THEIRS, OWN):
            try:
                first = fetched(names[0], revision)
            except EntryNotFoundError as error:
                missing.append(error)
                offline = offline or isinstance(error, LocalEntryNotFoundError)
                continue
            if names is THEIRS:
                huggingface.check(first)
            for wanted in names[1:]:  # from the same commit
                fetched(wanted, first.parent.name)
            return first.parent
        raise next((error for error in missing if isinstance(error, LocalEntryNotFoundError)), missing[0])
    except CheckpointError:
        raise
    except Exception as error:  # of huggingface_hub or its HTTP library, which varies
        raise CheckpointError(*_explained(error, repository, named, wanted)) from error


def _explained(error: Exception, repository: str, named: str, wanted: str) -> tuple[str, str, str]:
    """Return what was found, what is expected and the fix for a failure to fetch the file `wanted`."""
    from huggingface_hub import errors

    either, reason = "a model's folder, or the hub's owner/name", error.__cause__ or error
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
    match error:
        case errors.HFValidationError():
            found = f"there is no folder {repository}, and it is no valid name on the hub: {first_line}"
            return found, either, "check the path"
        case errors.GatedRepoError():
            fix = f"request access on its hub page, then log in (hf auth login): {first_line}"
            return f"{named} is gated: its owner decides who may read it", "access to it", fix
        case errors.RepositoryNotFoundError():
            found = f"there is no folder {repository}, and the hub has no such repository, or it is private"
            return found, either, "check the name; log in for a private one (hf auth login)"
        case errors.RevisionNotFoundError():
            found = f"{repository} has no revision {named.partition('@')[2] or 'main'}"
            return found, "a branch, tag or commit of it", "omit @ for the newest"
        case errors.LocalEntryNotFoundError():
            found = f"there is no folder {repository}, the hub cannot be reached, and its cache does not have"
            return (
                f"{found} {wanted} of {named} ({type(reason).__name__}: {first_line})",
                "a network, or a repository that was fetched before",
                "check the name and the network (HF_HUB_OFFLINE keeps huggingface_hub from using it)",
            )
        case errors.EntryNotFoundError():
            files = f"{', '.join(THEIRS)}, or {' and '.join(OWN)}"
            fix = "give a repository with an asit model; download others and use asit convert"
            return f"{named} on the hub has no {wanted}", files, fix
    found = f"{wanted} of {named} could not be fetched: {type(reason).__name__}: {first_line}"
    return found, "access to the hub, and space in the cache", "try again, or download the folder and give its path"
