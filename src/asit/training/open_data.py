"""Open `data`, whatever it is, as a catalogue that fits the front end."""

from __future__ import annotations

import functools
import logging
import tempfile
from pathlib import Path
from typing import Literal

from asit.config import FinetuneSettings, FrontEndSettings, RunSettings, TableSettings
from asit.data.catalogue import scan
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.listing import describe_ignored
from asit.data.shards import tar_index
from asit.errors import AsitError, CatalogueError, ConfigError
from asit.io import local_files, parsing
from asit.progress import counter
from asit.training import run_dir

log = logging.getLogger(__name__)

Labels = Literal["auto", "folder"]

_FRONT_END_FREE = ("mean", "std", "padding")  # what the measured mean and std do not depend on


def of_run(
    settings: RunSettings, out: Path | None, front_end: FrontEndSettings | None = None, *, rescan: bool = False
) -> Catalogue:
    """Return the catalogue of a run, see `catalogue`; fine-tuning reads sub-folders as classes.

    Args:
        settings: of the run.
        out: the run's folder, or None.
        front_end: of the model that the run starts from; None: that of the settings.
        rescan: as for `catalogue`.
    """
    labels: Labels = "folder" if isinstance(settings, FinetuneSettings) else "auto"
    given = front_end or settings.front_end
    return catalogue(
        settings.data, given, out, bad_files=settings.bad_files, labels=labels, rescan=rescan, table=settings.reading
    )


def catalogue(
    data: str,
    front_end: FrontEndSettings,
    out: Path | None,
    *,
    bad_files: float,
    labels: Labels = "auto",
    rescan: bool = False,
    table: TableSettings | None = None,
) -> Catalogue:
    """The catalogue that `data` is, or one made of the folder, table or tar shards that it is.

    `data` may be a catalogue or an index of shards, a folder or store that holds one under the name index.jsonl, tar
    shards without an index, a folder of recordings, or a table; the first three also as URLs.

    Args:
        data: see above.
        front_end: under which the log-mel is measured.
        out: the run's folder, where a new catalogue is kept; None: a temporary one is made of the files' headers.
        bad_files: share of unusable files that is allowed.
        labels: whether the sub-folders of a folder of recordings are its labels.
        table: how a table or annotations become clips.
        rescan: scan the recordings even if the run's folder has a catalogue, which may be of another run.

    Raises:
        CatalogueError: nothing usable there.
        StoreError: a store that cannot be reached, or shards that are missing or too short.
    """
    if not data:
        raise ConfigError("no data were given", "a folder of recordings, a table or a catalogue", "pass --data FOLDER")
    listed = tar_index.index_of(data)
    if listed is not None:
        found = Catalogue.read(listed)
        tar_index.verify_sizes(found)  # one request for each shard
        return found
    target = None if out is None else out / run_dir.CATALOGUE
    tars = tar_index.tars_of(data)
    given = None if tars else Path(local_files.locate(data))
    if target is not None and not rescan and target.exists():
        return Catalogue.read(target)
    if given is None:
        show = counter("looking at shards", "shards")
        few, labelled = 64 if target is None else 1000, labels == "folder"
        found = tar_index.build(
            tars, front_end, labelled=labelled, bad_files=bad_files, statistics_clips=few, progress=show
        )
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            found.write(target)
    else:
        labels = labels if given.is_dir() and not (table and table.window) else "auto"
        build = functools.partial(scan.build, given, front_end=front_end, bad_files=bad_files, labels=labels)
        build = functools.partial(build, table=table)
        if target is None:
            with tempfile.TemporaryDirectory() as scratch:
                show = counter("looking at headers")
                return build(Path(scratch) / run_dir.CATALOGUE, check="header", statistics_clips=64, progress=show)
        made = not target.parent.exists()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            restart = _other_scan(target.with_name(f"{target.name}.partial"), given, front_end)
            found = build(target, restart=restart, progress=counter("checking files"))
        except AsitError:
            if made and not any(target.parent.iterdir()):  # no data, no folder
                target.parent.rmdir()
            raise
    if passed := describe_ignored(found.header["ignored"]):
        log.info(passed)
    return found


def _other_scan(partial: Path, given: Path, front_end: FrontEndSettings) -> bool:
    """Whether a scan that was stopped here was of other recordings or settings, so that it must not block this one."""
    if not partial.exists():
        return False
    try:
        with partial.open("rb") as file:
            first = parsing.from_json(file.readline(1 << 20), surrogates=True)
        ours = front_end.model_dump(mode="json")
        return first["source"] != str(given.absolute()) or any(ours[k] != v for k, v in first["front_end"].items())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def measured(front_end: FrontEndSettings, listed: Catalogue) -> FrontEndSettings:
    """The front end with mean and std as numbers, taken from the catalogue where they are auto.

    Raises:
        CatalogueError: the catalogue has none, or measured them under another front end; names each field.
    """
    if "auto" not in (front_end.mean, front_end.std):
        return front_end
    header = listed.header
    if header.get("mean") is None or header.get("std") is None:
        raise CatalogueError(
            "the catalogue holds no mean and std of the log-mel",
            "measured values, or numbers in front_end.mean and front_end.std",
            "build it again with asit catalogue and statistics-clips above 0, or set both numbers",
        )
    theirs, ours = header.get("front_end", {}), front_end.model_dump(mode="json")
    other = [
        f"{name} {theirs[name]} there, {value} here"
        for name, value in ours.items()
        if name not in _FRONT_END_FREE and name in theirs and theirs[name] != value
    ]
    if other:
        raise CatalogueError(
            f"the catalogue's mean and std were measured under another front end: {'; '.join(other)}",
            "the same front end, or numbers in front_end.mean and front_end.std",
            "build the catalogue again with these settings, or set both numbers",
        )
    auto = [name for name in ("mean", "std") if getattr(front_end, name) == "auto"]
    return front_end.model_copy(update={name: float(header[name]) for name in auto})
