"""Checks of audio files in worker processes, and the log-mel statistics of a sample of them.

Torch is imported only to measure the mean and std.
"""

from __future__ import annotations

import functools
import math
import os
import stat
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from asit.audio import files
from asit.config import FrontEndSettings
from asit.data.catalogue.listing import Listing, Span
from asit.errors import AudioError, CatalogueError
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
    labels: Literal["auto", "folder", "annotations", "none"] = "auto"

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
        if child_process.stopped():
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
    info, seconds, wave = _check_audio(path, settings, task)
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


def _check_audio(path: str, settings: ScanSettings, task: ScanTask) -> tuple[files.AudioInfo, float, files.Wave | None]:
    """Return a clip's header, its length, s, and the waveform to measure, if any; a full check decodes the clip."""
    front_end, full = settings.front_end, settings.check == "full"
    info: files.AudioInfo | None = None
    part, keep, wave = None, None, None
    if task.span is not None or task.key is not None or not full:  # else the file is opened once only
        info = files.probe(path)
        seconds = info.seconds
        if task.span is not None:
            start, end = task.span
            if info.frames < 1:  # some headers have no length
                info = files.inspect(path).info
            if start >= info.seconds:
                found = f"{path}: starts at {start:g} s, and the file ends at {info.seconds:.3f} s"
                raise files.AudioFileError("outside the file", found)
            part = start, info.seconds if end is None else min(end, info.seconds)
            seconds = part[1] - start
            if seconds * 1000 < front_end.window_ms:
                return info, seconds, None
        if task.key is not None:
            rng = np.random.default_rng([settings.seed, task.key])
            keep = rng.uniform(0.0, max(0.0, seconds - MEASURED_SECONDS)), MEASURED_SECONDS
    if info is None or full or info.frames < 1:
        inspected = files.inspect(path, part=part, keep=keep)
        _refuse_faults(inspected, settings.silence_db)
        if info is None or part is None:
            info, seconds = inspected.info, inspected.info.seconds
        if keep:
            wave = files.resample(inspected.wave, inspected.info.rate, front_end.rate, front_end.resampler)
    elif keep and part:
        wave = _read(path, part[0] + keep[0], min(keep[1], seconds - keep[0]), front_end)
    elif keep:
        wave = _read(path, *keep, front_end)
    return info, seconds, wave


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


def unusable(
    what: str, good: int, skipped: Sequence[Mapping[str, Any]], bad_files: float, remedy: str
) -> CatalogueError | None:
    """Make the error about more bad clips than a share of `bad_files` allows; None where there are no more.

    Args:
        what: that was checked, such as "files checked in FOLDER".
        good: number of good clips; none are always too few.
        skipped: a row with "reason" and "detail" for each bad one.
        bad_files: the largest share.
        remedy: the fix, beside a larger share.
    """
    bad, checked = len(skipped), len(skipped) + good
    if good and bad <= bad_files * checked:
        return None
    counts = ", ".join(f"{n} {reason}" for reason, n in Counter(row["reason"] for row in skipped).most_common())
    first = "".join(f"\n    {row['reason']}: {row['detail']}" for row in skipped[:5])
    if good:
        remedy += f"; or allow more: bad_files={math.ceil(100 * bad / checked) / 100} (--bad-files)"
    expected = f"a share of at most {bad_files:g}" if good else "at least one that is usable"
    return CatalogueError(f"{bad} of the {checked} {what} cannot be used: {counts}{first}", expected, remedy)


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


def statistics(total: float, squares: float, count: int, clips: int) -> dict[str, Any]:
    """Return a header's entries on the log-mel from the sums over some clips; float64 is ample for -16 to 20."""
    mean = total / count if count else None
    std = None if mean is None else math.sqrt(max(0.0, squares / count - mean * mean))
    return {"mean": mean, "std": std, "statistics_clips": clips}
