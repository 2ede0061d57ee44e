"""Render pages and their parts with jinja2; autoescape is on, so only what a template writes is HTML."""

from __future__ import annotations

from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_ENVIRONMENT = Environment(
    loader=PackageLoader("asit.report", "page"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)


class Section(NamedTuple):
    """A titled part of a page; one with an empty body is left out, a folded one opens on a click on its title."""

    title: str
    body: Markup
    folded: bool = False


def part(macro: str, *arguments: Any, **named: Any) -> Markup:
    """Return the HTML of a macro of parts.html.j2."""
    made: Markup = getattr(_ENVIRONMENT.get_template("parts.html.j2").module, macro)(*arguments, **named)
    return made


def page(**values: Any) -> str:
    """Return the HTML of a page: report.html.j2 with its CSS and JavaScript."""
    return _ENVIRONMENT.get_template("report.html.j2").render(**values)
