"""The page of a fine-tuning run: scores, curves, classes, confusions, mistakes to listen to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asit.config import FinetuneSettings
from asit.errors import AsitError
from asit.report import mistakes
from asit.report.calibration import confidence
from asit.report.charts import number
from asit.report.class_table import class_table, confusion
from asit.report.curves import curves
from asit.report.html import Section, flat, table
from asit.report.listen import Recordings
from asit.report.run_reader import Line, Run
from asit.report.score_records import Scores, chief, headline, metric, plain, records, scores_path, shown
from asit.report.sections import data, duration, environment, events, settings


def facts(run: Run) -> dict[str, str]:
    """What is told at the top, in short."""
    told: dict[str, str] = {"task": str(run.results.get("task", run.config.get("task", "")))}
    found = _records(run)
    best = chief(found)
    if best is not None:
        name = headline(best)
        told[f"{plain(name)}, {best.get('split')}, {best.get('weights')}"] = shown(name, metric(best, name).value)
        told["clips scored"] = f"{best['clips']:,}"
    if classes := run.results.get("classes"):
        told["classes"] = f"{len(classes):,}"
    told["started from"] = start(run)
    clips = run.results.get("train_clips")
    told["labels used"] = label_share(run.config) + (f" ({clips:,} clips)" if isinstance(clips, int) else "")
    last = run.train[-1] if run.train else {}
    if last:
        told["epoch"] = f"{last.get('epoch', 0):.4g} of {run.config.get('epochs', '?')}"
        told["step"] = f"{run.step:,}" + (f" of {run.steps:,}" if run.steps else "")
        told["time"] = duration(float(last.get("seconds", 0)))
        told["speed"] = f"{number(float(last.get('clips_per_second', math.nan)))} clips/s"
    return told


def sections(run: Run, recipe: Mapping[str, Any] | None) -> list[Section]:
    """The page's parts, in order; `recipe` as `preset` of `asit.report.report`."""
    found = _records(run)
    best = chief(found)
    parts: list[Section] = [
        ("Scores", score_table(found, run.config) if found else _none(run)),
        ("Learning curves", curves(run)),
    ]
    if best is not None:
        parts += _details(run, best)
    return [
        *parts,
        ("Data", data(run)),
        ("Settings", settings(run, FinetuneSettings, recipe, "recipe", "task")),
        ("Environment", environment(run)),
        ("Events and log", events(run)),
    ]


def start(run: Run) -> str:
    """What the weights were before training."""
    told = run.results.get("model", run.config.get("model"))
    return str(told) if told else "not recorded"


def label_share(config: Mapping[str, Any]) -> str:
    """How many of the training labels were used."""
    sampling = config.get("sampling") or {}
    if sampling.get("per_class"):
        return f"{sampling['per_class']} per class"
    share = sampling.get("share", 1.0)
    return "all" if share == 1 else f"{100 * share:.4g} %"


def which_weights(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Which weights a record is of, plainly."""
    weights, step = str(record.get("weights")), record.get("step")
    at = f" (step {step:,})" if isinstance(step, int) else ""
    way = (config.get("optim") or {}).get("average")
    averaged = {"ema": ", a moving average", "epochs": ", a mean over the ends of epochs"}.get(str(way), "")
    if weights == "last":
        return f"the last weights{averaged}{at}"
    return f"the weights that scored best on validation{averaged}{at}" if weights == "best" else f"{weights}{at}"


def score_table(found: Sequence[Line], config: Mapping[str, Any]) -> str:
    """Every record: split, weights, each metric with its interval, clips and their list."""
    names = list(dict.fromkeys(name for record in found for name in record["metrics"]))
    rows = []
    for record in sorted(found, key=lambda r: (str(r.get("split")) != "test", r.get("weights") != "last")):
        cells = [f"<td>{escape(str(record.get('split')))}</td><td>{escape(which_weights(record, config))}</td>"]
        for name in names:
            value = metric(record, name)
            span = f" <small>{shown(name, value.low)} to {shown(name, value.high)}</small>" if value.known else ""
            cells.append(f"<td>{f'<b>{shown(name, value.value)}</b>{span}' if name in record['metrics'] else ''}</td>")
        cells.append(f"<td>{record['clips']:,}</td><td><code>{escape(str(record.get('list', '')))}</code></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(
        f'<th scope="col">{escape(plain(n))}</th>' for n in ("split", "weights", *names, "clips", "list of clips")
    )
    skipped = sorted({str(name) for record in found for name in record.get("skipped_classes") or ()})
    without = (
        f"<p>{len(skipped)} classes have no clip in some split and are left out of its means: "
        f"{escape(', '.join(skipped[:12]))}{' …' if len(skipped) > 12 else ''}.</p>"
        if skipped
        else ""
    )
    lost = {f"{r['unreadable']} of {r.get('split')}" for r in found if r.get("unreadable")}
    without += (
        f"<p>Clips that could not be read, and are not scored: {escape(', '.join(sorted(lost)))}.</p>" if lost else ""
    )
    unit = {str((record.get("bootstrap") or {}).get("unit", "clip")) for record in found}
    return (
        f'<div class="scroll"><table class="scores"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f"</table></div><p><small>In small print: 95 % bootstrap intervals over the {' and '.join(sorted(unit))}s "
        "scored; they do not tell how much another seed would change. Scores can be compared where the list of clips "
        f"is the same.</small></p>{without}"
    )


def matrix(record: Mapping[str, Any], held: Scores | None, classes: Sequence[str]) -> NDArray[np.int64] | None:
    """The confusion matrix (C, C) of a record, from its scores where there are too many classes to record it."""
    if record.get("confusion") is not None:
        return np.array(record["confusion"], dtype=np.int64).reshape(len(classes), len(classes))
    if held is None:
        return None
    count = held.scores.shape[1]
    known = held.truth >= 0
    flat = held.truth[known] * count + held.scores.argmax(1)[known]
    return np.bincount(flat, minlength=count * count).reshape(count, count)


def _details(run: Run, record: Line) -> list[Section]:
    """Classes, confusions, mistakes and confidence of one record."""
    about = f"<p>On {escape(str(record.get('split')))}, with {escape(which_weights(record, run.config))}.</p>"
    classes = [str(name) for name in run.results.get("classes", [])]
    single = record.get("kind") != "multi"
    held, trouble = _scores(run, record)
    missing = f'<p class="missing">{escape(trouble)}</p>'
    recordings = Recordings(run.folder)
    parts: list[Section] = [("Classes", about + class_table(record.get("per_class") or []))]
    if single:
        counts = matrix(record, held, classes)
        parts.append(("Confusions", missing if counts is None else about + confusion(counts, classes)))
        parts.append(("Mistakes to listen to", about + mistakes.single_label(record.get("mistakes") or [], recordings)))
    else:
        worst = mistakes.multi_label(held, classes, record.get("per_class") or [], recordings) if held else missing
        parts.append(("Mistakes to listen to", about + worst))
    parts.append(("Confidence", about + confidence(held, single) if held else missing))
    return parts


def _scores(run: Run, record: Line) -> tuple[Scores | None, str]:
    try:
        return Scores.read(scores_path(run.folder, record)), ""
    except AsitError as error:
        return None, error.found


def _records(run: Run) -> list[Line]:
    return records(run.results, run.folder / "results.json")


def _none(run: Run) -> str:
    lines = run.validation[-1:]
    last = table([], flat(lines[0]).items(), "pairs") if lines else ""
    return '<p class="missing">Not scored yet: results.json is written at the end of the run.</p>' + (
        f"<p>The last line of validation:</p>{last}" if last else ""
    )
