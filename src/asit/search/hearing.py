"""Recordings to rows: decoded and cut once each, embedded in batches over many of them, given back in their order.

Letters: n rows of one recording, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.audio.sounds import open_sound
from asit.errors import AsitError, AudioError
from asit.model.audio_model import AudioModel
from asit.search import windows
from asit.search.partial import Times
from asit.search.table import Source

Heard = tuple[Source, Times, npt.NDArray[np.float16] | AsitError]
"""A recording, start and end of its rows in s, and their vectors (n, D), or why there are none."""

_BATCHES = 8  # batches' worth of pieces that are collected, so that like lengths can go together


@dataclass
class _Open:
    """A recording some of whose pieces are not embedded yet."""

    source: Source
    times: Times = field(default_factory=list)
    vectors: list[npt.NDArray[np.float16]] = field(default_factory=list)
    error: AsitError | None = None
    ended: bool = False

    def result(self) -> Heard:
        return self.source, self.times, self.error or np.stack(self.vectors)


def hear(
    model: AudioModel, sources: Sequence[Source], settings: Mapping[str, Any], batch: int = 16, threads: int = 1
) -> Iterator[Heard]:
    """The rows of each recording, in the order given.

    Args:
        settings: window, hop, layer, pooling and precision, as in an index's card.
        batch: pieces that go through the encoder at once.
        threads: that decode.
    """
    waiting: list[_Open] = []
    pool: list[tuple[_Open, npt.NDArray[np.float32]]] = []
    for source in sources:
        one = _Open(source)
        waiting.append(one)
        try:
            for start, end, wave in _pieces(model, source, settings):
                one.times.append((source.start + start, source.start + end))
                pool.append((one, wave))
                if len(pool) >= _BATCHES * batch:
                    _run(model, pool, settings, batch)
                    pool = []
        except AsitError as error:
            one.error = error
            pool = [piece for piece in pool if piece[0] is not one]
        one.ended = True
        held = {id(piece[0]) for piece in pool}
        while waiting and id(waiting[0]) not in held:
            yield waiting.pop(0).result()
    _run(model, pool, settings, batch)
    for one in waiting:
        yield one.result()


def _pieces(model: AudioModel, source: Source, settings: Mapping[str, Any]) -> Iterator[windows.Piece]:
    """Start and end from the beginning of the recording, and the samples at the model's rate."""
    try:
        sound = source.item().sound()
        with open_sound(
            sound, None, model.rate, model.front_end.settings.resampler, source.start, source.seconds
        ) as opened:
            yield from windows.cut(opened.blocks(), model.rate, settings["window"], settings["hop"])
    except OSError as error:
        raise AudioError(f"{source.name}: {error.strerror}", "a readable file", "check its permissions") from error


def _run(
    model: AudioModel,
    pieces: Sequence[tuple[_Open, npt.NDArray[np.float32]]],
    settings: Mapping[str, Any],
    batch: int,
) -> None:
    """Embed the pieces and hand each one's vector to its recording."""
    if not pieces:
        return
    found = model.embed_batch(
        [wave for _, wave in pieces],
        layer=settings["layer"],
        precision=settings["precision"],
        batch=batch,
        patches=False,
    )
    for (one, _), embedding in zip(pieces, found, strict=True):
        try:
            one.vectors.append(windows.vector(embedding, settings["pooling"]).astype(np.float16))
        except AsitError as error:
            one.error = error
