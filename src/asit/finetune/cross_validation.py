"""Cross-validation: one fine-tuning run for each fold, and their mean and spread."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asit.config import FinetuneSettings
from asit.data.catalogue import tables
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.splits import by_folds, error_in_fold, folds
from asit.data.shards import tar_index
from asit.errors import AsitError, ConfigError
from asit.evaluate.metrics import fold_summary
from asit.finetune import init_model, supervised
from asit.finetune.finetune_run import FinetuneResult, finetune
from asit.finetune.finetune_setup import choose, labels_of
from asit.io import atomic, local_files, lock, parsing
from asit.training import open_data, run_dir
from asit.training import run as lifecycle

log = logging.getLogger(__name__)

ALL = "all"
RESUMES = "give the same command with --resume, which goes on with this fold"


@dataclass(frozen=True)
class CrossValidation:
    """How a cross-validation ended.

    Attributes:
        out: its folder; each fold's run is OUT/fold-NAME.
        finished: whether every fold is.
        stopped_by: the signal that stopped it, or None.
        summary: "SPLIT WEIGHTS METRIC" -> mean, std (n - 1) and values over folds.
        unseen: fold -> classes that it went on without, see `sides.unseen_classes`; folds without any are not in it.
    """

    out: Path
    finished: bool
    stopped_by: str | None
    summary: dict[str, dict[str, Any]]
    unseen: dict[str, list[str]] = field(default_factory=dict)


def run(
    settings: FinetuneSettings,
    *,
    resume: lifecycle.Resume = False,
    overwrite: bool = False,
) -> FinetuneResult | CrossValidation:
    """Fine-tune once, or with `sides.fold` "all" once for each fold; see `runs.finetune.finetune`.

    "all" is also what is done where no fold is named and no share held out, and a catalogue or table has folds and no
    splits, as in `asit evaluate`. All folds are looked at before the first is trained on. Going on, finished folds stay
    as they are.

    Raises:
        AsitError: anything that the user can mend; of a fold, with its name.
    """
    if not _over_folds(settings, bool(resume) and not overwrite):
        return finetune(settings, resume=resume, overwrite=overwrite)
    if not settings.out:
        raise ConfigError("no folder for the run was given", "out", "pass --out RUN")
    if not settings.sides.fold:
        settings = settings.model_copy(deep=True)
        settings.sides.fold = ALL
        log.info("the data have folds and no splits: a run for each fold (one alone: --sides.fold NAME)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "all folds in turn with several processes",
            "one process, or one fold",
            "give each fold a torchrun of its own: --sides.fold NAME",
        )
    supervised.check(settings)
    out = Path(settings.out)
    resume = bool(resume) if resume != "auto" or overwrite else (out / run_dir.CONFIG).exists()
    # Looked at before the lock, which makes the folder, and again under it.
    run_dir.claim(out, resume=resume, overwrite=overwrite)
    with lock.held(out):
        run_dir.tidy(out)
        return _run(settings, out, resume, overwrite)


def _run(settings: FinetuneSettings, out: Path, resume: bool, overwrite: bool) -> CrossValidation:
    names = _begin(settings, out, resume, overwrite)
    results: list[tuple[str, dict[str, Any]]] = []
    for number, name in enumerate(names, 1):
        place = out / folder_of(name)
        if not (place / run_dir.RESULTS).is_file():
            log.info(f"fold {name}, {number} of {len(names)}")
            one = settings.model_copy(deep=True)
            one.out, one.data, one.sides.fold = str(place), str(out / run_dir.CATALOGUE), name
            try:
                ended = finetune(one, resume=(place / run_dir.CONFIG).is_file())
            except AsitError as error:
                if not any(out.glob(f"fold-*/{run_dir.CONFIG}")):  # nothing to go on with: the folder is free again
                    (out / run_dir.CONFIG).unlink(missing_ok=True)
                # The folds before this one are kept, and its own checkpoints, if there are any.
                done = any(out.glob(f"fold-*/{run_dir.CONFIG}"))
                remedy = error.remedy.replace(lifecycle.AGAIN, RESUMES) if done else error.remedy
                raise error_in_fold(name, error, remedy) from error
            # A signal that came with a fold's last step lets its scores be made, and ends all here.
            if not ended.finished or (ended.stopped_by and number < len(names)):
                return CrossValidation(out, False, ended.stopped_by, {})
        again = f"remove it and resume: fold {name} is scored again"
        results.append((name, parsing.json_object(place / run_dir.RESULTS, ConfigError, "a fold's results", again)))
    with parsing.as_written(f"results.json of a fold in {out}", "remove the fold's results.json and resume"):
        summary = summarise(results)
    first = results[0][1]
    held = {key: first[key] for key in ("task", "kind", "classes", "model")}
    every = [{"fold": name, **result} for name, result in results]
    atomic.write_json(out / run_dir.RESULTS, held | {"folds": every, "summary": summary})
    unseen = {name: result["unseen_classes"] for name, result in results if result.get("unseen_classes")}
    return CrossValidation(out, True, None, summary, unseen)


def _over_folds(settings: FinetuneSettings, resume: bool) -> bool:
    """Whether each fold is to be trained: asked for, begun so, or what the data are made for."""
    if settings.sides.fold:
        return settings.sides.fold == ALL
    if resume and (Path(settings.out) / run_dir.CONFIG).exists():
        return run_dir.read_settings(Path(settings.out), FinetuneSettings).sides.fold == ALL
    if settings.sides.hold_out or not settings.data:
        return False
    if (listed := tar_index.index_of(settings.data)) is not None:
        return by_folds(Catalogue.read(listed, look=False))
    place = Path(local_files.locate(settings.data))
    if place.suffix.lower() not in tables.SUFFIXES or not place.is_file():
        return False
    rows = tables.read_table(place)
    return any(row.fold for row in rows) and not any(row.split for row in rows)


def folder_of(fold: str) -> str:
    """The name of a fold's folder; signs that a file system may not have are written as % and their code."""
    return "fold-" + re.sub(r'[/\\:*?"<>|%\x00-\x1f]', lambda sign: f"%{ord(sign[0]):02x}", fold)


def summarise(results: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over folds of every metric, by "SPLIT WEIGHTS METRIC"; see `fold_summary`.

    Args:
        results: name and results.json of each fold.
    """
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


def _begin(settings: FinetuneSettings, out: Path, resume: bool, overwrite: bool) -> list[str]:
    """The folds; claims the folder and leaves the catalogue and the settings in it."""
    going_on = run_dir.claim(out, resume=resume, overwrite=overwrite)
    if going_on:
        before = run_dir.read_settings(out, FinetuneSettings)
        run_dir.check_same(before, run_dir.settle(settings, before))
    model = init_model.pretrained(settings)
    wanted = open_data.Wanted.of(settings, None if model is None else model.front_end.settings)
    catalogue = open_data.catalogue(wanted, out, anew=not going_on)
    names = folds(catalogue)
    if not going_on:
        labels = labels_of(catalogue, settings)
        for name in names:
            one = settings.model_copy(deep=True)
            one.sides.fold = name
            try:
                choose(one, catalogue, labels)
            except AsitError as error:
                raise error_in_fold(name, error) from error
        out.mkdir(parents=True, exist_ok=True)
        run_dir.clear(out)
        catalogue.write(out / run_dir.CATALOGUE)
        run_dir.write_settings(out, settings)
    return names
