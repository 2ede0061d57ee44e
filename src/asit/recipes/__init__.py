"""Recipes: presets one can read, and the Python door to pretraining."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from asit import config
from asit.errors import ConfigError
from asit.settings import PretrainSettings

if TYPE_CHECKING:
    from asit.runs.pretrain import PretrainResult


def presets() -> list[str]:
    """Names of the presets."""
    found = resources.files("asit.recipes").joinpath("presets").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))


def preset(name: str) -> dict[str, Any]:
    """A preset's settings, nested.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in presets():
        raise ConfigError(
            f"no preset is called {name}{config.nearest(name, presets())}", "one of " + ", ".join(presets())
        )
    with resources.as_file(resources.files("asit.recipes") / "presets" / f"{name}.yaml") as path:
        return config.read_yaml(path) | {"preset": name}


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
    given = config.merge(config.read_yaml(Path(file)) if file else {}, overrides or {})
    source = str(file) if file else "the settings given"
    # Checked apart from the preset, so that the message is about what the user wrote.
    config.build(PretrainSettings, given, source)
    name = preset_name or str(given.get("preset", "default"))
    return config.build(PretrainSettings, config.merge(preset(name), given | {"preset": name}), source)


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: bool = False,
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
        preset: "default", "paper" or "official-v2".
        config: YAML file of settings.
        resume: go on with the run in `out`, with its own settings.
        overwrite: delete the run in `out` first.
        stream: where progress goes; None: nowhere.
        settings: any of `PretrainSettings`; groups as mappings.

    Returns:
        PretrainResult: `.model` is the folder for `asit.load`.

    Raises:
        AsitError: anything that can be mended by the caller.
    """
    from asit.runs import pretrain as runs

    chosen = settings_for(out, preset, config, {**settings, "data": str(data)}, resume=resume)
    return runs.pretrain(chosen, resume=resume, overwrite=overwrite, stream=stream)


def settings_for(
    out: str | Path,
    preset_name: str | None,
    file: str | Path | None,
    overrides: Mapping[str, Any],
    *,
    resume: bool,
) -> PretrainSettings:
    """Settings of a new run, or, to resume one, its own with the overrides on top."""
    given = {name: value for name, value in overrides.items() if value != "" or name not in ("data", "out")}
    if str(out):
        given["out"] = str(out)
    if str(out) and resume and preset_name is None and file is None:
        own = Path(out) / "config.yaml"
        if own.exists():
            return config.build(PretrainSettings, config.merge(config.read_yaml(own), given), str(own))
    return pretrain_settings(preset_name, file, given)


__all__ = ["preset", "presets", "pretrain", "pretrain_settings", "settings_for"]
