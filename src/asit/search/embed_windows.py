"""Vectors of the rows of an index: recordings are decoded and cut once, their windows embedded in batches over many.

Letters: n rows of one recording, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.inputs import InputReader
from asit.errors import AsitError
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Done, run_recordings
from asit.search import window_layout
from asit.search.partial_build import Times
from asit.search.row_table import Source

RecordingRows = tuple[Source, Times, npt.NDArray[np.float16] | str]
"""A recording, start and end of its rows in s from the beginning of the file, and their vectors (n, D), or why there
are none."""


def embed_sources(
    model: AudioModel, sources: Sequence[Source], settings: Mapping[str, Any], batch: int = 16, threads: int = 1
) -> Generator[RecordingRows]:
    """Yield the rows of each recording, in the order given.

    Args:
        settings: window, hop, layer, pooling and precision, as in an index's card.
        batch: windows in a batch.
        threads: that decode and make log-mels.
    """
    sounds = InputReader([source.item() for source in sources])

    def pieces(index: int) -> Iterator[tuple[float, window_layout.Wave]]:
        with sounds.open(index, model.front_end.settings) as sound:
            for start, _, wave in window_layout.cut(sound.blocks(), model.rate, settings["window"], settings["hop"]):
                yield sources[index].start + start, wave

    embedder = model.embedder(settings["layer"], settings["precision"], patches=False)
    times, vectors, fault = Times(), list[npt.NDArray[np.float16]](), ""
    with closing(run_recordings(embedder, len(sources), pieces, batch=batch, threads=threads)) as results:
        for result in results:
            if isinstance(result, Done):
                fault = result.fault or fault
                yield sources[result.index], times, fault or np.stack(vectors)
                times, vectors, fault = Times(), [], ""
                continue
            assert result.seconds is not None
            times.append((result.start, result.start + result.seconds))
            try:
                vectors.append(window_layout.vector(result.found, settings["pooling"]).astype(np.float16))
            except AsitError as error:
                fault = error.found
