"""What an index knows of its rows: which recording, from when to when, and what its file was when it was read.

Letters: N rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import Item
from asit.io import storage

ROW = np.dtype([("file", "<u4"), ("start", "<f8"), ("end", "<f8")])
"""A row: place in the list of sources, and seconds from the beginning of its file or tar member."""

Rows = npt.NDArray[Any]
Key = tuple[str, str | None, float, float | None]


@dataclass(frozen=True, slots=True)
class Source:
    """A recording, and its file's size and time when it was read.

    Attributes:
        name: what it is called: as the user gave it.
        path: its file, absolute, its folder without symbolic links.
        size: bytes of that file.
        modified: its time of change in ns, as the file system keeps it.
        member, offset, length: of a recording in a tar shard: its name, and where its bytes lie.
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
    def key(self) -> Key:
        """What makes it the same recording as one that was seen before."""
        return self.path, self.member, self.start, self.seconds

    @property
    def state(self) -> tuple[int, int]:
        """What makes it unchanged."""
        return self.size, self.modified

    def item(self) -> Item:
        """The recording, to be read."""
        return Item(self.name, self.path, self.member, self.offset, self.length, self.start, self.seconds, self.label)


class Files:
    """Files as they are now; each is asked once, however many recordings it holds."""

    def __init__(self) -> None:
        self._folder = cache(os.path.realpath)
        self._state = cache(storage.fingerprint)

    def path(self, path: str) -> str:
        """Absolute, the folder without symbolic links: two ways to a file are one. A URL as it is."""
        if storage.is_url(path):
            return path
        folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100
        return os.path.join(self._folder(folder), name)  # noqa: PTH118

    def state(self, path: str) -> tuple[int, int]:
        """Size and time of change; of what lies in a store, a number that stands for its mark.

        Raises:
            OSError: there is no such file, or it cannot be looked at.
            StoreError: the same of what lies in a store.
        """
        return self._state(path)

    def source(self, item: Item) -> Source:
        """The recording with its file's state.

        Raises:
            OSError, StoreError: as `state`.
        """
        path = self.path(item.path)
        return Source(
            item.name,
            path,
            *self.state(path),
            member=item.member,
            offset=item.offset,
            length=item.size,
            start=item.start,
            seconds=item.seconds,
            label=item.label,
        )


def to_line(source: Source) -> dict[str, Any]:
    """JSON of a source; what is not known is left out."""
    defaults = {field.name: field.default for field in dataclasses.fields(Source)}
    return {name: value for name, value in dataclasses.asdict(source).items() if value != defaults[name]}


def from_line(value: Any) -> Source:
    """A source of its JSON.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, dict):
        raise ValueError("a line is no JSON object")
    kinds: dict[str, type | tuple[type, ...]] = {
        **dict.fromkeys(("name", "path", "member", "label"), str),
        **dict.fromkeys(("size", "modified", "offset", "length"), int),
        **dict.fromkeys(("start", "seconds"), (int, float)),
    }
    for name, field in value.items():
        if name not in kinds or not isinstance(field, kinds[name]) or isinstance(field, bool):
            raise ValueError(f"a line has {name}: {field!r}"[:200])
    try:
        return Source(**value)
    except TypeError:
        raise ValueError(f"a line has only {', '.join(value)}"[:200]) from None


def lines(sources: Iterable[Source]) -> Iterator[str]:
    """Lines of sources.jsonl; names that are no Unicode come back as they were."""
    for source in sources:
        yield json.dumps(to_line(source)) + "\n"
