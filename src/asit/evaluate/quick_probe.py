"""The short form of a frozen evaluation: linear probes on a labelled table, beside plain log-mel statistics.

`asit.evaluate.frozen` asks more: other probes, few labels, folds. Both read features through `asit.evaluate.features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.catalogue import split_names
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.tables import TableRow, read_table
from asit.data.shards import tar_index
from asit.errors import CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL, LOG_MEL_STATISTICS, MODEL, UNTRAINED, encoders, pooled
from asit.evaluate.features import collect
from asit.evaluate.pooling import Pooling
from asit.evaluate.probes import ProbeResult, linear_probe
from asit.model.audio_model import AudioModel
from asit.progress import Counter, counter

__all__ = ["HEADLINE", "LOG_MEL_STATISTICS", "QUICK", "UNTRAINED", "Comparison", "compare", "labelled", "probe"]

POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean", "time-mean", "mel-mean")
"""What is read off the tokens; see `asit.evaluate.pooling.pool`."""
HEADLINE: Pooling = "class+mean"
QUICK: tuple[Pooling, ...] = ("class", "mean", "class+mean")
"""What is read off during pretraining: the narrow ones, which cost seconds."""
TRAIN, TEST = "train", "test"


@dataclass(frozen=True)
class Labelled:
    """Two sides of labelled clips."""

    train: list[Clip]
    test: list[Clip]

    @property
    def seconds(self) -> float:
        """The length that all are cut or padded to: the median of the first training clips, at most 10 s."""
        return min(10.0, float(np.median([clip.seconds for clip in self.train[:50]])))


@dataclass(frozen=True)
class Probed:
    """Accuracy for each kind of feature."""

    results: dict[str, ProbeResult]

    def record(self) -> dict[str, Any]:
        """As kept in metrics.jsonl."""
        return {
            "accuracy": self.results[HEADLINE].accuracy,
            "features": {name: result.accuracy for name, result in self.results.items()},
            "clips": self.results[HEADLINE].clips,
        }

    def sentence(self) -> str:
        """As told on the progress line."""
        shown = ", ".join(f"{name} {result.accuracy:.3f}" for name, result in self.results.items())
        return f"probe accuracy: {shown}"


def labelled(table: str | Path, most: int, seed: int) -> Labelled:
    """The training and test clips of a table, a catalogue or shards, at most `most` on each side, drawn with the seed.

    Raises:
        CatalogueError: no labels, or no split into train and test.
    """
    listed = tar_index.index_of(str(table))
    rows: Sequence[TableRow | Clip] = read_table(table) if listed is None else _clips(Catalogue.read(listed))
    bare = [row for row in rows if row.label is None]
    if bare:
        raise CatalogueError(
            f"{table}: {len(bare)} of {len(rows)} clips have no label, the first: {bare[0].path}",
            "a label for each clip of a probe",
            "fill the column label, or leave these lines out",
        )
    sides = {name: [row for row in rows if split_names.canonical(row.split or "") == name] for name in (TRAIN, TEST)}
    for name, side in sides.items():
        if not side:
            found = sorted({str(row.split) for row in rows})
            raise CatalogueError(
                f"{table}: no clip of the split {name!r}; its splits are {', '.join(found[:5])}",
                "a column split with train and test",
                "add it, so that the probe is scored on clips it has not been fitted on",
            )
        if len(side) > most:
            kept = np.sort(np.random.default_rng([seed, len(name)]).permutation(len(side))[:most])
            sides[name] = [side[i] for i in kept]
    return Labelled([_clip(row) for row in sides["train"]], [_clip(row) for row in sides["test"]])


def _clips(catalogue: Catalogue) -> list[Clip]:
    return [catalogue[place] for place in range(len(catalogue))]


def _clip(row: TableRow | Clip) -> Clip:
    if isinstance(row, Clip):
        return row
    info = files.probe(row.path)
    start = row.start or 0.0
    end = info.seconds if row.end is None else min(row.end, info.seconds)
    if end <= start:
        raise CatalogueError(
            f"{row.path} is {info.seconds:.2f} s long, and the clip starts at {start:g} s",
            "a part of the file",
            "mend the table's start and end",
        )
    return Clip(row.path, end - start, info.rate, info.channels, row.label, row.split, start=start)


def probe(model: AudioModel, clips: Labelled, *, seed: int, kinds: Sequence[Pooling] = POOLINGS) -> Probed:
    """Linear probe accuracy of the frozen model for several ways to pool its tokens."""
    return Probed(_probe(model, clips, seed, kinds, baselines=False)[MODEL])


def _probe(
    model: AudioModel,
    clips: Labelled,
    seed: int,
    kinds: Sequence[Pooling],
    *,
    baselines: bool,
    store: Store | None = None,
    progress: Counter | None = None,
) -> dict[str, dict[str, ProbeResult]]:
    """Encoder -> kind of feature -> linear probe; each clip is read once."""
    both = [*clips.train, *clips.test]
    wanted = encoders(model, pooling=kinds, baselines=baselines, seed=seed, seconds=clips.seconds)
    found = collect(both, wanted, store=store, bad_files=0.0, progress=progress)
    assert found is not None, "one process alone is the main one"
    names = [str(clip.label) for clip in both]
    cut = len(clips.train)

    def read(table: npt.NDArray[np.float32]) -> ProbeResult:
        return linear_probe(table[:cut], names[:cut], table[cut:], names[cut:], seed=seed)

    return {
        encoder: {kind: read(pooled(vectors, kind)) for kind in ((LOG_MEL,) if LOG_MEL in vectors else kinds)}
        for encoder, vectors in found.vectors.items()
    }


@dataclass(frozen=True)
class Comparison:
    """Probes of one encoder beside the same one untrained and beside plain log-mel statistics."""

    table: dict[str, dict[str, ProbeResult]]
    """Encoder's name -> kind of feature -> result."""

    def record(self) -> dict[str, Any]:
        """Accuracies and intervals as JSON."""
        return {
            who: {
                kind: {"accuracy": r.accuracy, "interval": list(r.interval), "clips": r.clips}
                for kind, r in results.items()
            }
            for who, results in self.table.items()
        }

    def accuracies(self) -> dict[str, dict[str, float]]:
        """Accuracies alone."""
        return {who: {kind: r.accuracy for kind, r in results.items()} for who, results in self.table.items()}

    def text(self) -> str:
        """A table for a terminal: accuracy and 95 % interval."""
        kinds = list(dict.fromkeys(kind for results in self.table.values() for kind in results))
        width = max(map(len, self.table))
        cells = {
            who: [
                f"{r.accuracy:.3f} ({r.interval[0]:.3f}-{r.interval[1]:.3f})" if r else "-"
                for r in map(results.get, kinds)
            ]
            for who, results in self.table.items()
        }
        clips = next(iter(next(iter(self.table.values())).values())).clips
        lines = [" " * width + "".join(f"  {kind:>20}" for kind in kinds)]
        lines += [f"{who:{width}}" + "".join(f"  {cell:>20}" for cell in row) for who, row in cells.items()]
        return "\n".join([*lines, f"linear probe accuracy on {clips} test clips, 95 % interval"])


def compare(
    model: AudioModel,
    clips: Labelled,
    *,
    seed: int,
    name: str = "pretrained",
    store: Store | None = None,
) -> Comparison:
    """Probe the model, the same architecture with fresh weights, and log-mel statistics, on the same clips."""
    found = _probe(model, clips, seed, POOLINGS, baselines=True, store=store, progress=counter("features", "clips"))
    return Comparison({name if encoder == MODEL else encoder: results for encoder, results in found.items()})
