"""Recipes: presets of pretraining and tasks of fine-tuning, and the settings of a run built on one.

A recipe is a YAML file in presets/ or tasks/; `kind` is `PretrainSettings` or `FinetuneSettings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from asit.config import yaml
from asit.config.finetune_settings import FinetuneSettings
from asit.config.model_settings import SIZES, EncoderSettings, FrontEndSettings
from asit.config.pretrain_settings import PretrainSettings
from asit.config.run_settings import RunSettings
from asit.errors import ConfigError

S = TypeVar("S", bound=RunSettings)
Resume = bool | Literal["auto"]
"""Whether to resume the run in the folder; auto: where there is one."""

MODEL_GROUPS = ("front_end", "encoder")
"""Groups of settings that a model's card holds."""


def recipes(kind: type[RunSettings]) -> list[str]:
    """Return the names of the recipes."""
    found = resources.files("asit.config").joinpath(f"{kind.RECIPE}s").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


def read_recipe(kind: type[RunSettings], name: str) -> dict[str, Any]:
    """Return a recipe's settings, nested, merged over those of the recipe it is based on.

    Raises:
        ConfigError: there is no recipe of this name.
    """
    known = recipes(kind)
    if name not in known:
        raise ConfigError(f"no {kind.RECIPE} is called {name}{yaml.nearest(name, known)}", "one of " + ", ".join(known))
    with resources.as_file(resources.files("asit.config") / f"{kind.RECIPE}s" / f"{name}.yaml") as path:
        held = yaml.read_yaml(path)
    base = held.pop("base", None)
    return yaml.merge(read_recipe(kind, base) if base else {}, held) | {kind.RECIPE: name}


def build(
    kind: type[S],
    name: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> S:
    """Return the settings of a recipe, overlaid by those of a YAML file, overlaid by `overrides`.

    Where pretraining continues from a model, front end and encoder are left to its card: a preset's are not taken, and
    fields that neither file nor overrides name stay unset (`with_model_groups` is for a model without a card).

    Args:
        kind: of the settings.
        name: of the recipe; None: the one that the file names, else the default, which for pretraining that continues
            from a model is another one.
        file: YAML of settings, such as a run's config.yaml.
        overrides: nested settings.

    Raises:
        ConfigError: lists every unknown name and every value that does not fit.
    """
    held, given = read_file(kind, Path(file)) if file else {}, overrides or {}
    model = str(given.get("model", held.get("model", ""))) if kind is PretrainSettings else ""
    default = PretrainSettings.CONTINUED_RECIPE if model else kind.DEFAULT_RECIPE
    chosen = name or str(given.get(kind.RECIPE, held.get(kind.RECIPE, default)))
    values = read_recipe(kind, chosen)
    if model:
        left = left_to_model(bool(given.get("keep_heads", held.get("keep_heads"))))
        values = {name: value for name, value in values.items() if name not in left}
    # Each validated without the recipe, so that a message is about what the user wrote.
    for layer, source in ((held, str(file)), (given, "the settings given")):
        if layer:
            own = yaml.build(kind, layer, source).model_dump(exclude_unset=True)
            values = overlay(values, own, encoder_too=not model)
    return yaml.build(kind, values | {kind.RECIPE: chosen}, str(file) if file else "the settings given")


def left_to_model(keep_heads: bool) -> tuple[str, ...]:
    """Return the groups of settings that the model decides from which pretraining continues."""
    return (*MODEL_GROUPS, "heads") if keep_heads else MODEL_GROUPS


def with_model_groups(settings: PretrainSettings) -> PretrainSettings:
    """Return the settings with the preset's front end and encoder below the fields that are set."""
    recipe = read_recipe(PretrainSettings, settings.preset)
    given = {group: getattr(settings, group).model_dump(exclude_unset=True) for group in MODEL_GROUPS}
    return settings.changed(overlay({group: recipe.get(group, {}) for group in MODEL_GROUPS}, given))


def build_for(
    kind: type[S],
    out: str | Path,
    name: str | None = None,
    file: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: Resume = False,
) -> S:
    """Return the settings of a run in `out`: as `build`, or, to resume it, its own with `overrides` on top."""
    given = {key: v for key, v in (overrides or {}).items() if v != "" or key not in ("data", "out", "model")}
    if str(out):
        given["out"] = str(out)
        own = Path(out) / "config.yaml"
        if resume and name is None and file is None and own.exists():
            return yaml.build(kind, yaml.merge(read_file(kind, own), given), str(own))
    return build(kind, name, file, given)


def read_file(kind: type[RunSettings], path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, nested.

    Raises:
        ConfigError: it is not readable YAML, or holds settings of the other kind of run.
    """
    held = yaml.read_yaml(path)
    for other in (PretrainSettings, FinetuneSettings):
        if other.RECIPE != kind.RECIPE and other.RECIPE in held and kind.RECIPE not in held:
            raise ConfigError(
                f"{path} holds settings of {other.PURPOSE}: {other.RECIPE}: {held[other.RECIPE]}",
                f"settings of {kind.PURPOSE}, with {kind.VERB}",
                f"use {other.VERB} for them, or name a file or run of {kind.PURPOSE}",
            )
    return held


def overlay(base: Mapping[str, Any], given: Mapping[str, Any], *, encoder_too: bool = True) -> dict[str, Any]:
    """Return `given` merged over `base`, both nested; values of `base` that `given` rules out are derived from it.

    - A named `encoder.size` removes the width, depth and heads of a custom one. One of these three makes a named size
      custom: the others are those of the named size, and the heads of a given width are 64 wide or the next wider.
    - `epochs` that end before the warm-up make it auto.
    - Where the last layer is shared, both numbers of prototypes are the one that is given, else the class token's.
    - Patches as high as the spectrogram stay so when `front_end.mels` changes.

    Without `encoder_too`, where pretraining continues from a model, nothing of the encoder is derived.
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
    derived = {"encoder": encoder if encoder_too else {}, "optim": optim, "heads": heads}
    return yaml.merge(out, {group: values for group, values in derived.items() if values})
