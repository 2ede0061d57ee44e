"""Recordings to rows: each decoded and cut once, its pieces embedded in batches over many, given back in order.

Letters: n rows of one recording, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asit.audio.stream import open_sound
from asit.data.catalogue.inputs import Sounds
from asit.errors import AsitError
from asit.model.audio_model import AudioModel
from asit.model.inference import batching
from asit.model.inference.embedding import Embedding
from asit.search import window_layout
from asit.search.partial_build import Times
from asit.search.row_table import Source

Heard = tuple[Source, Times, npt.NDArray[np.float16] | str]
"""A recording, start and end of its rows in s from the beginning of the file, and their vectors (n, D), or why there
are none."""


def hear(
    model: AudioModel, sources: Sequence[Source], settings: Mapping[str, Any], batch: int = 16, threads: int = 1
) -> Generator[Heard]:
    """The rows of each recording, in the order given.

    Args:
        settings: window, hop, layer, pooling and precision, as in an index's card.
        batch: windows that go through the encoder at once.
        threads: that decode and make log-mels.
    """
    rate, resampler = model.rate, model.front_end.settings.resampler

    sound_of = Sounds([source.item() for source in sources])

    def cut(place: int) -> Iterator[batching.Piece]:
        source = sources[place]
        with open_sound(sound_of(place), None, rate, resampler, source.start, source.seconds) as sound:
            for start, _, wave in window_layout.cut(sound.blocks(), rate, settings["window"], settings["hop"]):
                with open_sound(wave, rate, rate) as piece:
                    yield batching.Piece(piece, source.start + start)

    embedder = model.embedder(settings["layer"], settings["precision"], patches=False)
    times, vectors, parts, fault = Times(), list[npt.NDArray[np.float16]](), list[batching.Heard](), ""
    with closing(batching.hear(embedder, len(sources), cut, batch=batch, threads=threads)) as heard:
        for found in heard:
            if isinstance(found, batching.Done):
                fault = found.fault or fault
                yield sources[found.place], times, fault or np.stack(vectors)
                times, vectors, parts, fault = Times(), [], [], ""
                continue
            parts.append(found)
            if found.seconds is not None:
                times.append((found.start, found.start + found.seconds))
                try:
                    vectors.append(window_layout.vector(_whole(parts), settings["pooling"]).astype(np.float16))
                except AsitError as error:
                    fault = error.found
                parts = []


def _whole(parts: Sequence[batching.Heard]) -> Embedding:
    """The stretches of one piece as one; those of a piece that is longer than the training view are several."""
    if len(parts) == 1:
        return parts[0].embedding
    frames = torch.cat([part.embedding.frames for part in parts])
    tokens = torch.stack([part.embedding.class_token * part.columns for part in parts]).sum(0)
    first = parts[0].embedding
    return Embedding(
        frames.mean(0),
        frames,
        None,
        (len(frames), first.grid[1]),
        torch.cat([part.embedding.times for part in parts]),
        tokens / sum(part.columns for part in parts),
    )
