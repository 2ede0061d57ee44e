"""Recordings of an index: their names, files and fingerprints, and the lines of sources.jsonl that keep them."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from asit.data.catalogue.inputs import Item
from asit.io import storage


class RecordingKey(NamedTuple):
    """What identifies a recording in an index."""

    path: str
    member: str | None
    start: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Source:
    """A recording, and the fingerprint of its file when it was read.

    Attributes:
        name: as the user gave it.
        path: its file, absolute, its folder without symbolic links.
        size: bytes of that file.
        modified: its time of change in ns.
        member, offset, length: of a recording in a tar shard: its name, and the range of its bytes.
        start, seconds: of a catalogue's clip: the part of the file.
        label: of a catalogue's clip or a table's row.
    """

    name: str
    path: str
    size: int
    modified: int
    member: str | None = None
    offset: int | None = None
    length: int | None = None
    start: float = 0.0
    seconds: float | None = None
    label: str | None = None

    @property
    def key(self) -> RecordingKey:
        """The same for the same recording, whether its file has changed or not."""
        return RecordingKey(self.path, self.member, self.start, self.seconds)

    @property
    def fingerprint(self) -> tuple[int, int]:
        """The same while the file is unchanged."""
        return self.size, self.modified

    def item(self) -> Item:
        """Return the recording as an input."""
        return Item(path=self.path, size=self.length, **{name: getattr(self, name) for name in _SHARED})


class Files:
    """Paths and fingerprints of files; each file is looked at once, however many recordings it holds."""

    def __init__(self) -> None:
        self._folder = cache(os.path.realpath)
        self.fingerprint = cache(storage.fingerprint)

    def path(self, path: str) -> str:
        """Return the absolute path, its folder without symbolic links; a URL as it is."""
        if storage.is_url(path):
            return path
        folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        return os.path.join(self._folder(folder), name)  # noqa: PTH118

    def source(self, item: Item) -> Source:
        """Return the recording with its file's fingerprint; errors are those of `storage.fingerprint`."""
        path = self.path(item.path)
        size, modified = self.fingerprint(path)
        shared = {name: getattr(item, name) for name in _SHARED}
        return Source(path=path, size=size, modified=modified, length=item.size, **shared)


_SHARED = ("name", "member", "offset", "start", "seconds", "label")
"""Fields that a `Source` and its `Item` both have."""
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Source)}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "path", "member", "label"), str),
    **dict.fromkeys(("size", "modified", "offset", "length"), int),
    **dict.fromkeys(("start", "seconds"), (int, float)),
}


def to_json(source: Source) -> dict[str, Any]:
    """Return a source as JSON, without fields at their defaults."""
    return {name: value for name, value in dataclasses.asdict(source).items() if value != _DEFAULTS[name]}


def from_json(value: Any) -> Source:
    """Return the source of its JSON; raises ValueError where it is something else."""
    if not isinstance(value, dict):
        raise ValueError("a line is no JSON object")
    for name, field in value.items():
        if name not in _TYPES or not isinstance(field, _TYPES[name]) or isinstance(field, bool):
            raise ValueError(f"a line has {name}: {field!r}"[:200])
    try:
        return Source(**value)
    except TypeError:
        raise ValueError(f"a line has only {', '.join(value)}"[:200]) from None
