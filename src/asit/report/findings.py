"""State in words how a run went, and the commands to go on with."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from asit.report.charts import Guide
from asit.report.run_reader import RunFolder
from asit.report.run_sections import Series
from asit.report.score_records import chief, number, plain, run_records, shown

LARGEST_ENTROPY_SHARE = 0.98
"""Share of log K above which the teacher prefers no prototype: its targets teach nothing."""
SMALLEST_SPREAD = 0.1
"""Feature spread below which clips look alike: 1 where directions are uniform, 0 where all are the same (`spread`)."""
LONGEST_WAIT = 0.3
"""Share of time waiting for data above which loading limits the speed."""
_AVERAGED = 0.1
"""Share of the recorded steps, at the start and at the end, whose mean loss is compared."""


class RunFinding(NamedTuple):
    """A sentence about a run; good: nothing to do about it."""

    good: bool
    text: str


def gauge_guide(run: RunFolder, name: str) -> Guide:
    """Return the line and the area of values without collapse that a gauge is read by."""
    heads = run.config.get("heads", {})
    which = "class" if name == "teacher_entropy_class" or heads.get("share_prototypes") else "patch"
    count = heads.get(f"{which}_prototypes")
    if name.startswith("teacher_entropy") and isinstance(count, int):
        largest = math.log(count)
        return Guide(largest, f"log {count:,} = {largest:.2f}", (0.0, LARGEST_ENTROPY_SHARE * largest))
    return Guide(band=(SMALLEST_SPREAD, 1.0)) if name == "feature_spread" else Guide()


def pretraining(run: RunFolder, drawn: Mapping[str, Series]) -> list[RunFinding]:
    """Return what the curves of a pretraining run show: progress, collapse, probe, speed."""
    found = []
    losses = drawn.get("loss", ([], []))[1]
    if len(losses) >= 10:
        count = max(1, round(_AVERAGED * len(losses)))
        first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
        fell = last < first
        found.append(
            RunFinding(fell, f"The loss {'fell' if fell else 'did not fall'}: {number(first)} to {number(last)}.")
        )
    found += _collapse(run, drawn)
    if run.probes:
        first, last = (float(run.probes[i]["accuracy"]) for i in (0, -1))
        since = f", {first:.1%} at step {run.probes[0]['step']:,}" if len(run.probes) > 1 else ""
        found.append(RunFinding(last >= first, f"The probe reads {last:.1%} off the frozen encoder{since}."))
    waits = drawn.get("data_wait", ([], []))[1]
    if waits and (wait := sum(waits) / len(waits)) > LONGEST_WAIT:
        remedy = "raise --workers, or convert the recordings to WAV at the encoder's rate"
        found.append(RunFinding(False, f"Training waited for data {wait:.0%} of the time: {remedy}."))
    return found


def _collapse(run: RunFolder, drawn: Mapping[str, Series]) -> list[RunFinding]:
    signs, measured = [], []
    for which, token in (("class", "class token"), ("patch", "patches")):
        name = f"teacher_entropy_{which}"
        largest, values = gauge_guide(run, name).level, drawn.get(name, ([], []))[1]
        if values and math.isfinite(largest):
            share = values[-1] / largest
            measured.append(f"teacher entropy ({token}) at {share:.0%} of its maximum")
            if share > LARGEST_ENTROPY_SHARE:
                remedy = f"try fewer heads.{which}_prototypes, or a lower losses.teacher_temperature"
                signs.append(f"the teacher has no preference among its prototypes ({token}): {remedy}")
    spreads = drawn.get("feature_spread", ([], []))[1]
    if spreads:
        measured.append(f"feature spread {number(spreads[-1])}")
        if spreads[-1] < SMALLEST_SPREAD:
            signs.append(f"all clips look alike to the encoder (feature spread {number(spreads[-1])}): lower optim.lr")
    if signs:
        return [RunFinding(False, f"Signs of collapse: {'; '.join(signs)}.")]
    return [RunFinding(True, f"No sign of collapse: {', '.join(measured)}.")] if measured else []


def finetuning(run: RunFolder) -> list[RunFinding]:
    """Return the score of a fine-tuning run with its interval, and its weakest class."""
    best = chief(run_records(run))
    if best is None:
        return []
    value = best.metric(best.headline)
    interval = f" (95 % interval {shown(best.headline, value.low)} to {shown(best.headline, value.high)})" * value.known
    name = plain(best.headline)
    found = [
        RunFinding(
            True, f"{name[:1].upper()}{name[1:]} on {best.split}: {shown(best.headline, value.value)}{interval}."
        )
    ]
    rows = [(row, name) for row in best.content.get("per_class") or [] if (name := _measure(row))]
    if len(rows) > 1:
        worst, name = min(rows, key=lambda one: float(one[0][one[1]]))
        about = f"{worst['class']}, {plain(name)} {shown(name, float(worst[name]))} on {worst['clips']:,} clips"
        found.append(RunFinding(True, f"The weakest of {len(rows)} classes: {about}."))
    return found


def _measure(row: Mapping[str, Any]) -> str:
    """The metric of a class: AP, else recall; "" where it has neither."""
    return next((name for name in ("AP", "recall") if row.get(name) is not None), "")


def next_commands(run: RunFolder) -> Sequence[tuple[str, str]]:
    """Return (command, purpose) of what one does after a run in this state."""
    state, folder = run.verdict[0], run.folder
    kind = "pretrain" if run.kind == "pretraining" else "finetune"
    if state == "stopped" or (state == "unfinished" and run.checkpoints):
        about = "resume it" if state == "stopped" else "if it is not running any more: resume it"
        return [(f"asit {kind} --out {_quoted(folder)} --resume", about)]
    if not run.model:
        return []
    model = _quoted(folder / "model")
    if kind == "pretrain":
        return [
            (f"asit evaluate {model} --data TABLE.csv --baselines", "score the frozen encoder, with few labels"),
            (f"asit finetune --model {model} --data TABLE.csv --out FT", "train a classifier"),
            (f"asit index {model} FOLDER --out INDEX", "search recordings by sound"),
        ]
    return [
        (f"asit tag {model} RECORDING", "label recordings, with times"),
        (f"asit serve {model}", "listen and look in the browser"),
        (f"asit export {model} --to onnx --out model.onnx", "use it elsewhere"),
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
