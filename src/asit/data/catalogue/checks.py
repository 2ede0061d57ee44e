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
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from asit.audio import decoders, files
from asit.config import FrontEndSettings
from asit.data.catalogue.columns import json_line
from asit.data.catalogue.listing import Listing, Part
from asit.errors import AudioError
from asit.io import child_process

if TYPE_CHECKING:
    from asit.audio.fbank import FrontEnd

MEASURED_SECONDS = 10.0
"""At most this much of a file enters the mean and std."""

_CHUNK = 32  # files handed to a worker at once

# Place in the listing, name, the key for the draw where it is sampled, and the part of the file where it is one.
Task = tuple[int, str, int | None, Part | None]
Result = tuple[int, bytes, bool]  # place in the listing, its line for the partial file, whether it is bad


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker must know."""

    root: str
    check: str
    checksum: bool
    silence_db: float | None
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
            (
                place,
                listing.names[place],
                int(listing.keys[place]) if listing.sampled[place] else None,
                listing.part(place),
            )
            for place in places.tolist()
        ]

    def alone(suspects: list[Task]) -> Iterator[list[Result]]:
        """One file at a time, so that a process that dies tells which file it died of."""
        executor = pool(1)
        try:
            for place, name, key, part in suspects:
                try:
                    results = executor.submit(_look, [(place, name, key, part)]).result()
                except BrokenProcessPool:
                    detail = f"{name}: the process that read it died; its decoder crashed, or memory ran out"
                    row = _named(name, part) | {"reason": "unreadable", "detail": detail}
                    results = [(place, json_line(row), True)]
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
    child_process.settle()


def _look(tasks: list[Task]) -> list[Result]:
    plan, results = _Worker.plan, []
    for place, name, key, part in tasks:
        if _Worker.stopped.value:
            break
        path = os.path.join(plan.root, name)
        row = _named(name, part)
        try:
            row |= _inspect(path, plan, key, part)
        except files.AudioFileError as error:
            row |= {"reason": error.reason, "detail": error.found.replace(path, name)}
        except _Verdict as error:
            row |= {"reason": error.reason, "detail": f"{name}: {error}"}
        except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
            # Whatever a decoder, the resampler or the disk comes up with: one file must not end a scan of millions.
            row |= {"reason": "unreadable", "detail": f"{name}: {type(error).__name__}: {error}".replace(path, name)}
        results.append((place, json_line(row), "reason" in row))
    return results


def _named(name: str, part: Part | None) -> dict[str, Any]:
    return {"path": name} if part is None else {"path": name, "part": part}


class _Verdict(Exception):  # noqa: N818  (not an error)
    """Why a clip is left out though its file is sound."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def _inspect(path: str, plan: Plan, key: int | None, part: Part | None) -> dict[str, Any]:
    """What the partial file says of a good clip; a bad one raises."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise files.AudioFileError("missing", f"{path} does not exist") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise files.AudioFileError("unreadable", f"{path} is a pipe or a device")  # opening it could wait for ever
    settings = plan.front_end
    look = _whole(path, plan, key) if part is None else _piece(path, plan, key, part)
    if look.seconds * 1000 < settings.window_ms:
        length = f"{look.seconds * 1000:.1f} ms"
        raise _Verdict("too short", f"{length}, and a window takes {settings.window_ms:g} ms")
    row: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"seconds": look.seconds, "rate": look.info.rate, "channels": look.info.channels}
    if part is not None:
        row |= {"start": part[0], "shortened": look.shortened}
    if plan.checksum:
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if look.wave is not None:
        row["sums"] = _sums(look.wave, plan)
    return row


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at a clip showed.

    Attributes:
        info: the file's header.
        seconds: length of the clip.
        wave: (S,) what mean and std are measured on, at the front end's rate; None where the clip is not sampled.
        shortened: the table's end lies beyond the file's.
    """

    info: files.AudioInfo
    seconds: float
    wave: files.Wave | None = None
    shortened: bool = False


def _window(plan: Plan, key: int | None, seconds: float) -> tuple[float, float] | None:
    """Start and length, s, of what is measured in a clip of this length; None where it is not sampled."""
    if key is None:
        return None
    rng = np.random.default_rng([plan.seed, key])
    return rng.uniform(0.0, max(0.0, seconds - MEASURED_SECONDS)), MEASURED_SECONDS


def _whole(path: str, plan: Plan, key: int | None) -> _Seen:
    settings, keep, wave = plan.front_end, None, None
    if plan.check == "header" or key is not None:
        info = files.probe(path)
        keep = _window(plan, key, info.seconds)
    # Only a full check of a file that is not sampled comes here without `info`, so as to open the file but once.
    if plan.check == "full" or info.frames < 1:  # some headers say no length
        seen = files.inspect(path, keep=keep)
        info = seen.info
        _refuse_sound(seen, plan.silence_db)
        if keep:
            wave = files.resample(seen.wave, info.rate, settings.rate, settings.resampler)
    elif keep:
        wave = _part(path, *keep, settings)
    return _Seen(info, info.seconds, wave)


def _piece(path: str, plan: Plan, key: int | None, part: Part) -> _Seen:
    """A part of a file: its place is compared with the file's length, and in a full check it alone is decoded.

    A file of several parts is opened for each of them.
    """
    settings, (start, end) = plan.front_end, part
    with decoders.open_audio(path) as source:
        info, wave = source.info, None
        if info.frames < 1 or (plan.check == "full" and source.slack is None):
            info = files.inspect(path).info  # the header says no length, or guesses it
        if start >= info.seconds:
            raise _Verdict("outside the file", f"starts at {start:g} s, and the file ends at {info.seconds:.3f} s")
        last = info.seconds if end is None else min(end, info.seconds)
        keep = _window(plan, key, last - start)
        if plan.check == "full":
            first, stop = round(start * info.rate), round(last * info.rate)
            wave = source.read(first, stop)
            if len(wave):  # else it is too short, as the caller will see
                low, high = float(wave.min()), float(wave.max())
                _refuse_sound(files.Inspection(info, info.frames, False, low, high, wave), plan.silence_db)
            if keep:
                begin, length = round(keep[0] * info.rate), round(keep[1] * info.rate)
                kept = wave[begin : begin + length]
                wave = files.resample(kept, info.rate, settings.rate, settings.resampler)
    if keep and plan.check == "header":
        wave = _part(path, start + keep[0], min(keep[1], last - start - keep[0]), settings)
    # Less than a sample beyond the end is a matter of how the table's times are rounded.
    beyond = end is not None and (end - info.seconds) * info.rate >= 1
    return _Seen(info, last - start, wave if keep else None, beyond)


def _refuse_sound(seen: files.Inspection, silence_db: float | None) -> None:
    fault = seen.fault
    if fault and fault.reason != "silent":
        raise fault
    swing = (seen.high - seen.low) / 2  # so that a constant offset is silence too
    if silence_db is not None and swing < 10 ** (silence_db / 20):
        level = f"{20 * math.log10(swing):.1f} dB" if swing else "nothing"
        raise files.AudioFileError("silent", f"{seen.info.path} swings by {level}, below {silence_db:g} dB")


def _part(path: str, start: float, seconds: float, settings: FrontEndSettings) -> npt.NDArray[np.float32]:
    try:
        return files.read(path, rate=settings.rate, start=start, seconds=seconds, resampler=settings.resampler)
    except files.AudioFileError:
        raise
    except AudioError:  # nothing there: the header's length was a guess
        return files.read(path, rate=settings.rate, seconds=seconds, resampler=settings.resampler)


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
    total, squares, count = logmel_statistics(front_end.fbank(torch.from_numpy(wave)[None]))
    if not (math.isfinite(total) and math.isfinite(squares)):  # it would make the mean of all clips NaN
        raise _Verdict("non-finite", "its log-mel holds values that are NaN or infinite")
    return total, squares, count
