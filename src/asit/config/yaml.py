"""Settings from YAML and from dotted overrides; every problem of a file is reported at once, with the nearest name."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from asit.errors import ConfigError
from asit.io import local_files, parsing

S = TypeVar("S", bound=BaseModel)
Nested = dict[str, Any]


def read_yaml(path: Path) -> Nested:
    """A YAML file's mapping; an empty file is an empty mapping."""
    try:
        with local_files.open_file(path, pipes=True) as file:
            found = parsing.from_yaml(file.read())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", "a readable YAML file of settings") from error
    except parsing.Malformed as error:
        raise ConfigError(f"{path} is not YAML: {error}", "lines such as `epochs: 50`") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds a {type(found).__name__}", "a mapping of settings to values")
    return found


def to_yaml(settings: BaseModel) -> str:
    """The settings as YAML that `build` reads back to equal settings."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def annotated(settings: BaseModel) -> str:
    """The settings as YAML with each one's meaning above it: a file to edit and to pass as --config."""
    return "\n".join(_annotated(settings, "")) + "\n"


def _annotated(settings: BaseModel, indent: str) -> Iterable[str]:
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _annotated(value, indent + "  ")
            continue
        for line in (field.description or "").splitlines():
            yield f"{indent}# {line.strip()}"
        plain = settings.model_dump(mode="json", include={name}).get(name, value)
        yield f"{indent}{name}: {yaml.safe_dump(plain, default_flow_style=True).splitlines()[0]}"


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Nested:
    """`over` laid on `base`, nested mappings entry by entry; neither is changed."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return out


def fill_auto(values: Mapping[str, Any], found: Mapping[str, Any]) -> Nested:
    """Return nested `values` with each "auto" that `found`, of dotted names, names replaced by its value there."""
    return nested((name, found.get(name, value) if value == "auto" else value) for name, value in flat(values))


def nested(pairs: Iterable[tuple[str, Any]]) -> Nested:
    """Dotted names to a nested mapping: ("optim.lr", 1e-3) gives {"optim": {"lr": 1e-3}}."""
    out: Nested = {}
    for name, value in pairs:
        *parents, leaf = name.split(".")
        at = out
        for parent in parents:
            at = at.setdefault(parent, {})
        at[leaf] = value
    return out


def names(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every setting's dotted name."""
    out: list[str] = []
    for name, field in kind.model_fields.items():
        below = _model(field.annotation)
        out.append(prefix + name)
        if below is not None:
            out += names(below, f"{prefix}{name}.")
    return out


def build(kind: type[S], values: Mapping[str, Any], source: str) -> S:
    """Validated settings.

    Raises:
        ConfigError: names every unknown setting with the nearest known one, and every value that does not fit.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        known = names(kind)
        problems = []
        for item in error.errors():
            # Members of a union are part of pydantic's location; only the names of settings are the user's.
            name = ".".join(str(part) for part in _settings_path(kind, item["loc"]))
            if item["type"] == "extra_forbidden":
                problems.append(f"{name}: no such setting{nearest(name, known)}")
            else:
                problems.append(f"{name}: {item['msg'][0].lower()}{item['msg'][1:]}, found {_shown(item['input'])}")
        problems = list(dict.fromkeys(problems))
        count = f"{len(problems)} setting{'s do' if len(problems) > 1 else ' does'} not fit"
        raise ConfigError(
            f"{source}: {count}:\n    " + "\n    ".join(problems),
            remedy="`asit settings` lists every setting with its meaning and its value",
        ) from None


def _shown(value: Any) -> str:
    """A value as a message shows it, on one line of at most 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:200] + "..."


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean X?" for the nearest known name, by its dotted name or by its last part; else ""."""
    known = list(known)
    leaf = name.rsplit(".", 1)[-1]
    # The right name in the wrong group comes first.
    same = [entry for entry in known if entry.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(name, same, n=1, cutoff=0.0) or difflib.get_close_matches(name, known, n=1)
    if not close:
        by_leaf = {entry.rsplit(".", 1)[-1]: entry for entry in reversed(known)}
        close = [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return f", did you mean {close[0]}?" if close else ""


def differences(left: BaseModel, right: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Dotted names of settings that differ, with both values."""
    a, b = dict(flat(left.model_dump(mode="json"))), dict(flat(right.model_dump(mode="json")))
    return {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names and values of a nested mapping: the reverse of `nested`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _model(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    for option in (annotation, *options):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _settings_path(kind: type[BaseModel], location: tuple[int | str, ...]) -> list[int | str]:
    path: list[int | str] = []
    at: type[BaseModel] | None = kind
    for part in location:
        if at is None:
            break
        path.append(part)
        field = at.model_fields.get(str(part))
        at = _model(field.annotation) if field else None
    return path
