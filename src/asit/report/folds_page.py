"""Make the page of a cross-validation: its folds next to each other, with mean and standard deviation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from asit.config import FinetuneSettings
from asit.errors import AsitError
from asit.report.class_results import class_table, confusion, probe_table_html
from asit.report.finetune_page import confusion_matrix, task_facts, which_weights
from asit.report.run_reader import RunFolder
from asit.report.run_sections import settings
from asit.report.score_records import ResultRecord, ScoredFold, chief, folds, plain, shown, spread
from asit.report.templates import Section, part


class ColumnKey(NamedTuple):
    """A column of the table of folds."""

    split: str
    weights: str
    metric: str

    def __str__(self) -> str:
        return f"{plain(self.metric)}, {self.split}, {self.weights}"


def verdict(run: RunFolder) -> tuple[str, str]:
    """Return (state, sentence) over all folds."""
    held = folds(run)
    done = sum(bool(fold.records) for fold in held)
    if run.results.get("folds") and done == len(held):
        return "finished", f"Finished: {done} folds."
    return "unfinished", f"Still running, or cut off: {done} folds are scored, {len(held) - done} begun and not scored."


def facts(run: RunFolder) -> dict[str, str]:
    """Return the short facts at the top."""
    scored = [fold for fold in folds(run) if fold.records]
    found = {"folds scored": f"{len(scored)}"}
    if best := _chief(scored):
        name = best.headline
        same = [record for fold in scored for record in fold.like(best)]
        mean, deviation = spread([record.metric(name).value for record in same])
        both = shown(name, mean) + (f" ± {shown(name, deviation)}" if math.isfinite(deviation) else "")
        found[f"{ColumnKey(best.split, best.weights, name)}: mean ± spread"] = both
        found["clips scored"] = f"{sum(record.clips for record in same):,}"
    return task_facts(run, found) | {"epochs": str(run.config.get("epochs", "?"))}


def sections(run: RunFolder, recipe: Mapping[str, Any] | None, page: Path) -> list[Section]:
    """Return the parts of the page in order.

    Args:
        run: the cross-validation's folder.
        recipe: as `preset` of `asit.report.report`.
        page: path of the page, from which links to the folds' pages are relative.
    """
    held = folds(run)
    scored = [fold for fold in held if fold.records]
    best = _chief(scored)
    bars = _bars(scored, best) if best is not None and len(scored) > 1 else Markup()
    weights = sorted({which_weights(r, run.config, with_step=False) for fold in scored for r in fold.records})
    notes = part("fold_notes", "; ".join(weights))
    return [
        Section("Folds", _table(held, page, links=bool(run.folds)) + notes + bars),
        *(_pooled(run, scored, best) if best is not None else []),
        settings(run, FinetuneSettings, recipe, "task"),
    ]


def _chief(scored: Sequence[ScoredFold]) -> ResultRecord | None:
    return chief(record for fold in scored for record in fold.records)


def _table(held: Sequence[ScoredFold], page: Path, links: bool) -> Markup:
    """A row for each fold, a column for each split, weights and metric; mean and deviation below."""
    found: dict[str, dict[ColumnKey, float]] = {}
    for fold in held:
        named = [(r, name) for r in fold.records for name in r.content["metrics"]]
        found[fold.name] = {ColumnKey(r.split, r.weights, name): r.metric(name).value for r, name in named}
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    rows: list[list[str]] = []
    for fold in held:
        link = Path(os.path.relpath(fold.folder / "report.html", page.parent)).as_posix() if links else ""
        values = found[fold.name]
        clips = next((f"{r.clips:,}" for r in fold.records if r.split == "test"), "")
        cells = [shown(c.metric, values[c]) if c in values else "" for c in columns]
        rows.append([part("fold_name", fold.name, link, bool(fold.records)), *cells, clips])
    spreads = {c: spread([values[c] for values in found.values() if c in values]) for c in columns}
    for which, title in enumerate(("mean", "standard deviation")):
        numbers = [(c.metric, spreads[c][which]) for c in columns]
        bold = [part("value", shown(name, v)) if math.isfinite(v) else "" for name, v in numbers]
        rows.append([part("value", title), *bold, ""])
    return part("table", ["fold", *map(str, columns), "test clips"], rows, "scores")


def _bars(scored: Sequence[ScoredFold], best: ResultRecord) -> Markup:
    column = str(ColumnKey(best.split, best.weights, best.headline))
    values = {f"fold {fold.name}": r.metric(best.headline) for fold in scored for r in fold.like(best)}
    bars = probe_table_html(
        {fold: {column: value.value} for fold, value in values.items() if math.isfinite(value.value)},
        {fold: {column: (value.low, value.high)} for fold, value in values.items() if value.known},
    )
    return part("details", "With 95 % intervals over each fold's clips", Markup(bars), open=True)


def _pooled(run: RunFolder, scored: Sequence[ScoredFold], best: ResultRecord) -> list[Section]:
    """Classes and confusions of all folds together: each clip is tested once."""
    classes = [str(name) for name in run.results.get("classes", [])]
    if not classes or best.multi:
        return []
    total = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for fold in scored:
        for record in fold.like(best):
            try:
                total += confusion_matrix(record, classes)
            except AsitError as error:
                return [Section("All folds together", part("missing", f"Fold {fold.name}: {error.found}"))]
    clips, answers, right = total.sum(1), total.sum(0), np.diag(total)
    rows: list[dict[str, Any]] = [
        {
            "class": name,
            "clips": int(clips[i]),
            "recall": float(right[i] / clips[i]) if clips[i] else None,
            "precision": float(right[i] / answers[i]) if answers[i] else None,
        }
        for i, name in enumerate(classes)
    ]
    done, count = int(right.sum()), int(clips.sum())
    weights = which_weights(best, run.config, with_step=False)
    share = f"{done:,} of {count:,} clips right ({done / max(1, count):.1%})"
    about = f"{len(scored)} folds together, {weights}: {share}."
    return [
        Section("Classes, all folds", part("text", about) + class_table(rows)),
        Section("Confusions, all folds", confusion(total, classes)),
    ]
