"""Recipes: presets and tasks one can read, and the Python doors to pretraining and fine-tuning."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar

from asit.config import SIZES, EncoderSettings, FinetuneSettings, FrontEndSettings, PretrainSettings, Settings, yaml
from asit.errors import ConfigError

if TYPE_CHECKING:
    from asit.finetune.cross_validation import CrossValidation
    from asit.finetune.finetune_run import FinetuneResult
    from asit.pretrain.pretrain_run import PretrainResult
    from asit.training.run import Resume

S = TypeVar("S", bound=Settings)


def presets() -> list[str]:
    """Names of the presets of pretraining."""
    return _names("presets")


def tasks() -> list[str]:
    """Names of the recipes of fine-tuning."""
    return _names("tasks")


def preset(name: str) -> dict[str, Any]:
    """What a preset says, nested; a ConfigError where there is none of the name."""
    return _recipe(_PRESETS, name)


def task(name: str) -> dict[str, Any]:
    """What a task's recipe says, nested, with what it is based on; a ConfigError where there is none of the name."""
    return _recipe(_TASKS, name)


def pretrain_settings(
    preset_name: str | None = None, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> PretrainSettings:
    """A preset, then a YAML file on top, then overrides (nested) on top of that.

    Args:
        preset_name: None: the one the file names, else "default".
        file: YAML of settings, such as a run's config.yaml.
        overrides: nested settings.

    Raises:
        ConfigError: every unknown name and unfitting value at once.
    """
    return _settings(_PRESETS, preset_name, file, overrides)


def finetune_settings(
    task: str | None = None, file: str | Path | None = None, overrides: Mapping[str, Any] | None = None
) -> FinetuneSettings:
    """A task's recipe, then a YAML file on top, then overrides (nested) on top of that; as `pretrain_settings`."""
    return _settings(_TASKS, task, file, overrides)


@dataclass(frozen=True)
class _Shelf(Generic[S]):
    """One kind of recipes: the folder they lie in, the setting that names one, and the one taken by default."""

    kind: type[S]
    folder: str
    field: str
    default: str


_PRESETS = _Shelf(PretrainSettings, "presets", "preset", "default")
_TASKS = _Shelf(FinetuneSettings, "tasks", "task", "any")


def _names(folder: str) -> list[str]:
    found = resources.files("asit.config").joinpath(folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


def _recipe(shelf: _Shelf[S], name: str) -> dict[str, Any]:
    """A recipe's settings, nested, on top of those of the recipe it is based on."""
    if name not in _names(shelf.folder):
        raise ConfigError(
            f"no {shelf.field} is called {name}{yaml.nearest(name, _names(shelf.folder))}",
            "one of " + ", ".join(_names(shelf.folder)),
        )
    with resources.as_file(resources.files("asit.config") / shelf.folder / f"{name}.yaml") as path:
        held = yaml.read_yaml(path)
    base = held.pop("base", None)
    return yaml.merge(_recipe(shelf, base) if base else {}, held) | {shelf.field: name}


def _settings(shelf: _Shelf[S], name: str | None, file: str | Path | None, overrides: Mapping[str, Any] | None) -> S:
    held, given = _of_kind(shelf, Path(file)) if file else {}, overrides or {}
    source = str(file) if file else "the settings given"
    # Checked apart from the recipe, so that the message is about what the user wrote.
    yaml.build(shelf.kind, yaml.merge(held, given), source)
    chosen = name or str(given.get(shelf.field, held.get(shelf.field, shelf.default)))
    laid = _recipe(shelf, chosen)
    for layer in (held, given):
        laid = overlay(laid, yaml.build(shelf.kind, layer, source).model_dump(exclude_unset=True))
    return yaml.build(shelf.kind, laid | {shelf.field: chosen}, source)


def _of_kind(shelf: _Shelf[S], path: Path) -> dict[str, Any]:
    """The settings in a file, which are not those of the other kind of run."""
    held = yaml.read_yaml(path)
    other = _TASKS if shelf.field == _PRESETS.field else _PRESETS
    if other.field in held and shelf.field not in held:
        verbs = {"preset": ("pretraining", "asit pretrain"), "task": ("fine-tuning", "asit finetune")}
        (found, theirs), (expected, ours) = verbs[other.field], verbs[shelf.field]
        raise ConfigError(
            f"{path} holds settings of {found}: {other.field}: {held[other.field]}",
            f"settings of {expected}, with {ours}",
            f"use {theirs} for them, or name a file or run of {expected}",
        )
    return held


def overlay(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` laid on `base`, both nested; values of `base` that `given` rules out are derived from it.

    - A named `encoder.size` removes the width, depth and heads of a custom one. One of these three makes a named size
      custom: the others are those of the named size, and the heads of a given width are 64 wide or the next wider.
    - `epochs` that end before the warm-up make it auto.
    - Where the last layer is shared, both numbers of prototypes are the one that is given, else the class token's.
    - Patches as high as the spectrogram stay so when `front_end.mels` changes.
    """
    out = yaml.merge(base, given)
    was, now = base.get("encoder", {}), given.get("encoder", {})
    encoder: dict[str, Any] = {}
    size, parts = was.get("size", EncoderSettings().size), ("width", "depth", "heads")
    if now.get("size") in SIZES:
        encoder = {part: now.get(part) for part in parts}
    elif "size" not in now and any(now.get(part) for part in parts):
        below = dict(zip(parts, SIZES[size], strict=True)) if size in SIZES else {part: was.get(part) for part in parts}
        width = now.get("width")
        if width and (size in SIZES or width % (below["heads"] or 1)):
            below["heads"] = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        encoder = {"size": "custom"} | {part: now.get(part) or below[part] for part in parts}
    mels = base.get("front_end", {}).get("mels", FrontEndSettings().mels)
    if was.get("patch_mels") == mels and "patch_mels" not in now:
        encoder["patch_mels"] = out.get("front_end", {}).get("mels", mels)
    optim: dict[str, Any] = {}
    warmup = out.get("optim", {}).get("warmup", "auto")
    if "warmup" not in given.get("optim", {}) and warmup != "auto" and warmup >= given.get("epochs", math.inf):
        optim["warmup"] = "auto"
    heads: dict[str, Any] = {}
    counts, over, merged = ("class_prototypes", "patch_prototypes"), given.get("heads", {}), out.get("heads", {})
    if merged.get("share_prototypes") and not all(name in over for name in counts):
        shared = next((over[name] for name in counts if name in over), merged.get(counts[0]))
        heads = dict.fromkeys(counts, shared) if shared else {}
    derived = {"encoder": encoder, "optim": optim, "heads": heads}
    return yaml.merge(out, {group: values for group, values in derived.items() if values})


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    stream: TextIO | None = sys.stderr,
    **settings: Any,
) -> PretrainResult:
    """Pretrain an encoder on recordings without labels.

    The same as `asit pretrain` on the command line: `asit.pretrain("recordings", "run", epochs=50,
    encoder={"size": "small"})`.

    Args:
        data: folder of recordings, table or catalogue.
        out: the run's folder, new or empty.
        preset: "default", "speech", "paper" or "official-v2".
        config: YAML file of settings.
        resume: go on with the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        stream: where progress goes; None: nowhere.
        settings: any of `PretrainSettings`; groups as mappings.

    Returns:
        PretrainResult: `.model` is the folder for `asit.load`.

    Raises:
        AsitError: anything that can be mended by the caller.
    """
    from asit.pretrain import pretrain_run as runs

    chosen = settings_for(out, preset, config, {**settings, "data": str(data)}, resume=resume)
    return runs.pretrain(chosen, resume=resume, overwrite=overwrite, stream=stream)


def finetune(
    data: str | Path,
    out: str | Path,
    model: str | Path,
    *,
    task: str | None = None,
    config: str | Path | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    stream: TextIO | None = sys.stderr,
    **settings: Any,
) -> FinetuneResult | CrossValidation:
    """Fine-tune and score a classifier on labelled recordings.

    The same as `asit finetune` on the command line: `asit.finetune("table.csv", "run", "pretrained/model", epochs=30,
    sides={"hold_out": 0.2})`.

    Args:
        data: catalogue with labels, labelled table, or folder with one sub-folder a class.
        out: the run's folder, new or empty.
        model: as for `asit.load`, such as RUN/model; a file of ImageNet ViT weights; or "none".
        task: the recipe; "any" if not given.
        config: YAML file of settings.
        resume: go on with the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        stream: where progress goes; None: nowhere.
        settings: any of `FinetuneSettings`; groups as mappings.

    Returns:
        FinetuneResult: `.model` is the folder for `asit.load`, `.results` the scores; with `sides={"fold": "all"}` a
        CrossValidation over all folds.

    Raises:
        AsitError: anything that can be mended by the caller.
    """
    from asit.finetune import cross_validation

    over = {**settings, "data": str(data), "model": str(model)}
    chosen = finetune_settings_for(out, task, config, over, resume=resume)
    return cross_validation.run(chosen, resume=resume, overwrite=overwrite, stream=stream)


def settings_for(
    out: str | Path,
    preset_name: str | None,
    file: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    resume: Resume,
) -> PretrainSettings:
    """Settings of a new run, or, to resume one, its own with the overrides on top."""
    return _settings_for(_PRESETS, out, preset_name, file, overrides, resume)


def finetune_settings_for(
    out: str | Path,
    task: str | None,
    file: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    resume: Resume,
) -> FinetuneSettings:
    """As `settings_for`, for fine-tuning."""
    return _settings_for(_TASKS, out, task, file, overrides, resume)


def _settings_for(
    shelf: _Shelf[S],
    out: str | Path,
    name: str | None,
    file: str | Path | None,
    overrides: Mapping[str, Any],
    resume: Resume,
) -> S:
    given = {key: value for key, value in overrides.items() if value != "" or key not in ("data", "out", "model")}
    if str(out):
        given["out"] = str(out)
    if str(out) and resume and name is None and file is None:
        own = Path(out) / "config.yaml"
        if own.exists():
            return yaml.build(shelf.kind, yaml.merge(_of_kind(shelf, own), given), str(own))
    return _settings(shelf, name, file, given)


__all__ = [
    "finetune",
    "finetune_settings",
    "finetune_settings_for",
    "preset",
    "presets",
    "pretrain",
    "pretrain_settings",
    "settings_for",
    "task",
    "tasks",
]
