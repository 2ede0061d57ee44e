"""Columns of a table: which name is which of ours."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence

from asit.errors import CatalogueError, ConfigError, suggestion

COLUMNS = {
    "path": ("file", "filename", "file_name", "filepath", "file_path"),
    "label": ("labels", "class", "category"),
    "split": (),
    "fold": (),
    "group": ("speaker",),
    "start": ("start_seconds",),
    "end": ("end_seconds",),
}
_USUAL: dict[str, tuple[str, ...]] = {
    "path": (
        *("audio", "audio_file", "audio_path", "audio_filepath", "audiofile", "audiofilename", "audio_filename"),
        *("begin path", "begin_path", "begin file", "begin_file", "recording_path", "notated_path", "fname"),
    ),
    "label": (
        *("label:species", "species", "common name", "common_name", "event_label", "primary_label", "ebird_code"),
        *("class_name", "class_label", "annotation", "annotations", "species code", "species_code"),
    ),
}
"""Names that other programs and data sets use; the first that is there counts, and only where none of `COLUMNS` is."""
_PAIRS = (
    *(("onset", "offset"), ("onset_s", "offset_s"), ("start_s", "end_s"), ("start (s)", "end (s)")),
    *(("begin time (s)", "end time (s)"), ("begin_time_s", "end_time_s"), ("starttime", "endtime")),
)
"""Such names of start and end, which count where both are there: an offset alone is the start in some formats.

Sources: Hugging Face audiofolder (file_name), NeMo (audio_filepath), DCASE (filename, onset, offset, event_label;
Audiofilename, Starttime, Endtime), crowsetta (onset_s, offset_s, notated_path), Raven, BirdNET-Analyzer (Start (s),
Common name, File), BirdCLEF (primary_label), FSD50K (fname)."""
_NAMES = {name: column for column, others in COLUMNS.items() for name in (column, *others)}
_KNOWN = ", ".join(name + (f" (or {', '.join(others)})" if others else "") for name, others in COLUMNS.items())
_ALL = {**{name: column for column, others in _USUAL.items() for name in others}, **_NAMES}
_NEAR = {name: column for name, column in _ALL.items() if name in _NAMES or len(name) > 6}

log = logging.getLogger(__name__)


def plain(name: str) -> str:
    """Return a column's name as names are compared."""
    return " ".join(name.split()).lower()


@functools.cache
def chosen(columns: str) -> dict[str, str]:
    """Parse "label=species,path=file_name" to our names and theirs, as compared; "" for one that is left out.

    Raises:
        ConfigError: no such column of ours, or no name after it.
    """
    found: dict[str, str] = {}
    for part in filter(None, map(str.strip, columns.split(","))):
        ours, equals, theirs = part.partition("=")
        ours = plain(ours)
        if ours not in COLUMNS or not equals or ours in found:
            hint = suggestion(ours, COLUMNS)
            expected = f"{', '.join(COLUMNS)}, each once, with '=' and the table's name for it"
            raise ConfigError(f"columns '{columns}': '{part}'", expected, "such as label=species,path=file_name" + hint)
        found[ours] = plain(theirs)
    return found


def known(table: str, header: Sequence[str], columns: str = "", quiet: Iterable[str] | None = None) -> list[str | None]:
    """Map the header's names to columns; None for others. What is taken and what is not used is logged.

    Args:
        table: for messages.
        header: the names.
        columns: see `chosen`.
        quiet: names that were seen before, in a table whose rows may lack any: nothing is logged about these.
    """
    found, given = [plain(name) for name in header], chosen(columns)
    if quiet is None and (absent := [name for name in given.values() if name and name not in found]):
        hint = suggestion(absent[0], found)
        expected = f"one of its columns: {', '.join(header)}"
        raise CatalogueError(f"{table} has no column '{absent[0]}'", expected, "correct --columns" + hint)
    named = {theirs: ours for ours, theirs in given.items() if theirs}
    ours = [named.get(name) or (None if _NAMES.get(name) in given else _NAMES.get(name)) for name in found]
    for name in COLUMNS:
        same = [header[i] for i, our in enumerate(ours) if our == name]
        if len(same) > 1:
            fix = f"remove one, or choose: --columns {name}={same[0]}"
            raise CatalogueError(f"{table}: {' and '.join(same)} are both the {name}", "one of them", fix)
    for name, usual in _usual(found).items():
        if name not in given and name not in ours and ours[found.index(usual)] is None:
            ours[found.index(usual)] = name
    expected = f"path and optionally others of: {_KNOWN}"
    slips = {
        name: close
        for name, our in zip(found, ours, strict=True)
        if our is None and (close := next((one for one in _NEAR if _slip(name, one)), None))
        if _NEAR[close] not in ours and _NEAR[close] not in given
    }
    if slips:
        names = ", ".join(f"'{name}' (did you mean '{close}'?)" for name, close in slips.items())
        fix = "rename or remove these columns, or name the right ones with --columns"
        raise CatalogueError(f"{table}: unknown columns {names}", expected, fix)
    if "path" not in ours:
        problem = f"{table}: no column with the path; the first line is '{', '.join(header)}'"
        fix = "add that column or a first line with the names, or name it: --columns path=NAME"
        raise CatalogueError(problem, f"the columns' names: {expected}", fix)
    _log(table, header, ours, quiet or ())
    return ours


def is_path(name: str, columns: str) -> bool:
    """Whether a column of this name may be the path."""
    theirs = chosen(columns).get("path")
    return plain(name) == theirs if theirs else _ALL.get(plain(name)) == "path"


def _usual(found: Sequence[str]) -> Mapping[str, str]:
    taken = {ours: next((name for name in names if name in found), "") for ours, names in _USUAL.items()}
    start, end = next((pair for pair in _PAIRS if pair[0] in found and pair[1] in found), ("", ""))
    return {ours: name for ours, name in (taken | {"start": start, "end": end}).items() if name}


def _log(table: str, header: Sequence[str], ours: Sequence[str | None], quiet: Iterable[str]) -> None:
    fresh = [(name, our) for name, our in zip(header, ours, strict=True) if name not in quiet]
    taken = ", ".join(f"{our} from '{name}'" for name, our in fresh if our and plain(name) != our)
    _log_once(logging.INFO, table, "columns", taken)
    _log_once(
        logging.WARNING, table, "columns that are not used", ", ".join(f"'{name}'" for name, our in fresh if not our)
    )


@functools.cache  # once per process
def _log_once(level: int, table: str, what: str, names: str) -> None:
    if names:
        log.log(level, "%s: %s: %s", table, what, names)


def _slip(name: str, known: str) -> bool:
    """Whether a name is one letter more, less or different from a known one, or has two letters exchanged."""
    if len(name) == len(known):
        at = [i for i, (one, other) in enumerate(zip(name, known, strict=True)) if one != other]
        exchanged = len(at) == 2 and at[1] == at[0] + 1 and name[at[0]] == known[at[1]] and name[at[1]] == known[at[0]]
        return exchanged or (len(at) == 1 and len(known) > 3)
    longer, shorter = sorted((name, known), key=len, reverse=True)
    return len(longer) == len(shorter) + 1 and any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
