"""Check tar shards against their index: existence and length before a run, SHA-256 on request."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from asit.data.catalogue.catalogue import INDEX, Catalogue
from asit.errors import CatalogueError, StoreError
from asit.io import storage

_PIECE = 1 << 23  # bytes read at a time
_AT_ONCE = 4  # shards, so that requests and hashing overlap


def verify_sizes(index: Catalogue, *, progress: Callable[[int, int, int], None] | None = None) -> None:
    """Refuse a catalogue whose shards are missing or too short; one request per shard.

    Raises:
        StoreError: names them.
    """
    found = index.shards
    if found is None:
        return
    used = np.unique(found.codes[found.codes >= 0])
    ends = np.zeros(len(found.shards), np.int64)
    inside = found.codes >= 0
    np.maximum.at(ends, found.codes[inside], found.spans[inside].sum(1))
    lengths = storage.sizes([found.shards[code] for code in used])
    missing = [found.shards[code] for code in used if found.shards[code] not in lengths]
    short = [
        f"{found.shards[code]} ({lengths[found.shards[code]]:,} of {ends[code]:,} bytes or more)"
        for code in used
        if found.shards[code] in lengths and lengths[found.shards[code]] < ends[code]
    ]
    if progress:
        progress(len(used), len(used), len(missing) + len(short))
    if missing or short:
        faults = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
        faults += [f"{len(short)} too short: {', '.join(short[:3])}"] if short else []
        raise StoreError(
            f"of {len(used)} shards {'; '.join(faults)}",
            "every shard that the index lists, complete",
            "bring them back or copy them again; or write them again with asit shard",
        )


def check(location: str, *, progress: Callable[[int, int, int], None] | None = None) -> Catalogue:
    """Read all shards of a folder, URL or index, and compare their hashes with those that the index holds.

    Raises:
        CatalogueError: no index there.
        StoreError: shards that are missing, too short or damaged; names them.
    """
    if not location.endswith(".jsonl") and Path(location).is_file():
        raise CatalogueError(
            f"{location} is a file", "a folder of shards, or its index.jsonl", "give the shards' folder"
        )
    location = location if location.endswith(".jsonl") else storage.join(location.rstrip("/"), INDEX)
    index = Catalogue.read(location, look=False)
    listed = index.header.get("shards")
    if index.shards is None or not listed:
        raise CatalogueError(f"{location} lists no shards", "an index of asit shard", "check the path")
    verify_sizes(index)

    def is_intact(shard: dict[str, Any]) -> bool:
        digest, length = hashlib.sha256(), int(shard["bytes"])
        at = storage.join(index.root, shard["name"])
        if storage.size(at) == length:
            for first in range(0, length, _PIECE):
                digest.update(storage.read_range(at, first, min(_PIECE, length - first)))
        return digest.hexdigest() == str(shard["sha256"])

    wrong: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE, "check") as threads:
        for number, (shard, intact) in enumerate(zip(listed, threads.map(is_intact, listed), strict=True), 1):
            if not intact:
                wrong.append(shard["name"])
            if progress:
                progress(number, len(listed), len(wrong))
    if wrong:
        raise StoreError(
            f"{len(wrong)} of {len(listed)} shards in {index.root} are damaged: {', '.join(wrong[:5])}",
            "the bytes that were written, by SHA-256",
            "copy them again from where they came, or write them again with asit shard",
        )
    return index
