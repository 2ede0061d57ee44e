"""Cross-validation: one fine-tuning run for each fold, and their mean and spread."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from asit import config
from asit.data.catalogue import Catalogue
from asit.data.sides import folds
from asit.errors import ConfigError
from asit.runs import folder, network, source
from asit.runs.finetune import FinetuneResult, finetune
from asit.settings import FinetuneSettings
from asit.transfer.metrics import fold_summary

ALL = "all"


@dataclass(frozen=True)
class CrossValidation:
    """How a cross-validation ended.

    Attributes:
        out: its folder; each fold's run is OUT/fold-NAME.
        finished: whether every fold is.
        stopped_by: the signal that stopped it, or None.
        summary: "SPLIT WEIGHTS METRIC" -> mean, std (n - 1) and values over folds.
    """

    out: Path
    finished: bool
    stopped_by: str | None
    summary: dict[str, dict[str, Any]]


def run(
    settings: FinetuneSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stream: TextIO | None = sys.stderr,
) -> FinetuneResult | CrossValidation:
    """Fine-tune once, or with `sides.fold` "all" once for each fold; see `runs.finetune.finetune`."""
    if settings.sides.fold != ALL:
        return finetune(settings, resume=resume, overwrite=overwrite, stream=stream)
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    out = Path(settings.out)
    names = _names(settings, out, resume, overwrite, stream)
    results: list[tuple[str, dict[str, Any]]] = []
    for number, name in enumerate(names, 1):
        place = out / f"fold-{name}"
        if not (resume and (place / folder.RESULTS).is_file()):
            if stream is not None:
                stream.write(f"fold {name}, {number} of {len(names)}\n")
            one = settings.model_copy(deep=True)
            one.out, one.data, one.sides.fold = str(place), str(out / folder.CATALOGUE), name
            begun = resume and (place / folder.CONFIG).is_file()
            ended = finetune(one, resume=begun, stream=stream)
            if not ended.finished:
                return CrossValidation(out, False, ended.stopped_by, {})
        results.append((name, json.loads((place / folder.RESULTS).read_text(encoding="utf-8"))))
    summary = summarise(results)
    if int(os.environ.get("RANK", "0")) == 0:
        first = results[0][1]
        held = {key: first[key] for key in ("task", "kind", "classes", "model")}
        every = [{"fold": name, **result} for name, result in results]
        folder.write_json(out / folder.RESULTS, held | {"folds": every, "summary": summary})
    return CrossValidation(out, True, None, summary)


def summarise(results: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over folds of every metric, and the pooled accuracy over all their clips."""
    values: dict[str, list[float]] = defaultdict(list)
    clips: dict[str, list[int]] = defaultdict(list)
    for _, held in results:
        for record in held["results"]:
            for metric, found in record["metrics"].items():
                if found["value"] is not None:
                    name = f"{record['split']} {record['weights']} {metric}"
                    values[name].append(found["value"])
                    clips[name].append(record["clips"])
    return {name: fold_summary(found, clips[name]) for name, found in values.items()}


def _names(settings: FinetuneSettings, out: Path, resume: bool, overwrite: bool, stream: TextIO | None) -> list[str]:
    """The folds; claims the folder and leaves the catalogue and the settings in it."""
    main = int(os.environ.get("RANK", "0")) == 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "all folds in turn with several processes",
            "one process, or one fold",
            "give each fold a torchrun of its own: --sides.fold NAME",
        )
    going_on = folder.claim(out, resume=resume, overwrite=overwrite)
    if going_on:
        before = folder.read_settings(out, FinetuneSettings)
        folder.check_same(before, folder.settle(settings, before))
    elif out.exists():
        folder.clear(out)
    wanted = source.Wanted(settings.data, network.measured_front_end(settings), settings.bad_files, "folder")
    catalogue: Catalogue = source.catalogue(wanted, out, stream if main else None, anew=not going_on)
    names = folds(catalogue)
    if not going_on:
        out.mkdir(parents=True, exist_ok=True)
        catalogue.write(out / folder.CATALOGUE)
        folder.write_text(out / folder.CONFIG, config.to_yaml(settings))
    return names
