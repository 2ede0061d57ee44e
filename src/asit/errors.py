"""Errors that a user can fix: what was found, what was expected, and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LINE, _LINES = 2000, 200
"""Most characters of a line and most lines: text quoted from a damaged file may be of any length."""


def suggestion(name: str, known: Iterable[str], form: str = "; did you mean {}?") -> str:
    """Return `form` with the known name that is most similar to an unknown one; "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), 1)
    return form.format(near[0]) if near else ""


def _short(text: str) -> str:
    if len(text) <= _LINE:
        return text
    return "\n".join(line if len(line) <= _LINE else line[:_LINE] + "..." for line in text.split("\n")[:_LINES])


class AsitError(Exception):
    """A mistake that the user can fix; the command line prints it without a traceback.

    Args:
        found: the value that is wrong, with the file or setting that it belongs to.
        expected: the rule that it breaks.
        remedy: what to do now, printed with the label "fix".
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        self.found, self.expected, self.remedy = _short(found), _short(expected), _short(remedy)
        lines = [self.found]
        if expected:
            lines.append(f"  expected: {self.expected}")
        if remedy:
            lines.append(f"  fix:      {self.remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[AsitError], tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.remedy)


class ConfigError(AsitError):
    """A setting or argument that does not exist, or values that do not go together."""


def missing_extra(what: str, package: str | None, extra: str) -> ConfigError:
    """Return the error of something that needs a package of an extra which is not installed."""
    found = f"{what} needs {package}, which is not installed"
    return ConfigError(found, f"the extra {extra}", f"pip install 'asit-audio[{extra}]'")


class AudioError(AsitError):
    """A file that cannot be read as audio, or audio that does not fit the model."""


class CatalogueError(AsitError):
    """A folder, table or catalogue without a usable list of clips."""


class StoreError(AsitError):
    """A shard or file that a store does not deliver: missing, shorter than its index says, or timed out.

    It stops a run, unlike a single unreadable clip, since all clips of that shard would be missing.
    """


class CheckpointError(AsitError):
    """Weights or training state that are missing, damaged, of another size or of a newer version."""


class TrainingError(AsitError):
    """A run that must stop: a loss that is not finite, or processes that disagree."""
