"""The verb demo."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from asit.terminal.options import parse


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
    from asit.demo.demo_run import run_demo

    print(run_demo(Path(options.out), seed=options.seed, toy=options.toy))
    return 0
