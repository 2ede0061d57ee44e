"""Build a catalogue from a folder or a table: check each clip, leave out bad ones, and measure the log-mel.

Results go to a file beside the catalogue, from which an interrupted scan resumes.
"""

from __future__ import annotations

import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asit.audio import files
from asit.config import TableSettings
from asit.data.annotations import clips
from asit.data.catalogue import checks, frames, tables
from asit.data.catalogue.catalogue import LINES, Catalogue, atomic_file, is_catalogue, writing
from asit.data.catalogue.checks import ScanResult, ScanSettings
from asit.data.catalogue.columns import DAMAGE, Rows, decode, json_line
from asit.data.catalogue.listing import Listing, list_files, list_rows
from asit.errors import CatalogueError
from asit.io import child_process, local_files, lock, parsing

_PARTIAL = 1  # version of the layout of the partial file
_COMPLETE = 10_000  # a scan of fewer files never stops early, so that the list of bad ones is complete

Progress = Callable[[int, int, int], None]
"""Called with the numbers of files done, of all files, and of bad files."""


def build(
    source: Any,
    out: str | os.PathLike[str],
    *,
    workers: int | Literal["auto"] = "auto",
    restart: bool = False,
    progress: Progress = lambda done, total, bad: None,
    rows: Iterable[tables.TableRow] | None = None,
    table: TableSettings | None = None,
    facts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Catalogue:
    """Scan a folder or a table, leave out unusable clips, measure the log-mel, and write ``out``.

    ``c.skipped.jsonl`` beside ``c.jsonl`` lists each clip left out with its reason (missing, unreadable, empty, too
    short, outside the file, truncated, non-finite, out of range, cancelled, silent) and the detail. Meanwhile results
    go to ``c.jsonl.partial``; an interrupted scan resumes from there, and its outcome is the same to the byte. Bad
    clips, and files whose size or time of change differ, are checked again.

    Of a clip that is a part of its file only that part is decoded and measured. A part that ends after its file is
    shortened, and counted in the header ("shortened").

    Args:
        source: a folder, searched at all levels (hidden names left out), a table
            (:func:`asit.data.catalogue.tables.read_table`), annotations, or a table in memory, such as a DataFrame
            (:func:`asit.data.catalogue.frames.stored`).
        out: the catalogue's path; an older catalogue there is replaced.
        workers: processes; "auto": one for each CPU this process may use.
        restart: discard the results of an interrupted scan.
        progress: called with (files done, all files, bad files).
        table: how a table or annotations become clips (:class:`asit.config.TableSettings`).
        rows: scan these instead, one at a time; their paths are normalised, and absolute or relative to the source.
        facts: further entries of the header, such as "task" and "classes".
        settings: front_end (:class:`asit.config.FrontEndSettings` of the log-mel, default the default settings);
            check ("full", the default, decodes every file, "header" only opens it); checksum (True: store each file's
            SHA-256); bad_files (largest share of unusable files, 0.1); statistics_clips (files in the sample for mean
            and std, at most 10 s of each from a drawn position, 1000; 0: not measured); silence_db (a file is silent
            if half its range is below this, in dB of full scale, -90; None: keep silent files); seed (of the sample
            and its positions, 0); labels (for a folder: "folder" labels each recording by its sub-folder, CLASS,
            SPLIT/CLASS or CLASS/SPLIT; "auto" and "none": no labels).

    Raises:
        ConfigError: another process is writing ``out``.
        CatalogueError: nothing to list, too many bad files, or a file that cannot be written.
        KeyboardInterrupt: after Ctrl-C, saying how to resume.
    """
    if settings.get("front_end", "") is None:
        del settings["front_end"]
    chosen, out = ScanSettings(**settings), Path(out)
    source, table = frames.take(source, table)
    source = Path(local_files.locate(source))
    if not 0 <= chosen.bad_files <= 1 or chosen.statistics_clips < 0 or (workers != "auto" and workers < 1):
        raise CatalogueError(
            f"bad_files={chosen.bad_files}, statistics_clips={chosen.statistics_clips}, workers={workers}",
            "a share from 0 to 1, a count from 0, and 'auto' or at least 1 worker",
            "change them",
        )
    _refuse(source, out)
    if chosen.labels != "auto" and (rows is not None or not source.is_dir()):
        problem = f"labels='{chosen.labels}' for {'rows' if rows is not None else source}"
        expected = "a folder, whose sub-folders may be labels; a table has labels of its own"
        raise CatalogueError(problem, expected, "leave labels at auto")
    root = os.path.abspath(source if source.is_dir() or rows is not None else source.parent)
    if rows is None and chosen.labels != "annotations" and source.is_dir() and not table.window:
        listing = list_files(source, folder_labels=chosen.labels == "folder")
    else:
        rows = clips.rows_of(source, table) if rows is None else rows
        if frames.is_stored(source):
            rows = list(rows)
            root = frames.root_of(source, [row.path for row in rows])
        listing = list_rows(root, rows)
    if not len(listing):
        raise CatalogueError(f"no clips were named in {source}", "at least one", "check the data set's folder")
    listing.draw(chosen.statistics_clips, chosen.seed)
    header = dict(facts or {})
    if chosen.labels == "folder" and "split" in listing.words:
        header["folders"] = "the sub-folders are splits and classes"
    if how := table.model_dump():
        header["table"] = how
    with lock.writing(out):
        with _Partial(Path(f"{out}.partial"), chosen.fingerprint(source), listing, restart) as partial:
            todo = np.flatnonzero(partial.offsets < 0)
            processes = min(child_process.usable_cpus() if workers == "auto" else workers, max(1, len(todo) // 8))
            _gather(checks.run(listing, todo, chosen, processes), partial, len(listing), chosen.bad_files, progress)
            good, skipped, shortened, measured = partial.collect(listing)
        remedy = f"repair or remove them; {partial.path} lists each with its reason"
        what = f"files checked in {source}"
        if (error := checks.unusable(what, len(good), skipped, chosen.bad_files, remedy)) is not None:
            raise error
        header |= {
            **measured,
            "front_end": checks.spectrum(chosen.front_end),
            "check": chosen.check,
            "silence_db": chosen.silence_db,
            "seed": chosen.seed,
            "skipped": dict(sorted(Counter(row["reason"] for row in skipped).items())),
            "ignored": listing.ignored,
        }
        if listing.spans is not None:
            header["shortened"] = shortened
        catalogue = Catalogue(header, listing.root, good.columns())
        with atomic_file(out.with_name(out.name.removesuffix(".jsonl") + ".skipped.jsonl")) as file:
            file.writelines(map(json_line, skipped))
        catalogue.write(out)
        partial.path.unlink()
    return catalogue


def _gather(
    results: Generator[list[ScanResult]], partial: _Partial, total: int, bad_files: float, progress: Progress
) -> None:
    """Store results as they come, to the end or until too many files are bad."""
    bad = 0
    with closing(results):
        try:
            progress(partial.done, total, bad)
            for chunk in results:
                bad += partial.append(chunk)
                progress(partial.done, total, bad)
                if total >= _COMPLETE and bad > bad_files * total:
                    return
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped after {partial.done} of {total} files; the same command resumes from {partial.path}"
            ) from None
    assert partial.done == total, "the scan lost files"


def _refuse(source: Path, out: Path) -> None:
    """Raise the errors that cost nothing to find."""
    expected = "a folder of recordings, or a table"
    if not source.exists():
        raise CatalogueError(f"there is no {source}", expected, "check the path" + tables.near(source))
    if (kind := local_files.special(source)) is not None:
        raise CatalogueError(f"{source} is {kind}", expected, "save it to a file first")
    if source.is_file():
        if source.suffix.lower() in files.SUFFIXES:
            raise CatalogueError(f"{source} is one recording", expected, "give its folder")
        if is_catalogue(source):
            raise CatalogueError(f"{source} is already a catalogue", expected, "asit pretrain takes it as it is")
    if out.is_dir():
        raise CatalogueError(f"{out} is a folder", "a file's name for the catalogue", f"write to {out / 'c.jsonl'}")
    if out.exists() and not is_catalogue(out):
        raise CatalogueError(f"{out} exists and is no catalogue", "a new name, or a catalogue", "choose another name")
    if out.exists() and Catalogue.read(out).shards is not None:
        found = f"{out} is the index of tar shards, which cannot be read without it"
        raise CatalogueError(found, "a new name, or a catalogue without shards", "choose another name")


class _Partial:
    """The file of results so far: a line for the settings, then one per clip, of which memory holds the offset."""

    def __init__(self, path: Path, fingerprint: dict[str, Any], listing: Listing, restart: bool) -> None:
        self.path = path
        self.offsets = np.full(len(listing), -1, np.int64)
        self.done = 0
        first = json_line({"asit_partial": _PARTIAL, **fingerprint})
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            end = 0 if restart or not path.exists() else self._load(first, listing)
            self.file = open(path, "r+b" if end else "wb")  # noqa: SIM115  (closed by __exit__)
            self.file.truncate(end)
            self.file.seek(end)
            if not end:
                self.file.write(first)

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path, "free space; the same command then resumes")

    def __enter__(self) -> _Partial:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            self.file.close()

    def _load(self, first: bytes, listing: Listing) -> int:
        """Take over the valid results; returns the length of the file without an incomplete last line."""
        with open(self.path, "rb") as lines:
            found = lines.readline()
            if not found.endswith(b"\n"):
                return 0
            self._require_same_settings(found, json.loads(first))
            end = lines.tell()
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                index = _still_valid(line, listing)
                if index is not None:
                    self._add(index, end)
                end += len(line)
        return end

    def _add(self, index: int, offset: int) -> None:
        self.done += int(self.offsets[index] < 0)
        self.offsets[index] = offset

    def _require_same_settings(self, found: bytes, wanted: dict[str, Any]) -> None:
        try:
            had = dict(parsing.from_json(decode(found), surrogates=True))
        except (TypeError, ValueError):
            had = {}
        if names := [name for name in wanted if had.get(name) != wanted[name]]:
            changes = ", ".join(f"{name} {json.dumps(had.get(name))}, now {json.dumps(wanted[name])}" for name in names)
            problem = f"{self.path} is from a scan with other settings: {changes}"
            fix = "use those settings again, or start from scratch with restart=True (--restart)"
            raise CatalogueError(problem, "the same settings, to resume it", fix)

    def append(self, results: list[ScanResult]) -> int:
        """Store results; returns how many of them are bad."""
        with self._writing():
            for index, row in results:
                self._add(index, self.file.tell())
                self.file.write(json_line(row))
            self.file.flush()
        return sum("reason" in row for _, row in results)

    def collect(self, listing: Listing) -> tuple[Rows, list[dict[str, Any]], int, dict[str, Any]]:
        """Read all results back in the listing's order.

        Returns the clips, lines for those left out, the number of clips that were shortened, and the header's entries
        on the log-mel (float64 sums are ample for values of -16 to 20).
        """
        rows, skipped, batch = Rows(), [], []
        clips, shortened, count, total, squares = 0, 0, 0, 0.0, 0.0
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for index in np.flatnonzero(self.offsets >= 0).tolist():
                lines.seek(int(self.offsets[index]))
                row = json.loads(decode(lines.readline()))
                if "reason" in row:
                    skipped.append({name: row[name] for name in _SKIPPED if name in row})
                    continue
                shortened += row.get("shortened", False)
                if sums := row.get("sums"):
                    clips, total, squares, count = clips + 1, total + sums[0], squares + sums[1], count + sums[2]
                batch.append(row | {name: column[index] for name, column in listing.words.items()})
                if len(batch) == LINES:
                    rows.extend(batch)
                    batch = []
            rows.extend(batch)
        return rows, skipped, shortened, checks.statistics(total, squares, count, clips)


_SKIPPED = ("path", "part", "reason", "detail")


def _still_valid(line: bytes, listing: Listing) -> int | None:
    """Return the index of the clip of a line; None if it must be checked again: it was bad, or its file has changed."""
    try:
        row = json.loads(decode(line))
        name, stamp = row["path"], (row["size"], row["mtime_ns"])
        span = tuple(row["part"]) if "part" in row else None
    except DAMAGE:
        return None  # a bad file, or damage from a crash of the machine
    index = None if "reason" in row else listing.find(name, span)
    if index is None or (listing.sampled[index] and "sums" not in row):
        return None
    try:
        status = os.stat(os.path.join(listing.root, name))
    except OSError:
        return None
    return index if stamp == (status.st_size, status.st_mtime_ns) else None
