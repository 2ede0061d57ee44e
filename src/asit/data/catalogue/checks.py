"""Checks of audio files in worker processes, and the log-mel statistics of a sample of them.

Torch is imported only to measure the mean and std.
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
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.audio import decoders, files
from asit.config import FrontEndSettings
from asit.data.catalogue.columns import json_line
from asit.data.catalogue.listing import Listing, Span
from asit.errors import AudioError
from asit.io import child_process

if TYPE_CHECKING:
    from asit.audio.fbank import FrontEnd

MEASURED_SECONDS = 10.0
"""At most this much of a file enters the mean and std."""

_CHUNK = 32  # files given to a worker at once


class ScanTask(NamedTuple):
    """A clip to check: its row in the listing, file name, seed of its draws if it is sampled, and part of the file."""

    row: int
    name: str
    key: int | None
    span: Span | None


class ScanResult(NamedTuple):
    """Row in the listing, line for the partial file, and whether the clip is left out."""

    row: int
    line: bytes
    bad: bool


@dataclass(frozen=True, slots=True)
class ScanSettings:
    """Settings of a scan that its results depend on; see :func:`asit.data.catalogue.scan.build`."""

    front_end: FrontEndSettings = field(default_factory=FrontEndSettings)
    check: Literal["full", "header"] = "full"
    checksum: bool = False
    silence_db: float | None = -90.0
    seed: int = 0
    statistics_clips: int = 1000
    bad_files: float = 0.1
    labels: Literal["auto", "folder", "none"] = "auto"

    def fingerprint(self, source: Path) -> dict[str, Any]:
        """Return what must be equal for the results of an earlier scan to be reused."""
        names = ("check", "checksum", "silence_db", "seed", "statistics_clips")
        settings = {name: getattr(self, name) for name in names}
        return {"source": os.path.abspath(source), **settings, "front_end": spectrum(self.front_end)}


def spectrum(front_end: FrontEndSettings) -> dict[str, Any]:
    """Return the settings of the front end that mean and std depend on."""
    settings: dict[str, Any] = front_end.model_dump(mode="json", exclude={"mean", "std", "padding"})
    return settings


def run(
    listing: Listing, indices: npt.NDArray[np.int64], settings: ScanSettings, workers: int
) -> Generator[list[ScanResult]]:
    """Check clips of a listing in worker processes; yields the results in chunks as they come."""
    if not len(indices):
        return
    # Fork shares what is imported; macOS and Windows cannot, and start from scratch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    if listing.sampled[indices].any() and context.get_start_method() == "fork":
        import asit.audio.fbank  # noqa: F401  (once here instead of once in each worker)

    stopped = context.RawValue(ctypes.c_bool, False)
    state = (listing.root, settings, stopped)

    def pool(processes: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=state)

    def task(index: int) -> ScanTask:
        key = int(listing.keys[index]) if listing.sampled[index] else None
        return ScanTask(index, listing.names[index], key, listing.span(index))

    def one_by_one(tasks: list[ScanTask]) -> Iterator[list[ScanResult]]:
        """Check one file at a time, to find which one kills its process."""
        executor = pool(1)
        try:
            for suspect in tasks:
                try:
                    results = executor.submit(_check_all, [suspect]).result()
                except BrokenProcessPool:
                    detail = f"{suspect.name}: the process that read it died; its decoder crashed, or memory ran out"
                    row = _identity(suspect) | {"reason": "unreadable", "detail": detail}
                    results = [ScanResult(suspect.row, json_line(row), True)]
                    executor = pool(1)
                yield results
        finally:
            executor.shutdown(cancel_futures=True)

    size = min(_CHUNK, max(1, len(indices) // (8 * workers)))
    chunks = (list(map(task, indices[i : i + size].tolist())) for i in range(0, len(indices), size))
    waiting: dict[Future[list[ScanResult]], list[ScanTask]] = {}
    executor = pool(workers)
    try:
        while True:
            try:
                for chunk in islice(chunks, 4 * workers - len(waiting)):
                    try:
                        waiting[executor.submit(_check_all, chunk)] = chunk
                    except BrokenProcessPool:
                        waiting[Future()] = chunk  # keep it: all waiting chunks are checked one by one below
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
                yield from one_by_one([task for chunk in waiting.values() for task in chunk])
                waiting.clear()
                executor = pool(workers)
    finally:
        stopped.value = True
        executor.shutdown(cancel_futures=True)


class _Worker:
    """State of a worker process."""

    root: str
    settings: ScanSettings
    stopped: Any


def _start(root: str, settings: ScanSettings, stopped: Any) -> None:
    _Worker.root, _Worker.settings, _Worker.stopped = root, settings, stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child_process.settle()


def _check_all(tasks: list[ScanTask]) -> list[ScanResult]:
    results = []
    for task in tasks:
        if _Worker.stopped.value:
            break
        path = os.path.join(_Worker.root, task.name)
        row = _identity(task)
        try:
            row |= _check(path, _Worker.settings, task)
        except files.AudioFileError as error:
            row |= {"reason": error.reason, "detail": error.found.replace(path, task.name)}
        except _LeftOut as error:
            row |= {"reason": error.reason, "detail": f"{task.name}: {error}"}
        except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
            # Whatever a decoder, the resampler or the disk raises: one file must not end a scan of millions.
            detail = f"{task.name}: {type(error).__name__}: {error}".replace(path, task.name)
            row |= {"reason": "unreadable", "detail": detail}
        results.append(ScanResult(task.row, json_line(row), "reason" in row))
    return results


def _identity(task: ScanTask) -> dict[str, Any]:
    return {"path": task.name} if task.span is None else {"path": task.name, "part": task.span}


class _LeftOut(Exception):  # noqa: N818  (not an error)
    """Why a clip is left out although its file is good."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def _check(path: str, settings: ScanSettings, task: ScanTask) -> dict[str, Any]:
    """Return the row of a good clip; a bad one raises."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise files.AudioFileError("missing", f"{path} does not exist") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise files.AudioFileError("unreadable", f"{path} is a pipe or a device")  # opening it could block
    window_ms = settings.front_end.window_ms
    if task.span is None:
        checked = _check_file(path, settings, task.key)
    else:
        checked = _check_part(path, settings, task.key, task.span)
    if checked.seconds * 1000 < window_ms:
        raise _LeftOut("too short", f"{checked.seconds * 1000:.1f} ms, and a window takes {window_ms:g} ms")
    row: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"seconds": checked.seconds, "rate": checked.info.rate, "channels": checked.info.channels}
    if task.span is not None:
        row |= {"start": task.span[0], "shortened": checked.shortened}
    if settings.checksum:
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    if checked.wave is not None:
        row["sums"] = _sums(checked.wave, settings.front_end)
    return row


@dataclass(frozen=True, slots=True)
class _Checked:
    """A good clip.

    Attributes:
        info: the file's header.
        seconds: length of the clip.
        wave: (S,) what mean and std are measured on, at the front end's rate; None: the clip is not sampled.
        shortened: the requested end is after the file's.
    """

    info: files.AudioInfo
    seconds: float
    wave: files.Wave | None = None
    shortened: bool = False


def _measured_span(settings: ScanSettings, key: int | None, seconds: float) -> tuple[float, float] | None:
    """Draw start and length, s, of what is measured in a clip of this length; None if it is not sampled."""
    if key is None:
        return None
    rng = np.random.default_rng([settings.seed, key])
    return rng.uniform(0.0, max(0.0, seconds - MEASURED_SECONDS)), MEASURED_SECONDS


def _check_file(path: str, settings: ScanSettings, key: int | None) -> _Checked:
    front_end, keep, wave = settings.front_end, None, None
    if settings.check == "header" or key is not None:
        info = files.probe(path)
        keep = _measured_span(settings, key, info.seconds)
    # A file that is checked in full and not sampled has no `info` here: it is opened once only.
    if settings.check == "full" or info.frames < 1:  # some headers have no length
        found = files.inspect(path, keep=keep)
        info = found.info
        _refuse_faults(found, settings.silence_db)
        if keep:
            wave = files.resample(found.wave, info.rate, front_end.rate, front_end.resampler)
    elif keep:
        wave = _read(path, *keep, front_end)
    return _Checked(info, info.seconds, wave)


def _check_part(path: str, settings: ScanSettings, key: int | None, span: Span) -> _Checked:
    """Check a part of a file against the file's length; a full check decodes the part alone."""
    front_end, (start, end) = settings.front_end, span
    with decoders.open_audio(path) as decoder:
        info, wave = decoder.info, None
        if info.frames < 1 or (settings.check == "full" and decoder.slack is None):
            info = files.inspect(path).info  # the header has no length, or an estimate
        if start >= info.seconds:
            raise _LeftOut("outside the file", f"starts at {start:g} s, and the file ends at {info.seconds:.3f} s")
        last = info.seconds if end is None else min(end, info.seconds)
        keep = _measured_span(settings, key, last - start)
        if settings.check == "full":
            wave = decoder.read(round(start * info.rate), round(last * info.rate))
            if len(wave):  # else the caller finds it too short
                low, high = float(wave.min()), float(wave.max())
                _refuse_faults(
                    files.Inspection(info=info, low=low, high=high, wave=wave),
                    settings.silence_db,
                )
            if keep:
                begin, length = round(keep[0] * info.rate), round(keep[1] * info.rate)
                wave = files.resample(wave[begin : begin + length], info.rate, front_end.rate, front_end.resampler)
    if keep and settings.check == "header":
        wave = _read(path, start + keep[0], min(keep[1], last - start - keep[0]), front_end)
    # Less than a sample after the end comes from rounding in the table.
    shortened = end is not None and (end - info.seconds) * info.rate >= 1
    return _Checked(info, last - start, wave if keep else None, shortened)


def _refuse_faults(found: files.Inspection, silence_db: float | None) -> None:
    fault = found.fault
    if fault and fault.reason != "silent":
        raise fault
    swing = (found.high - found.low) / 2  # so that a constant offset is silence too
    if silence_db is not None and swing < 10 ** (silence_db / 20):
        level = f"{20 * math.log10(swing):.1f} dB" if swing else "nothing"
        raise files.AudioFileError("silent", f"{found.info.path} swings by {level}, below {silence_db:g} dB")


def _read(path: str, start: float, seconds: float, front_end: FrontEndSettings) -> files.Wave:
    try:
        return files.read(path, rate=front_end.rate, start=start, seconds=seconds, resampler=front_end.resampler)
    except files.AudioFileError:
        raise
    except AudioError:  # nothing there: the header's length was an estimate
        return files.read(path, rate=front_end.rate, seconds=seconds, resampler=front_end.resampler)


@functools.lru_cache(maxsize=1)
def _front_end(settings: str) -> FrontEnd:
    import torch

    from asit.audio.fbank import FrontEnd

    # Workers share the CPUs, and the sums must not depend on the number of threads.
    torch.set_num_threads(1)
    return FrontEnd(FrontEndSettings.model_validate_json(settings))


def _sums(wave: files.Wave, settings: FrontEndSettings) -> tuple[float, float, int]:
    """Return sum, sum of squares and count of the log-mel values of a waveform at the front end's rate."""
    import torch

    from asit.audio.fbank import logmel_statistics

    front_end = _front_end(settings.model_dump_json())
    if len(wave) < front_end.window:  # resampling can lose the last sample of a window
        return 0.0, 0.0, 0
    total, squares, count = logmel_statistics(front_end.fbank(torch.from_numpy(wave)[None]))
    if not (math.isfinite(total) and math.isfinite(squares)):  # it would make the mean of all clips NaN
        raise _LeftOut("non-finite", "its log-mel holds values that are NaN or infinite")
    return total, squares, count
