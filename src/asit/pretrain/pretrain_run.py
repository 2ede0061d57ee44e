"""A pretraining run: from settings to a run's folder."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from asit.config import PretrainSettings, pretrain_settings
from asit.config.presets import Resume
from asit.data.loading.sampler import permutation
from asit.pretrain import continued
from asit.pretrain.pretrain_setup import PretrainSetup, prepare
from asit.progress import duration
from asit.runtime import World
from asit.training import loop, run, run_dir
from asit.training.metrics_log import Records

log = logging.getLogger(__name__)

FIGURE_CLIPS = 5


@dataclass(frozen=True, kw_only=True)
class PretrainResult(run.RunResult):
    """How a call of pretraining ended.

    Attributes:
        clips_per_second: over this call's steps.
    """

    clips_per_second: float


def pretrain(settings: PretrainSettings, *, resume: Resume = False, overwrite: bool = False) -> PretrainResult:
    """Pretrain an encoder and write a run's folder (docs/pretrain.md lists its files).

    Args:
        settings: `data` and `out` are needed.
        resume: resume the run in `out` from its last checkpoint; "auto": where there is one.
        overwrite: delete the run in `out` first.

    Raises:
        AsitError: the settings, the data or the folder do not fit, or training failed.
    """

    with run.launch(settings, pretrain_settings.check, _set_up, resume=resume, overwrite=overwrite) as launched:
        outcome = launched.train(lambda records: _hooks(launched.setup, records))
    return PretrainResult(**launched.result(outcome), clips_per_second=outcome.clips_per_second)


def _set_up(
    settings: PretrainSettings, open_catalogue: run.OpenCatalogue, world: World, restored: bool
) -> PretrainSetup:
    settings, source = continued.start(settings, restored=restored)
    return prepare(settings, open_catalogue(settings.front_end), world, source)


def _hooks(setup: PretrainSetup, records: Records) -> list[tuple[int, loop.Hook]]:
    settings = setup.settings
    # Where the weights are sharded, all processes take part in each hook.
    if not setup.world.main and settings.parallel != "fsdp":
        return []
    hooks: list[tuple[int, loop.Hook]] = []
    if settings.records.figure_every:
        hooks.append((settings.records.figure_every, _figure_hook(setup)))
    if settings.probe.table:
        hooks.append((settings.probe.every, _probe_hook(setup, settings.probe.table, records)))
    return hooks


def _figure_hook(setup: PretrainSetup) -> loop.Hook:
    from asit.training.figures import write_figure  # Matplotlib takes a second to import

    settings = setup.settings
    picked = permutation(settings.seed, 0, len(setup.clips))[:FIGURE_CLIPS]
    # The same clips, cropped and masked the same way, in every figure.
    example = setup.batch_of([setup.clips[0, int(i)] for i in picked])
    names = [Path(name).name for name in example.ids]

    def figure(step: int) -> None:
        views = setup.task.picture(example, setup.precision)
        if setup.world.main:
            arrays = {name: view.numpy() for name, view in views.items()}
            write_figure(setup.out / run_dir.FIGURES, step, **arrays, ids=names, front_end=settings.front_end)

    return figure


def _probe_hook(setup: PretrainSetup, table: str, records: Records) -> loop.Hook:
    from asit.evaluate import frozen

    seed = setup.settings.seed
    clips = frozen.labelled_clips(table, setup.settings.probe.clips, seed)

    def probe(step: int) -> None:
        began = time.perf_counter()
        encoder = setup.model(step)
        if setup.world.main:
            pooling = frozen.PRETRAINING_POOLINGS
            found = frozen.linear_probes(encoder, clips, seed=seed, pooling=pooling)
            entry = frozen.metrics_entry(found)
            records.write("probe", step, entry)
            accuracies = ", ".join(f"{kind} {accuracy:.3f}" for kind, accuracy in entry["features"].items())
            log.info(f"step {step}: probe accuracy: {accuracies} ({duration(time.perf_counter() - began)})")

    return probe
