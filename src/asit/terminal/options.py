"""Command lines to typed options."""

from __future__ import annotations

from typing import Any, TypeVar

import tyro
from pydantic import ValidationError

from asit.config import Settings, presets, yaml
from asit.errors import ConfigError

S = TypeVar("S", bound=Settings)


def parse(kind: Any, prog: str, summary: str, given: list[str], **options: Any) -> Any:
    """Return the options of a verb, or print its help.

    Raises:
        ConfigError: values that do not fit.
    """
    try:
        description = summary[0].upper() + summary[1:] + "."
        return tyro.cli(kind, prog=prog, args=given, description=description, **options)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, found {e['input']!r}" for e in error.errors()]
        raise ConfigError("options do not fit:\n    " + "\n    ".join(lines), remedy=f"see {prog} --help") from None


def settings_of(kind: type[S], base: S, options: S, given: list[str]) -> S:
    """Return the settings of a run: `base`, overridden by the options that were given (`presets.overlay`).

    Args:
        kind: of the settings, without a verb's own options.
        base: defaults of the options.
        options: parsed.
        given: the arguments.
    """
    flags = {argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in given}
    values, before = dict(yaml.flat(options.model_dump())), dict(yaml.flat(base.model_dump()))
    named = [(name, values[name]) for name in before if name in flags or values[name] != before[name]]
    return kind(**presets.overlay(base.model_dump(), yaml.nested(named)))


def early(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Return the values of options that decide the defaults of all others, before those are parsed."""
    out = {}
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names:
            out[name] = value if equals else (given[i + 1] if i + 1 < len(given) else "")
    return out
