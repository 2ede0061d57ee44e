"""Find the files of a model that the user names: a path, a repository of the hub, or a short name of the registry."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asit.data.shards import tar_index
from asit.errors import CheckpointError
from asit.interop import hub_files, huggingface, model_registry
from asit.interop.convert import SourceOptions
from asit.interop.hub_files import OWN, THEIRS
from asit.io import parsing, storage
from asit.io.local_files import SUFFIXES

EXPECTED = (
    "a model's folder, such as RUN/model, a file of weights, a short name (asit models lists them), or the hub's "
    "owner/name"
)
_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*)(?:@(?P<revision>[\w.\-/]+))?(?::(?P<file>.+))?"
)
_SHORT = re.compile(r"[A-Za-z0-9][\w.\-]*")


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files of a model on this machine.

    Attributes:
        name: as the user named it.
        path: a folder of asit, or one that asit exported for Hugging Face; else what is to be converted: a file of
            weights, or a folder of another project.
        convertible: whether `path` is to be converted.
        origin: facts of where it comes from, for the card; none for a path.
        options: of the conversion, where the registry knows them.
    """

    name: str
    path: Path
    convertible: bool
    origin: dict[str, Any] = field(default_factory=dict)
    options: SourceOptions = field(default_factory=SourceOptions)


def find(source: str | os.PathLike[str]) -> ModelFiles:
    """Return the files of a model, fetched if necessary.

    A path that exists takes precedence over a short name and over a repository of the hub.

    Args:
        source: a model folder, a run's folder, a folder for transformers, or a file of weights; a short name of the
            registry; or "owner/name", "owner/name@revision" and "owner/name@revision:FILE" of the hub.

    Raises:
        CheckpointError: nothing has this name, or what has it is no model, or it cannot be fetched.
        ConfigError: huggingface_hub is needed and not installed.
        DownloadError: a file cannot be downloaded, or has another checksum than the published one.
    """
    name = os.fsdecode(source)
    try:
        path = Path(name).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # from Python 3.14 on `exists` hides all other errors too
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, or an unknown user
        raise CheckpointError(f"{name[:200]} cannot be accessed: {error}", EXPECTED, "check the path") from error
    if is_folder:
        return _folder(name, path)
    if exists:
        return ModelFiles(name=name, path=_weights(path), convertible=True)
    if isinstance(source, str):
        if name in model_registry.MODELS:
            return _registered(name)
        found = _HUB.fullmatch(name)
        if found is not None and not Path(found["repository"]).parent.is_dir():  # else it is a path
            return _of_hub(name, **found.groupdict())
    hint = model_registry.hint(name) if _SHORT.fullmatch(name) else ""
    raise CheckpointError(f"{name} does not exist{hint}", EXPECTED, "check the path" + _beside(path))


def is_recordings(source: str) -> bool:
    """Return whether this is recordings, not a model: a URL, a pattern, or a path that exists and holds no model."""
    path = Path(source).expanduser()
    if path.is_dir():
        signs = (OWN[0], f"model/{OWN[0]}", THEIRS[1], "rows.npy", "checkpoints")
        weights = any(entry.name.endswith(SUFFIXES) for entry in path.iterdir())
        return not weights and not any((path / name).exists() for name in signs)
    if path.exists():
        return not path.name.endswith((*SUFFIXES, OWN[0], THEIRS[0]))
    return storage.is_url(source) or tar_index.is_pattern(source)


def _registered(name: str) -> ModelFiles:
    """Return the files of a model of the registry."""
    known = model_registry.MODELS[name]
    if known.folder is not None:
        return ModelFiles(name=name, path=known.folder_path, convertible=False)
    if not known.automatic:
        raise CheckpointError(
            f"{name} ({known.title}) cannot be fetched by asit: {known.by_hand}",
            f"{known.file or 'the file of weights'}, downloaded by you from {known.page}",
            f"download it, then give its path in place of {name}",
        )
    if known.repository is not None:
        got = _of_hub(name, known.repository, known.revision, known.file)
    else:
        got = ModelFiles(name=name, path=model_registry.download(known), convertible=True, origin={"url": known.url})
    own = {"registry": name, "page": known.page, "license": known.license.value if known.license else None}
    origin = own | {fact: value for fact, value in got.origin.items() if value is not None}
    return dataclasses.replace(got, origin=origin, options=SourceOptions(kind=known.kind or "auto"))


def _of_hub(name: str, repository: str, revision: str | None, file: str | None) -> ModelFiles:
    got = hub_files.fetch(repository, revision, file)
    origin = {"repository": got.repository, "revision": got.revision, "license": got.license}
    return ModelFiles(name=name, path=got.path, convertible=got.path.is_file(), origin=origin)


def _folder(name: str, folder: Path) -> ModelFiles:
    if (folder / "rows.npy").is_file() and (folder / "vectors.npy").is_file():
        raise CheckpointError(
            f"{folder} is an index of recordings",
            "a model's folder, such as RUN/model",
            f"give the model that made it; to search the index: asit similar {folder} FILE",
        )
    if (folder / OWN[0]).is_file():
        return ModelFiles(name=name, path=folder, convertible=False)
    if (folder / THEIRS[0]).is_file():
        kind = parsing.json_object(folder / THEIRS[0], CheckpointError).get("model_type")
        return ModelFiles(name=name, path=folder, convertible=kind != huggingface.MODEL_TYPE)
    if (folder / "model" / OWN[0]).is_file():
        return ModelFiles(name=name, path=folder / "model", convertible=False)
    there = sorted(path.name for path in folder.iterdir())
    if "config.yaml" in there and "checkpoints" in there:
        raise CheckpointError(f"{folder} is a run that has saved no model yet", "a finished run", "resume it: --resume")
    weights = [one for one in there if one.endswith(SUFFIXES)]
    raise CheckpointError(
        f"{folder} holds no model: " + (", ".join(there[:5]) + (", ..." if len(there) > 5 else "") or "it is empty"),
        f"{' and '.join(OWN)} (asit's), or {', '.join(THEIRS)} (transformers')",
        f"give the file of weights: {folder / weights[0]}" if weights else "give a model's folder, such as RUN/model",
    )


def _weights(path: Path) -> Path:
    """Return a file that may be converted."""
    if any((path.parent / names[0]).is_file() and path.name in names for names in (OWN, THEIRS)):
        fix = f"give its folder: {path.parent}"
    elif path.suffix not in SUFFIXES:
        fix = "give a model's folder, such as RUN/model"
    else:
        return path
    raise CheckpointError(f"{path} is a file", EXPECTED, fix)


def _beside(path: Path) -> str:
    """List the folders beside a missing path."""
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    there = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return f": {parent} has {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}" if there else ""
