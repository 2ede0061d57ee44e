"""The data set of pretraining: each sample holds a clip's views and every draw that a step needs.

A sample is a pure function of (seed, epoch, index). Letters: B clips, V global views, L local views, R = B * V rows,
M masked copies, T frames, F mel bins. Rows are view-major: row v * B + b is view v of clip b.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.config import PretrainSettings, ViewSettings, custom_classes
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading import crops as cropping
from asit.data.loading.loader import KeyedDataset, TensorBatch
from asit.data.loading.sampler import CORRUPTION, VIEW_CHANGE, DonorGroups, Key
from asit.data.loading.waveforms import WaveformReader, readable
from asit.errors import AsitError, ConfigError
from asit.model import vit
from asit.model.positions import patch_of
from asit.pretrain import custom, masking, token_selection

log = logging.getLogger(__name__)

GLOBAL_VIEWS = 2


@dataclass(kw_only=True)
class PretrainSample:
    """One clip's part of a batch; shapes as in `PretrainBatch` without B."""

    name: str
    clean: Tensor
    local: Tensor | None
    drop: Tensor
    replace: Tensor
    donor: npt.NDArray[np.float64]
    factors: Tensor
    noise: Tensor | None
    failures: list[str]
    keep: Tensor | None
    tokens: Tensor | None
    crops: cropping.Crops | None
    """What the views are made from on the device; `clean` and `local` then have 0 frames."""


@dataclass
class GroupedSamples:
    """Samples of a micro-batch, of which some donors may be in another.

    Attributes:
        samples: of the micro-batch.
        others: the donors outside it.
        donor: (B, M * V) indices into `samples + others`.
    """

    samples: list[PretrainSample]
    others: list[PretrainSample]
    donor: npt.NDArray[np.int64]

    def rows(self) -> Tensor:
        """Return the donors as (M * R,) int64 rows of the global views of `samples`, followed by those of `others`."""
        own, others, views = len(self.samples), len(self.others), self.samples[0].clean.shape[0]
        view = np.arange(self.donor.shape[1]) % views
        outside = views * own + view * others + self.donor - own
        return torch.from_numpy(np.where(self.donor < own, view * own + self.donor, outside).T.flatten())


@dataclass(kw_only=True)
class PretrainBatch(TensorBatch):
    """The clips of one forward pass, with every draw that the step needs.

    The student sees M masked copies of each global view, M * R rows, copy by copy; M is 1 by default.

    Attributes:
        clean: (R, 1, T, F) normalised log-mel of the global views; 0 frames until `DeviceViews` has made them.
        local: (L * B, 1, T', F), clean, for the student alone; None: no local views.
        drop: (M * R, 1, T, F) bool, wiped; bits until `DeviceViews` has unpacked them, and so is `replace`.
        replace: (M * R, 1, T, F) bool, taken from the donor.
        donor: (M * R,) int64, rows of `clean`, and then of `others`, that replacements come from.
        factors: (depth, 2, M * R + L * B) stochastic-depth factors, global views first.
        noise: (M * R, 1, T, F) standard normal; None: the fill needs none.
        ids: the clips' paths.
        failures: clips that could not be read and for which another was substituted.
        keep: (M * R, K) int64, patches that the student sees; None: all.
        tokens: (R, S) int64, patches of the local loss; None: all.
        others: (V * E, 1, T, F) global views of E donors in another micro-batch; None: there are none.
        crops: what `DeviceViews` makes the views from; None: they are made.
    """

    clean: Tensor
    local: Tensor | None = None
    drop: Tensor
    replace: Tensor
    donor: Tensor
    factors: Tensor
    noise: Tensor | None = None
    ids: Sequence[str]
    failures: Sequence[str] = ()
    keep: Tensor | None = None
    tokens: Tensor | None = None
    others: Tensor | None = None
    crops: cropping.StackedCrops | None = None


def segment_counts(catalogue: Catalogue, views: ViewSettings) -> npt.NDArray[np.int64]:
    """Return (N,) samples that each recording counts for: one for each complete segment in it, at least one."""
    return np.maximum(1, np.floor(catalogue.seconds / views.segment_seconds + 1e-3)).astype(np.int64)


class PretrainDataset(KeyedDataset[PretrainSample]):
    """Views of the catalogue's recordings, with masks, donors, tokens and stochastic-depth factors.

    A recording of up to 1.5 segments counts once; a longer one once for each complete segment in it, whose position is
    drawn each epoch.

    Args:
        catalogue: the recordings.
        settings: mean and std of the front end are numbers, and batch_size is that of the run.
        frames: (T, T') of global and local views.

    Attributes:
        on_device: whether views are left as crops, for `DeviceViews`.
        has_donors: whether a step has another clip to replace from.
    """

    def __init__(self, catalogue: Catalogue, settings: PretrainSettings, frames: tuple[int, int]) -> None:
        self.catalogue, self.settings, self.views, self.frames = catalogue, settings, settings.views, frames
        self.front_end = FrontEnd(settings.front_end)
        self.waveforms = WaveformReader(settings.front_end)
        self.on_device = settings.front_end_on == "device"
        self.has_donors = settings.batch_size > 1
        self._patch, self._drop_path = patch_of(settings.encoder), vit.drop_path_rates(settings.encoder)
        self._view_frames = [frames[0]] * GLOBAL_VIEWS + [frames[1]] * self.views.local_views
        self._ends = np.cumsum(segment_counts(catalogue, self.views))
        self._mask: custom.Mask | None = None
        self._change: custom.ViewChange | None = None
        rng = np.random.default_rng(settings.seed)  # of trials, before anything is written
        if settings.custom.mask:
            self._mask = custom_classes.find(settings.custom.mask, custom.Mask, "custom.mask")()  # type: ignore[type-abstract]
            self._draw_mask(rng)
        if settings.custom.view:
            self._change = custom_classes.find(settings.custom.view, custom.ViewChange, "custom.view")()  # type: ignore[type-abstract]
            custom.changed_view(self._change, rng, torch.zeros(frames[0], self.front_end.settings.mels))

    def __len__(self) -> int:
        """Return the samples in an epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def fetch(self, keys: list[Key]) -> None:
        """Read together what the samples need of shards."""
        if self.catalogue.column("shard") is not None:
            self.waveforms.fetch(self.catalogue[self._locate(key[1])[0]] for key in keys)

    def __getitems__(self, keys: Any) -> Any:
        """Return a micro-batch's samples, with the donors that they need where these are in another."""
        if not isinstance(keys, DonorGroups):
            return super().__getitems__(keys)
        samples = super().__getitems__(keys.own)
        if isinstance(samples, AsitError):
            return samples
        draws = np.stack([s.donor for s in samples])
        donors = masking.donor_clips(draws, keys.first, len(keys.keys), pool=self.settings.masking.donor_pool)
        replaced = np.stack([s.replace.flatten(1).any(1).numpy() for s in samples])
        inside = (donors >= keys.first) & (donors < keys.first + keys.count)
        wanted = np.unique(donors[replaced & ~inside])
        others = super().__getitems__([keys.keys[position] for position in wanted.tolist()])
        if isinstance(others, AsitError):
            return others
        own = np.arange(keys.count)[:, None]  # a view without replacement names itself
        outside = np.where(replaced, keys.count + np.searchsorted(wanted, donors), own)
        return GroupedSamples(samples, others, np.where(inside, donors - keys.first, outside))

    def positions(self) -> npt.NDArray[np.int64]:
        """Return (samples, 2) each sample's shard and its position there, for `sampler.in_blocks`; of files, their
        order."""
        shards, count = self.catalogue.shards, len(self.catalogue)
        found = np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1)
        if shards is not None:
            found = np.stack([shards.codes.astype(np.int64), shards.spans[:, 0]], axis=1)
        return np.repeat(found, np.diff(self._ends, prepend=0), axis=0)

    def __getitem__(self, key: Key) -> PretrainSample:
        (name, clean, local, crops), failures = readable(self._views, self.settings.seed, key, len(self))
        settings, (frames, _), mels = self.settings, self.frames, self.front_end.settings.mels
        if self._change is not None:
            rng = np.random.default_rng([settings.seed, VIEW_CHANGE, *key])
            clean = torch.stack([custom.changed_view(self._change, rng, view) for view in clean])
            if local is not None:
                local = torch.stack([custom.changed_view(self._change, rng, view) for view in local])
        rng = np.random.default_rng([settings.seed, CORRUPTION, *key])
        seen = settings.masking.copies * GLOBAL_VIEWS
        masks = [self._draw_mask(rng) for _ in range(seen)]
        noise = None
        if settings.masking.fill == "noise":
            noise = torch.from_numpy(rng.standard_normal((seen, frames, mels), dtype=np.float32))
        donor = rng.random(seen)
        factors = [vit.draw_drop_path(rng, self._drop_path) for _ in range(seen + self.views.local_views)]
        keep = tokens = None
        if not settings.masking.keep == settings.losses.local_share == 1.0:
            # Drawn last, so that the other draws do not depend on whether tokens are chosen.
            chosen = token_selection.choose(rng, masks, settings.masking, settings.losses, self._patch)
            masks = chosen.masks
            keep, tokens = (None if x is None else torch.from_numpy(x) for x in (chosen.keep, chosen.local))
        return PretrainSample(
            name=name,
            clean=clean,
            local=local,
            drop=torch.from_numpy(np.stack([m.drop for m in masks])),
            replace=torch.from_numpy(np.stack([m.replace for m in masks])),
            donor=donor,
            factors=torch.from_numpy(np.stack(factors)),
            noise=noise,
            failures=failures,
            keep=keep,
            tokens=tokens,
            crops=crops,
        )

    def _draw_mask(self, rng: np.random.Generator) -> masking.ViewMask:
        shape = self.frames[0], self.front_end.settings.mels
        if self._mask is not None:
            return custom.drawn_mask(self._mask, rng, shape, self._patch, self.has_donors)
        return masking.draw(rng, *shape, self.settings.masking, self._patch, None if self.has_donors else False)

    def _views(self, rng: np.random.Generator, index: int) -> tuple[str, Tensor, Tensor | None, cropping.Crops | None]:
        """Return a clip's path, its views (V, T, F) and (L, T', F), normalised, and, where they are left, its crops."""
        row, segment, segments = self._locate(index)
        clip = self.catalogue[row]
        crops = self._crops(clip, segment, segments, rng)
        if self.on_device:
            empty = torch.zeros(GLOBAL_VIEWS + self.views.local_views, 0, self.front_end.settings.mels)
            local = empty[GLOBAL_VIEWS:] if self.views.local_views else None
            return clip.path, empty[:GLOBAL_VIEWS], local, crops.padded(self.front_end)
        views = crops.logmels(self.front_end, self._view_frames)
        local = torch.stack(views[GLOBAL_VIEWS:]) if self.views.local_views else None
        return clip.path, torch.stack(views[:GLOBAL_VIEWS]), local, None

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Return a sample's row in the catalogue, its segment there, and the recording's number of segments."""
        row = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[row - 1]) if row else 0
        return row, index - first, int(self._ends[row]) - first

    def _crops(self, clip: Clip, segment: int, segments: int, rng: np.random.Generator) -> cropping.Crops:
        """Draw the views of a clip and read what they hold, once for all of them."""
        settings, front_end = self.views, self.front_end
        rate = front_end.settings.rate
        span = settings.segment_seconds if segments > 1 else min(clip.seconds, 1.5 * settings.segment_seconds)
        stratum = max(0.0, clip.seconds - span) / segments
        begin = stratum * (segment + rng.random())
        have = front_end.frames_for(round(span * rate))
        draws = [augment.draw_view(rng, settings) for _ in range(GLOBAL_VIEWS + settings.local_views)]
        # A crop is longer or shorter than its view by the stretch, and never longer than the clip.
        lengths = [
            max(1, min(round(n * d.stretch), max(have, n))) for n, d in zip(self._view_frames, draws, strict=True)
        ]
        starts = [int(rng.integers(max(0, have - n) + 1)) for n in lengths]
        roll = augment.draw_roll(rng, settings)
        first, last = min(starts), max(start + n for start, n in zip(starts, lengths, strict=True))
        # What is rolled in from the other end has to be read as well.
        at, until = (0, max(have, last)) if roll else (first, last)
        length = span if roll else min(front_end.samples_for(last - first) / rate, span)
        x = torch.from_numpy(self.waveforms.read(clip, begin + at * front_end.shift / rate, length))
        x = front_end.pad(augment.roll(x, roll), front_end.samples_for(until - at))
        # Frames before and after the views would be computed for nothing.
        x = x[(first - at) * front_end.shift :][: front_end.samples_for(last - first)]
        spans = [(s - first, n) for s, n in zip(starts, lengths, strict=True)]
        return cropping.Crops(x, front_end.frames_for(len(x)), last - first, spans, draws)


class DeviceViews:
    """Makes the views of batches of crops on a device, and their masks from bits, without synchronising the host.

    Args:
        settings: mean and std of the front end are numbers.
        frames: (T, T') of global and local views.
        device: where.
    """

    def __init__(self, settings: PretrainSettings, frames: tuple[int, int], device: torch.device) -> None:
        self.frames = frames
        warp, gain = settings.views.mel_warp > 0, settings.views.gain_db > 0
        self.front_end = cropping.CropFrontEnd(settings.front_end, warp=warp, gain=gain).to(device)

    def __call__(self, batch: PretrainBatch) -> PretrainBatch:
        """Return the batch with its views; itself where it has them."""
        if (crops := batch.crops) is None:
            return batch
        own, clips = len(batch.ids), len(crops.waveforms)
        split = GLOBAL_VIEWS * clips
        mel = self.front_end.logmel(crops)
        clean = self.front_end(mel, crops, slice(0, split), self.frames[0])
        local, others = batch.local, batch.others
        if local is not None:
            local = self.front_end(mel, crops, slice(split, None), self.frames[1])
        if own < clips:
            shape = (-1, clips)
            clean, others = (x.flatten(0, 1) for x in clean.unflatten(0, shape).split([own, clips - own], 1))
            local = None if local is None else local.unflatten(0, shape)[:, :own].flatten(0, 1)
        drop, replaced = (cropping.unpack(bits, clean.shape[3]) for bits in (batch.drop, batch.replace))
        return replace(batch, clean=clean, local=local, others=others, drop=drop, replace=replaced, crops=None)


def collate(found: list[PretrainSample] | GroupedSamples, donor_pool: int) -> PretrainBatch:
    """Return samples as a batch, rows view-major.

    Args:
        found: samples, with donors from other micro-batches, or without.
        donor_pool: clips of a donor group, for samples that are complete groups.
    """
    if not isinstance(found, GroupedSamples):
        draws = np.stack([s.donor for s in found])
        found = GroupedSamples(found, [], masking.donor_clips(draws, 0, len(found), pool=donor_pool))
    samples, others = found.samples, found.others

    def rows(name: str, of: list[PretrainSample] = samples) -> Tensor:
        return torch.stack([getattr(s, name) for s in of], dim=1).flatten(0, 1)

    def images(name: str, of: list[PretrainSample] = samples) -> Tensor:
        return rows(name, of).unsqueeze(1)

    first, crops = samples[0], [s.crops for s in samples + others if s.crops is not None]
    return PretrainBatch(
        clean=images("clean"),
        local=None if first.local is None else images("local"),
        drop=cropping.pack(images("drop")) if crops else images("drop"),
        replace=cropping.pack(images("replace")) if crops else images("replace"),
        donor=found.rows(),
        factors=rows("factors").permute(1, 2, 0).contiguous(),
        noise=None if first.noise is None else images("noise"),
        ids=[s.name for s in samples],
        failures=[text for s in samples for text in s.failures],
        keep=None if first.keep is None else rows("keep"),
        tokens=None if first.tokens is None else rows("tokens"),
        others=images("clean", others) if others else None,
        crops=cropping.stack(crops) if crops else None,
    )


def view_frames(settings: ViewSettings, front_end: FrontEnd, patch: int, typical: float) -> tuple[int, int]:
    """Frames of global and local views, complete patches.

    Args:
        settings: lengths in seconds, or auto.
        front_end: frames for samples.
        patch: frames of a patch.
        typical: seconds of a typical clip (the median), from which auto follows.

    Raises:
        ConfigError: a view that holds no patch, or is longer than a segment.
    """
    # The paper's 6 s of 10 s; clips shorter than that give most of themselves.
    typical = min(typical, settings.segment_seconds)  # of a longer recording a clip is one segment
    fitting = 6.0 if typical >= 9.0 else max(0.6 * typical, min(0.85 * typical, 1.5))
    seconds = fitting if settings.seconds == "auto" else settings.seconds
    if seconds > settings.segment_seconds:
        raise ConfigError(
            f"views.seconds is {seconds:g}, views.segment_seconds is {settings.segment_seconds:g}",
            "a view no longer than the segment it is cut from",
            f"raise views.segment_seconds to {seconds:g} or more, or leave views.seconds at auto",
        )
    frames = _complete_patches("views.seconds", seconds, front_end, patch)
    if not settings.local_views:
        return frames, 0
    third = seconds / 3 if seconds >= 3 else 0.6 * seconds
    least = front_end.samples_for(patch) / front_end.settings.rate  # auto holds a patch where the global view does
    local = max(third, least) if settings.local_seconds == "auto" else settings.local_seconds
    return frames, _complete_patches("views.local_seconds", local, front_end, patch)


def _complete_patches(name: str, seconds: float, front_end: FrontEnd, patch: int) -> int:
    rate = front_end.settings.rate
    frames = front_end.frames_for(round(seconds * rate))
    complete = frames // patch * patch
    if complete == 0:
        least = front_end.samples_for(patch) / rate
        raise ConfigError(
            f"{name} is {seconds:.3g}: {frames} frames hold no patch of {patch} frames",
            f"at least {least:.3f} s",
            f"raise {name} to {least:.3f}, or make encoder.patch_frames smaller",
        )
    dropped = f", of which {frames - complete} are left out to fill complete patches" if frames > complete else ""
    log.debug(f"{name} {seconds:.3g}: {frames} frames{dropped}: {complete} = {complete // patch} x {patch}")
    return complete
