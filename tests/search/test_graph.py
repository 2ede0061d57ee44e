"""The graph of a large index: what it finds, and that no file makes it read other memory."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from asit.errors import CheckpointError, ConfigError
from asit.search.hnsw import Graph, check

N, D = 600, 16


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    found = np.random.default_rng(0).standard_normal((N, D))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def saved(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.usearch"
    graph = Graph(D)
    graph.add(vectors)
    graph.save(path)
    return path


def test_finds_what_is_nearest(vectors: np.ndarray, saved: Path) -> None:
    graph = Graph.load(saved, N, D)
    exact = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    found = 0
    for row in range(0, N, 10):
        rows, similarities = graph.nearest(vectors[row].astype(np.float32), 10)
        found += len(set(rows.tolist()) & set(np.argsort(-exact[row])[:10].tolist()))
        assert rows[0] == row
        np.testing.assert_allclose(similarities, exact[row][rows], atol=2e-3)
        assert (np.diff(similarities) <= 0).all()
    assert found >= 0.98 * 10 * (N / 10)


def test_rows_added_later_are_found(vectors: np.ndarray, saved: Path) -> None:
    graph = Graph.load(saved, N, D)
    graph.add(-vectors[:5])
    assert len(graph) == N + 5
    assert graph.nearest(-vectors[3].astype(np.float32), 1)[0].tolist() == [N + 3]


def test_threads_may_search_at_once(vectors: np.ndarray, saved: Path) -> None:
    graph = Graph.load(saved, N, D)
    with ThreadPoolExecutor(8) as pool:
        rows = pool.map(lambda row: graph.nearest(vectors[row].astype(np.float32), 1)[0][0], range(N))
        assert list(rows) == list(range(N))


def _layout(saved: Path) -> tuple[int, int]:
    """Where the levels begin, and where the nodes do."""
    levels = 8 + N * D * 2 + 64 + 40
    return levels, levels + 2 * N


def test_the_check_knows_the_layout(saved: Path) -> None:
    levels, nodes = _layout(saved)
    data = saved.read_bytes()
    assert data[8 + N * D * 2 :][:7] == b"usearch"
    first = int.from_bytes(data[levels : levels + 2], "little")
    assert int.from_bytes(data[nodes : nodes + 8], "little") == 0  # the key of row 0
    assert int.from_bytes(data[nodes + 8 : nodes + 10], "little") == first


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "bytes"),
        ("longer", "bytes"),
        ("empty", "too few"),
        ("rows", "matrix"),
        ("magic", "magic"),
        ("version", "its format is 3, not 2"),
        ("float32", "its scalar is 11, not 12"),
        ("width", "its width is"),
        ("connectivity", "its connectivity is 255, not 16"),
        ("entry", "levels"),
        ("top", "levels"),
        ("level", "bytes|levels"),
        ("key", "not those of its rows"),
        ("twice", "not those of its rows"),
        ("count", "point outside"),
        ("neighbour", "point outside"),
    ],
)
def test_a_file_that_points_outside_is_refused(saved: Path, tmp_path: Path, what: str, message: str) -> None:
    data = bytearray(saved.read_bytes())
    levels, nodes = _layout(saved)
    head, graph = 8 + N * D * 2, 8 + N * D * 2 + 64
    huge = (0xFFFFFFF0).to_bytes(4, "little")
    if what == "truncated":
        data = data[:-1]
    elif what == "longer":
        data += b"\0"
    elif what == "empty":
        data = data[:100]
    else:
        at, value = {
            "rows": (0, huge),
            "magic": (head, b"U"),
            "version": (head + 7, b"\3"),
            "float32": (head + 14, b"\x0b"),
            "width": (head + 33, b"\xff"),
            "connectivity": (graph + 8, b"\xff"),
            "entry": (graph + 32, huge),
            "top": (graph + 24, b"\x40"),
            "level": (levels, b"\x09"),
            "key": (nodes, huge),
            "twice": (nodes, b"\1"),
            "count": (nodes + 10, huge),
            "neighbour": (nodes + 14, huge),
        }[what]
        data[at : at + len(value)] = value
    bad = tmp_path / "graph.usearch"
    bad.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        Graph.load(bad, N, D)


def test_whatever_is_flipped_is_refused_or_harmless(saved: Path, tmp_path: Path, vectors: np.ndarray) -> None:
    """A file that passes the check is searched; reading outside would end this process."""
    rng = np.random.default_rng(1)
    whole, bad = saved.read_bytes(), tmp_path / "graph.usearch"
    start, refused = 8 + N * D * 2, 0
    for _ in range(120):
        data = bytearray(whole)
        at = int(rng.integers(start, len(data)))
        data[at] ^= 1 << int(rng.integers(8))
        bad.write_bytes(data)
        try:
            graph = Graph.load(bad, N, D)
        except CheckpointError:
            refused += 1
            continue
        for row in range(3):
            rows, _ = graph.nearest(vectors[row].astype(np.float32), 10)
            assert (rows < N).all()
    assert 20 < refused < 120


def test_another_number_of_vectors_is_refused(saved: Path) -> None:
    for rows, width in ((N + 1, D), (N, D + 1), (N, 2 * D)):
        with pytest.raises(CheckpointError, match="damaged"):
            check(saved, rows, width)


def test_a_short_write_is_seen(vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(D)
    graph.add(vectors)

    class Short:
        serialized_length = 1000

        def __len__(self) -> int:
            return N

        def save(self, path: Path) -> None:
            path.write_bytes(b"\0" * 100)

    monkeypatch.setattr(graph, "_index", Short())
    with pytest.raises(CheckpointError, match="could not be written"):
        graph.save(tmp_path / "graph.usearch")


def test_without_usearch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch", None)
    with pytest.raises(ConfigError, match=r"asit-audio\[search\]"):
        Graph(D)


def test_one_thread_makes_the_same_graph_twice(vectors: np.ndarray, saved: Path, tmp_path: Path) -> None:
    again = Graph(D)
    again.add(vectors)
    again.save(tmp_path / "graph.usearch")
    assert (tmp_path / "graph.usearch").read_bytes() == saved.read_bytes()
