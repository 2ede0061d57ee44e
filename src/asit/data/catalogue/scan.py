"""From a folder or a table to a catalogue: each clip looked at once, the bad ones left out, the log-mel measured.

Results wait in a file beside the catalogue, from which a scan that was stopped goes on.
"""

# Paths are text here: a Path for each of two million would cost minutes.
# ruff: noqa: PTH100, PTH116, PTH118, PTH123

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asit.audio import files
from asit.config import FrontEndSettings
from asit.data.catalogue import checks, tables
from asit.data.catalogue.catalogue import LINES, Catalogue, is_catalogue, replacing
from asit.data.catalogue.columns import DAMAGE, Rows, decode, json_line
from asit.data.catalogue.listing import Listing, list_files, list_rows
from asit.errors import CatalogueError
from asit.io import local_files, lock, parsing

_PARTIAL = 1  # version of the layout of the file of results so far
_WHOLE = 10_000  # fewer files than this are all looked at, so that the list of bad ones is complete


def build(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    front_end: FrontEndSettings | None = None,
    workers: int | Literal["auto"] = "auto",
    check: Literal["full", "header"] = "full",
    checksum: bool = False,
    bad_files: float = 0.1,
    statistics_clips: int = 1000,
    silence_db: float | None = -90.0,
    restart: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
    seed: int = 0,
    labels: Literal["auto", "folder", "none"] = "auto",
    rows: Iterable[tables.TableRow] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Catalogue:
    """Scan a folder or a table, leave out what cannot be used, measure the log-mel, and write ``out``.

    Beside ``c.jsonl`` stands ``c.skipped.jsonl``: each clip left out, with its reason (missing, unreadable, empty,
    too short, outside the file, truncated, non-finite, out of range, cancelled, silent) and the detail. While it works,
    results go to ``c.jsonl.partial``; a scan that was stopped goes on from there, and its outcome is the same to the
    byte. Clips found bad are looked at again, and so are files whose size or time of change differ.

    A clip that is a part of its file is looked at by itself: it alone is decoded, and it alone is measured. A part that
    ends after its file is shortened to it, and counted in the header ("shortened").

    Args:
        source: a folder, searched through all its levels (hidden names left out), or a table
            (:func:`asit.data.catalogue.tables.read_table`).
        out: the catalogue's path; an older catalogue there is replaced.
        front_end: decides the log-mel that mean and std are measured on; None: the default settings.
        workers: processes; "auto": one for each CPU this process may use.
        check: "full" decodes every file, "header" only opens it.
        checksum: store the SHA-256 of each file.
        bad_files: largest share of unusable files.
        statistics_clips: files in the sample for mean and std, at most 10 s of each from a drawn position;
            0: not measured.
        silence_db: a file is silent when half the way from its lowest to its highest sample is below this, in dB of
            full scale (one step of 16 bits: -90.3 dB); a constant offset is silence. None: silent files are kept.
        restart: throw away what an earlier scan left.
        progress: called with (files done, files in all, bad files).
        seed: of the sample and its positions.
        labels: for a folder: "folder" labels each recording by the sub-folder it lies in: CLASS, or SPLIT/CLASS or
            CLASS/SPLIT where folders are named after splits; "auto" and "none" label none. A table brings its own
            labels.
        rows: what is scanned instead of all that lies in the source, which is then only the folder that paths are kept
            relative to; taken in one at a time. Paths are normalised, and absolute or relative to the source.
        facts: further entries of the header, such as "task" and "classes".

    Raises:
        ConfigError: another process is writing ``out``.
        CatalogueError: nothing to list, too many bad files, or a place that cannot be written.
        KeyboardInterrupt: after Ctrl-C, saying how to go on; what was done is kept.
    """
    source, out = Path(local_files.locate(os.fspath(source))), Path(out)
    if not 0 <= bad_files <= 1 or statistics_clips < 0 or (workers != "auto" and workers < 1):
        raise CatalogueError(
            f"bad_files={bad_files}, statistics_clips={statistics_clips}, workers={workers}",
            "a share from 0 to 1, a count from 0, and 'auto' or at least 1 worker",
            "change them",
        )
    _refuse(source, out)
    if labels != "auto" and (rows is not None or not source.is_dir()):
        raise CatalogueError(
            f"labels='{labels}' for {'rows' if rows is not None else source}",
            "a folder, whose sub-folders may be labels; a table has labels of its own",
            "leave labels at auto",
        )
    if rows is None:
        listing = list_files(source, folder_labels=labels == "folder")
    else:
        listing = list_rows(os.path.abspath(source), rows)
    if not len(listing):
        raise CatalogueError(f"no clips were named in {source}", "at least one", "check the data set's folder")
    plan = checks.Plan(listing.root, check, checksum, silence_db, seed, front_end or FrontEndSettings())
    listing.draw(statistics_clips, seed)
    if labels == "folder" and "split" in listing.words:
        facts = {**(facts or {}), "folders": "the sub-folders are splits and classes"}
    with lock.writing(out):
        return _scan(source, out, listing, plan, workers, bad_files, statistics_clips, restart, progress, facts)


def _scan(
    source: Path,
    out: Path,
    listing: Listing,
    plan: checks.Plan,
    workers: int | Literal["auto"],
    bad_files: float,
    statistics_clips: int,
    restart: bool,
    progress: Callable[[int, int, int], None] | None,
    facts: Mapping[str, Any] | None,
) -> Catalogue:
    """Look at the clips of a listing that are not in OUT.partial, and write the catalogue; see `build`."""
    with _Partial(Path(f"{out}.partial"), plan.fingerprint(source, statistics_clips), listing, restart) as partial:
        todo = np.flatnonzero(partial.offsets < 0)
        processes = min(_cpus() if workers == "auto" else workers, max(1, len(todo) // 8))
        _gather(checks.run(listing, todo, plan, processes), partial, len(listing), bad_files, progress)
        found, skipped, counts, sums = partial.collect(listing)
    if len(skipped) > bad_files * len(listing) or not len(found):
        raise _too_many(source, len(found) + len(skipped), skipped, counts, bad_files, partial.path)
    mean, std = sums.moments()
    header = {
        **(facts or {}),
        "mean": mean,
        "std": std,
        "statistics_clips": sums.clips,
        "front_end": plan.spectrum(),
        "check": plan.check,
        "silence_db": plan.silence_db,
        "seed": plan.seed,
        "skipped": dict(sorted(counts.items())),
        "ignored": listing.ignored,
    }
    if listing.starts is not None:
        header["shortened"] = sums.shortened
    catalogue = Catalogue(header, listing.root, found.columns())
    with replacing(_beside(out)) as file:
        for row in skipped:
            file.write(json_line(row))
    catalogue.write(out)
    partial.path.unlink()
    return catalogue


def _gather(
    results: Generator[list[checks.Result]],
    partial: _Partial,
    total: int,
    bad_files: float,
    progress: Callable[[int, int, int], None] | None,
) -> None:
    """Write results down as they come, to the end or until too many files are bad."""
    bad = 0
    with closing(results):
        try:
            if progress:
                progress(partial.done, total, bad)
            for chunk in results:
                bad += partial.append(chunk)
                if progress:
                    progress(partial.done, total, bad)
                if total >= _WHOLE and bad > bad_files * total:
                    return
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {partial.done} of {total} files; the same command goes on from {partial.path}"
            ) from None
    assert partial.done == total, "the scan lost files"


def _refuse(source: Path, out: Path) -> None:
    """Errors that cost nothing to find."""
    if not source.exists():
        raise CatalogueError(
            f"there is no {source}", "a folder of recordings, or a table", "check the path" + tables.near(source)
        )
    if (kind := local_files.special(source)) is not None:
        raise CatalogueError(f"{source} is {kind}", "a folder of recordings, or a table", "save it to a file first")
    if source.is_file():
        if source.suffix.lower() in files.SUFFIXES:
            raise CatalogueError(f"{source} is one recording", "a folder or a table", "give the folder it lies in")
        if is_catalogue(source):
            raise CatalogueError(
                f"{source} is already a catalogue",
                "a folder of recordings, or a table",
                "use it as it is: asit pretrain takes it",
            )
    if out.is_dir():
        raise CatalogueError(f"{out} is a folder", "a file's name for the catalogue", f"write to {out / 'c.jsonl'}")
    if out.exists() and not is_catalogue(out):
        raise CatalogueError(
            f"{out} exists and is not a catalogue", "a new name, or an older catalogue", "choose another name"
        )
    if out.exists() and Catalogue.read(out).shards is not None:
        raise CatalogueError(
            f"{out} is the index of tar shards, which cannot be read without it",
            "a new name, or an older catalogue without shards",
            "choose another name",
        )


def _beside(out: Path) -> Path:
    return out.with_name(out.name.removesuffix(".jsonl") + ".skipped.jsonl")


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Partial:
    """The file of results so far: a line for the plan, then one line a file, in the order they came.

    Only the place of each line is kept in memory. A torn last line, of a killed process, is cut off.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], listing: Listing, restart: bool) -> None:
        self.path = path
        self.offsets = np.full(len(listing), -1, np.int64)
        self.done = 0
        first = json_line({"asit_partial": _PARTIAL, **fingerprint})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            end = 0 if restart or not path.exists() else self._load(first, listing)
            self.file = open(path, "r+b" if end else "wb")  # noqa: SIM115  (closed by __exit__)
            self.file.truncate(end)
            self.file.seek(end)
            if not end:
                self.file.write(first)
            self.end = self.file.tell()
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        except OSError as error:
            raise self._unwritable(error) from None

    def _load(self, first: bytes, listing: Listing) -> int:
        """Take over the results that still hold; the length of the file without a torn last line."""
        with open(self.path, "rb") as lines:
            found = lines.readline()
            if not found.endswith(b"\n"):
                return 0
            self._agree(found, first)
            end = lines.tell()
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                place = _still_holds(line, listing)
                if place is not None:
                    self._note(place, end)
                end += len(line)
        return end

    def _note(self, place: int, start: int) -> None:
        self.done += int(self.offsets[place] < 0)
        self.offsets[place] = start

    def _agree(self, found: bytes, first: bytes) -> None:
        wanted = json.loads(first)
        try:
            had = parsing.from_json(decode(found), surrogates=True)
            names = [name for name in wanted if had.get(name) != wanted[name]]
        except (ValueError, AttributeError):
            had, names = {}, list(wanted)
        if names:
            told = ", ".join(f"{name} {json.dumps(had.get(name))}, now {json.dumps(wanted[name])}" for name in names)
            raise CatalogueError(
                f"{self.path} is from a scan with other settings: {told}",
                "the same settings, to go on from there",
                "use those settings again, or start afresh with restart=True (--restart)",
            )

    def append(self, results: list[checks.Result]) -> int:
        """Keep results; how many of them are bad."""
        try:
            for place, line, _ in results:
                self._note(place, self.end)
                self.end += len(line)
                self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise self._unwritable(error) from None
        return sum(bad for *_, bad in results)

    def collect(self, listing: Listing) -> tuple[Rows, list[dict[str, Any]], Counter[str], _Sums]:
        """Everything in the listing's order: clips, files left out, counts by reason, and the log-mel's sums."""
        rows, batch = Rows(), []
        skipped: list[dict[str, Any]] = []
        sums = _Sums()
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for place in np.flatnonzero(self.offsets >= 0).tolist():
                start = int(self.offsets[place])
                row = json.loads(decode(lines[start : lines.find(b"\n", start)]))
                if "reason" in row:
                    skipped.append({name: row[name] for name in ("path", "part", "reason", "detail") if name in row})
                    continue
                sums.shortened += row.get("shortened", False)
                if "sums" in row:
                    sums.add(*row["sums"])
                row |= {name: column[place] for name, column in listing.words.items()}
                batch.append(row)
                if len(batch) == LINES:
                    rows.extend(batch)
                    batch = []
            rows.extend(batch)
        return rows, skipped, Counter(row["reason"] for row in skipped), sums

    def _unwritable(self, error: OSError) -> CatalogueError:
        return CatalogueError(
            f"{self.path} cannot be written: {error.strerror}",
            "a folder that can be written, with room",
            "free or change it; the same command then goes on where it stopped",
        )


def _still_holds(line: bytes, listing: Listing) -> int | None:
    """The place of the file that a line is about; None if it must be looked at again: it was bad, or has changed."""
    try:
        row = json.loads(decode(line))
        name, stamp = row["path"], (row["size"], row["mtime_ns"])
        part = tuple(row["part"]) if "part" in row else None
    except DAMAGE:
        return None  # a bad file, or what a crash of the machine left
    place = None if "reason" in row else listing.place(name, part)
    if place is None or (listing.sampled[place] and "sums" not in row):
        return None
    try:
        status = os.stat(os.path.join(listing.root, name))
    except OSError:
        return None
    return place if stamp == (status.st_size, status.st_mtime_ns) else None


@dataclass
class _Sums:
    """What mean and std are made of; float64 is ample for log-mel values, which lie within -16 and 20."""

    clips: int = 0
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    shortened: int = 0  # clips whose end lay beyond their file's

    def add(self, total: float, squares: float, count: int) -> None:
        self.clips += 1
        self.count += count
        self.total += total
        self.squares += squares

    def moments(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of the population."""
        if not self.count:
            return None, None
        mean = self.total / self.count
        return mean, math.sqrt(max(0.0, self.squares / self.count - mean * mean))


def _too_many(
    source: Path, looked: int, skipped: list[dict[str, Any]], counts: Counter[str], bad_files: float, partial: Path
) -> CatalogueError:
    bad = len(skipped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    first = "".join(f"\n    {row['reason']}: {row['detail']}" for row in skipped[:5])
    remedy = f"mend or remove them; {partial} lists each with its reason"
    if bad < looked:
        remedy += f"; or allow more: bad_files={math.ceil(100 * bad / looked) / 100} (--bad-files)"
    return CatalogueError(
        f"{bad} of the {looked} files looked at in {source} cannot be used: {reasons}{first}",
        f"a share of at most {bad_files:g}" if bad < looked else "at least one file that can be used",
        remedy,
    )
