"""Names of a head's outputs: from the user's file, the source, or numbers."""

from __future__ import annotations

import csv
from pathlib import Path

from asit.errors import ConfigError
from asit.interop.convert.hf_ast import read_json
from asit.interop.convert.source_model import SourceHead
from asit.io import local_files
from asit.io.safe_load import shown

AUDIOSET = 527
"""Number of AudioSet's classes, of which a clip may have several."""

_COLUMNS = ("display_name", "label", "name", "class")


def names_for(head: SourceHead, given: Path | None) -> tuple[tuple[str, ...], str]:
    """Return the names of a head's outputs and their origin.

    Args:
        given: a table with a column display_name (AudioSet's class_labels_indices.csv), label, name or class; a
            .json file with a list under "classes" or numbered names under "id2label"; or a text with one per line.

    Raises:
        ConfigError: the file cannot be read, or has another number of names.
    """
    count = len(head.state["linear.bias"])
    if given is None:
        if head.classes is not None:
            return head.classes, "the source"
        return tuple(f"class {i}" for i in range(count)), "number, since the file has no names (pass --labels)"
    names = _read(given)
    if len(names) != count:
        audioset = "; of AudioSet that is class_labels_indices.csv" if count == AUDIOSET else ""
        raise ConfigError(
            f"{given} has {len(names)} names ({', '.join(map(shown, names[:3]))}), the head has {count} outputs",
            "a name for each output, in their order",
            "give the list that the network was trained with" + audioset,
        )
    return names, given.name


def _read(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise ConfigError(
            f"{path} is {'a folder' if path.is_dir() else local_files.special(path) or 'not there'}",
            "a file with the names of the classes",
            "AudioSet's are in class_labels_indices.csv, beside its lists of segments",
        )
    if path.suffix == ".json":
        wanted = 'a list under "classes", or names by number under "id2label"'
        value = read_json(path, wanted, "give a text with one name a line")
        named = value.get("id2label", value.get("classes", value))
        if isinstance(named, dict):
            named = [named.get(str(i)) for i in range(len(named))]
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise ConfigError(f"{path} has no names", wanted)
        return tuple(named)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "a text in UTF-8, a .csv or a .json file") from error
    if path.suffix not in (".csv", ".tsv"):
        return tuple(line.strip() for line in lines if line.strip())
    try:
        rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise ConfigError(f"{path} cannot be read: {error}", "a table with commas (.csv) or tabs (.tsv)") from error
    column = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if column is None:
        columns = ", ".join(shown(str(name)) for name in rows[0]) if rows else "of an empty table"
        raise ConfigError(f"{path} has the columns {columns}", "one of " + ", ".join(_COLUMNS))
    order = [row.get("index") for row in rows]
    if "index" in rows[0] and order != [str(i) for i in range(len(rows))]:
        raise ConfigError(f"{path} has the index {', '.join(map(str, order[:3]))}, ...", "0, 1, 2 and so on, in order")
    names = tuple((row[column] or "").strip() for row in rows)
    if "" in names:
        raise ConfigError(f"{path} has no {column} in row {names.index('') + 1}", "a name in each row")
    return names
