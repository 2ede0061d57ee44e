"""The set-up of fine-tuning: from settings and a labelled catalogue to every part of a run; nothing is written."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from asit.audio.fbank import FrontEnd
from asit.config import FinetuneSettings, ResolvedFinetuneSettings
from asit.config.finetune_settings import resolve
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, balanced_weights, inverse_weights, read_labels, subsample
from asit.data.catalogue.splits import (
    Splits,
    by_folds,
    check_splits,
    drop_unseen_classes,
    make_splits,
    may_share_groups,
)
from asit.data.loading import sampler
from asit.data.loading.windows import Windows
from asit.errors import CatalogueError, ConfigError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.evaluate.result_records import group_codes
from asit.finetune import init_model, supervised
from asit.finetune.finetune_dataset import DeviceInputs, FinetuneBatch, FinetuneDataset, collate
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Labelling
from asit.runtime import World
from asit.training import resources
from asit.training.setup import Setup, choose_machine, plan_of, sampler_of

log = logging.getLogger(__name__)

METRICS = {"single": ("accuracy", "balanced_accuracy"), "multi": ("mAP",)}
"""What the best epoch may be chosen by."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSetup(Setup[FinetuneBatch]):
    """All that fine-tuning needs.

    Attributes:
        labels: of all clips of the catalogue.
        splits: rows of the catalogue that train, validate and test.
        groups: (N,) codes of the groups that intervals keep together; None: each clip is drawn by itself.
        origin: where the first weights came from.
    """

    settings: ResolvedFinetuneSettings
    clips: FinetuneDataset
    task: supervised.Supervised
    labels: Labels
    splits: Splits
    groups: npt.NDArray[np.int64] | None
    origin: str

    def model(self, step: int, **facts: object) -> AudioModel:
        """Return the classifier that counts, with its card; `facts` are added to the card's `training`."""
        settings, scored = self.settings, self.task.scored()
        span = FrontEnd(settings.front_end).samples_for(self.frames) / settings.front_end.rate
        return AudioModel.from_parts(
            scored.encoder,
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
                **facts,
            },
            head=scored.head,
            labels=Labelling(
                self.labels.names,
                self.labels.multi,
                settings.network.pooling,
                # Less than a hop at a clip's end makes no frame, and the clip must count as one that fits.
                max(span, settings.input.seconds),
            ),
        )

    def scorer(self, rows: npt.NDArray[np.int64]) -> ClassifierScorer:
        """Return the scorer of these clips, which keeps their log-mels where they fit in memory."""
        settings, overlap = self.settings, self.settings.input.window_overlap
        windows = Windows(self.catalogue, rows, settings.front_end, self.frames, overlap, settings.score_batch)
        needed = int(windows.counts.sum()) * self.frames * settings.front_end.mels * 4 / 1e9
        return ClassifierScorer(
            windows=windows,
            multi=self.labels.multi,
            world=self.world,
            precision=self.precision,
            workers=self.workers,
            keep=needed <= settings.input.keep_gb,
            bad_files=settings.bad_files,
        )


def prepare(settings: FinetuneSettings, model: AudioModel | None, catalogue: Catalogue, world: World) -> FinetuneSetup:
    """Resolve the settings and construct all parts.

    Args:
        settings: checked.
        model: of `init_model.pretrained`.
        catalogue: labelled clips.
        world: processes and device.

    Raises:
        ConfigError: the settings do not fit the labels or the model.
        CatalogueError: the clips or their labels cannot be used.
        CheckpointError: the weights do not fit.
    """
    settings, precision, workers = choose_machine(settings, "input", world)
    labels = read_labels(catalogue, settings.labels)
    start = init_model.origin(settings, model, catalogue)
    log.info(f"Starting from {start.text}")
    if world.main and (skipped := {why: n for why, n in catalogue.header.get("skipped", {}).items() if n}):
        reasons = ", ".join(f"{count} {why}" for why, count in skipped.items())
        log.warning(f"the catalogue lacks {sum(skipped.values())} clips that could not be used: {reasons}")
    splits = choose_splits(settings, catalogue, labels)
    if not len(splits.validation):
        log.info("No validation split: the last weights alone are scored")
    elif not settings.validation.every:
        log.info("validation.every is 0: the last weights alone are scored")
    seconds, frames = _input(settings, start, catalogue, splits)
    order, count = _order(settings, labels, splits.train)
    found = {
        "front_end": start.front_end.model_dump(),
        "encoder": start.encoder.model_dump(),
        "input": {"seconds": seconds},
        "batch_size": resources.fit_batch(settings.batch_size, settings.accumulate, count, world),
    }
    resolved = resolve(settings, multi=labels.multi, found=found)
    if resolved.validation.metric not in METRICS[resolved.labels]:
        raise ConfigError(
            f"validation.metric is {resolved.validation.metric}, and clips have "
            + ("several labels, or soft ones" if labels.multi else "one label each"),
            " or ".join(METRICS[resolved.labels]),
            "leave it at auto",
        )
    task = supervised.Supervised(
        init_model.build(start, resolved, frames, labels.names, labels.multi), resolved, world.device
    )
    clips = FinetuneDataset(catalogue, splits.train, labels, resolved, frames)
    rate, keep_gb = resolved.front_end.rate, resolved.input.keep_gb
    if resources.fits_in_memory(catalogue.subset(splits.train), rate, keep_gb, "input.keep_gb"):
        clips.waveforms.keep()
    size = sum(p.numel() for p in task.network.parameters()) / 1e6
    log.info(f"Network: {size:.1f} M parameters, {len(labels.names)} classes")
    log.info(f"Data: {len(splits.train)} train, {len(splits.validation)} validation, {len(splits.test)} test clips")
    plan = plan_of(resolved, count, len(clips))
    shared = may_share_groups(catalogue, resolved.sides.shared_groups)
    return FinetuneSetup(
        settings=resolved,
        catalogue=catalogue,
        world=world,
        clips=clips,
        sampler=sampler_of(resolved, order, count, world, positions=resolved.sampling.order != "shuffle"),
        collate=collate,
        on_device=DeviceInputs(resolved, frames, world.device) if clips.on_device else None,
        frames=frames,
        task=task,
        precision=precision,
        workers=workers,
        plan=plan,
        labels=labels,
        splits=splits,
        groups=None if shared else group_codes(catalogue),
        origin=start.text,
    )


def choose_splits(settings: FinetuneSettings, catalogue: Catalogue, labels: Labels) -> Splits:
    """Return the splits of a run, checked, the training split subsampled to the labels that may be used.

    Raises:
        CatalogueError: a split cannot be learned from or leaks into another.
    """
    wanted, sampling = settings.sides, settings.sampling
    splits = make_splits(
        catalogue,
        train=wanted.train,
        validation=wanted.validation,
        test=wanted.test,
        fold=wanted.fold or None,
        share=wanted.hold_out,
        seed=settings.seed,
        labels=labels,
    )
    if wanted.unseen_classes == "skip":
        splits = drop_unseen_classes(labels, splits)
    shared = may_share_groups(catalogue, wanted.shared_groups)
    check_splits(labels, splits, catalogue.column("group"), allow_shared_groups=shared)
    if not len(splits.validation) and not len(splits.test):
        raise CatalogueError(
            f"all {len(splits.train)} clips train: none is left to score on",
            "a test or validation split",
            ("cross-validate over the folds that the data have: --sides.fold all; or " if by_folds(catalogue) else "")
            + "add a column split to the table, or hold out a share: --sides.hold-out 0.2",
        )
    if sampling.share < 1.0 or sampling.per_class:
        kept = subsample(
            labels,
            splits.train,
            share=None if sampling.per_class else sampling.share,
            per_class=sampling.per_class or None,
            seed=settings.seed if settings.label_seed == "auto" else settings.label_seed,
        )
        log.info(f"labels of {len(kept)} of {len(splits.train)} training clips are used")
        splits = dataclasses.replace(splits, train=kept)
    return splits


def _input(
    settings: FinetuneSettings, start: init_model.Origin, catalogue: Catalogue, splits: Splits
) -> tuple[float, int]:
    """Return seconds and frames of the input."""
    longest = float(np.quantile(catalogue.seconds[splits.train], 0.95, method="higher"))
    seconds = min(10.0, round(longest, 3)) if settings.input.seconds == "auto" else settings.input.seconds
    frames, front_end = init_model.frames_of(start, seconds), start.front_end
    span = FrontEnd(front_end).samples_for(frames) / front_end.rate
    patch, stride = positions.patch_of(start.encoder), positions.stride_of(start.encoder)
    grid = positions.grid_of(frames, front_end.mels, patch, stride)
    log.info(f"input of {seconds:g} s: {frames} frames ({span:.3f} s), {grid[0]} x {grid[1]} patches (time, mel)")
    longer = int((catalogue.seconds > span + front_end.shift_ms / 1000).sum())
    if longer:
        log.info(f"{longer} clips are longer: training takes random parts, scores are means over windows")
    return seconds, frames


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
