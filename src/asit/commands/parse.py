"""Command lines to typed options."""

from __future__ import annotations

from typing import Any

import tyro
from pydantic import ValidationError

from asit.errors import ConfigError


def parse(kind: Any, prog: str, summary: str, given: list[str], **options: Any) -> Any:
    """The options of a verb, or its help; values that do not fit are a ConfigError."""
    try:
        description = summary[0].upper() + summary[1:] + "."
        return tyro.cli(kind, prog=prog, args=given, description=description, **options)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, found {e['input']!r}" for e in error.errors()]
        raise ConfigError("options do not fit:\n    " + "\n    ".join(lines), remedy=f"see {prog} --help") from None


def early(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Values of options that decide the defaults of all others, read before those are parsed."""
    out = {}
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names:
            out[name] = value if equals else (given[i + 1] if i + 1 < len(given) else "")
    return out
