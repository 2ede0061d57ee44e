"""Columns that stay small for two million rows, and the conversion of text to and from the bytes of a file."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


class Texts:
    """Strings in one UTF-8 blob; without a Python object for each, forked loaders never copy the pages."""

    def __init__(self, blob: bytes, ends: npt.NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends

    @classmethod
    def pack(cls, texts: Iterable[bytes]) -> Texts:
        blob, ends = bytearray(), []
        for text in texts:
            blob += text
            ends.append(len(blob))
        return cls(bytes(blob), np.array(ends, np.int64))

    @classmethod
    def join(cls, parts: Sequence[Texts]) -> Texts:
        starts = np.cumsum([0] + [len(part.blob) for part in parts])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(b"".join(part.blob for part in parts), np.concatenate([np.empty(0, np.int64), *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def raw(self, index: int) -> bytes:
        return self.blob[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]

    def __getitem__(self, index: int) -> str:
        return decode(self.raw(index))

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends.tolist():
            yield decode(self.blob[start:end])
            start = end

    def take(self, indices: npt.NDArray[np.int64]) -> Texts:
        return Texts.pack(self.raw(index) for index in indices.tolist())


class Words:
    """A column of few distinct strings, or none: a code for each row."""

    def __init__(self, codes: npt.NDArray[np.int32], words: tuple[str, ...]) -> None:
        self.codes, self.words = codes, words

    def __getitem__(self, index: int) -> str | None:
        code = int(self.codes[index])
        return None if code < 0 else self.words[code]

    def all(self) -> npt.NDArray[np.object_]:
        """Return each row's text or None, (N,) objects."""
        return np.array([*self.words, None], dtype=object)[self.codes]  # code -1 is the last entry

    def take(self, indices: npt.NDArray[np.int64]) -> Words:
        return Words(self.codes[indices], self.words)

    def counts(self) -> dict[str, int]:
        """Count the rows of each text, in order of first occurrence."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.words))
        return dict(zip(self.words, counts.tolist(), strict=True))


class Coder:
    """Assigns a code to each distinct text of a column, after normalising it by `normal`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.words: dict[str, int] = {}
        self._codes: dict[str | None, int] = {None: -1}

    def __call__(self, text: str | None) -> int:
        """Return the text's code; -1 for none.

        Raises:
            ValueError: as `normal`; or half a surrogate pair, which cannot be written.
        """
        if (code := self._codes.get(text)) is None:
            word = normal(self.name, text)
            if word is not None:
                encode(word)
            code = self._codes[text] = -1 if word is None else self.words.setdefault(word, len(self.words))
        return code

    def column(self, codes: npt.NDArray[np.int32]) -> Words:
        """Return the column with these codes."""
        return Words(codes, tuple(self.words))


WORDS = ("label", "split", "fold", "group")
"""Columns with few distinct texts, by their names in the file."""
SHARD = "shard"
"""Column of the tar shards' names."""


@dataclass(frozen=True)
class Columns:
    """The N rows of a catalogue.

    Attributes:
        paths: relative to the catalogue's root, or absolute.
        seconds: (N,) float32, length.
        rate: (N,) int32, Hz.
        channels: (N,) int16.
        words: a column for each of `WORDS` and `SHARD` that has texts.
        starts: (N,) float32, s, where in its file each clip starts; None: all at 0.
        sha256: (N, 32) uint8; None: not known.
        spans: (N, 2) int64, offset and size of each clip's bytes in its shard; None: no shards.
    """

    paths: Texts
    seconds: npt.NDArray[np.float32]
    rate: npt.NDArray[np.int32]
    channels: npt.NDArray[np.int16]
    words: Mapping[str, Words]
    starts: npt.NDArray[np.float32] | None = None
    sha256: npt.NDArray[np.uint8] | None = None
    spans: npt.NDArray[np.int64] | None = None

    def duplicates(self) -> npt.NDArray[np.int64]:
        """Return the rows, ascending, that repeat the same part of the same file."""
        names = np.fromiter((hash(self.paths.raw(row)) for row in range(len(self.paths))), np.int64)
        parts = [names, self.seconds.view(np.int32).astype(np.int64)]
        parts += [] if self.starts is None else [self.starts.view(np.int32).astype(np.int64)]
        parts += [] if self.spans is None else [self.spans[:, 0]]
        order = np.lexsort(parts)
        same = np.ones(max(0, len(order) - 1), np.bool_)
        for part in parts:
            same &= part[order[1:]] == part[order[:-1]]
        return np.sort(order[1:][same])

    def take(self, rows: npt.NDArray[np.int64]) -> Columns:
        """Return these rows in this order."""
        return Columns(
            paths=self.paths.take(rows),
            seconds=self.seconds[rows],
            rate=self.rate[rows],
            channels=self.channels[rows],
            words={name: column.take(rows) for name, column in self.words.items()},
            starts=None if self.starts is None else self.starts[rows],
            sha256=None if self.sha256 is None else self.sha256[rows],
            spans=None if self.spans is None else self.spans[rows],
        )


@dataclass(frozen=True)
class ShardSpans:
    """Where the clips of a catalogue are in tar shards.

    Attributes:
        shards: absolute paths or URLs.
        codes: (N,) int32, index of each clip's shard; -1: the clip is a file.
        spans: (N, 2) int64, offset and size of each clip's bytes in its shard.
    """

    shards: tuple[str, ...]
    codes: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int64]


DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What a damaged line raises when it is parsed."""

_TEXTS = (*WORDS, SHARD)
_NUMBERS: dict[str, type[np.generic]] = {"seconds": np.float32, "rate": np.int32, "channels": np.int16}


class Rows:
    """Columns that grow a batch of rows at a time; a batch lacks the columns that none of its rows has."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []
        self.coders = {name: Coder(name) for name in _TEXTS}

    def __len__(self) -> int:
        return sum(len(batch["path"]) for batch in self.batches)

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, or raise one of DAMAGE and add none."""
        named = set().union(*rows)
        batch: dict[str, Any] = {"path": Texts.pack(encode(row["path"]) for row in rows)}
        for name, kind in _NUMBERS.items():
            values = batch[name] = np.array([row[name] for row in rows], kind)
            if values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"{name} must be a number above 0")
        if "start" in named and any(starts := [row.get("start") or 0.0 for row in rows]):
            batch["start"] = start = np.array(starts, np.float32)
            if start.ndim != 1 or not (np.isfinite(start) & (start >= 0)).all():
                raise ValueError("start must be 0 or above")
        if "sha256" in named and any(hexes := [row.get("sha256") for row in rows]):
            sums = [[*bytes.fromhex(text or "00" * 32)] for text in hexes]
            batch["sha256"] = np.array(sums, np.uint8).reshape(len(rows), 32)
        if SHARD in named:
            inside = np.array([row.get(SHARD) is not None for row in rows], np.bool_)
            pairs = [(row["offset"], row["size"]) if row.get(SHARD) is not None else (0, 0) for row in rows]
            batch["spans"] = spans = np.array(pairs, np.int64).reshape(len(rows), 2)
            if (spans < 0).any() or (spans[inside, 1] == 0).any():
                raise ValueError("offset must be 0 or above, and size above 0")
        for name in named.intersection(_TEXTS):
            texts = [row.get(name) for row in rows]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be text")
            batch[name] = np.fromiter(map(self.coders[name], texts), np.int32, len(rows))
        self.batches.append(batch)

    def columns(self) -> Columns:
        """Return the rows added so far as columns."""

        def joined(name: str, missing: np.generic, *shape: int) -> npt.NDArray[Any]:
            parts = [np.empty((0, *shape), missing.dtype)]
            for batch in self.batches:  # broadcast values cost no memory
                parts.append(batch.get(name, np.broadcast_to(missing, (len(batch["path"]), *shape))))
            return np.concatenate(parts)

        def optional(name: str, missing: np.generic, *shape: int) -> npt.NDArray[Any] | None:
            return joined(name, missing, *shape) if any(name in batch for batch in self.batches) else None

        words = {name: coder.column(joined(name, np.int32(-1))) for name, coder in self.coders.items() if coder.words}
        return Columns(
            paths=Texts.join([batch["path"] for batch in self.batches]),
            **{name: joined(name, kind(0)) for name, kind in _NUMBERS.items()},
            words=words,
            starts=optional("start", np.float32(0)),
            sha256=optional("sha256", np.uint8(0), 32),
            spans=joined("spans", np.int64(0), 2) if SHARD in words else None,
        )


_WEIGHT = re.compile(r"[\d.,eE%+\s-]*\d[\d.,eE%+\s-]*")
_INTEGER = re.compile(r"(-?\d+)\.0*")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # zero-width space, word joiner, byte order mark


def identifier(value: object) -> str | None:
    """Normalise a label, split, fold or group, so that values from different files compare; None for a missing one.

    Outer white space and zero-width characters are removed, other runs of white space become one blank, and characters
    are composed (Unicode NFC). Whole numbers have no point: 1, 1.0, "1" and "1.0" are "1". None, NaN, "nan" and an
    empty text are missing.

    Raises:
        ValueError: no text, number or truth value, or a text with half a surrogate pair.
    """
    if value is None:
        return None
    if not isinstance(value, str | int | float | np.generic):
        raise ValueError(f"{value!r:.60} is no text and no number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = " ".join(str(value).translate(_INVISIBLE).split())
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        if any("\ud800" <= letter < "\udc80" or "\udcff" < letter <= "\udfff" for letter in text):
            raise ValueError(f"{text!a:.60} has half a character")
    text = _INTEGER.sub(r"\1", text) if _INTEGER.fullmatch(text) else text
    return None if text in ("", "nan", "NaN", "NAN", "-nan", "<NA>") else text


def normal(column: str, value: object) -> str | None:
    """Apply :func:`identifier` to a cell of one of `WORDS` (of a label cell, to each name); other columns are kept.

    Raises:
        ValueError: as :func:`identifier`.
    """
    if column not in WORDS:
        return None if value is None else str(value)
    if column != "label" or not isinstance(value, str) or not (";" in value or ":" in value):
        return identifier(value)
    names = []
    for piece in value.split(";"):
        weight = soft_weight(piece.strip())
        end = "" if weight is None else ":" + weight.strip()
        name = identifier(piece.strip()[: -len(weight) - 1] if weight is not None else piece)
        if name is not None or end:
            names.append((name or "") + end)
    return ";".join(names) or None


def soft_weight(label: str) -> str | None:
    """Return the text after a label's last colon if it looks like a number; the caller checks that it is one."""
    _, colon, weight = label.rpartition(":")
    return weight if colon and _WEIGHT.fullmatch(weight) else None


def encode(text: str) -> bytes:
    """Encode text as UTF-8; surrogateescape keeps file names that are not UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def decode(text: bytes) -> str:
    """Reverse `encode`."""
    return text.decode("utf-8", "surrogateescape")


def json_line(row: dict[str, Any]) -> bytes:
    """Format one line of a JSONL file."""
    return encode(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
