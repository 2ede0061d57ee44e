"""What a search of an index costs: the first, which converts the vectors to float32, and each further one.

    python bench/search.py [--toy] [--million] [--index INDEX]

Random vectors of 768, as wide as a base encoder gives them: the cost does not depend on their values. With --index the
rows of an index that is there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.search import Index, index_files

WIDTH, QUESTIONS, K = 768, 50, 10


def measure(name: str, vectors: npt.NDArray[np.float16]) -> None:
    """Print one row of the table."""
    rows = np.zeros(len(vectors), index_files.ROW)
    card: dict[str, Any] = {"width": vectors.shape[1], "pooling": "mean"}
    index = Index(Path(), card, [index_files.Source("a.wav", "a.wav", 0, 0)], rows, vectors)
    seconds = []
    for question in vectors[:QUESTIONS].astype(np.float32):
        start = time.perf_counter()
        index.nearest(question, K)
        seconds.append(time.perf_counter() - start)
    gigabytes = 4 * vectors.size / 1e9
    print(
        f"| {name} | {len(vectors)} | {seconds[0]:.2f} | {1e3 * statistics.median(seconds[1:]):.1f} | {gigabytes:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="few vectors: whether it runs, in seconds")
    parser.add_argument("--million", action="store_true", help="also a million vectors")
    parser.add_argument("--index", type=Path, help="also the rows of this index")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| vectors | rows | first search, s | each, ms | memory, GB |\n|---|---|---|---|---|")
    for count in [1_000] if options.toy else [10_000, 100_000] + [1_000_000] * options.million:
        draw = np.random.default_rng(0)
        blocks = [draw.standard_normal((1_000, WIDTH), np.float32).astype(np.float16) for _ in range(count // 1_000)]
        measure("random", np.concatenate(blocks))
    if options.index is not None:
        measure(options.index.name, np.asarray(Index.read(options.index).vectors))


if __name__ == "__main__":
    main()
