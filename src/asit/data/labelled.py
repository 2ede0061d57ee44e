"""Labelled clips to batches for supervised training: cut, mixed, changed and masked in the loader's processes.

Letters: B clips, T frames, F mel bins, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.data.catalogue import Catalogue, Clip
from asit.data.labels import Labels
from asit.data.order import CORRUPTION, Key, Portable, Samples
from asit.data.waves import Waves, readable
from asit.settings import AugmentSettings, FrontEndSettings

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
    """

    x: Tensor
    target: Tensor
    factors: Tensor
    dropout: Tensor
    ids: Sequence[str]
    failures: Sequence[str]


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
    """

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
        """Read together what the samples need; clips that are mixed in are read when they are drawn."""
        if self.catalogue.column("shard") is not None:
            self.waves.fetch(self.catalogue[int(self.rows[key[1]])] for key in keys)

    def __getitem__(self, key: Key) -> LabelledSample:
        (name, x, target), failures = readable(self._material, self.seed, key, len(self))
        rng = np.random.default_rng([self.seed, CORRUPTION, *key])
        return LabelledSample(name, x, target, self.factors(rng), self.dropout(rng), failures)

    def _material(self, rng: np.random.Generator, index: int) -> tuple[str, Tensor, npt.NDArray[np.float32]]:
        changes, front_end = self.changes, self.front_end
        clip, target = self._clip(index)
        drawn = augment.draw_view(rng, changes)
        cut = max(1, round(self.frames * drawn.stretch))
        wave = self._wave(clip, cut, rng)
        if changes.mixup > 0 and rng.random() < changes.mixup_probability:
            other, theirs = self._clip(int(rng.integers(len(self))))
            weight = float(rng.beta(changes.mixup, changes.mixup))
            wave = augment.mix(wave, self._wave(other, cut, rng), weight)
            target = weight * target + (1.0 - weight) * theirs
        if changes.roll_seconds:
            most = round(changes.roll_seconds * front_end.settings.rate)
            wave = wave.roll(int(rng.integers(-most, most + 1)))
        mel = front_end.pad_frames(front_end.fbank(wave[None])[0], cut)
        mel = augment.warp_mel(augment.resize_time(mel, self.frames), drawn.mel_warp)
        x = front_end.normalise(augment.gain(mel, drawn.gain_db))
        if changes.noise:
            scale = np.float32(rng.uniform(0.0, changes.noise))
            x = x + torch.from_numpy(scale * rng.standard_normal(tuple(x.shape), dtype=np.float32))
        masks = range(changes.masks)
        time = [augment.draw_stripe(rng, x.shape[0], changes.time_mask) for _ in masks]
        mel_stripes = [augment.draw_stripe(rng, x.shape[1], changes.mel_mask) for _ in masks]
        return clip.path, augment.wipe(x, time, mel_stripes), target.astype(np.float32)

    def _clip(self, index: int) -> tuple[Clip, npt.NDArray[np.float32]]:
        row = int(self.rows[index])
        return self.catalogue[row], self.labels.matrix(self.rows[index : index + 1])[0]

    def _wave(self, clip: Clip, frames: int, rng: np.random.Generator) -> Tensor:
        """(samples,) of `frames` frames: a random part of a longer clip, a shorter one filled by the padding rule."""
        rate, samples = self.front_end.settings.rate, self.front_end.samples_for(frames)
        begin = max(0.0, clip.seconds - samples / rate) * rng.random()
        wave = self.waves.read(clip, begin, min(samples / rate, clip.seconds))
        return self.front_end.pad(torch.from_numpy(wave), samples)[:samples]


def collate(samples: list[LabelledSample]) -> LabelledBatch:
    """Samples to a batch."""
    return LabelledBatch(
        x=torch.stack([s.x for s in samples]).unsqueeze(1),
        target=torch.from_numpy(np.stack([s.target for s in samples])),
        factors=torch.from_numpy(np.stack([s.factors for s in samples], axis=-1)),
        dropout=torch.from_numpy(np.stack([s.dropout for s in samples])),
        ids=[s.name for s in samples],
        failures=[text for s in samples for text in s.failures],
    )
