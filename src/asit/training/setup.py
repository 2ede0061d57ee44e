"""The parts of a training run, resolved and constructed, and the steps of construction that both kinds of run share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch

from asit import runtime
from asit.config import RunSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.loading.loader import KeyedDataset, TensorBatch, loader
from asit.data.loading.sampler import MicroBatchSampler
from asit.model.audio_model import AudioModel
from asit.runtime import Precision, World
from asit.training import loop, resources
from asit.training.compilation import attention_backends
from asit.training.prefetch import prefetched
from asit.training.trainable import Trainable

log = logging.getLogger(__name__)

B = TypeVar("B", bound=TensorBatch)
R = TypeVar("R", bound=RunSettings)


@dataclass(frozen=True, kw_only=True)
class Setup(ABC, Generic[B]):
    """All that a run needs; nothing is written yet. Each kind of run has a subclass.

    Attributes:
        settings: resolved.
        catalogue: the recordings that are used.
        world: processes and device.
        clips: the data set of training.
        sampler: of this process's micro-batches, from step 0 on.
        collate: samples to a batch.
        on_device: completes a batch on the device; None: the loader does all.
        frames: T of the network's input.
        task: the method.
        precision: arithmetic of the networks.
        workers: loader processes.
        plan: length of the run.
    """

    settings: RunSettings
    catalogue: Catalogue
    world: World
    clips: KeyedDataset[Any]
    sampler: MicroBatchSampler
    collate: Callable[[Any], B]
    on_device: Callable[[B], B] | None
    frames: int
    task: Trainable
    precision: Precision
    workers: int
    plan: loop.Plan

    @property
    def out(self) -> Path:
        """The run's folder."""
        return Path(self.settings.out)

    @abstractmethod
    def model(self, step: int) -> AudioModel:
        """Return a copy of the model after `step` steps, with its card."""

    def feed(self, start: int) -> Generator[B]:
        """Yield this process's complete micro-batches on the device, from step `start` on; close it to end its workers.

        Raises:
            AsitError: the loader cannot continue.
        """
        sampler, pin = replace(self.sampler, start=start), self.world.device.type == "cuda"
        loaded = loader(self.clips, sampler, self.collate, workers=self.workers, pin=pin)
        return prefetched(loaded, self.world.device, self.on_device)

    def batch_of(self, samples: list[Any]) -> B:
        """Return samples as a complete batch on the device."""
        batch = self.collate(samples).to(self.world.device)
        return batch if self.on_device is None else self.on_device(batch)


def choose_machine(settings: R, group: Literal["views", "input"], world: World) -> tuple[R, Precision, int]:
    """Resolve what depends on the machine, and log the choices.

    Args:
        settings: of the run.
        group: of the settings that holds `keep_gb`.
        world: processes and device.

    Returns:
        The settings with precision, device of the log-mels and memory resolved, the arithmetic of the networks, and the
        number of loader processes of each process.
    """
    log.info(f"Using {world.device}: {world.reason}")
    precision = runtime.precision(settings.precision, world)
    log.info(f"Using {precision.name} arithmetic: {precision.reason}")
    if world.device.type == "cpu":
        number = torch.get_num_threads()
        log.info(f"Using {number} CPU thread{'s' * (number > 1)}; resume keeps this for bit-identical results")
    # Kept in config.yaml as resolved: the two round differently.
    where = settings.front_end_on
    if where == "auto":
        where = "device" if world.device.type == "cuda" else "loader"
    if where == "device":
        log.debug(f"log-mels: on {world.device}, a batch at once; the loader returns waveforms")
    if world.device.type == "cuda":
        log.debug(attention_backends(world.device))
    workers = resources.loader_workers(settings.workers, world)
    kept = {"keep_gb": resources.memory_limit(getattr(settings, group).keep_gb)}
    return settings.changed({"precision": precision.name, "front_end_on": where, group: kept}), precision, workers


def plan_of(settings: RunSettings, count: int, clips: int, *, clip_per_parameter: bool = False) -> loop.Plan:
    """Return the plan of a run, and log its length.

    Args:
        settings: resolved.
        count: samples of an epoch.
        clips: samples to draw from.
        clip_per_parameter: clip each tensor's gradient by itself.
    """
    steps = count // settings.batch_size
    total = max(1, round(settings.epochs * steps))
    log.info(f"{total} steps: {settings.epochs:.6g} epochs of {steps} steps of {settings.batch_size} clips")
    return loop.Plan(
        total=total,
        steps_per_epoch=steps,
        batch=settings.batch_size,
        accumulate=settings.accumulate,
        betas=settings.optim.betas,
        clip=settings.optim.clip,
        clip_per_parameter=clip_per_parameter,
        log_every=settings.records.log_every,
        checkpoint_every=settings.records.checkpoint_every,
        stop_after=settings.stop_after,
        most_failures=max(10, int(settings.bad_files * clips)),
        save_in_background=settings.records.save_in_background,
    )


def sampler_of(settings: RunSettings, order: Any, count: int, world: World, **options: Any) -> MicroBatchSampler:
    """Return the sampler of this process's micro-batches; `options` are further fields of it."""
    return MicroBatchSampler(
        order=order,
        count=count,
        batch=settings.batch_size,
        micro=settings.batch_size // (world.size * settings.accumulate),
        rank=world.rank,
        size=world.size,
        **options,
    )
