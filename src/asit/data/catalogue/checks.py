"""Checks of audio files in worker processes, and the log-mel statistics of a sample of them.

Torch is imported only to measure the mean and std.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.audio import decoders, files
from asit.config import FrontEndSettings
from asit.data.catalogue.listing import Listing, Span
from asit.errors import AudioError
from asit.io import child_process, local_files

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


ScanResult = tuple[int, dict[str, Any]]
"""Row in the listing, and a line for the partial file; with a "reason" if the clip is left out."""


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
    if listing.sampled[indices].any() and sys.platform == "linux":
        import asit.audio.fbank  # noqa: F401  (once here instead of once in each worker)

    def task(index: int) -> ScanTask:
        key = int(listing.keys[index]) if listing.sampled[index] else None
        return ScanTask(index, listing.names[index], key, listing.span(index))

    size = min(_CHUNK, max(1, len(indices) // (8 * workers)))
    chunks = (list(map(task, indices[i : i + size].tolist())) for i in range(0, len(indices), size))
    return _run(functools.partial(_check_all, listing.root, settings), chunks, workers, 4 * workers)


def _run(
    check: Callable[[list[ScanTask]], list[ScanResult]], chunks: Iterator[list[ScanTask]], workers: int, ahead: int
) -> Generator[list[ScanResult]]:
    while True:
        try:
            yield from child_process.run_tasks(check, chunks, workers, ahead)
            return
        except child_process.LostTasksError as error:
            suspects = [task for chunk in error.tasks for task in chunk]
        if len(suspects) > 1:  # find the one that kills its process
            yield from _run(check, ([task] for task in suspects), 1, 1)
            continue
        (task,) = suspects
        detail = f"{task.name}: the process that read it died; its decoder crashed, or memory ran out"
        yield [(task.row, _identity(task) | {"reason": "unreadable", "detail": detail})]


def _check_all(root: str, settings: ScanSettings, tasks: list[ScanTask]) -> list[ScanResult]:
    results = []
    for task in tasks:
        if child_process.step():
            break
        path = os.path.join(root, task.name)
        row = _identity(task)
        try:
            row |= _check(path, settings, task)
        except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
            # Whatever a decoder, the resampler or the disk raises: one file must not end a scan of millions.
            reason, detail = "unreadable", f"{task.name}: {type(error).__name__}: {error}"
            if isinstance(error, files.AudioFileError):
                reason, detail = error.reason, error.found
            row |= {"reason": reason, "detail": detail.replace(path, task.name)}
        results.append((task.row, row))
    return results


def _identity(task: ScanTask) -> dict[str, Any]:
    return {"path": task.name} if task.span is None else {"path": task.name, "part": task.span}


def _check(path: str, settings: ScanSettings, task: ScanTask) -> dict[str, Any]:
    """Return the row of a good clip; a bad one raises."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise files.AudioFileError("missing", f"{path} does not exist") from None
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise files.AudioFileError("unreadable", f"{path} is a pipe or a device")  # opening it could block
    check = _check_file if task.span is None else _check_part
    info, seconds, wave = check(path, settings, task)
    if seconds * 1000 < (window_ms := settings.front_end.window_ms):
        raise files.AudioFileError("too short", f"{path}: {seconds * 1000:.1f} ms, and a window takes {window_ms:g} ms")
    row: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    row |= {"seconds": seconds, "rate": info.rate, "channels": info.channels}
    if task.span is not None:
        start, end = task.span
        # Less than a sample after the end comes from rounding in the table.
        row |= {"start": start, "shortened": end is not None and (end - info.seconds) * info.rate >= 1}
    if settings.checksum:
        row["sha256"] = local_files.sha256(Path(path))
    if wave is not None:
        row["sums"] = _sums(path, wave, settings.front_end)
    return row


_Checked = tuple[files.AudioInfo, float, files.Wave | None]
"""A good clip: its file's header, its length, s, and the waveform to measure, (S,) at the front end's rate."""


def _measured_span(settings: ScanSettings, key: int | None, seconds: float) -> tuple[float, float] | None:
    """Draw start and length, s, of what is measured in a clip of this length; None if it is not sampled."""
    if key is None:
        return None
    rng = np.random.default_rng([settings.seed, key])
    return rng.uniform(0.0, max(0.0, seconds - MEASURED_SECONDS)), MEASURED_SECONDS


def _check_file(path: str, settings: ScanSettings, task: ScanTask) -> _Checked:
    front_end, keep, wave = settings.front_end, None, None
    if settings.check == "header" or task.key is not None:
        info = files.probe(path)
        keep = _measured_span(settings, task.key, info.seconds)
    # A file that is checked in full and not sampled has no `info` here: it is opened once only.
    if settings.check == "full" or info.frames < 1:  # some headers have no length
        found = files.inspect(path, keep=keep)
        info = found.info
        _refuse_faults(found, settings.silence_db)
        if keep:
            wave = files.resample(found.wave, info.rate, front_end.rate, front_end.resampler)
    elif keep:
        wave = _read(path, *keep, front_end)
    return info, info.seconds, wave


def _check_part(path: str, settings: ScanSettings, task: ScanTask) -> _Checked:
    """Check a part of a file against the file's length; a full check decodes the part alone."""
    front_end, (start, end), full = settings.front_end, task.span or (0.0, None), settings.check == "full"
    with decoders.open_audio(path) as decoder:
        info = decoder.info
        if info.frames < 1 or (full and decoder.slack is None):
            info = files.inspect(path).info  # the header has no length, or an estimate
        if start >= info.seconds:
            found = f"{path}: starts at {start:g} s, and the file ends at {info.seconds:.3f} s"
            raise files.AudioFileError("outside the file", found)
        last = info.seconds if end is None else min(end, info.seconds)
        keep = _measured_span(settings, task.key, last - start)
        wave = decoder.read(round(start * info.rate), round(last * info.rate)) if full else None
    if wave is not None and len(wave):  # else the caller finds it too short
        low, high = float(wave.min()), float(wave.max())
        _refuse_faults(files.Inspection(info=info, low=low, high=high, wave=wave), settings.silence_db)
    if keep is None:
        return info, last - start, None
    if wave is None:
        wave = _read(path, start + keep[0], min(keep[1], last - start - keep[0]), front_end)
        return info, last - start, wave
    begin, length = round(keep[0] * info.rate), round(keep[1] * info.rate)
    wave = files.resample(wave[begin : begin + length], info.rate, front_end.rate, front_end.resampler)
    return info, last - start, wave


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


def _sums(path: str, wave: files.Wave, settings: FrontEndSettings) -> tuple[float, float, int]:
    """Return sum, sum of squares and count of the log-mel values of a waveform at the front end's rate."""
    import torch

    from asit.audio.fbank import logmel_statistics

    front_end = _front_end(settings.model_dump_json())
    if len(wave) < front_end.window:  # resampling can lose the last sample of a window
        return 0.0, 0.0, 0
    total, squares, count = logmel_statistics(front_end.fbank(torch.from_numpy(wave)[None]))
    if not (math.isfinite(total) and math.isfinite(squares)):  # it would make the mean of all clips NaN
        raise files.AudioFileError("non-finite", f"{path}: its log-mel holds values that are NaN or infinite")
    return total, squares, count
