"""The verb report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from asit.config import FinetuneSettings, PretrainSettings, presets
from asit.config.yaml import read_yaml
from asit.terminal.options import parse


@dataclass
class ReportOptions:
    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str | None = None
    """The page; by default RUN/report.html."""
    overlay: tuple[str, ...] = ()
    """Folders of other pretraining runs, whose curves are drawn with those of this one."""


def report(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ReportOptions, prog, summary, given)
    from asit.report import report as write

    print(write(options.run, options.out, preset=_basis(Path(options.run) / "config.yaml"), overlay=options.overlay))
    return 0


def _basis(config: Path) -> Mapping[str, Any] | None:
    """The settings of the run's preset or recipe, to mark differences from; None if there is none of that name."""
    held = read_yaml(config) if config.is_file() else {}
    kind = FinetuneSettings if "task" in held else PretrainSettings
    name = str(held.get(kind.RECIPE, kind.DEFAULT_RECIPE))
    return presets.build(kind, name).model_dump(mode="json") if name in presets.recipes(kind) else None
