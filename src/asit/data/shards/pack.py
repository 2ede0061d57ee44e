"""Pack a catalogue into tar shards with an index, by several processes; see `shard_plan` for interruptions."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asit.data.catalogue.catalogue import INDEX, INDEX_ROOT, Catalogue, Clip
from asit.data.catalogue.columns import SHARD, Rows, json_line
from asit.data.shards import tar_writer
from asit.data.shards.shard_plan import OPUS_RATES, SKIPPED, PackSettings, ShardPlan, relative_names
from asit.errors import CatalogueError, ConfigError, TrainingError
from asit.io import atomic, child_process, lock, storage

Progress = Callable[[int, int, int], None]
"""Called with (clips done, clips in all, clips left out)."""
_Task = tuple[str, list[tuple[int, str, Clip]]]


@dataclass(frozen=True)
class Packed:
    """What was written: the index, and how many clips are parts of their files; `kept` shards were there before."""

    index: Catalogue
    cut: int
    kept: int


def pack(
    source: Catalogue,
    out: str,
    settings: PackSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda done, total, skipped: None,
) -> Packed:
    """Write a catalogue's clips into tar shards, and the index that lists them in the catalogue's order.

    Args:
        source: the clips; files, parts of files, or clips in other shards.
        out: a folder or URL.
        settings: see `PackSettings`.
        resume: keep the shards that an earlier call has written.
        overwrite: delete them.
        progress: see `Progress`.

    Raises:
        ConfigError: settings that cannot be, or a location that is not free or that another process is writing.
        CatalogueError: more clips than `bad_files` cannot be read, or none can.
        StoreError: a location that cannot be written or read.
        CheckpointError: a folder that cannot be made.
        TrainingError: a process was killed by the system.
        KeyboardInterrupt: after Ctrl-C, saying how to resume.
    """
    if settings.encode == "opus" and settings.rate not in OPUS_RATES:
        rates = ", ".join(map(str, OPUS_RATES))
        fix = "pass --rate 16000, or --encode flac"
        raise ConfigError(f"--encode opus at {settings.rate} Hz", f"one of {rates} Hz, which Opus has", fix)
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given", "one of the two", "choose one")
    if not len(source):
        raise CatalogueError("the catalogue lists no clips", "at least one", "give another catalogue")
    out = storage.absolute(out).rstrip("/")
    if source.shards is not None and any(_real(storage.parent(at)) == _real(out) for at in source.shards.shards):
        raise ConfigError(
            f"{out} holds the shards that are to be packed", "another folder for the new ones", "choose another --out"
        )
    plan = ShardPlan.make(source, out, settings)
    # A store has no locks; there two processes with one plan write the same bytes under the same names.
    with nullcontext() if storage.is_url(out) else lock.writing(Path(out)):
        if not storage.is_url(out):
            with atomic.disk_errors(Path(out)):
                Path(out).mkdir(parents=True, exist_ok=True)
        done = plan.claim(resume=resume, overwrite=overwrite)
        return _pack(source, plan, settings, done, progress)


def _pack(
    source: Catalogue, plan: ShardPlan, settings: PackSettings, finished: dict[str, int], progress: Progress
) -> Packed:
    """Write the shards that are not `finished`, and the index."""
    known, out, total = relative_names(source), plan.out, len(source)
    todo = [number for number, name in enumerate(plan.names) if name not in finished]
    kept, bad = len(finished), sum(finished.values())
    done = total - int(np.diff(plan.bounds)[todo].sum())

    def task(number: int) -> _Task:
        rows = plan.order[plan.bounds[number] : plan.bounds[number + 1]].tolist()
        return plan.names[number], [(row, known[row], source[row]) for row in rows]

    with closing(_run(map(task, todo), min(settings.workers, len(todo)), out, settings)) as results:
        try:
            progress(done, total, bad)
            for shard in results:
                plan.record(shard)
                skipped = shard["skipped"]
                finished[shard["name"]] = len(skipped)
                done, bad = done + len(shard["rows"]) + len(skipped), bad + len(skipped)
                progress(done, total, bad)
                if bad > settings.bad_files * total:
                    raise _too_many(out, bad, total, settings.bad_files, skipped)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(finished)} of {len(plan.names)} shards are written to {out}; continue with --resume"
            ) from None
    return _finish(source, plan, settings, kept)


def _real(folder: str) -> str:
    return folder if storage.is_url(folder) else os.path.realpath(folder)


def _finish(source: Catalogue, plan: ShardPlan, settings: PackSettings, kept: int) -> Packed:
    """Write the index from the shards' records, and delete them."""
    rows, order, listed, out = Rows(), [np.empty(0, np.int64)], [], plan.out
    skipped, lines, cut = Counter[str](), bytearray(), 0
    for name in plan.names:
        shard = plan.recorded(name)
        rows.extend(shard["rows"])
        order.append(np.array([row["row"] for row in shard["rows"]], np.int64))
        listed.append({key: shard[key] for key in ("name", "bytes", "sha256")})
        for row in shard["skipped"]:
            skipped[row["reason"]] += 1
            lines += json_line(row)
        cut += shard["cut"]
    if not len(rows):
        raise _too_many(out, len(source), len(source), 1.0, [json.loads(lines.splitlines()[0])])
    header = {key: value for key, value in source.header.items() if key not in (SHARD, "shards", "ignored")}
    if settings.encode != "original":
        header["encoded"] = f"{settings.encode} {settings.rate} Hz"
    header |= {"skipped": dict(sorted(skipped.items())), "shards": listed}
    index = Catalogue(header, out, rows.columns().take(np.argsort(np.concatenate(order), kind="stable")))
    if lines:
        storage.write(storage.join(out, SKIPPED), bytes(lines))
    storage.write(storage.join(out, INDEX), b"".join(index.lines(INDEX_ROOT)))
    plan.finish()
    return Packed(index, cut, kept)


def _too_many(out: str, bad: int, count: int, allowed: float, skipped: list[dict[str, Any]]) -> CatalogueError:
    first = "; ".join(f"{row['detail']}" for row in skipped[:3])
    return CatalogueError(
        f"{bad} of {count} clips cannot be read, such as: {first}",
        f"at most {allowed:.0%} (--bad-files)",
        f"mend or remove them; what was written stays in {out}, --resume continues with it",
    )


def _write(out: str, settings: PackSettings, task: _Task) -> dict[str, Any] | None:
    try:
        return tar_writer.write_shard(*task, out, settings, child_process.stopped)
    except tar_writer.StoppedError:
        return None


def _run(tasks: Iterator[_Task], workers: int, out: str, settings: PackSettings) -> Generator[dict[str, Any]]:
    """Write shards and yield what is in each as it is finished."""
    if workers <= 1:
        for task in tasks:
            yield tar_writer.write_shard(*task, out, settings, lambda: False)
        return
    try:
        write = functools.partial(_write, out, settings)
        with closing(child_process.run_tasks(write, tasks, workers, workers + 1)) as results:
            for shard in results:
                assert shard is not None
                yield shard
    except child_process.LostTasksError:
        raise TrainingError(
            "a process that wrote a shard was killed: by the system for lack of memory, or by a decoder that crashed",
            "memory for a recording in each process",
            "run it again with --resume and fewer --workers; with --workers 1 the last clip read is the culprit",
        ) from None
