"""Streams of mono samples at one rate from files, their bytes, open files, arrays and tensors.

Letters in shapes: S samples, n samples of a block.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from asit.audio import decoders, faults, files, sniff
from asit.audio.audio_decoder import AudioInfo
from asit.audio.files import Resampler, Wave
from asit.errors import AudioError

_BLOCK = 1 << 18  # samples of an array per block


class OpenSound:
    """An open sound, to be read once.

    Attributes:
        name: for messages.
        seconds: length of the requested part according to the header; None if it is unknown.
        rate: Hz, of the sound itself.
        target: Hz of the samples given.
        channels: of the sound itself; blocks are their mean.
        format: container and codec, such as "WAV/PCM_16", or the type of an array.
        given: samples at the target rate that `blocks` has given so far.
    """

    def __init__(
        self,
        name: str,
        info: AudioInfo,
        stream: Callable[[int, int | None], Iterator[Wave]],
        target: int,
        resampler: Resampler,
        start: float,
        seconds: float | None,
    ) -> None:
        self.name, self.rate, self.channels, self.format = name, info.rate, info.channels, info.format
        self.target = target
        self.given = 0
        self.seconds = None
        if info.frames:
            left = max(0.0, info.seconds - start)
            self.seconds = left if seconds is None else min(left, seconds)
        self._stream, self._quality = stream, files.SOXR_QUALITY[resampler]
        self._start, self._end = start, info.seconds if info.frames else None
        self._part = files.sample_range(info.rate, target, start, seconds)

    def blocks(self) -> Iterator[Wave]:
        """Yield finite mono samples (n,) float32 at the target rate, in blocks that are not empty.

        Concatenated they equal `asit.audio.files.read`. Memory does not grow with the length. Call this only once.

        Raises:
            AudioError: no sample, or none of the part; samples that are not finite; a file that cannot be decoded to
                its end, or is shorter than its header promises; after the blocks before the fault.
        """
        skip, left = self._part.skip, self._part.count
        for block in self._resampled():
            if skip:
                skip, block = max(0, skip - len(block)), block[skip:]
            if left is not None:
                block = block[:left]
                left -= len(block)
            if not len(block):
                continue
            if not (math.isfinite(block.min()) and math.isfinite(block.max())):
                raise faults.not_finite(self.name)
            self.given += len(block)
            yield block
        if not self.given and self._start > 0 and (self._end is None or self._end > 0):
            raise files.start_after_end(self.name, self._start, self._end or 0.0)
        if not self.given:
            found = f"{self.name} is shorter than a sample at {self.target} Hz"
            raise AudioError(found, "at least one sample", "leave it out")

    def _resampled(self) -> Iterator[Wave]:
        blocks = self._stream(self._part.begin, self._part.stop)
        if self.rate == self.target:
            yield from blocks
            return
        resample = soxr.ResampleStream(self.rate, self.target, 1, dtype="float32", quality=self._quality)
        for block in blocks:
            yield resample.resample_chunk(np.ascontiguousarray(block))
        yield resample.resample_chunk(np.empty(0, np.float32), last=True)


Sound = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Tensor | OpenSound
"""A file's path, the bytes of an audio file, an open binary file, samples in [-1, 1], (S,) or (channels, S), or an
`OpenSound`."""


@contextmanager
def open_sound(
    sound: Sound,
    rate: int | None,
    target: int,
    resampler: Resampler = "soxr-hq",
    start: float = 0.0,
    seconds: float | None = None,
) -> Iterator[OpenSound]:
    """Open a sound, or a part of one.

    Args:
        sound: see `Sound`. An open file is read from its beginning and then reset to its position. An `OpenSound` is
            returned as it is, with its own part and rate.
        rate: Hz of an array or tensor; None: `target`. Files know theirs.
        target: Hz of the result.
        resampler: resampling quality.
        start: beginning of the part, s, to the nearest sample of `target`.
        seconds: length of the part, s; None: to the end.

    Raises:
        AudioError: not one of `Sound`; an array that is empty, of integers, of a wrong shape or not finite; a file as
            `asit.audio.files.probe`.
    """
    if isinstance(sound, OpenSound):
        yield sound
        return
    name = name_of(sound)
    target = files.positive_rate(target)
    files.check_part(name, start, seconds)
    wanted: dict[str, Any] = {"target": target, "resampler": resampler, "start": start, "seconds": seconds}
    if isinstance(sound, np.ndarray | Tensor):
        samples = _array(sound, name)
        own = target if rate is None else files.positive_rate(rate)
        channels = 1 if samples.ndim == 1 else len(samples)
        info = AudioInfo(path=None, frames=samples.shape[-1], rate=own, channels=channels, format=str(sound.dtype))
        faults.check_bounds(name, own, channels, info.seconds)
        stream = functools.partial(_slices, samples, name)
        yield OpenSound(name=name, info=info, stream=stream, **wanted)
        return
    if not isinstance(sound, str | os.PathLike | bytes | bytearray | memoryview) and not hasattr(sound, "read"):
        raise AudioError(
            f"a {type(sound).__name__}", "a path, bytes, an open file, an array or a tensor", "see AudioModel.embed"
        )
    with decoders.open_audio(sound) as decoder:
        info = decoder.info if decoder.slack is not None else replace(decoder.info, frames=0)
        yield OpenSound(name=decoder.name, info=info, stream=decoder.stream, **wanted)


def read_sound(
    sound: Sound,
    rate: int | None,
    target: int,
    resampler: Resampler = "soxr-hq",
    start: float = 0.0,
    seconds: float | None = None,
) -> Wave:
    """Read a sound, or a part of one: (S,) float32 mono at `target` Hz, never empty, always finite.

    Arguments and errors are those of `open_sound` and `OpenSound.blocks`.
    """
    with open_sound(sound, rate, target, resampler, start, seconds) as opened:
        blocks = list(opened.blocks())
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def name_of(sound: Sound) -> str:
    """Return a name for messages: the path, or a description such as "the ndarray of shape (2, 100)"."""
    if isinstance(sound, OpenSound):
        return sound.name
    if isinstance(sound, np.ndarray | Tensor):
        return f"the {type(sound).__name__} of shape {tuple(sound.shape)}"
    return sniff.name_of(sound)


def is_transposed(shape: Sequence[int]) -> bool:
    """Whether an array of this shape is (samples, clips) instead of (clips, samples): it has many very short clips.

    Up to 64 clips may have fewer samples than there are clips.
    """
    return len(shape) == 2 and shape[0] > max(shape[1], 64)


def check_sounds(audio: Tensor) -> None:
    """Raise an AudioError unless `audio` is a batch (sounds, samples) of floats: integers, no samples or transposed."""
    if audio.ndim != 2 or not audio.is_floating_point() or not audio.shape[1] or is_transposed(audio.shape):
        found = f"audio of shape {tuple(audio.shape)}, {audio.dtype}"
        expected = "(n_sounds, n_samples) of floats in [-1, 1], with fewer sounds than samples"
        raise AudioError(found, expected, "transpose it" if is_transposed(audio.shape) else "")


def _array(sound: np.ndarray | Tensor, name: str) -> NDArray[np.floating]:
    """Return the samples as an array (S,) or (channels, S), checked, without a copy where possible."""
    if isinstance(sound, Tensor):
        tensor = sound.detach().cpu()
        kind, floating = str(tensor.dtype), tensor.is_floating_point()
        if tensor.dtype not in (torch.float16, torch.float32, torch.float64) and floating:
            tensor = tensor.float()  # numpy has no bfloat16
        samples = tensor.numpy()
    else:
        samples, kind = sound, str(sound.dtype)
        floating = np.issubdtype(sound.dtype, np.floating)
    if not floating:
        fix = "divide by the type's largest value, such as 32768 for int16"
        raise AudioError(f"{name} holds {kind}", "floating-point samples in [-1, 1]", fix)
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
        raise AudioError(f"{name} is not a clip", "(samples,) or (channels, samples)", "transpose it")
    if not samples.size:
        raise AudioError(f"{name} is empty", "at least one sample", "leave it out")
    starts = range(0, samples.shape[-1], _BLOCK)
    if bad := sum(int((~np.isfinite(samples[..., first : first + _BLOCK])).sum()) for first in starts):
        raise AudioError(f"{name} has {bad} samples that are not finite", "samples in [-1, 1]", "leave it out")
    return samples


def _slices(samples: NDArray[np.floating], name: str, begin: int, stop: int | None) -> Iterator[Wave]:
    """Yield mono float32 blocks of an array's samples `begin` to `stop`; raises for samples far outside [-1, 1]."""
    end = samples.shape[-1] if stop is None else min(stop, samples.shape[-1])
    levels = faults.Levels(name)
    for first in range(begin, end, _BLOCK):
        block = samples[..., first : min(first + _BLOCK, end)]
        yield np.ascontiguousarray(levels.mix(block[None] if block.ndim == 1 else block), dtype=np.float32)
    if (cancelled := levels.cancelled) is not None:
        raise cancelled
