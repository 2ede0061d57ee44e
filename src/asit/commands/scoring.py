"""The verb probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from asit.commands.parse import parse


@dataclass
class ProbeOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
    table: Annotated[str, tyro.conf.Positional]
    """Labelled table (CSV, TSV, JSONL) with path, label and split (train, test)."""
    clips: int = 1_000_000
    """At most this many clips on each side."""
    seed: int = 0
    """Of the draw of clips and of the folds that choose the regularisation."""
    out: str | None = None
    """Also write the numbers as JSON."""


def probe(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ProbeOptions, prog, summary, given)
    import asit
    from asit.runs import probe

    clips = probe.labelled(options.table, options.clips, options.seed)
    compared = probe.compare(asit.load(options.model), clips, seed=options.seed)
    print(compared.text())
    if options.out:
        from asit.runs.folder import write_json

        write_json(Path(options.out), compared.record())
    return 0
