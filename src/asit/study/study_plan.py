"""The plan of a study, OUT/study.json: what its arms are, what they are pretrained and scored on, and how long."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asit import __version__
from asit.config import PretrainSettings, presets, yaml
from asit.config.pretrain_settings import check
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.splits import TEST, by_folds, rows_of_splits
from asit.errors import ConfigError
from asit.evaluate.frozen_scores import Probe
from asit.io import atomic, local_files, lock, parsing
from asit.pretrain.pretrain_dataset import segment_counts
from asit.study.arm_costs import seconds_per_step
from asit.study.grids import Grid, arm_settings, typical_seconds
from asit.training import open_data, run_dir

log = logging.getLogger(__name__)

PLAN = "study.json"
_OWN = frozenset({PLAN, "data", "tables", "runs", "scratch", "table.csv", "table.md", "figure.png"})


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How arms are scored.

    Attributes:
        probes: of the frozen encoder.
        shares: of the training labels that the encoder is fine-tuned with; none: no fine-tuning.
        epochs: of fine-tuning with all labels; with fewer there are as many steps, up to ten times the epochs.
        scratch_rates: learning rates at which the same classifier is trained from fresh weights.
    """

    probes: tuple[Probe, ...] = ("linear", "knn", "prototype")
    shares: tuple[float, ...] = ()
    epochs: int = 30
    scratch_rates: tuple[float, ...] = ()

    def epochs_for(self, share: float) -> int:
        """Return the epochs of fine-tuning with a share of the labels."""
        return round(self.epochs * min(10.0, 1 / share))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a study is asked to be.

    Attributes:
        grid: its arms.
        base: settings that all arms share, with `data` and `out`, the study's folder.
        tables: labelled tables, each scored on by itself.
        minutes: of a run, CPU time on a CPU; None: the epochs of `base`.
        scoring: how arms are scored.
        steps, rounds: of the measurement that turns minutes into epochs, see `arm_costs.seconds_per_step`.
    """

    grid: Grid
    base: PretrainSettings
    tables: tuple[str, ...]
    minutes: float | None = None
    scoring: Scoring = field(default_factory=Scoring)
    steps: tuple[int, int] = (10, 40)
    rounds: int = 2


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in its folder.

    Attributes:
        out: the folder.
        grid: its arms, of all calls so far.
        arms: settings of their runs, without `out` and `seed`.
        data: what they are pretrained on, as given.
        tables: name -> labelled table, as given.
        minutes: of a run; None: by epochs.
        scoring: how arms are scored.
        notes: what a reader of the scores should know of the data.
    """

    out: Path
    grid: Grid
    arms: dict[str, PretrainSettings]
    data: str
    tables: dict[str, str]
    minutes: float | None
    scoring: Scoring
    notes: list[str]

    def run(self, arm: str, seed: int) -> Path:
        """Return the folder of an arm's pretraining run."""
        return self.out / "runs" / f"{arm}-s{seed}"

    def scores(self, arm: str, seed: int, part: str) -> Path:
        """Return the folder of scores beside a run; `part` is a table, or `tuned_part` of one."""
        return self.out / "runs" / f"{arm}-s{seed}.scores" / part

    def scratch(self, rate: float, seed: int, part: str) -> Path:
        """Return the folder of a run from fresh weights."""
        return self.out / "scratch" / f"lr-{rate:g}-s{seed}" / part

    def catalogue(self, table: str) -> Catalogue:
        """Return the catalogue of a labelled table."""
        return Catalogue.read(self.table_path(table), look=False)

    def table_path(self, table: str) -> str:
        """Return the path of the catalogue of a labelled table."""
        return _listed(self.out / "tables" / table, self.tables[table])

    @property
    def data_path(self) -> str:
        """The path of the catalogue that is pretrained on."""
        return _listed(self.out / "data", self.data)

    @classmethod
    def read(cls, out: Path) -> Study:
        """Read a study's plan.

        Raises:
            ConfigError: the folder holds none, or it is damaged.
        """
        remedy = "run `asit study` with its data and tables first, or name its folder"
        if not (out / PLAN).is_file():
            raise ConfigError(f"{out} holds no study", f"a folder with {PLAN}", remedy)
        held = parsing.json_object(out / PLAN, ConfigError)
        with parsing.as_written(out / PLAN, "restore it, or start the study in a new --out"):
            scoring: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in held["scoring"].items()
            }
            return cls(
                out=out,
                grid=Grid(**held["grid"]),
                arms={arm: yaml.build(PretrainSettings, v, f"arm {arm}") for arm, v in held["arms"].items()},
                scoring=Scoring(**scoring),
                **{name: held[name] for name in ("data", "tables", "minutes", "notes")},
            )

    def write(self) -> None:
        """Write the plan."""
        held = {name: getattr(self, name) for name in ("data", "tables", "minutes", "notes")}
        arms = {arm: v.model_dump(mode="json", exclude_unset=True) for arm, v in self.arms.items()}
        held |= {"asit": __version__, "grid": vars(self.grid), "arms": arms, "scoring": vars(self.scoring)}
        atomic.write_json(self.out / PLAN, held)


def tuned_part(table: str, share: float) -> str:
    """Return the name of the folder of fine-tuning with a share of a table's labels."""
    return f"{table}-tuned-{share:g}"


def prepare(request: Request) -> Study:
    """Start a study in its folder, or add to the one that is there what is new in the request.

    One process at a time does this; others wait for it. It lists the data, checks the settings of every arm and,
    where minutes are given, measures the steps of arms.

    Raises:
        ConfigError: the folder is not free, the study was started with other data or settings, or settings do not fit.
        CatalogueError: data or tables without a usable recording.
    """
    out = Path(request.base.out)
    if not request.base.out:
        raise ConfigError("no folder for the study was given", "out", "pass --out DIR")
    if not request.tables:
        raise ConfigError("no labelled table to score on was given", "one or more", "pass --table TABLE")
    if request.base.stop_after or request.base.seed:
        found = f"stop_after {request.base.stop_after}, seed {request.base.seed}"
        raise ConfigError(found, "neither: each run has a seed of --seeds, and goes to its end", "leave them out")
    waited = False
    while True:
        try:
            with lock.writing(out / PLAN):
                study = _prepared(request, out)
                study.write()
                for note in study.notes:
                    log.warning(note)
                return study
        except lock.InUseError:
            if not waited:
                log.info("another process prepares this study: waiting for it")
            waited = True
            time.sleep(1.0)


def _prepared(request: Request, out: Path) -> Study:
    before = Study.read(out) if (out / PLAN).exists() else None
    tables = _names(request.tables)
    data = _absolute(request.base.data)
    if before is None:
        foreign = sorted(path.name for path in out.iterdir() if path.name not in _OWN and path.name[0] != ".")
        if foreign:
            found = f"{out} holds files that are not a study's: {', '.join(foreign[:5])}"
            raise ConfigError(found, "a new or empty folder for the study", "choose another --out")
        for stale in (*out.glob(f"data/{run_dir.CATALOGUE}"), *out.glob(f"tables/*/{run_dir.CATALOGUE}")):
            stale.unlink()  # of a start that failed, perhaps with other data
    else:
        _check_same(before, request, tables, data)
    base = request.base
    listed = open_data.catalogue(base.data, base.front_end, out / "data", bad_files=base.bad_files, table=base.reading)
    labelled = {
        name: open_data.catalogue(
            path, base.front_end, out / "tables" / name, bad_files=base.bad_files, labels="folder"
        )
        for name, path in tables.items()
    }
    arms = arm_settings(request.grid, base.changed({"data": "", "out": ""}), lambda: typical_seconds(base, listed))
    for arm, settings in arms.items():
        try:
            check(settings)
        except ConfigError as error:
            raise ConfigError(f"the arm {arm}: {error.found}", error.expected, error.remedy) from error
    known = before.arms if before is not None else {}
    grid = request.grid
    if before is not None:
        grid = Grid(grid.name, grid.source, before.grid.arms | grid.arms, before.grid.reference, grid.axis)
    study = Study(
        out=out,
        grid=grid,
        arms=known,
        data=data,
        tables=tables,
        minutes=request.minutes,
        scoring=request.scoring,
        notes=list(_notes(base, listed, labelled)),
    )
    return _timed(study, arms, listed, request)


def _timed(study: Study, arms: dict[str, PretrainSettings], listed: Catalogue, request: Request) -> Study:
    """Return the study with the arms that are new; with minutes their epochs are what these hold."""
    new = {arm: settings for arm, settings in arms.items() if arm not in study.arms}
    if request.minutes is not None and new:
        costs = seconds_per_step(new, study.data_path, steps=request.steps, rounds=request.rounds)
        for arm, seconds in costs.items():
            passes = request.minutes * request.grid.length(arm) * 60 / (seconds * epoch_steps(new[arm], listed))
            new[arm] = _with_epochs(new[arm], max(1, round(passes)))
            log.info(f"{arm}: {seconds:.3g} s a step, {new[arm].epochs} epochs in {request.minutes:g} minutes")
    for arm, settings in arms.items():
        if arm in study.arms:
            now = settings if request.minutes is None else _with_epochs(settings, study.arms[arm].epochs)
            try:
                run_dir.check_same(study.arms[arm], now)
            except ConfigError as error:
                raise ConfigError(
                    f"the arm {arm}: {error.found}", "the settings that the study began with", "choose another --out"
                ) from error
    return Study(**{**vars(study), "arms": study.arms | new})


def _with_epochs(settings: PretrainSettings, epochs: float) -> PretrainSettings:
    """Return the settings with these epochs; a warm-up that they would not hold becomes auto."""
    return PretrainSettings.model_validate(presets.overlay(settings.model_dump(exclude_unset=True), {"epochs": epochs}))


def epoch_steps(settings: PretrainSettings, listed: Catalogue) -> int:
    """Return the steps of an epoch."""
    if settings.splits:
        listed = listed.subset(rows_of_splits(listed, settings.splits))
    clips = int(segment_counts(listed, settings.views).sum())
    return max(1, clips // min(settings.batch_size, clips))


def _check_same(before: Study, request: Request, tables: dict[str, str], data: str) -> None:
    """Refuse other data, tables and scores than the study was started with."""
    wrong = []
    if before.data != data:
        wrong.append(f"it pretrains on {before.data}, not on {data}")
    if before.tables != tables:
        wrong.append(f"it scores on {', '.join(before.tables.values())}, not on {', '.join(tables.values())}")
    if before.minutes != request.minutes:
        wrong.append(f"minutes are {before.minutes or 'not given'} in it, {request.minutes or 'not given'} now")
    if before.scoring != request.scoring:
        wrong.append("it is scored by other probes or fine-tuning")
    if before.grid.name != request.grid.name:
        wrong.append(f"its name is {before.grid.name}, not {request.grid.name}")
    if wrong:
        expected = "the same data, tables and scores; only --arms, --seeds and where it runs may differ"
        raise ConfigError(f"{before.out} holds another study: " + "; ".join(wrong), expected, "choose another --out")


def _notes(base: PretrainSettings, listed: Catalogue, labelled: dict[str, Catalogue]) -> Iterator[str]:
    """Yield what the scores of a table cannot be trusted for."""
    rows = rows_of_splits(listed, base.splits) if base.splits else range(len(listed))
    seen = {_real(listed[int(i)].path) for i in rows}
    for name, table in labelled.items():
        scored = range(len(table)) if by_folds(table) else rows_of_splits(table, TEST)
        both = sum(_real(table[int(i)].path) in seen for i in scored)
        if both:
            yield (
                f"{both} of {len(scored)} clips that {name} scores on are among the recordings that are pretrained on "
                "(without their labels)"
            )
        if table.column("group") is None:
            yield (
                f"{name} has no groups: if recordings of one speaker or place train and test, scores are too high "
                "and intervals too narrow"
            )


def _names(tables: tuple[str, ...]) -> dict[str, str]:
    """Return name -> path of the tables."""
    found = {Path(table).name.split(".")[0] or "table": _absolute(table) for table in tables}
    if len(found) < len(tables):
        raise ConfigError("two tables have the same name: " + ", ".join(tables), "different names", "rename one file")
    return found


def _absolute(data: str) -> str:
    """Return a path from the root, so that processes of any folder mean the same; a URL as it is."""
    return data if not data or "://" in data else str(Path(local_files.locate(data)).absolute())


def _real(path: str) -> str:
    return path if "://" in path else os.path.realpath(path)


def _listed(folder: Path, given: str) -> str:
    """Return the catalogue that a study made of its data; the data, where they are one or shards."""
    made = folder / run_dir.CATALOGUE
    return str(made) if made.exists() else given
