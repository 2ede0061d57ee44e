"""The errors a user can meet: what was found, what was expected, and the way out."""

from __future__ import annotations

_LONGEST = 2000
"""Characters of a line of a message: what a damaged file says may be endless."""


def _short(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return "\n".join(line if len(line) <= _LONGEST else line[:_LONGEST] + "..." for line in text.split("\n")[:200])


class AsitError(Exception):
    """A mistake that the user can mend; the command line prints it without a traceback.

    Args:
        found: what was met, with its value and the file or setting it belongs to.
        expected: the rule that it breaks.
        remedy: what to do now.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str = "", remedy: str = "") -> None:
        found, expected, remedy = _short(found), _short(expected), _short(remedy)
        self.found, self.expected, self.remedy = found, expected, remedy
        lines = [found]
        if expected:
            lines.append(f"  expected: {expected}")
        if remedy:
            lines.append(f"  fix:      {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[type[AsitError], tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.remedy)


class ConfigError(AsitError):
    """A setting that does not exist, or values that cannot go together."""


class AudioError(AsitError):
    """A file that cannot be read as audio, or audio that does not fit the model."""


class CatalogueError(AsitError):
    """A folder or table that gives no usable list of clips."""


class StoreError(AsitError):
    """A shard or file that a store does not give: missing, shorter than its index says, or not reached in time.

    It is no bad clip: a run stops at it, for every clip of that place would be missing.
    """


class CheckpointError(AsitError):
    """Weights or run state that are missing, damaged, of another size or of a newer version."""


class TrainingError(AsitError):
    """A run that must not go on: a loss that is not finite, or ranks that disagree."""
