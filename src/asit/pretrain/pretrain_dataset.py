"""Clips to batches: every sample is a pure function of (seed, epoch, index), and so is their order.

Letters: B clips, V global views, L local views, R = B * V rows, T frames, F mel bins. Rows are view-major:
row v * B + b is view v of clip b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings, ViewSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading import device_frontend as cutting
from asit.data.loading.sampler import CORRUPTION, Key, Neighbourhood, Portable, Samples
from asit.data.loading.waveforms import Waves, readable
from asit.errors import AsitError, ConfigError

GLOBAL_VIEWS = 2


class Mask(Protocol):
    """What is done to a view: two (T, F) bool arrays."""

    @property
    def drop(self) -> npt.NDArray[np.bool_]: ...

    @property
    def replace(self) -> npt.NDArray[np.bool_]: ...


class Choice(Protocol):
    """The tokens that a step computes with: masks as they are then, (M * V, K) seen, (V, S) in the local loss."""

    @property
    def masks(self) -> Sequence[Mask]: ...

    @property
    def keep(self) -> npt.NDArray[np.int64]: ...

    @property
    def local(self) -> npt.NDArray[np.int64]: ...


@dataclass(frozen=True)
class Corruption:
    """How views are corrupted, handed in so that this room knows no method.

    Attributes:
        mask: (generator, whether a donor exists) to a view's mask.
        factors: generator to (depth, 2) stochastic-depth factors of one row.
        noise: whether the fill needs noise.
        choose: (generator, masks) to the tokens; None: all tokens.
        copies: M, masked copies of each global view.
        donors: (draws (B, M * V), place of the first clip, clips around) to the places of the clips that replacements
            come from, (B, M * V), in `order.Neighbourhood`.
    """

    mask: Callable[[np.random.Generator, bool], Mask]
    factors: Callable[[np.random.Generator], npt.NDArray[np.float32]]
    noise: bool
    choose: Callable[[np.random.Generator, list[Any]], Choice] | None = None
    copies: int = 1
    donors: Callable[[npt.NDArray[np.float64], int, int], npt.NDArray[np.int64]] | None = None


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass
class Sample:
    """One clip's part of a batch; shapes as in `Batch` without B."""

    name: str
    clean: Tensor
    local: Tensor
    drop: Tensor
    replace: Tensor
    donor: npt.NDArray[np.float64]
    factors: Tensor
    noise: Tensor
    failures: list[str] = field(default_factory=list)
    keep: Tensor = field(default_factory=_none)
    tokens: Tensor = field(default_factory=_none)
    cuts: cutting.Cuts | None = None
    """What the views are made from where that is done on the device; `clean` and `local` then have no frames."""


@dataclass
class Lent:
    """Samples of a micro-batch some of whose donors are not in it.

    Attributes:
        samples: of the micro-batch.
        others: the donors that are not.
        donor: (B, M * V) places in `samples + others`.
    """

    samples: list[Sample]
    others: list[Sample]
    donor: npt.NDArray[np.int64]

    def rows(self) -> Tensor:
        """(M * R,) int64, rows of the global views of `samples`, followed by those of `others`."""
        own, others, views = len(self.samples), len(self.others), self.samples[0].clean.shape[0]
        view = np.arange(self.donor.shape[1]) % views
        beside = views * own + view * others + self.donor - own
        return torch.from_numpy(np.where(self.donor < own, view * own + self.donor, beside).T.flatten())


@dataclass
class Batch(Portable):
    """One forward pass' worth of clips, with every draw that the step needs.

    The student sees M masked copies of each global view, M * R rows, copy by copy; M is 1 unless the settings say so.

    Attributes:
        clean: (R, 1, T, F) normalised log-mel of the global views.
        local: (L * B, 1, T', F), clean, for the student alone.
        drop: (M * R, 1, T, F) bool, wiped.
        replace: (M * R, 1, T, F) bool, taken from the donor.
        donor: (M * R,) int64, rows of `clean`, and then of `others`, that replacements come from.
        factors: (depth, 2, M * R + L * B) stochastic-depth factors, global views first.
        noise: (M * R, 1, T, F) standard normal, or empty where the fill needs none.
        ids: the clips' paths.
        failures: clips that could not be read and for which another stands in.
        keep: (M * R, K) int64, patches that the student sees, or empty: all.
        tokens: (R, S) int64, patches of the local loss, or empty: all.
        others: (V * E, 1, T, F) global views of E clips that are donors and in another micro-batch, or empty.
        waves, have, places, changes: where the views are made on the device, what they are made from (`views.Stacked`);
            until `OnDevice` has done so, `clean` and `local` have no frames, and `drop` and `replace` are bits. Empty
            otherwise.
    """

    clean: Tensor
    local: Tensor
    drop: Tensor
    replace: Tensor
    donor: Tensor
    factors: Tensor
    noise: Tensor
    ids: Sequence[str]
    failures: Sequence[str]
    keep: Tensor = field(default_factory=_none)
    tokens: Tensor = field(default_factory=_none)
    others: Tensor = field(default_factory=_none)
    waves: Tensor = field(default_factory=_none)
    have: Tensor = field(default_factory=_none)
    places: Tensor = field(default_factory=_none)
    changes: Tensor = field(default_factory=_none)


class Clips(Samples[Sample]):
    """Views of the catalogue's recordings.

    A recording of up to 1.5 segments counts once; a longer one counts once for each whole segment in it, and the
    segment's place is drawn anew each epoch.

    Args:
        catalogue: the recordings.
        front_end: waveform to log-mel; mean and std are numbers by now.
        views: what is cut out.
        frames: (T, T') of global and local views.
        corruption: how views are corrupted.
        seed: of every draw.
        donors: whether a batch has another clip to replace from.

    Attributes:
        cut_only: whether views are left as waveforms, for `OnDevice`.
    """

    cut_only: bool = False

    def __init__(
        self,
        catalogue: Catalogue,
        front_end: FrontEndSettings,
        views: ViewSettings,
        frames: tuple[int, int],
        corruption: Corruption,
        seed: int,
        donors: bool,
    ) -> None:
        self.catalogue, self.views, self.frames = catalogue, views, frames
        self.front_end = FrontEnd(front_end)
        self.waves = Waves(front_end)
        self.corruption, self.seed, self.donors = corruption, seed, donors
        counts = np.maximum(1, np.floor(catalogue.seconds / views.segment_seconds + 1e-3)).astype(np.int64)
        self._ends: npt.NDArray[np.int64] | None = np.cumsum(counts) if counts.max(initial=1) > 1 else None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.catalogue) if self._ends is None else int(self._ends[-1])

    def fetch(self, keys: list[Key]) -> None:
        """Read together what the samples need of shards."""
        if self.catalogue.column("shard") is not None:
            self.waves.fetch(self.catalogue[self._locate(key[1])[0]] for key in keys)

    def __getitems__(self, keys: Any) -> Any:
        """A micro-batch's samples; with the donors that they need where these are in another."""
        if not isinstance(keys, Neighbourhood):
            return super().__getitems__(keys)
        samples = super().__getitems__(keys.own)
        if isinstance(samples, AsitError) or self.corruption.donors is None:
            return samples
        places = self.corruption.donors(np.stack([s.donor for s in samples]), keys.first, len(keys.keys))
        replaced = np.stack([s.replace.flatten(1).any(1).numpy() for s in samples])
        inside = (places >= keys.first) & (places < keys.first + keys.count)
        wanted = np.unique(places[replaced & ~inside])
        others = super().__getitems__([keys.keys[place] for place in wanted.tolist()])
        if isinstance(others, AsitError):
            return others
        own = np.arange(keys.count)[:, None]  # stands where nothing is replaced
        beside = np.where(replaced, keys.count + np.searchsorted(wanted, places), own)
        return Lent(samples, others, np.where(inside, places - keys.first, beside))

    def places(self) -> npt.NDArray[np.int64]:
        """(samples, 2) the shard that each sample lies in and where, for `order.in_blocks`; of files, their order."""
        shards, count = self.catalogue.shards, len(self.catalogue)
        found = np.stack([np.zeros(count, np.int64), np.arange(count)], axis=1)
        if shards is not None:
            found = np.stack([shards.codes.astype(np.int64), shards.spans[:, 0]], axis=1)
        return found if self._ends is None else np.repeat(found, np.diff(self._ends, prepend=0), axis=0)

    def __getitem__(self, key: Key) -> Sample:
        (name, clean, local, cuts), failures = readable(self._material, self.seed, key, len(self))
        rng = np.random.default_rng([self.seed, CORRUPTION, *key])
        corruption = self.corruption
        seen = corruption.copies * len(clean)
        masks = [corruption.mask(rng, self.donors) for _ in range(seen)]
        rows = seen + len(local)
        noise = np.zeros(0, np.float32)
        if corruption.noise:
            noise = rng.standard_normal((seen, self.frames[0], clean.shape[2]), dtype=np.float32)
        donor = rng.random(seen)
        factors = torch.from_numpy(np.stack([corruption.factors(rng) for _ in range(rows)]))
        # Drawn last, so that the other draws are the same whether tokens are chosen or not.
        chosen = None if corruption.choose is None else corruption.choose(rng, masks)
        if chosen is not None:
            masks = list(chosen.masks)
        return Sample(
            name,
            clean,
            local,
            torch.from_numpy(np.stack([m.drop for m in masks])),
            torch.from_numpy(np.stack([m.replace for m in masks])),
            donor,
            factors,
            torch.from_numpy(noise),
            failures,
            _none() if chosen is None else torch.from_numpy(chosen.keep),
            _none() if chosen is None else torch.from_numpy(chosen.local),
            cuts,
        )

    def _material(self, rng: np.random.Generator, index: int) -> tuple[str, Tensor, Tensor, cutting.Cuts | None]:
        """A clip's path, its views (V, T, F) and (L, T', F), normalised, and, where none are made yet, their cuts."""
        row, segment, of = self._locate(index)
        clip = self.catalogue[row]
        cuts = self._cuts(clip, segment, of, rng)
        if self.cut_only:
            empty = torch.zeros(GLOBAL_VIEWS + self.views.local_views, 0, self.front_end.settings.mels)
            return clip.path, empty[:GLOBAL_VIEWS], empty[GLOBAL_VIEWS:], cuts.filled(self.front_end)
        made = cuts.logmels(self.front_end, self._wanted())
        clean = torch.stack(made[:GLOBAL_VIEWS])
        local = torch.stack(made[GLOBAL_VIEWS:]) if self.views.local_views else clean.new_zeros(0, 0, clean.shape[2])
        return clip.path, clean, local, None

    def _wanted(self) -> list[int]:
        """Frames of each view."""
        return [self.frames[0]] * GLOBAL_VIEWS + [self.frames[1]] * self.views.local_views

    def _locate(self, index: int) -> tuple[int, int, int]:
        """A sample's row in the catalogue, its segment there, and how many the recording has."""
        if self._ends is None:
            return index, 0, 1
        row = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[row - 1]) if row else 0
        return row, index - first, int(self._ends[row]) - first

    def _cuts(self, clip: Clip, segment: int, of: int, rng: np.random.Generator) -> cutting.Cuts:
        """Draw the views of a clip and read what they hold, once for all of them."""
        settings, front_end = self.views, self.front_end
        rate = front_end.settings.rate
        span = settings.segment_seconds if of > 1 else min(clip.seconds, 1.5 * settings.segment_seconds)
        stratum = max(0.0, clip.seconds - span) / of
        begin = stratum * (segment + rng.random())
        have = front_end.frames_for(round(span * rate))
        draws = [augment.draw_view(rng, settings) for _ in range(GLOBAL_VIEWS + settings.local_views)]
        # A view is cut longer or shorter than wanted by its stretch, and never longer than the clip.
        cut = [max(1, min(round(n * d.stretch), max(have, n))) for n, d in zip(self._wanted(), draws, strict=True)]
        starts = [int(rng.integers(max(0, have - n) + 1)) for n in cut]
        roll = augment.draw_roll(rng, settings)
        first, last = min(starts), max(start + n for start, n in zip(starts, cut, strict=True))
        # What is rolled in from the other end has to be read as well.
        at, until = (0, max(have, last)) if roll else (first, last)
        length = span if roll else min(front_end.samples_for(last - first) / rate, span)
        x = torch.from_numpy(self.waves.read(clip, begin + at * front_end.shift / rate, length))
        x = front_end.pad(augment.roll(x, roll), front_end.samples_for(until - at))
        # The front end sees what the views hold; frames before and after it would be thrown away.
        x = x[(first - at) * front_end.shift :][: front_end.samples_for(last - first)]
        places = [(s - first, n) for s, n in zip(starts, cut, strict=True)]
        return cutting.Cuts(x, front_end.frames_for(len(x)), last - first, places, draws)


class OnDevice:
    """Makes the views of batches of waveforms on a device, and their masks from bits; in place of the loader.

    Nothing in it makes the host wait for the device. A batch whose views are there already comes back as it is.

    Args:
        front_end: waveform to log-mel; mean and std are numbers.
        settings: what is cut out, and how it is changed.
        frames: (T, T') of global and local views.
        device: where.
    """

    def __init__(
        self, front_end: FrontEndSettings, settings: ViewSettings, frames: tuple[int, int], device: torch.device
    ) -> None:
        self.frames = frames
        self.logmels = cutting.LogMels(front_end, warp=settings.mel_warp > 0, gain=settings.gain_db > 0).to(device)

    def __call__(self, batch: Batch) -> Batch:
        if not batch.waves.numel():
            return batch
        stacked = cutting.Stacked(batch.waves, batch.have, batch.places, batch.changes)
        own, split = len(batch.ids), GLOBAL_VIEWS * len(batch.waves)
        whole = self.logmels.whole(stacked)
        clean = self.logmels(whole, stacked, slice(0, split), self.frames[0])
        local, others = batch.local, batch.others
        if len(local):
            local = self.logmels(whole, stacked, slice(split, None), self.frames[1])
        if own < len(batch.waves):
            shape = (-1, len(batch.waves))
            clean, others = (x.flatten(0, 1) for x in clean.unflatten(0, shape).split([own, len(batch.waves) - own], 1))
            local = local.unflatten(0, shape)[:, :own].flatten(0, 1) if len(local) else local
        mels = clean.shape[3]
        none = batch.waves.new_zeros(0)
        return replace(
            batch,
            clean=clean,
            local=local,
            others=others,
            drop=cutting.unpack(batch.drop, mels),
            replace=cutting.unpack(batch.replace, mels),
            waves=none,
            have=none,
            places=none,
            changes=none,
        )


def collate(
    found: list[Sample] | Lent, donor_rows: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.int64]]
) -> Batch:
    """Samples to a batch, rows view-major; `donor_rows` chooses the donors of samples that are all there is."""
    samples, others = (found.samples, found.others) if isinstance(found, Lent) else (found, [])

    def rows(name: str, of: list[Sample] = samples) -> Tensor:
        return torch.stack([getattr(s, name) for s in of], dim=1).flatten(0, 1).unsqueeze(1)

    def tokens(name: str) -> Tensor:
        drawn = [getattr(s, name) for s in samples]
        return torch.stack(drawn, dim=1).flatten(0, 1) if drawn[0].numel() else _none()

    none = samples[0].local.new_zeros(0)
    cuts = [s.cuts for s in samples + others if s.cuts is not None]
    stacked = cutting.stack(cuts) if cuts else cutting.Stacked(none, none, none, none)
    factors = torch.stack([s.factors for s in samples], dim=1).flatten(0, 1)
    return Batch(
        clean=rows("clean"),
        local=rows("local") if len(samples[0].local) else none,
        drop=cutting.pack(rows("drop")) if cuts else rows("drop"),
        replace=cutting.pack(rows("replace")) if cuts else rows("replace"),
        # The copies of a view have donors of their own, in the rows of the one view.
        donor=found.rows()
        if isinstance(found, Lent)
        else torch.from_numpy(donor_rows(np.stack([s.donor for s in samples])))
        % (samples[0].clean.shape[0] * len(samples)),
        factors=factors.permute(1, 2, 0).contiguous(),
        noise=rows("noise") if samples[0].noise.numel() else none,
        ids=[s.name for s in samples],
        failures=[text for s in samples for text in s.failures],
        keep=tokens("keep"),
        tokens=tokens("tokens"),
        others=rows("clean", others) if others else none,
        waves=stacked.waves,
        have=stacked.have,
        places=stacked.places,
        changes=stacked.changes,
    )


def view_frames(settings: ViewSettings, front_end: FrontEnd, patch: int, typical: float) -> tuple[int, int, list[str]]:
    """Frames of global and local views, whole patches, and what there is to say about them.

    Args:
        settings: lengths in seconds, or auto.
        front_end: frames for samples.
        patch: frames of a patch.
        typical: seconds of a typical clip (the median), from which auto follows.

    Raises:
        ConfigError: a view that holds no patch, or is longer than a segment.
    """
    notes: list[str] = []
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
    frames = _whole_patches("views.seconds", seconds, front_end, patch, notes)
    if not settings.local_views:
        return frames, 0, notes
    third = seconds / 3 if seconds >= 3 else 0.6 * seconds
    least = front_end.samples_for(patch) / front_end.settings.rate  # auto holds a patch where the global view does
    local = max(third, least) if settings.local_seconds == "auto" else settings.local_seconds
    return frames, _whole_patches("views.local_seconds", local, front_end, patch, notes), notes


def _whole_patches(name: str, seconds: float, front_end: FrontEnd, patch: int, notes: list[str]) -> int:
    rate = front_end.settings.rate
    frames = front_end.frames_for(round(seconds * rate))
    whole = frames // patch * patch
    if whole == 0:
        least = front_end.samples_for(patch) / rate
        raise ConfigError(
            f"{name} is {seconds:.3g}: {frames} frames hold no patch of {patch} frames",
            f"at least {least:.3f} s",
            f"raise {name} to {least:.3f}, or make encoder.patch_frames smaller",
        )
    dropped = f", of which {frames - whole} are left out to fill whole patches" if frames > whole else ""
    notes.append(f"{name} {seconds:.3g}: {frames} frames{dropped}: {whole} = {whole // patch} x {patch}")
    return whole
