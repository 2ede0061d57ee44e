"""Measure how many clips a second encoders take, side by side."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asit.data.catalogue.catalogue import Catalogue
from asit.data.loading.waveforms import read_clip
from asit.errors import AsitError, AudioError
from asit.evaluate.feature_readers import EncoderReader, LogMelReader

log = logging.getLogger(__name__)

CLIPS, SECONDS = 16, 160.0
"""Clips, and seconds of sound, that speed is measured on: fewer than CLIPS where they are long, but at least one."""
ROUNDS, BUDGET = (3, 20), 4.0
"""Rounds of the measurement, and the seconds for each encoder after which no further one begins."""

Reader = EncoderReader | LogMelReader


def measure_speed(
    encoders: Mapping[str, Reader], catalogue: Catalogue
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Measure front end and encoder, without reading files, on clips spread over the catalogue.

    In each round every encoder takes the same clips once, one encoder after the other, so that what else the machine
    does meanwhile slows all of them. The speed is that of the median round; the first one is not counted.

    Returns:
        {"clips", "seconds" (of sound), "rounds", "clips_per_second": name -> number}, and the features of the first
        clip: name -> kind -> (rows, width). Both lack encoders that fail on a batch, such as for lack of memory.

    Raises:
        AudioError: none of the clips can be read.
    """
    rows = np.unique(np.linspace(0, len(catalogue) - 1, CLIPS).astype(int)).tolist()
    sounds, seconds = _sounds(encoders, catalogue, rows)
    passes: dict[str, Callable[[], object]] = {}
    vectors = {}
    for name, reader in encoders.items():
        one = _pass(reader, sounds[name])
        try:
            one()
            vectors[name] = reader(sounds[name][0], reader.kinds)
            passes[name] = one
        except (AsitError, MemoryError, torch.OutOfMemoryError) as error:
            log.warning("the speed of %s cannot be measured: %s", name, error)
    spent: dict[str, list[float]] = {name: [] for name in passes}
    began = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and time.perf_counter() - began > BUDGET * len(passes):
            break
        for name, one in passes.items():
            start = time.perf_counter()
            one()
            spent[name].append(time.perf_counter() - start)
    clips = len(next(iter(sounds.values())))
    speeds = {name: clips / statistics.median(times) for name, times in spent.items()}
    rounds = max(map(len, spent.values()), default=0)
    return {"clips": clips, "seconds": seconds, "rounds": rounds, "clips_per_second": speeds}, vectors


def _sounds(
    encoders: Mapping[str, Reader], catalogue: Catalogue, rows: Sequence[int]
) -> tuple[dict[str, list[npt.NDArray[np.float32]]], float]:
    """Return the clips that speed is measured on, at each encoder's rate, and their seconds in all."""
    kinds = {(reader.front_end.rate, reader.front_end.resampler) for reader in encoders.values()}
    held: dict[Any, list[npt.NDArray[np.float32]]] = {kind: [] for kind in kinds}
    seconds, trouble = 0.0, AudioError("no clip to measure the speed on")
    for row in rows:
        clip = catalogue[row]
        if seconds and seconds + clip.seconds > SECONDS:
            continue
        try:
            read = {(rate, resampler): read_clip(clip, rate, resampler=resampler) for rate, resampler in kinds}
        except AudioError as error:
            trouble = error
            continue
        for kind, wave in read.items():
            held[kind].append(wave)
        seconds += clip.seconds
    if not seconds:
        raise trouble
    return {name: held[of.front_end.rate, of.front_end.resampler] for name, of in encoders.items()}, seconds


def _pass(reader: Reader, sounds: Sequence[npt.NDArray[np.float32]]) -> Callable[[], object]:
    """Return a function that takes all clips through the front end and, in batches, through the encoder."""
    if isinstance(reader, LogMelReader):
        return lambda: [reader(wave, reader.kinds) for wave in sounds]
    cut = [reader.cut(wave) for wave in sounds]
    return lambda: reader.model.embed_batch(cut, layer=reader.layers, precision=reader.precision)
