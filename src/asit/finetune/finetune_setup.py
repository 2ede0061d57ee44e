"""From fine-tuning's settings and a labelled catalogue to every part of a run, resolved; nothing is written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.config import FinetuneSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, balanced_weights, inverse_weights, read_labels
from asit.data.catalogue.splits import (
    Splits,
    by_folds,
    check_splits,
    drop_unseen_classes,
    make_splits,
    may_share_groups,
)
from asit.data.catalogue.stratified import subsample
from asit.data.loading import loader, sampler
from asit.data.loading.windows import Windows
from asit.errors import CatalogueError, ConfigError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.evaluate.result_records import group_codes
from asit.finetune import init_model, supervised
from asit.finetune.finetune_dataset import DeviceInputs, FinetuneBatch, FinetuneDataset, collate
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Labelling
from asit.runtime import Precision, World
from asit.training import loop, resources
from asit.training.compilation import attention_backends
from asit.training.prefetch import prefetched

log = logging.getLogger(__name__)

METRICS = {"single": ("accuracy", "balanced_accuracy"), "multi": ("mAP",)}
"""What the best epoch may be chosen by."""


@dataclass(frozen=True)
class Setup:
    """All that a run needs, resolved and constructed."""

    settings: FinetuneSettings
    catalogue: Catalogue
    labels: Labels
    sides: Splits
    groups: npt.NDArray[np.int64] | None
    """(N,) codes of the groups that intervals keep whole; None: each clip is drawn for itself."""
    frames: int
    task: supervised.Supervised
    clips: FinetuneDataset
    keys: sampler.MicroBatchSampler
    precision: Precision
    workers: int
    plan: loop.Plan
    origin: str
    """Where the first weights came from."""
    on_device: Callable[[FinetuneBatch], FinetuneBatch] | None
    """Makes the inputs of a batch that lies on the device; None: the loader has made them."""

    def feed(self, world: World, start: int) -> Generator[FinetuneBatch]:
        """This process's micro-batches from step `start` on, on the device, with their inputs; close it to end its
        workers."""
        keys = dataclasses.replace(self.keys, start=start)
        pin = world.device.type == "cuda"
        loaded = loader.loader(self.clips, keys, collate, workers=self.workers, pin=pin)
        return prefetched(loaded, world.device, self.on_device)

    def model(self, step: int, **told: object) -> AudioModel:
        """The classifier as it counts after `step` steps, with its card, to whose `training` `told` is added."""
        settings, trained = self.settings, self.task.scored()
        assert settings.input.seconds != "auto", "settings must be resolved first"
        span = FrontEnd(settings.front_end).samples_for(self.frames) / settings.front_end.rate
        return AudioModel.from_parts(
            trained.encoder,
            settings.front_end,
            settings.encoder,
            self.frames,
            training={
                "method": "supervised fine-tuning",
                "task": settings.task,
                "from": self.origin,
                "step": step,
                "steps": self.plan.total,
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "clips": len(self.clips),
                "catalogue": self.catalogue.digest,
                "precision": self.precision.name,
                **told,
            },
            head=trained.head,
            labels=Labelling(
                self.labels.names,
                self.labels.multi,
                settings.network.pooling,
                # Less than a hop at a clip's end makes no frame, and the clip must count as one that fits.
                max(span, settings.input.seconds),
            ),
        )

    def scorer(self, rows: npt.NDArray[np.int64], world: World) -> ClassifierScorer:
        """What scores these clips, as often as asked; their log-mel is kept where it fits in memory."""
        settings = self.settings
        windows = Windows(
            self.catalogue,
            rows,
            settings.front_end,
            self.frames,
            settings.input.window_overlap,
            settings.score_batch,
        )
        needed = int(windows.counts.sum()) * self.frames * settings.front_end.mels * 4 / 1e9
        assert settings.input.keep_gb != "auto", "settings must be resolved first"
        return ClassifierScorer(
            windows=windows,
            multi=self.labels.multi,
            world=world,
            precision=self.precision,
            workers=self.workers,
            keep=needed <= settings.input.keep_gb,
            bad_files=settings.bad_files,
        )


def prepare(settings: FinetuneSettings, model: AudioModel | None, catalogue: Catalogue, world: World) -> Setup:
    """Resolve every auto and construct all parts.

    Args:
        settings: as the user gave them.
        model: of `network.pretrained`.
        catalogue: labelled clips.
        world: processes and device.

    Raises:
        ConfigError: settings that cannot go together.
        CatalogueError: the clips or their labels do not serve.
        CheckpointError: the weights do not fit.
    """
    log.info(f"Using {world.device}: {world.reason}")
    precision = runtime.precision(settings.precision, world)
    log.info(f"Using {precision.name} arithmetic: {precision.reason}")
    labels = labels_of(catalogue, settings)
    start = init_model.origin(supervised.resolve(settings, multi=labels.multi), model, catalogue)
    if settings.optim.warmup == "auto":
        log.debug(f"optim.warmup auto: {start.settings.optim.warmup:g} of {settings.epochs} epochs")
    settings = start.settings
    settings.precision = precision.name  # type: ignore[assignment]
    settings.labels = "multi" if labels.multi else "single"
    if settings.validation.metric not in METRICS[settings.labels]:
        raise ConfigError(
            f"validation.metric is {settings.validation.metric}, and clips have "
            + ("several labels, or soft ones" if labels.multi else "one label each"),
            " or ".join(METRICS[settings.labels]),
            "leave it at auto",
        )
    log.info(f"Starting from {start.told}")
    skipped = {reason: count for reason, count in catalogue.header.get("skipped", {}).items() if count}
    if skipped:
        told = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        if world.main:
            log.warning(f"the catalogue lacks {sum(skipped.values())} clips that could not be used: {told}")
    sides = choose(settings, catalogue, labels)
    for note in sides.notes:
        log.info(note)
    if not len(sides.validation):
        log.info("No validation split: the last weights alone are scored")
    elif not settings.validation.every:
        log.info("validation.every is 0: the last weights alone are scored")
    frames = _input(settings, catalogue, sides)
    task = supervised.Supervised(init_model.build(start, frames, labels.names, labels.multi), settings, world.device)
    drawn, count = _order(settings, labels, sides.train)
    settings.batch_size = resources.fit_batch(settings.batch_size, settings.accumulate, count, world)
    if settings.front_end_on == "auto":  # kept as it was resolved: the two round otherwise
        settings.front_end_on = "device" if world.device.type == "cuda" else "loader"
    clips = FinetuneDataset(catalogue, sides.train, labels, settings, frames)
    resources.log_threads(world)
    workers = resources.loader_workers(settings.workers, world)
    limit = settings.input.keep_gb = resources.memory_limit(settings.input.keep_gb)
    if resources.fits_in_memory(catalogue.subset(sides.train), settings.front_end.rate, limit, "input.keep_gb"):
        clips.waveforms.keep()
    if world.device.type == "cuda":
        log.debug(attention_backends(world.device))
    on_device = None
    if clips.on_device:
        on_device = DeviceInputs(settings, frames, world.device)
        log.debug(f"log-mels: on {world.device}, a batch at once; the loader returns waveforms")
    steps = count // settings.batch_size
    plan = loop.Plan(
        total=settings.epochs * steps,
        steps_per_epoch=steps,
        batch=settings.batch_size,
        accumulate=settings.accumulate,
        betas=settings.optim.betas,
        clip=settings.optim.clip,
        clip_per_parameter=False,
        log_every=settings.records.log_every,
        checkpoint_every=settings.records.checkpoint_every,
        stop_after=settings.stop_after,
        most_failures=max(10, int(settings.bad_files * len(clips))),
    )
    size = sum(p.numel() for p in task.network.parameters()) / 1e6
    log.info(f"Network: {size:.1f} M parameters, {len(labels.names)} classes")
    log.info(f"Data: {len(sides.train)} train, {len(sides.validation)} validation, {len(sides.test)} test clips")
    log.info(f"{plan.total} steps: {settings.epochs} epochs of {steps} steps of {settings.batch_size} clips")
    keys = sampler.MicroBatchSampler(
        order=drawn,
        count=count,
        batch=settings.batch_size,
        micro=settings.batch_size // (world.size * settings.accumulate),
        rank=world.rank,
        size=world.size,
        positions=settings.sampling.order != "shuffle",
    )
    groups = None if may_share_groups(catalogue, settings.sides.shared_groups) else group_codes(catalogue)
    return Setup(
        settings,
        catalogue,
        labels,
        sides,
        groups,
        frames,
        task,
        clips,
        keys,
        precision,
        workers,
        plan,
        start.told,
        on_device,
    )


def labels_of(catalogue: Catalogue, settings: FinetuneSettings) -> Labels:
    """The labels of all clips.

    Raises:
        CatalogueError: as `read_labels`; clips without a label are named, with ways to go on.
    """
    labels = read_labels(catalogue, settings.labels, missing="skip")
    unknown = np.flatnonzero(~labels.known)
    if len(unknown):
        named = ", ".join(catalogue.ids(unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise CatalogueError(
            f"{len(unknown)} of {len(labels)} clips have no label: {named}",
            "a label for each clip",
            "fill the label column, or take these rows out of the table; of a folder, move these recordings into the "
            "sub-folder of their class, or out of the folder",
        )
    return labels


def choose(settings: FinetuneSettings, catalogue: Catalogue, labels: Labels) -> Splits:
    """The sides of a run, checked, the training side cut to the labels that may be used.

    Raises:
        CatalogueError: a side cannot be learned from or leaks into another.
    """
    side, sampling = settings.sides, settings.sampling
    sides = make_splits(
        catalogue,
        train=side.train,
        validation=side.validation,
        test=side.test,
        fold=side.fold or None,
        share=side.hold_out,
        seed=settings.seed,
        labels=labels,
    )
    if side.unseen_classes == "skip":
        sides = drop_unseen_classes(labels, sides)
    shared = may_share_groups(catalogue, settings.sides.shared_groups)
    notes = check_splits(labels, sides, catalogue.column("group"), allow_shared_groups=shared)
    if not len(sides.validation) and not len(sides.test):
        raise CatalogueError(
            f"all {len(sides.train)} clips train: none is left to score on",
            "a test or validation side",
            ("cross-validate over the folds that the data have: --sides.fold all; or " if by_folds(catalogue) else "")
            + "add a column split to the table, or hold out a share: --sides.hold-out 0.2",
        )
    if sampling.share < 1.0 or sampling.per_class:
        seed = settings.seed if settings.label_seed == "auto" else settings.label_seed
        kept = subsample(
            labels,
            sides.train,
            share=None if sampling.per_class else sampling.share,
            per_class=sampling.per_class or None,
            seed=seed,
        )
        notes.append(f"labels of {len(kept)} of {len(sides.train)} training clips are used")
        sides = dataclasses.replace(sides, train=kept)
    return dataclasses.replace(sides, notes=[*sides.notes, *notes])


def _input(settings: FinetuneSettings, catalogue: Catalogue, sides: Splits) -> int:
    """Frames of the input; `input.seconds` becomes a number."""
    wanted = settings.input.seconds
    typical = float(np.quantile(catalogue.seconds[sides.train], 0.95, method="higher"))
    seconds = min(10.0, round(typical, 3)) if wanted == "auto" else wanted
    settings.input.seconds = seconds
    frames = init_model.frames_of(settings, seconds)
    front_end = FrontEnd(settings.front_end)
    span = front_end.samples_for(frames) / settings.front_end.rate
    patch, stride = positions.patch_of(settings.encoder), positions.stride_of(settings.encoder)
    grid = positions.grid_of(frames, settings.front_end.mels, patch, stride)
    log.info(f"input of {seconds:g} s: {frames} frames ({span:.3f} s), {grid[0]} x {grid[1]} patches (time, mel)")
    longer = int((catalogue.seconds > span + front_end.settings.shift_ms / 1000).sum())
    if longer:
        log.info(f"{longer} clips are longer: training sees random parts, scores are means over windows")
    return frames


def _order(settings: FinetuneSettings, labels: Labels, rows: npt.NDArray[np.int64]) -> tuple[sampler.Order, int]:
    kind = settings.sampling.order
    if kind == "shuffle":
        return sampler.shuffled(settings.seed, len(rows)), len(rows)
    if kind == "inverse" and labels.multi:
        raise ConfigError(
            "sampling.order is inverse, and clips have several labels, or soft ones",
            "balanced, for several labels a clip",
            "pass --sampling.order balanced",
        )
    weights = balanced_weights(labels, rows) if kind == "balanced" else inverse_weights(labels, rows)
    count = settings.sampling.epoch_clips or len(rows)
    return sampler.weighted(settings.seed, weights, count), count
