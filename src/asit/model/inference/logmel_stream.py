"""The log-mel of a sound that is read block by block, kept only as long as it is needed.

Letters: S samples, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asit.audio.faults import Wave
from asit.audio.fbank import FrontEnd

_BLOCK = 512  # frames that go through the front end at once


class LogMels:
    """Computes the normalised log-mel of a sound; frames are those of the whole waveform, bit for bit on a CPU.

    Args:
        front_end: with numbers for mean and std.
        blocks: the sound's samples in order, (n,) float32 at the front end's rate, at least one sample in all.
        filling: most frames that `fill` may have to add.

    Attributes:
        frames: of the samples read so far.
        ended: whether all samples have been read.
    """

    def __init__(self, front_end: FrontEnd, blocks: Iterator[Wave], filling: int) -> None:
        self.front_end, self._blocks = front_end, blocks
        self.frames, self.ended = 0, False
        self._waiting: list[Tensor] = []
        self._samples = 0  # in _waiting
        self._made: list[Tensor] = []
        self._first = 0  # frame at which _made begins
        # The rule "repeat" pads a sound with its own beginning.
        self._wanted = front_end.samples_for(filling) if front_end.settings.padding == "repeat" else 0
        self._beginning: list[Tensor] = []

    def read(self, frames: int) -> None:
        """Read until there are so many frames, or the sound has ended."""
        while not self.ended and self.frames < frames:
            block = next(self._blocks, None)
            if block is None:
                self.ended = True
            else:
                wave = torch.from_numpy(block if block.flags.writeable else block.copy())
                self._waiting.append(wave)
                self._samples += len(wave)
                if self._wanted > 0:
                    self._beginning.append(wave[: self._wanted])
                    self._wanted -= len(self._beginning[-1])
            if self.ended or self.front_end.frames_for(self._samples) >= _BLOCK:
                self.frames += self._make()

    def fill(self, frames: int) -> None:
        """Pad the sound, which has ended, by the front end's rule until there are so many frames."""
        missing = frames - self._end
        if missing <= 0:
            return
        rule = self.front_end.settings.padding
        if rule == "zero":
            if not self._end:  # shorter than a window: padded to one
                self._add(torch.zeros(self.front_end.window - self._samples, device="cpu"))
                missing -= self._make()
            zeros = torch.zeros(missing, self.front_end.settings.mels, device=self.front_end.hann.device)
            self._made.append(self.front_end.normalise(zeros))
            return
        samples = self.front_end.samples_for(missing) - self._samples
        if rule == "repeat":
            beginning = torch.cat(self._beginning)
            self._add(beginning.repeat(-(-samples // len(beginning)))[:samples])
        else:
            self._add(torch.zeros(samples, device="cpu"))
        self._make()

    def take(self, first: int, count: int) -> Tensor:
        """Return the frames from `first` on: (count, F)."""
        begin = first - self._first
        parts, at = [], 0
        for made in self._made:
            parts.append(made[max(0, begin - at) : max(0, begin + count - at)])
            at += len(made)
        return torch.cat(parts)

    def drop(self, before: int) -> None:
        """Free the blocks of frames that end before this frame."""
        while self._made and self._first + len(self._made[0]) <= before:
            self._first += len(self._made.pop(0))

    @property
    def _end(self) -> int:
        return self._first + sum(map(len, self._made))

    def _add(self, wave: Tensor) -> None:
        self._waiting.append(wave)
        self._samples += len(wave)

    def _make(self) -> int:
        """Turn the waiting samples into frames, and return how many."""
        count = self.front_end.frames_for(self._samples)
        if count:
            wave = torch.cat(self._waiting)
            logmel = self.front_end.fbank(wave[None].to(self.front_end.hann.device))[0]
            self._made.append(self.front_end.normalise(logmel))
            rest = wave[count * self.front_end.shift :].clone()  # a view would keep all of the block
            self._waiting, self._samples = [rest], len(rest)
        return count
