"""Run the demo: build its data set, pretrain, probe against other encoders, fine-tune a classifier, write a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asit.config import FinetuneSettings, PretrainSettings, presets
from asit.demo.demo_dataset import build_dataset
from asit.errors import AsitError
from asit.evaluate.feature_readers import UNTRAINED
from asit.evaluate.frozen import HEADLINE, PRETRAINED, accuracies, labelled_clips, linear_probes
from asit.evaluate.result_records import summary_line
from asit.finetune import finetune_run
from asit.interop import loading
from asit.interop.model_registry import INCLUDED
from asit.model.audio_model import AudioModel
from asit.pretrain import pretrain_run
from asit.progress import counter
from asit.report import probe_table_html, report
from asit.training import run_dir
from asit.training.run import RunResult

PRESET = "speech"
"""Its patches span all mel bins, which suits timbre, and its steps are cheap."""
RECIPE: dict[str, Any] = {
    "epochs": 14,
    "batch_size": 32,
    "views": {"local_views": 0, "gain_db": 12.0, "mel_warp": 0.1},
    "optim": {"lr": 8e-3, "teacher_momentum": 0.98},
    "records": {"figure_every": 200, "checkpoint_every": 200, "keep": 1},
}
"""The preset, sized for five minutes on a laptop."""
TOY: dict[str, Any] = {**RECIPE, "epochs": 2}
"""Enough to check that every part works; the encoder learns hardly anything."""

LABELS = 10
"""Labelled clips of each instrument that the classifier is fine-tuned on."""
FEW: dict[str, Any] = {"epochs": 40, "sampling": {"per_class": LABELS}}
"""Fine-tuning of the encoder that is part of asit, for a minute on a laptop."""


def run_demo(out: Path, *, seed: int = 0, toy: bool = False) -> str:
    """Run the demo in a folder and return its report for a terminal; complete parts of an earlier run are reused.

    Args:
        out: gets data/, run/, classifier/ and report.html.
        seed: of the data and of the run.
        toy: a few steps on few clips.

    Raises:
        AsitError: the SoundFont is not installed, or pretraining was stopped.
    """
    train_clips, test_clips = (128, 64) if toy else (2000, 480)
    data, run, show = out / "data", out / "run", counter("rendering clips")
    facts = build_dataset(data, seed=seed, train_clips=train_clips, test_clips=test_clips, progress=show)
    own = {**(TOY if toy else RECIPE), "data": str(data / "train"), "out": str(run), "seed": seed}
    settings = presets.build(PretrainSettings, PRESET, None, own)
    result = pretrain_run.pretrain(settings, resume=(run / run_dir.CONFIG).exists())
    _check_finished(result)
    clips = labelled_clips(data / "labelled.csv", 1_000_000, seed)
    scores = linear_probes(AudioModel.load(result.model), clips, seed=seed, baselines=True)
    included = linear_probes(loading.load(INCLUDED), clips, seed=seed)
    scores.records.extend({**record, "encoder": INCLUDED} for record in included.records)
    tuned = _finetune(out, 1 if toy else FEW["epochs"], seed)
    compared = accuracies(scores)
    values, intervals = (
        {encoder: {kind: found[name] for kind, found in results.items()} for encoder, results in compared.items()}
        for name in ("accuracy", "interval")
    )
    table = probe_table_html(values, intervals, HEADLINE)
    items = "".join(f"<li>{fact}</li>" for fact in facts)
    section = (
        "<p>Linear probes on frozen features: which instrument plays? The pretrained encoder never saw a label; the "
        f"untrained one has the same architecture.</p>{table}<ul>{items}</ul>"
    )
    page = report(run, out / "report.html", sections=[("Pretrained against untrained", section)])
    sentences = "\n".join(facts)
    return f"""{sentences}

{scores.text()}
{"toy size: the comparison is not meaningful" if toy else _verdict(compared)}
{INCLUDED} is part of asit and saw none of these clips; fine-tuned with {LABELS} labels of each instrument:
{summary_line(tuned.results[0], first_metric=True)}

page:    {page}
data:    {data}
run:     {result.out}
model:   {result.model}
classifier, for asit tag: {tuned.model}

Next, on your own recordings:
  .venv/bin/asit pretrain --data FOLDER --out RUN --dry-run   estimate the time
  .venv/bin/asit pretrain --data FOLDER --out RUN
  .venv/bin/asit report RUN
  .venv/bin/asit finetune --data TABLE.csv --out NEW          if some clips have labels"""


def _finetune(out: Path, epochs: int, seed: int) -> finetune_run.FinetuneResult:
    """Fine-tune the encoder that is part of asit with a few labels, or read the scores of an earlier call."""
    own = {**FEW, "epochs": epochs, "data": str(out / "data" / "labelled.csv"), "model": INCLUDED, "seed": seed}
    settings = presets.build(FinetuneSettings, None, None, {**own, "out": str(out / "classifier")})
    result = finetune_run.finetune(settings, resume="auto")
    _check_finished(result)
    return result


def _check_finished(result: RunResult) -> None:
    if not result.finished:
        raise AsitError(
            f"the demo was stopped at step {result.step} of {result.total}",
            remedy="run the same command again: it resumes from there",
        )


def _verdict(compared: dict[str, dict[str, dict[str, Any]]]) -> str:
    pretrained, untrained = (compared[name][HEADLINE] for name in (PRETRAINED, UNTRAINED))
    won = pretrained["interval"][0] > untrained["interval"][1]
    return (
        f"the pretrained encoder {'wins' if won else 'does NOT win'}: {pretrained['accuracy']:.1%} against "
        f"{untrained['accuracy']:.1%} ({HEADLINE} features, {pretrained['clips']} test clips)"
    )
