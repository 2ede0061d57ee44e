"""The verb report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from asit import recipes
from asit.commands.parse import parse
from asit.config import read_yaml


@dataclass
class ReportOptions:
    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str | None = None
    """The page; by default RUN/report.html."""


def report(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ReportOptions, prog, summary, given)
    from asit.report import report as write

    config = Path(options.run) / "config.yaml"
    name = str(read_yaml(config).get("preset", "default")) if config.is_file() else "default"
    base = recipes.pretrain_settings(name).model_dump(mode="json") if name in recipes.presets() else None
    print(write(options.run, options.out, preset=base))
    return 0
