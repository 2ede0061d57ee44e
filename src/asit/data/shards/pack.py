"""Catalogues packed into tar shards with an index, by several processes, stopped and gone on with.

Which clips come into which shard is settled beforehand, from the lengths of files, so that the outcome does not depend
on how many processes there are or how often they were stopped. Beside each finished shard lies what is in it, until the
index is written.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.data.catalogue import locations
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.columns import SHARD, Rows, decode, json_line
from asit.data.catalogue.locations import INDEX
from asit.data.shards import encode as members
from asit.data.shards import shard_layout, tar_writer
from asit.errors import CatalogueError, ConfigError, TrainingError
from asit.io import child_process, lock, parsing, storage

SKIPPED = "index.skipped.jsonl"
PLAN = "shards.plan.json"
"""What shards are being written here; gone when all of them are."""
_LAYOUT = 1


@dataclass(frozen=True)
class Packed:
    """What was written.

    Attributes:
        index: the catalogue of the clips in the shards.
        place: of its file.
        shards: how many.
        bytes: of all of them.
        skipped: how many clips were left out, for each reason.
        cut: how many clips are parts of their files.
        kept: shards that an earlier call had written.
    """

    index: Catalogue
    place: str
    shards: int
    bytes: int
    skipped: Counter[str]
    cut: int
    kept: int


def pack(
    source: Catalogue,
    out: str,
    *,
    encode: members.Encoding = "original",
    rate: int = 16000,
    shard_mb: float = 256.0,
    clips: int | None = None,
    shuffle: int | None = None,
    workers: int = 1,
    bad_files: float = 0.1,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Packed:
    """Write a catalogue's clips into tar shards, and the index that lists them in the catalogue's order.

    Args:
        source: the clips; files, parts of files, or clips in other shards.
        out: a folder or URL.
        encode, rate: see `encode.encode_clip`; rate in Hz.
        shard_mb: megabytes of a shard, roughly.
        clips: clips a shard instead of megabytes.
        shuffle: seed of an order in which clips are laid into shards; None: the catalogue's. The index keeps that one.
        workers: processes; the bytes written do not depend on their number.
        bad_files: largest share of clips that cannot be read.
        resume: go on with shards that lie there.
        overwrite: delete the shards that lie there.
        progress: called with (clips done, clips in all, clips left out).

    Raises:
        ConfigError: settings that cannot be, or a place that is not free or that another process is writing.
        CatalogueError: more clips than `bad_files` cannot be read, or none can.
        StoreError: a place that cannot be written or read.
        TrainingError: a process was killed by the system.
        KeyboardInterrupt: after Ctrl-C, saying how to go on.
    """
    members.check_rate(encode, rate)
    if not len(source):
        raise CatalogueError("the catalogue lists no clips", "at least one", "give another catalogue")
    out = storage.absolute(out).rstrip("/")
    if source.shards is not None and any(_real(storage.parent(place)) == _real(out) for place in source.shards.places):
        raise ConfigError(
            f"{out} holds the shards that are to be packed", "another place for the new ones", "choose another --out"
        )
    bounds, order = shard_layout.layout(source, encode, rate, shard_mb, clips, shuffle)
    names = [f"shard-{number:06d}.tar" for number in range(len(bounds) - 1)]
    plan = _plan(source, encode, rate, bounds, shuffle)
    way = tar_writer.ShardFormat(out, encode, rate)
    # A store has no locks; there two processes with one plan write the same bytes under the same names.
    with nullcontext() if storage.is_url(out) else lock.writing(Path(out)):
        there = _claim(out, plan, names, resume=resume, overwrite=overwrite)
        return _pack(source, names, bounds, order, way, there, workers, bad_files, progress)


def _pack(
    source: Catalogue,
    names: list[str],
    bounds: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    way: tar_writer.ShardFormat,
    there: dict[str, dict[str, int]],
    workers: int,
    bad_files: float,
    progress: Callable[[int, int, int], None] | None,
) -> Packed:
    """Write the shards that are not `there`, and the index; see `pack`."""
    known, out = shard_layout.names(source), way.out

    def task(number: int) -> tuple[str, list[tuple[int, str, Clip]]]:
        rows = order[bounds[number] : bounds[number + 1]].tolist()
        return names[number], [(row, known[row], source[row]) for row in rows]

    done = sum(int(bounds[i + 1] - bounds[i]) for i, name in enumerate(names) if name in there)
    bad = sum(told["skipped"] for told in there.values())
    todo = [number for number, name in enumerate(names) if name not in there]
    kept, before = len(there), done

    def begun(count: int) -> None:
        if progress:
            progress(min(before + count, len(source) - 1), len(source), bad)

    with closing(_run(map(task, todo), min(workers, len(todo)), way, begun)) as results:
        try:
            if progress:
                progress(done, len(source), bad)
            for told in results:
                storage.write(storage.join(out, _note(told["name"])), json.dumps(told).encode())
                there[told["name"]] = {"skipped": len(told["skipped"])}
                done, bad = done + len(told["rows"]) + len(told["skipped"]), bad + len(told["skipped"])
                if progress and done == len(source):
                    progress(done, len(source), bad)
                if bad > bad_files * len(source):
                    raise _too_many(out, bad, len(source), bad_files, told["skipped"])
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(there)} of {len(names)} shards are written to {out}; go on with --resume"
            ) from None
    return _finish(source, out, names, way.encode, way.rate, kept)


def _real(folder: str) -> str:
    return folder if storage.is_url(folder) else os.path.realpath(folder)


def _plan(
    source: Catalogue, encode: str, rate: int, bounds: npt.NDArray[np.int64], shuffle: int | None
) -> dict[str, Any]:
    """What must agree for shards that lie there to be of use."""
    return {
        "layout": _LAYOUT,
        "clips": len(source),
        "source": source.digest,
        "encode": encode,
        "rate": None if encode == "original" else rate,
        "shuffle": shuffle,
        "shards": len(bounds) - 1,
        "bounds": hashlib.sha256(bounds.astype("<i8").tobytes()).hexdigest(),
    }


def _note(shard: str) -> str:
    return shard.removesuffix(".tar") + ".done.json"


def _is_own(name: str) -> bool:
    draft = name.startswith((".shard-", ".shards.", ".index.")) and name.endswith(".tmp")
    number = name.removeprefix("shard-").partition(".")
    shard = name.startswith("shard-") and number[0].isdigit() and number[2] in ("tar", "done.json")
    return draft or shard or name in (INDEX, SKIPPED, PLAN)


def _claim(
    out: str, plan: dict[str, Any], names: list[str], *, resume: bool, overwrite: bool
) -> dict[str, dict[str, int]]:
    """The shards that are done already, each with how many clips were left out; the place is made ready."""
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite were both given", "one of the two", "choose one")
    tar_writer.check_out(out)
    found = storage.list(out)
    strange = [name for name in found if not _is_own(name)]
    if strange:
        raise ConfigError(
            f"{out} holds files that are not shards: {', '.join(strange[:5])}",
            "a new or empty folder for the shards",
            "choose another --out",
        )
    if found and not (resume or overwrite):
        what = "finished shards" if INDEX in found else "shards"
        raise ConfigError(
            f"{out} holds {what} already ({len(found)} files)",
            "a new or empty folder, or a choice",
            "pass --resume to go on with them, or --overwrite to delete them and start again",
        )
    if resume and PLAN in found:
        _agree(out, plan)
        return _done(out, names, found)
    if resume and INDEX in found:
        raise ConfigError(f"{out} is finished", "shards that are not", f"use it: --data {storage.join(out, INDEX)}")
    tars = [name for name in found if name.endswith(".tar")]
    if resume and tars:  # they may be another program's
        raise ConfigError(
            f"{out} holds {len(tars)} shards, such as {tars[0]}, and no {PLAN}",
            "shards that an earlier asit shard began",
            "choose another --out, or pass --overwrite to delete them and start again",
        )
    # The index first: shards without it count as unfinished.
    for name in sorted(found, key=lambda name: name != INDEX):
        storage.remove(storage.join(out, name))
    storage.write(storage.join(out, PLAN), json_line(plan))
    return {}


def _agree(out: str, plan: dict[str, Any]) -> None:
    try:
        had = parsing.from_json(decode(storage.read(storage.join(out, PLAN))), surrogates=True)
        other = [name for name in plan if had.get(name) != plan[name]]
    except (ValueError, AttributeError):
        had, other = {}, [*plan]
    if other:
        told = ", ".join(
            "other clips" if name == "source" else f"{name} {had.get(name)}, now {plan[name]}"
            for name in other
            if name != "bounds" or other == ["bounds"]
        )
        raise ConfigError(
            f"the shards in {out} were begun otherwise: {told}",
            "the same catalogue and settings, to go on with them",
            "use those again, or pass --overwrite to start again",
        )


def _done(out: str, names: list[str], found: dict[str, int | None]) -> dict[str, dict[str, int]]:
    """Shards that lie there as long as their notes say; drafts of killed writers go."""
    for name in found:
        if name.startswith("."):
            storage.remove(storage.join(out, name))
    done = {}
    for name in names:
        if name in found and _note(name) in found:
            told = _told(out, name)
            length = found[name]
            if told and told["bytes"] == (storage.size(storage.join(out, name)) if length is None else length):
                done[name] = {"skipped": len(told["skipped"])}
    return done


def _told(out: str, name: str) -> dict[str, Any]:
    try:
        told = parsing.from_json(decode(storage.read(storage.join(out, _note(name)))), surrogates=True)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _finish(source: Catalogue, out: str, names: list[str], encode: members.Encoding, rate: int, kept: int) -> Packed:
    """Put the index together from the shards' notes, write it, and delete them."""
    rows, where, listed = Rows(), [np.empty(0, np.int64)], []
    skipped, left, cut = Counter[str](), bytearray(), 0
    for name in names:
        told = _told(out, name)
        rows.extend(told["rows"])
        where.append(np.array([row["row"] for row in told["rows"]], np.int64))
        listed.append({key: told[key] for key in ("name", "bytes", "sha256")})
        for row in told["skipped"]:
            skipped[row["reason"]] += 1
            left += json_line(row)
        cut += told["cut"]
    if not len(rows):
        raise _too_many(out, len(source), len(source), 1.0, [json.loads(left.splitlines()[0])])
    facts = {key: value for key, value in source.header.items() if key not in (SHARD, "shards", "ignored")}
    if encode != "original":
        facts["encoded"] = f"{encode} {rate} Hz"
    header = facts | {"skipped": dict(sorted(skipped.items())), "shards": listed}
    index = Catalogue(header, out, rows.columns().take(np.argsort(np.concatenate(where), kind="stable")))
    if left:
        storage.write(storage.join(out, SKIPPED), bytes(left))
    place = storage.join(out, INDEX)
    storage.write(place, b"".join(index.lines(locations.HERE)))
    for name in [*map(_note, names), PLAN]:
        storage.remove(storage.join(out, name))
    total = sum(int(shard["bytes"]) for shard in listed)
    return Packed(index, place, len(names), total, skipped, cut, kept)


def _too_many(out: str, bad: int, count: int, allowed: float, skipped: list[dict[str, Any]]) -> CatalogueError:
    first = "; ".join(f"{row['detail']}" for row in skipped[:3])
    return CatalogueError(
        f"{bad} of {count} clips cannot be read, such as: {first}",
        f"at most {allowed:.0%} (--bad-files)",
        f"mend or remove them; what was written stays in {out}, --resume goes on with it",
    )


_stopped: Any = None
_begun: Any = None


def _start(stopped: Any, begun: Any) -> None:
    global _stopped, _begun
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    _stopped, _begun = stopped, begun
    # Decoders are hushed, by their number of the stream; warnings of ours still come.
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    child_process.settle()


def _is_stopped() -> bool:
    with _begun.get_lock():
        _begun.value += 1
    return bool(_stopped.value)


def _write(name: str, clips: list[tuple[int, str, Clip]], way: tar_writer.ShardFormat) -> dict[str, Any] | None:
    try:
        return tar_writer.write_shard(name, clips, way, _is_stopped)
    except tar_writer.StoppedError:
        return None


def _run(
    tasks: Iterator[tuple[str, list[tuple[int, str, Clip]]]],
    workers: int,
    way: tar_writer.ShardFormat,
    show: Callable[[int], None],
) -> Generator[dict[str, Any]]:
    """What became of the shards, as they are finished; `show` hears how many clips were begun."""
    if workers <= 1:
        counted = itertools.count(1)

        def count() -> bool:
            show(next(counted))
            return False

        for name, clips in tasks:
            yield tar_writer.write_shard(name, clips, way, count)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    stopped = context.RawValue(ctypes.c_bool, False)
    begun = context.Value(ctypes.c_longlong, 0)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(stopped, begun))
    waiting: set[Future[dict[str, Any] | None]] = set()
    try:
        while True:
            for name, clips in itertools.islice(tasks, workers + 1 - len(waiting)):
                waiting.add(executor.submit(_write, name, clips, way))
            if not waiting:
                return
            done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            show(int(begun.value))
            for future in done:
                told = future.result()
                assert told is not None
                yield told
    except BrokenProcessPool:
        raise TrainingError(
            "a process that wrote a shard was killed: by the system for lack of memory, or by a decoder that crashed",
            "memory for a recording in each process",
            "run it again with --resume and fewer --workers; with --workers 1 the last clip read is the culprit",
        ) from None
    finally:
        stopped.value = True
        executor.shutdown(cancel_futures=True)
