"""Columns of text, small enough for two million rows, and text to and from the bytes of a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
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


def encode(text: str) -> bytes:
    """Text to UTF-8. File names need not be UTF-8; surrogateescape brings any of them back as it was."""
    return text.encode("utf-8", "surrogateescape")


def decode(text: bytes) -> str:
    """What `encode` was given."""
    return text.decode("utf-8", "surrogateescape")


def json_line(row: dict[str, Any]) -> bytes:
    """One line of a JSONL file."""
    return encode(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")
