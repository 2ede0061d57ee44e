"""The page of a cross-validation: its folds side by side, with mean and spread."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from asit.config import FinetuneSettings
from asit.report.charts import probe_table_html
from asit.report.class_table import class_table, confusion
from asit.report.finetune_page import label_share, matrix, start, which_weights
from asit.report.html import Section
from asit.report.run_reader import Line, Run
from asit.report.score_records import Fold, Scores, chief, folds, headline, metric, plain, scores_path, shown, spread
from asit.report.sections import settings


def verdict(run: Run) -> tuple[str, str]:
    """(state, sentence) over all folds."""
    held = folds(run)
    done = sum(bool(fold.records) for fold in held)
    if run.results.get("folds") and done == len(held):
        return "finished", f"Finished: {done} folds."
    return "unfinished", f"Still running, or cut off: {done} folds are scored, {len(held) - done} begun and not scored."


def facts(run: Run) -> dict[str, str]:
    """What is told at the top, in short."""
    held = [fold for fold in folds(run) if fold.records]
    said = {"task": str(run.results.get("task", run.config.get("task", ""))), "folds scored": f"{len(held)}"}
    best = chief([record for fold in held for record in fold.records])
    if best is not None:
        name = headline(best)
        mean, deviation = spread([metric(r, name).value for r in _same(held, best)])
        said[f"{plain(name)}, {best.get('split')}, {best.get('weights')}: mean ± spread"] = _both(name, mean, deviation)
        said["clips scored"] = f"{sum(r['clips'] for r in _same(held, best)):,}"
    if classes := run.results.get("classes"):
        said["classes"] = f"{len(classes):,}"
    return said | {
        "started from": start(run),
        "labels used": label_share(run.config),
        "epochs": str(run.config.get("epochs", "?")),
    }


def sections(run: Run, recipe: Mapping[str, Any] | None, page: Path, links: bool) -> list[Section]:
    """The page's parts, in order.

    Args:
        run: the cross-validation's folder.
        recipe: as `preset` of `asit.report.report`.
        page: where the page will lie: links to the folds' pages count from there.
        links: whether the folds have pages.
    """
    held = folds(run)
    scored = [fold for fold in held if fold.records]
    parts: list[Section] = [("Folds", _table(held, run.config, page, links))]
    best = chief([record for fold in scored for record in fold.records])
    if best is not None:
        parts += _pooled(run, scored, best)
    return [*parts, ("Settings", settings(run, FinetuneSettings, recipe, "recipe", "task"))]


def _same(held: Sequence[Fold], like: Line) -> list[Line]:
    """The record of each fold with the split and weights of another."""
    key = (like.get("split"), like.get("weights"))
    return [record for fold in held for record in fold.records if (record.get("split"), record.get("weights")) == key]


def _both(name: str, mean: float, deviation: float) -> str:
    return shown(name, mean) + (f" ± {shown(name, deviation)}" if math.isfinite(deviation) else "")


def _table(held: Sequence[Fold], config: Mapping[str, Any], page: Path, links: bool) -> str:
    """A line a fold, a column for each split, weights and metric; mean and spread below."""
    keys: dict[tuple[str, str, str], None] = {}
    for fold in held:
        for record in fold.records:
            keys |= {(str(record.get("split")), str(record.get("weights")), name): None for name in record["metrics"]}
    found = {
        fold.name: {
            (str(r.get("split")), str(r.get("weights")), name): metric(r, name).value
            for r in fold.records
            for name in r["metrics"]
        }
        for fold in held
    }
    body = ""
    for fold in held:
        where = os.path.relpath(fold.folder / "report.html", page.parent)
        name = f'<a href="{escape(Path(where).as_posix())}">{escape(fold.name)}</a>' if links else escape(fold.name)
        cells = "".join(f"<td>{shown(k[2], found[fold.name][k]) if k in found[fold.name] else ''}</td>" for k in keys)
        clips = next((f"{r['clips']:,}" for r in fold.records if r.get("split") == "test"), "")
        note = "" if fold.records else " <small>not finished</small>"
        body += f"<tr><td>{name}{note}</td>{cells}<td>{clips}</td></tr>"
    means = {k: spread([values[k] for values in found.values() if k in values]) for k in keys}
    for title, place in (("mean", 0), ("standard deviation", 1)):
        cells = "".join(
            f"<td><b>{shown(k[2], means[k][place]) if math.isfinite(means[k][place]) else ''}</b></td>" for k in keys
        )
        body += f"<tr><td><b>{title}</b></td>{cells}<td></td></tr>"
    head = "".join(f'<th scope="col">{escape(f"{plain(m)}, {s}, {w}")}</th>' for s, w, m in keys)
    scored = [fold for fold in held if fold.records]
    bars = ""
    best = chief([record for fold in scored for record in fold.records])
    if best is not None and len(scored) > 1:
        name = headline(best)
        values = {f"fold {f.name}": metric(r, name) for f in scored for r in _same([f], best)}
        column = f"{plain(name)}, {best.get('split')}, {best.get('weights')}"
        bars = probe_table_html(
            {fold: {column: value.value} for fold, value in values.items() if math.isfinite(value.value)},
            {fold: {column: (value.low, value.high)} for fold, value in values.items() if value.known},
        )
        bars = f"<details open><summary>With 95 % intervals over each fold's clips</summary>{bars}</details>"
    weights = "; ".join(sorted({which_weights(r | {"step": None}, config) for fold in scored for r in fold.records}))
    return (
        f'<div class="scroll"><table class="scores"><thead><tr><th scope="col">fold</th>{head}<th scope="col">'
        f"test clips</th></tr></thead><tbody>{body}</tbody></table></div><p><small>The spread is the standard "
        f"deviation over folds (n - 1). Scored: {escape(weights) or 'nothing yet'}.</small></p>{bars}"
    )


def _pooled(run: Run, scored: Sequence[Fold], best: Line) -> list[Section]:
    """Classes and confusions of all folds together: each clip is tested once."""
    classes = [str(name) for name in run.results.get("classes", [])]
    if not classes or best.get("kind") == "multi":
        return []
    total = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for fold in scored:
        for record in _same([fold], best):
            path = scores_path(fold.folder, record)
            held = Scores.read(path) if record.get("confusion") is None and path.is_file() else None
            counts = matrix(record, held, classes)
            if counts is None:
                text = f"Fold {fold.name} kept neither a confusion matrix nor the scores of its clips."
                return [("All folds together", f'<p class="missing">{escape(text)}</p>')]
            total += counts
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
    accuracy = f"{int(right.sum()) / max(1, int(clips.sum())):.1%}"
    weights = escape(which_weights(best | {"step": None}, run.config))
    about = (
        f"<p>{len(scored)} folds together, {weights}: {int(right.sum()):,} of {int(clips.sum()):,} clips right "
        f"({accuracy}).</p>"
    )
    return [("Classes, all folds", about + class_table(rows)), ("Confusions, all folds", confusion(total, classes))]
