"""Sound of any length to tokens with their times: windows, batches, and what their outputs are joined to.

A long sound is cut into windows of the training view, each overlapping the one before by a quarter of the view. In an
overlap the outputs of both windows are blended, so that nothing jumps where a window ends, and a column near the end of
a window, which has seen little of what follows it, counts less. Everything works on streams: a window is made as soon
as its samples have been read, and may be dropped afterwards. `attention_of` gives the class token's attention in one
block.

Letters: T frames, F mel bins, P patches, D width.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from asit import runtime
from asit.audio.faults import Wave
from asit.audio.fbank import FrontEnd
from asit.audio.stream import Sound
from asit.errors import AudioError, ConfigError
from asit.model import blocks
from asit.model.inference.batching import BatchedModel
from asit.model.inference.logmel_stream import LogMels
from asit.model.inference.overlap import Blender, Embedding, Part, Timing
from asit.model.vit import Encoder

__all__ = ["Embedding", "Part", "Precision", "Sound", "Window", "WindowEmbedder"]

SINGLE_WINDOW = 1.5
"""A clip up to this many times as long as the training view is one window."""
OVERLAP = 4
"""Neighbouring windows share one part of the view in this many."""
WASTE = 1.25
"""On a CPU, windows share a batch if the longest is at most this many times as long as the shortest: beyond that the
padding costs more than it saves."""

Precision = Literal["auto", "float32", "bf16"]
"""Arithmetic of an encoder; auto: what is faster on its device."""


class EmbedKeywords(TypedDict, total=False):
    """Keyword arguments of `AudioModel.embedder`, which documents them."""

    layer: int | Sequence[int] | None
    precision: Precision
    hop: float | None
    patches: bool


def longest(encoder: Encoder) -> int:
    """Return the most patch columns of one window."""
    return int(SINGLE_WINDOW * encoder.grid[0]) if encoder.stretches else encoder.grid[0]


@dataclass(frozen=True)
class Window:
    """A stretch of a sound that is one input of the encoder.

    Attributes:
        x: (T, F) normalised log-mel, T the frames of its columns.
        columns: of patches.
        shift: number of its pass; passes begin a hop apart, and there is one where the hop is a column.
        skip: columns at the beginning that the windows before it answer for.
        lead: columns after those that are blended with the window before it; 0 in the first window.
        tail: columns at the end that are blended with the window after it; 0 in the last window.
    """

    x: Tensor
    columns: int
    shift: int
    skip: int
    lead: int
    tail: int


@dataclass(frozen=True)
class WindowEmbedder(BatchedModel[Window, Part, Embedding]):
    """An encoder with its front end: any thread may make `windows`, one thread calls `run`.

    Args:
        encoder: in evaluation mode.
        front_end: its own.
        layer: blocks whose outputs are taken (0 the first, -1 the last), through the final norm, and concatenated;
            None: the last.
        precision: arithmetic of the encoder.
        hop: frames of log-mel between frames of the embedding; None: the step from column to column.
        patches: keep the tokens of all patches, not only their means over mel.
    """

    encoder: Encoder
    front_end: FrontEnd
    layer: Sequence[int] | None = None
    precision: Literal["float32", "bf16"] = "float32"
    hop: int | None = None
    patches: bool = True
    pooled: ClassVar[int] = 4

    @property
    def timing(self) -> Timing:
        """Times of a sound's columns, and how many bands of mel each has."""
        step, shift = self.encoder.stride[0], self.front_end.shift
        hop = self.hop or step
        centre = self.front_end.samples_for(self.encoder.patch[0]) / 2
        rate = self.front_end.settings.rate
        return Timing(step // hop, self.encoder.grid[1], centre / rate, hop * shift / rate)

    def windows_of(self, blocks: Iterator[Wave]) -> Generator[Window, None, None]:
        """See `BatchedModel.windows_of`."""
        span = self.encoder.span
        sound = LogMels(self.front_end, blocks, span(2))
        most = longest(self.encoder)
        sound.read(span(most + 1))
        if sound.ended and self._columns(sound.frames) <= most:
            yield from self._whole(sound)
        else:
            yield from self._cut(sound)

    def run(self, windows: Sequence[Window]) -> list[Part]:
        """See `BatchedModel.run`. Windows of unlike length share a batch only where little is padding, and padding is
        not attended to."""
        parts: list[Part | None] = [None] * len(windows)
        ordered = sorted(range(len(windows)), key=lambda i: windows[i].columns)
        for group in self._alike(ordered, windows):
            for i, part in zip(group, self._together([windows[i] for i in group]), strict=True):
                parts[i] = part
        return [part for part in parts if part is not None]

    def gatherer(self) -> Blender:
        """See `BatchedModel.gatherer`."""
        return Blender(self.timing)

    @staticmethod
    def checked(found: Embedding) -> Embedding:
        """See `BatchedModel.checked`."""
        for values in (found.frames, found.clip, found.class_token):
            check_finite(values, "vectors")
        return found

    def _columns(self, frames: int) -> int:
        """Columns of a sound: full ones, and one more where at least half of what it adds is there."""
        return max(1, self._full(frames))

    def _full(self, frames: int) -> int:
        return int((frames - self.encoder.patch[0]) / self.encoder.stride[0] + 1.5)

    def _lengths(self, frames: int) -> list[int]:
        """Columns of each pass over a sound of `frames` frames; a later pass may have none."""
        hop = self.hop or self.encoder.stride[0]
        later = range(hop, self.encoder.stride[0], hop)
        return [self._columns(frames), *(max(0, self._full(frames - shift)) for shift in later)]

    def _whole(self, sound: LogMels) -> Iterator[Window]:
        span, hop = self.encoder.span, self.hop or self.encoder.stride[0]
        lengths = self._lengths(sound.frames)
        sound.fill(max(shift * hop + span(columns) for shift, columns in enumerate(lengths) if columns))
        for shift, columns in enumerate(lengths):
            if columns:
                x = sound.take(shift * hop, span(columns))
                yield Window(x=x, columns=columns, shift=shift, skip=0, lead=0, tail=0)

    def _cut(self, sound: LogMels) -> Iterator[Window]:
        span, step, view = self.encoder.span, self.encoder.stride[0], self.encoder.grid[0]
        hop, overlap = self.hop or step, view // OVERLAP
        passes = set(range(step // hop))
        lengths: list[int] | None = None
        begin = 0
        while passes:
            # So far ahead that the sound's end is known before the window whose successor is moved back because of it.
            sound.read(step + span(begin + view + 1))
            if sound.ended and lengths is None:
                lengths = self._lengths(sound.frames)
                sound.fill(max(shift * hop + span(columns) for shift, columns in enumerate(lengths)))
            for shift in sorted(passes):
                at, last = begin, False
                if lengths is not None:
                    at, last = min(begin, lengths[shift] - view), begin + view >= lengths[shift]
                x = sound.take(shift * hop + at * step, span(view))
                lead, tail = overlap if begin else 0, 0 if last else overlap
                yield Window(x=x, columns=view, shift=shift, skip=begin - at, lead=lead, tail=tail)
                if last:
                    passes.remove(shift)
            sound.drop(begin * step)
            begin += view - overlap

    def _alike(self, ordered: Sequence[int], windows: Sequence[Window]) -> Iterator[list[int]]:
        """Yield groups of sorted windows that share a batch; longer than the view, only those of one length."""
        view = self.encoder.grid[0]
        waste = WASTE if self.encoder.pos_embed.device.type == "cpu" else float("inf")
        group: list[int] = []
        for i in ordered:
            columns = windows[i].columns
            if group:
                least = windows[group[0]].columns
                if columns > waste * least or (columns > view and columns != least):
                    yield group
                    group = []
            group.append(i)
        if group:
            yield group

    def _together(self, windows: Sequence[Window]) -> list[Part]:
        """Run windows of like length, sorted by it, as one batch."""
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
        # Copied outside inference mode, so that something can be trained on the results.
        cls, means = cls.cpu().clone(), means.cpu().clone()
        tokens_of = patches.cpu().clone() if self.patches else None
        out = []
        for i, window in enumerate(windows):
            own = slice(window.skip, window.columns)
            kept = None if tokens_of is None else tokens_of[i, own]
            out.append(
                Part(
                    cls=cls[i],
                    frames=means[i, own],
                    patches=kept,
                    shift=window.shift,
                    lead=window.lead,
                    tail=window.tail,
                )
            )
        return out


def hop_frames(encoder: Encoder, front_end: FrontEnd, seconds: float | None) -> int | None:
    """Return a hop of so many seconds in frames of log-mel.

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
    """Raise AudioError if any number that a model computed is NaN or infinite; `what` names them.

    Samples are checked when they are read and weights when they are loaded, so the cause is the model: weights, or a
    mean or std in its card, too large for its arithmetic.
    """
    if not bool(values.isfinite().all()):
        raise AudioError(
            f"the model's {what} are not finite",
            "finite numbers",
            'look at mean and std in its card.json; try precision="float32"; else train or convert the model again',
        )


def several(sounds: Iterable[Sound], verb: str) -> Iterable[Sound]:
    """Return the sounds; raise AudioError where they are a single one, or no sounds."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, np.ndarray, Tensor)
    if isinstance(sounds, one) or hasattr(sounds, "read") or not isinstance(sounds, Iterable):
        raise AudioError(
            f"{verb}_batch was given one {type(sounds).__name__}", "a list of sounds", f"call {verb}, or wrap it in []"
        )
    return sounds


@dataclass(frozen=True)
class AttentionMap:
    """The class token's attention to the patches of one window; float32, on the CPU.

    Attributes:
        map: (heads, time, mel); with the attention to the class (and distillation) token, each head sums to 1.
        grid: (time, mel).
        times: (time,) centres of the columns, in seconds from the start.
    """

    map: Tensor
    grid: tuple[int, int]
    times: Tensor

    def __repr__(self) -> str:
        (columns, bands), end = self.grid, float(self.times[-1])
        return f"AttentionMap({len(self.map)} heads, {columns} columns of {bands} bands, to {end:.2f} s)"


def attention_of(embedder: WindowEmbedder, window: Window) -> AttentionMap:
    """Return the class token's attention in the embedder's layer (None: the last block).

    For a distilled encoder it is the mean over class and distillation token, as its output is the mean of both.

    Raises:
        ConfigError: no such layer, or an encoder without a class token.
    """
    encoder, (view, mel) = embedder.encoder, embedder.encoder.grid
    if encoder.prefix == 0:
        raise ConfigError(
            f"the attention of a model of family {encoder.settings.family}, which has no class token",
            "one with a class token",
            "use another model",
        )
    device = encoder.pos_embed.device
    layer = encoder.block_indices(embedder.layer)[-1]
    block: Any = encoder.blocks[layer]
    with torch.inference_mode(), runtime.autocast(embedder.precision, device):
        tokens, _ = encoder.hidden(window.x[None, None].to(device), layer, stretch=window.columns > view)
        normed = tokens if encoder.norm_first else block.norm1(tokens)
    with torch.inference_mode(), runtime.autocast("float32", device):
        rows = _rows(block.attn, normed.float(), encoder.prefix)[0].mean(1)
    patches = rows[:, encoder.prefix :].cpu().clone().unflatten(1, (window.columns, mel))
    timing = embedder.timing
    times = timing.first + torch.arange(window.columns, dtype=torch.float64, device="cpu") * timing.hop
    return AttentionMap(patches, (window.columns, mel), times.float())


def _rows(layer: blocks.Attention, x: Tensor, prefix: int) -> Tensor:
    """Return the attention of the first `prefix` tokens: (R, N, D) to (R, H, prefix, N), float32."""
    width = x.shape[2]
    weight, bias = layer.qkv.weight.float(), layer.qkv.bias.float()
    q = x[:, :prefix] @ weight[:width].T + bias[:width]
    k = x @ weight[width : 2 * width].T + bias[width : 2 * width]
    q, k = (one.unflatten(2, (layer.heads, width // layer.heads)).transpose(1, 2) for one in (q, k))
    return ((q @ k.transpose(2, 3)) * (width // layer.heads) ** -0.5).softmax(-1)
