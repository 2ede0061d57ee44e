"""Sounds of every kind, as mono samples at one rate, in blocks: files, their bytes, open files, arrays and tensors.

Letters in shapes: S samples, n samples of a block.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from asit.audio import decoders, faults, files, sniff
from asit.audio.files import Part, Resampler, Wave
from asit.errors import AudioError

_BLOCK = 1 << 18  # samples of an array that are taken at a time


class OpenSound:
    """A sound, open to be read once.

    Attributes:
        name: for messages.
        seconds: length of what was asked for, as the header tells; None where it only guesses.
        rate: Hz, of the sound itself.
        target: Hz of the samples given.
        channels: of the sound itself; their mean is what is heard.
        format: container and codec, such as "WAV/PCM_16", or the type of an array.
        given: samples at the target rate that `blocks` has given so far.
    """

    def __init__(
        self,
        name: str,
        frames: int | None,
        rate: int,
        channels: int,
        format: str,
        stream: Callable[[int, int | None], Iterator[Wave]],
        target: int,
        resampler: Resampler,
        start: float,
        seconds: float | None,
    ) -> None:
        self.name, self.rate, self.channels, self.format = name, rate, channels, format
        self.target = target
        self.given = 0
        self.seconds = None
        if frames is not None:
            left = max(0.0, frames / rate - start)
            self.seconds = left if seconds is None else min(left, seconds)
        self._stream, self._quality = stream, files.QUALITY[resampler]
        self._start, self._end = start, None if frames is None else frames / rate
        self._part: Part = files.part_of(rate, target, start, seconds)

    def blocks(self) -> Iterator[Wave]:
        """Mono samples (n,) float32 at the target rate, finite, one block after the other, none of them empty.

        Joined they are what `asit.audio.files.read` gives. Memory does not grow with the sound's length. A sound is
        read once: ask for its blocks a single time.

        Raises:
            AudioError: no sample, or none of the part; samples that are not finite; a file that cannot be decoded to
                its end, or is shorter than its header promises. Blocks before the fault have been given by then.
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
        if not self.given:
            raise self._nothing()

    def _resampled(self) -> Iterator[Wave]:
        blocks = self._stream(self._part.begin, self._part.stop)
        if self.rate == self.target:
            yield from blocks
            return
        resample = soxr.ResampleStream(self.rate, self.target, 1, dtype="float32", quality=self._quality)
        for block in blocks:
            yield resample.resample_chunk(np.ascontiguousarray(block))
        yield resample.resample_chunk(np.empty(0, np.float32), last=True)

    def _nothing(self) -> AudioError:
        if self._start > 0 and (self._end is None or self._end > 0):
            return files.after_the_end(self.name, self._start, self._end or 0.0)
        found = f"{self.name} is shorter than a sample at {self.target} Hz"
        return AudioError(found, "at least one sample", "leave it out")


Sound = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Tensor | OpenSound
"""A file's path, the bytes of an audio file, an open binary file, samples in [-1, 1], (S,) or (channels, S), or a sound
that is open already."""


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
        sound: see `Sound`. An open file is read from its beginning and put back to where it stood. What is open already
            is given back as it is, with the part and the rate it was opened for.
        rate: Hz of an array or tensor; None: it is at `target` already. Files know theirs.
        target: Hz of the samples wanted.
        resampler: resampling quality.
        start: where the part begins, s, to the nearest sample of `target`.
        seconds: length of the part, s; None: to the end.

    Raises:
        AudioError: no sound, or not one of `Sound`; an array that is empty, of integers, of a wrong shape or not
            finite; a file as `asit.audio.files.probe` says.
    """
    if isinstance(sound, OpenSound):
        yield sound
        return
    name = name_of(sound)
    target = files.positive_rate(target)
    files.check_part(name, start, seconds)
    if isinstance(sound, np.ndarray | Tensor):
        samples = _array(sound, name)
        own = target if rate is None else files.positive_rate(rate)
        channels = 1 if samples.ndim == 1 else len(samples)
        faults.check_bounds(name, own, channels, samples.shape[-1] / own)
        yield OpenSound(
            name,
            samples.shape[-1],
            own,
            channels,
            str(sound.dtype),
            lambda begin, stop: _slices(samples, begin, stop, name),
            target,
            resampler,
            start,
            seconds,
        )
        return
    if not isinstance(sound, str | os.PathLike | bytes | bytearray | memoryview) and not hasattr(sound, "read"):
        raise AudioError(
            f"a {type(sound).__name__}", "a path, bytes, an open file, an array or a tensor", "see AudioModel.embed"
        )
    with decoders.open_audio(sound) as source:
        info = source.info
        frames = info.frames if source.slack is not None else None
        yield OpenSound(
            source.name,
            frames,
            info.rate,
            info.channels,
            info.format,
            source.stream,
            target,
            resampler,
            start,
            seconds,
        )


def read_sound(
    sound: Sound,
    rate: int | None,
    target: int,
    resampler: Resampler = "soxr-hq",
    start: float = 0.0,
    seconds: float | None = None,
) -> Wave:
    """All of a sound, or of a part of one: (S,) float32 mono at `target` Hz, never empty, always finite.

    Args and errors are those of `open_sound` and of `OpenSound.blocks`.
    """
    with open_sound(sound, rate, target, resampler, start, seconds) as opened:
        blocks = list(opened.blocks())
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def name_of(sound: Sound) -> str:
    """What messages call a sound: its path, or what it is, such as "the ndarray of shape (2, 100)"."""
    if isinstance(sound, OpenSound):
        return sound.name
    if isinstance(sound, np.ndarray | Tensor):
        return f"the {type(sound).__name__} of shape {tuple(sound.shape)}"
    return sniff.name_of(sound)


def is_transposed(shape: Sequence[int]) -> bool:
    """Whether an array (clips, samples) of this shape is (samples, channels): as many clips of a few samples.

    Every door that takes several clips as one array asks this. Up to 64 clips may be shorter than their number.
    """
    return len(shape) == 2 and shape[0] > max(shape[1], 64)


def check_sounds(audio: Tensor) -> None:
    """Refuse what is no batch of sounds.

    Args:
        audio: (sounds, samples) of floats.

    Raises:
        AudioError: another number of axes, whole numbers, no samples, or the axes the other way round.
    """
    if audio.ndim != 2 or not audio.is_floating_point() or not audio.shape[1] or is_transposed(audio.shape):
        raise AudioError(
            f"audio of shape {tuple(audio.shape)}, {audio.dtype}",
            "(n_sounds, n_samples) of floats in [-1, 1], with fewer sounds than samples",
            "turn the axes" if is_transposed(audio.shape) else "",
        )


def _array(sound: np.ndarray | Tensor, name: str) -> NDArray[np.floating]:
    """The samples as an array (S,) or (channels, S), checked, not copied where that can be."""
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
        raise AudioError(
            f"{name} holds {kind}",
            "floating-point samples in [-1, 1]",
            "divide by the type's largest value, such as 32768 for int16",
        )
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
        raise AudioError(f"{name} is not a clip", "(samples,) or (channels, samples)", "turn the axes")
    if not samples.size:
        raise AudioError(f"{name} is empty", "at least one sample", "leave it out")
    bad = 0
    for first in range(0, samples.shape[-1], _BLOCK):
        bad += int((~np.isfinite(samples[..., first : first + _BLOCK])).sum())
    if bad:
        raise AudioError(f"{name} has {bad} samples that are not finite", "numbers in [-1, 1]", "mend or leave out")
    return samples


def _slices(samples: NDArray[np.floating], begin: int, stop: int | None, name: str) -> Iterator[Wave]:
    """Mono float32 blocks of an array's samples `begin` to `stop`.

    Raises:
        AudioFileError: samples far outside [-1, 1]; channels that cancel each other.
    """
    end = samples.shape[-1] if stop is None else min(stop, samples.shape[-1])
    levels = faults.Levels(name)
    for first in range(begin, end, _BLOCK):
        block = samples[..., first : min(first + _BLOCK, end)]
        yield np.ascontiguousarray(levels.mix(block[None] if block.ndim == 1 else block), dtype=np.float32)
    if (cancelled := levels.cancelled) is not None:
        raise cancelled
