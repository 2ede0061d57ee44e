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
from asit.report import mistakes, run_sections
from asit.report.audio_player import Recordings
from asit.report.charts import chart
from asit.report.class_results import class_table, confidence, confusion
from asit.report.run_reader import RunFolder
from asit.report.score_records import SHARES, ResultRecord, Scores, chief, label_share, plain, run_records, shown, start
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
        worst = about + mistakes.multi_label(held, classes, per_class, recordings) if held else about + missing
    else:
        known = held is not None or record.content.get("confusion") is not None
        counts = about + confusion(confusion_matrix(record, classes, held), classes) if known else missing
        parts.append(Section("Confusions", counts))
        worst = about + mistakes.single_label(wrong, recordings)
    trust = about + confidence(held, not record.multi) if held else missing
    return [*parts, Section("Mistakes to listen to", worst), Section("Confidence", trust)]


def _not_scored(run: RunFolder) -> Markup:
    made = part("missing", "Not scored yet: results.json is written at the end of the run.")
    for line in run.validation[-1:]:
        made += part("text", "The last line of validation:") + part("table", (), list(flat(line)), "pairs")
    return made
