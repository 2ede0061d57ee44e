"""Readers of known data sets in the layout in which they are distributed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from asit.data.corpora import audioset, esc50, speech_commands, voxceleb1
from asit.data.corpora.corpus import Corpus
from asit.errors import CatalogueError, suggestion

__all__ = ["NAMES", "Corpus", "check_name", "read"]

_READERS: dict[str, Callable[..., Corpus]] = {
    "audioset": audioset.read,
    "esc50": esc50.read,
    "speech-commands-v1": speech_commands.read_v1,
    "speech-commands-v2": speech_commands.read_v2,
    "voxceleb1": voxceleb1.read,
}

NAMES = tuple(_READERS)
"""The data sets, as on the command line."""


def check_name(name: str) -> None:
    """Raise a CatalogueError with the nearest name unless `name` is one of :data:`NAMES`."""
    if name not in _READERS:
        found = f"{name} is not a data set that asit knows{suggestion(name.lower().replace('_', '-'), NAMES)}"
        raise CatalogueError(found, "one of " + ", ".join(NAMES), "give a folder or a table alone for any other set")


def read(name: str, root: str | os.PathLike[str], *, incomplete: bool = False, **options: Any) -> Corpus:
    """Read a known data set below root; files are listed, not opened.

    Args:
        name: one of :data:`NAMES`.
        root: the folder it was unpacked into.
        incomplete: accept missing clips; the notes have the counts.
        options: of the reader: `most_missing` of audioset, `test_root` and `seed` of speech-commands-v1.

    Raises:
        CatalogueError: an unknown name, another layout, a damaged list, or clips missing.
    """
    check_name(name)
    return _READERS[name](root, incomplete=incomplete, **options)
