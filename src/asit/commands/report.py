"""The verbs report and compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from asit.config import FinetuneSettings, PretrainSettings, presets
from asit.config.yaml import read_yaml
from asit.errors import ConfigError
from asit.terminal.options import parse


@dataclass
class ReportOptions:
    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str | None = None
    """The page; by default RUN/report.html."""


def report(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ReportOptions, prog, summary, given)
    from asit.report import report as write

    print(write(options.run, options.out, preset=_basis(Path(options.run) / "config.yaml")))
    return 0


def _basis(config: Path) -> Mapping[str, Any] | None:
    """What a run's settings are compared with: its recipe's or preset's; None where there is none of that name."""
    held = read_yaml(config) if config.is_file() else {}
    kind = FinetuneSettings if "task" in held else PretrainSettings
    name = str(held.get(kind.RECIPE, kind.DEFAULT_RECIPE))
    return presets.build(kind, name).model_dump(mode="json") if name in presets.recipes(kind) else None


@dataclass
class CompareOptions:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of fine-tuning runs and cross-validations, JSON files of asit evaluate; differences are to the first."""
    out: str | None = None
    """Also write the tables: a name that ends in .md, .csv or .json."""
    spreadsheet: bool = False
    """Of CSV: write "'" before names that a spreadsheet program would run as a formula (those that begin with =, +, -,
    @, a tab or a carriage return)."""
    split: str = "auto"
    """Split whose scores are compared; auto: test, or all that a run has where it has no test."""
    seed: int = 0
    """Of the paired bootstrap."""


def compare(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CompareOptions, prog, summary, given)
    from asit.report import comparison_table
    from asit.report.compare import compare as side_by_side

    if options.out:
        comparison_table.check_name(Path(options.out))
    if options.spreadsheet and Path(options.out or "").suffix.lower() != ".csv":
        raise ConfigError(f"--spreadsheet with --out {options.out}", "a name that ends in .csv", "drop it")
    found = side_by_side(options.runs, split=options.split, seed=options.seed)
    print(comparison_table.markdown(found), end="")
    if options.out:
        comparison_table.write(found, Path(options.out), spreadsheet=options.spreadsheet)
    return 0
