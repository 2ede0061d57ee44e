"""Where the clips of a catalogue lie: files below a root, or stretches of bytes in tar shards below it."""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH109

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.columns import SHARD
from asit.io import storage

if TYPE_CHECKING:
    from asit.data.catalogue.catalogue import Clip

INDEX = "index.jsonl"
"""Name of the catalogue that lies beside the shards it lists."""
HERE = "."
"""Root of an index: the folder that the file itself lies in, wherever that is now."""


@dataclass(frozen=True)
class Shards:
    """Where the clips of a catalogue lie in tar shards.

    Attributes:
        places: of the shards, absolute paths or URLs.
        codes: (N,) int32, which of `places` holds each clip; -1: it is a file of its own.
        spans: (N, 2) int64, offset and size of each clip's bytes in its shard.
    """

    places: tuple[str, ...]
    codes: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int64]


def common(clips: Sequence[Clip]) -> str:
    """The deepest folder that holds all clips, or their shards."""
    folders = {storage.parent(clip.shard or clip.path) for clip in clips}
    if any(map(storage.is_url, folders)):
        return folders.pop() if len(folders) == 1 else os.getcwd()
    try:
        return os.path.commonpath(folders) if folders else os.getcwd()
    except ValueError:  # on several drives
        return os.getcwd()


def placed(clip: Clip, root: str) -> dict[str, str | None]:
    """How a clip's place is written: its path, and its shard's, below root."""
    if clip.shard is None:
        return {"path": relative(storage.absolute(clip.path), root)}
    return {"path": clip.path.removeprefix(clip.shard + "/"), SHARD: relative(storage.absolute(clip.shard), root)}


def relative(full: str, root: str) -> str:
    """The path below root, with "/"; outside it, the absolute path, or the URL."""
    separator = "/" if storage.is_url(root) else os.sep
    top = root if root.endswith(separator) else root + separator
    return full[len(top) :].replace(os.sep, "/") if full.startswith(top) else full
