"""One table of finished runs: scores with intervals, seeds together, and paired differences on the same clips."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, ConfigError
from asit.io import parsing
from asit.report.finetune_page import label_share, start
from asit.report.html import flat
from asit.report.run_reader import Line, Run
from asit.report.score_records import Fold, Scores, Value, folds, headline, metric, records, scores_path, spread

_APART = frozenset(
    {"out", "seed", "label_seed", "stop_after", "threads", "workers", "score_batch", "front_end.mean", "front_end.std"}
)
"""Settings in which runs that differ by their seed alone may differ: the place, the processes, and the mean and std,
which may be measured on clips that the seed draws. What is recorded (records.*) counts as little."""
_OWN = {"task": "task", "model": "start", "labels": "labels", "seed": "seed"}
"""Entries of a record, and the fields of `Row` that they settle."""


@dataclass(frozen=True)
class Row:
    """One score: of one model on one split.

    Attributes:
        run: the run's folder or file, as given.
        start: what the weights were before training.
        task, split, weights, metric: what was scored, and by what.
        labels: share of the training labels; "" where unknown.
        epochs: of training; None where unknown.
        value: the metric; over folds their mean, and no interval.
        deviation: standard deviation over folds; NaN without folds.
        folds: number of folds; 0: no cross-validation.
        clips: clips scored, in all folds.
        list: hash of the list of clips; over folds, of the folds' hashes.
        seed: the run's; None where unknown.
        group: equal for rows that differ by their seed alone.
        state: "" for a finished run, else why there is no score.
        scores: files of the clips' scores, one a fold.
        unit: what the interval was drawn over: clip or group.
    """

    run: str
    start: str = ""
    task: str = ""
    split: str = ""
    weights: str = ""
    metric: str = ""
    labels: str = ""
    epochs: int | None = None
    value: Value = field(default_factory=lambda: Value(math.nan))
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
class Seeds:
    """Runs that differ by their seed alone: mean and standard deviation (n - 1) over them."""

    row: Row
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return spread(self.values)[0]

    @property
    def deviation(self) -> float:
        """Over seeds."""
        return spread(self.values)[1]


@dataclass(frozen=True)
class Difference:
    """A score minus the first run's on the same clips, with the 95 % interval of a paired bootstrap."""

    run: str
    weights: str
    against: str
    metric: str
    value: Value
    clips: int


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `asit.report.comparison_table` writes it.

    Attributes:
        rows: one for each score, in the order of the runs given.
        seeds: groups of two seeds or more.
        differences: to the first run.
        warnings: what stands in the way of a comparison.
    """

    rows: list[Row]
    seeds: list[Seeds]
    differences: list[Difference]
    warnings: list[str]


def compare(runs: Sequence[Path | str], *, split: str = "auto", seed: int = 0) -> Comparison:
    """Scores of several runs side by side.

    Args:
        runs: folders of fine-tuning runs or cross-validations, and JSON files of result records.
        split: which split; auto: test where a run has it, else all it has.
        seed: of the paired bootstrap.

    Raises:
        AsitError: a pretraining run, a path that is no run, results that cannot be read, or a split that no run has.
    """
    rows, again = [], "restore the results as they were written, or score the model again"
    for run in runs:
        with parsing.as_written(run, again):
            rows += _rows(Path(run), split)
    if split != "auto" and not any(row.split for row in rows):
        raise AsitError(
            f"no run has a score on the split {split}", "a split that was scored", "leave out --split to see which"
        )
    with parsing.as_written(", ".join(map(str, runs)), again):
        differences, warnings = _differences(rows, seed)
        return Comparison(rows, _seeds(rows), differences, [*_lists(rows), *warnings])


def _rows(path: Path, split: str) -> list[Row]:
    if path.is_file():
        return _file_rows(path, split)
    run = Run.read(path)
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
        found = records(run.results, path / "results.json")
        if not found:
            return [Row(str(path), **known, state=f"not finished. {run.verdict[1]}")]
        return [_row(path, record, known, _group(run, record)) for record in _wanted(found, split)]
    held = folds(run)
    todo = [fold.name for fold in held if not fold.records]
    if todo or not run.results.get("folds"):
        state = f"not finished: {len(held) - len(todo)} folds scored, still to do: {', '.join(todo) or 'the summary'}"
        return [Row(str(path), **known, state=state)]
    return [
        _fold_row(path, held, record, known, _group(run, record))
        for record in _wanted([record for fold in held for record in fold.records], split, once=True)
    ]


def _file_rows(path: Path, split: str) -> list[Row]:
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
        # a file may hold the same probe with labels drawn by several seeds
        drawn = [str(path), *(record.get(name) for name in ("split", "weights", "labels", "list"))]
        rows.append(_row(path, record, known, json.dumps(drawn)))
    return rows


def _wanted(found: Sequence[Line], split: str, once: bool = False) -> list[Line]:
    """The records of a split; once: one for each split and weights, such as the first fold's."""
    if split == "auto":
        tests = [record for record in found if record.get("split") == "test"]
        found = tests or found
    else:
        found = [record for record in found if record.get("split") == split]
    if not once:
        return list(found)
    return list({(record.get("split"), record.get("weights")): record for record in reversed(found)}.values())[::-1]


def _row(path: Path, record: Line, known: Mapping[str, Any], group: str) -> Row:
    name = headline(record)
    bootstrap = record.get("bootstrap") or {}
    own = {field: record[name] for name, field in _OWN.items() if record.get(name) not in (None, "")}
    return Row(
        str(path),
        split=str(record.get("split", "")),
        weights=str(record.get("weights", "")),
        metric=name,
        value=metric(record, name),
        clips=int(record.get("clips", 0)),
        list=str(record.get("list", "")),
        group=group,
        scores=(scores_path(path, record),) if path.is_dir() else (),
        unit=str(bootstrap.get("unit", "clip")),
        **{**known, **own},
    )


def _fold_row(path: Path, held: Sequence[Fold], like: Line, known: Mapping[str, Any], group: str) -> Row:
    """The folds' mean of the split and weights of a record."""
    key = (like.get("split"), like.get("weights"))
    found = [(f, r) for f in held for r in f.records if (r.get("split"), r.get("weights")) == key]
    name = headline(like)
    mean, deviation = spread([metric(record, name).value for _, record in found])
    lists = " ".join(str(record.get("list", "")) for _, record in found)
    return Row(
        str(path),
        split=str(key[0]),
        weights=str(key[1]),
        metric=name,
        value=Value(mean),
        deviation=deviation,
        folds=len(found),
        clips=sum(int(record.get("clips", 0)) for _, record in found),
        list=hashlib.sha256(lists.encode()).hexdigest()[:16],
        group=group,
        scores=tuple(scores_path(fold.folder, record) for fold, record in found),
        unit=str((like.get("bootstrap") or {}).get("unit", "clip")),
        **known,
    )


def _group(run: Run, record: Line) -> str:
    """Settings without the seed, and which score; the same for runs that differ by their seed alone."""
    kept = {n: v for n, v in flat(run.config).items() if n not in _APART and not n.startswith("records.")}
    told = [kept, record.get("split"), record.get("weights"), record.get("list")]
    return json.dumps(told, sort_keys=True, default=str)


def _seeds(rows: Sequence[Row]) -> list[Seeds]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.group and row.seed is not None:
            groups.setdefault(row.group, []).append(row)
    return [
        Seeds(group[0], tuple(row.value.value for row in group))
        for group in groups.values()
        if len({row.seed for row in group}) == len(group) > 1
    ]


def _lists(rows: Sequence[Row]) -> list[str]:
    """A warning for each task and split that was not scored on one list of clips."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
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


def _differences(rows: Sequence[Row], seed: int) -> tuple[list[Difference], list[str]]:
    """Each later score minus the first run's with the same split, clips and, where there is one, weights."""
    made: list[Difference] = []
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


def _difference(row: Row, base: Row, seed: int) -> Difference:
    from asit.evaluate.metrics import paired_difference  # brings torch along

    for one in (row, base):
        if not one.scores:
            raise AsitError(f"{one.run} keeps no scores of single clips")
    ours, theirs = _joined(row.scores), _joined(base.scores)
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
        groups=_groups(row, ours.ids[order]) if row.unit == "group" else None,
    )
    low, high = found["interval"] or (math.nan, math.nan)
    value = Value(float(found["difference"]), low, high)
    return Difference(row.run, row.weights, base.run, row.metric, value, len(ours.ids))


def _joined(paths: Sequence[Path]) -> Scores:
    """Scores of all folds as one."""
    held = [Scores.read(path) for path in paths]
    if len({scores.scores.shape[1] for scores in held}) > 1:
        raise AsitError("the folds have different numbers of classes")
    ends = np.concatenate([np.diff(scores.indptr) for scores in held])
    return Scores(
        np.concatenate([scores.ids for scores in held]),
        np.concatenate([scores.scores for scores in held]),
        np.concatenate([[0], np.cumsum(ends)]),
        np.concatenate([scores.indices for scores in held]),
        np.concatenate([scores.weights for scores in held]),
    )


def _groups(row: Row, ids: NDArray[np.str_]) -> NDArray[np.object_]:
    """The group of each clip, from the catalogues of the run."""
    known: dict[str, Any] = {}
    for path in row.scores:
        catalogue = Catalogue.read(path.parents[1] / "catalogue.jsonl", look=False)
        known |= dict(zip(catalogue.ids(), catalogue.groups, strict=True))
    return np.array([known.get(name) for name in ids.tolist()], dtype=object)
