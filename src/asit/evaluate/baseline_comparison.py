"""Linear probes of a frozen encoder beside the same architecture untrained and log-mel statistics (`asit probe`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from asit.audio import files
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import canonical
from asit.data.catalogue.tables import TableRow, read_table
from asit.data.shards import tar_index
from asit.errors import CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import MODEL
from asit.evaluate.frozen import evaluate_frozen
from asit.evaluate.frozen_scores import FrozenScores
from asit.evaluate.frozen_settings import FrozenSettings, Pooling
from asit.model.audio_model import AudioModel
from asit.runtime import World

POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean", "time-mean", "mel-mean")
HEADLINE: Pooling = "class+mean"
"""The pooling that encoders are compared by."""
PRETRAINING_POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean")
"""Poolings probed during pretraining: the narrow ones, which take seconds."""
PRETRAINED = "pretrained"
"""Name of the model among the encoders of `accuracies`."""


def linear_probes(
    model: AudioModel,
    clips: Catalogue,
    *,
    seed: int,
    pooling: tuple[Pooling, ...] = POOLINGS,
    baselines: bool = False,
    store: Store | None = None,
) -> FrozenScores:
    """Probe the frozen model on clips of `labelled_clips`; `baselines`: also the untrained one and log-mel statistics.

    All clips are cut or padded to the median length of the first training clips, at most 10 s.
    """
    settings = FrozenSettings(
        probes=("linear",),
        pooling=pooling,
        baselines=baselines,
        seed=seed,
        validation=(),
        kind="single",
        allow_shared_groups=True,
        seconds=min(10.0, float(np.median(clips.seconds[:50]))),
        bad_files=0.0,
    )
    found = evaluate_frozen(model, clips, settings, world=World(0, 1, model.encoder.pos_embed.device, ""), store=store)
    assert found is not None, "a single process is the main one"
    return found


def accuracies(found: FrozenScores) -> dict[str, dict[str, dict[str, Any]]]:
    """Return encoder -> kind of features -> {"accuracy", "interval", "clips"}."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for record in found.records:
        metric, encoder = record["metrics"]["accuracy"], record["encoder"]
        out.setdefault(PRETRAINED if encoder == MODEL else encoder, {})[record["features"]] = {
            "accuracy": metric["value"],
            "interval": metric["interval"],
            "clips": record["clips"],
        }
    return out


def metrics_entry(found: FrozenScores) -> dict[str, Any]:
    """Make the values of a probe's line in metrics.jsonl."""
    results = accuracies(found)[PRETRAINED]
    features = {kind: result["accuracy"] for kind, result in results.items()}
    return {"accuracy": features[HEADLINE], "features": features, "clips": results[HEADLINE]["clips"]}


def labelled_clips(table: str | Path, most: int, seed: int) -> Catalogue:
    """Read the training, then the test clips of a table, a catalogue or shards; at most `most` of each, drawn.

    Raises:
        CatalogueError: no or several labels of a clip, or no split into train and test.
    """
    path = tar_index.index_of(str(table))
    listed: Sequence[TableRow] | Catalogue = read_table(table) if path is None else Catalogue.read(path)
    splits = listed.texts("split") if isinstance(listed, Catalogue) else [row.split for row in listed]
    chosen = []
    for name in ("train", "test"):
        part = np.flatnonzero([canonical(split or "") == name for split in splits])
        if not len(part):
            found = sorted(set(map(str, splits)))[:5]
            raise CatalogueError(
                f"{table}: no clip of the split {name!r}; its splits are {', '.join(found)}",
                "a column split with train and test",
                "add it, so that the probe is scored on clips it has not been fitted on",
            )
        if len(part) > most:
            part = part[np.sort(np.random.default_rng([seed, len(name)]).permutation(len(part))[:most])]
        chosen.append(part)
    rows = np.concatenate(chosen)
    if isinstance(listed, Catalogue):
        clips = listed.subset(rows)
    else:
        clips = Catalogue.from_clips([_clip(listed[row]) for row in rows.tolist()])
    read_labels(clips, "single")
    return clips


def _clip(row: TableRow) -> Clip:
    info = files.probe(row.path)
    start = row.start or 0.0
    end = info.seconds if row.end is None else min(row.end, info.seconds)
    if end <= start:
        raise CatalogueError(
            f"{row.path} is {info.seconds:.2f} s long, and the clip starts at {start:g} s",
            "a part of the file",
            "correct the table's start and end",
        )
    return Clip(row.path, end - start, info.rate, info.channels, row.label, row.split, start=start)
