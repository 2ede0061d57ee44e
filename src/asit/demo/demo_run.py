"""The whole main job on the embedded data set: build, pretrain, probe against an untrained encoder, one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.config import PretrainSettings, presets
from asit.demo.demo_dataset import build_dataset
from asit.errors import AsitError
from asit.evaluate import quick_probe
from asit.model.audio_model import AudioModel
from asit.pretrain import pretrain_run
from asit.progress import counter
from asit.report import probe_table_html, report
from asit.training import run_dir

PRESET = "speech"
"""Its patches of whole frames suit timbre as well, and a step of it costs little."""
RECIPE: dict[str, Any] = {
    "epochs": 14,
    "batch_size": 32,
    "views": {"local_views": 0, "gain_db": 12.0, "mel_warp": 0.1},
    "optim": {"lr": 8e-3, "teacher_momentum": 0.98},
    "records": {"figure_every": 200, "checkpoint_every": 200, "keep": 1},
}
"""The preset at the size of a laptop's five minutes."""
TOY: dict[str, Any] = {**RECIPE, "epochs": 2}
"""Enough to see that every part works; the encoder has hardly begun to learn."""


@dataclass(frozen=True)
class Walk:
    """What the demo leaves behind, and whether pretraining won."""

    comparison: quick_probe.Comparison
    page: Path
    text: str


def walk(out: Path, *, seed: int = 0, toy: bool = False) -> Walk:
    """Run the demo in a folder; what is whole there already is taken up, so it may be repeated and interrupted.

    Args:
        out: gets data/ and run/.
        seed: of the data and of the run.
        toy: a few steps on few clips.

    Raises:
        AsitError: the demo's bank is not installed, or the pretrained encoder did not win.
    """
    train_clips, test_clips = (128, 64) if toy else (2000, 480)
    making = counter("rendering clips")
    data = build_dataset(
        out / "data",
        seed=seed,
        train_clips=train_clips,
        test_clips=test_clips,
        progress=None if making is None else lambda done, total: making(done, total, 0),
    )
    run = out / "run"
    chosen = presets.build(
        PretrainSettings,
        PRESET,
        None,
        {**(TOY if toy else RECIPE), "data": str(data.train.with_suffix("")), "out": str(run), "seed": seed},
    )
    begun = (run / run_dir.CONFIG).exists()
    result = pretrain_run.pretrain(chosen, resume=begun)
    if not result.finished:
        raise AsitError(
            f"the demo was stopped at step {result.step} of {result.total}",
            remedy="run the same command again: it goes on from there",
        )
    model = AudioModel.load(result.model)
    compared = quick_probe.compare(model, quick_probe.labelled(data.labelled, 1_000_000, seed), seed=seed)
    facts = "".join(f"<li>{fact}</li>" for fact in data.facts)
    table = probe_table_html(
        compared.accuracies(),
        {who: {kind: r.interval for kind, r in row.items()} for who, row in compared.table.items()},
    )
    about = (
        "<p>Linear probes on frozen features: which instrument plays? The pretrained encoder never saw a label; the "
        f"untrained one has the same architecture.</p>{table}<ul>{facts}</ul>"
    )
    page = report(run, out / "report.html", sections=[("Pretrained against untrained", about)])
    return Walk(compared, page, _text(out, result, compared, page, data.facts, toy))


def _text(
    out: Path,
    result: pretrain_run.PretrainResult,
    compared: quick_probe.Comparison,
    page: Path,
    facts: tuple[str, ...],
    toy: bool,
) -> str:
    ours = compared.table["pretrained"][quick_probe.HEADLINE]
    theirs = compared.table[quick_probe.UNTRAINED][quick_probe.HEADLINE]
    won = ours.interval[0] > theirs.interval[1]
    verdict = (
        "toy size: the comparison says nothing yet"
        if toy
        else f"the pretrained encoder {'wins' if won else 'does NOT win'}: {ours.accuracy:.1%} against "
        f"{theirs.accuracy:.1%} ({quick_probe.HEADLINE} features, {ours.clips} test clips)"
    )
    return "\n".join(
        [
            *facts,
            "",
            compared.text(),
            verdict,
            "",
            f"page:    {page}",
            f"data:    {out / 'data'}",
            f"run:     {result.out}",
            f"model:   {result.model}",
            "",
            "Now on your own recordings:",
            "  .venv/bin/asit pretrain --data FOLDER --out RUN --dry-run   what it would take",
            "  .venv/bin/asit pretrain --data FOLDER --out RUN",
            "  .venv/bin/asit report RUN",
            "  .venv/bin/asit probe RUN/model TABLE.csv                    if some clips have labels",
        ]
    )
