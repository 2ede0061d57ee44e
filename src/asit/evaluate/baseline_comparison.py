"""Linear probes of a frozen encoder beside the same architecture untrained and log-mel statistics (`asit probe`).

`asit.evaluate.frozen` has other probes, few labels and folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asit.audio import files
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.splits import canonical
from asit.data.catalogue.tables import TableRow, read_table
from asit.data.shards import tar_index
from asit.errors import CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL, MODEL, encoders, pooled
from asit.evaluate.features import collect
from asit.evaluate.pooling import Pooling
from asit.evaluate.probes import ProbeResult, linear_probe
from asit.evaluate.result_records import bracketed, text_table
from asit.model.audio_model import AudioModel
from asit.progress import Counter, counter

POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean", "time-mean", "mel-mean")
HEADLINE: Pooling = "class+mean"
"""The pooling that encoders are compared by."""
PRETRAINING_POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean")
"""Poolings probed during pretraining: the narrow ones, which take seconds."""

ProbeResults = dict[str, ProbeResult]
"""Kind of features -> result."""


@dataclass(frozen=True)
class LabelledClips:
    """Labelled clips of a training and a test split."""

    train: list[Clip]
    test: list[Clip]

    @property
    def seconds(self) -> float:
        """The length that all are cut or padded to: the median of the first training clips, at most 10 s."""
        return min(10.0, float(np.median([clip.seconds for clip in self.train[:50]])))


@dataclass(frozen=True)
class BaselineComparison:
    """Encoder -> kind of features -> result of the linear probe."""

    table: dict[str, ProbeResults]

    def record(self) -> dict[str, Any]:
        """Return accuracies and intervals for JSON."""
        return {
            encoder: {
                kind: {"accuracy": r.accuracy, "interval": list(r.interval), "clips": r.clips}
                for kind, r in results.items()
            }
            for encoder, results in self.table.items()
        }

    def text(self) -> str:
        """Make a table of accuracies with their 95 % intervals."""
        kinds = list(dict.fromkeys(kind for results in self.table.values() for kind in results))
        lines = [["", *kinds]]
        for encoder, results in self.table.items():
            found = [results.get(kind) for kind in kinds]
            lines.append([encoder, *(f"{r.accuracy:.3f}{bracketed(r.interval, 3)}" if r else "-" for r in found)])
        clips = next(iter(next(iter(self.table.values())).values())).clips
        return "\n".join([*text_table(lines), f"linear probe accuracy on {clips} test clips, 95 % interval"])


def compare_with_baselines(
    model: AudioModel, clips: LabelledClips, *, seed: int, name: str = "pretrained", store: Store | None = None
) -> BaselineComparison:
    """Probe the model, the same architecture with untrained weights, and log-mel statistics, on the same clips."""
    found = _probe(model, clips, seed, POOLINGS, baselines=True, store=store, progress=counter("features", "clips"))
    return BaselineComparison({name if encoder == MODEL else encoder: results for encoder, results in found.items()})


def probe_encoder(
    model: AudioModel, clips: LabelledClips, *, seed: int, pooling: Sequence[Pooling] = POOLINGS
) -> ProbeResults:
    """Probe the frozen model alone."""
    return _probe(model, clips, seed, pooling, baselines=False)[MODEL]


def metrics_entry(results: ProbeResults) -> dict[str, Any]:
    """Make the values of a probe's line in metrics.jsonl."""
    return {
        "accuracy": results[HEADLINE].accuracy,
        "features": {kind: result.accuracy for kind, result in results.items()},
        "clips": results[HEADLINE].clips,
    }


def labelled_clips(table: str | Path, most: int, seed: int) -> LabelledClips:
    """Read the training and test clips of a table, a catalogue or shards; at most `most` of each, drawn with the seed.

    Raises:
        CatalogueError: no labels, or no split into train and test.
    """
    path = tar_index.index_of(str(table))
    rows: Sequence[TableRow | Clip] = read_table(table) if path is None else _catalogue_clips(Catalogue.read(path))
    bare = [row for row in rows if row.label is None]
    if bare:
        raise CatalogueError(
            f"{table}: {len(bare)} of {len(rows)} clips have no label, the first: {bare[0].path}",
            "a label for each clip of a probe",
            "fill the column label, or leave these lines out",
        )
    splits: dict[str, list[Clip]] = {}
    for name in ("train", "test"):
        part = [row for row in rows if canonical(row.split or "") == name]
        if not part:
            found = sorted({str(row.split) for row in rows})
            raise CatalogueError(
                f"{table}: no clip of the split {name!r}; its splits are {', '.join(found[:5])}",
                "a column split with train and test",
                "add it, so that the probe is scored on clips it has not been fitted on",
            )
        if len(part) > most:
            kept = np.sort(np.random.default_rng([seed, len(name)]).permutation(len(part))[:most])
            part = [part[i] for i in kept]
        splits[name] = [_clip(row) for row in part]
    return LabelledClips(splits["train"], splits["test"])


def _catalogue_clips(catalogue: Catalogue) -> list[Clip]:
    return [catalogue[row] for row in range(len(catalogue))]


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
            "correct the table's start and end",
        )
    return Clip(
        path=row.path,
        seconds=end - start,
        rate=info.rate,
        channels=info.channels,
        label=row.label,
        split=row.split,
        start=start,
    )


def _probe(
    model: AudioModel,
    clips: LabelledClips,
    seed: int,
    pooling: Sequence[Pooling],
    *,
    baselines: bool,
    store: Store | None = None,
    progress: Counter | None = None,
) -> dict[str, ProbeResults]:
    """Probe each encoder with each kind of features; each clip is read once."""
    both = [*clips.train, *clips.test]
    wanted = encoders(model, pooling=pooling, baselines=baselines, seed=seed, seconds=clips.seconds)
    found = collect(both, wanted, store=store, bad_files=0.0, progress=progress)
    assert found is not None, "a single process is the main one"
    names, count = [str(clip.label) for clip in both], len(clips.train)
    out: dict[str, ProbeResults] = {}
    for encoder, vectors in found.vectors.items():
        out[encoder] = {}
        for kind in (LOG_MEL,) if LOG_MEL in vectors else pooling:
            x = pooled(vectors, kind)
            out[encoder][kind] = linear_probe(x[:count], names[:count], x[count:], names[count:], seed=seed)
    return out
