"""Looking at files in worker processes: what each turns out to be, and the log-mel of those that are sampled.

Torch is imported only while the mean and std are measured.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH116, PTH118, PTH123

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import stat
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.data.columns import json_line
from asit.data.listing import Listing
from asit.errors import AudioError
from asit.settings import FrontEndSettings

if TYPE_CHECKING:
    from asit.audio.fbank import FrontEnd

MEASURED_SECONDS = 10.0
"""At most this much of a file enters the mean and std."""

_CHUNK = 32  # files handed to a worker at once

Task = tuple[int, str, int | None]  # place in the listing, name, and the key for the draw where it is sampled
Result = tuple[int, bytes, bool]  # place in the listing, its line for the partial file, whether it is bad


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker must know."""

    root: str
    check: str
    checksum: bool
    silence_db: float
    seed: int
    front_end: FrontEndSettings

    def spectrum(self) -> dict[str, Any]:
        """The settings that the mean and std hang on."""
        settings: dict[str, Any] = self.front_end.model_dump(mode="json", exclude={"mean", "std", "padding"})
        return settings

    def fingerprint(self, source: Path, statistics_clips: int) -> dict[str, Any]:
        """What must agree for an earlier scan's results to be of use."""
        return {
            "source": os.path.abspath(source),
            "check": self.check,
            "checksum": self.checksum,
            "silence_db": self.silence_db,
            "seed": self.seed,
            "statistics_clips": statistics_clips,
            "front_end": self.spectrum(),
        }


def run(listing: Listing, todo: npt.NDArray[np.int64], plan: Plan, workers: int) -> Generator[list[Result]]:
    """What the files turn out to be, chunk by chunk as they come; a few chunks a worker are under way at a time."""
    if not len(todo):
        return
    # Fork shares what is imported; macOS and Windows cannot, and start afresh.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    if listing.sampled[todo].any() and context.get_start_method() == "fork":
        import asit.audio.fbank  # noqa: F401  (once here instead of once in each worker)

    stopped = context.RawValue(ctypes.c_bool, False)

    def pool(processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(plan, stopped))

    def tasks(places: npt.NDArray[np.int64]) -> list[Task]:
        return [
            (place, listing.names[place], int(listing.keys[place]) if listing.sampled[place] else None)
            for place in places.tolist()
        ]

    def alone(suspects: list[Task]) -> Iterator[list[Result]]:
        """One file at a time, so that a process that dies tells which file it died of."""
        executor = pool(1)
        try:
            for place, name, key in suspects:
                try:
                    results = executor.submit(_look, [(place, name, key)]).result()
                except BrokenProcessPool:
                    detail = f"{name}: the process that read it died; its decoder crashed, or memory ran out"
                    results = [(place, json_line({"path": name, "reason": "unreadable", "detail": detail}), True)]
                    executor = pool(1)
                yield results
        finally:
            executor.shutdown(cancel_futures=True)

    size = min(_CHUNK, max(1, len(todo) // (8 * workers)))
    chunks = (tasks(todo[first : first + size]) for first in range(0, len(todo), size))
    waiting: dict[Future[list[Result]], list[Task]] = {}
    executor = pool(workers)
    try:
        while True:
            try:
                for chunk in islice(chunks, 4 * workers - len(waiting)):
                    try:
                        waiting[executor.submit(_look, chunk)] = chunk
                    except BrokenProcessPool:
                        waiting[Future()] = chunk  # so that it is not lost: all that wait are looked at below
                        raise
                if not waiting:
                    return
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    results = future.result()
                    del waiting[future]
                    yield results
            except BrokenProcessPool:
                executor.shutdown()
                yield from alone([task for chunk in waiting.values() for task in chunk])
                waiting.clear()
                executor = pool(workers)
    finally:
        stopped.value = True
        executor.shutdown(cancel_futures=True)


class _Worker:
    """This process's part in a scan; set once, when the process starts."""

    plan: Plan
    stopped: Any


def _start(plan: Plan, stopped: Any) -> None:
    _Worker.plan, _Worker.stopped = plan, stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Decoders write to the standard error by themselves and would tear the progress line.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _look(tasks: list[Task]) -> list[Result]:
    plan, results = _Worker.plan, []
    for place, name, key in tasks:
        if _Worker.stopped.value:
            break
        path = os.path.join(plan.root, name)
        row: dict[str, Any] = {"path": name}
        try:
            row |= _inspect(path, plan, key)
        except files.AudioFileError as error:
            row |= {"reason": error.reason, "detail": error.found.replace(path, name)}
        except _Short as error:
            row |= {"reason": "too short", "detail": f"{name}: {error}"}
        except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
            # Whatever a decoder, the resampler or the disk comes up with: one file must not end a scan of millions.
            row |= {"reason": "unreadable", "detail": f"{name}: {type(error).__name__}: {error}".replace(path, name)}
        results.append((place, json_line(row), "reason" in row))
    return results


class _Short(Exception):  # noqa: N818  (a verdict, not an error)
    """A file that holds no window of the front end."""


def _inspect(path: str, plan: Plan, key: int | None) -> dict[str, Any]:
    """What the partial file says of a good file; a bad one raises."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise files.AudioFileError("missing", f"{path} does not exist") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise files.AudioFileError("unreadable", f"{path} is a pipe or a device")  # opening it could wait for ever
    settings = plan.front_end
    keep = None
    if plan.check == "header" or key is not None:
        info = files.probe(path)
        if key is not None:
            rng = np.random.default_rng([plan.seed, key])
            keep = (rng.uniform(0.0, max(0.0, info.seconds - MEASURED_SECONDS)), MEASURED_SECONDS)
    wave = None
    # Only a full check of a file that is not sampled comes here without `info`, so as to open the file but once.
    if plan.check == "full" or info.frames < 1:  # some headers say no length
        seen = files.inspect(path, keep=keep)
        info = seen.info
        _refuse_sound(seen, plan.silence_db)
        if keep:
            wave = files.resample(seen.wave, info.rate, settings.rate, settings.resampler)
    elif keep:
        wave = _part(path, keep[0], settings)
    if info.seconds * 1000 < settings.window_ms:
        raise _Short(f"{info.seconds * 1000:.1f} ms, and a window takes {settings.window_ms:g} ms")
    row: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"seconds": info.seconds, "rate": info.rate, "channels": info.channels}
    if plan.checksum:
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if wave is not None:
        row["sums"] = _sums(wave, plan)
    return row


def _refuse_sound(seen: files.Inspection, silence_db: float) -> None:
    fault = seen.fault
    if fault and fault.reason != "silent":
        raise fault
    swing = (seen.high - seen.low) / 2  # so that a constant offset is silence too
    if swing < 10 ** (silence_db / 20):
        level = f"{20 * math.log10(swing):.1f} dB" if swing else "nothing"
        raise files.AudioFileError("silent", f"{seen.info.path} swings by {level}, below {silence_db:g} dB")


def _part(path: str, start: float, settings: FrontEndSettings) -> npt.NDArray[np.float32]:
    try:
        return files.read(path, rate=settings.rate, start=start, seconds=MEASURED_SECONDS, resampler=settings.resampler)
    except files.AudioFileError:
        raise
    except AudioError:  # nothing there: the header's length was a guess
        return files.read(path, rate=settings.rate, seconds=MEASURED_SECONDS, resampler=settings.resampler)


@functools.lru_cache(maxsize=1)
def _front_end(settings: str) -> FrontEnd:
    import torch

    from asit.audio.fbank import FrontEnd

    # The workers share the CPUs, and sums must not hang on how many threads made them.
    torch.set_num_threads(1)
    return FrontEnd(FrontEndSettings.model_validate_json(settings))


def _sums(wave: npt.NDArray[np.float32], plan: Plan) -> tuple[float, float, int]:
    """Sum, sum of squares and count of the log-mel values of a waveform at the front end's rate."""
    import torch

    from asit.audio.fbank import logmel_statistics

    front_end = _front_end(plan.front_end.model_dump_json())
    if len(wave) < front_end.window:  # the last sample of a window can fall to resampling
        return 0.0, 0.0, 0
    return logmel_statistics(front_end.fbank(torch.from_numpy(wave)[None]))
