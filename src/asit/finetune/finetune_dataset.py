"""The data set of fine-tuning: labelled clips, cropped, mixed, augmented and masked, with every draw that a step needs.

Drawing is done by the loader; what follows the waveform also, or on the device, a batch at once. Letters: B clips,
T frames, F mel bins, C classes, S samples, M stripes on an axis.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.config import FinetuneSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import Labels
from asit.data.loading import crops as cropping
from asit.data.loading.loader import KeyedDataset, TensorBatch
from asit.data.loading.sampler import CORRUPTION, MATERIAL, Key
from asit.data.loading.waveforms import WaveformReader, readable
from asit.model import vit
from asit.model.classifier import Head, draw_dropout

Stripes = list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class FinetuneSample:
    """One clip's part of a batch; shapes as in `FinetuneBatch` without B, of whose input `crops` is made."""

    name: str
    x: Tensor
    target: npt.NDArray[np.float32]
    factors: npt.NDArray[np.float32]
    dropout: npt.NDArray[np.float32] | None
    failures: list[str]
    crops: cropping.Crops
    noise: Tensor | None
    stripes: tuple[Stripes, Stripes]


@dataclass(kw_only=True)
class FinetuneBatch(TensorBatch):
    """The clips of one forward pass, with every draw that the step needs.

    Attributes:
        x: (B, 1, T, F) normalised log-mel, augmented; 0 frames until `DeviceInputs` has made it of the last three.
        target: (B, C) weight of each class, in [0, 1]: soft after mixup.
        factors: (depth, 2, B) stochastic-depth factors.
        dropout: (B, features) dropout factors of the head; None: no dropout.
        ids: the clips' paths.
        failures: clips that could not be read and for which another was substituted.
        crops: of the waveforms, mixed; None: `x` is made.
        noise: (B, 1, T, F), added to the normalised log-mel; None: none.
        stripes: (B, 2, M, 2) int64, first and width of what is wiped at the end, in time and in mel bins.
    """

    x: Tensor
    target: Tensor
    factors: Tensor
    dropout: Tensor | None = None
    ids: Sequence[str]
    failures: Sequence[str] = ()
    crops: cropping.StackedCrops | None = None
    noise: Tensor | None = None
    stripes: Tensor | None = None


class _Drawn(NamedTuple):
    """Which clips a sample is made of; positions are shares of the way at which a crop begins."""

    view: augment.ViewDraw
    position: float
    other: int | None = None
    """Index of what is mixed in; None: nothing."""
    weight: float = 1.0
    """Of the first clip."""
    other_position: float = 0.0


class FinetuneDataset(KeyedDataset[FinetuneSample]):
    """Augmented inputs and targets of the chosen clips.

    Args:
        catalogue: the recordings.
        rows: which of them, as indices into the catalogue; a sample's index counts in these.
        labels: of all clips of the catalogue.
        settings: mean and std of the front end are numbers.
        frames: T.

    Attributes:
        on_device: whether inputs are left as crops, for `DeviceInputs`.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        rows: npt.NDArray[np.int64],
        labels: Labels,
        settings: FinetuneSettings,
        frames: int,
    ) -> None:
        self.catalogue, self.rows, self.labels, self.frames = catalogue, rows, labels, frames
        self.augment, self.seed = settings.augment, settings.seed
        self.front_end = FrontEnd(settings.front_end)
        self.waveforms = WaveformReader(settings.front_end)
        self.on_device = settings.front_end_on == "device"
        self._drop_path = vit.drop_path_rates(settings.encoder)
        self._head = blank_head(settings, len(labels.names)) if settings.network.dropout else None

    def __len__(self) -> int:
        """Return the number of clips to draw from."""
        return len(self.rows)

    def fetch(self, keys: list[Key]) -> None:
        """Read together what the samples need of shards, the clips mixed into them included."""
        if self.catalogue.column("shard") is None:
            return
        drawn = (self._draw(np.random.default_rng([self.seed, MATERIAL, *key, 0])).other for key in keys)
        wanted = [key[1] for key in keys] + [other for other in drawn if other is not None]
        self.waveforms.fetch(self.catalogue[int(self.rows[index])] for index in wanted)

    def __getitem__(self, key: Key) -> FinetuneSample:
        made, failures = readable(functools.partial(self._prepare, key), self.seed, key, len(self))
        return replace(made, x=self._input(made), failures=failures)

    def _draw(self, rng: np.random.Generator) -> _Drawn:
        """Draw which clips a sample is made of, and which parts of them; done before any is read."""
        changes = self.augment
        view, position = augment.draw_view(rng, changes), rng.random()
        if changes.mixup > 0 and rng.random() < changes.mixup_probability:
            other, weight = int(rng.integers(len(self))), float(rng.beta(changes.mixup, changes.mixup))
            return _Drawn(view, position, other, weight, rng.random())
        return _Drawn(view, position)

    def _prepare(self, key: Key, rng: np.random.Generator, index: int) -> FinetuneSample:
        """Return a sample without its input."""
        changes, front_end, mels = self.augment, self.front_end, self.front_end.settings.mels
        drawn, (clip, target) = self._draw(rng), self._clip(index)
        length = max(1, round(self.frames * drawn.view.stretch))
        waveform = self._crop(clip, length, drawn.position)
        if drawn.other is not None:
            other, other_target = self._clip(drawn.other)
            waveform = augment.mix(waveform, self._crop(other, length, drawn.other_position), drawn.weight)
            target = drawn.weight * target + (1.0 - drawn.weight) * other_target
        if changes.roll_seconds:
            most = round(changes.roll_seconds * front_end.settings.rate)
            waveform = waveform.roll(int(rng.integers(-most, most + 1)))
        noise = None
        if changes.noise:
            scale = np.float32(rng.uniform(0.0, changes.noise))
            noise = torch.from_numpy(scale * rng.standard_normal((self.frames, mels), dtype=np.float32))
        time = [augment.draw_stripe(rng, self.frames, changes.time_mask) for _ in range(changes.masks)]
        mel = [augment.draw_stripe(rng, mels, changes.mel_mask) for _ in range(changes.masks)]
        crops = cropping.Crops(waveform, front_end.frames_for(len(waveform)), length, [(0, length)], [drawn.view])
        rng = np.random.default_rng([self.seed, CORRUPTION, *key])
        return FinetuneSample(
            name=clip.path,
            x=torch.zeros(0, mels),
            target=target.astype(np.float32),
            factors=vit.draw_drop_path(rng, self._drop_path),
            dropout=None if self._head is None else draw_dropout(rng, self._head),
            failures=[],
            crops=crops.padded(front_end) if self.on_device else crops,
            noise=noise,
            stripes=(time, mel),
        )

    def _input(self, made: FinetuneSample) -> Tensor:
        """Return the network's input (T, F); 0 frames where it is made on the device."""
        if self.on_device:
            return made.x
        (x,) = made.crops.logmels(self.front_end, [self.frames])
        return augment.mask_stripes(x if made.noise is None else x + made.noise, *made.stripes)

    def _clip(self, index: int) -> tuple[Clip, npt.NDArray[np.float32]]:
        row = int(self.rows[index])
        return self.catalogue[row], self.labels.matrix(self.rows[index : index + 1])[0]

    def _crop(self, clip: Clip, frames: int, position: float) -> Tensor:
        """Read (S,) for `frames` frames, from `position` (0 to 1) of what the clip has beyond them, padded."""
        rate, samples = self.front_end.settings.rate, self.front_end.samples_for(frames)
        begin = max(0.0, clip.seconds - samples / rate) * position
        waveform = self.waveforms.read(clip, begin, min(samples / rate, clip.seconds))
        return self.front_end.pad(torch.from_numpy(waveform), samples)[:samples]


class DeviceInputs:
    """Makes the inputs of batches of crops on a device, instead of the loader, without synchronising the host.

    Args:
        settings: mean and std of the front end are numbers.
        frames: T.
        device: where.
    """

    def __init__(self, settings: FinetuneSettings, frames: int, device: torch.device) -> None:
        self.frames = frames
        warp, gain = settings.augment.mel_warp > 0, settings.augment.gain_db > 0
        self.front_end = cropping.CropFrontEnd(settings.front_end, warp=warp, gain=gain).to(device)

    def __call__(self, batch: FinetuneBatch) -> FinetuneBatch:
        """Return the batch with its inputs; itself where it has them."""
        if batch.crops is None or batch.stripes is None:
            return batch
        x = self.front_end(self.front_end.logmel(batch.crops), batch.crops, slice(None), self.frames)
        if batch.noise is not None:
            x = x + batch.noise
        time, mel = (_wiped(batch.stripes[:, axis], x.shape[2 + axis]) for axis in (0, 1))
        x = x.masked_fill(time[:, None, :, None] | mel[:, None, None, :], 0.0)
        return replace(batch, x=x, crops=None, noise=None, stripes=None)


def _wiped(stripes: Tensor, size: int) -> Tensor:
    """Turn (B, M, 2) first and width of stripes into (B, size) bool."""
    at = torch.arange(size, device=stripes.device)
    first, width = stripes[..., :1], stripes[..., 1:]
    return ((at >= first) & (at < first + width)).any(1)


def blank_head(settings: FinetuneSettings, classes: int) -> Head:
    """Return the run's head on the meta device: without memory for its weights, and nothing drawn."""
    with torch.device("meta"):
        return Head(vit.shape_of(settings.encoder)[0], classes, settings.network.pooling, settings.network.dropout)


def collate(samples: list[FinetuneSample]) -> FinetuneBatch:
    """Return samples as a batch."""
    dropout = [s.dropout for s in samples if s.dropout is not None]
    made = FinetuneBatch(
        x=torch.stack([s.x for s in samples]).unsqueeze(1),
        target=torch.from_numpy(np.stack([s.target for s in samples])),
        factors=torch.from_numpy(np.stack([s.factors for s in samples], axis=-1)),
        dropout=torch.from_numpy(np.stack(dropout)) if dropout else None,
        ids=[s.name for s in samples],
        failures=[text for s in samples for text in s.failures],
    )
    if not made.x.numel():
        noise = [s.noise for s in samples if s.noise is not None]
        made.crops = cropping.stack([s.crops for s in samples])
        made.noise = torch.stack(noise).unsqueeze(1) if noise else None
        made.stripes = torch.tensor([s.stripes for s in samples])
    return made
