"""Score several frozen encoders on the same clips, and measure their speed side by side (`asit evaluate A B ...`).

The result is a mapping that JSON can hold; docs/evaluate.md lists its entries, `asit.report.ranking_table` shows it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from asit.config import TableSettings
from asit.data.catalogue import frames
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import may_share_groups
from asit.errors import AsitError, ConfigError
from asit.evaluate.bootstrap import Value
from asit.evaluate.encoder_speed import Reader, measure_speed
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import (
    LOG_MEL,
    LOG_MEL_STATISTICS,
    MODEL,
    TOKENS,
    UNTRAINED,
    LogMelReader,
    pooled,
    readers,
)
from asit.evaluate.frozen import evaluate_frozen, open_catalogue
from asit.evaluate.frozen_scores import FrozenScores, FrozenSettings
from asit.evaluate.paired_draws import Draws, fold_draws, over_seeds, paired
from asit.evaluate.result_records import ClipScores, group_codes, resampling_units
from asit.interop.loading import load
from asit.model.audio_model import AudioModel
from asit.runtime import World

log = logging.getLogger(__name__)

Score = tuple[str, str, str]
"""Probe, features, and part of the labels."""
T = TypeVar("T")


def rank_encoders(
    models: Sequence[str],
    data: Any,
    settings: FrozenSettings,
    *,
    world: World,
    store: Store | None = None,
    table: TableSettings | None = None,
) -> dict[str, Any] | None:
    """Score frozen encoders on the same clips; every process of the world calls this, the main one gets the result.

    Each encoder uses the front end and the sample rate of its card; of a model with a head, the encoder is scored. An
    encoder that cannot be scored has its reason in the result instead of scores. Baselines (`settings.baselines`) have
    the architecture and the front end of the first encoder that could be scored. All encoders stay loaded until their
    speed has been measured.

    Args:
        models: two or more, each once, as for `asit.load`.
        data: as for `asit.evaluate.frozen.open_catalogue`.
        settings: of the probes.
        world: the processes; its device runs the encoders.
        store: cache of features.
        table: how a table or annotations become clips.

    Returns:
        {"data", "task", "kind", "metric", "classes", "encoders", "scores", "speed", "results"}; None in all processes
        but the main one.

    Raises:
        ConfigError: a model is given twice, or settings are out of range.
        AsitError: no model could be scored.
    """
    settings.check()
    if len(set(models)) < len(models):
        twice = next(model for model in models if models.count(model) > 1)
        raise ConfigError(f"the model {twice} is given twice", "each model once", "leave one of them out")
    data, table = frames.take(data, table)
    ranking = _Ranking(data, table, settings, world, store)
    failed: dict[str, AsitError] = {}
    names = short_names(models)
    for source, name in zip(models, names, strict=True):
        try:
            model = _together(world, functools.partial(load, source, world.device))
            ranking.open(model)
            ranking.add(source, name, _together(world, functools.partial(ranking.score, model)))
        except _FailedError as error:
            failed[source] = error.reason
            log.warning("%s is not scored: %s", source, error.reason.found)
    if len(failed) == len(models):
        first, *others = failed.values()
        if all(other.found == first.found for other in others):
            raise first
        reasons = "\n    ".join(f"{model}: {error.found}" for model, error in failed.items())
        raise AsitError(f"no model could be scored:\n    {reasons}", "at least one", "mend these, or name other models")
    if not world.main:
        return None
    return ranking.result([(name, model, failed.get(model)) for name, model in zip(names, models, strict=True)])


class _FailedError(Exception):
    """A model cannot be loaded or scored."""

    def __init__(self, reason: AsitError) -> None:
        self.reason = reason


def _together(world: World, step: Callable[[], T]) -> T:
    """Return what a step does; where it fails in any process, raise a `_FailedError` in all."""
    reason: AsitError | None = None
    try:
        made = step()
    except AsitError as error:
        reason = error
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = AsitError(f"{type(error).__name__}: {error}")
    if world.any(reason is not None):
        raise _FailedError(reason or AsitError("it failed in another process, whose log says why"))
    return made


def short_names(models: Sequence[str]) -> list[str]:
    """Name models in tables: a path by its last part that is not "model"; as given where two would have one name."""
    short = []
    for model in models:
        parts = Path(model).parts
        if Path(model).exists() and parts:
            short.append(parts[-2] if len(parts) > 1 and parts[-1] == "model" else parts[-1])
        else:
            short.append(model)
    if len({*short, UNTRAINED, LOG_MEL_STATISTICS}) < len(short) + 2:
        return list(models)
    return short


class _Scored(NamedTuple):
    """Scores of one encoder, their draws of each seed and fold, and its readers."""

    found: FrozenScores | None
    draws: dict[tuple[str, Score], dict[int, list[Draws]]]
    readers: Mapping[str, Reader]


class _Ranking:
    """Encoders that were scored so far: their records, bootstrap draws and readers."""

    def __init__(
        self, data: str, table: TableSettings, settings: FrozenSettings, world: World, store: Store | None
    ) -> None:
        self.data, self.table, self.settings, self.world, self.store = data, table, settings, world, store
        self.catalogue: Catalogue | None = None
        self.facts: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.draws: dict[Score, dict[str, dict[int, Draws]]] = {}
        self.readers: dict[str, Reader] = {}

    def open(self, model: AudioModel) -> None:
        """Read the data, with the first model."""
        if self.catalogue is None:
            how: dict[str, Any] = {"bad_files": self.settings.bad_files, "table": self.table}
            self.catalogue = open_catalogue(self.data, model, self.world, **how)

    def score(self, model: AudioModel) -> _Scored:
        """Score one encoder, and with the first one the baselines."""
        assert self.catalogue is not None
        settings = replace(self.settings, baselines=self.settings.baselines and not self.readers)
        kept = _Kept(self.catalogue, settings)
        keep = kept if self.world.main else None
        found = evaluate_frozen(model, self.catalogue, settings, world=self.world, store=self.store, keep=keep)
        pooling = settings.pooling if {"linear", "knn"} & set(settings.probes) else ()
        return _Scored(found, kept.draws, readers(model, settings, pooling, "prototype" in settings.probes))

    def add(self, source: str, name: str, scored: _Scored) -> None:
        """Add a scored encoder under its name."""
        names = {encoder: name if encoder == MODEL else encoder for encoder in scored.readers}
        self.readers |= {names[encoder]: reader for encoder, reader in scored.readers.items()}
        if (found := scored.found) is None:
            return
        self.facts = {"task": found.task, "kind": found.kind, "metric": found.metric, "classes": list(found.classes)}
        self.records += [record | {"encoder": names[record["encoder"]], "model": source} for record in found.records]
        for (encoder, score), seeds in scored.draws.items():
            over = {seed: Draws.over_folds(folds) for seed, folds in seeds.items()}
            self.draws.setdefault(score, {})[names[encoder]] = over

    def result(self, models: Sequence[tuple[str, str, AsitError | None]]) -> dict[str, Any]:
        """Return what `rank_encoders` does; `models` are name, source, and why it was not scored."""
        assert self.catalogue is not None
        speed, vectors = measure_speed(self.readers, self.catalogue)
        sources = {name: model for name, model, _ in models}
        scores = []
        for (probe, features, labels), systems in self.draws.items():
            of = {"probe": probe, "features": features, "labels": labels}
            for row in _ranked(systems):
                kind = LOG_MEL if row["encoder"] == LOG_MEL_STATISTICS else features
                scores.append(of | row | {"width": _width(vectors.get(row["encoder"], {}), kind)})
        encoders = [
            {
                "encoder": name,
                "model": sources.get(name),
                "parameters": _parameters(reader),
                "rate": reader.front_end.rate,
                "clips_per_second": speed["clips_per_second"].get(name),
                "failed": None,
            }
            for name, reader in self.readers.items()
        ]
        unscored = {"parameters": None, "rate": None, "clips_per_second": None}
        encoders += [
            {"encoder": name, "model": model, **unscored, "failed": error.found}
            for name, model, error in models
            if error is not None
        ]
        device, threads = self.world.device.type, torch.get_num_threads()
        speed |= {"device": device, "threads": threads, "precision": self.settings.precision}
        return {
            "data": self.data,
            **self.facts,
            "encoders": encoders,
            "scores": scores,
            "speed": speed,
            "results": self.records,
        }


class _Kept:
    """Takes the records of `evaluate_frozen`, and keeps bootstrap draws of each instead of the scores of clips."""

    def __init__(self, catalogue: Catalogue, settings: FrozenSettings) -> None:
        self.catalogue, self.settings = catalogue, settings
        self.labels = read_labels(catalogue, settings.kind, missing=settings.missing)
        self.groups = None if may_share_groups(catalogue, settings.allow_shared_groups) else group_codes(catalogue)
        self.folds: dict[str | None, int] = {}
        self.draws: dict[tuple[str, Score], dict[int, list[Draws]]] = {}

    def __call__(self, record: dict[str, Any], scored: ClipScores) -> None:
        part = self.labels.take(scored.rows)
        multi = self.labels.multi
        targets: npt.NDArray[Any] = part.matrix(np.arange(len(part))) >= 0.5 if multi else part.single
        drawn = fold_draws(
            scored.scores,
            targets,
            "mAP" if multi else "accuracy",
            list(self.catalogue.ids(scored.rows)),
            groups=resampling_units(self.groups, scored.rows),
            seed=self.settings.seed + self.folds.setdefault(record["fold"], len(self.folds)),
        )
        # Log-mel statistics have no tokens to pool, and are compared with each kind of pooling.
        pooling = self.settings.pooling if record["features"] == LOG_MEL else (record["features"],)
        for features in pooling:
            score = record["probe"], features, record["labels"]
            self.draws.setdefault((record["encoder"], score), {}).setdefault(record["seed"], []).append(drawn)


def _ranked(systems: dict[str, dict[int, Draws]]) -> list[dict[str, Any]]:
    """Return a row for each encoder, the best first, with the difference to the best on the same clips and seeds."""
    values = {name: over_seeds(own) for name, own in systems.items()}
    best, *_ = order = sorted(values, key=lambda name: -values[name].value)
    rows = []
    for name in order:
        own = systems[name]
        row = {"encoder": name, **_numbers("value", values[name]), "against": None, "note": ""}
        if name != best:
            difference, note = paired(own, systems[best])
            row |= {"against": best, **_numbers("difference", difference), "note": note}
        first = next(iter(own.values()))
        rows.append(row | {"seeds": len(own), "folds": first.folds, "clips": len(first.ids)})
    return rows


def _numbers(name: str, value: Value) -> dict[str, float | list[float] | None]:
    known = None if np.isnan(value.value) else value.value
    return {name: known, "interval" if name == "value" else f"{name}_interval": [*value[1:]] if value.known else None}


def _width(vectors: Mapping[str, Any], features: str) -> int | None:
    """Return the length of the vector that a probe reads: of one patch for the prototype probe; None if unknown."""
    if not vectors:
        return None
    if features == "patch tokens":
        return int(vectors[TOKENS].shape[1])
    return int(pooled({name: array.reshape(1, -1) for name, array in vectors.items()}, features).shape[1])


def _parameters(reader: Reader) -> int:
    if isinstance(reader, LogMelReader):
        return 0
    model: AudioModel = reader.model
    return sum(parameter.numel() for parameter in model.encoder.parameters())
