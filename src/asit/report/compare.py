"""Compare finished runs: scores with intervals, means over seeds, and paired differences on the same clips."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.config.yaml import flat
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, ConfigError
from asit.evaluate.bootstrap import UNKNOWN, Value
from asit.io import parsing
from asit.report.run_reader import RunFolder
from asit.report.score_records import (
    ResultRecord,
    Scores,
    folds,
    label_share,
    records,
    run_records,
    spread,
    start,
)

_FREE = frozenset(
    {"out", "seed", "label_seed", "stop_after", "threads", "workers", "score_batch", "front_end.mean", "front_end.std"}
)
"""Settings, besides records.*, in which runs that differ by their seed alone may differ: paths, processes, and the mean
and std, which may be measured on clips that the seed draws."""
_OWN = {"task": "task", "model": "start", "labels": "labels", "seed": "seed"}
"""Entries of a record, and the fields of `ScoreRow` that they determine."""


@dataclass(frozen=True)
class ScoreRow:
    """One score: of one model on one split.

    Attributes:
        run: the run's folder or file, as given.
        start: the model that the run started from.
        task, split, weights, metric: what was scored, and by which metric.
        labels: share of the training labels; "" if unknown.
        epochs: of training; None if unknown.
        value: the metric with its interval; over folds their mean without an interval.
        deviation: standard deviation over folds; NaN without folds.
        folds: number of folds; 0: no cross-validation.
        clips: clips scored, in all folds.
        list: hash of the list of clips; over folds, of the folds' hashes.
        seed: the run's; None if unknown.
        group: equal for rows that differ by their seed alone.
        state: "" for a finished run, else why there is no score.
        scores: files of the clips' scores, one for each fold.
        unit: what the interval was drawn over: clip or group.
    """

    run: str
    start: str = ""
    task: str = ""
    split: str = ""
    weights: str = ""
    metric: str = ""
    labels: str = ""
    epochs: float | None = None
    value: Value = UNKNOWN
    deviation: float = math.nan
    folds: int = 0
    clips: int = 0
    list: str = ""
    seed: int | None = None
    group: str = ""
    state: str = ""
    scores: tuple[Path, ...] = ()
    unit: str = "clip"


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ by their seed alone: the first one's row, the scores of all, and their mean and deviation."""

    row: ScoreRow
    values: tuple[float, ...]
    mean: float
    deviation: float


@dataclass(frozen=True)
class PairedDifference:
    """A score minus the first run's on the same clips, with the 95 % interval of a paired bootstrap."""

    run: str
    weights: str
    against: str
    metric: str
    value: Value
    clips: int


@dataclass(frozen=True)
class RunComparison:
    """What `compare` found; `asit.report.comparison_table` writes it.

    Attributes:
        rows: one for each score, in the order of the runs given.
        seeds: groups of two seeds or more.
        differences: to the first run.
        warnings: reasons why scores cannot be compared.
    """

    rows: list[ScoreRow]
    seeds: list[SeedGroup]
    differences: list[PairedDifference]
    warnings: list[str]


def compare(runs: Sequence[Path | str], *, split: str = "auto", seed: int = 0) -> RunComparison:
    """Compare the scores of several runs.

    Args:
        runs: folders of fine-tuning runs or cross-validations, and JSON files of result records.
        split: which split; auto: test if a run has it, else all it has.
        seed: of the paired bootstrap.

    Raises:
        AsitError: a pretraining run, a path that is no run, results that cannot be read, or a split that no run has.
    """
    rows, remedy = [], "restore the results as they were written, or score the model again"
    for run in runs:
        with parsing.as_written(run, remedy):
            rows += _rows(Path(run), split)
    if split != "auto" and not any(row.split for row in rows):
        raise AsitError(
            f"no run has a score on the split {split}", "a split that was scored", "leave out --split to see which"
        )
    with parsing.as_written(", ".join(map(str, runs)), remedy):
        differences, warnings = _differences(rows, seed)
        return RunComparison(rows, _seeds(rows), differences, [*_lists(rows), *warnings])


def _rows(path: Path, split: str) -> list[ScoreRow]:
    if path.is_file():
        return _file_rows(path, split)
    run = RunFolder.read(path)
    if run.kind == "pretraining":
        raise AsitError(
            f"{path} is a pretraining run, which has no scores",
            "fine-tuning runs, cross-validations, or the JSON of asit evaluate",
            f"fine-tune its model (asit finetune --model {path}/model ...), probe it (asit probe), or look at it with "
            "asit report",
        )
    known: dict[str, Any] = {
        "start": start(run),
        "task": str(run.results.get("task", run.config.get("task", ""))),
        "labels": label_share(run.config),
        "epochs": run.config.get("epochs"),
        "seed": run.config.get("seed"),
    }
    if run.kind == "fine-tuning":
        found, state = run_records(run), f"not finished. {run.verdict[1]}"
        if not found:
            return [ScoreRow(str(path), **known, state=state)]
        return [_row(path, [record], known, _group(run, record)) for record in _wanted(found, split)]
    held = folds(run)
    todo = [fold.name for fold in held if not fold.records]
    if todo or not run.results.get("folds"):
        state = f"not finished: {len(held) - len(todo)} folds scored, still to do: {', '.join(todo) or 'the summary'}"
        return [ScoreRow(str(path), **known, state=state)]
    groups: dict[tuple[str, str], list[ResultRecord]] = {}
    for record in _wanted([record for fold in held for record in fold.records], split):
        groups.setdefault((record.split, record.weights), []).append(record)
    return [_row(path, same, known, _group(run, same[0]), over_folds=True) for same in groups.values()]


def _file_rows(path: Path, split: str) -> list[ScoreRow]:
    """Rows of a JSON file of records: a list of them, one, or a mapping with "results"."""
    expected = "result records, as asit evaluate --out writes them"
    try:
        held = parsing.from_json(path.read_bytes())
    except (OSError, parsing.Malformed) as error:
        raise ConfigError(f"{path} is no JSON: {error}", expected, "pass that file or a run's folder") from error
    if isinstance(held, list):
        held = {"results": held}
    elif isinstance(held, dict) and "metrics" in held:
        held = {"results": [held]}
    if not isinstance(held, dict) or not held.get("results"):
        raise AsitError(f"{path} holds no result records", expected, "pass that file or a run's folder")
    known = {"start": str(held.get("model", "")), "task": str(held.get("task", ""))}
    rows = []
    for record in _wanted(records(held, path), split):
        # A file may hold the same probe with labels drawn by several seeds.
        group = [str(path), *(record.content.get(name) for name in ("split", "weights", "labels", "list"))]
        rows.append(_row(path, [record], known, json.dumps(group)))
    return rows


def _wanted(found: list[ResultRecord], split: str) -> list[ResultRecord]:
    """The records of a split; auto: of test if there is one."""
    chosen = [record for record in found if record.split == ("test" if split == "auto" else split)]
    return found if split == "auto" and not chosen else chosen


def _row(
    path: Path, found: Sequence[ResultRecord], known: Mapping[str, Any], group: str, over_folds: bool = False
) -> ScoreRow:
    """The row of one record, or of the records of all folds, which have the same split and weights."""
    first, content = found[0], found[0].content
    value, deviation, clip_list = first.metric(first.headline), math.nan, first.list
    if over_folds:
        mean, deviation = spread([record.metric(first.headline).value for record in found])
        value = Value(mean)
        clip_list = hashlib.sha256(" ".join(record.list for record in found).encode()).hexdigest()[:16]
    own = {field: content[name] for name, field in _OWN.items() if content.get(name) not in (None, "")}
    return ScoreRow(
        str(path),
        split=first.split,
        weights=first.weights,
        metric=first.headline,
        value=value,
        deviation=deviation,
        folds=len(found) if over_folds else 0,
        clips=sum(record.clips for record in found),
        list=clip_list,
        group=group,
        scores=tuple(record.scores for record in found if record.scores),
        unit=first.unit,
        **(known if over_folds else {**known, **own}),
    )


def _group(run: RunFolder, record: ResultRecord) -> str:
    """The settings without the seed, and which score this is: equal for runs that differ by their seed alone."""
    kept = {n: v for n, v in flat(run.config) if n not in _FREE and not n.startswith("records.")}
    group = [kept, record.split, record.weights, record.list]
    return json.dumps(group, sort_keys=True, default=str)


def _seeds(rows: Sequence[ScoreRow]) -> list[SeedGroup]:
    groups: dict[str, list[ScoreRow]] = {}
    for row in rows:
        if row.group and row.seed is not None:
            groups.setdefault(row.group, []).append(row)
    chosen = [group for group in groups.values() if len({row.seed for row in group}) == len(group) > 1]
    scores = [tuple(row.value.value for row in group) for group in chosen]
    return [SeedGroup(group[0], values, *spread(values)) for group, values in zip(chosen, scores, strict=True)]


def _lists(rows: Sequence[ScoreRow]) -> list[str]:
    """A warning for each task and split that was scored on different lists of clips."""
    found: dict[tuple[str, str], dict[str, list[ScoreRow]]] = {}
    for row in rows:
        if row.split:
            found.setdefault((row.task, row.split), {}).setdefault(row.list, []).append(row)
    return [
        f"{task}, {split}: {len(lists)} different lists of clips, so scores cannot be compared across them: "
        + "; ".join(
            f"{name or 'not recorded'} ({held[0].clips:,} clips) in {', '.join(dict.fromkeys(r.run for r in held))}"
            for name, held in lists.items()
        )
        for (task, split), lists in found.items()
        if len(lists) > 1
    ]


def _differences(rows: Sequence[ScoreRow], seed: int) -> tuple[list[PairedDifference], list[str]]:
    """Each later score minus the first run's on the same split and clips, of the same weights where it has them."""
    made: list[PairedDifference] = []
    warnings: list[str] = []
    first = [row for row in rows if row.split and row.run == rows[0].run]
    for row in rows:
        same = [f for f in first if (f.split, f.list, f.metric) == (row.split, row.list, row.metric)]
        if row.run == rows[0].run or not same or not row.list or row.metric not in ("accuracy", "mAP"):
            continue
        base = next((f for f in same if f.weights == row.weights), same[0])
        try:
            made.append(_difference(row, base, seed))
        except AsitError as error:
            warnings.append(f"no paired difference between {row.run} and {base.run}: {error.found}")
    return made, list(dict.fromkeys(warnings))


def _difference(row: ScoreRow, base: ScoreRow, seed: int) -> PairedDifference:
    from asit.evaluate.metrics import paired_difference  # imports torch

    for one in (row, base):
        if not one.scores:
            raise AsitError(f"{one.run} keeps no scores of single clips")
    ours, theirs = Scores.joined(row.scores), Scores.joined(base.scores)
    order, other = np.argsort(ours.ids, kind="stable"), np.argsort(theirs.ids, kind="stable")
    if not np.array_equal(ours.ids[order], theirs.ids[other]) or ours.scores.shape != theirs.scores.shape:
        raise AsitError(f"their scores are of {len(ours.ids)} and {len(theirs.ids)} clips that are not the same")
    truth, expected = ours.positives[order], theirs.positives[other]
    if not np.array_equal(truth, expected):
        wrong = int((truth != expected).any(1).sum())
        raise AsitError(f"{wrong} clips have other labels in the one than in the other")
    found = paired_difference(
        ours.scores[order],
        theirs.scores[other],
        truth if row.metric == "mAP" else ours.truth[order],
        "mAP" if row.metric == "mAP" else "accuracy",
        seed=seed,
        groups=_clip_groups(row, ours.ids[order]) if row.unit == "group" else None,
    )
    low, high = found["interval"] or (math.nan, math.nan)
    value = Value(float(found["difference"]), low, high)
    return PairedDifference(
        run=row.run, weights=row.weights, against=base.run, metric=row.metric, value=value, clips=len(ours.ids)
    )


def _clip_groups(row: ScoreRow, ids: NDArray[np.str_]) -> NDArray[np.object_]:
    """The group of each clip, from the catalogues of the run."""
    known: dict[str, Any] = {}
    for path in row.scores:
        catalogue = Catalogue.read(path.parents[1] / "catalogue.jsonl", look=False)
        known |= dict(zip(catalogue.ids(), catalogue.texts("group"), strict=True))
    return np.array([known.get(name) for name in ids.tolist()], dtype=object)
