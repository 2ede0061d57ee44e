"""The verb catalogue."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from asit.commands.parse import parse
from asit.settings import FrontEndSettings


@dataclass
class CatalogueOptions:
    source: Annotated[str, tyro.conf.Positional]
    """Folder of recordings, searched through all its levels, or a table (CSV, TSV, JSONL) with a path column."""
    out: str
    """The catalogue to write, such as c.jsonl."""
    workers: int | Literal["auto"] = "auto"
    """Processes; auto: one for each core."""
    check: Literal["full", "header"] = "full"
    """full: decode every file, which finds truncated, silent and non-finite ones; header: only open it."""
    checksum: bool = False
    """Store each file's SHA-256."""
    bad_files: float = 0.1
    """Share of unusable files above which this fails."""
    statistics_clips: int = 1000
    """Files that mean and std are measured on; 0: not measured."""
    seed: int = 0
    """Of the draw of these files."""
    restart: bool = False
    """Forget what an earlier scan left."""
    front_end: FrontEndSettings = field(default_factory=FrontEndSettings)


def catalogue(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CatalogueOptions, prog, summary, given)
    from asit.data import scan
    from asit.engine.records import counter

    made = scan.build(
        options.source,
        options.out,
        front_end=options.front_end,
        workers=options.workers,
        check=options.check,
        checksum=options.checksum,
        bad_files=options.bad_files,
        statistics_clips=options.statistics_clips,
        restart=options.restart,
        seed=options.seed,
        progress=counter(sys.stderr, "checking files"),
    )
    header = made.header
    print(f"{options.out}: {len(made)} clips, {header['seconds'] / 3600:.2f} h")
    skipped = {reason: count for reason, count in header.get("skipped", {}).items() if count}
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"left out: {counts}; named in {Path(options.out).with_suffix('')}.skipped.jsonl")
    if header.get("mean") is not None:
        clips = header.get("statistics_clips")
        print(f"log-mel mean {header['mean']:.4f}, std {header['std']:.4f}, measured on {clips} clips")
    print(f"next: asit pretrain --data {shlex.quote(options.out)} --out RUN")
    return 0
