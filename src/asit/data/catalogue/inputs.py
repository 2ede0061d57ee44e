"""Inputs of commands: files, folders, patterns, catalogues, tables and tar shards as one list of recordings."""

from __future__ import annotations

import functools
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asit.audio import files
from asit.audio.stream import OpenSound, open_sound
from asit.config import FrontEndSettings, TableSettings
from asit.data.annotations import annotation_files, clips
from asit.data.catalogue import frames, listing, tables
from asit.data.catalogue.catalogue import Catalogue, is_catalogue, relative
from asit.data.shards import range_reader, tar_index, tar_reader
from asit.errors import AudioError, CatalogueError, ConfigError
from asit.io import local_files, storage


@dataclass(frozen=True, slots=True)
class Item:
    """One recording.

    Attributes:
        name: in outputs: the path as given, or relative to the only folder given; "shard.tar/member.wav" for a member
            of a tar; as in the catalogue or table that lists it.
        path: of the file or tar shard, or the URL of a shard.
        member: name in the tar shard at `path`; None: the file itself.
        offset, size: of a member's bytes in the tar.
        start: s; where in its file a listed clip starts.
        seconds: length of a listed clip, s; None: to the file's end.
        label: of a listed clip.
        fault: why it cannot be read, if that is known already.
        listed: in a shard that an index lists or that is in a store: a shard that cannot be read is an error.
    """

    name: str
    path: str
    member: str | None = None
    offset: int | None = None
    size: int | None = None
    start: float = 0.0
    seconds: float | None = None
    label: str | None = None
    fault: str | None = None
    listed: bool = False

    @property
    def text(self) -> str:
        """The name as valid Unicode; bytes that are not UTF-8 are escaped with a backslash."""
        return self.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def sound(self) -> str | bytes:
        """Return the file's path, or the bytes of a tar's member.

        Raises:
            AudioError: the known fault, or a tar that can no longer be read.
            StoreError: a shard that an index lists is missing, or its store cannot be reached.
        """
        if self.fault is not None:
            raise AudioError(f"{self.name}: {self.fault}", "a recording", "repair it, or leave it out")
        if self.offset is None or self.size is None:
            return self.path
        if self.listed or storage.is_url(self.path):
            return storage.read_range(self.path, self.offset, self.size)
        try:
            with local_files.open_file(self.path) as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise AudioError(f"{self.path}: {error.strerror}", "a readable tar file", "check the path") from None
        if len(found) < self.size:
            raise AudioError(f"{self.path} is shorter now", f"{self.size} bytes of {self.member}", "fetch it again")
        return found


class InputReader:
    """Reads many items from several threads, in about their order; neighbours in a store are fetched together."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.ahead = range_reader.ReadAhead(map(_span, items))

    def __call__(self, index: int) -> str | bytes:
        """Return `Item.sound` of an item; raises the same errors."""
        item = self.items[index]
        span = _span(item) if index in self.ahead else None
        return item.sound() if span is None else self.ahead.read(index, span)

    def pieces(self, index: int, settings: FrontEndSettings) -> Iterator[tuple[float, OpenSound]]:
        """Yield once: where an item (or the part that it lists) begins in its file, and its sound at the model's rate.

        Raises:
            AudioError, StoreError: as `Item.sound` and `open_sound`.
        """
        item = self.items[index]
        with open_sound(self(index), None, settings.rate, settings.resampler, item.start, item.seconds) as sound:
            yield item.start, sound


def _span(item: Item) -> range_reader.ByteSpan | None:
    if item.fault is not None or item.offset is None or item.size is None:
        return None
    return range_reader.ByteSpan(item.path, item.offset, item.size)


def named(name: str, reason: str) -> str:
    """Format a reason in one line, after the name unless the reason contains it."""
    return " ".join((reason if name in reason else f"{name}: {reason}").split())


def expand(inputs: Any, others: Counter[str] | None = None, columns: str = "") -> list[Item]:
    """List the recordings of all inputs, in order, without opening them.

    A folder gives all audio below it and in its tar shards, sorted by name, without hidden files; a folder with an
    ``index.jsonl`` of `asit shard` gives what that lists. A pattern with ``*``, ``?`` or ``[...]`` (``**``: folders at
    any depth) gives its matches, sorted by name. A ``.jsonl`` of `asit catalogue` or `asit shard`, a table (CSV, TSV,
    JSONL, Parquet) or annotations (Raven, Praat) give their clips; an uncompressed ``.tar`` its audio, ``{000..009}``
    in its name stands for several. A URL may be an index, a folder with one, a tar, or a pattern of tars. Any other
    file is a recording, whatever its name.

    Args:
        inputs: what to list, or a table in memory (`frames.stored`). A pipe, socket or device in a folder or pattern is
            an item with a fault. A pattern enters each real folder once.
        others: gets the number of other files by suffix.
        columns: names of the columns of tables, see `TableSettings`.

    Raises:
        ConfigError: no input, or a recording given twice.
        CatalogueError: an input that does not exist or holds no audio, a pattern without a match, an unreadable list
            or tar.
    """
    if not isinstance(inputs, Sequence) or (inputs and not isinstance(inputs[0], str | os.PathLike | Item)):
        inputs, columns = [frames.stored(inputs, columns)], ""
    if not inputs:
        raise ConfigError("no input", "files, folders, patterns, catalogues or tar shards", "name at least one")
    items: list[Item] = []
    others = Counter() if others is None else others
    for given in inputs:
        if isinstance(given, Item):
            items.append(given)
            continue
        items.extend(_of(os.fspath(given), len(inputs) > 1, others, columns))
    _refuse_twins(items)
    return items


def _of(given: str, several: bool, left: Counter[str], columns: str) -> Iterator[Item]:
    if not given or "\0" in given:
        raise CatalogueError(f"an input is {given!r}", "a path", "check the command")
    if not storage.is_url(given):
        given = local_files.locate(given)
    if storage.is_url(given) or os.path.isdir(given):
        index = tar_index.index_of(given)
        if index is not None:
            return _of_catalogue(index)
    braces = len(tar_index.expand_braces(given)) > 1 and not os.path.lexists(given)
    if storage.is_url(given) or braces:
        tars = tar_index.tars_of(given)
        root = storage.parent(tars[0])
        return itertools.chain.from_iterable(_of_shard(tar, relative(tar, root), left) for tar in tars)
    if os.path.isdir(given):
        return _of_folder(given, given if several else "", left)
    if os.path.lexists(given):
        return _of_file(given, left, columns)
    if tar_index.is_pattern(given):
        return _of_pattern(given, left)
    hint = tables.near(Path(given))
    raise CatalogueError(f"there is no {given}", "a file, a folder or a pattern that matches", "check the path" + hint)


def _of_file(path: str, left: Counter[str], columns: str = "") -> Iterator[Item]:
    suffix = os.path.splitext(path)[1].lower()
    if tar_reader.is_shard(path) or tar_reader.is_packed(path):
        return _of_shard(path, path, left)
    if suffix == ".jsonl" and is_catalogue(Path(path)):
        return _of_catalogue(path)
    annotated = suffix not in files.SUFFIXES and annotation_files.kind_of(path, alone=False)
    if annotated or suffix in tables.SUFFIXES:
        return _of_table(path, columns)
    return iter([Item(path, path)])


def _special(path: str) -> str | None:
    kind = local_files.special(path)
    return None if kind is None else f"it is {kind}, not a regular file"


def _of_folder(folder: str, prefix: str, left: Counter[str]) -> Iterator[Item]:
    """Yield audio and tar shards below a folder; names begin with `prefix`."""
    others: Counter[str] = Counter()
    count = 0
    for inner, closed in listing.walk_audio(folder, files.SUFFIXES | {tar_reader.SUFFIX}, others):
        path, name = os.path.join(folder, inner), os.path.join(prefix, inner)
        count += 1
        if closed is not None:
            yield Item(name, path, fault=f"the folder cannot be read: {closed}")
        elif fault := _special(path):
            yield Item(name, path, fault=fault)
        elif os.path.splitext(inner)[1].lower() == tar_reader.SUFFIX:
            try:
                yield from _of_shard(path, name, left)
            except CatalogueError as error:  # of this shard alone
                yield Item(name, path, fault=error.found)
        else:
            yield Item(name, path)
    if not count:
        raise listing.no_audio("folder", folder, others)
    left.update(others)


def _of_pattern(pattern: str, left: Counter[str]) -> Iterator[Item]:
    matches = listing.matches(pattern)
    if not matches:
        raise CatalogueError(f"nothing matches {pattern}", "existing paths", "check it; ** goes through folders")
    others: Counter[str] = Counter()
    real = _real_paths()
    given: set[tuple[str, str | None]] = set()
    for path in matches:
        suffix = os.path.splitext(path)[1].lower()
        if os.path.isdir(path):
            found = _of_folder(path, path, left)
        elif suffix in files.SUFFIXES or suffix == tar_reader.SUFFIX:
            fault = _special(path)
            found = iter([Item(path, path, fault=fault)]) if fault else _of_file(path, left)
        else:
            others[listing.suffix_of(path)] += 1
            continue
        for item in found:  # a folder and what is in it may both match, and links may lead to either again
            if (key := (real(item.path), item.member)) not in given:
                given.add(key)
                yield item
    if not given:
        raise listing.no_audio("pattern", pattern, others)
    left.update(others)


def _real_paths() -> Callable[[str], str]:
    """Return a function that resolves the links in a path's folder, each folder once."""
    folder = functools.cache(os.path.realpath)

    def real(path: str) -> str:
        parent, name = os.path.split(path)
        return os.path.join(folder(parent or "."), name)

    return real


def _of_catalogue(path: str) -> Iterator[Item]:
    catalogue = Catalogue.read(path)
    starts, shards, labels = catalogue.starts, catalogue.shards, catalogue.labels
    for i, name in enumerate(catalogue.ids()):
        start = float(starts[i])
        plain = name.rpartition("@")[0] if start else name
        path, member, span = storage.join(catalogue.root, plain), None, (None, None)
        if shards is not None and (code := int(shards.codes[i])) >= 0:
            path, member, span = shards.shards[code], plain, shards.spans[i].tolist()
        yield Item(
            name=plain,
            path=path,
            member=member,
            offset=span[0],
            size=span[1],
            start=start,
            seconds=float(catalogue.seconds[i]),
            label=labels[i],
            listed=member is not None,
        )


def _of_table(path: str, columns: str) -> Iterator[Item]:
    rows = clips.rows_of(path, TableSettings(columns=columns))
    rows = list(rows) if frames.is_stored(path) else rows
    root = frames.root_of(path, [row.path for row in rows] if isinstance(rows, list) else ())
    for row in rows:
        start = row.start or 0.0
        seconds = None if row.end is None else row.end - start
        yield Item(relative(row.path, root), row.path, start=start, seconds=seconds, label=row.label)


def _of_shard(path: str, name: str, left: Counter[str]) -> Iterator[Item]:
    shard = tar_reader.read_shard(path)
    if not shard.members and shard.fault is None:
        raise listing.no_audio("tar file", path, shard.others)
    left.update({suffix: count for suffix, count in shard.others.items() if suffix not in tar_reader.SIDECARS})
    for member in shard.members:
        where = member.name, member.offset, member.size
        yield Item(f"{name}/{member.name}", path, *where, fault=member.fault, listed=storage.is_url(path))
    if shard.fault is not None:
        yield Item(name, path, fault=shard.fault)


def _refuse_twins(items: Sequence[Item]) -> None:
    real = _real_paths()

    def name(item: Item) -> object:
        return item.name, item.start, item.seconds

    def location(item: Item) -> object:
        path = item.path if storage.is_url(item.path) else real(os.path.normpath(item.path))
        return path, item.offset, item.start, item.seconds

    for key, how in ((name, "given twice"), (location, "the same")):
        counts = Counter(map(key, items))
        if len(counts) < len(items):
            twice = list(dict.fromkeys(item.name for item in items if counts[key(item)] > 1))
            first = ", ".join(twice[:3]) + (", ..." if len(twice) > 3 else "")
            found = f"{len(twice)} {'input is' if len(twice) == 1 else 'inputs are'} {how}: {first}"
            raise ConfigError(found, "each file, or part of a file, once", "remove one, or give folders by themselves")
