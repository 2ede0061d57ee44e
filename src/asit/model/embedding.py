"""From sounds of any length to tokens with their times: windows, batches, and what comes out of them.

Letters: S samples, T frames, F mel bins, P patches, D width, R windows in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from asit.audio import files
from asit.audio.fbank import FrontEnd
from asit.errors import AudioError
from asit.model.vit import Encoder

WHOLE = 1.5
"""A clip up to this many times as long as the training view is seen whole."""

Sound = str | os.PathLike[str] | np.ndarray | Tensor
"""A file, or samples in [-1, 1] as (S,) or (channels, S)."""

Precision = Literal["float32", "bf16"]
"""Arithmetic of an encoder that is asked for something."""


@dataclass(frozen=True)
class Embedding:
    """What a model says about one clip; float32, on the CPU.

    Attributes:
        clip: (D,) mean of the patch tokens: the vector to compare and to classify clips by.
        patches: (P, D) time-major: all mel patches of the first column of time, then the next.
        grid: (time, mel), with time x mel = P.
        times: (time,) centres of the columns, in seconds from the clip's start.
        class_token: (D,); of a long clip, the mean over windows, weighted by the time that each adds.
    """

    clip: Tensor
    patches: Tensor
    grid: tuple[int, int]
    times: Tensor
    class_token: Tensor


@dataclass
class _Window:
    """A stretch of a clip that fits the training view; its last `fresh` columns are not in the window before."""

    clip: int
    wave: Tensor
    columns: int
    fresh: int


_Part = tuple[Tensor, Tensor, int]
"""Of one window: class token (D,), patches of its fresh columns (P, D), how many columns these are."""


@dataclass(frozen=True)
class Embedder:
    """An encoder and its front end, asked about sounds; see `AudioModel.embed_batch`."""

    encoder: Encoder
    front_end: FrontEnd

    def __call__(
        self, sounds: Iterable[Sound], rate: int | None, layer: int | None, precision: Precision, batch: int
    ) -> list[Embedding]:
        """Embed clips of any lengths, in their order."""
        if isinstance(sounds, str | os.PathLike | np.ndarray | Tensor):
            raise AudioError(
                f"embed_batch was given one {type(sounds).__name__}", "a list of sounds", "call embed, or wrap it in []"
            )
        found: list[list[_Part]] = []
        pool: list[_Window] = []
        for i, sound in enumerate(sounds):
            found.append([])
            pool.extend(self._windows(i, self._wave(sound, rate)))
            if len(pool) >= 4 * batch:
                self._run(pool, found, layer, precision, batch)
                pool = []
        self._run(pool, found, layer, precision, batch)
        return [self._embedding(parts) for parts in found]

    def _wave(self, sound: Sound, rate: int | None) -> Tensor:
        """The sound as (S,) float32 at the model's rate, on the CPU; never empty, always finite."""
        own, resampler = self.front_end.settings.rate, self.front_end.settings.resampler
        if isinstance(sound, str | os.PathLike):
            name, wave = str(sound), files.read(Path(sound), rate=own, resampler=resampler)
        elif isinstance(sound, np.ndarray | Tensor):
            name = f"the {type(sound).__name__} of shape {tuple(sound.shape)}"
            samples = sound.detach().cpu() if isinstance(sound, Tensor) else torch.from_numpy(np.array(sound))
            if not samples.is_floating_point():
                raise AudioError(
                    f"{name} holds {samples.dtype}",
                    "floating-point samples in [-1, 1]",
                    "divide by the type's largest value, such as 32768 for int16",
                )
            if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
                raise AudioError(f"{name} is not a clip", "(samples,) or (channels, samples)", "turn the axes")
            mono = samples.float().mean(0) if samples.ndim == 2 else samples.float()
            wave = mono.numpy()
            if rate is not None and rate != own and wave.size:
                wave = files.resample(wave, rate, own, resampler)
        else:
            raise AudioError(f"a {type(sound).__name__}", "a path, an array or a tensor", "see AudioModel.embed")
        if not wave.size:
            raise AudioError(f"{name} is empty", "at least one sample", "leave it out")
        if not np.isfinite(wave).all():
            bad = int((~np.isfinite(wave)).sum())
            raise AudioError(f"{name} has {bad} samples that are not finite", "numbers in [-1, 1]", "mend or leave out")
        return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))

    def _windows(self, clip: int, wave: Tensor) -> Iterator[_Window]:
        encoder, front_end = self.encoder, self.front_end
        step, view = encoder.stride[0], encoder.grid[0]
        # Whole columns, and one more where at least half of what it adds is there.
        columns = max(1, int((front_end.frames_for(len(wave)) - encoder.patch[0]) / step + 1.5))
        wave = front_end.pad(wave, front_end.samples_for(encoder.span(columns)))
        if columns <= WHOLE * view:
            view = max(view, columns)
        starts = [0] if columns <= view else [*range(0, columns - view, view), columns - view]
        done = 0
        for start in starts:
            end = min(start + view, columns)
            first = start * step * front_end.shift
            part = wave[first : first + front_end.samples_for(encoder.span(end - start))]
            yield _Window(clip, part, end - start, end - done)
            done = end

    def _run(
        self,
        windows: Sequence[_Window],
        found: list[list[_Part]],
        layer: int | None,
        precision: Precision,
        batch: int,
    ) -> None:
        """Put the windows through the encoder and add what each one says to its clip."""
        # Neighbours of like length waste least on padding. The sort is stable, so a clip's windows stay in order.
        ordered = sorted(windows, key=lambda window: window.columns)
        device, (view, mel) = self.encoder.pos_embed.device, self.encoder.grid
        cast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        for part in _batches(ordered, batch, view):
            most = part[-1].columns
            with torch.inference_mode(), cast:
                x = torch.stack([self._input(window, most) for window in part]).unsqueeze(1)
                counts = torch.tensor([window.columns for window in part], device=device)
                valid = torch.arange(most * mel, device=device) < counts[:, None] * mel
                padded = part[0].columns < most
                resized = most > view
                tokens = self.encoder(x, valid=valid if padded else None, layer=layer, stretch=resized)
            # Copied outside inference mode: the results can then be used in training something on top.
            cls, patches = tokens.cls.cpu().float().clone(), tokens.patches.cpu().float().clone()
            for i, window in enumerate(part):
                own = patches[i, (window.columns - window.fresh) * mel : window.columns * mel]
                found[window.clip].append((cls[i], own, window.fresh))

    def _input(self, window: _Window, columns: int) -> Tensor:
        """The window's normalised log-mel (T, F) on the model's device, T filled up to `columns` with zeros."""
        frames = self.encoder.span(window.columns)
        logmel = self.front_end.fbank(window.wave[None].to(self.encoder.pos_embed.device))[0]
        x = self.front_end.normalise(self.front_end.pad_frames(logmel, frames)[:frames])
        return torch.nn.functional.pad(x, (0, 0, 0, self.encoder.span(columns) - frames))

    def _embedding(self, parts: list[_Part]) -> Embedding:
        patches = torch.cat([patches for _, patches, _ in parts])
        weights = torch.tensor([float(fresh) for _, _, fresh in parts])
        cls = (torch.stack([cls for cls, _, _ in parts]) * (weights / weights.sum())[:, None]).sum(0)
        columns = int(weights.sum())
        step = self.encoder.stride[0] * self.front_end.shift
        first = self.front_end.samples_for(self.encoder.patch[0]) / 2
        times = (first + torch.arange(columns) * step) / self.front_end.settings.rate
        return Embedding(patches.mean(0), patches, (columns, self.encoder.grid[1]), times, cls)


def _batches(windows: Sequence[_Window], batch: int, view: int) -> Iterator[Sequence[_Window]]:
    """Windows, sorted by length, in batches; those longer than the view only with their like: positions are resized."""
    at = 0
    while at < len(windows):
        end = min(at + batch, len(windows))
        group = max(view, windows[at].columns)
        while windows[end - 1].columns > group:
            end -= 1
        yield windows[at:end]
        at = end
