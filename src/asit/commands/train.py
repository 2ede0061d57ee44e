"""The verbs pretrain and finetune."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator
from typing import Any

from asit.config import FinetuneSettings, PretrainSettings, Settings
from asit.errors import ConfigError
from asit.terminal.options import flags_of, model_or_included, parse_run


class RunOptions(Settings):
    """How to run, beside the settings of the run."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags override it."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint."""
    auto_resume: bool = False
    """Resume the run in --out, or start one where there is none: for jobs that a scheduler may restart."""
    overwrite: bool = False
    """Delete the run in --out and start from scratch."""
    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


class PretrainOptions(PretrainSettings, RunOptions):
    """Every setting of the run, and how to run it."""

    budget: str | None = None
    """Time that the run may take, such as 45m, 8h or 3d: encoder, batch, epochs and warm-up that are not given are
    chosen for it. Without it and without --preset, --config and --epochs: 1h on a CPU, 1d on a GPU."""


class FinetuneOptions(FinetuneSettings, RunOptions):
    """Every setting of the run, and how to run it."""


def pretrain(prog: str, summary: str, given: list[str]) -> int:
    began = time.perf_counter()
    settings, options = parse_run(PretrainSettings, PretrainOptions, prog, summary, given)
    how = _how(options)
    from asit.tools import time_budget

    named = flags_of(given)
    settings = time_budget.apply(settings, options.budget, named, config=options.config, began=began, **how)
    if options.dry_run:
        return _dry_run(settings)
    from asit.pretrain import pretrain_run

    result = pretrain_run.pretrain(settings, **how)
    if not _main():
        return _status(result)
    print(f"{result.step} of {result.total} steps, {result.clips_per_second:.1f} clips/s; run folder: {result.out}")
    if not result.finished:
        _print_resume(settings, result)
        if result.stopped_by:
            return _status(result)
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    print(f'python: import asit; model = asit.load("{result.model}"); model.embed("clip.wav").clip')
    return 0


def finetune(prog: str, summary: str, given: list[str]) -> int:
    settings, options = parse_run(FinetuneSettings, FinetuneOptions, prog, summary, given)
    how = _how(options)
    if not settings.model:
        settings = settings.changed({"model": model_or_included(None)})
    if options.dry_run:
        return _dry_run(settings)
    from asit.evaluate.result_records import summary_line
    from asit.finetune import cross_validation
    from asit.finetune.finetune_run import FinetuneResult

    result = cross_validation.run(settings, **how)
    if not _main():
        return _status(result)
    if not result.finished:
        _print_resume(settings, result)
        return _status(result)
    if isinstance(result, FinetuneResult):
        for record in result.results:
            print(summary_line(record, first_metric=True))
        print(f"model:  {result.model}")
    else:
        for name, held in result.summary.items():
            print(f"{name}: mean {held['mean']:.4f}, std {held['std']:.4f} over {len(held['values'])} folds")
        for fold, classes in result.unseen.items():
            print(f"fold {fold} has no training clips of {', '.join(classes)}: scored without clips of these")
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    return 0


def _how(options: RunOptions) -> dict[str, Any]:
    """Return `resume` (True, False or "auto") and `overwrite`, as the functions that run take them."""
    if options.auto_resume and (options.resume or options.overwrite):
        other = "--resume" if options.resume else "--overwrite"
        raise ConfigError(f"--auto-resume and {other} were both given", "one of the two", "choose one")
    return {"resume": "auto" if options.auto_resume else options.resume, "overwrite": options.overwrite}


def _dry_run(settings: PretrainSettings | FinetuneSettings) -> int:
    print("\n".join(_dry_run_lines(settings)))
    return 0


def _dry_run_lines(settings: PretrainSettings | FinetuneSettings) -> Iterator[str]:
    """Resolve and measure a run, and yield the lines that say what was found."""
    from asit.progress import duration
    from asit.tools import run_estimate

    found = run_estimate.dry_run(settings)
    yield found.settings
    yield from (f"{name}: {shape}" for name, shape in found.shapes.items())
    how = "from two smaller sizes measured" if found.extrapolated else "measured"
    for name, size in found.memory_gb.items():
        yield f"peak memory of a process, {name}: {size:.1f} GB ({how})"
        if size > found.machine_gb.get(name, size):
            there = found.machine_gb[name]
            yield f"warning: that is more than the {there:.1f} GB there are; raise accumulate, or lower batch_size"
    yield f"a step: {found.seconds_per_step:.2f} s, {found.clips_per_second:.1f} clips/s ({how})"
    yield f"loading: {1 / found.seconds_per_clip:.0f} clips/s in one process, the first time (measured)"
    scores = "" if isinstance(settings, PretrainSettings) else ", without scoring"
    yield f"the whole run: {duration(found.total_seconds)} at that rate{scores}; nothing was written"


def _main() -> bool:
    """Return whether this process prints results: rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _print_resume(settings: PretrainSettings | FinetuneSettings, result: Any) -> None:
    print(f"resume: {settings.VERB} --out {shlex.quote(str(result.out))} --resume")


def _status(result: Any) -> int:
    """Return the exit status that shells give to a process ended by a signal, if one stopped the run; else 0."""
    return 0 if result.stopped_by is None else 128 + signal.Signals[result.stopped_by]
