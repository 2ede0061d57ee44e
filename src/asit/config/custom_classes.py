"""One's own classes, named in settings as `module:Class` or `module:Class(width=8)` (docs/research.md)."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator

from asit.errors import ConfigError

C = TypeVar("C")


class NotImportedError(ConfigError):
    """The module of the class that a model's card names has not been imported."""


def split(text: str) -> tuple[str, str, dict[str, Any]]:
    """Return the module, the class and the arguments of `module:Class(width=8)`.

    Raises:
        ValueError: the text is not of this form, or an argument is not a literal.
    """
    module, _, rest = text.partition(":")
    try:
        tree: Any = ast.parse(rest.strip(), mode="eval").body
        arguments = {}
        if isinstance(tree, ast.Call) and not tree.args:
            arguments = {str(part.arg): ast.literal_eval(part.value) for part in tree.keywords}
            tree = tree.func
        name = ast.unparse(tree)
    except (ValueError, SyntaxError):
        name = ""
    words = [*module.split("."), *name.split(".")]
    if not all(word.isidentifier() for word in words) or "None" in arguments:
        raise ValueError("write module:Class or module:Class(width=8), with literals as arguments")
    return module, name, arguments


def name_of(given: Any) -> Any:
    """Return the name of a class, or of an instance of a dataclass with its fields; text is checked and kept.

    Raises:
        ValueError: no name leads back to what was given.
    """
    if isinstance(given, str):
        if given:
            split(given)
        return given
    kind = given if isinstance(given, type) else type(given)
    if "<" in kind.__qualname__:
        raise ValueError(f"{kind.__name__} is defined within a function, where no name leads to it; move it out")
    name = f"{kind.__module__}:{kind.__qualname__}"
    if kind is given:
        return name
    if not dataclasses.is_dataclass(given):
        found = f"an instance of {kind.__name__}, which is no dataclass"
        raise ValueError(f"{found}: give the class, or 'module:Class(width=8)'")
    own = ", ".join(f"{field.name}={getattr(given, field.name)!r}" for field in dataclasses.fields(given) if field.init)
    split(f"{name}({own})")
    return f"{name}({own})"


ClassName = Annotated[str, BeforeValidator(name_of)]
"""Setting that names a class; in Python the class, or an instance of a dataclass, is turned into its name."""


def find(text: str, base: type[C], setting: str, *, imports: bool = True) -> Callable[..., C]:
    """Return the class that a setting names, with its arguments bound.

    Args:
        text: as `ClassName` has it.
        base: what the class must be derived from.
        setting: its name, for messages.
        imports: whether its module may be imported, also from the working directory; else it must have been.

    Raises:
        ConfigError: there is no such class, or it does not have the methods and arguments of `base`.
    """
    module, name, arguments = split(text)
    if imports or module in sys.modules or module in os.environ.get("ASIT_IMPORT", "").split(","):
        found = _imported(module, setting, text)
    else:
        raise NotImportedError(
            f"{setting} is {text}, and the module {module} is not imported",
            "the module of the class that the model was trained with; a model's file never decides what is imported",
            f"import {module} first; on the command line set ASIT_IMPORT={module}",
        )
    for part in name.split("."):
        found = getattr(found, part, None)
    article = f"a class derived from {base.__module__}.{base.__name__}"
    if not (isinstance(found, type) and issubclass(found, base)):
        what = f"{module} has no {name}" if found is None else f"{text} is not one"
        raise ConfigError(f"{setting}: {what}", article, "see docs/research.md for an example of each kind")
    for method in sorted(getattr(base, "__abstractmethods__", ())):
        wanted = inspect.signature(getattr(base, method))
        own = getattr(found, method)
        if getattr(own, "__isabstractmethod__", False) or not _takes(own, list(wanted.parameters)):
            has = "not defined" if own is getattr(base, method) else f"{method}{inspect.signature(own)}"
            raise ConfigError(f"{setting} {text}: {method} is {has}", f"{method}{wanted}", "give it these parameters")
    needed = [p for p in inspect.signature(base).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        inspect.signature(found).bind(*needed, **arguments)
    except TypeError as error:
        own_signature = f"{name}{inspect.signature(found)}"
        raise ConfigError(f"{setting} {text}: {error}", f"arguments of {own_signature}", "correct them") from error
    return functools.partial(found, **arguments)


def _takes(method: Callable[..., Any], names: list[str]) -> bool:
    try:
        inspect.signature(method).bind(*names)
    except TypeError:
        return False
    return True


def _imported(module: str, setting: str, text: str) -> Any:
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise ConfigError(
            f"{setting} is {text}, and importing {module} failed: {type(error).__name__}: {error}",
            "a module that can be imported",
            f"start in the folder of {module.split('.')[0]}.py, or set PYTHONPATH to it",
        ) from error


def call(setting: str, function: Callable[..., C], *arguments: Any) -> C:
    """Call a method of one's own class.

    Raises:
        ConfigError: it raised an error; the message says where.
    """
    try:
        return function(*arguments)
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}, line {at.lineno}"
        raise ConfigError(
            f"{setting} raised {type(error).__name__}: {error} ({where})", "no error", "correct the class"
        ) from error
