"""Recordings to rows of an index: short ones in one, long ones in windows, embedded in batches over many recordings.

Letters: n rows of one recording, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import InputReader
from asit.errors import AsitError, AudioError, ConfigError
from asit.model.audio_model import AudioModel, Embedding
from asit.model.inference.batching import Done, run_recordings
from asit.model.inference.embedding import SINGLE_WINDOW
from asit.model.inference.overlap import ClipPooling
from asit.search.index_files import Source

Wave = npt.NDArray[np.float32]


class EmbeddedRecording(NamedTuple):
    """A recording, start and end of its rows in s from the beginning of the file, and their vectors (n, D)."""

    source: Source
    times: list[tuple[float, float]]
    vectors: npt.NDArray[np.float16]


def embed_sources(
    model: AudioModel, sources: Sequence[Source], settings: Mapping[str, Any], batch: int = 16, threads: int = 1
) -> Generator[tuple[Source, EmbeddedRecording | str]]:
    """Yield each recording, in the order given, with its rows or the reason why it has none.

    Args:
        settings: window, hop, layer, pooling and precision, as in an index's card.
        batch: windows in a batch.
        threads: that decode and make log-mels.
    """
    sounds = InputReader([source.item() for source in sources])

    def pieces(index: int) -> Iterator[tuple[float, Wave]]:
        for begin, sound in sounds.pieces(index, model.front_end.settings):
            for start, _, wave in cut(sound.blocks(), model.rate, settings["window"], settings["hop"]):
                yield begin + start, wave

    embedder = model.embedder(settings["layer"], settings["precision"], patches=False)
    times, vectors, fault = list[tuple[float, float]](), list[npt.NDArray[np.float16]](), ""
    with closing(run_recordings(embedder, len(sources), pieces, batch=batch, threads=threads)) as results:
        for result in results:
            if isinstance(result, Done):
                fault = result.fault or fault
                source = sources[result.index]
                yield source, fault or EmbeddedRecording(source, times, np.stack(vectors))
                times, vectors, fault = [], [], ""
                continue
            assert result.seconds is not None
            times.append((result.start, result.start + result.seconds))
            try:
                vectors.append(unit_vector(result.found, settings["pooling"]).astype(np.float16))
            except AsitError as error:
                fault = error.found


def check_windows(window: float, hop: float) -> None:
    """Raise ConfigError for windows that leave gaps, or have no length."""
    if not 0 < window < float("inf"):
        raise ConfigError(f"a window of {window:g} s", "more than 0", "leave --window out for the training length")
    if not 0 < hop <= window:
        raise ConfigError(
            f"a hop of {hop:g} s between windows of {window:g} s",
            "more than 0, and at most the window, so that nothing is left out",
            "leave --hop out for windows end to end",
        )


def cut(blocks: Iterable[Wave], rate: int, window: float, hop: float) -> Iterator[tuple[float, float, Wave]]:
    """Cut a sound into windows, holding little more than a window and a block of it.

    A sound up to `SINGLE_WINDOW` windows long is one window; a longer one has a window at each hop, the last moved back
    to end with the sound.

    Args:
        blocks: the sound's samples (n,), in order.
        rate: in Hz.
        window, hop: in s.

    Yields:
        start and end in s from the beginning of the sound, and the samples.
    """
    size, step, most = max(1, round(window * rate)), max(1, round(hop * rate)), round(SINGLE_WINDOW * window * rate)
    held, first, following = np.empty(0, np.float32), 0, 0  # samples from `first` on; `following`: the next window's
    for block in blocks:
        held = np.concatenate([held, block])
        end = first + len(held)
        if end <= most:
            continue
        while following + size <= end:
            yield following / rate, (following + size) / rate, held[following - first : following - first + size]
            following += step
        keep = min(following, end - size)
        held, first = held[keep - first :], keep
    end = first + len(held)
    if not following:
        yield 0.0, end / rate, held
    elif following - step + size < end:
        yield (end - size) / rate, end / rate, held[end - size - first :]


def unit_vector(embedding: Embedding, pooling: ClipPooling) -> npt.NDArray[np.float32]:
    """Return the vector (D,) of a sound, of length 1; raises AudioError where it is zero or not finite."""
    vector = embedding.pooled(pooling).double()
    length = float(vector.norm())
    if not 0 < length < float("inf"):
        raise AudioError("the model's vector is not finite", "numbers", "leave this recording out, or check the model")
    return (vector / length).float().numpy()
