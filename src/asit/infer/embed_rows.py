"""Vectors of recordings as they become known: one for each, or one for each step in time or patch.

Letters: D width, t columns of time.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from asit.audio.stream import open_sound
from asit.data.catalogue.inputs import Item, Sounds
from asit.errors import ConfigError
from asit.infer.embed_blocks import Layout, Times, Vectors
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Done, Heard, Piece, hear
from asit.model.inference.embedding import Precision

Level = Literal["clip", "frames", "patches"]
Pooling = Literal["mean", "class", "class+mean"]


@dataclass(frozen=True)
class Ask:
    """What is wanted of each recording.

    Attributes:
        level: clip: one vector; frames: one for each step in time, the mean of its patches; patches: one for each
            patch, all bands of mel of the first column, then the next.
        pooling: what the vector of a clip is: the mean of its patches, the class token, or both, the class token first.
        layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
        hop: seconds between frames; None: from column to column of patches.
        precision: arithmetic of the encoder.
        batch: windows that go through it at once.
    """

    level: Level = "clip"
    pooling: Pooling = "mean"
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


@dataclass(frozen=True)
class Rows:
    """What was found of one recording, or the next stretch of it.

    Attributes:
        place: among the recordings.
        vectors: (rows, width).
        times: (t,) s from the file's start, of the columns; none at level clip.
        grid: (time, mel) of the patches heard so far.
        seconds: length of the recording; None: more is to come.
    """

    place: int
    vectors: Vectors
    times: Times
    grid: tuple[int, int]
    seconds: float | None


def layout_of(model: AudioModel, ask: Ask) -> Layout:
    """The shape of the rows."""
    width = model.encoder.width * (2 if ask.pooling == "class+mean" else 1)
    return Layout(width, {"clip": 0, "frames": 1, "patches": model.encoder.grid[1]}[ask.level])


def rows_of(
    model: AudioModel, items: Sequence[Item], ask: Ask, *, threads: int = 0, ends: Sequence[int] = ()
) -> Generator[Rows | Done]:
    """Vectors of recordings, in their order, as they become known; each ends with a `Done`.

    Args:
        threads: that decode and make log-mels; 0: as many as compute.
        ends: before these places nothing is left waiting.
    """
    settings = model.front_end.settings
    embedder = model.embedder(ask.layer, ask.precision, ask.hop, patches=ask.level == "patches")

    sound_of = Sounds(items)

    def cut(place: int) -> Iterator[Piece]:
        item = items[place]
        with open_sound(sound_of(place), None, settings.rate, settings.resampler, item.start, item.seconds) as sound:
            yield Piece(sound, item.start)

    threads = threads or max(1, torch.get_num_threads())
    kept, fault = _Clip(), None
    with closing(hear(embedder, len(items), cut, batch=ask.batch, threads=threads, ends=ends)) as heard:
        for one in heard:
            if isinstance(one, Done):
                yield Done(one.place, one.fault or fault)
                kept, fault = _Clip(), None
            elif fault is not None or not bool(one.embedding.frames.isfinite().all()):
                fault = "the model's vectors are not finite"
            elif ask.level == "clip":
                kept.add(one)
                if one.seconds is not None:
                    yield kept.rows(one, ask.pooling)
            else:
                found = one.embedding
                vectors = found.frames if ask.level == "frames" else found.patches
                assert vectors is not None
                times = found.times.double().numpy() + one.start
                yield Rows(one.place, vectors.numpy(), times, found.grid, one.seconds)


class _Clip:
    """One recording's vector, from its stretches."""

    def __init__(self) -> None:
        self.columns = 0
        self.mean, self.token, self.weight = torch.zeros(1, dtype=torch.float64), torch.zeros(1), 0

    def add(self, heard: Heard) -> None:
        """Takes in the next stretch."""
        found, count = heard.embedding, heard.embedding.grid[0]
        if not self.columns:  # a recording in one stretch is what AudioModel.embed gives, bit for bit
            self.mean, self.token = found.clip.double(), found.class_token.double()
        else:
            self.mean += (found.clip.double() - self.mean) * (count / (self.columns + count))
            if heard.columns:
                share = heard.columns / (self.weight + heard.columns)
                self.token += (found.class_token.double() - self.token) * share
        self.columns += count
        self.weight += heard.columns

    def rows(self, last: Heard, pooling: Pooling) -> Rows:
        """The vector; `last` is the last stretch."""
        parts = {"mean": [self.mean], "class": [self.token], "class+mean": [self.token, self.mean]}[pooling]
        vector = torch.cat(parts).float().numpy()
        grid = self.columns, last.embedding.grid[1]
        return Rows(last.place, vector[None], np.empty(0), grid, last.seconds)
