"""What searching an index costs: every row compared, and the graph beside it; how many of the true neighbours it finds.

    python bench/search.py [--toy] [--million] [--threads 1] [--index INDEX]

Vectors of 768, as a base encoder gives them. Clustered: 500 centres that differ in 64 directions, with noise around
them, half of it in all directions; embeddings of sounds look like that. Random: nothing but noise, the hardest case,
where no neighbour is much nearer than any other; only 10,000 of them. Questions are drawn as the vectors are, and are
none of them. Recall is the share of the 10 nearest by comparing every row, in float32, that the graph finds. With
--index the rows of an index that is there, one in a hundred taken out as questions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.search import Index, index_files
from asit.search.hnsw import Graph, check
from asit.search.recordings import Source

WIDTH, QUESTIONS, K = 768, 200, 10

Vectors = npt.NDArray[np.float16]


def drawn(count: int, kind: str, seed: int) -> npt.NDArray[np.float32]:
    """(count, WIDTH) of length 1; the centres are the same for every seed."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(7)
    out = rng.standard_normal((count, WIDTH), np.float32)
    if kind == "clustered":
        directions = fixed.standard_normal((64, WIDTH), np.float32) / 8
        centres = fixed.standard_normal((500, 64), np.float32)
        inner = centres[rng.integers(500, size=count)] + 0.7 * rng.standard_normal((count, 64), np.float32)
        out = inner @ directions + 0.35 * out
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out


def indexed(vectors: Vectors, graph: Graph | None) -> Index:
    """An index of vectors alone."""
    rows = np.zeros(len(vectors), index_files.ROW)
    rows["file"] = np.arange(len(vectors))
    source = Source("a.wav", "a.wav", 0, 0)
    card = {"width": vectors.shape[1], "pooling": "mean"}
    return Index(Path(), card, sources=[source] * len(vectors), rows=rows, vectors=vectors, graph=graph)


def timed(work: Callable[[Any], Any], items: npt.NDArray[Any]) -> tuple[float, list[Any]]:
    """Median seconds of each, after one that warms up, and what came out."""
    work(items[0])
    seconds, found = [], []
    for item in items:
        start = time.perf_counter()
        found.append(work(item))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), found


def measure(name: str, vectors: Vectors, questions: npt.NDArray[np.float32], threads: int) -> dict[str, float]:
    """Print one row of the table."""
    exact = indexed(vectors, None)
    exact_seconds, truth = timed(lambda vector: {hit.row for hit in exact.nearest(vector, K)}, questions)
    graph = Graph(vectors.shape[1])
    start = time.perf_counter()
    graph.add(vectors, threads)
    build = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.usearch"
        graph.save(path)
        size = path.stat().st_size
        start = time.perf_counter()
        check(path, *vectors.shape)
        checked = time.perf_counter() - start
        graph = Graph.load(path, *vectors.shape)
        loaded = time.perf_counter() - start - checked
    walked = indexed(vectors, graph)
    seconds, found = timed(lambda vector: {hit.row for hit in walked.nearest(vector, K)}, questions)
    recall = statistics.mean(len(a & b) / len(a) for a, b in zip(truth, found, strict=True))
    print(
        f"| {name} | {len(vectors)} | {exact_seconds * 1e3:.2f} | {build:.1f} | {size / 1e6:.0f} | {checked:.2f} | "
        f"{loaded:.2f} | {seconds * 1e3:.2f} | {recall:.3f} |",
        flush=True,
    )
    return {"exact": exact_seconds, "build": build, "graph": seconds, "load": loaded, "check": checked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="few vectors: whether it runs, in seconds")
    parser.add_argument("--million", action="store_true", help="also a million clustered vectors")
    parser.add_argument("--threads", type=int, default=1, help="that build the graph")
    parser.add_argument("--index", type=Path, help="also the rows of this index")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.threads} threads build\n")
    print(
        "| vectors | rows | every row, ms | build, s | file, MB | check, s | load, s | graph, ms | recall@10 |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    counts = [1_000] if options.toy else [10_000, 100_000] + [1_000_000] * options.million
    costs: dict[str, float] = {}
    for kind in ("clustered", "random"):
        for count in counts:
            if kind == "random" and count > 10_000:
                continue
            questions = drawn(20 if options.toy else QUESTIONS, kind, 1)
            found = measure(kind, drawn(count, kind, 0).astype(np.float16), questions, options.threads)
            costs = found if kind == "clustered" else costs
    if options.index is not None:
        vectors = np.asarray(Index.read(options.index).vectors)
        away = np.arange(len(vectors)) % 100 == 0
        measure(options.index.name, vectors[~away], vectors[away].astype(np.float32), options.threads)
    if not options.million:
        scale = 1_000_000 / counts[-1]
        print(
            f"\nA million clustered vectors, projected from {counts[-1]} (in proportion, the walk as it is): every row "
            f"{costs['exact'] * scale * 1e3:.0f} ms, build {costs['build'] * scale / 60:.0f} min, check "
            f"{costs['check'] * scale:.1f} s, load {costs['load'] * scale:.1f} s."
        )


if __name__ == "__main__":
    main()
