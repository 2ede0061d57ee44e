"""The verbs settings and demo."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from asit import recipes
from asit.commands.parse import parse
from asit.config import annotated


@dataclass
class SettingsOptions:
    preset: str = "default"
    """default, paper or official-v2."""


def settings(prog: str, summary: str, given: list[str]) -> int:
    options = parse(SettingsOptions, prog, summary, given)
    print(annotated(recipes.pretrain_settings(options.preset)), end="")
    return 0


@dataclass
class DemoOptions:
    out: str = "demo-run"
    """Folder for the data, the run and the page."""
    toy: bool = False
    """A few steps on few clips, to see that every part works."""
    seed: int = 0
    """Of the data and the run."""


def demo(prog: str, summary: str, given: list[str]) -> int:
    options = parse(DemoOptions, prog, summary, given)
    from asit.demo.walk import walk

    print(walk(Path(options.out), seed=options.seed, toy=options.toy, stream=sys.stderr).text)
    return 0
