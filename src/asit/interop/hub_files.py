"""Fetch the files of a model from a repository of the Hugging Face hub, into huggingface_hub's cache; never code.

The repository's list of files decides what is fetched. Without a network, what was fetched before is used.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from asit.errors import CheckpointError, ConfigError
from asit.interop import huggingface
from asit.interop.convert import MODEL_TYPES, hf_ast
from asit.io import parsing, safe_load
from asit.io.local_files import SUFFIXES, sha256

log = logging.getLogger(__name__)

OWN, THEIRS = ("card.json", "model.safetensors"), ("config.json", "preprocessor_config.json", "model.safetensors")
"""Files of a model saved by asit and by transformers; the first of each identifies it."""

_STATE = re.compile(r"(optimizer|scheduler|scaler|rng_state.*|training_args|random_states_.*)\.\w+")
"""Files of a training state beside the weights."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.\w+$")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_README = "README.md"
_MOST = 8  # names in a message
_ATTEMPTS = 4  # to fetch a file


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """What was fetched of a repository.

    Attributes:
        path: a model folder, or the file of weights to convert, beside its configuration.
        repository: owner/name.
        revision: the commit.
        license: as its README.md says; None: it says nothing.
    """

    path: Path
    repository: str
    revision: str
    license: str | None


def fetch(repository: str, revision: str | None = None, file: str | None = None) -> HubFiles:
    """Fetch the files of a repository's model.

    Args:
        repository: owner/name.
        revision: branch, tag or commit; None: main.
        file: path of the weights in the repository; None: the only ones, or those in safetensors.

    Raises:
        CheckpointError: no such repository, revision or file, no access, no network and nothing fetched before, no
            usable weights, several, or another content than the hub's checksum says.
        ConfigError: huggingface_hub is needed and not installed.
    """
    named = repository if revision is None else f"{repository}@{revision}"
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"there is no folder {repository}, and huggingface_hub is not installed",
            "a model's folder, or the extra huggingface",
            "check the path, or: pip install 'asit-audio[huggingface]'",
        ) from error
    try:
        return _fetch(_Repository(repository, revision, named), file)
    except CheckpointError:
        raise
    except Exception as error:  # of huggingface_hub or its HTTP library, which varies
        raise CheckpointError(*_explained(error, repository, named)) from error


class _Repository:
    """A repository at a revision: from the hub, or where it cannot be reached from the cache.

    Attributes:
        names: of its files; without the hub, those that were fetched before.
        commit: the commit, once a file was fetched.
        where: "on the hub", or in the cache alone, for messages.
    """

    def __init__(self, repository: str, revision: str | None, named: str) -> None:
        import huggingface_hub
        from huggingface_hub import errors

        self.repository, self.revision, self.named = repository, revision, named
        self._folder: Path | None = None
        try:
            listed = huggingface_hub.HfApi().model_info(repository, revision=revision)
            self.names = [one.rfilename for one in listed.siblings or []]
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError):
            raise
        except Exception as reason:  # not reached, switched off, or failing
            try:
                folder = huggingface_hub.snapshot_download(
                    repository, revision=revision, local_files_only=True, allow_patterns=[]
                )
            except errors.LocalEntryNotFoundError as absent:
                raise absent from reason
            self._folder = Path(folder)
            self.names = [path.relative_to(folder).as_posix() for path in self._folder.rglob("*") if path.is_file()]
        self.commit: str | None = None if self._folder is None else self._folder.name
        self.where = "on the hub" if self._folder is None else "in the cache (the hub cannot be reached)"

    def get(self, name: str) -> Path:
        """Fetch a file, from the commit of the first one, and return its path."""
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        if self._folder is not None:
            return self._folder / name
        for left in reversed(range(_ATTEMPTS)):
            try:
                found = huggingface_hub.hf_hub_download(self.repository, name, revision=self.commit or self.revision)
                break
            except (HfHubHTTPError, LocalEntryNotFoundError):
                raise
            except Exception as error:  # the connection broke, and huggingface_hub resumes in another call
                if not left:
                    raise
                log.info(f"{name} of {self.named}: {type(error).__name__}, trying again")
        path = Path(found)
        if self.commit is None:
            self.commit = path.parents[len(PurePosixPath(name).parts) - 1].name
        return path


def _fetch(of: _Repository, file: str | None) -> HubFiles:
    if file is None and OWN[0] in of.names:
        card, _ = [_required(of, name) for name in OWN]
        return HubFiles(path=card.parent, repository=of.repository, revision=str(of.commit), license=None)
    config: dict[str, Any] = {}
    beside = PurePosixPath(file or "").parent
    if (name := str(beside / THEIRS[0])) in of.names:
        config = parsing.json_object(of.get(name), CheckpointError)
    kind = config.get("model_type")
    if file is None and kind == huggingface.MODEL_TYPE:
        first, *_ = [_required(of, name) for name in THEIRS]
        return HubFiles(path=first.parent, repository=of.repository, revision=str(of.commit), license=None)
    if file is None and kind is not None and kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{of.named} {of.where} is of model_type {safe_load.shown(str(kind))!r}, which asit does not read; it has "
            + _some(of.names),
            f"model_type {huggingface.MODEL_TYPE!r}, {', '.join(map(repr, MODEL_TYPES))}, or weights without one",
            f"if asit convert reads its file of weights, name that: {of.named}:FILE",
        )
    weights = of.get(_weights(of, file))
    _check_sum(of.named, weights)
    if (name := str(beside / THEIRS[1])) in of.names:
        of.get(name)
    return HubFiles(path=weights, repository=of.repository, revision=str(of.commit), license=_license(of))


def _required(of: _Repository, name: str) -> Path:
    if name not in of.names:
        files = f"{', '.join(THEIRS)}, or {' and '.join(OWN)}"
        raise CheckpointError(
            f"{of.named} {of.where} has no {name}; it has {_some(of.names)}",
            files,
            "give a repository with the whole model",
        )
    return of.get(name)


def _weights(of: _Repository, file: str | None) -> str:
    """Return the name of the file of weights to fetch."""
    there = [name for name in of.names if name.endswith(SUFFIXES) and not _STATE.fullmatch(PurePosixPath(name).name)]
    if file is not None:
        if file in there:
            return file
        raise CheckpointError(
            f"{of.named} {of.where} has no file of weights {file}; it has {_some(there or of.names)}",
            "a file ending in " + ", ".join(SUFFIXES),
            f"name one of its files: {of.named}:FILE",
        )
    whole = [name for name in there if not _SHARD.search(name)]
    if not whole:
        parts = ", in parts, which asit does not read" if there else ""
        raise CheckpointError(
            f"{of.named} {of.where} has no file of weights{parts}; it has {_some(of.names)}",
            f"{THEIRS[-1]}, or a file ending in " + ", ".join(SUFFIXES),
            "give a repository with weights that asit convert reads (docs/models.md)",
        )
    for fixed in hf_ast.WEIGHTS:
        if fixed in whole:
            return fixed
    best = [name for name in whole if name.endswith(SUFFIXES[0])] or whole
    if len(best) > 1:
        raise CheckpointError(
            f"{of.named} {of.where} has {len(best)} files of weights: {_some(best)}",
            "one of them",
            f"name it: {of.named}:{best[0]}",
        )
    return best[0]


def _check_sum(named: str, path: Path) -> None:
    """Compare a large file with the checksum by which the hub, and its cache, name it."""
    stored = path.resolve()
    if _SHA256.fullmatch(stored.name) and (found := sha256(stored)) != stored.name:
        raise CheckpointError(
            f"{path.name} of {named} has the SHA-256 {found[:16]}...",
            f"{stored.name[:16]}..., as the hub says",
            f"delete {stored} and run the same command, which fetches it again",
        )


def _license(of: _Repository) -> str | None:
    """Return the licence in the front matter of a repository's README.md."""
    import huggingface_hub

    if _README not in of.names:
        return None
    with contextlib.suppress(Exception):  # a README without front matter, or with a damaged one
        facts = huggingface_hub.metadata_load(of.get(_README)) or {}
        found = facts.get("license_name") if facts.get("license") == "other" else facts.get("license")
        return found if isinstance(found, str) else None
    return None


def _some(names: list[str]) -> str:
    shown = sorted(name for name in names if not name.startswith("."))
    return ", ".join(shown[:_MOST]) + (", ..." if len(shown) > _MOST else "") or "no files"


def _explained(error: Exception, repository: str, named: str) -> tuple[str, str, str]:
    """Return what was found, what is expected and the fix for a failure to fetch."""
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
                f"{found} {named} ({type(reason).__name__}: {first_line})",
                "a network, or a repository that was fetched before",
                "check the name and the network (HF_HUB_OFFLINE keeps huggingface_hub from using it)",
            )
    found = f"{named} could not be fetched: {type(reason).__name__}: {first_line}"
    return found, "access to the hub, and space in the cache", "try again, or download the folder and give its path"
