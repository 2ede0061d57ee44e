"""From settings and a catalogue to every part of a run, constructed and resolved; nothing is written."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.config import PretrainSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.splits import rows_of_splits
from asit.data.loading.loader import loader
from asit.data.loading.sampler import MicroBatchSampler, in_blocks, shuffled
from asit.errors import CatalogueError
from asit.model.audio_model import AudioModel
from asit.pretrain import method, pretrain_dataset
from asit.pretrain.pretrain_dataset import PretrainBatch, PretrainSample
from asit.runtime import Precision, World
from asit.training import loop, open_data, resources
from asit.training.compilation import attention_backends
from asit.training.prefetch import prefetched

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """All that a run needs, resolved and constructed; nothing is written yet."""

    settings: PretrainSettings
    catalogue: Catalogue
    clips: pretrain_dataset.PretrainDataset
    frames: tuple[int, int]
    task: method.ASiT
    precision: Precision
    workers: int
    plan: loop.Plan
    on_device: Callable[[PretrainBatch], PretrainBatch] | None
    """Makes the views of a batch that lies on the device; None: the loader has made them."""


def prepare(settings: PretrainSettings, catalogue: Catalogue, world: World) -> Setup:
    """Resolve every auto and construct all parts; nothing is written.

    Raises:
        ConfigError: settings that cannot go together.
        CatalogueError: the catalogue does not fit the settings.
    """
    auto_warmup = settings.optim.warmup == "auto"
    settings = method.resolve(settings)
    log.info(f"Using {world.device}: {world.reason}")
    precision = runtime.precision(settings.precision, world)
    settings.precision = precision.name  # type: ignore[assignment]
    log.info(f"Using {precision.name} arithmetic: {precision.reason}")
    if auto_warmup:
        log.debug(f"optim.warmup auto: {settings.optim.warmup:g} of {settings.epochs} epochs")
    settings.front_end = open_data.measured(settings.front_end, catalogue)
    if settings.splits:
        rows = rows_of_splits(catalogue, settings.splits)
        log.info(f"Splits {', '.join(settings.splits)}: {len(rows)} of {len(catalogue)} recordings")
        catalogue = catalogue.subset(rows)
    patch = (settings.encoder.patch_frames, settings.encoder.patch_mels)
    typical = float(np.median(catalogue.seconds))
    frames = pretrain_dataset.view_frames(settings.views, FrontEnd(settings.front_end), patch[0], typical)
    # Kept as numbers: the median that auto follows may be another when short recordings have been left out.
    if settings.views.seconds == "auto":
        settings.views.seconds = FrontEnd(settings.front_end).samples_for(frames[0]) / settings.front_end.rate
    if settings.views.local_views and settings.views.local_seconds == "auto":
        settings.views.local_seconds = FrontEnd(settings.front_end).samples_for(frames[1]) / settings.front_end.rate
    catalogue = _long_enough(settings, catalogue, frames[0])
    method.check(settings)
    count = int(pretrain_dataset.segment_counts(catalogue, settings.views).sum())
    settings.batch_size = resources.fit_batch(settings.batch_size, settings.accumulate, count, world)
    if settings.front_end_on == "auto":  # kept as it was resolved: the two round otherwise
        settings.front_end_on = "device" if world.device.type == "cuda" else "loader"
    clips = pretrain_dataset.PretrainDataset(catalogue, settings, frames)
    if not clips.has_donors and settings.masking.replace > 0 and settings.masking.replace_probability > 0:
        log.info("One clip per step: there is no other clip to replace from, so views are masked instead")
    resources.log_threads(world)
    workers = resources.loader_workers(settings.workers, world)
    limit = settings.views.keep_gb = resources.memory_limit(settings.views.keep_gb)
    if resources.fits_in_memory(catalogue, settings.front_end.rate, limit, "views.keep_gb"):
        clips.waveforms.keep()
    if world.device.type == "cuda":
        log.debug(attention_backends(world.device))
    on_device = None
    if clips.on_device:
        on_device = pretrain_dataset.DeviceViews(settings, frames, world.device)
        log.debug(f"log-mels: on {world.device}, a batch at once; the loader returns waveforms")
    generator = torch.Generator().manual_seed(settings.seed)
    task = method.ASiT(settings, frames[0], generator, world.device)
    steps = len(clips) // settings.batch_size
    plan = loop.Plan(
        total=settings.epochs * steps,
        steps_per_epoch=steps,
        batch=settings.batch_size,
        accumulate=settings.accumulate,
        betas=settings.optim.betas,
        clip=settings.optim.clip,
        clip_per_parameter=settings.optim.clip_per_parameter,
        log_every=settings.records.log_every,
        checkpoint_every=settings.records.checkpoint_every,
        stop_after=settings.stop_after,
        most_failures=max(10, int(settings.bad_files * len(clips))),
    )
    size = sum(p.numel() for p in task.encoder().parameters()) / 1e6
    whole = sum(p.numel() for p in task.student.parameters()) / 1e6
    log.info(f"Encoder {settings.encoder.size}: {size:.1f} M parameters, {whole:.1f} M with heads")
    hours = catalogue.header["seconds"] / 3600
    log.info(f"Data: {len(catalogue)} recordings, {hours:.2f} h, {len(clips)} clips per epoch")
    log.info(f"{plan.total} steps: {settings.epochs} epochs of {steps} steps of {settings.batch_size} clips")
    return Setup(settings, catalogue, clips, frames, task, precision, workers, plan, on_device)


def model(setup: Setup, step: int) -> AudioModel:
    """The encoder as it stands, with its card."""
    settings = setup.settings
    return AudioModel.from_parts(
        setup.task.encoder(),
        settings.front_end,
        settings.encoder,
        setup.frames[0],
        training={
            "method": "ASiT (arXiv 2211.13189)",
            "preset": settings.preset,
            "step": step,
            "steps": setup.plan.total,
            "batch_size": settings.batch_size,
            "seed": settings.seed,
            "network": "teacher" if setup.task.teacher is not None else "student",
            "clips": len(setup.catalogue),
            "hours": round(setup.catalogue.header["seconds"] / 3600, 3),
            "catalogue": setup.catalogue.digest,
            "precision": setup.precision.name,
        },
    )


def collate(setup: Setup) -> Callable[[Any], PretrainBatch]:
    """Samples to a batch, which chooses the rows that replacements come from."""
    return functools.partial(pretrain_dataset.collate, donor_pool=setup.settings.masking.donor_pool)


def batch_of(setup: Setup, world: World, samples: list[PretrainSample]) -> PretrainBatch:
    """Samples to a batch on the device, its views made."""
    batch = collate(setup)(samples).to(world.device)
    return batch if setup.on_device is None else setup.on_device(batch)


def feed(setup: Setup, world: World, start: int) -> Generator[PretrainBatch]:
    """This process's micro-batches from step `start` on, on the device, their views made. Close it to end its workers.

    Raises:
        AsitError: what the loader could not go on after.
    """
    device = world.device
    loaded = loader(
        setup.clips, keys(setup, world, start), collate(setup), workers=setup.workers, pin=device.type == "cuda"
    )
    return prefetched(loaded, device, setup.on_device)


def keys(setup: Setup, world: World, start: int) -> MicroBatchSampler:
    """Keys of this process's micro-batches from step `start` on."""
    settings = setup.settings
    order = shuffled(settings.seed, len(setup.clips))
    if settings.views.order == "blocks":
        order = in_blocks(settings.seed, setup.clips.positions(), settings.views.block)
    return MicroBatchSampler(
        order=order,
        count=len(setup.clips),
        batch=settings.batch_size,
        micro=settings.batch_size // (world.size * settings.accumulate),
        rank=world.rank,
        size=world.size,
        start=start,
        donor_pool=settings.masking.donor_pool if setup.clips.has_donors else 0,
    )


def _long_enough(settings: PretrainSettings, catalogue: Catalogue, frames: int) -> Catalogue:
    """Count recordings shorter than a view; leave them out where the settings say so."""
    front_end = settings.front_end
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
