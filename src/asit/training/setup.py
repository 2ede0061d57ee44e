"""The parts of a training run, resolved and constructed, and the steps of construction that both kinds of run share."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

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


@dataclass(frozen=True)
class Machine:
    """What a run uses of the machine.

    Attributes:
        precision: arithmetic of the networks.
        workers: loader processes of each process.
        front_end_on: where log-mels are computed.
        keep_gb: GB of decoded recordings that a loader process may keep in memory.
    """

    precision: Precision
    workers: int
    front_end_on: Literal["loader", "device"]
    keep_gb: float

    def found(self) -> dict[str, Any]:
        """Return the settings that this resolves."""
        return {"precision": self.precision.name, "front_end_on": self.front_end_on}


def choose_machine(settings: RunSettings, keep_gb: float | Literal["auto"], world: World) -> Machine:
    """Resolve the settings of precision, workers, front end and memory, and log the choices."""
    log.info(f"Using {world.device}: {world.reason}")
    precision = runtime.precision(settings.precision, world)
    log.info(f"Using {precision.name} arithmetic: {precision.reason}")
    resources.log_threads(world)
    # Kept in config.yaml as resolved: the two round differently.
    front_end_on = settings.front_end_on
    if front_end_on == "auto":
        front_end_on = "device" if world.device.type == "cuda" else "loader"
    if front_end_on == "device":
        log.debug(f"log-mels: on {world.device}, a batch at once; the loader returns waveforms")
    if world.device.type == "cuda":
        log.debug(attention_backends(world.device))
    workers = resources.loader_workers(settings.workers, world)
    return Machine(precision, workers, front_end_on, resources.memory_limit(keep_gb))


def plan_of(settings: RunSettings, count: int, clips: int, *, clip_per_parameter: bool = False) -> loop.Plan:
    """Return the plan of a run.

    Args:
        settings: resolved.
        count: samples of an epoch.
        clips: samples to draw from.
        clip_per_parameter: clip each tensor's gradient by itself.
    """
    steps = count // settings.batch_size
    return loop.Plan(
        total=settings.epochs * steps,
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
