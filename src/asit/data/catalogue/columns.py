"""Columns, small enough for two million rows, and text to and from the bytes of a file."""

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
    """Strings in one UTF-8 blob: no Python object for each, so forked loaders never copy the pages."""

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
        # The last entry is what code -1 means.
        return np.array([*self.words, None], dtype=object)[self.codes]

    def take(self, indices: npt.NDArray[np.int64]) -> Words:
        return Words(self.codes[indices], self.words)

    def counts(self) -> dict[str, int]:
        """How many rows each text has, in the order in which they first came."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self.words))
        return dict(zip(self.words, counts.tolist(), strict=True))


class Coder:
    """Turns texts to codes as they come, a new code for each new text; see `normal` for which texts are one.

    Args:
        name: of the column.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.words: dict[str, int] = {}
        self._other: dict[str | None, int] = {None: -1}  # codes of texts that are not in their normal form

    def __call__(self, text: str | None) -> int:
        """The text's code; -1 for none.

        Raises:
            ValueError: as `normal`; or half a surrogate pair, which no file takes.
        """
        code = self._other.get(text)
        if code is None and (code := self.words.get(text or "")) is None:
            word = normal(self.name, text)
            if word is not None:
                encode(word)
            code = -1 if word is None else self.words.setdefault(word, len(self.words))
            if word != text:
                self._other[text] = code
        return code

    def column(self, codes: npt.NDArray[np.int32]) -> Words | None:
        """The column that these codes make; None when no text ever came."""
        return Words(codes, tuple(self.words)) if self.words else None


WORDS = ("label", "split", "fold", "group")
"""The columns of few distinct texts, by their names in a file's lines."""
SHARD = "shard"
"""The column of tar shards' names: few distinct texts too."""


@dataclass(frozen=True)
class Columns:
    """A catalogue's rows; N of them.

    Attributes:
        paths: relative to the catalogue's root, or absolute.
        seconds: (N,) float32, length.
        rate: (N,) int32, Hz.
        channels: (N,) int16.
        words: a column for each of `WORDS`, and `SHARD`, that has texts.
        starts: (N,) float32, s, where in its file each clip starts; None: all at 0.
        sha256: (N, 32) uint8; None: not known.
        spans: (N, 2) int64, where in its shard each clip's bytes begin, and how many they are; None: no shards.
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
        """The rows, ascending, that are the same part of the same file as an earlier one."""
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
        """The rows at these places, in this order."""
        return Columns(
            self.paths.take(rows),
            self.seconds[rows],
            self.rate[rows],
            self.channels[rows],
            {name: column.take(rows) for name, column in self.words.items()},
            None if self.starts is None else self.starts[rows],
            None if self.sha256 is None else self.sha256[rows],
            None if self.spans is None else self.spans[rows],
        )


DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What a damaged line raises on its way into the columns."""

_TEXTS = (*WORDS, SHARD)
_NUMBERS: dict[str, type[np.generic]] = {"seconds": np.float32, "rate": np.int32, "channels": np.int16}


class Rows:
    """Columns that grow a batch of rows at a time."""

    def __init__(self) -> None:
        self.paths: list[Texts] = []
        self.numbers: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in (*_NUMBERS, "start", "sha256", "spans")}
        self.codes: dict[str, list[npt.NDArray[np.int32]]] = {name: [] for name in _TEXTS}
        self.coders = {name: Coder(name) for name in _TEXTS}
        self.summed = False
        self.length = 0

    def __len__(self) -> int:
        return self.length

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, or raise one of DAMAGE and add none."""
        count, named = len(rows), set().union(*rows)
        paths = Texts.pack(encode(row["path"]) for row in rows)
        numbers: dict[str, npt.NDArray[Any]] = {
            name: np.array([row[name] for row in rows], kind) for name, kind in _NUMBERS.items()
        }
        if any(values.ndim != 1 for values in numbers.values()):  # a list for a number
            raise ValueError("seconds, rate and channels must be numbers")
        if not (np.isfinite(numbers["seconds"]).all() and all((values > 0).all() for values in numbers.values())):
            raise ValueError("seconds, rate and channels must be above 0")
        # Views of one zero cost no memory where there is nothing to hold.
        numbers["start"] = np.broadcast_to(np.float32(0), count)
        if "start" in named and any(starts := [row.get("start") or 0.0 for row in rows]):
            numbers["start"] = np.array(starts, np.float32)
            if not (
                numbers["start"].ndim == 1 and np.isfinite(numbers["start"]).all() and (numbers["start"] >= 0).all()
            ):
                raise ValueError("start must be 0 or above")
        numbers["sha256"] = np.broadcast_to(np.uint8(0), (count, 32))
        hexes = [row.get("sha256") for row in rows] if "sha256" in named else []
        if any(hexes):
            sums = [[*bytes.fromhex(text or "00" * 32)] for text in hexes]
            numbers["sha256"] = np.array(sums, np.uint8).reshape(count, 32)
        numbers["spans"] = _spans(rows) if SHARD in named else np.broadcast_to(np.int64(0), (count, 2))
        codes = {name: np.broadcast_to(np.int32(-1), count) for name in _TEXTS}
        for name in named.intersection(_TEXTS):
            texts = [row.get(name) for row in rows]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise ValueError(f"{name} must be text")
            codes[name] = np.fromiter(map(self.coders[name], texts), np.int32, count)
        for name, column in codes.items():
            self.codes[name].append(column)
        self.paths.append(paths)
        for name, values in numbers.items():
            self.numbers[name].append(values)
        self.summed |= any(hexes)
        self.length += count

    def columns(self) -> Columns:
        """All rows so far."""

        def joined(name: str, kind: type[np.generic]) -> npt.NDArray[Any]:
            return np.concatenate([np.empty(0, kind), *self.numbers[name]])

        starts = joined("start", np.float32)
        words = {
            name: column
            for name, coder in self.coders.items()
            if (column := coder.column(np.concatenate([np.empty(0, np.int32), *self.codes[name]])))
        }
        return Columns(
            Texts.join(self.paths),
            joined("seconds", np.float32),
            joined("rate", np.int32),
            joined("channels", np.int16),
            words,
            starts if starts.any() else None,
            np.concatenate(self.numbers["sha256"]) if self.summed else None,
            np.concatenate(self.numbers["spans"]) if SHARD in words else None,
        )


def _spans(rows: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.int64]:
    """Where the rows' bytes lie in their shards, (N, 2); of a row without a shard, zeros."""
    pairs = [(row["offset"], row["size"]) if row.get(SHARD) is not None else (0, 0) for row in rows]
    spans = np.array(pairs, np.int64).reshape(len(rows), 2)
    inside = np.fromiter((row.get(SHARD) is not None for row in rows), np.bool_, len(rows))
    if (spans < 0).any() or (spans[inside, 1] == 0).any():
        raise ValueError("offset must be 0 or above, and size above 0")
    return spans


_WEIGHT = re.compile(r"[\d.,eE%+\s-]*\d[\d.,eE%+\s-]*")
_WHOLE = re.compile(r"(-?\d+)\.0*")
_INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))  # zero-width space, word joiner, byte order mark


def identifier(value: object) -> str | None:
    """The text by which labels, splits, folds and groups are compared, whatever file they come from; None for nothing.

    White space at the ends and zero-width characters are dropped, other runs of white space become one blank, and
    characters are composed (Unicode NFC). A whole number is written without a point: 1, 1.0, "1" and "1.0" are "1".
    None, NaN, "nan" and an empty text are nothing. True and False are "True" and "False".

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
    if (whole := _WHOLE.fullmatch(text)) is not None:
        text = whole[1]
    return None if text in ("", "nan", "NaN", "NAN", "-nan", "<NA>") else text


def normal(column: str, value: object) -> str | None:
    """The text of a cell of one of `WORDS` as an :func:`identifier`; of a label cell each of its names; else as it is.

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
    """What stands after a label's last colon, where it is meant as a number; whether it is one is for the caller."""
    _, colon, weight = label.rpartition(":")
    return weight if colon and _WEIGHT.fullmatch(weight) else None


def encode(text: str) -> bytes:
    """Text to UTF-8. File names need not be UTF-8; surrogateescape brings any of them back as it was."""
    return text.encode("utf-8", "surrogateescape")


def decode(text: bytes) -> str:
    """What `encode` was given."""
    return text.decode("utf-8", "surrogateescape")


def json_line(row: dict[str, Any]) -> bytes:
    """One line of a JSONL file."""
    return encode(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
