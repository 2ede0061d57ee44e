"""`asit download`: the data sets that may be fetched, from their archives to a folder that is whole or not there."""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from asit.data.download import http
from asit.data.download.http import DownloadError
from asit.data.download.registry import ON_REQUEST, SOURCES, Archive, Source
from asit.data.download.unpack import remove, unpack
from asit.errors import ConfigError
from asit.io import lock, parsing

RECORD = "asit-download.json"
"""Written into the folder last: what lies in it and where that came from."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is going on, bytes so far, and bytes in all where these are known."""


@dataclass(frozen=True)
class Downloaded:
    """What there is now.

    Attributes:
        source: the set.
        folder: where it lies.
        there: it was there before, whole, and nothing was done.
        kept: archives that were not deleted.
        replaced: where the folder that was there before is now.
    """

    source: Source
    folder: Path
    there: bool = False
    kept: tuple[Path, ...] = ()
    replaced: Path | None = None


def download(
    name: str,
    out: str | os.PathLike[str],
    *,
    url: str | None = None,
    force: bool = False,
    keep_archive: bool = False,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
    sources: Mapping[str, Source] = SOURCES,
    **transfer: Any,
) -> Downloaded:
    """Fetch a set, check it, and unpack it into the folder `out`, which is whole or not there at all.

    Archives wait beside `out` and are deleted at the end, unless they lay there before or `keep_archive`. A folder
    that already holds the whole set is left alone.

    Args:
        name: one of `sources`.
        out: a folder that does not exist or is empty, or one that holds this set.
        url: a mirror: the address of the archive, or, ending in "/", of the folder that the archives lie in. Sizes
            and checksums stay as published.
        force: fetch again; a folder that holds this set is renamed to FOLDER.old.
        keep_archive: do not delete the archives.
        progress, notify: told how it goes.
        sources: the sets.
        transfer: timeout, pauses and sleep of :func:`asit.data.download.http.fetch`.

    Raises:
        ConfigError: no such set, one that only its owners may give away, or another process is writing the folder.
        DownloadError, ArchiveError: see the modules remote and archives; a folder with other things in it; a set that
            is not what it should be.
    """
    source = _named(name, sources)
    archives = _at(source, url)
    folder = Path(out).resolve()
    if folder == Path.cwd() or folder.parent == folder:
        raise DownloadError(f"{out} is the folder you are in, or the root", "a folder of its own", "name another --out")
    with ExitStack() as alone:
        # Archives lie beside the folder, where a call for another folder would share them.
        for place in (folder, *(folder.with_name(archive.file.name) for archive in archives)):
            alone.enter_context(lock.writing(place))
        return _download(source, archives, folder, force, keep_archive, progress, notify, transfer)


def _download(
    source: Source,
    archives: tuple[Archive, ...],
    folder: Path,
    force: bool,
    keep_archive: bool,
    progress: Progress | None,
    notify: Callable[[str], None] | None,
    transfer: Mapping[str, Any],
) -> Downloaded:
    """`download`, by the one process that may write the folder and its archives now."""
    there = _there(source, folder, force)
    if there and not force:
        return Downloaded(source, folder, there=True)
    old = folder.with_name(f"{folder.name}.old") if there else None
    if old and old.exists():
        raise DownloadError(f"{old} is there", f"a free name to keep {folder} under", "delete it, or move it away")
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if force:
        for archive in archives:
            http.forget(archive.file, parent)
    before = {archive.file.name for archive in archives if (parent / archive.file.name).exists()}
    _room(source, archives, parent)
    paths = []
    try:
        for archive in archives:
            told = _labelled(progress, archive.file.name)
            most = 4 * archive.about or None
            paths.append(http.fetch(archive.file, parent, most=most, progress=told, notify=notify, **transfer))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what has come is kept in {parent}; the same command goes on from there") from None
    _build(source, archives, paths, folder, old, progress)
    kept = tuple(path for path in paths if keep_archive or path.name in before)
    for path in paths:
        if path not in kept:
            path.unlink()
    return Downloaded(source, folder, kept=kept, replaced=old)


def _build(
    source: Source,
    archives: tuple[Archive, ...],
    paths: list[Path],
    folder: Path,
    old: Path | None,
    progress: Progress | None,
) -> None:
    """Unpack beside the folder, check, and rename; a set that is there goes to `old`."""
    fresh = folder.with_name(f".{folder.name}.unpacking")
    remove(fresh)
    try:
        fresh.mkdir()
        for archive, path in zip(archives, paths, strict=True):
            into = fresh / archive.folder
            into.mkdir(exist_ok=True)
            told = _labelled(progress, f"unpacking {path.name}")
            unpack(path, into, archive.limits, strip=archive.strip, progress=told)
        check(source, fresh)
        if source.finish:
            source.finish(fresh)
        record = {
            "asit_download": 1,
            "name": source.name,
            "urls": [archive.file.url for archive in archives],
            "sha256": [archive.file.sha256 for archive in archives],
            "folders": _tally(fresh),
        }
        (fresh / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if old:
            os.replace(folder, old)
        elif folder.exists():
            folder.rmdir()  # empty, as was seen before
        os.replace(fresh, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DownloadError(
            f"{folder.parent}: the disk is full while unpacking",
            f"{source.unpacked / 1e9:.1f} GB of room",
            "make room and run the same command; the archives are there and need not be fetched again",
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the archives are there; the same command unpacks them") from None
    finally:
        remove(fresh)


def check(source: Source, folder: Path) -> None:
    """Count a set's recordings, and compare their digest where the archive has no published checksum.

    Raises:
        DownloadError: not what the set holds.
    """
    for part in source.contents:
        place = folder / part.folder
        found = [path for path in place.rglob("*.wav") if not path.name.startswith(".")] if place.is_dir() else []
        if len(found) != part.recordings:
            raise DownloadError(
                f"{place}: {len(found):,} recordings (.wav)",
                f"{part.recordings:,}, as in {source.title}",
                "the set is not whole: move the folder away and run the same command",
            )
        if part.digest is not None and digest(place, found) != part.digest:
            raise DownloadError(
                f"{place}: {len(found):,} recordings, but not those of {source.title}",
                f"digest {part.digest[:16]}...",
                "files are damaged or changed, or this is another version: move the folder and its archive away and "
                "run the same command",
            )


def digest(place: Path, files: list[Path]) -> str:
    """SHA-256 of the lines "MD5  name", in the order of the names relative to `place`."""
    lines = []
    for path in files:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        lines.append((path.relative_to(place).as_posix(), md5))
    return hashlib.sha256("".join(f"{md5}  {name}\n" for name, md5 in sorted(lines)).encode()).hexdigest()


def _there(source: Source, folder: Path, force: bool) -> bool:
    """Whether the folder holds this set, whole unless `force`; False where there is nothing."""
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise DownloadError(f"{folder} is a file", "a folder", "name another --out")
    if next(folder.iterdir(), None) is None:
        return False
    try:
        record = parsing.from_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        with suppress(DownloadError):
            check(source, folder)  # unpacked by other means
            return True
        raise DownloadError(
            f"{folder} is there and holds other things, or a part of {source.title}",
            "an empty folder, or one that holds the whole set",
            "name another --out, or move this folder away",
        ) from None
    if record["name"] != source.name:
        raise DownloadError(f"{folder} holds {record['name']}", source.name, "name another --out")
    now = _tally(folder)
    changed = [place for place, tally in record["folders"].items() if now.get(place) != tally]
    if changed and not force:
        raise DownloadError(
            f"{folder}: {len(changed)} of {len(record['folders'])} folders have not the files they were unpacked with, "
            f"such as {', '.join(changed[:3])}",
            "the whole set",
            "pass --force, which fetches it again and keeps this folder under another name",
        )
    return True


def _tally(folder: Path) -> dict[str, list[int]]:
    """Files and bytes of each folder below; files beside them (a catalogue, notes) are the user's and not counted."""
    out: dict[str, list[int]] = {}
    for place, _, names in os.walk(folder):
        if place != str(folder):
            sizes = [(Path(place) / name).stat().st_size for name in names]
            out[Path(place).relative_to(folder).as_posix()] = [len(sizes), sum(sizes)]
    return dict(sorted(out.items()))


def _room(source: Source, archives: tuple[Archive, ...], parent: Path) -> None:
    needed = source.unpacked + sum(http.remaining(archive.file, parent, archive.about) for archive in archives)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DownloadError(
            f"{parent} has {free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB: the archives still to come, and what they unpack to",
            "make room, or name an --out on another disk",
        )


def _named(name: str, sources: Mapping[str, Source]) -> Source:
    if name in sources:
        return sources[name]
    if name in ON_REQUEST:
        raise ConfigError(*ON_REQUEST[name])
    close = difflib.get_close_matches(name, [*sources, *ON_REQUEST], 1)
    raise ConfigError(
        f"asit download knows no {name}" + (f", did you mean {close[0]}?" if close else ""),
        "one of " + ", ".join(sources),
        "any other set: asit catalogue FOLDER, or a table (docs/catalogue.md)",
    )


def _at(source: Source, url: str | None) -> tuple[Archive, ...]:
    """The archives, at a mirror if one is named."""
    if url is None:
        return source.archives
    if not url.endswith("/") and len(source.archives) > 1:
        names = ", ".join(archive.file.name for archive in source.archives)
        raise ConfigError(
            f"--url {url} names one file, and {source.name} has {len(source.archives)} archives",
            f"the address of a folder that holds {names}, ending in /",
            "pass that address, or put the archives beside --out",
        )
    return tuple(
        replace(archive, file=replace(archive.file, url=url + archive.file.name if url.endswith("/") else url))
        for archive in source.archives
    )


def _labelled(progress: Progress | None, what: str) -> http.Progress | None:
    if progress is None:
        return None
    told = progress
    return lambda done, total: told(what, done, total)
