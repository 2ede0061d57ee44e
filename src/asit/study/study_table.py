"""The table of a study: scores with intervals over seeds and clips, and paired differences to the reference arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from asit.errors import ConfigError
from asit.evaluate.bootstrap import UNKNOWN, Value
from asit.evaluate.paired_draws import Draws, fold_draws, over_seeds, paired
from asit.io import parsing
from asit.report.run_reader import RunFolder
from asit.report.score_records import Scores, folds, run_records
from asit.study.study_plan import Study, tuned_part
from asit.study.study_run import cost_file, table_groups
from asit.training import run_dir


class ScoredClips(NamedTuple):
    """The scores of the clips of one test split or fold: fold, metric, and the file."""

    fold: str
    metric: Literal["accuracy", "mAP"]
    file: Path


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """A row of the table.

    Attributes:
        table: what was scored on.
        score: the probe, or fine-tuning.
        system: the arm, or a baseline.
        metric: accuracy or mAP.
        value: mean over seeds of the mean over folds, with its interval.
        difference: to the reference arm with the seeds that both have; NaN for the reference itself.
        seeds, folds, clips: how many there are; clips in all folds.
        minutes: of pretraining, mean over seeds; NaN for a baseline.
        note: why there is no difference, where there should be one.
    """

    table: str
    score: str
    system: str
    metric: str
    value: Value
    difference: Value = UNKNOWN
    seeds: int
    folds: int
    clips: int
    minutes: float = math.nan
    note: str = ""


def rows(study: Study) -> list[StudyRow]:
    """Compute the rows of all finished scores, in the order of arms, then baselines.

    A draw of the bootstrap draws clips (whole groups where the table has groups) in each fold, and seeds; two systems
    have the same draws, so the interval of a difference is that of pairs.

    Raises:
        ConfigError: results that are damaged.
    """
    found: dict[tuple[str, str], dict[str, dict[int, Draws]]] = {}
    metrics: dict[str, str] = {}
    for table in study.tables:
        groups = table_groups(study.catalogue(table))
        for system, seed, score, parts in _scored(study, table):
            of_seed = seed_draws(parts, groups)
            found.setdefault((table, score), {}).setdefault(system, {})[seed] = of_seed
            metrics[table] = parts[0].metric
    minutes = {arm: _minutes(study, arm) for arm in study.arms}
    out: list[StudyRow] = []
    for (table, score), systems in found.items():
        systems = _best_scratch(systems)
        base = systems.get(study.grid.reference, {})
        order = [*(arm for arm in study.arms if arm in systems), *(name for name in systems if name not in study.arms)]
        for system in order:
            own = systems[system]
            first = next(iter(own.values()))
            row = StudyRow(
                table=table,
                score=score,
                system=system,
                metric=metrics[table],
                value=over_seeds(own),
                seeds=len(own),
                folds=first.folds,
                clips=len(first.ids),
                minutes=minutes.get(system, math.nan),
            )
            if system != study.grid.reference:
                difference, note = paired(own, base)
                row = replace(row, difference=difference, note=note)
            out.append(row)
    return out


def seed_draws(parts: Sequence[ScoredClips], groups: Mapping[str, str] | None) -> Draws:
    """Compute the mean over folds and its bootstrap draws."""
    found = []
    for number, part in enumerate(sorted(parts)):
        scores = Scores.read(part.file)
        order = np.argsort(scores.ids, kind="stable")
        names = scores.ids[order].tolist()
        targets = (scores.positives if part.metric == "mAP" else scores.truth)[order]
        units = None if groups is None else [groups[name] for name in names]
        found.append(fold_draws(scores.scores[order], targets, part.metric, names, groups=units, seed=number))
    return Draws.over_folds(found)


def _scored(study: Study, table: str) -> Iterator[tuple[str, int, str, list[ScoredClips]]]:
    """Yield (system, seed, score, parts) of each finished score on a table."""
    for arm in study.arms:
        for seed in _seeds(study.out / "runs", arm):
            place = study.scores(arm, seed, table)
            if (place / run_dir.RESULTS).exists():
                yield from ((*key, parts) for key, parts in _probed(place, arm, seed).items())
            for share in study.scoring.shares:
                tuned = study.scores(arm, seed, tuned_part(table, share))
                if (tuned / run_dir.RESULTS).exists():
                    yield arm, seed, _tuned_name(share), _tuned(tuned)
    for rate in study.scoring.scratch_rates:
        for seed in _seeds(study.out / "scratch", f"lr-{rate:g}"):
            for share in study.scoring.shares:
                tuned = study.scratch(rate, seed, tuned_part(table, share))
                if (tuned / run_dir.RESULTS).exists():
                    yield f"scratch, rate {rate:g}", seed, _tuned_name(share), _tuned(tuned)


def _probed(place: Path, arm: str, seed: int) -> dict[tuple[str, int, str], list[ScoredClips]]:
    """Return the parts of each probe, of the arm and of the baselines that were scored with it."""
    found: dict[tuple[str, int, str], list[ScoredClips]] = {}
    held = parsing.json_object(place / run_dir.RESULTS, ConfigError)
    with parsing.as_written(place / run_dir.RESULTS, f"delete {place} and start the study again: it is scored again"):
        for record in held["results"]:
            system = arm if record["encoder"] == "model" else str(record["encoder"])
            file = place / run_dir.SCORES / f"{record['scores']}.npz"
            part = ScoredClips(str(record["fold"] or ""), _metric(record), file)
            found.setdefault((system, seed, f"{record['probe']} probe"), []).append(part)
    return found


def _tuned(out: Path) -> list[ScoredClips]:
    """Return the parts of a fine-tuning run or of a cross-validation: the last weights on the test clips."""
    run = RunFolder.read(out)
    if run.kind == "fine-tuning":
        named = [("", record) for record in run_records(run)]
    else:
        named = [(fold.name, record) for fold in folds(run) for record in fold.records]
    kept = [(fold, one) for fold, one in named if one.weights == "last" and one.split == "test" and one.scores]
    return [ScoredClips(fold, _metric(one.content), one.scores) for fold, one in kept if one.scores]


def _metric(record: Mapping[str, Any]) -> Literal["accuracy", "mAP"]:
    return "mAP" if record["kind"] == "multi" else "accuracy"


def _tuned_name(share: float) -> str:
    return "fine-tuned, all labels" if share == 1 else f"fine-tuned, {100 * share:g} % of the labels"


def _best_scratch(systems: dict[str, dict[int, Draws]]) -> dict[str, dict[int, Draws]]:
    """Keep of the rates from scratch the one with the best mean test score, which favours scratch."""
    rates = {name: np.mean([one.value for one in own.values()]) for name, own in systems.items() if "scratch," in name}
    best = max(rates, key=lambda name: float(rates[name]), default=None)
    return {name: own for name, own in systems.items() if name not in rates or name == best}


def _seeds(folder: Path, name: str) -> list[int]:
    """Return the seeds that an arm was begun with."""
    start = f"{name}-s"
    found = (path.name.removeprefix(start).split(".")[0] for path in folder.glob("*") if path.name.startswith(start))
    return sorted({int(seed) for seed in found if seed.isdigit()})


def _minutes(study: Study, arm: str) -> float:
    files = [cost_file(study.run(arm, seed)) for seed in _seeds(study.out / "runs", arm)]
    spent = [float(parsing.json_object(file, ConfigError)["seconds"]) / 60 for file in files if file.exists()]
    return float(np.mean(spent)) if spent else math.nan
