"""Probes of a frozen encoder on a labelled table, beside plain log-mel statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asit.audio import files
from asit.audio.fbank import FrontEnd
from asit.data.tables import TableRow, read_table
from asit.errors import CatalogueError
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder
from asit.transfer import frozen

POOLINGS: tuple[frozen.Pooling, ...] = ("class", "mean", "class+mean", "time-mean", "mel-mean")
"""What is read off the tokens; see `asit.transfer.frozen.pool`."""
HEADLINE: frozen.Pooling = "class+mean"
QUICK: tuple[frozen.Pooling, ...] = ("class", "mean", "class+mean")
"""What is read off during pretraining: the narrow ones, which cost seconds."""
TRAIN, TEST = ("train", "training"), ("test", "testing", "eval", "evaluation")


@dataclass(frozen=True)
class Labelled:
    """Two sides of labelled clips; the waves are read once and kept, as float16 where they are many."""

    train: list[TableRow]
    test: list[TableRow]


@dataclass(frozen=True)
class Probed:
    """Accuracy for each kind of feature."""

    results: dict[str, frozen.ProbeResult]

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
    """The table's training and test clips, at most `most` on each side, drawn with the seed.

    Raises:
        CatalogueError: no labels, or no split into train and test.
    """
    rows = read_table(table)
    bare = [row for row in rows if row.label is None]
    if bare:
        raise CatalogueError(
            f"{table}: {len(bare)} of {len(rows)} clips have no label, the first: {bare[0].path}",
            "a label for each clip of a probe",
            "fill the column label, or leave these lines out",
        )
    sides = {
        name: [row for row in rows if (row.split or "").lower() in words]
        for name, words in (("train", TRAIN), ("test", TEST))
    }
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
    return Labelled(sides["train"], sides["test"])


def probe(model: AudioModel, clips: Labelled, *, seed: int, kinds: Sequence[frozen.Pooling] = POOLINGS) -> Probed:
    """Linear probe accuracy of the frozen model for several ways to pool its tokens."""
    seconds = typical_seconds(clips.train)
    train, test = (features(model, side, kinds, seconds) for side in (clips.train, clips.test))
    return read_off(train, test, clips, seed=seed)


def read_off(
    train: dict[str, npt.NDArray[np.float32]], test: dict[str, npt.NDArray[np.float32]], clips: Labelled, *, seed: int
) -> Probed:
    """Fit and score a linear probe on each kind of feature."""
    names = [[str(row.label) for row in side] for side in (clips.train, clips.test)]
    return Probed({kind: frozen.linear_probe(train[kind], names[0], test[kind], names[1], seed=seed) for kind in train})


def features(
    model: AudioModel, rows: Sequence[TableRow], kinds: Sequence[frozen.Pooling], seconds: float
) -> dict[str, npt.NDArray[np.float32]]:
    """Pooled tokens of each clip, all cut or padded to the whole columns of this length, the same on both sides."""
    step = model.encoder.patch[0]
    columns = max(1, model.front_end.frames_for(round(seconds * model.rate)) // step)
    samples = model.front_end.samples_for(min(columns, model.encoder.grid[0] * 4) * step)

    def extract(waves: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            tokens = model.encoder(model.front_end(waves))
        return {kind: frozen.pool(tokens.cls, tokens.patches, tokens.grid, kind) for kind in kinds}

    return frozen.features((_wave(model, row, samples) for row in rows), extract)


def log_mel_features(model: AudioModel, rows: Sequence[TableRow], seconds: float) -> npt.NDArray[np.float32]:
    """The plain baseline: mean and standard deviation over time of each log-mel bin."""
    samples = round(seconds * model.rate)

    def extract(waves: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log-mel": frozen.log_mel_statistics(model.front_end, waves)}

    return frozen.features((_wave(model, row, samples) for row in rows), extract)["log-mel"]


UNTRAINED, LOG_MEL = "untrained", "log-mel statistics"


@dataclass(frozen=True)
class Comparison:
    """Probes of one encoder beside the same one untrained and beside plain log-mel statistics."""

    table: dict[str, dict[str, frozen.ProbeResult]]
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


def compare(model: AudioModel, clips: Labelled, *, seed: int, name: str = "pretrained") -> Comparison:
    """Probe the model, the same architecture with fresh weights, and log-mel statistics, on the same clips."""
    table = {
        name: probe(model, clips, seed=seed).results,
        UNTRAINED: probe(untrained(model, seed), clips, seed=seed).results,
    }
    seconds = typical_seconds(clips.train)
    sides = [{"mean+std of log-mel": log_mel_features(model, side, seconds)} for side in (clips.train, clips.test)]
    table[LOG_MEL] = read_off(sides[0], sides[1], clips, seed=seed).results
    return Comparison(table)


def untrained(model: AudioModel, seed: int) -> AudioModel:
    """The model's architecture and front end with fresh weights."""
    encoder = Encoder(model.encoder.settings, model.frames, model.front_end.settings.mels)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return AudioModel(encoder, FrontEnd(model.front_end.settings))


def typical_seconds(rows: Sequence[TableRow]) -> float:
    """Median length of the first clips, at most 10 s."""
    return min(10.0, float(np.median([files.probe(row.path).seconds for row in rows[:50]])))


def _wave(model: AudioModel, row: TableRow, samples: int) -> npt.NDArray[np.float32]:
    wave = files.read(row.path, rate=model.rate, seconds=samples / model.rate)[:samples]
    return np.pad(wave, (0, samples - len(wave)))
