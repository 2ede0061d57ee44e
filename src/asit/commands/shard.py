"""The verb shard."""

from __future__ import annotations

import logging
import shlex
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from asit.config import TableSettings
from asit.errors import ConfigError
from asit.terminal.options import Count, Share, Table, parse, pick

log = logging.getLogger(__name__)


@dataclass
class ShardOptions:
    data: Annotated[str | None, tyro.conf.Positional] = None
    """A catalogue, or anything else that pretraining takes as --data."""
    out: str | None = None
    """Folder or URL (such as s3://bucket/set) for the shards and index.jsonl."""
    encode: Literal["original", "flac", "opus"] = "original"
    """original: each file's bytes (parts of files as FLAC); flac: 16-bit mono at --rate; opus: lossy mono at --rate."""
    rate: int = 16000
    """Hz, of re-encoded audio: the rate of training."""
    shard_mb: float = 256.0
    """Approximate megabytes of a shard."""
    clips: int | None = None
    """Clips of a shard, instead of megabytes."""
    shuffle: int | None = None
    """Shuffle the clips in the shards with this seed; the index keeps the catalogue's order."""
    workers: Count | Literal["auto"] = "auto"
    """Processes; auto: one per CPU. The output does not depend on it."""
    bad_files: Share = 0.1
    """Largest share of unreadable recordings."""
    resume: bool = False
    """Keep the shards that an earlier call has written to OUT, and write the others."""
    overwrite: bool = False
    """Delete the shards in OUT."""
    check: str | None = None
    """Write nothing: read the shards of this folder or URL and compare them with the hashes in their index."""
    table: Table = field(default_factory=TableSettings)


def shard(prog: str, summary: str, given: list[str]) -> int:
    options: ShardOptions = parse(ShardOptions, prog, summary, given)
    from asit.progress import counter

    if options.check is not None:
        from asit.data.shards import tar_index

        if options.data or options.out:
            raise ConfigError("--check was given with something to write", "one of the two", f"{prog} --check DIR")
        index = tar_index.check(options.check, progress=counter("checking", "shards"))
        count = len(index.header["shards"])
        print(f"{index.root}: {count} shards, {len(index)} clips, {index.header['seconds'] / 3600:.2f} h, all intact")
        return 0
    if not options.data or not options.out:
        missing = "CATALOGUE" if not options.data else "--out"
        raise ConfigError(f"{missing} is not given", f"{prog} CATALOGUE --out DIR", "give it")
    import numpy as np

    from asit.config import FrontEndSettings
    from asit.data.catalogue.catalogue import INDEX
    from asit.data.shards.pack import pack
    from asit.data.shards.shard_plan import PackSettings
    from asit.io import child_process, storage
    from asit.training import open_data

    workers = child_process.usable_cpus() if options.workers == "auto" else options.workers
    with tempfile.TemporaryDirectory() as scratch:
        front_end = FrontEndSettings(rate=options.rate)
        listed = open_data.catalogue(
            options.data, front_end, Path(scratch) / "run", bad_files=options.bad_files, table=options.table
        )
    parts = int(np.count_nonzero(listed.starts))
    if options.encode == "original" and parts:
        log.info("%d clips are parts of files: these are cut out and written as 16-bit mono FLAC", parts)
    settings = pick(PackSettings, options, workers=workers)
    show = counter("packing", "clips")
    made = pack(listed, options.out, settings, resume=options.resume, overwrite=options.overwrite, progress=show)
    hours = made.index.header["seconds"] / 3600
    shards, location = made.index.header["shards"], storage.join(made.index.root, INDEX)
    size = f"{len(made.index)} clips, {hours:.2f} h, {sum(shard['bytes'] for shard in shards) / 1e6:,.1f} MB"
    print(f"{location}: {size} in {len(shards)} shards")
    if made.kept:
        print(f"{made.kept} shards were already there")
    if made.cut:
        print(f"{made.cut} clips are parts of files: cut out and written as 16-bit mono FLAC")
    if skipped := made.index.header["skipped"]:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"left out: {counts}; listed in {location.removesuffix('.jsonl')}.skipped.jsonl")
    print(f"next: asit pretrain --data {shlex.quote(location)} --out RUN")
    return 0
