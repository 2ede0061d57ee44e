"""From sounds of any length to tokens with their times: windows, batches, and what comes out of them.

A long sound is cut into windows of the training view, each a quarter of the view over the one before it; in the
overlap the answers of both are blended, so that no step is heard where a window ends, and so that a column near the
end of a window, which has heard little of what follows it, counts less. All works on streams: a window is made as soon
as its sound is there and may be forgotten afterwards.

Letters: S samples, T frames, F mel bins, P patches, D width, R windows in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asit import runtime
from asit.audio.decoders import Wave
from asit.audio.fbank import FrontEnd
from asit.audio.stream import Sound, open_sound
from asit.errors import AudioError, ConfigError
from asit.model.inference.logmel_stream import LogMels
from asit.model.inference.overlap import Blender, Embedding, Part, Timing
from asit.model.vit import Encoder

__all__ = ["Embedder", "Embedding", "Part", "Precision", "Sound", "Window"]

WHOLE = 1.5
"""A clip up to this many times as long as the training view is seen whole."""
OVERLAP = 4
"""Neighbouring windows share one part of the view in this many."""
WASTE = 1.25
"""Windows go through the encoder together on a CPU if the longest is at most this many times as long as the shortest:
filling up costs more than it saves beyond that."""

Precision = Literal["auto", "float32", "bf16"]
"""Arithmetic of an encoder that is asked for something; auto: what is faster on its device."""


@dataclass(frozen=True)
class Window:
    """A stretch of a sound that the encoder sees at once.

    Attributes:
        x: (T, F) normalised log-mel, T the frames of its columns.
        columns: of patches.
        shift: which of the passes it belongs to; they begin a hop apart, and there is one where the hop is a column.
        skip: columns at its beginning that the windows before it answer for.
        lead: columns after those that are blended with the window before it; 0 in the first.
        tail: columns at its end that are blended with the window after it; 0 in the last.
    """

    x: Tensor
    columns: int
    shift: int
    skip: int
    lead: int
    tail: int


@dataclass(frozen=True)
class Embedder:
    """An encoder and its front end, asked about sounds in two stages: many threads may make `windows`, one runs them.

    Args:
        encoder: in evaluation mode.
        front_end: its own.
        layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
        precision: arithmetic of the encoder.
        hop: frames of log-mel between one answer and the next; None: the step from column to column.
        patches: keep the tokens of all patches; without them only their means over mel are kept, a share of the
            memory.

    Raises:
        ConfigError: a hop that does not divide the step between columns.
    """

    encoder: Encoder
    front_end: FrontEnd
    layer: int | None = None
    precision: Literal["float32", "bf16"] = "float32"
    hop: int | None = None
    patches: bool = True

    def __post_init__(self) -> None:
        step = self.encoder.stride[0]
        if self.hop is not None and (self.hop < 1 or step % self.hop):
            raise ValueError(f"a hop of {self.hop} frames does not divide the step of {step}")

    @property
    def timing(self) -> Timing:
        """When the columns of a sound are, and how many bands of mel each has."""
        step, shift = self.encoder.stride[0], self.front_end.shift
        hop = self.hop or step
        centre = self.front_end.samples_for(self.encoder.patch[0]) / 2
        rate = self.front_end.settings.rate
        return Timing(step // hop, self.encoder.grid[1], centre / rate, hop * shift / rate)

    def windows(
        self, sound: Sound, rate: int | None = None, start: float = 0.0, seconds: float | None = None
    ) -> Generator[Window, None, None]:
        """The sound, decoded, resampled, turned to log-mel and cut; in constant memory, by any thread.

        Args:
            sound: a file, its bytes, or samples.
            rate: of samples in Hz; None: they are at the front end's.
            start: where the part wanted begins, in seconds.
            seconds: its length; None: to the end.

        Raises:
            AudioError: a sound that is empty, not finite, of another shape or unreadable; also in the middle of it.
        """
        settings = self.front_end.settings
        with open_sound(sound, rate, settings.rate, settings.resampler, start, seconds) as source:
            yield from self.windows_of(source.blocks())

    def windows_of(self, blocks: Iterator[Wave]) -> Generator[Window, None, None]:
        """As `windows`, of samples in order: mono blocks (n,) float32 at the front end's rate, none of them empty."""
        span, view = self.encoder.span, self.encoder.grid[0]
        sound = LogMels(self.front_end, blocks, span(2))
        sound.read(span(int(WHOLE * view) + 1))
        if sound.ended and self._columns(sound.frames) <= WHOLE * view:
            yield from self._whole(sound)
        else:
            yield from self._cut(sound)

    def run(self, windows: Sequence[Window]) -> list[Part]:
        """What the encoder says about windows, of one sound or of many, in their order.

        Those of unlike length go together only where little has to be filled up; what is filled up is not attended to.
        """
        parts: list[Part | None] = [None] * len(windows)
        ordered = sorted(range(len(windows)), key=lambda i: windows[i].columns)
        for places in self._alike(ordered, windows):
            for place, part in zip(places, self._together([windows[i] for i in places]), strict=True):
                parts[place] = part
        return [part for part in parts if part is not None]

    def blender(self) -> Blender:
        """Puts the parts of one sound together as they come."""
        return Blender(self.timing)

    def join(self, parts: Sequence[Part], patches: bool = True) -> Embedding:
        """The parts of one sound, in order, as its embedding; overlaps blended.

        Args:
            parts: of all windows of the sound.
            patches: whether patch tokens are wanted; ignored where the embedder keeps none.
        """
        blender = self.blender()
        for part in parts:
            blender.add(part if patches else part.without_patches())
        return blender.rest()

    def embed(self, sounds: Iterable[Sound], rate: int | None = None, batch: int = 16) -> list[Embedding]:
        """Embed clips of any lengths, in their order; `batch`: windows that go through the encoder at once."""
        check_batch(batch)
        blenders: list[Blender] = []
        pool: list[tuple[int, Window]] = []
        for i, sound in enumerate(sounds):
            blenders.append(self.blender())
            for window in self.windows(sound, rate):
                pool.append((i, window))
                if len(pool) >= 4 * batch:
                    self._flush(pool, blenders, batch)
        self._flush(pool, blenders, batch)
        return [self._finite(blender.rest()) for blender in blenders]

    def stream(
        self,
        sound: Sound,
        rate: int | None = None,
        batch: int = 8,
        start: float = 0.0,
        seconds: float | None = None,
    ) -> Iterator[Embedding]:
        """Stretches of one sound, or of the part asked for, each as soon as it is certain."""
        check_batch(batch)
        blender = self.blender()
        waiting: list[Window] = []
        for window in self.windows(sound, rate, start, seconds):
            if len(waiting) == batch:  # and another one follows, so something is left for the rest
                blender.add(*self.run(waiting))
                waiting = []
                if (stretch := blender.ready()) is not None:
                    yield self._finite(stretch)
            waiting.append(window)
        blender.add(*self.run(waiting))
        yield self._finite(blender.rest())

    @staticmethod
    def _finite(found: Embedding) -> Embedding:
        for values in (found.frames, found.clip, found.class_token):
            check_finite(values, "vectors")
        return found

    def _columns(self, frames: int) -> int:
        """Columns of a sound: whole ones, and one more where at least half of what it adds is there."""
        return max(1, self._full(frames))

    def _full(self, frames: int) -> int:
        return int((frames - self.encoder.patch[0]) / self.encoder.stride[0] + 1.5)

    def _lengths(self, frames: int) -> list[int]:
        """Columns of each pass over a sound of so many frames; a later one may have none."""
        hop = self.hop or self.encoder.stride[0]
        later = range(hop, self.encoder.stride[0], hop)
        return [self._columns(frames), *(max(0, self._full(frames - shift)) for shift in later)]

    def _whole(self, sound: LogMels) -> Iterator[Window]:
        span, hop = self.encoder.span, self.hop or self.encoder.stride[0]
        lengths = self._lengths(sound.frames)
        sound.fill(max(shift * hop + span(columns) for shift, columns in enumerate(lengths) if columns))
        for shift, columns in enumerate(lengths):
            if columns:
                yield Window(sound.take(shift * hop, span(columns)), columns, shift, 0, 0, 0)

    def _cut(self, sound: LogMels) -> Iterator[Window]:
        span, step, view = self.encoder.span, self.encoder.stride[0], self.encoder.grid[0]
        hop, overlap = self.hop or step, view // OVERLAP
        passes = set(range(step // hop))
        lengths: list[int] | None = None
        begin = 0
        while passes:
            # So much ahead that a window whose successor's place depends on the sound's end is known for what it is.
            sound.read(step + span(begin + view + 1))
            if sound.ended and lengths is None:
                lengths = self._lengths(sound.frames)
                sound.fill(max(shift * hop + span(columns) for shift, columns in enumerate(lengths)))
            for shift in sorted(passes):
                at, last = begin, False
                if lengths is not None:
                    at, last = min(begin, lengths[shift] - view), begin + view >= lengths[shift]
                x = sound.take(shift * hop + at * step, span(view))
                yield Window(x, view, shift, begin - at, overlap if begin else 0, 0 if last else overlap)
                if last:
                    passes.remove(shift)
            sound.drop(begin * step)
            begin += view - overlap

    def _alike(self, ordered: Sequence[int], windows: Sequence[Window]) -> Iterator[list[int]]:
        """Places of windows, sorted by length, in groups that go together; of more columns than the view, for which
        positions are resized, only with their like."""
        view = self.encoder.grid[0]
        waste = WASTE if self.encoder.pos_embed.device.type == "cpu" else float("inf")
        group: list[int] = []
        for place in ordered:
            columns = windows[place].columns
            if group:
                least = windows[group[0]].columns
                if columns > waste * least or (columns > view and columns != least):
                    yield group
                    group = []
            group.append(place)
        if group:
            yield group

    def _together(self, windows: Sequence[Window]) -> list[Part]:
        """Parts of windows of like length, sorted by it."""
        encoder, (view, mel) = self.encoder, self.encoder.grid
        device, most = encoder.pos_embed.device, windows[-1].columns
        with torch.inference_mode(), runtime.autocast(self.precision, device):
            frames = encoder.span(most)
            x = torch.zeros(len(windows), 1, frames, encoder.mels, device=device)
            for row, window in zip(x, windows, strict=True):
                row[0, : len(window.x)] = window.x
            valid = None
            if windows[0].columns < most:
                counts = torch.tensor([window.columns for window in windows], device=device)
                valid = torch.arange(most * mel, device=device) < counts[:, None] * mel
            tokens = encoder(x, valid=valid, layer=self.layer, stretch=most > view)
            cls, patches = tokens.cls.float(), tokens.patches.float().unflatten(1, (most, mel))
            means = patches.mean(2)
        # Copied outside inference mode: the results can then be used in training something on top.
        cls, means = cls.cpu().clone(), means.cpu().clone()
        tokens_of = patches.cpu().clone() if self.patches else None
        out = []
        for i, window in enumerate(windows):
            own = slice(window.skip, window.columns)
            kept = None if tokens_of is None else tokens_of[i, own]
            out.append(Part(cls[i], means[i, own], kept, window.shift, window.lead, window.tail))
        return out

    def _flush(self, pool: list[tuple[int, Window]], blenders: Sequence[Blender], batch: int) -> None:
        """Run all windows of the pool, which is emptied, and hand the parts to their sounds."""
        # Neighbours of like length waste least on filling. The sort is stable, so a sound's windows stay in order.
        pool.sort(key=lambda owned: owned[1].columns)
        for first in range(0, len(pool), batch):
            few = pool[first : first + batch]
            for (owner, _), part in zip(few, self.run([window for _, window in few]), strict=True):
                blenders[owner].add(part)
        pool.clear()


def hop_frames(encoder: Encoder, front_end: FrontEnd, seconds: float | None) -> int | None:
    """A hop in frames of log-mel.

    Raises:
        ConfigError: it does not divide the step between columns; names the nearest hops that do.
    """
    if seconds is None:
        return None
    step, frame = encoder.stride[0], front_end.shift / front_end.settings.rate
    possible = [frames for frames in range(1, step + 1) if step % frames == 0]
    for frames in possible:
        if abs(frames * frame - seconds) < 1e-6:
            return frames
    nearest = sorted(sorted(possible, key=lambda frames: abs(frames * frame - seconds))[:2])
    named = " or ".join(f"{frames * frame:g}" for frames in nearest)
    raise ConfigError(
        f"a hop of {seconds:g} s, of an encoder with a column every {step * frame:g} s",
        f"a whole part of that, in whole frames of {frame:g} s",
        f"use {named}",
    )


def check_finite(values: Tensor, what: str) -> None:
    """Refuse numbers that a model computed if any of them is NaN or infinite.

    Samples are held to bounds when they are read, and weights are checked when they are loaded, so it is the model that
    cannot be used: weights, or a mean or std in its card, too large for its arithmetic.

    Raises:
        AudioError: some are; `what` they are called.
    """
    if not bool(values.isfinite().all()):
        raise AudioError(
            f"the model's {what} are not finite",
            "finite numbers",
            'look at mean and std in its card.json; try precision="float32"; else train or convert the model again',
        )


def check_batch(batch: int) -> None:
    """Raises ConfigError where so many windows cannot go through a network at once."""
    if not isinstance(batch, int | np.integer) or batch < 1:
        raise ConfigError(
            f"batch {batch!r}", "a whole number from 1 on: windows that go through the network at once", "leave it out"
        )


def several(sounds: Iterable[Sound], verb: str) -> Iterable[Sound]:
    """The sounds; AudioError where they are a single one, or none at all."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Tensor)
    if isinstance(sounds, one) or hasattr(sounds, "read") or not isinstance(sounds, Iterable):
        raise AudioError(
            f"{verb}_batch was given one {type(sounds).__name__}", "a list of sounds", f"call {verb}, or wrap it in []"
        )
    return sounds
