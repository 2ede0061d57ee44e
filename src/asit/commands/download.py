"""The verb download."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TextIO

import tyro

from asit.terminal.options import parse


@dataclass
class DownloadOptions:
    name: Annotated[str, tyro.conf.Positional]
    """esc50, speech-commands-v1, speech-commands-v2 or free-spoken-digit; for audioset and voxceleb1 it says what to
    obtain, and where."""
    out: str | None = None
    """Folder that the set goes to, by default NAME; archives wait beside it until they are unpacked."""
    url: str | None = None
    """Address of a mirror's archive, or, ending in /, of the folder it lies in; checksums stay as published."""
    force: bool = False
    """Fetch it again; a set that is there is kept as OUT.old."""
    keep_archive: bool = False
    """Do not delete the archives at the end."""


def download(prog: str, summary: str, given: list[str]) -> int:
    options = parse(DownloadOptions, prog, summary, given)
    from asit.data.download import fetch as data

    got = data.download(
        options.name,
        options.out or options.name,
        url=options.url,
        force=options.force,
        keep_archive=options.keep_archive,
        progress=_line(sys.stderr),
    )
    counts = " + ".join(f"{part.recordings:,}" for part in got.source.contents)
    print(f"{got.folder}: {got.source.title}, {counts} recordings" + (", already there" if got.there else ""))
    print(f"licence: {got.source.licence}")
    if got.replaced:
        print(f"what was there before is in {got.replaced}")
    for path in got.kept:
        print(f"archive kept: {path}")
    source = got.source.catalogue.format(shlex.quote(str(got.folder)))
    print(f"next: asit catalogue {source} --out {got.source.name}.jsonl")
    return 0


def _line(stream: TextIO) -> Callable[[str, int, int | None], None]:
    """A progress line in bytes with the time left; without a terminal, a line each 30 s."""
    from asit.progress import duration

    terminal = stream.isatty()
    now_at, began, first, last, told = "", 0.0, 0, -math.inf, 0

    def show(what: str, done: int, total: int | None) -> None:
        nonlocal now_at, began, first, last, told
        now = time.monotonic()
        if what != now_at or done < told:
            now_at, began, first, last = what, now, done, -math.inf
        finished, told = done == total, done
        if now - last < (0.2 if terminal else 30.0) and not finished:
            return
        last, rate = now, (done - first) / max(1e-3, now - began)
        text = f"{what}: {done / 1e6:,.0f}" + (f" of {total / 1e6:,.0f} MB" if total else " MB")
        if done > first:
            text += f"  {rate / 1e6:,.1f} MB/s"
            if finished:
                text += f"  in {duration(now - began)}"
            elif total:
                text += f"  {duration((total - done) / rate)} left"
        stream.write(("\r\x1b[K" if terminal else "") + text + ("" if terminal and not finished else "\n"))
        stream.flush()

    return show
