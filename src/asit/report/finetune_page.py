"""Make the pages of a fine-tuning run (scores, curves, classes, confusions, mistakes to listen to) and of a
cross-validation, whose folds stand next to each other with mean and standard deviation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from asit.config import FinetuneSettings
from asit.config.yaml import flat
from asit.errors import AsitError
from asit.report import audio_player, run_sections
from asit.report.audio_player import Recordings
from asit.report.charts import chart
from asit.report.class_results import class_table, confidence, confusion, probe_table_html
from asit.report.run_reader import RunFolder
from asit.report.score_records import (
    SHARES,
    ResultRecord,
    ScoredFold,
    Scores,
    chief,
    folds,
    label_share,
    plain,
    run_records,
    shown,
    spread,
    start,
)
from asit.report.templates import Section, part

_TITLES = {"lr": "Learning rate", "clips_per_second": "Throughput", "data_wait": "Waiting for data"}
_NOTES = {
    "lr": "of the head; blocks below have less where layers decay",
    "gradient_norm": "before clipping",
    "clips_per_second": "clips a second in training",
    "data_wait": "share of time without a batch to train on",
}
_LAST = ("gradient_norm", "clips_per_second", "data_wait")
"""Curves that come after all others."""


def facts(run: RunFolder) -> dict[str, str]:
    """Return the short facts at the top."""
    scored = {}
    if best := chief(run_records(run)):
        name = best.headline
        scored = {
            f"{plain(name)}, {best.split}, {best.weights}": shown(name, best.metric(name).value),
            "clips scored": f"{best.clips:,}",
        }
    return task_facts(run, scored) | run_sections.progress(run)


def task_facts(run: RunFolder, scored: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that single runs and cross-validations share, with those of their scores."""
    found = {"task": str(run.results.get("task", run.config.get("task", ""))), **scored}
    if classes := run.results.get("classes"):
        found["classes"] = f"{len(classes):,}"
    clips = run.results.get("train_clips")
    labels = label_share(run.config) + (f" ({clips:,} clips)" if isinstance(clips, int) else "")
    return found | {"started from": start(run), "labels used": labels}


def sections(run: RunFolder, recipe: Mapping[str, Any] | None) -> list[Section]:
    """Return the parts of the page in order; `recipe` as `preset` of `asit.report.report`."""
    found = run_records(run)
    best = chief(found)
    return [
        Section("Scores", score_table(found, run.config) if found else _not_scored(run)),
        Section("Learning curves", learning_curves(run)),
        *(_details(run, best) if best is not None else []),
        run_sections.data(run),
        run_sections.settings(run, FinetuneSettings, recipe, "task"),
        run_sections.environment(run),
        run_sections.events(run),
    ]


def which_weights(record: ResultRecord, config: Mapping[str, Any], with_step: bool = True) -> str:
    """Return which weights a record is of, in words."""
    step = record.content.get("step")
    at = f" (step {step:,})" if with_step and isinstance(step, int) else ""
    average = str((config.get("optim") or {}).get("average"))
    averaged = {"ema": ", a moving average", "epochs": ", a mean over the ends of epochs"}.get(average, "")
    named = {"last": "the last weights", "best": "the weights that scored best on validation"}.get(record.weights)
    return f"{named}{averaged}{at}" if named else f"{record.weights}{at}"


def score_table(found: Sequence[ResultRecord], config: Mapping[str, Any]) -> Markup:
    """Return a row for each record: split, weights, metrics with their intervals, clips and the hash of their list."""
    names = list(dict.fromkeys(name for record in found for name in record.content["metrics"]))
    rows = []
    for record in sorted(found, key=lambda r: (r.split != "test", r.weights != "last")):
        cells = [record.split, which_weights(record, config)]
        for name in names:
            value = record.metric(name)
            interval = f"{shown(name, value.low)} to {shown(name, value.high)}" if value.known else ""
            there = name in record.content["metrics"]
            cells.append(part("value", shown(name, value.value), interval) if there else "")
        rows.append([*cells, f"{record.clips:,}", part("code", record.list)])
    head = ["split", "weights", *map(plain, names), "clips", "list of clips"]
    skipped = {str(name) for record in found for name in record.content.get("skipped_classes") or ()}
    unreadable = {f"{n} of {r.split}" for r in found if (n := r.content.get("unreadable"))}
    notes = part("score_notes", sorted({r.unit for r in found}), sorted(skipped), sorted(unreadable))
    return part("table", head, rows, "scores") + notes


def learning_curves(run: RunFolder) -> Markup:
    """Return a chart for each quantity, with training and validation as its series."""
    if not run.train:
        return part("missing", "No training step has been recorded yet.")
    drawn: dict[str, dict[str, run_sections.Series]] = {}
    for split, lines in (("training", run.train), ("validation", run.validation)):
        for name, points in run_sections.curves(lines).items():
            drawn.setdefault(name.removeprefix("train_"), {})[split] = points
    first = ["loss", *(name for name in drawn if "validation" in drawn[name]), "lr"]
    names = [name for name in dict.fromkeys([*first, *drawn]) if name in drawn and name not in _LAST]
    charts = []
    for name in [*names, *(name for name in _LAST if name in drawn)]:
        note = _NOTES.get(name, f"on {next(iter(drawn[name]))} clips")
        if len(drawn[name]) > 1:
            note = "training: with mixup, smoothing and masks where they are on, so it may be the worse of the two"
        text = plain(name)
        title = _TITLES.get(name, text if name.startswith("mA") else text[:1].upper() + text[1:])
        percent = name in SHARES or name == "data_wait"
        charts.append(chart(title, note, drawn[name], percent=percent, resumes=run.resumes))
    return part("charts", charts, curves=True)


def confusion_matrix(record: ResultRecord, classes: Sequence[str], held: Scores | None = None) -> NDArray[np.int64]:
    """Return a record's confusion matrix (C, C): as recorded, else from the scores, which are read if not given.

    Raises:
        AsitError: there are neither.
    """
    recorded = record.content.get("confusion")
    if recorded is not None:
        return np.array(recorded, dtype=np.int64).reshape(len(classes), len(classes))
    held = held or Scores.read(record.scores)
    count, truth = held.scores.shape[1], held.truth
    known = truth >= 0
    return np.bincount(truth[known] * count + held.scores.argmax(1)[known], minlength=count * count).reshape(
        count, count
    )


def _details(run: RunFolder, record: ResultRecord) -> list[Section]:
    """Classes, confusions, mistakes and confidence of one record."""
    about = part("text", f"On {record.split}, with {which_weights(record, run.config)}.")
    classes = [str(name) for name in run.results.get("classes", [])]
    per_class, wrong = (record.content.get(name) or [] for name in ("per_class", "mistakes"))
    recordings = Recordings(run.folder)
    held, missing = None, Markup()
    try:
        held = Scores.read(record.scores)
    except AsitError as error:
        missing = part("missing", error.found)
    parts = [Section("Classes", about + class_table(per_class))]
    if record.multi:
        worst = about + audio_player.multi_label(held, classes, per_class, recordings) if held else about + missing
    else:
        known = held is not None or record.content.get("confusion") is not None
        counts = about + confusion(confusion_matrix(record, classes, held), classes) if known else missing
        parts.append(Section("Confusions", counts))
        worst = about + audio_player.single_label(wrong, recordings)
    trust = about + confidence(held, not record.multi) if held else missing
    return [*parts, Section("Mistakes to listen to", worst), Section("Confidence", trust)]


def _not_scored(run: RunFolder) -> Markup:
    made = part("missing", "Not scored yet: results.json is written at the end of the run.")
    for line in run.validation[-1:]:
        made += part("text", "The last line of validation:") + part("table", (), list(flat(line)), "pairs")
    return made


class ColumnKey(NamedTuple):
    """A column of the table of folds."""

    split: str
    weights: str
    metric: str

    def __str__(self) -> str:
        return f"{plain(self.metric)}, {self.split}, {self.weights}"


def folds_page(
    run: RunFolder, recipe: Mapping[str, Any] | None, page: Path
) -> tuple[tuple[str, str], dict[str, str], list[Section]]:
    """Return (state, sentence), the short facts at the top and the parts of the page of a cross-validation.

    Args:
        run: the cross-validation's folder.
        recipe: as `preset` of `asit.report.report`.
        page: path of the page, from which links to the folds' pages are relative.
    """
    held = folds(run)
    scored = [fold for fold in held if fold.records]
    best = chief(record for fold in scored for record in fold.records)
    verdict = (
        f"Still running, or cut off: {len(scored)} folds are scored, {len(held) - len(scored)} begun and not scored."
    )
    state = "unfinished", verdict
    if run.results.get("folds") and len(scored) == len(held):
        state = "finished", f"Finished: {len(held)} folds."
    found = {"folds scored": f"{len(scored)}"}
    bars, pooled = Markup(), list[Section]()
    if best is not None:
        name, same = best.headline, [record for fold in scored for record in fold.like(best)]
        mean, deviation = spread([record.metric(name).value for record in same])
        both = shown(name, mean) + (f" ± {shown(name, deviation)}" if math.isfinite(deviation) else "")
        found[f"{ColumnKey(best.split, best.weights, name)}: mean ± spread"] = both
        found["clips scored"] = f"{sum(record.clips for record in same):,}"
        bars = _bars(scored, best) if len(scored) > 1 else bars
        pooled = _pooled(run, scored, best)
    weights = sorted({which_weights(r, run.config, with_step=False) for fold in scored for r in fold.records})
    notes = part("fold_notes", "; ".join(weights))
    sections = [
        Section("Folds", _table(held, page, links=bool(run.folds)) + notes + bars),
        *pooled,
        run_sections.settings(run, FinetuneSettings, recipe, "task"),
    ]
    return state, task_facts(run, found) | {"epochs": str(run.config.get("epochs", "?"))}, sections


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
