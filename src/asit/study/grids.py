"""Grids: the arms of a study as settings of pretraining over a preset, named or in a YAML file of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from asit.config import PretrainSettings, presets, yaml
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import ConfigError, suggestion

COST = "CPU minutes"
"""The axis of a grid whose figure shows scores against the time that the arms took."""
_FIELDS = {"source", "axis", "reference", "arms"}
_TIMES = re.compile(r"x(\d+(?:\.\d+)?)")
"""A multiple, such as x0.5: epochs of the study's, views.seconds of the length of a clip."""


@dataclass(frozen=True)
class Grid:
    """Arms to compare.

    Attributes:
        name: of the study.
        source: where the comparison comes from.
        arms: name -> dotted settings; epochs such as "x0.5" are a multiple of the study's, and so are
            views.seconds of the length of a clip.
        reference: the arm that the others are compared with.
        axis: name of the horizontal axis; "": the arms are no points of a curve.
    """

    name: str
    source: str
    arms: dict[str, dict[str, Any]]
    reference: str
    axis: str = ""

    def length(self, arm: str) -> float:
        """Return the length of an arm's run as a multiple of the study's."""
        return _times(self.arms[arm].get("epochs")) or 1.0

    def place(self, arm: str) -> float:
        """Return the value of an arm on the axis: the number that its name ends in.

        Raises:
            ConfigError: it ends in none.
        """
        found = re.search(r"(\d+(?:\.\d+)?)$", arm)
        if found is None:
            raise ConfigError(
                f"{self.name}: the arm {arm} has no place on the axis {self.axis}",
                "names that end in a number, such as masked-70",
                f"rename it, leave out axis, or take the axis {COST}",
            )
        return float(found[1])


def names() -> list[str]:
    """Return the names of the grids of this package."""
    found = (entry.name for entry in resources.files("asit.study").joinpath("grids").iterdir())
    return sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))


def read(name: str, chosen: tuple[str, ...] = ()) -> Grid:
    """Read a grid by its name or from a YAML file, and take some or all of its arms.

    Args:
        name: of `names`, or a path that ends in .yaml or .yml.
        chosen: arms; none: all of them.

    Raises:
        ConfigError: there is no such grid or arm, or the file is no grid.
    """
    if name.endswith((".yaml", ".yml")):
        return _grid(Path(name).stem, yaml.read_yaml(Path(name)), name, chosen)
    if name not in names():
        found = f"no study is called {name}{suggestion(name, names())}" if name else "no study was named"
        fix = "name one of these, or a YAML file with arms (docs/study.md)"
        raise ConfigError(found, "one of " + ", ".join(names()), fix)
    with resources.as_file(resources.files("asit.study") / "grids" / f"{name}.yaml") as path:
        return _grid(name, yaml.read_yaml(path), name, chosen)


def _grid(name: str, held: Mapping[str, Any], source: str, chosen: tuple[str, ...]) -> Grid:
    arms: dict[Any, Any] = held.get("arms") or {}
    unknown = sorted(set(held) - _FIELDS)
    good = isinstance(arms, dict) and arms != {} and all(isinstance(v, dict | None) for v in arms.values())
    if unknown or not good:
        expected = "arms: a mapping of names to settings; also source, reference and axis"
        found = f"has no {', '.join(unknown)} to read" if unknown else "holds no arms"
        raise ConfigError(f"{source} {found}", expected, "write it as in docs/study.md")
    arms = {str(arm): dict(yaml.flat(settings or {})) for arm, settings in arms.items()}
    wrong = [arm for arm in arms if not re.fullmatch(r"\w[\w+.-]*(?<!\.scores)", arm) or re.search(r"-s\d+$", arm)]
    if wrong:
        expected = "letters, digits, _, +, . and -, without an end such as -s0"
        raise ConfigError(f"{source}: arms named {', '.join(wrong)}", expected, "rename these")
    reference = str(held.get("reference", next(iter(arms))))
    for arm in (*chosen, reference):
        if arm not in arms:
            hint = suggestion(arm, arms)
            raise ConfigError(f"{source} has no arm {arm}{hint}", "one of " + ", ".join(arms), "see --dry-run")
    arms = {arm: settings for arm, settings in arms.items() if not chosen or arm in chosen}
    reference = reference if reference in arms else next(iter(arms))
    grid = Grid(name, str(held.get("source", "")), arms, reference, str(held.get("axis") or ""))
    if grid.axis and grid.axis != COST:
        for arm in arms:
            grid.place(arm)
    return grid


def arm_settings(grid: Grid, base: PretrainSettings, typical: Callable[[], float]) -> dict[str, PretrainSettings]:
    """Return the settings of each arm: those of its preset, overlaid by what `base` changes, overlaid by its own.

    Args:
        grid: the arms.
        base: the settings that all arms share; what differs from its preset is kept where an arm names another.
        typical: gives the seconds of a typical clip, for views given as a share of it.

    Raises:
        ConfigError: settings that do not exist or do not fit, or two arms with the same ones.
    """
    model = {"model": base.model} if base.model else {}
    plain = presets.build(PretrainSettings, base.preset, None, model)
    given = yaml.nested((name, now) for name, (_, now) in yaml.differences(plain, base).items())
    found: dict[str, PretrainSettings] = {}
    seen: dict[str, str] = {}
    for arm, settings in grid.arms.items():
        own = dict(settings)
        preset = str(own.pop("preset", base.preset))
        if _times(own.get("epochs")) is not None:
            own["epochs"] = max(1, round(_times(own["epochs"]) * base.epochs))  # type: ignore[operator]
        if (share := _times(own.get("views.seconds"))) is not None:
            own["views.seconds"] = round(share * typical(), 3)
        try:
            made = presets.build(PretrainSettings, preset, None, yaml.merge(model | given, yaml.nested(own.items())))
        except ConfigError as error:
            raise ConfigError(f"the arm {arm}: {error.found}", error.expected, error.remedy) from error
        key = json.dumps(made.model_dump(mode="json", exclude={"preset"}), sort_keys=True)
        if key in seen:
            fix = f"leave one of them out with --arms, or give another --preset than {preset}"
            raise ConfigError(f"the arms {seen[key]} and {arm} have the same settings", "different ones", fix)
        seen[key], found[arm] = arm, made
    return found


def typical_seconds(settings: PretrainSettings, catalogue: Catalogue) -> float:
    """Return the length of a typical clip, of which views are cut: the median, at most a segment."""
    return min(float(np.median(catalogue.seconds)), settings.views.segment_seconds)


def _times(value: Any) -> float | None:
    found = _TIMES.fullmatch(value) if isinstance(value, str) else None
    return float(found[1]) if found else None
