"""The folder of a run: its files, and the rules for starting, resuming and overwriting one.

A run counts as started once config.yaml exists, which is written just before the first step: a start that fails leaves
at most a catalogue, and the files of an interrupted scan, which the next start continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from asit.config import PretrainSettings, RunSettings, presets, yaml
from asit.errors import ConfigError
from asit.io import atomic, lock, parsing

S = TypeVar("S", bound=RunSettings)

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
CATALOGUE = "catalogue.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
FIGURES = "figures"
BEST = "model-best"
RESULTS = "results.json"
SCORES = "scores"
REPORT = "report.html"
TRACKERS = "trackers"
OWN = frozenset(
    {CONFIG, ENVIRONMENT, CATALOGUE, CHECKPOINTS, MODEL, BEST, FIGURES, RESULTS, SCORES, REPORT, TRACKERS, lock.NAME}
    | {"metrics.jsonl", "log.txt", "tensorboard", "catalogue.skipped.jsonl", "catalogue.jsonl.partial"}
)
"""All names that a run writes."""

MAY_CHANGE = (
    *("out", "data", "device", "threads", "workers", "stop_after", "bad_files", "compile", "score_batch", "records."),
    *("probe.", "process_timeout", "parallel", "checkpoint_activations"),
)
"""Settings that may change on resume: they do not affect the steps."""


def claim(folder: Path, *, resume: bool, overwrite: bool) -> bool:
    """Return whether there is a run to resume; refuse a folder that is not free to use.

    Raises:
        ConfigError: the folder holds a run and neither resume nor overwrite was chosen, or files that are not a run's.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given", "one of the two", "choose one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file", "a folder for the run", "choose another --out")
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in there if not (_is_own(folder / name) or _is_fold(folder / name))]
    begun = CONFIG in there
    if resume:
        if not begun:
            held = f"has {', '.join(there[:5])}" if there else "is empty"
            found = f"{folder} " + (f"holds no run to resume: it {held}" if folder.exists() else "is not there")
            raise ConfigError(found, f"a run's folder, with {CONFIG}", "start the run without --resume")
        return True
    if foreign:
        raise ConfigError(
            f"{folder} holds files that are not a run's: {', '.join(foreign[:5])}",
            "a new or empty folder for the run",
            "choose another --out",
        )
    if begun and not overwrite:
        raise ConfigError(
            f"{folder} holds a run already",
            "a new or empty folder, or a choice",
            "pass --resume to resume it, or --overwrite to delete it and start from scratch",
        )
    return False


def clear(folder: Path) -> None:
    """Delete an earlier run's own files, config.yaml first, so that what is left of a killed delete counts as none."""
    (folder / CONFIG).unlink(missing_ok=True)
    kept = {lock.NAME, CATALOGUE, "catalogue.skipped.jsonl", "catalogue.jsonl.partial"}
    leftovers = {path.name for path in folder.iterdir() if _is_leftover(path.name) or _is_fold(path)}
    for name in sorted((OWN | leftovers) - kept):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_settings(folder: Path, settings: RunSettings) -> None:
    """Write the settings that a run starts with; the folder counts as a run's from then on.

    `stop_after` is of one call: a resumed run continues to the end unless it is given again.
    """
    atomic.write_text(folder / CONFIG, yaml.to_yaml(settings.model_copy(update={"stop_after": 0})))


def read_settings(folder: Path, kind: type[S]) -> S:
    """Return the settings that a run was started with.

    Raises:
        ConfigError: they are those of another kind of run.
    """
    return yaml.build(kind, presets.read_file(kind, folder / CONFIG), str(folder / CONFIG))


def environment(folder: Path) -> Mapping[str, Any]:
    """Return what is recorded of the start of the run in a folder; nothing where there is none, or it is damaged."""
    try:
        return parsing.json_object(folder / ENVIRONMENT, ConfigError)
    except (OSError, ConfigError):
        return {}


def settle(settings: S, begun: S) -> S:
    """Return the settings with each auto as it was resolved when the run started: its source may have changed.

    The same for settings that a model's card decided.
    """
    unset = _left_to_card(settings)
    autos = [
        (name, was)
        for name, (was, now) in yaml.differences(begun, settings).items()
        if (now == "auto" or name in unset) and not _may_change(name)
    ]
    return yaml.build(type(settings), yaml.merge(settings.model_dump(), yaml.nested(autos)), CONFIG)


def _left_to_card(settings: RunSettings) -> set[str]:
    """Return the settings of continued pretraining that were not given, for the model's card to decide."""
    if not (isinstance(settings, PretrainSettings) and settings.model):
        return set()
    groups = {name: getattr(settings, name) for name in presets.left_to_model(settings.keep_heads)}
    return {
        f"{group}.{name}" for group, g in groups.items() for name in g.model_dump() if name not in g.model_fields_set
    }


def check_same(old: RunSettings, new: RunSettings) -> None:
    """Refuse to resume with settings that would change the steps.

    Raises:
        ConfigError: lists each.
    """
    changed = {name: values for name, values in yaml.differences(old, new).items() if not _may_change(name)}
    # Written by a version that had no such setting, or did not resolve it.
    if changed.get("front_end_on", ("",))[0] == "auto":
        del changed["front_end_on"]
    if changed:
        lines = "\n    ".join(f"{name}: {was} in the run, {now} now" for name, (was, now) in changed.items())
        raise ConfigError(
            f"the run was started with other settings:\n    {lines}",
            "the same settings, but for " + ", ".join(name.rstrip(".") for name in MAY_CHANGE[2:]),
            "leave these out to resume, or start another run in a new --out",
        )


def _may_change(name: str) -> bool:
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in MAY_CHANGE)


def tidy(folder: Path) -> None:
    """Remove what killed writers left in a run's folder; only for the process that holds its lock.

    Drafts of the report stay: `asit report` writes it without the lock, and removes its own.
    """
    atomic.sweep(folder, OWN - {REPORT}, locked=True)
    for name in (CHECKPOINTS, FIGURES, SCORES):
        atomic.sweep(folder / name, locked=True)


def _is_leftover(name: str) -> bool:
    """Return whether this is a draft or a lock of one of a run's files, left by a killed writer."""
    draft = atomic.parse_draft(name)
    return (draft is not None and draft.target in OWN) or name in (f".{own}.lock" for own in OWN)


def _is_fold(path: Path) -> bool:
    """Return whether this is a fold's run in the folder of a cross-validation, or what a killed one left of it."""
    return path.name.startswith("fold-") and path.is_dir() and all(map(_is_own, path.iterdir()))


def _is_own(path: Path) -> bool:
    return path.name in OWN or _is_leftover(path.name)
