"""Fine-tuning, wired: from a pretrained encoder and labelled clips to a scored classifier and its run's folder."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.data import order
from asit.data.catalogue import Catalogue
from asit.data.labelled import LabelledClips, collate
from asit.data.labels import Labels, balanced_weights, inverse_weights, read_labels
from asit.data.sides import Sides, check_sides, few, split_sides
from asit.data.windows import Windows
from asit.engine import loop
from asit.engine.records import Records
from asit.errors import CatalogueError, ConfigError
from asit.model import positions, vit
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier, Labelling, draw_dropout
from asit.runs import folder, lifecycle, network, resources, score, source
from asit.runs.lifecycle import together
from asit.runtime import Precision, World
from asit.settings import FinetuneSettings
from asit.transfer import supervised


@dataclass(frozen=True)
class FinetuneResult:
    """How a call of fine-tuning ended.

    Attributes:
        out: the run's folder.
        model: the classifier's folder, for `asit.load`.
        step: optimiser steps done.
        total: steps of the schedule.
        finished: whether the schedule is at its end.
        stopped_by: the signal that stopped it, or None.
        results: result records, of the last weights and of those that the validation side chose.
    """

    out: Path
    model: Path
    step: int
    total: int
    finished: bool
    stopped_by: str | None
    results: list[dict[str, Any]]


@dataclass
class _Parts:
    """All parts of a run."""

    settings: FinetuneSettings
    catalogue: Catalogue
    labels: Labels
    sides: Sides
    frames: int
    task: supervised.Supervised
    clips: LabelledClips
    keys: order.MicroBatches
    precision: Precision
    workers: int
    plan: loop.Plan
    notes: list[str]
    told: str

    def model(self, step: int) -> AudioModel:
        """The classifier as it counts now, with its card."""
        return self._model(self.task.scored(), step)

    def _model(self, trained: Classifier, step: int) -> AudioModel:
        settings = self.settings
        span = FrontEnd(settings.front_end).samples_for(self.frames) / settings.front_end.rate
        return AudioModel.from_parts(
            trained.encoder,
            settings.front_end,
            settings.encoder,
            self.frames,
            training={
                "method": "supervised fine-tuning",
                "task": settings.task,
                "from": self.told,
                "step": step,
                "steps": self.plan.total,
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "clips": len(self.clips),
                "catalogue": self.catalogue.digest,
                "precision": self.precision.name,
            },
            head=trained.head,
            labels=Labelling(self.labels.names, self.labels.multi, settings.network.pooling, span),
        )


def finetune(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stream: TextIO | None = sys.stderr,
) -> FinetuneResult:
    """Fine-tune a classifier, score it, and leave a run's folder behind (docs/finetune.md lists its files).

    Args:
        settings: what to do; `data`, `model` and `out` are needed. For all folds in turn see `runs.folds`.
        resume: go on with the run in `out`, from its last checkpoint.
        overwrite: delete the run in `out` first.
        stream: where progress goes; None: nowhere.

    Raises:
        AsitError: anything that the user can mend.
    """
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    supervised.check(settings)
    out = Path(settings.out)
    with runtime.world(settings.device, settings.threads) as world:
        quiet = stream if world.main else None
        going_on = together(world, lambda: folder.claim(out, resume=resume, overwrite=overwrite))
        before = folder.read_settings(out, FinetuneSettings) if going_on else None
        if before is not None:
            settings = folder.settle(settings, before)
        wanted = source.Wanted(settings.data, network.measured_front_end(settings), settings.bad_files, "folder")
        catalogue = together(world, lambda: source.catalogue(wanted, out, quiet, anew=not going_on), world.main)
        if catalogue is None:
            catalogue = source.catalogue(wanted, out, None)
        parts = prepare(settings, catalogue, world)
        if before is not None:
            folder.check_same(before, parts.settings)
        run = lifecycle.Run(
            out,
            parts.settings,
            catalogue,
            parts.frames,
            parts.task,
            parts.precision,
            parts.plan,
            parts.notes,
            parts.settings.records,
            parts.model,
        )
        start, optimiser_state = lifecycle.restore(run) if going_on else (0, {})
        parts.keys = _from(parts.keys, start)
        if world.main and not going_on:
            lifecycle.begin(run, world)
        results: list[dict[str, Any]] = []
        with lifecycle.free_if_nothing_came(out, world, going_on):
            data = order.loader(
                parts.clips, parts.keys, collate, workers=parts.workers, pin=world.device.type == "cuda"
            )
            chooser = _Chooser(parts, out, world)

            def hooks(records: Records) -> Sequence[tuple[int, loop.Hook]]:
                return chooser.hooks(records, start if going_on else None)

            def after(records: Records, outcome: loop.Outcome) -> None:
                if outcome.finished:
                    results.extend(_results(parts, out, world, records, chooser, outcome.step))

            outcome = lifecycle.train(
                run, data, world, start, optimiser_state, quiet, going_on=going_on, hooks=hooks, after=after
            )
    return FinetuneResult(
        out, out / folder.MODEL, outcome.step, parts.plan.total, outcome.finished, outcome.stopped_by, results
    )


def prepare(settings: FinetuneSettings, catalogue: Catalogue, world: World) -> _Parts:
    """Resolve every auto and construct all parts; nothing is written.

    Raises:
        ConfigError: settings that cannot go together.
        CatalogueError: the clips or their labels do not serve.
        CheckpointError: the model cannot be read, or does not fit.
    """
    notes = [f"device {world.device}: {world.reason}"]
    precision = runtime.precision(settings.precision, world.device)
    notes.append(f"precision {precision.name}: {precision.reason}")
    labels = read_labels(catalogue, settings.labels)
    start = network.origin(supervised.resolve(settings, multi=labels.multi), catalogue)
    settings = start.settings
    settings.precision = precision.name  # type: ignore[assignment]
    settings.labels = "multi" if labels.multi else "single"
    notes.append(f"starts from {start.told}")
    sides = choose(settings, catalogue, labels, notes)
    frames = _input(settings, catalogue, sides, notes)
    task = supervised.Supervised(
        network.build(start, frames, labels.names, labels.multi, notes), settings, world.device
    )
    rates = vit.drop_path_rates(settings.encoder)
    clips = LabelledClips(
        catalogue,
        sides.train,
        labels,
        settings.front_end,
        frames,
        settings.augment,
        functools.partial(vit.draw_drop_path, rates=rates),
        functools.partial(_dropout, task.network) if settings.network.dropout else _no_dropout,
        settings.seed,
    )
    drawn, count = _order(settings, labels, sides.train)
    settings.batch_size = resources.fit_batch(settings.batch_size, settings.accumulate, count, world, notes)
    workers = resources.loader_workers(settings.workers, world, notes)
    limit = settings.input.keep_gb = resources.memory_limit(settings.input.keep_gb)
    if resources.fits_in_memory(catalogue.subset(sides.train), settings.front_end.rate, limit, "input.keep_gb", notes):
        clips.waves.keep()
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
    notes.append(f"network: {size:.1f} M parameters, {len(labels.names)} classes")
    notes.append(
        f"clips: {len(sides.train)} train, {len(sides.validation)} validation, {len(sides.test)} test; "
        f"{plan.total} steps: {settings.epochs} epochs of {steps} steps of {settings.batch_size}"
    )
    micro = settings.batch_size // (world.size * settings.accumulate)
    keys = order.MicroBatches(
        drawn, count, settings.batch_size, micro, world.rank, world.size, 0, settings.sampling.order != "shuffle"
    )
    return _Parts(
        settings, catalogue, labels, sides, frames, task, clips, keys, precision, workers, plan, notes, start.told
    )


def choose(settings: FinetuneSettings, catalogue: Catalogue, labels: Labels, notes: list[str]) -> Sides:
    """The sides of a run, checked, the training side cut to the labels that may be used.

    Raises:
        CatalogueError: a side cannot be learned from or leaks into another.
    """
    side, sampling = settings.sides, settings.sampling
    sides = split_sides(
        catalogue,
        train=side.train,
        validation=side.validation,
        test=side.test,
        fold=side.fold or None,
        share=side.hold_out,
        seed=settings.seed,
        labels=labels,
    )
    shared = side.shared_groups or bool(catalogue.header.get("shared_groups"))
    notes += sides.notes
    notes += check_sides(labels, sides, catalogue.column("group"), allow_shared_groups=shared)
    if sampling.share < 1.0 or sampling.per_class:
        assert settings.label_seed != "auto", "settings must be resolved first"
        kept = few(
            labels,
            sides.train,
            share=None if sampling.per_class else sampling.share,
            per_class=sampling.per_class or None,
            seed=settings.label_seed,
        )
        notes.append(f"labels of {len(kept)} of {len(sides.train)} training clips are used")
        sides = Sides(kept, sides.validation, sides.test)
    if not len(sides.validation) and not len(sides.test):
        raise CatalogueError(
            f"all {len(sides.train)} clips train: none is left to score on",
            "a test or validation side",
            "add a column split to the table, or hold out a share: --sides.hold-out 0.2",
        )
    return sides


def _input(settings: FinetuneSettings, catalogue: Catalogue, sides: Sides, notes: list[str]) -> int:
    """Frames of the input; `input.seconds` becomes a number."""
    wanted = settings.input.seconds
    typical = float(np.quantile(catalogue.seconds[sides.train], 0.95, method="higher"))
    seconds = min(10.0, round(typical, 3)) if wanted == "auto" else wanted
    settings.input.seconds = seconds
    frames = network.frames_of(settings, seconds)
    front_end = FrontEnd(settings.front_end)
    span = front_end.samples_for(frames) / settings.front_end.rate
    patch, stride = positions.patch_of(settings.encoder), positions.stride_of(settings.encoder)
    grid = positions.grid_of(frames, settings.front_end.mels, patch, stride)
    notes.append(f"input of {seconds:g} s: {frames} frames ({span:.3f} s), {grid[0]} x {grid[1]} patches (time, mel)")
    longer = int((catalogue.seconds > span + front_end.settings.shift_ms / 1000).sum())
    if longer:
        notes.append(f"{longer} clips are longer: training sees random parts, scores are means over windows")
    return frames


def _order(settings: FinetuneSettings, labels: Labels, rows: npt.NDArray[np.int64]) -> tuple[order.Order, int]:
    kind = settings.sampling.order
    if kind == "shuffle":
        return order.shuffled(settings.seed, len(rows)), len(rows)
    if kind == "inverse" and labels.multi:
        raise ConfigError(
            "sampling.order is inverse, and clips have several labels",
            "balanced, for several labels a clip",
            "pass --sampling.order balanced",
        )
    weights = balanced_weights(labels, rows) if kind == "balanced" else inverse_weights(labels, rows)
    count = settings.sampling.epoch_clips or len(rows)
    return order.weighted(settings.seed, weights, count), count


def _from(keys: order.MicroBatches, start: int) -> order.MicroBatches:
    return order.MicroBatches(keys.order, keys.count, keys.batch, keys.micro, keys.rank, keys.size, start, keys.places)


def _dropout(trained: Classifier, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return draw_dropout(rng, trained.head)


def _no_dropout(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    return np.zeros(0, np.float32)


class _Chooser:
    """Scores the validation side as the run goes, and keeps the weights that did best there."""

    def __init__(self, parts: _Parts, out: Path, world: World) -> None:
        self.parts, self.out, self.world = parts, out, world
        self.best: tuple[float, int] | None = None
        self.every = parts.settings.validation.every * parts.plan.steps_per_epoch
        if not len(parts.sides.validation):
            self.every = 0
        self._scorer = scorer(parts, parts.sides.validation, world) if self.every else None

    def hooks(self, records: Records, start: int | None) -> Sequence[tuple[int, loop.Hook]]:
        """What the loop calls; first makes up for what a stop came between, when going on from `start`."""
        if not self.every:
            return ()
        if start is not None:
            known = _validations(self.out, start, self.parts.settings.validation.metric)
            for step, value in known:
                self._take(value, step)
            if start and start % self.every == 0 and start not in dict(known):
                self._validate(records, start)
        return [(self.every, functools.partial(self._validate, records))]

    def _validate(self, records: Records, step: int) -> None:
        parts = self.parts
        assert self._scorer is not None
        scored = self._scorer(parts.task.scored(), len(parts.labels.names))
        found = score.measures(scored, parts.labels, draws=0)
        values = {name: held["value"] for name, held in found["metrics"].items()}
        value = values[parts.settings.validation.metric]
        better = self._take(value, step)
        records.write("validation", step, {"metrics": values, "clips": found["clips"], "best": better})
        records.say(f"step {step}: validation {parts.settings.validation.metric} {value:.4f}{' (best)' * better}")
        if better and self.world.main:
            parts.model(step).save(self.out / folder.BEST, overwrite=True)

    def _take(self, value: float | None, step: int) -> bool:
        better = value is not None and (self.best is None or value > self.best[0])
        if better and value is not None:
            self.best = (value, step)
        return better


def _validations(out: Path, until: int, metric: str) -> list[tuple[int, float]]:
    """(step, value) of the validations that the run has had, up to a step."""
    found = []
    for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            continue
        if entry.get("kind") == "validation" and entry["step"] <= until:
            found.append((entry["step"], entry["metrics"][metric]))
    return found


def scorer(parts: _Parts, rows: npt.NDArray[np.int64], world: World) -> score.Scorer:
    """What scores these clips of the run, again and again where they fit in memory."""
    settings = parts.settings
    windows = Windows(
        parts.catalogue,
        rows,
        settings.front_end,
        parts.frames,
        settings.input.window_overlap,
        settings.score_batch,
    )
    needed = int(windows.counts.sum()) * parts.frames * settings.front_end.mels * 4 / 1e9
    assert settings.input.keep_gb != "auto", "settings must be resolved first"
    keep = needed <= settings.input.keep_gb
    return score.Scorer(
        windows,
        parts.labels.multi,
        world,
        parts.precision,
        workers=parts.workers,
        keep=keep,
        bad_files=settings.bad_files,
    )


def _results(
    parts: _Parts, out: Path, world: World, records: Records, chooser: _Chooser, step: int
) -> list[dict[str, Any]]:
    """Score the last weights, and the best by validation, on validation and test; write results.json and scores/."""
    networks: list[tuple[str, int, Classifier]] = [("last", step, parts.task.scored())]
    if chooser.best is not None:
        world.any(False)  # The main process has written the best weights.
        best = AudioModel.load(out / folder.BEST)
        assert best.head is not None, "the run's own model has a head"
        networks.append(("best", chooser.best[1], Classifier(best.encoder, best.head).to(world.device)))
    results = []
    settings = parts.settings
    for split, rows in (("validation", parts.sides.validation), ("test", parts.sides.test)):
        if not len(rows):
            continue
        ask = scorer(parts, rows, world)
        for weights, at, trained in networks:
            scored = ask(trained, len(parts.labels.names))
            if not world.main:
                continue
            result = score.record(
                scored,
                parts.labels,
                parts.catalogue,
                task=settings.task,
                split=split,
                weights=weights,
                step=at,
                seed=settings.seed,
            )
            score.save(out, f"{split}-{weights}", scored, parts.labels, parts.catalogue)
            results.append(result)
            values = {name: held["value"] for name, held in result["metrics"].items()}
            records.write(split if split == "test" else "final", step, {"weights": weights, "metrics": values})
            records.say(score.sentence(result))
    if world.main:
        folder.write_json(
            out / folder.RESULTS,
            {
                "task": settings.task,
                "kind": settings.labels,
                "classes": list(parts.labels.names),
                "model": parts.told,
                "train_clips": len(parts.sides.train),
                "chosen_by": settings.validation.metric if chooser.best is not None else None,
                "results": results,
            },
        )
    return results
