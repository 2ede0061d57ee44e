"""Labelled clips to batches for supervised training: cut, mixed, changed and masked.

The loader's processes do all of it, or leave what follows the waveform to the device, a batch at once; what is drawn is
drawn by the loader either way. Letters: B clips, T frames, F mel bins, C classes, S samples, M stripes on an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.config import AugmentSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import Labels
from asit.data.loading import device_frontend
from asit.data.loading.sampler import CORRUPTION, MATERIAL, Key, Portable, Samples
from asit.data.loading.waveforms import Waves, readable

Stripes = list[tuple[int, int]]
Draw = Callable[[np.random.Generator], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class LabelledSample:
    """One clip's part of a batch; shapes as in `LabelledBatch` without B."""

    name: str
    x: Tensor
    target: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32]
    dropout: npt.NDArray[np.float32]
    failures: list[str]
    left: Left | None = None
    """What is left to the device; `x` then has no frames."""


@dataclass(frozen=True)
class Left:
    """What makes a clip's input of its waveform.

    Attributes:
        cuts: the waveform, and how its log-mel is cut and changed.
        noise: (T, F), added to the normalised log-mel, or empty: none.
        stripes: M (first, width) on the axis of time, then M on that of mel bins, wiped in the end.
    """

    cuts: device_frontend.Cuts
    noise: Tensor
    stripes: tuple[Stripes, Stripes]


def _none() -> Tensor:
    return torch.zeros(0)


@dataclass
class LabelledBatch(Portable):
    """One forward pass' worth of clips, with every draw that the step needs.

    Attributes:
        x: (B, 1, T, F) normalised log-mel, augmented.
        target: (B, C) weight of each class, in [0, 1]: soft after mixup.
        factors: (depth, 2, B) stochastic-depth factors.
        dropout: (B, features) dropout factors of the head, or (B, 0).
        ids: the clips' paths.
        failures: clips that could not be read and for which another stands in.
        waves, have, places, changes: where the input is made on the device, what it is made from (`views.Stacked`);
            until `OnDevice` has done so, `x` has no frames. Empty otherwise, and so are the next two.
        noise: (B, 1, T, F), added to the normalised log-mel; empty: none.
        stripes: (B, 2, M, 2) int64, first and width of what is wiped in time and of what is wiped in mel bins.
    """

    x: Tensor
    target: Tensor
    factors: Tensor
    dropout: Tensor
    ids: Sequence[str]
    failures: Sequence[str]
    waves: Tensor = field(default_factory=_none)
    have: Tensor = field(default_factory=_none)
    places: Tensor = field(default_factory=_none)
    changes: Tensor = field(default_factory=_none)
    noise: Tensor = field(default_factory=_none)
    stripes: Tensor = field(default_factory=_none)


@dataclass(frozen=True)
class _Drawn:
    """Which clips a sample is made of: view, share of the way at which its part begins, and what is mixed in."""

    view: augment.ViewDraw
    part: float
    other: int | None = None
    weight: float = 1.0
    others_part: float = 0.0


class LabelledClips(Samples[LabelledSample]):
    """Augmented inputs and targets of the chosen clips.

    Args:
        catalogue: the recordings.
        rows: which of them, as indices into the catalogue; a sample's index counts in these.
        labels: of all clips of the catalogue.
        front_end: waveform to log-mel; mean and std are numbers by now.
        frames: T.
        changes: the augmentations.
        factors: generator to (depth, 2) stochastic-depth factors.
        dropout: generator to the head's dropout factors, (features,) or (0,).
        seed: of every draw.

    Attributes:
        cut_only: whether inputs are left as waveforms, for `OnDevice`.
    """

    cut_only: bool = False

    def __init__(
        self,
        catalogue: Catalogue,
        rows: npt.NDArray[np.int64],
        labels: Labels,
        front_end: FrontEndSettings,
        frames: int,
        changes: AugmentSettings,
        factors: Draw,
        dropout: Draw,
        seed: int,
    ) -> None:
        self.catalogue, self.rows, self.labels, self.frames = catalogue, rows, labels, frames
        self.front_end, self.waves = FrontEnd(front_end), Waves(front_end)
        self.changes, self.factors, self.dropout, self.seed = changes, factors, dropout, seed

    def __len__(self) -> int:
        """Clips there are to draw from."""
        return len(self.rows)

    def fetch(self, keys: list[Key]) -> None:
        """Read together what the samples need, and the clips that are mixed into them."""
        if self.catalogue.column("shard") is None:
            return
        mixed = (self._draw(np.random.default_rng([self.seed, MATERIAL, *key, 0])).other for key in keys)
        wanted = [key[1] for key in keys] + [index for index in mixed if index is not None]
        self.waves.fetch(self.catalogue[int(self.rows[index])] for index in wanted)

    def __getitem__(self, key: Key) -> LabelledSample:
        (name, target, left), failures = readable(self._material, self.seed, key, len(self))
        rng = np.random.default_rng([self.seed, CORRUPTION, *key])
        x = torch.zeros(0, self.front_end.settings.mels) if self.cut_only else self._input(left)
        given = (name, x, target, self.factors(rng), self.dropout(rng), failures)
        return LabelledSample(*given, left if self.cut_only else None)

    def _draw(self, rng: np.random.Generator) -> _Drawn:
        """What decides which clips a sample is made of, and which parts of them: all drawn before any is read."""
        changes = self.changes
        view, part = augment.draw_view(rng, changes), rng.random()
        if changes.mixup > 0 and rng.random() < changes.mixup_probability:
            other, weight = int(rng.integers(len(self))), float(rng.beta(changes.mixup, changes.mixup))
            return _Drawn(view, part, other, weight, rng.random())
        return _Drawn(view, part)

    def _material(self, rng: np.random.Generator, index: int) -> tuple[str, npt.NDArray[np.float32], Left]:
        changes, front_end = self.changes, self.front_end
        drawn, (clip, target) = self._draw(rng), self._clip(index)
        view = drawn.view
        cut = max(1, round(self.frames * view.stretch))
        wave = self._wave(clip, cut, drawn.part)
        if drawn.other is not None:
            other, theirs = self._clip(drawn.other)
            wave = augment.mix(wave, self._wave(other, cut, drawn.others_part), drawn.weight)
            target = drawn.weight * target + (1.0 - drawn.weight) * theirs
        if changes.roll_seconds:
            most = round(changes.roll_seconds * front_end.settings.rate)
            wave = wave.roll(int(rng.integers(-most, most + 1)))
        noise, mels = _none(), front_end.settings.mels
        if changes.noise:
            scale = np.float32(rng.uniform(0.0, changes.noise))
            noise = torch.from_numpy(scale * rng.standard_normal((self.frames, mels), dtype=np.float32))
        masks = range(changes.masks)
        time = [augment.draw_stripe(rng, self.frames, changes.time_mask) for _ in masks]
        mel = [augment.draw_stripe(rng, mels, changes.mel_mask) for _ in masks]
        cuts = device_frontend.Cuts(wave, front_end.frames_for(len(wave)), cut, [(0, cut)], [view])
        cuts = cuts.filled(front_end) if self.cut_only else cuts
        return clip.path, target.astype(np.float32), Left(cuts, noise, (time, mel))

    def _input(self, left: Left) -> Tensor:
        """(T, F), as the network takes it."""
        (x,) = left.cuts.logmels(self.front_end, [self.frames])
        return augment.mask_stripes(x + left.noise if left.noise.numel() else x, *left.stripes)

    def _clip(self, index: int) -> tuple[Clip, npt.NDArray[np.float32]]:
        row = int(self.rows[index])
        return self.catalogue[row], self.labels.matrix(self.rows[index : index + 1])[0]

    def _wave(self, clip: Clip, frames: int, part: float) -> Tensor:
        """(samples,) of `frames` frames: the part of a longer clip that begins at this share of what it has beyond
        them; a shorter one is filled by the padding rule."""
        rate, samples = self.front_end.settings.rate, self.front_end.samples_for(frames)
        begin = max(0.0, clip.seconds - samples / rate) * part
        wave = self.waves.read(clip, begin, min(samples / rate, clip.seconds))
        return self.front_end.pad(torch.from_numpy(wave), samples)[:samples]


class OnDevice:
    """Makes the inputs of batches of waveforms on a device, in place of the loader; the host waits for nothing.

    Args:
        front_end: waveform to log-mel; mean and std are numbers.
        changes: the augmentations.
        frames: T.
        device: where.
    """

    def __init__(
        self, front_end: FrontEndSettings, changes: AugmentSettings, frames: int, device: torch.device
    ) -> None:
        self.frames = frames
        self.logmels = device_frontend.LogMels(front_end, warp=changes.mel_warp > 0, gain=changes.gain_db > 0).to(
            device
        )

    def __call__(self, batch: LabelledBatch) -> LabelledBatch:
        """The batch with its inputs; one that has them already comes back as it is."""
        if not batch.waves.numel():
            return batch
        stacked = device_frontend.Stacked(batch.waves, batch.have, batch.places, batch.changes)
        x = self.logmels(self.logmels.whole(stacked), stacked, slice(None), self.frames)
        if batch.noise.numel():
            x = x + batch.noise
        time, mel = (_wiped(batch.stripes[:, axis], x.shape[2 + axis]) for axis in (0, 1))
        x = x.masked_fill(time[:, None, :, None] | mel[:, None, None, :], 0.0)
        none = batch.waves.new_zeros(0)
        return replace(batch, x=x, waves=none, have=none, places=none, changes=none, noise=none, stripes=none)


def _wiped(stripes: Tensor, size: int) -> Tensor:
    """(B, M, 2) first and width of stripes -> (B, size) bool."""
    place = torch.arange(size, device=stripes.device)
    first, width = stripes[..., :1], stripes[..., 1:]
    return ((place >= first) & (place < first + width)).any(1)


def collate(samples: list[LabelledSample]) -> LabelledBatch:
    """Samples to a batch."""
    batch = LabelledBatch(
        x=torch.stack([s.x for s in samples]).unsqueeze(1),
        target=torch.from_numpy(np.stack([s.target for s in samples])),
        factors=torch.from_numpy(np.stack([s.factors for s in samples], axis=-1)),
        dropout=torch.from_numpy(np.stack([s.dropout for s in samples])),
        ids=[s.name for s in samples],
        failures=[text for s in samples for text in s.failures],
    )
    left = [s.left for s in samples if s.left is not None]
    if not left:
        return batch
    stacked = device_frontend.stack([one.cuts for one in left])
    return replace(
        batch,
        waves=stacked.waves,
        have=stacked.have,
        places=stacked.places,
        changes=stacked.changes,
        noise=torch.stack([one.noise for one in left]).unsqueeze(1) if left[0].noise.numel() else _none(),
        stripes=torch.tensor([one.stripes for one in left]),
    )
