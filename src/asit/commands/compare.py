"""The verb compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from asit.terminal.options import Spreadsheet, check_spreadsheet, parse


@dataclass
class CompareOptions:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of fine-tuning runs and cross-validations, JSON files of asit evaluate; differences are to the first."""
    out: str | None = None
    """Also write the tables: a name that ends in .md, .csv or .json."""
    spreadsheet: Spreadsheet = False
    split: str = "auto"
    """Split whose scores are compared; auto: test, or all that a run has where it has no test."""
    seed: int = 0
    """Of the paired bootstrap."""


def compare(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CompareOptions, prog, summary, given)
    from asit.report import comparison_table
    from asit.report.compare import compare as compare_runs

    if options.out:
        comparison_table.check_name(Path(options.out))
    check_spreadsheet(options.spreadsheet, options.out)
    found = compare_runs(options.runs, split=options.split, seed=options.seed)
    print(comparison_table.markdown(found, compact=True), end="")
    if options.out:
        comparison_table.write(found, Path(options.out), spreadsheet=options.spreadsheet)
    return 0
