"""The graph of a large index (HNSW, by usearch), and the check of its file before it is loaded.

Method: Malkov and Yashunin, arXiv 1603.09320. usearch trusts its files: numbers that point outside the file would make
it read other memory. `check` therefore verifies all counts, levels and neighbours first. Layout (usearch 2.x,
`index_dense.hpp` and `index.hpp`): N vectors, a head of 64 bytes, the graph's head, N levels, and N nodes, each a key,
its level, and a counted list of neighbours for each level from 0 up.

Letters: N vectors, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.errors import CheckpointError, ConfigError

CONNECTIVITY = 16
"""Neighbours of a node on the upper levels; the lowest has twice as many."""
EXPANSION_ADD = 128
"""Candidates when a vector is added."""
EXPANSION_SEARCH = 128
"""Candidates when a vector is searched; bench/search.py measures the recall."""
PARAMETERS = {"connectivity": CONNECTIVITY, "expansion_add": EXPANSION_ADD, "expansion_search": EXPANSION_SEARCH}

_BASE = 2 * CONNECTIVITY
_HEAD = np.dtype(
    [
        ("magic", "S7"),
        ("format", "<u2"),
        ("minor", "V4"),
        *((name, "u1") for name in ("metric", "scalar", "key", "slot")),
        *((name, "<u8") for name in ("present", "deleted", "width")),
        ("multi", "u1"),
        ("rest", "V22"),
        *((name, "<u8") for name in ("size", "connectivity", "base", "max_level", "entry")),
    ]
)
"""Both heads. Cosine of float16, keys uint64, slots uint32, one vector for each key are the kinds that are written."""
_KINDS = {"magic": b"usearch", "format": 2, "metric": ord("c"), "scalar": 12, "key": 14, "slot": 15, "multi": 0}
_NODE = 10  # bytes of a node's key and level
_LIST_BASE, _LIST = 4 * (1 + _BASE), 4 * (1 + CONNECTIVITY)  # bytes of a list on level 0, and on the others
_CHUNK = 1 << 15  # nodes that are checked together
_MOST_LEVELS = 64  # each level has 1 / CONNECTIVITY of the nodes of the one below, so 64 never occur

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


class Graph:
    """N vectors in a graph, keyed by their row.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._index = _usearch().Index(ndim=width, metric="cos", dtype="f16", **PARAMETERS)
        # Searches share one of usearch's workspaces; each takes well under a millisecond.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._index)

    def add(
        self, vectors: npt.NDArray[Any], threads: int = 1, tick: Callable[[int, int, int], None] | None = None
    ) -> None:
        """Append rows. With more than one thread the graph depends on their timing.

        Args:
            vectors: (n, D) float16.
            threads: CPU threads.
            tick: is called with (done, n, 0).
        """
        first = len(self)
        for at in range(0, len(vectors), 4096):
            part = np.ascontiguousarray(vectors[at : at + 4096])
            self._index.add(np.arange(first + at, first + at + len(part), dtype=np.uint64), part, threads=threads)
            if tick is not None:
                tick(at + len(part), len(vectors), 0)

    def nearest(self, vector: npt.NDArray[np.float32], k: int) -> tuple[Integers, npt.NDArray[np.float32]]:
        """Return rows and cosine similarities of about the k nearest to a vector (D,), best first; thread-safe."""
        with self._lock:
            found = self._index.search(vector, min(k, len(self)), threads=1)
        return found.keys.astype(np.int64), (1 - found.distances).astype(np.float32)

    def save(self, path: Path) -> None:
        """Write the graph with its vectors; raises CheckpointError where that fails."""
        try:
            self._index.save(path)
            check(path, len(self), self.width)
        except (RuntimeError, CheckpointError) as error:
            raise CheckpointError(
                f"{path.name} could not be written: {error}",
                f"room for {self._index.serialized_length / 1e6:.0f} MB",
                "free space on the disk, and run the same command again",
            ) from error

    @classmethod
    def load(cls, path: Path, rows: int, width: int) -> Graph:
        """Check and load a file of `save`.

        Raises:
            CheckpointError: as `check`.
            ConfigError: usearch is not installed.
        """
        graph = cls(width)
        check(path, rows, width)
        try:
            graph._index.load(path)
        except RuntimeError as error:
            raise _damaged(path, str(error)) from error
        return graph


def check(path: Path, rows: int, width: int) -> None:
    """Raise CheckpointError for a graph file that this module did not write, or in which anything points outside.

    Args:
        rows: N that the file must hold.
        width: D.
    """
    size, head = path.stat().st_size, 8 + rows * width * 2
    start = head + _HEAD.itemsize
    nodes = start + 2 * rows
    if rows < 1 or size < nodes:
        raise _damaged(path, f"it has {size} bytes, too few for {rows} vectors of {width}")
    data: Bytes = np.memmap(path, np.uint8, "r")
    matrix = data[:8].view("<u4").tolist()
    if matrix != [rows, 2 * width]:
        raise _damaged(path, f"its matrix is {matrix}, not {[rows, 2 * width]}")
    facts = data[head:start].view(_HEAD)[0]
    counts = {"present": rows, "deleted": 0, "width": width, "size": rows, "connectivity": CONNECTIVITY, "base": _BASE}
    for name, value in {**_KINDS, **counts}.items():
        if facts[name] != value:
            raise _damaged(path, f"its {name} is {facts[name]}, not {value}")
    levels: Integers = data[start:nodes].view("<i2").astype(np.int64)
    top, entry = int(facts["max_level"]), int(facts["entry"])
    if top > _MOST_LEVELS or levels.min() < 0 or entry >= rows or levels.max() != top or levels[entry] != top:
        raise _damaged(path, "its levels do not fit together")
    lengths = _NODE + _LIST_BASE + levels * _LIST
    if nodes + int(lengths.sum()) != size:
        raise _damaged(path, f"it has {size} bytes, and its levels make {nodes + int(lengths.sum())}")
    offsets = nodes + np.cumsum(lengths) - lengths
    _check_heads(path, data, offsets, levels)
    for level in range(top + 1):
        at = _NODE + (_LIST_BASE + (level - 1) * _LIST if level else 0)
        _check_level(path, data, offsets[levels >= level] + at, levels, level)


def _check_heads(path: Path, data: Bytes, offsets: Integers, levels: Integers) -> None:
    """Check that keys are the rows, each once, and that each node has the level that is listed."""
    seen = np.zeros(len(levels), bool)
    for at in range(0, len(levels), _CHUNK):
        part = data[offsets[at : at + _CHUNK, None] + np.arange(_NODE)].view([("key", "<u8"), ("level", "<i2")])[:, 0]
        if part["key"].max() >= len(levels) or (part["level"] != levels[at : at + _CHUNK]).any():
            raise _damaged(path, "its nodes are not those of its rows")
        seen[part["key"]] = True
    if not seen.all():
        raise _damaged(path, "its nodes are not those of its rows")


def _check_level(path: Path, data: Bytes, offsets: Integers, levels: Integers, level: int) -> None:
    """Check that each list on a level fits its slots, and has nodes only that reach that level themselves."""
    slots = CONNECTIVITY if level else _BASE
    for at in range(0, len(offsets), _CHUNK):
        part = data[offsets[at : at + _CHUNK, None] + np.arange(4 * (1 + slots))].view("<u4")
        counts, neighbours = part[:, 0], part[:, 1:]
        used = neighbours[np.arange(slots) < counts[:, None]]
        if counts.max() > slots or (used >= len(levels)).any() or (levels[used] < level).any():
            raise _damaged(path, "its neighbours point outside it")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged or not asit's: {reason}",
        "the graph as `asit index` wrote it, with usearch 2.x",
        "copy the index again from where it was made, or rebuild it with `asit index --overwrite`",
    )


def _usearch() -> Any:
    try:
        from usearch import index
    except ImportError as error:
        raise ConfigError(
            "the package usearch is not installed, and this index is too large to search without it",
            "the extra search",
            "pip install 'asit-audio[search]'",
        ) from error
    return index
