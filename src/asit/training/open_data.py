"""Open `data`, whatever it is, as a catalogue that fits the front end."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asit.config import FinetuneSettings, FrontEndSettings, RunSettings
from asit.data.catalogue import scan
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.listing import describe_ignored
from asit.data.shards import tar_index, verify
from asit.errors import AsitError, CatalogueError, ConfigError
from asit.io import local_files, parsing
from asit.progress import counter
from asit.training import run_dir

log = logging.getLogger(__name__)

_FRONT_END_FREE = ("mean", "std", "padding")  # what the measured mean and std do not depend on


@dataclass(frozen=True)
class CatalogueRequest:
    """The settings that decide a run's catalogue."""

    data: str
    front_end: FrontEndSettings
    bad_files: float
    labels: Literal["auto", "folder"] = "auto"
    """Whether the sub-folders of a folder of recordings are its labels."""

    @classmethod
    def of(cls, settings: RunSettings, front_end: FrontEndSettings | None = None) -> CatalogueRequest:
        """Return those of a run, with the front end of its model, if any; fine-tuning reads sub-folders as classes."""
        labels: Literal["auto", "folder"] = "folder" if isinstance(settings, FinetuneSettings) else "auto"
        return cls(settings.data, front_end or settings.front_end, settings.bad_files, labels)


def catalogue(settings: CatalogueRequest, out: Path | None, *, rescan: bool = False) -> Catalogue:
    """The catalogue that `data` is, or one made of the folder, table or tar shards that it is.

    `data` may be a catalogue or an index of shards, a folder or store that holds one under the name index.jsonl, tar
    shards without an index, a folder of recordings, or a table; the first three also as URLs.

    Args:
        settings: data, front end, the budget of bad files, and what labels are.
        out: the run's folder, where a new catalogue is kept; None: a temporary one is made of the files' headers.
        rescan: scan the recordings even if the run's folder has a catalogue, which may be of another run.

    Raises:
        CatalogueError: nothing usable there.
        StoreError: a store that cannot be reached, or shards that are missing or too short.
    """
    if not settings.data:
        raise ConfigError("no data were given", "a folder of recordings, a table or a catalogue", "pass --data FOLDER")
    listed = tar_index.index_of(settings.data)
    if listed is not None:
        found = Catalogue.read(listed)
        verify.verify_sizes(found)  # one request for each shard
        return found
    if tars := tar_index.tars_of(settings.data):
        return _of_tars(settings, tars, out, rescan)
    given = Path(local_files.locate(settings.data))
    if out is None:
        with tempfile.TemporaryDirectory() as scratch:
            return scan.build(
                given,
                Path(scratch) / run_dir.CATALOGUE,
                front_end=settings.front_end,
                check="header",
                bad_files=settings.bad_files,
                statistics_clips=64,
                labels=settings.labels if given.is_dir() else "auto",
                progress=counter("looking at headers"),
            )
    place = out / run_dir.CATALOGUE
    if not rescan and place.exists():
        return Catalogue.read(place)
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        found = scan.build(
            given,
            place,
            front_end=settings.front_end,
            bad_files=settings.bad_files,
            labels=settings.labels if given.is_dir() else "auto",
            restart=_other_scan(out / f"{run_dir.CATALOGUE}.partial", given, settings.front_end),
            progress=counter("checking files"),
        )
        if passed := describe_ignored(found.header["ignored"]):
            log.info(passed)
        return found
    except AsitError:
        if made and not any(out.iterdir()):  # no data, no folder
            out.rmdir()
        raise


def _of_tars(settings: CatalogueRequest, tars: Sequence[str], out: Path | None, rescan: bool) -> Catalogue:
    """The catalogue of tar shards without an index; in a run's folder it is kept."""
    place = None if out is None else out / run_dir.CATALOGUE
    if place is not None and not rescan and place.exists():
        return Catalogue.read(place)
    made = tar_index.build(
        tars,
        settings.front_end,
        labelled=settings.labels == "folder",
        bad_files=settings.bad_files,
        statistics_clips=64 if out is None else 1000,
        progress=counter("looking at shards", "shards"),
    )
    if passed := describe_ignored(made.header["ignored"]):
        log.info(passed)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        made.write(place)
    return made


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
