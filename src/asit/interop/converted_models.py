"""Models converted from other projects' files, each once, in a cache under XDG_CACHE_HOME (`asit/models`).

A cached model is found by the SHA-256 of what it was made of: the files, their origin, the options, and the code of the
conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from asit import __version__
from asit.errors import AsitError, CheckpointError
from asit.interop import convert as conversion
from asit.interop.convert import Converted, SourceOptions, hf_ast
from asit.interop.hub_files import OWN, THEIRS
from asit.interop.model_names import ModelFiles
from asit.io.local_files import cache_folder, sha256

log = logging.getLogger(__name__)


def convert_files(files: ModelFiles, options: SourceOptions) -> Converted:
    """Convert the files of a named model, with its origin and licence in the card.

    Args:
        files: of `model_names.find`.
        options: as `convert`.

    Raises:
        CheckpointError, ConfigError: as `convert`.
    """
    done = conversion.convert(files.path, options)
    origin = {name: value for name, value in files.origin.items() if value is not None}
    license = origin.pop("license", None)
    source = done.model.training.get("source", {})
    if origin:
        done.model.training["source"] = origin | source
    if license and "license" not in done.model.training:
        done.model.training["license"] = license
    return done


def folder_of(files: ModelFiles) -> Path:
    """Return the model folder of a named model, converted where that has not been done before.

    Raises:
        CheckpointError: the files cannot be converted, or the cache cannot be written.
        ConfigError: the conversion needs options.
    """
    folder = cache_folder("models") / _key(files)
    if (folder / OWN[0]).is_file():
        log.info(f"{files.name} was converted before: {folder} (what was assumed: asit info {folder})")
        return folder
    try:
        done = convert_files(files, dataclasses.replace(files.options, keep_heads=None))
    except AsitError as error:
        fix = f"{error.remedy}; options are given to: asit convert {files.name} --out MODEL"
        raise type(error)(error.found, error.expected, fix.removeprefix("; ")) from error
    try:
        done.save(folder)
    except CheckpointError as error:
        if (folder / OWN[0]).is_file():  # another process was first
            return folder
        raise CheckpointError(
            f"the converted model cannot be kept: {error.found}",
            "a cache folder that can be written, with space",
            f"set XDG_CACHE_HOME to one, or: asit convert {files.name} --out MODEL",
        ) from error
    log.info(f"{files.name}: {done.mapped} tensors converted, {len(done.left_out)} entries left out; kept in {folder}")
    return folder


def _key(files: ModelFiles) -> str:
    folder = files.path if files.path.is_dir() else files.path.parent
    weights = hf_ast.weights_in(folder) if files.path.is_dir() else files.path
    beside = [folder / name for name in THEIRS[:2]]
    facts: dict[str, Any] = {
        "files": {path.name: sha256(path) for path in [weights, *beside] if path.is_file()},
        "origin": files.origin,
        "options": dataclasses.asdict(files.options),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Return the version of the conversion: of asit, and the SHA-256 of its modules."""
    modules = sorted(Path(conversion.__file__).parent.glob("*.py"))
    return f"{__version__} {hashlib.sha256(b''.join(path.read_bytes() for path in modules)).hexdigest()}"
