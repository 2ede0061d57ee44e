"""`asit download`: fetch the archives of a data set, check them, and unpack them into a folder atomically."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from asit.data.download import http
from asit.data.download.http import DownloadError
from asit.data.download.registry import ON_REQUEST, SOURCES, Archive, DownloadSource
from asit.data.download.unpack import unpack
from asit.errors import ConfigError, suggestion
from asit.io import atomic, lock

Progress = Callable[[str], http.Progress]
"""Called with the file at hand; what it returns, with bytes so far, and bytes in all where these are known."""


class Downloaded(NamedTuple):
    """A data set on this machine; it may have been `there` before, or have `replaced` a folder, which is now there."""

    source: DownloadSource
    folder: Path
    there: bool = False
    kept: tuple[Path, ...] = ()
    """Archives that were not deleted."""
    replaced: Path | None = None


def download(
    name: str,
    out: str | os.PathLike[str],
    *,
    url: str | None = None,
    force: bool = False,
    keep_archive: bool = False,
    progress: Progress = lambda what: lambda done, total: None,
) -> Downloaded:
    """Fetch a set, check it, and unpack it into the folder `out`, which appears when it is complete.

    Archives are kept beside `out` until the end, and longer if they were there before or with `keep_archive`. A folder
    that already holds the complete set is left alone.

    Args:
        name: one of `registry.SOURCES`.
        out: a folder that does not exist or is empty, or one that holds this set.
        url: a mirror: the address of the archive, or, ending in "/", of the folder with the archives. Sizes and
            checksums stay as published.
        force: fetch again; a folder that exists is renamed to FOLDER.old.
        keep_archive: do not delete the archives.
        progress: of transfers and unpacking.

    Raises:
        ConfigError: no such set, one that only its owners may give away, or another process is writing the folder.
        DownloadError: see `asit.data.download.http` and `unpack`; a folder with other things in it; a set
            that is not what it should be.
        CheckpointError: the disk is full, or the folder may not be written.
    """
    source = _find(name)
    if url is not None:
        source = replace(source, archives=_mirrored(source, url))
    folder = Path(out).resolve()
    if folder == Path.cwd() or folder.parent == folder:
        raise DownloadError(f"{out} is the folder you are in, or the root", "a folder of its own", "name another --out")
    with ExitStack() as locks:
        # Archives are beside the folder, where a call for another folder would share them.
        for path in (folder, *(folder.with_name(archive.name) for archive in source.archives)):
            locks.enter_context(lock.writing(path))
        try:
            return _download(source, folder, force, keep_archive, progress)
        except KeyboardInterrupt:
            text = f"what has come is kept in {folder.parent}; the same command resumes from there"
            raise KeyboardInterrupt(text) from None


def _download(source: DownloadSource, folder: Path, force: bool, keep_archive: bool, progress: Progress) -> Downloaded:
    there = folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None)
    if there and not force:
        if different := difference(source, folder):
            fix = "name another --out, or pass --force, which renames what is there"
            raise DownloadError(f"{folder} is there; {different}", f"the complete {source.title}", fix)
        return Downloaded(source, folder, there=True)
    old = folder.with_name(f"{folder.name}.old") if there else None
    if old and old.exists():
        raise DownloadError(f"{old} is there", f"a free name to keep {folder} under", "delete it, or move it away")
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    targets = [parent / archive.name for archive in source.archives]
    if force:
        for archive, target in zip(source.archives, targets, strict=True):
            target.unlink(missing_ok=True)
            http.partial_of(archive, parent).unlink(missing_ok=True)
    kept = tuple(path for path in targets if keep_archive or path.exists())
    _check_room(source, parent)
    for archive in source.archives:
        http.fetch(archive, parent, progress(archive.name))
    atomic.sweep(parent, {folder.name}, locked=True)
    with atomic.write_folder(folder, overwrite=old is not None, sync=False) as draft:
        for archive, path in zip(source.archives, targets, strict=True):
            into = draft / archive.folder
            into.mkdir(exist_ok=True)
            step = progress(f"unpacking {path.name}")
            unpack(path, into, archive.unpacked * 5 // 4, strip=archive.strip, progress=step)
        if different := difference(source, draft):
            fix = "this is another or a damaged version: delete the archive and run the same command"
            raise DownloadError(f"{' and '.join(map(str, targets))}: {different}", f"the complete {source.title}", fix)
        if source.finish:
            source.finish(draft)
        if old:
            folder.rename(old)
    for path in targets:
        if path not in kept:
            path.unlink()
    return Downloaded(source, folder, kept=kept, replaced=old)


def difference(source: DownloadSource, folder: Path) -> str:
    """Compare the number of recordings, and their digest where there is one; "" where they are those of the set."""
    for archive in source.archives:
        paths = [p for p in (folder / archive.folder).glob(archive.sounds) if not p.name.startswith(".")]
        if len(paths) != archive.recordings:
            return f"{len(paths):,} recordings ({archive.sounds}) of {archive.recordings:,} {archive.folder}".rstrip()
        if archive.digest and digest(paths) != archive.digest:
            return f"{len(paths):,} recordings, but not those of {source.title}"
    return ""


def digest(paths: list[Path]) -> str:
    """Return the SHA-256 of the lines "MD5  name", in the order of the names."""
    lines = []
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        lines.append(f"{md5}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_room(source: DownloadSource, parent: Path) -> None:
    needed = sum(archive.unpacked for archive in source.archives)
    for archive in source.archives:
        if not (parent / archive.name).exists():
            needed += max(0, archive.size - http.size_of(http.partial_of(archive, parent)))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DownloadError(
            f"{parent} has {free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB: the archives still to come, and what they unpack to",
            "make room, or name an --out on another disk",
        )


def _find(name: str) -> DownloadSource:
    if name in SOURCES:
        return SOURCES[name]
    if name in ON_REQUEST:
        raise ConfigError(*ON_REQUEST[name])
    raise ConfigError(
        f"asit download knows no {name}{suggestion(name, [*SOURCES, *ON_REQUEST], ', did you mean {}?')}",
        "one of " + ", ".join(SOURCES),
        "any other set: asit catalogue FOLDER, or a table (docs/catalogue.md)",
    )


def _mirrored(source: DownloadSource, url: str) -> tuple[Archive, ...]:
    """Return the archives with addresses at a mirror."""
    if not url.endswith("/") and len(source.archives) > 1:
        names = ", ".join(archive.name for archive in source.archives)
        raise ConfigError(
            f"--url {url} names one file, and {source.name} has {len(source.archives)} archives",
            f"the address of a folder that holds {names}, ending in /",
            "pass that address, or put the archives beside --out",
        )
    return tuple(replace(a, url=url + a.name if url.endswith("/") else url) for a in source.archives)
