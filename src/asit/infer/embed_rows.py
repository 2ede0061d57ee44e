"""Vectors of recordings as they become known, one for each recording, frame or patch; and their labels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from asit.audio.faults import Wave
from asit.audio.fbank import FrontEnd
from asit.audio.stream import OpenSound
from asit.audio.windowing import cut
from asit.data.catalogue.inputs import InputReader, Item, named
from asit.errors import ConfigError
from asit.infer.embed_blocks import Layout, Vectors
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Done, Result, check_batch, run_recordings
from asit.model.inference.embedding import Precision
from asit.model.inference.overlap import ClipPooling, Embedding
from asit.model.inference.tagging import Tagger, Tags

Level = Literal["clip", "frames", "patches"]


@dataclass(frozen=True)
class EmbedSettings:
    """What to compute of each recording.

    Attributes:
        level: clip: one vector; frames: one for each step in time, the mean of its patches; patches: one for each
            patch, all bands of mel of the first column, then the next.
        pooling: the vector of a clip.
        layer: block whose output is taken (0 the first, -1 the last), through the final norm; None: the last.
        window: seconds of the windows that have a vector each; None: one vector for the recording.
        hop: seconds between windows, by default their length; without them between frames, by default from column to
            column of patches.
        precision: arithmetic of the encoder.
        batch: windows in a batch.
    """

    level: Level = "clip"
    pooling: ClipPooling = "mean"
    layer: int | None = None
    window: float | None = None
    hop: float | None = None
    precision: Precision = "auto"
    batch: int = 16

    def __post_init__(self) -> None:
        check_batch(self.batch)
        if self.level != "clip" and self.pooling != "mean":
            raise ConfigError(
                f"--pooling {self.pooling} with --level {self.level}", "pooling is of --level clip", "leave it out"
            )
        if self.window is None:
            return
        if self.level != "clip":
            raise ConfigError(
                f"--window with --level {self.level}", "windows are of --level clip", "leave one of the two out"
            )
        if self.hop is not None and not 0 < self.hop <= self.window:
            raise ConfigError(
                f"a hop of {self.hop:g} s between windows of {self.window:g} s",
                "more than 0 s, and at most the window's length, so that no sound is left out",
                "leave the hop out for windows end to end",
            )

    @property
    def frame_hop(self) -> float | None:
        """Seconds between frames; None: from column to column of patches."""
        return self.hop if self.window is None else None


def layout_of(model: AudioModel, settings: EmbedSettings) -> Layout:
    """Return the shape of the rows; raises ConfigError for a hop or a layer that the model does not have."""
    timing = model.embedder(settings.layer, "float32", settings.frame_hop).timing
    width = model.encoder.width * (2 if settings.pooling == "class+mean" else 1)
    if settings.window is not None:
        if settings.window * model.rate < model.front_end.window:
            least = model.front_end.window / model.rate
            raise ConfigError(f"windows of {settings.window:g} s", f"at least {least:g} s", "use longer ones")
        return Layout(width, 0, 0.0, settings.hop or settings.window, settings.window)
    return Layout(width, {"clip": 0, "frames": 1, "patches": timing.mel}[settings.level], timing.first, timing.hop)


def rows_of(found: Embedding, settings: EmbedSettings) -> Vectors:
    """Return the vectors (rows, width) of a recording, or of a stretch of it."""
    if settings.level == "clip":
        return found.pooled(settings.pooling).numpy()[None]
    vectors = found.frames if settings.level == "frames" else found.patches
    assert vectors is not None
    return vectors.numpy()


def embed_items(
    model: AudioModel, items: Sequence[Item], settings: EmbedSettings, *, threads: int = 0, ends: Collection[int] = ()
) -> Generator[Result[Embedding] | Done]:
    """Yield the embeddings of recordings, in their order, each recording followed by a `Done`.

    At level clip a recording has one result, or one for each window, without frames; else one for each stretch.

    Args:
        threads: that decode and make log-mels; 0: as many as torch computes with.
        ends: recordings before which no window is left waiting.
    """
    hop, front_end = settings.frame_hop, model.front_end
    embedder = model.embedder(settings.layer, settings.precision, hop, patches=settings.level == "patches")
    whole = partial(InputReader(items).pieces, settings=front_end.settings)
    pieces = whole if settings.window is None else partial(_windows, whole, settings=settings, front_end=front_end)
    stretches, fault = list[Embedding](), None
    results = run_recordings(
        embedder, len(items), pieces, batch=settings.batch, partial=True, threads=threads, ends=ends
    )
    with closing(results):
        for result in results:
            if isinstance(result, Done):
                yield Done(result.index, result.fault or fault)
                stretches, fault = [], None
            elif fault is not None or not bool(result.found.frames.isfinite().all()):
                fault = "the model's vectors are not finite"
            elif settings.level != "clip":
                yield result
            else:
                none = torch.empty(0)
                stretches.append(replace(result.found, frames=none, times=none))
                if result.seconds is not None:
                    yield replace(result, found=_mean_of(stretches))
                    stretches = []


def _windows(
    whole: Callable[[int], Iterator[tuple[float, OpenSound]]], index: int, settings: EmbedSettings, front_end: FrontEnd
) -> Iterator[tuple[float, Wave]]:
    """Yield the windows of a recording, and where they begin in its file."""
    rate = front_end.settings.rate
    assert settings.window is not None
    size, step = round(settings.window * rate), (settings.hop or settings.window) * rate
    for begin, sound in whole(index):
        for wave, first in cut(sound.blocks(), size, step, front_end.shift / 2):
            yield begin + first / rate, wave


def _mean_of(stretches: Sequence[Embedding]) -> Embedding:
    """Return the embedding of a recording, averaged in double precision over its stretches; one is kept bit for bit."""

    def mean(vectors: list[Tensor], weights: list[int]) -> Tensor:
        shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return (torch.stack(vectors).double() * shares[:, None]).sum(0).float()

    columns, weights = [one.grid[0] for one in stretches], [one.weight for one in stretches]
    return replace(
        stretches[-1],
        clip=mean([one.clip for one in stretches], columns),
        class_token=mean([one.class_token for one in stretches], weights),
        grid=(sum(columns), stretches[-1].grid[1]),
        weight=sum(weights),
    )


def tag_items(tagger: Tagger, items: Sequence[Item], batch: int = 16, threads: int = 0) -> Generator[Tags | str]:
    """Yield the tags of each input, in their order, with times from the start of its part; or why it has none.

    Args:
        tagger: of `AudioModel.tagger`.
        items: the inputs.
        batch: windows in a batch, of one recording or of several.
        threads: that decode and make log-mels; 0: as many as torch computes with.
    """
    pieces = partial(InputReader(items).pieces, settings=tagger.front_end.settings)
    tags: Tags | None = None
    with closing(run_recordings(tagger, len(items), pieces, batch=batch, pooled=1, threads=threads)) as results:
        for result in results:
            if not isinstance(result, Done):
                tags = result.found
                continue
            name, fault = items[result.index].text, result.fault
            if fault is None and tags is not None and bool(tags.windows.isfinite().all()):
                yield tags
            else:
                yield named(name, fault or "the model's scores are not finite")
