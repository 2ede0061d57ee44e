"""Cross-validation: one fine-tuning run for each fold, and their mean and spread."""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asit.config import FinetuneSettings, finetune_settings
from asit.config.presets import Resume
from asit.data.annotations.annotation_files import kind_of
from asit.data.catalogue import tables
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import by_folds, error_in_fold, folds
from asit.data.shards import tar_index
from asit.errors import AsitError, ConfigError
from asit.evaluate.metrics import fold_summary
from asit.finetune import init_model
from asit.finetune.finetune_run import FinetuneResult, finetune
from asit.finetune.finetune_setup import choose_splits
from asit.io import atomic, local_files, lock, parsing
from asit.training import open_data, run_dir
from asit.training.run import AGAIN, need_out

log = logging.getLogger(__name__)

ALL = "all"
RESUMES = "give the same command with --resume, which resumes with this fold"


@dataclass(frozen=True)
class CrossValidation:
    """How a cross-validation ended.

    Attributes:
        out: its folder; each fold's run is OUT/fold-NAME.
        finished: whether every fold is.
        stopped_by: the signal that stopped it, or None.
        summary: "SPLIT WEIGHTS METRIC" -> mean, std (n - 1) and values over folds.
        unseen: fold -> classes that it left out, see `sides.unseen_classes`; folds that left out none are not in it.
    """

    out: Path
    finished: bool
    stopped_by: str | None
    summary: dict[str, dict[str, Any]]
    unseen: dict[str, list[str]] = field(default_factory=dict)

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {found['mean']:.4f}" for name, found in self.summary.items()) or "no scores"
        return f"CrossValidation({str(self.out)!r}, {'finished' if self.finished else 'not finished'}; {means})"


def run(
    settings: FinetuneSettings, *, resume: Resume = False, overwrite: bool = False
) -> FinetuneResult | CrossValidation:
    """Fine-tune once, or with `sides.fold` "all" once for each fold; see `finetune_run.finetune`.

    "all" is also the default where the data have folds and no splits, no fold is named and no share is held out, as in
    `asit evaluate`. All folds are checked before the first is trained on. On resume, finished folds stay as they are.

    Raises:
        AsitError: as `finetune`; of a fold, with its name.
    """
    if not over_folds(settings, bool(resume) and not overwrite):
        return finetune(settings, resume=resume, overwrite=overwrite)
    need_out(settings)
    if not settings.sides.fold:
        settings = settings.changed({"sides": {"fold": ALL}})
        log.info("the data have folds and no splits: a run for each fold (one alone: --sides.fold NAME)")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "all folds in turn with several processes",
            "one process, or one fold",
            "give each fold a torchrun of its own: --sides.fold NAME",
        )
    finetune_settings.check(settings)
    out = Path(settings.out)
    resume = bool(resume) if resume != "auto" or overwrite else (out / run_dir.CONFIG).exists()
    # Checked before the lock, which makes the folder, and again under it.
    run_dir.claim(out, resume=resume, overwrite=overwrite)
    with lock.held(out):
        run_dir.tidy(out)
        return _run(settings, out, resume, overwrite)


def _run(settings: FinetuneSettings, out: Path, resume: bool, overwrite: bool) -> CrossValidation:
    names = _begin(settings, out, resume, overwrite)
    results: list[tuple[str, dict[str, Any]]] = []
    for number, name in enumerate(names, 1):
        folder = out / folder_of(name)
        if not (folder / run_dir.RESULTS).is_file():
            log.info(f"fold {name}, {number} of {len(names)}")
            changes = {"out": str(folder), "data": str(out / run_dir.CATALOGUE), "sides": {"fold": name}}
            try:
                ended = finetune(settings.changed(changes), resume=(folder / run_dir.CONFIG).is_file())
            except AsitError as error:
                if not any(out.glob(f"fold-*/{run_dir.CONFIG}")):  # nothing to resume
                    (out / run_dir.CONFIG).unlink(missing_ok=True)
                # The folds before this one are kept, and its own checkpoints, if there are any.
                done = any(out.glob(f"fold-*/{run_dir.CONFIG}"))
                remedy = error.remedy.replace(AGAIN, RESUMES) if done else error.remedy
                raise error_in_fold(name, error, remedy) from error
            # After a signal during a fold's last step, its scores are computed and the rest is left.
            if not ended.finished or (ended.stopped_by and number < len(names)):
                return CrossValidation(out, False, ended.stopped_by, {})
        again = f"remove it and resume: fold {name} is scored again"
        results.append((name, parsing.json_object(folder / run_dir.RESULTS, ConfigError, "a fold's results", again)))
    with parsing.as_written(f"results.json of a fold in {out}", "remove the fold's results.json and resume"):
        summary = summarise(results)
    first = results[0][1]
    held = {key: first[key] for key in ("task", "kind", "classes", "model")}
    every = [{"fold": name, **result} for name, result in results]
    atomic.write_json(out / run_dir.RESULTS, held | {"folds": every, "summary": summary})
    unseen = {name: result["unseen_classes"] for name, result in results if result.get("unseen_classes")}
    return CrossValidation(out, True, None, summary, unseen)


def over_folds(settings: FinetuneSettings, resume: bool) -> bool:
    """Return whether to train each fold: as requested, as the run was started, or as the data suggest."""
    if settings.sides.fold:
        return settings.sides.fold == ALL
    if resume and (Path(settings.out) / run_dir.CONFIG).exists():
        return run_dir.read_settings(Path(settings.out), FinetuneSettings).sides.fold == ALL
    if settings.sides.hold_out or not settings.data:
        return False
    if (listed := tar_index.index_of(settings.data)) is not None:
        return by_folds(Catalogue.read(listed, look=False))
    path = Path(local_files.locate(settings.data))
    if path.suffix.lower() not in tables.SUFFIXES or not path.is_file() or kind_of(path):
        return False
    rows = list(tables.iterate_table(path, settings.columns, repeated=bool(settings.window)))
    return any(row.fold for row in rows) and not any(row.split for row in rows)


def folder_of(fold: str) -> str:
    """Return the name of a fold's folder; characters that a file system may not allow become % and their code."""
    return "fold-" + re.sub(r'[/\\:*?"<>|%\x00-\x1f]', lambda sign: f"%{ord(sign[0]):02x}", fold)


def summarise(results: list[tuple[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return mean and spread over folds of every metric, by "SPLIT WEIGHTS METRIC"; see `fold_summary`.

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
    """Claim the folder, write the catalogue and the settings of a new run, and return the folds."""
    resumed = run_dir.claim(out, resume=resume, overwrite=overwrite)
    if resumed:
        before = run_dir.read_settings(out, FinetuneSettings)
        run_dir.check_same(before, run_dir.settle(settings, before))
    model = init_model.pretrained(settings)
    front_end = None if model is None else model.front_end.settings
    catalogue = open_data.of_run(settings, out, front_end, rescan=not resumed)
    names = folds(catalogue)
    if not resumed:
        labels = read_labels(catalogue, settings.labels)
        for name in names:
            try:
                choose_splits(settings.changed({"sides": {"fold": name}}), catalogue, labels)
            except AsitError as error:
                raise error_in_fold(name, error) from error
        out.mkdir(parents=True, exist_ok=True)
        run_dir.clear(out)
        catalogue.write(out / run_dir.CATALOGUE)
        run_dir.write_settings(out, settings)
    return names
