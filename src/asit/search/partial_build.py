"""What a build that was stopped leaves behind, so that the next one goes on: a line for each recording that was read.

Lines are added as recordings are done; a torn last line is left out. The first line says what the vectors are.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from asit.errors import ConfigError
from asit.io import parsing
from asit.search import recordings
from asit.search.recordings import RecordingKey, Source

_FLUSH = 5.0  # s of work that a killed process may lose

Times = list[tuple[float, float]]
"""Start and end of each row, in s from the beginning of the file."""

Done = tuple[Source, Times, npt.NDArray[np.float16]]
"""A recording, start and end of its rows in s, and their vectors (n, D)."""


def path_of(out: Path) -> Path:
    """Where the build of an index keeps what it has so far."""
    return out.with_name(f"{out.name}.partial")


class Partial:
    """The file of a build that goes on; a context.

    Args:
        out: the index that is being made.
        settings: what the vectors depend on; JSON.
        width: D.
        anew: throw away what other settings left behind.

    Attributes:
        done: what was read before, by recording.

    Raises:
        ConfigError: other settings left something behind, and `anew` is off.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], width: int, anew: bool) -> None:
        self.path, self.width = path_of(out), width
        self.done: dict[RecordingKey, Done] = {}
        self._file: TextIO | None = None
        self._written = time.monotonic()
        head = json.dumps(settings, sort_keys=True)
        self._whole = 0  # bytes up to which the file is whole
        if self.path.is_file() and self._read(head) is False:
            if not anew:
                raise ConfigError(
                    f"{self.path} is left of a build with another model or other settings",
                    "the same as then, to go on with it",
                    "repeat that command, or pass --overwrite to start anew",
                )
            self._whole = 0
        self._head = head

    def add(self, source: Source, times: Times, vectors: npt.NDArray[np.float16]) -> None:
        """Keep a recording's rows."""
        if self._file is None:
            self._file = self._open()
        data = base64.b64encode(np.ascontiguousarray(vectors, "<f2").tobytes()).decode()
        self._file.write(json.dumps({"source": recordings.to_json(source), "times": times, "vectors": data}) + "\n")
        self.done[source.key] = source, times, vectors
        if time.monotonic() - self._written > _FLUSH:
            self._file.flush()
            self._written = time.monotonic()

    def kept(self, need: Collection[RecordingKey]) -> str:
        """How many of the recordings that are needed are kept, and where."""
        return f"{sum(key in self.done for key in need)} of {len(need)} recordings are kept in {self.path}"

    def remove(self) -> None:
        """Delete the file: the index is there."""
        self.__exit__(None, None, None)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            # A full disk tears the last line; the error that is on its way says more.
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                file.close()

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._whole:
            os.truncate(self.path, self._whole)
            return self.path.open("a", encoding="utf-8")
        file = self.path.open("w", encoding="utf-8")
        file.write(self._head + "\n")
        return file

    def _read(self, head: str) -> bool:
        """Take in what is there; False where it is of another build."""
        with self.path.open("rb") as file:
            first = file.readline()
            if first != head.encode() + b"\n":
                return not first.endswith(b"\n")  # torn in its first line, it holds nothing
            self._whole = len(first)
            for line in file:
                try:
                    found = parsing.from_json(line, surrogates=True)
                    source = recordings.from_json(found["source"])
                    vectors = np.frombuffer(base64.b64decode(found["vectors"]), "<f2").reshape(-1, self.width)
                    times = [(float(start), float(end)) for start, end in found["times"]]
                except (ValueError, KeyError, TypeError, OverflowError):
                    break
                if not line.endswith(b"\n") or len(times) != len(vectors):
                    break
                self.done[source.key] = source, times, vectors
                self._whole += len(line)
        return True
