"""`asit download`: fetch the archives of a data set, check them, and unpack them into a folder atomically."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from asit.data.download import http
from asit.data.download.http import POLICY, DownloadError
from asit.data.download.registry import ON_REQUEST, SOURCES, Archive, DownloadSource
from asit.data.download.unpack import unpack
from asit.errors import CheckpointError, ConfigError
from asit.io import atomic, lock, parsing
from asit.io.retry import RetryPolicy

RECORD = "asit-download.json"
"""Written into the folder last: what is in it and where that came from."""

Progress = Callable[[str, int, int | None], None]
"""Called with the file at hand, bytes so far, and bytes in all where these are known."""


@dataclass(frozen=True)
class Downloaded:
    """A data set on this machine.

    Attributes:
        source: the set.
        folder: its folder.
        there: it was complete before, and nothing was done.
        kept: archives that were not deleted.
        replaced: where the folder that was there before is now.
    """

    source: DownloadSource
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
    progress: Progress = lambda what, done, total: None,
    policy: RetryPolicy = POLICY,
    sources: Mapping[str, DownloadSource] = SOURCES,
) -> Downloaded:
    """Fetch a set, check it, and unpack it into the folder `out`, which appears when it is complete.

    Archives are kept beside `out` until the end, and longer if they were there before or with `keep_archive`. A folder
    that already holds the complete set is left alone.

    Args:
        name: one of `sources`.
        out: a folder that does not exist or is empty, or one that holds this set.
        url: a mirror: the address of the archive, or, ending in "/", of the folder with the archives. Sizes and
            checksums stay as published.
        force: fetch again; a folder that holds this set is renamed to FOLDER.old.
        keep_archive: do not delete the archives.
        progress: of transfers and unpacking.
        policy: of retries.
        sources: the sets.

    Raises:
        ConfigError: no such set, one that only its owners may give away, or another process is writing the folder.
        DownloadError, ArchiveError: see `asit.data.download.http` and `unpack`; a folder with other things in it; a set
            that is not what it should be.
    """
    source = _find(name, sources)
    if url is not None:
        source = replace(source, archives=_mirrored(source, url))
    folder = Path(out).resolve()
    if folder == Path.cwd() or folder.parent == folder:
        raise DownloadError(f"{out} is the folder you are in, or the root", "a folder of its own", "name another --out")
    with ExitStack() as locks:
        # Archives are beside the folder, where a call for another folder would share them.
        for path in (folder, *(folder.with_name(archive.file.name) for archive in source.archives)):
            locks.enter_context(lock.writing(path))
        return _download(source, folder, force, keep_archive, progress, policy)


def _download(
    source: DownloadSource, folder: Path, force: bool, keep_archive: bool, progress: Progress, policy: RetryPolicy
) -> Downloaded:
    there = _is_there(source, folder, force)
    if there and not force:
        return Downloaded(source, folder, there=True)
    old = folder.with_name(f"{folder.name}.old") if there else None
    if old and old.exists():
        raise DownloadError(f"{old} is there", f"a free name to keep {folder} under", "delete it, or move it away")
    parent = folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if force:
        for archive in source.archives:
            http.forget(archive.file, parent)
    before = {archive.file.name for archive in source.archives if (parent / archive.file.name).exists()}
    _check_room(source, parent)
    paths = []
    try:
        for archive in source.archives:
            shown = partial(progress, archive.file.name)
            most = 4 * archive.about or None
            paths.append(http.fetch(archive.file, parent, most=most, progress=shown, policy=policy))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what has come is kept in {parent}; the same command resumes from there") from None
    _unpack(source, paths, folder, old, progress)
    kept = tuple(path for path in paths if keep_archive or path.name in before)
    for path in paths:
        if path not in kept:
            path.unlink()
    return Downloaded(source, folder, kept=kept, replaced=old)


def _unpack(source: DownloadSource, paths: list[Path], folder: Path, old: Path | None, progress: Progress) -> None:
    """Unpack beside the folder, check, and rename; a set that is there is renamed to `old`."""
    atomic.sweep(folder.parent, {folder.name}, locked=True)
    try:
        with atomic.write_folder(folder, overwrite=old is not None, sync=False) as draft:
            for archive, path in zip(source.archives, paths, strict=True):
                into = draft / archive.folder
                into.mkdir(exist_ok=True)
                unpack(
                    path,
                    into,
                    archive.limits,
                    strip=archive.strip,
                    progress=partial(progress, f"unpacking {path.name}"),
                )
            check(source, draft)
            if source.finish:
                source.finish(draft)
            record = {
                "asit_download": 1,
                "name": source.name,
                "urls": [archive.file.url for archive in source.archives],
                "sha256": [archive.file.sha256 for archive in source.archives],
                "folders": _tally(draft),
            }
            (draft / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            if old:
                folder.rename(old)
    except (OSError, CheckpointError) as error:
        if not atomic.is_disk_full(error.__cause__ or error):
            raise
        raise DownloadError(
            f"{folder.parent}: the disk is full while unpacking",
            f"{source.unpacked / 1e9:.1f} GB of room",
            "make room and run the same command; the archives are there and need not be fetched again",
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the archives are there; the same command unpacks them") from None


def check(source: DownloadSource, folder: Path) -> None:
    """Count a set's recordings, and compare their digest where the archive has no published checksum.

    Raises:
        DownloadError: not what the set holds.
    """
    for part in source.contents:
        path = folder / part.folder
        found = [file for file in path.rglob("*.wav") if not file.name.startswith(".")] if path.is_dir() else []
        if len(found) != part.recordings:
            raise DownloadError(
                f"{path}: {len(found):,} recordings (.wav)",
                f"{part.recordings:,}, as in {source.title}",
                "the set is incomplete: move the folder away and run the same command",
            )
        if part.digest is not None and digest(path, found) != part.digest:
            raise DownloadError(
                f"{path}: {len(found):,} recordings, but not those of {source.title}",
                f"digest {part.digest[:16]}...",
                "files are damaged or changed, or this is another version: move the folder and its archive away and "
                "run the same command",
            )


def digest(folder: Path, files: list[Path]) -> str:
    """Return the SHA-256 of the lines "MD5  name", in the order of the names relative to `folder`."""
    lines = []
    for path in files:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        lines.append((path.relative_to(folder).as_posix(), md5))
    return hashlib.sha256("".join(f"{md5}  {name}\n" for name, md5 in sorted(lines)).encode()).hexdigest()


def _is_there(source: DownloadSource, folder: Path, force: bool) -> bool:
    """Whether the folder holds this set, completely unless `force`; False where there is nothing."""
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
            "an empty folder, or one that holds the complete set",
            "name another --out, or move this folder away",
        ) from None
    if record["name"] != source.name:
        raise DownloadError(f"{folder} holds {record['name']}", source.name, "name another --out")
    now = _tally(folder)
    changed = [name for name, tally in record["folders"].items() if now.get(name) != tally]
    if changed and not force:
        raise DownloadError(
            f"{folder}: {len(changed)} of {len(record['folders'])} folders have not the files they were unpacked with, "
            f"such as {', '.join(changed[:3])}",
            "the complete set",
            "pass --force, which fetches it again and keeps this folder under another name",
        )
    return True


def _tally(folder: Path) -> dict[str, list[int]]:
    """Return files and bytes of each folder below; files beside them (a catalogue, notes) are the user's."""
    out: dict[str, list[int]] = {}
    for path, _, names in os.walk(folder):
        if path != str(folder):
            sizes = [(Path(path) / name).stat().st_size for name in names]
            out[Path(path).relative_to(folder).as_posix()] = [len(sizes), sum(sizes)]
    return dict(sorted(out.items()))


def _check_room(source: DownloadSource, parent: Path) -> None:
    needed = source.unpacked + sum(http.remaining(archive.file, parent, archive.about) for archive in source.archives)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise DownloadError(
            f"{parent} has {free / 1e9:.1f} GB free",
            f"{needed / 1e9:.1f} GB: the archives still to come, and what they unpack to",
            "make room, or name an --out on another disk",
        )


def _find(name: str, sources: Mapping[str, DownloadSource]) -> DownloadSource:
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


def _mirrored(source: DownloadSource, url: str) -> tuple[Archive, ...]:
    """Return the archives with addresses at a mirror."""
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
