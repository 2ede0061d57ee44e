"""The verb download."""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass
from typing import Annotated

import tyro

from asit.terminal.options import parse


@dataclass
class DownloadOptions:
    name: Annotated[str, tyro.conf.Positional]
    """esc50, speech-commands-v1, speech-commands-v2 or free-spoken-digit; for audioset and voxceleb1 it prints what to
    obtain, and where."""
    out: str | None = None
    """Folder of the data set, by default NAME; archives are beside it until they are unpacked."""
    url: str | None = None
    """URL of a mirror's archive, or, ending in /, of its folder; the published checksums apply."""
    force: bool = False
    """Download it again; an existing data set is kept as OUT.old."""
    keep_archive: bool = False
    """Do not delete the archives at the end."""


def download(prog: str, summary: str, given: list[str]) -> int:
    options = parse(DownloadOptions, prog, summary, given)
    from asit.data.download import fetch as data
    from asit.progress import counter

    got = data.download(
        options.name,
        options.out or options.name,
        url=options.url,
        force=options.force,
        keep_archive=options.keep_archive,
        progress=functools.cache(functools.partial(counter, unit="MB", scale=1e6)),
    )
    counts = " + ".join(f"{part.recordings:,}" for part in got.source.archives)
    print(f"{got.folder}: {got.source.title}, {counts} recordings" + (", already there" if got.there else ""))
    print(f"licence: {got.source.licence}")
    if got.replaced:
        print(f"the previous folder is now {got.replaced}")
    for path in got.kept:
        print(f"archive kept: {path}")
    source = got.source.catalogue.format(shlex.quote(str(got.folder)))
    print(f"next: asit catalogue {source} --out {got.source.name}.jsonl")
    return 0
