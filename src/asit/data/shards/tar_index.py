"""Catalogues of tar shards: found by an input's name, built where there is no index, and compared with the shards.

Labels, splits, folds and groups are those of the sidecars KEY.cls and KEY.json, see `tar_reader.Sidecars`.
"""

# Paths are text here: a location may be a URL.
# ruff: noqa: PTH112, PTH113, PTH118, PTH122, PTH208

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from asit.audio import files
from asit.config import FrontEndSettings
from asit.data.catalogue import checks
from asit.data.catalogue.catalogue import INDEX, LINES, Catalogue, is_catalogue, relative
from asit.data.catalogue.columns import Rows
from asit.data.catalogue.listing import matches, no_audio
from asit.data.loading.waveforms import read_clip
from asit.data.shards import range_reader, tar_reader
from asit.errors import AudioError, CatalogueError, StoreError
from asit.io import local_files, storage

log = logging.getLogger(__name__)

_THREADS = 8
_PIECE = 1 << 23  # bytes read and hashed at a time
_MOST_NAMES = 1_000_000
_AT_ONCE = 4  # shards, so that requests and hashing overlap


def index_of(given: str) -> str | None:
    """Return the catalogue at a path or URL, or in the folder or store there; None where there is none.

    Raises:
        StoreError: a store that cannot be reached.
    """
    if not storage.is_url(given):
        given = local_files.locate(given)
        location = os.path.join(given, INDEX) if os.path.isdir(given) else given
        return location if is_catalogue(Path(location)) else None
    if given.lower().endswith(".jsonl"):
        return given
    if tar_reader.is_shard(given) or is_pattern(given):
        return None
    location = storage.join(given, INDEX)
    return location if storage.sizes([location]) else None


def tars_of(given: str) -> list[str]:
    """Return the tar shards that this names: one, braces as of webdataset in their order, or sorted those of a pattern
    or of a folder with tars and no recordings.

    Raises:
        CatalogueError: a URL, or a pattern of tars, that names none; braces that name what is no tar.
    """
    url = storage.is_url(given)
    given = given if url else local_files.locate(given)
    if len(several := expand_braces(given)) > 1 and (url or not os.path.lexists(given)):
        wrong = [name for name in several if not tar_reader.is_shard(name) or not (url or os.path.isfile(name))]
        if wrong:
            problem = f"{given} names {len(several)} files, of which {len(wrong)} are no tar, such as {wrong[0]}"
            raise CatalogueError(problem, "existing .tar files", "check the numbers in the braces")
        return several
    if tar_reader.is_shard(given) and not is_pattern(given):
        return [given] if url or os.path.isfile(given) else []
    if is_pattern(given) and (url or not os.path.lexists(given)):
        found = _matches(given) if url else matches(given)
        tars = [location for location in found if tar_reader.is_shard(location)]
        if not tars:
            raise CatalogueError(
                f"{given} matches {len(found)} names, and no tar", "a pattern of .tar files", "check the pattern"
            )
        return tars
    if not url and not os.path.isdir(given):
        return []
    names = list(storage.list(given)) if url else os.listdir(given)
    tars = [storage.join(given, name) for name in sorted(names) if tar_reader.is_shard(name)]
    if url and not tars:
        raise CatalogueError(
            f"{given} holds neither {INDEX} nor a tar; {len(names)} other names",
            f"a store of tar shards, best with the {INDEX} that asit shard writes",
            "check the URL; or write shards there: asit shard CATALOGUE --out URL",
        )
    sound = [name for name in names if os.path.splitext(name)[1].lower() in files.SUFFIXES]
    if tars and sound:
        raise CatalogueError(
            f"{given} holds {len(tars)} tars and {len(sound)} recordings beside them",
            "tars or recordings",
            f"give the tars by a pattern, such as {storage.join(given, '*.tar')}, or move them",
        )
    return tars


def build(
    tars: Sequence[str],
    front_end: FrontEndSettings,
    *,
    labelled: bool = True,
    bad_files: float = 0.1,
    statistics_clips: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int, int], None] | None = None,
) -> Catalogue:
    """Build a catalogue of the recordings in tar shards from their headers; measure mean and std on a sample.

    Args:
        tars: paths or URLs, in the order of the catalogue.
        front_end: of the log-mel that mean and std are measured on.
        labelled: labels are needed, so an ambiguous sidecar is an error; it is logged otherwise.
        bad_files: largest share of members that cannot be used.
        statistics_clips: recordings in the sample, at most 10 s of each from a random position; 0: not measured.
        seed: of the sample and its positions.
        progress: called with (tars done, tars in all, bad members).

    Raises:
        CatalogueError: no tar, no audio in them, too many bad members, or sidecars that recordings share.
        StoreError: a tar that is missing, or a store that cannot be reached.
    """
    root = storage.parent(tars[0])
    rows, skipped, ignored = Rows(), list[dict[str, Any]](), Counter[str]()
    for done, tar in enumerate(tars):
        found = _look(tar, root, len(tars) == 1, labelled, ignored)
        skipped += [row for row in found if "reason" in row]
        good = [row for row in found if "reason" not in row]
        for first in range(0, len(good), LINES):
            rows.extend(good[first : first + LINES])
        if progress:
            progress(done + 1, len(tars), len(skipped))
    if not len(rows) and not skipped:
        raise no_audio("tar file", ", ".join(tars[:3]), ignored)
    what, remedy = f"recordings in {len(tars)} tars", "mend the tars"
    if (error := checks.unusable(what, len(rows), skipped, bad_files, remedy)) is not None:
        raise error
    header = {
        "front_end": checks.spectrum(front_end),
        "check": "header",
        "seed": seed,
        "skipped": dict(sorted(Counter(row["reason"] for row in skipped).items())),
        "ignored": dict(sorted(ignored.items())),
    }
    listed = Catalogue(header, root, rows.columns())
    return Catalogue(_measure(listed, front_end, statistics_clips, seed) | header, root, rows.columns())


def _look(tar: str, root: str, alone: bool, labelled: bool, ignored: Counter[str]) -> list[dict[str, Any]]:
    """Return a row for each recording of one tar, or the reason why it is left out; count other files in `ignored`."""
    sidecars, shard = tar_reader.Sidecars(tar), relative(storage.absolute(tar), root)
    try:
        found = tar_reader.read_shard(tar, sidecars)
    except CatalogueError as error:
        if alone:
            raise
        log.warning("%s is left out with all its recordings: %s", tar, error.found)
        return [{"path": shard, "reason": "unreadable", "detail": error.found}]
    known: dict[str, dict[str, str]] = {}
    try:
        known = sidecars.of(found.members)
    except CatalogueError as error:
        if labelled:
            raise
        log.warning("labels, splits, folds and groups are not taken over: %s", error.found)
    ignored.update({suffix: count for suffix, count in found.others.items() if suffix not in tar_reader.SIDECARS})
    rows: list[dict[str, Any]] = []
    for member in found.members:
        if member.fault is not None:
            reason = "truncated" if member.offset + member.size > found.size else "unreadable"
            name = f"{shard}/{member.name}"
            rows.append({"path": name, "reason": reason, "detail": f"{name}: {member.fault}"})
    if found.fault is not None and not any(row["reason"] == "truncated" for row in rows):
        rows.append({"path": shard, "reason": "truncated", "detail": f"{shard}: {found.fault}"})

    def probe(member: tar_reader.Member) -> dict[str, Any]:
        name = f"{shard}/{member.name}"
        span = range_reader.ByteSpan(storage.absolute(tar), member.offset, member.size)
        try:
            with range_reader.open_span(span) as file:
                info = files.probe(file, called=name)
                seconds = info.seconds
                if info.frames < 1:  # the header says no length
                    seconds = len(files.read(file, called=name)) / info.rate
        except AudioError as error:
            return {"path": name, "reason": getattr(error, "reason", "unreadable"), "detail": error.found}
        row = {"path": name, "seconds": seconds, "rate": info.rate, "channels": info.channels}
        row |= {"shard": shard, "offset": member.offset, "size": member.size}
        return row | known.get(member.name, {})

    with ThreadPoolExecutor(_THREADS, "probe") as threads:
        rows += threads.map(probe, (member for member in found.members if member.fault is None))
    return rows


def _measure(listed: Catalogue, front_end: FrontEndSettings, most: int, seed: int) -> dict[str, Any]:
    """Return the header's entries on the log-mel of a random sample."""
    import torch

    from asit.audio.fbank import FrontEnd, logmel_statistics

    fbank = FrontEnd(front_end)
    total, squares, count, clips = 0.0, 0.0, 0, 0
    for row in np.sort(np.random.default_rng([seed]).permutation(len(listed))[:most]).tolist():
        clip = listed[row]
        length = min(clip.seconds, checks.MEASURED_SECONDS)
        begin = np.random.default_rng([seed, row]).uniform(0.0, max(0.0, clip.seconds - length))
        try:
            waveform = read_clip(clip, front_end.rate, begin, length, front_end.resampler)
        except AudioError:  # training leaves it out and counts it
            continue
        if len(waveform) >= fbank.window:
            part = logmel_statistics(fbank.fbank(torch.from_numpy(waveform)[None]))
            total, squares, count, clips = total + part[0], squares + part[1], count + part[2], clips + 1
    return checks.statistics(total, squares, count, clips)


def verify_sizes(index: Catalogue) -> None:
    """Refuse a catalogue whose shards are missing or too short; one request per shard.

    Raises:
        StoreError: names them.
    """
    found = index.shards
    if found is None:
        return
    used = np.unique(found.codes[found.codes >= 0])
    ends = np.zeros(len(found.shards), np.int64)
    inside = found.codes >= 0
    np.maximum.at(ends, found.codes[inside], found.spans[inside].sum(1))
    lengths = storage.sizes([found.shards[code] for code in used])
    missing = [found.shards[code] for code in used if found.shards[code] not in lengths]
    short = [
        f"{found.shards[code]} ({lengths[found.shards[code]]:,} of {ends[code]:,} bytes or more)"
        for code in used
        if found.shards[code] in lengths and lengths[found.shards[code]] < ends[code]
    ]
    if missing or short:
        faults = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
        faults += [f"{len(short)} too short: {', '.join(short[:3])}"] if short else []
        raise StoreError(
            f"of {len(used)} shards {'; '.join(faults)}",
            "every shard that the index lists, complete",
            "bring them back or copy them again; or write them again with asit shard",
        )


def check(location: str, *, progress: Callable[[int, int, int], None] | None = None) -> Catalogue:
    """Read all shards of a folder, URL or index, and compare their hashes with those that the index holds.

    Raises:
        CatalogueError: no index there.
        StoreError: shards that are missing, too short or damaged; names them.
    """
    if not location.endswith(".jsonl") and Path(location).is_file():
        raise CatalogueError(f"{location} is a file", "a folder of shards, or its index", "give the shards' folder")
    location = location if location.endswith(".jsonl") else storage.join(location.rstrip("/"), INDEX)
    index = Catalogue.read(location, look=False)
    listed = index.header.get("shards")
    if index.shards is None or not listed:
        raise CatalogueError(f"{location} lists no shards", "an index of asit shard", "give the shards' folder")
    verify_sizes(index)

    def is_intact(shard: dict[str, Any]) -> bool:
        digest, length = hashlib.sha256(), int(shard["bytes"])
        at = storage.join(index.root, shard["name"])
        if storage.size(at) == length:
            for first in range(0, length, _PIECE):
                digest.update(storage.read_range(at, first, min(_PIECE, length - first)))
        return digest.hexdigest() == str(shard["sha256"])

    wrong: list[str] = []
    with ThreadPoolExecutor(_AT_ONCE, "check") as threads:
        for number, (shard, intact) in enumerate(zip(listed, threads.map(is_intact, listed), strict=True), 1):
            if not intact:
                wrong.append(shard["name"])
            if progress:
                progress(number, len(listed), len(wrong))
    if wrong:
        raise StoreError(
            f"{len(wrong)} of {len(listed)} shards in {index.root} are damaged: {', '.join(wrong[:5])}",
            "the bytes that were written, by SHA-256",
            "copy them again from where they came, or write them again with asit shard",
        )
    return index


def _matches(pattern: str) -> list[str]:
    """Return the names in a store's folder that match a pattern in its last part."""
    folder, _, last = pattern.rpartition("/")
    if is_pattern(folder):
        raise CatalogueError(f"{pattern} has a pattern of folders", "a pattern in the last part", "name one folder")
    return [f"{folder}/{name}" for name in storage.list(folder) if fnmatch.fnmatchcase(name, last)]


def expand_braces(given: str) -> list[str]:
    """Return the names that braces stand for, as in webdataset: {000..009} and {train,test}; without braces the name.

    Raises:
        CatalogueError: more than a million names.
    """
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", given)
    if match is None:
        return [given]
    first, last, listed = match.groups()
    parts: Sequence[str] = listed.split(",") if listed else ()
    if first:
        low, high = int(first), int(last)
        if abs(high - low) >= _MOST_NAMES:
            raise CatalogueError(f"{given} names {abs(high - low) + 1:,} files", f"{_MOST_NAMES:,} at most", "split it")
        width = max(map(len, (first, last))) if "0" in (first[0], last[0]) else 0
        parts = [f"{number:0{width}d}" for number in range(low, high + 1) or range(low, high - 1, -1)]
    names = (name for part in parts for name in expand_braces(given[: match.start()] + part + given[match.end() :]))
    return list(dict.fromkeys(names))


def is_pattern(given: str) -> bool:
    """Whether a path or URL is a pattern with ``*``, ``?`` or ``[...]``."""
    return any(sign in given for sign in "*?[")
