"""Make the page of a fine-tuning run: scores, curves, classes, confusions, mistakes to listen to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from asit.config import FinetuneSettings
from asit.config.yaml import flat
from asit.errors import AsitError
from asit.report import mistakes
from asit.report.audio_player import Recordings
from asit.report.charts import Chart
from asit.report.class_results import class_table, confidence, confusion
from asit.report.run_reader import Line, RunFolder
from asit.report.run_sections import Series, curves, data, environment, events, progress, settings
from asit.report.score_records import (
    SHARES,
    Scores,
    chief,
    headline,
    label_share,
    metric,
    plain,
    run_records,
    scores_path,
    shown,
    start,
)
from asit.report.templates import Section, part

_TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "clips_per_second": "Throughput",
    "data_wait": "Waiting for data",
    "mAP": "mAP",
    "mAUC": "mAUC",
}
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
    found: dict[str, str] = {"task": str(run.results.get("task", run.config.get("task", "")))}
    best = chief(run_records(run))
    if best is not None:
        name = headline(best)
        found[f"{plain(name)}, {best.get('split')}, {best.get('weights')}"] = shown(name, metric(best, name).value)
        found["clips scored"] = f"{best['clips']:,}"
    if classes := run.results.get("classes"):
        found["classes"] = f"{len(classes):,}"
    found["started from"] = start(run)
    clips = run.results.get("train_clips")
    found["labels used"] = label_share(run.config) + (f" ({clips:,} clips)" if isinstance(clips, int) else "")
    return found | progress(run)


def sections(run: RunFolder, recipe: Mapping[str, Any] | None) -> list[Section]:
    """Return the parts of the page in order; `recipe` as `preset` of `asit.report.report`."""
    found = run_records(run)
    best = chief(found)
    return [
        Section("Scores", score_table(found, run.config) if found else _not_scored(run)),
        Section("Learning curves", learning_curves(run)),
        *(_details(run, best) if best is not None else []),
        data(run),
        settings(run, FinetuneSettings, recipe, "task"),
        environment(run),
        events(run),
    ]


def which_weights(record: Mapping[str, Any], config: Mapping[str, Any], step: bool = True) -> str:
    """Return which weights a record is of, in words; with the step they are from, if that is wanted and known."""
    weights, number = str(record.get("weights")), record.get("step")
    at = f" (step {number:,})" if step and isinstance(number, int) else ""
    average = str((config.get("optim") or {}).get("average"))
    averaged = {"ema": ", a moving average", "epochs": ", a mean over the ends of epochs"}.get(average, "")
    named = {"last": "the last weights", "best": "the weights that scored best on validation"}
    return f"{named[weights]}{averaged}{at}" if weights in named else f"{weights}{at}"


def score_table(found: Sequence[Line], config: Mapping[str, Any]) -> Markup:
    """Return a row for each record: split, weights, metrics with their intervals, clips and the hash of their list."""
    names = list(dict.fromkeys(name for record in found for name in record["metrics"]))
    rows = []
    for record in sorted(found, key=lambda r: (str(r.get("split")) != "test", r.get("weights") != "last")):
        cells = [str(record.get("split")), which_weights(record, config)]
        for name in names:
            value = metric(record, name)
            interval = f"{shown(name, value.low)} to {shown(name, value.high)}" if value.known else ""
            cells.append(part("value", shown(name, value.value), interval) if name in record["metrics"] else "")
        rows.append([*cells, f"{record['clips']:,}", part("code", record.get("list", ""))])
    head = ["split", "weights", *map(plain, names), "clips", "list of clips"]
    units = {str((record.get("bootstrap") or {}).get("unit", "clip")) for record in found}
    skipped = {str(name) for record in found for name in record.get("skipped_classes") or ()}
    unreadable = {f"{r['unreadable']} of {r.get('split')}" for r in found if r.get("unreadable")}
    return part("table", head, rows, "scores") + part("score_notes", sorted(units), sorted(skipped), sorted(unreadable))


def learning_curves(run: RunFolder) -> Markup:
    """Return a chart for each quantity, with training and validation as its series."""
    if not run.train:
        return part("missing", "No training step has been recorded yet.")
    drawn: dict[str, dict[str, Series]] = {}
    for split, lines in (("training", run.train), ("validation", run.validation)):
        for name, points in curves(lines).items():
            drawn.setdefault(name.removeprefix("train_"), {})[split] = points
    first = ["loss", *(name for name in drawn if "validation" in drawn[name]), "lr"]
    names = [name for name in dict.fromkeys([*first, *drawn]) if name in drawn and name not in _LAST]
    charts = []
    for name in [*names, *(name for name in _LAST if name in drawn)]:
        note = _NOTES.get(name, f"on {next(iter(drawn[name]))} clips")
        if len(drawn[name]) > 1:
            note = "training: with mixup, smoothing and masks where they are on, so it may be the worse of the two"
        text = plain(name)
        title = _TITLES.get(name, text[:1].upper() + text[1:])
        percent = name in SHARES or name == "data_wait"
        charts.append(Chart(title, note, drawn[name], percent=percent, resumes=run.resumes).html())
    return part("charts", charts, curves=True)


def confusion_matrix(
    record: Mapping[str, Any], held: Scores | None, classes: Sequence[str]
) -> NDArray[np.int64] | None:
    """Return a record's confusion matrix (C, C): as recorded, else from the scores; None without either."""
    if record.get("confusion") is not None:
        return np.array(record["confusion"], dtype=np.int64).reshape(len(classes), len(classes))
    if held is None:
        return None
    count = held.scores.shape[1]
    known = held.truth >= 0
    flat_index = held.truth[known] * count + held.scores.argmax(1)[known]
    return np.bincount(flat_index, minlength=count * count).reshape(count, count)


def _details(run: RunFolder, record: Line) -> list[Section]:
    """Classes, confusions, mistakes and confidence of one record."""
    about = part("text", f"On {record.get('split')}, with {which_weights(record, run.config)}.")
    classes = [str(name) for name in run.results.get("classes", [])]
    per_class = record.get("per_class") or []
    recordings = Recordings(run.folder)
    held, missing = None, Markup()
    try:
        held = Scores.read(scores_path(run.folder, record))
    except AsitError as error:
        missing = part("missing", error.found)
    parts = [Section("Classes", about + class_table(per_class))]
    single = record.get("kind") != "multi"
    if single:
        counts = confusion_matrix(record, held, classes)
        parts.append(Section("Confusions", missing if counts is None else about + confusion(counts, classes)))
        wrong = mistakes.single_label(record.get("mistakes") or [], recordings)
    else:
        wrong = mistakes.multi_label(held, classes, per_class, recordings) if held else missing
    return [
        *parts,
        Section("Mistakes to listen to", about + wrong),
        Section("Confidence", about + confidence(held, single) if held else missing),
    ]


def _not_scored(run: RunFolder) -> Markup:
    made = part("missing", "Not scored yet: results.json is written at the end of the run.")
    for line in run.validation[-1:]:
        made += part("text", "The last line of validation:") + part("table", (), list(flat(line)), "pairs")
    return made
