"""Run a study: pretrain each arm with each seed, score it, and skip what is finished or in the hands of others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from asit.config import FinetuneSettings, PretrainSettings, presets
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import read_labels
from asit.errors import ConfigError, TrainingError
from asit.evaluate.frozen import evaluate_frozen
from asit.evaluate.frozen_scores import FrozenSettings
from asit.evaluate.result_records import ClipScores, save_scores
from asit.finetune import cross_validation
from asit.io import atomic, lock, parsing
from asit.model.audio_model import AudioModel
from asit.pretrain import pretrain_run
from asit.progress import duration
from asit.runtime import world
from asit.study.arm_costs import clock
from asit.study.study_plan import Study, tuned_part
from asit.training import run_dir

log = logging.getLogger(__name__)

SCRATCH: dict[str, Any] = {"layer_decay": 1.0}
"""Optimiser settings of a classifier from fresh weights: with a decay its lower layers would hardly learn."""


@dataclass
class StudyEnd:
    """How a call of a study ended.

    Attributes:
        done, total: units of work that are finished, and of this call: arms, and rates from fresh weights, with a seed.
        stopped_by: the signal that stopped it, or None.
        others: units that other processes work on.
        failed: unit -> why its training failed.
    """

    done: int = 0
    total: int = 0
    stopped_by: str | None = None
    others: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class _StoppedError(Exception):
    """A signal stopped a run, which has a checkpoint."""


@dataclass(frozen=True)
class _Unit:
    """A part of a study that one process does: its name, the folder that is claimed for it, and its steps.

    Each step is a file that exists when it is finished, and a function that makes it.
    """

    name: str
    claim: Path
    steps: Sequence[tuple[Path, Callable[[], None]]]

    @property
    def finished(self) -> bool:
        return all(path.exists() for path, _ in self.steps)


def run(study: Study, seeds: Sequence[int], arms: Sequence[str], task: tuple[int, int] = (1, 1)) -> StudyEnd:
    """Do what is left of a study.

    Several processes may share its folder: each unit is claimed by a lock while it is worked on, and a claim of a
    killed process is taken over. An arm whose training fails is logged, and the others go on.

    Args:
        study: prepared.
        seeds: of pretraining, probes and fine-tuning.
        arms: to run.
        task: (i, n): every n-th unit, from the i-th; from (1, n) to (n, n) they are all units.
    """
    units = list(_units(study, seeds, arms))[task[0] - 1 :: task[1]]
    end, began, worked = StudyEnd(total=len(units)), time.monotonic(), 0
    for number, unit in enumerate(units, 1):
        if unit.finished:
            end.done += 1
            continue
        try:
            with lock.writing(unit.claim):
                log.info(f"{unit.name}: {number} of {len(units)}")
                for path, step in unit.steps:
                    if not path.exists():
                        step()
        except lock.InUseError:
            log.info(f"{unit.name}: another process works on it")
            end.others.append(unit.name)
            continue
        except _StoppedError as stopped:
            end.stopped_by = str(stopped)
            return end
        except TrainingError as error:
            log.warning(f"{unit.name} failed: {error.found}")
            end.failed[unit.name] = error.found
            continue
        end.done, worked = end.done + 1, worked + 1
        left = sum(not other.finished for other in units[number:])
        seconds = (time.monotonic() - began) / worked
        log.info(f"{unit.name} is finished: {end.done} of {len(units)}, about {duration(left * seconds)} left")
    return end


def cost_file(run_folder: Path) -> Path:
    """Return the file beside a pretraining run that holds its seconds, and whether it is finished."""
    return run_folder.with_name(f"{run_folder.name}.cost.json")


def _units(study: Study, seeds: Sequence[int], arms: Sequence[str]) -> Iterator[_Unit]:
    """Yield the units, seed by seed, so that a study that is stopped has whole seeds."""
    for seed in seeds:
        for arm in arms:
            steps = [(_finished(study.run(arm, seed)), partial(_pretrain, study, arm, seed))]
            for table in study.tables:
                place = study.scores(arm, seed, table)
                steps.append((place / run_dir.RESULTS, partial(_probe, study, arm, seed, table)))
                for share in study.scoring.shares:
                    tuned = study.scores(arm, seed, tuned_part(table, share))
                    given = {"model": str(study.run(arm, seed) / run_dir.MODEL)}
                    steps.append((tuned / run_dir.RESULTS, partial(_tune, study, table, share, seed, tuned, given)))
            yield _Unit(f"{arm}, seed {seed}", study.run(arm, seed), steps)
        for rate in study.scoring.scratch_rates:
            steps = []
            for table in study.tables:
                for share in study.scoring.shares:
                    place = study.scratch(rate, seed, tuned_part(table, share))
                    given = _fresh(study, rate)
                    steps.append((place / run_dir.RESULTS, partial(_tune, study, table, share, seed, place, given)))
            if steps:
                yield _Unit(f"from scratch, rate {rate:g}, seed {seed}", study.scratch(rate, seed, "claim"), steps)


def _finished(run_folder: Path) -> Path:
    """Return the file that a pretraining run has once it is finished."""
    return run_folder.with_name(f"{run_folder.name}.finished.json")


def _pretrain(study: Study, arm: str, seed: int) -> None:
    """Start or resume a pretraining run; its seconds are added up over interruptions."""
    out = study.run(arm, seed)
    settings = study.arms[arm].changed({"data": study.data_path, "out": str(out), "seed": seed})
    cost = cost_file(out)
    with clock(settings.device) as seconds:
        try:
            result = pretrain_run.pretrain(settings, resume="auto")
        finally:
            if out.exists():
                atomic.write_json(cost, {"seconds": _spent(cost) + seconds()})
    if not result.finished:
        raise _StoppedError(result.stopped_by)
    atomic.write_json(_finished(out), {"seconds": _spent(cost), "steps": result.step})


def _spent(cost: Path) -> float:
    return float(parsing.json_object(cost, ConfigError)["seconds"]) if cost.exists() else 0.0


def _probe(study: Study, arm: str, seed: int, table: str) -> None:
    """Score the frozen encoder; for the reference arm also the baselines."""
    out, settings = study.scores(arm, seed, table), study.arms[arm]
    catalogue = study.catalogue(table)
    labels = read_labels(catalogue)

    def keep(record: dict[str, Any], scored: ClipScores) -> None:
        kept.append(record)
        record["scores"] = f"{len(kept) - 1:04d}"
        save_scores(out, record["scores"], scored, labels, catalogue)

    kept: list[dict[str, Any]] = []
    asked = FrozenSettings(probes=study.scoring.probes, baselines=arm == study.grid.reference, seed=seed)
    with world(settings.device, settings.threads) as here:
        model = AudioModel.load(study.run(arm, seed) / run_dir.MODEL, here.device)
        found = evaluate_frozen(model, catalogue, asked, world=here, keep=keep)
    if found is not None:
        facts = {"task": found.task, "kind": found.kind, "classes": list(found.classes)}
        atomic.write_json(out / run_dir.RESULTS, facts | {"results": found.records})


def _tune(study: Study, table: str, share: float, seed: int, out: Path, given: dict[str, Any]) -> None:
    """Fine-tune a classifier with a share of a table's labels and score it, on its splits or over its folds."""
    base = next(iter(study.arms.values()))
    own = {name: getattr(base, name) for name in ("device", "threads", "workers", "precision", "bad_files")}
    own |= {"data": study.table_path(table), "out": str(out), "seed": seed, "epochs": study.scoring.epochs_for(share)}
    # The last weights are scored: with few labels there is nothing to choose an epoch by.
    own |= {"sampling": {"share": share}, "validation": {"every": 0}, **given}
    out.parent.mkdir(parents=True, exist_ok=True)
    result = cross_validation.run(presets.build(FinetuneSettings, None, None, own), resume="auto")
    if not result.finished:
        raise _StoppedError(result.stopped_by)


def _fresh(study: Study, rate: float) -> dict[str, Any]:
    """Return settings of fine-tuning that begin with fresh weights of the reference's encoder."""
    settings: PretrainSettings = study.arms[study.grid.reference]
    groups = {name: getattr(settings, name).model_dump() for name in presets.MODEL_GROUPS}
    return {"model": "none", "optim": SCRATCH | {"lr": rate}, **groups}


def table_groups(catalogue: Catalogue) -> dict[str, str] | None:
    """Return the group of each clip by its id; None where the table has no groups."""
    if catalogue.column("group") is None:
        return None
    names = catalogue.texts("group")
    ids = catalogue.ids()
    return {name: str(group) if group is not None else f"clip {name}" for name, group in zip(ids, names, strict=True)}
