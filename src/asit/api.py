"""The Python entry points: `asit.pretrain` and `asit.finetune`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asit.config import FinetuneSettings, PretrainSettings, presets, yaml
from asit.config.presets import Resume

if TYPE_CHECKING:
    from asit.finetune.cross_validation import CrossValidation
    from asit.finetune.finetune_run import FinetuneResult
    from asit.pretrain.pretrain_run import PretrainResult


def pretrain(
    data: str | Path,
    out: str | Path,
    *,
    model: str | Path = "",
    preset: str | None = None,
    config: str | Path | None = None,
    budget: str | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    **settings: Any,
) -> PretrainResult:
    """Pretrain an encoder on recordings without labels.

    The same as `asit pretrain` on the command line: `asit.pretrain("recordings", "run", epochs=50,
    encoder={"size": "small"})`.

    Args:
        data: folder of recordings, table or catalogue.
        out: the run's folder, new or empty.
        model: to continue from, as for `asit.load`, such as RUN/model; or a file of ImageNet ViT weights.
        preset: "default", "speech", "paper", "official-v2" or "adapt", the default with a model.
        config: YAML file of settings.
        budget: time that the run may take, such as "45m", "8h" or "3d": encoder, batch, epochs and warm-up that are not
            given are chosen for it. Without it and without preset, config and epochs: an hour on a CPU, a day on a GPU.
        resume: resume the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        settings: any of `PretrainSettings`; groups as mappings.

    Returns:
        PretrainResult: `.model` is the folder for `asit.load`.

    Raises:
        AsitError: the settings, the data or the folder do not fit; its text says how to fix it.
    """
    from asit.pretrain import pretrain_run as runs
    from asit.tools import time_budget

    began = time.perf_counter()
    given = {**settings, "data": str(data), "model": str(model)}
    chosen = presets.build_for(PretrainSettings, out, preset, config, given, resume=resume)
    names = {name for name, _ in yaml.flat(settings)} | ({"preset"} if preset else set())
    chosen = time_budget.apply(chosen, budget, names, config=config, resume=resume, overwrite=overwrite, began=began)
    return runs.pretrain(chosen, resume=resume, overwrite=overwrite)


def finetune(
    data: str | Path,
    out: str | Path,
    model: str | Path,
    *,
    task: str | None = None,
    config: str | Path | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneResult | CrossValidation:
    """Fine-tune and score a classifier on labelled recordings.

    The same as `asit finetune` on the command line: `asit.finetune("table.csv", "run", "pretrained/model", epochs=30,
    sides={"hold_out": 0.2})`.

    Args:
        data: catalogue with labels, labelled table, or folder with one sub-folder a class.
        out: the run's folder, new or empty.
        model: as for `asit.load`, such as RUN/model; a file of ImageNet ViT weights; or "none".
        task: the recipe; "any" if not given.
        config: YAML file of settings.
        resume: resume the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        settings: any of `FinetuneSettings`; groups as mappings.

    Returns:
        FinetuneResult: `.model` is the folder for `asit.load`, `.results` the scores; with `sides={"fold": "all"}` a
        CrossValidation over all folds.

    Raises:
        AsitError: the settings, the data or the folder do not fit; its text says how to fix it.
    """
    from asit.finetune import cross_validation

    given = {**settings, "data": str(data), "model": str(model)}
    chosen = presets.build_for(FinetuneSettings, out, task, config, given, resume=resume)
    return cross_validation.run(chosen, resume=resume, overwrite=overwrite)
