"""Vectors of recordings as they become known: one for each recording, frame or patch.

Letters: D width, t columns of time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from asit.audio.stream import OpenSound
from asit.data.catalogue.inputs import InputReader, Item
from asit.errors import ConfigError
from asit.infer.embed_blocks import Layout, Times, Vectors
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Done, Result, run_recordings
from asit.model.inference.embedding import Precision
from asit.model.inference.overlap import ClipPooling, Embedding

Level = Literal["clip", "frames", "patches"]


@dataclass(frozen=True)
class EmbedSettings:
    """What to compute of each recording.

    Attributes:
        level: clip: one vector; frames: one for each step in time, the mean of its patches; patches: one for each
            patch, all bands of mel of the first column, then the next.
        pooling: the vector of a clip.
        layer: block whose output is taken (0 the first, -1 the last), through the final norm; None: the last.
        hop: seconds between frames; None: from column to column of patches.
        precision: arithmetic of the encoder.
        batch: windows in a batch.
    """

    level: Level = "clip"
    pooling: ClipPooling = "mean"
    layer: int | None = None
    hop: float | None = None
    precision: Precision = "auto"
    batch: int = 16

    def __post_init__(self) -> None:
        if self.level != "clip" and self.pooling != "mean":
            raise ConfigError(
                f"--pooling {self.pooling} with --level {self.level}", "pooling is of --level clip", "leave it out"
            )
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}", "1 or more", "leave it out")
        if self.hop is not None and not (math.isfinite(self.hop) and self.hop > 0):
            raise ConfigError(f"--hop {self.hop:g}", "seconds above 0", "leave it out, or say such as 0.04")


def layout_of(model: AudioModel, settings: EmbedSettings) -> Layout:
    """Return the shape of the rows."""
    width = model.encoder.width * (2 if settings.pooling == "class+mean" else 1)
    return Layout(width, {"clip": 0, "frames": 1, "patches": model.encoder.grid[1]}[settings.level])


def rows_of(result: Result[Embedding], settings: EmbedSettings) -> tuple[Vectors, Times]:
    """Return the vectors (rows, width) of a result, and the times (t,) of its columns in s from the file's start; at
    level clip there are no times."""
    found = result.found
    if settings.level == "clip":
        return found.pooled(settings.pooling).numpy()[None], np.empty(0)
    vectors = found.frames if settings.level == "frames" else found.patches
    assert vectors is not None
    return vectors.numpy(), found.times.double().numpy() + result.start


def embed_items(
    model: AudioModel, items: Sequence[Item], settings: EmbedSettings, *, threads: int = 0, ends: Collection[int] = ()
) -> Generator[Result[Embedding] | Done]:
    """Yield the embeddings of recordings, in their order, each recording followed by a `Done`.

    At level clip a recording has one result, without frames; else it has one for each stretch.

    Args:
        threads: that decode and make log-mels; 0: as many as torch computes with.
        ends: recordings before which no window is left waiting.
    """
    embedder = model.embedder(settings.layer, settings.precision, settings.hop, patches=settings.level == "patches")
    sounds = InputReader(items)

    def pieces(index: int) -> Iterator[tuple[float, OpenSound]]:
        with sounds.open(index, model.front_end.settings) as sound:
            yield items[index].start, sound

    mean, fault = _ClipMean(), None
    results = run_recordings(
        embedder, len(items), pieces, batch=settings.batch, partial=True, threads=threads, ends=ends
    )
    with closing(results):
        for result in results:
            if isinstance(result, Done):
                yield Done(result.index, result.fault or fault)
                mean, fault = _ClipMean(), None
            elif fault is not None or not bool(result.found.frames.isfinite().all()):
                fault = "the model's vectors are not finite"
            elif settings.level != "clip":
                yield result
            else:
                mean.add(result.found)
                if result.seconds is not None:
                    yield replace(result, found=mean.embedding(result.found))


class _ClipMean:
    """Averages the stretches of one recording, in double precision; one stretch is kept bit for bit."""

    def __init__(self) -> None:
        self.mean, self.token = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        self.columns, self.weight = 0, 0

    def add(self, stretch: Embedding) -> None:
        """Add the next stretch."""
        self.columns, self.weight = self.columns + stretch.grid[0], self.weight + stretch.weight
        self.mean = self.mean + (stretch.clip.double() - self.mean) * (stretch.grid[0] / self.columns)
        self.token = self.token + (stretch.class_token.double() - self.token) * (stretch.weight / self.weight)

    def embedding(self, last: Embedding) -> Embedding:
        """Return the embedding of all stretches, without frames; `last` is the last of them."""
        return Embedding(
            clip=self.mean.float(),
            frames=last.frames[:0],
            patches=None,
            grid=(self.columns, last.grid[1]),
            times=last.times[:0],
            class_token=self.token.float(),
            weight=self.weight,
        )
