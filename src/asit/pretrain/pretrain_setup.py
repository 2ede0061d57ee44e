"""The set-up of pretraining: from settings and a catalogue to every part of a run; nothing is written."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings, PretrainSettings, ResolvedPretrainSettings
from asit.config.pretrain_settings import resolve
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.splits import rows_of_splits
from asit.data.loading.sampler import in_blocks, shuffled
from asit.errors import CatalogueError
from asit.model.audio_model import AudioModel
from asit.pretrain import continued, method, pretrain_dataset
from asit.pretrain.pretrain_dataset import DeviceViews, PretrainBatch, PretrainDataset
from asit.runtime import World
from asit.training import open_data, resources
from asit.training.setup import Setup, choose_machine, plan_of, sampler_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainSetup(Setup[PretrainBatch]):
    """All that pretraining needs; `frames` are those of a global view, `source` is what the run continues from."""

    settings: ResolvedPretrainSettings
    clips: PretrainDataset
    task: method.ASiT
    source: continued.StartingModel | None = None

    def model(self, step: int) -> AudioModel:
        """Return the encoder, with its card."""
        settings = self.settings
        source = {} if self.source is None else {continued.FACTS: self.source.facts}
        return AudioModel.from_parts(
            self.task.encoder(),
            settings.front_end,
            settings.encoder,
            self.frames,
            training={
                "method": "ASiT (arXiv 2211.13189)",
                "preset": settings.preset,
                "step": step,
                "steps": self.plan.total,
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "network": "teacher" if self.task.teacher is not None else "student",
                "clips": len(self.catalogue),
                "hours": round(self.catalogue.header["seconds"] / 3600, 3),
                "catalogue": self.catalogue.digest,
                "precision": self.precision.name,
                **source,
            },
        )


def prepare(
    settings: PretrainSettings, catalogue: Catalogue, world: World, source: continued.StartingModel | None = None
) -> PretrainSetup:
    """Resolve the settings and construct all parts.

    Args:
        settings: checked, and of `continued.start` where there is a source.
        catalogue: of `settings.data`.
        world: processes and device.
        source: what the run continues from; None: fresh weights.

    Raises:
        ConfigError: a view holds no patch or is longer than a segment, or processes do not divide the batch.
        CatalogueError: the catalogue does not fit the settings.
    """
    if settings.custom.view and settings.front_end_on == "auto":
        settings = settings.changed({"front_end_on": "loader"})
    settings, precision, workers = choose_machine(settings, "views", world)
    front_end = open_data.measured(settings.front_end, catalogue)
    if source is not None:
        continued.log_data(front_end, catalogue)
    if settings.splits:
        rows = rows_of_splits(catalogue, settings.splits)
        log.info(f"Splits {', '.join(settings.splits)}: {len(rows)} of {len(catalogue)} recordings")
        catalogue = catalogue.subset(rows)
    typical = float(np.median(catalogue.seconds))
    frames = pretrain_dataset.view_frames(settings.views, FrontEnd(front_end), settings.encoder.patch_frames, typical)
    catalogue = _long_enough(settings, front_end, catalogue, frames[0])
    count = int(pretrain_dataset.segment_counts(catalogue, settings.views).sum())
    found = {
        "front_end": front_end.model_dump(),
        "views": _lengths(settings, front_end, frames),
        "batch_size": resources.fit_batch(settings.batch_size, settings.accumulate, count, world),
    }
    resolved = resolve(settings, found)
    clips = PretrainDataset(catalogue, resolved, frames)
    masks = resolved.masking
    if not clips.has_donors and not resolved.custom.mask and masks.replace > 0 and masks.replace_probability > 0:
        log.info("One clip per step: there is no other clip to replace from, so views are masked instead")
    if resources.fits_in_memory(
        catalogue, front_end.rate, resources.memory_limit(resolved.views.keep_gb), "views.keep_gb"
    ):
        clips.waveforms.keep()
    order = shuffled(resolved.seed, count)
    if resolved.views.order == "blocks":
        order = in_blocks(resolved.seed, clips.positions(), resolved.views.block)
    generator, fill = torch.Generator().manual_seed(resolved.seed), None if source is None else source.fill
    task = method.ASiT(resolved, frames[0], generator, world.device, fill)
    if source is not None:
        source.fill_heads(task)
    size, total = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (task.student.encoder, task.student))
    log.info(f"Encoder {resolved.encoder.size}: {size:.1f} M parameters, {total:.1f} M with heads")
    hours = catalogue.header["seconds"] / 3600
    log.info(f"Data: {len(catalogue)} recordings, {hours:.2f} h, {count} clips per epoch")
    plan = plan_of(resolved, count, count, clip_per_parameter=resolved.optim.clip_per_parameter)
    return PretrainSetup(
        settings=resolved,
        catalogue=catalogue,
        world=world,
        clips=clips,
        sampler=sampler_of(resolved, order, count, world, donor_pool=masks.donor_pool if clips.has_donors else 0),
        collate=functools.partial(pretrain_dataset.collate, donor_pool=masks.donor_pool),
        on_device=DeviceViews(resolved, frames, world.device) if clips.on_device else None,
        frames=frames[0],
        task=task,
        precision=precision,
        workers=workers,
        plan=plan,
        source=source,
    )


def _lengths(settings: PretrainSettings, front_end: FrontEndSettings, frames: tuple[int, int]) -> dict[str, Any]:
    """Return the views' lengths in seconds where they are auto: the median may be another on resume."""
    views, seconds_of = settings.views, FrontEnd(front_end).samples_for
    found = {}
    if views.seconds == "auto":
        found["seconds"] = seconds_of(frames[0]) / front_end.rate
    if views.local_views and views.local_seconds == "auto":
        found["local_seconds"] = seconds_of(frames[1]) / front_end.rate
    return found


def _long_enough(
    settings: PretrainSettings, front_end: FrontEndSettings, catalogue: Catalogue, frames: int
) -> Catalogue:
    """Count recordings shorter than a view; leave them out where the settings say so."""
    least = FrontEnd(front_end).samples_for(frames) / front_end.rate
    short = catalogue.seconds < least - 1e-3
    count = int(short.sum())
    if not count:
        return catalogue
    if settings.views.short_files == "pad":
        log.info(f"{count} recordings are shorter than a view of {least:.2f} s: padded ({front_end.padding})")
        return catalogue
    if count == len(catalogue):
        raise CatalogueError(
            f"all {count} recordings are shorter than a view of {least:.2f} s",
            "recordings that hold a view",
            "make views.seconds smaller, or pass --views.short-files pad",
        )
    log.info(f"{count} recordings are shorter than a view of {least:.2f} s: left out")
    return catalogue.subset(~short)
