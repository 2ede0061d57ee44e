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
PARAMETERS = {
    "connectivity": CONNECTIVITY,
    "expansion_add": EXPANSION_ADD,
    "expansion_search": EXPANSION_SEARCH,
}

_BASE = 2 * CONNECTIVITY
_HEAD = np.dtype(
    [
        ("magic", "S7"),
        ("version", "<u2", 3),
        ("metric", "u1"),
        ("scalar", "u1"),
        ("key", "u1"),
        ("slot", "u1"),
        ("present", "<u8"),
        ("deleted", "<u8"),
        ("width", "<u8"),
        ("multi", "u1"),
        ("rest", "V22"),
    ]
)
_GRAPH = np.dtype([(name, "<u8") for name in ("size", "connectivity", "base", "max_level", "entry")])
_COSINE, _FLOAT16, _UINT64, _UINT32 = ord("c"), 12, 14, 15
_NODE = 10  # bytes of a node's key and level
_CHUNK = 1 << 15  # nodes that are checked together
_MOST_LEVELS = 64  # each level has 1 / CONNECTIVITY of the nodes of the one below, so 64 never occur

Vectors = npt.NDArray[np.float16]


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

    def nearest(self, vector: npt.NDArray[np.float32], k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
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
        if len(graph) != rows or graph._index.ndim != width:
            raise _damaged(path, f"{len(graph)} vectors of {graph._index.ndim} were read")
        return graph


def check(path: Path, rows: int, width: int) -> None:
    """Raise CheckpointError for a graph file that this module did not write, or in which anything points outside.

    Args:
        rows: N that the file must hold.
        width: D.
    """
    size = path.stat().st_size
    head = 8 + rows * width * 2
    start = head + _HEAD.itemsize + _GRAPH.itemsize
    if rows < 1 or size < start + 2 * rows:
        raise _damaged(path, f"it has {size} bytes, too few for {rows} vectors of {width}")
    data = np.memmap(path, np.uint8, "r")
    matrix = data[:8].view("<u4").tolist()
    facts, graph = data[head:][: _HEAD.itemsize].view(_HEAD)[0], data[start - _GRAPH.itemsize : start].view(_GRAPH)[0]
    found = {
        "matrix": tuple(matrix),
        "magic": bytes(facts["magic"]),
        "format": int(facts["version"][0]),
        "kinds": tuple(int(facts[name]) for name in ("metric", "scalar", "key", "slot", "multi")),
        "counts": tuple(int(facts[name]) for name in ("present", "deleted", "width")),
        "graph": tuple(int(graph[name]) for name in ("size", "connectivity", "base")),
    }
    expected = {
        "matrix": (rows, 2 * width),
        "magic": b"usearch",
        "format": 2,
        "kinds": (_COSINE, _FLOAT16, _UINT64, _UINT32, 0),
        "counts": (rows, 0, width),
        "graph": (rows, CONNECTIVITY, _BASE),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise _damaged(path, f"its {name} is {found[name]}, not {value}")
    levels = data[start : start + 2 * rows].view("<i2").astype(np.int64)
    top, entry = int(graph["max_level"]), int(graph["entry"])
    if top > _MOST_LEVELS or levels.min() < 0 or entry >= rows or levels.max() != top or levels[entry] != top:
        raise _damaged(path, "its levels do not fit together")
    lengths = _NODE + 4 * (1 + _BASE) + levels * 4 * (1 + CONNECTIVITY)
    nodes = start + 2 * rows
    if nodes + int(lengths.sum()) != size:
        raise _damaged(path, f"it has {size} bytes, and its levels make {nodes + int(lengths.sum())}")
    offsets = nodes + np.cumsum(lengths) - lengths
    _check_heads(path, data, offsets, levels)
    for level in range(top + 1):
        slots, shift = (
            (_BASE, 0) if level == 0 else (CONNECTIVITY, 4 * (1 + _BASE) + (level - 1) * 4 * (1 + CONNECTIVITY))
        )
        _check_level(path, data, offsets[levels >= level] + _NODE + shift, slots, levels, level)


def _check_heads(
    path: Path, data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], levels: npt.NDArray[np.int64]
) -> None:
    """Check that keys are the rows, each once, and that each node has the level that is listed."""
    rows = len(levels)
    seen = np.zeros(rows, bool)
    for at in range(0, rows, _CHUNK):
        part = data[offsets[at : at + _CHUNK, None] + np.arange(_NODE)]
        keys = np.ascontiguousarray(part[:, :8]).view("<u8")[:, 0]
        level = np.ascontiguousarray(part[:, 8:]).view("<i2")[:, 0]
        if keys.max() >= rows or (level != levels[at : at + _CHUNK]).any():
            raise _damaged(path, "its nodes are not those of its rows")
        seen[keys] = True
    if not seen.all():
        raise _damaged(path, "its nodes are not those of its rows")


def _check_level(
    path: Path,
    data: npt.NDArray[np.uint8],
    offsets: npt.NDArray[np.int64],
    slots: int,
    levels: npt.NDArray[np.int64],
    level: int,
) -> None:
    """Check that each list on a level fits its slots, and has nodes only that reach that level themselves."""
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
