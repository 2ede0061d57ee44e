"""`asit shard`: from whatever pretraining takes to tar shards and their index."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Literal

from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.shards import pack
from asit.errors import ConfigError
from asit.progress import counter
from asit.training import open_data

log = logging.getLogger(__name__)


def shard(
    data: str,
    out: str,
    *,
    encode: Literal["original", "flac", "opus"] = "original",
    rate: int = 16000,
    shard_mb: float = 256.0,
    clips: int | None = None,
    shuffle: int | None = None,
    workers: int | Literal["auto"] = "auto",
    bad_files: float = 0.1,
    resume: bool = False,
    overwrite: bool = False,
) -> pack.Packed:
    """Write the recordings of `data` into tar shards.

    A folder or table is looked at first, as `asit catalogue` does with its defaults.

    Args:
        data: a catalogue, a folder, a table, shards, or a URL of the last.
        workers: processes; auto: one for each core.
        out, encode, rate, shard_mb, clips, shuffle, bad_files, resume, overwrite: see `shards.pack`.

    Raises:
        AsitError: as `shards.pack` and `source.catalogue`.
    """
    processes = _cores() if workers == "auto" else workers
    if not 0 <= bad_files <= 1 or processes < 1:
        raise ConfigError(
            f"bad_files={bad_files:g}, workers={processes}", "a share from 0 to 1, and 1 worker or more", "change them"
        )
    front_end = FrontEndSettings(rate=rate)
    with tempfile.TemporaryDirectory() as scratch:
        listed: Catalogue = open_data.catalogue(open_data.Wanted(data, front_end, bad_files), Path(scratch) / "run")
    if encode == "original" and listed.starts.any():
        count = int((listed.starts > 0).sum())
        log.info("%d clips are parts of files: these are cut out and written as 16-bit mono FLAC", count)
    return pack.pack(
        listed,
        out,
        encode=encode,
        rate=rate,
        shard_mb=shard_mb,
        clips=clips,
        shuffle=shuffle,
        workers=processes,
        bad_files=bad_files,
        resume=resume,
        overwrite=overwrite,
        progress=counter("packing", "clips"),
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
