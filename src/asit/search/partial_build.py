"""The file from which a stopped build resumes: a line for each recording that was read.

Lines are appended as recordings are done; a torn last line is ignored. The first line says what the vectors are.
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
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from asit.errors import ConfigError
from asit.io import parsing
from asit.search import recordings
from asit.search.recordings import RecordingKey, Source

_FLUSH = 5.0  # s of work that a killed process may lose


class EmbeddedRecording(NamedTuple):
    """A recording, start and end of its rows in s from the beginning of the file, and their vectors (n, D)."""

    source: Source
    times: list[tuple[float, float]]
    vectors: npt.NDArray[np.float16]


class PartialBuild:
    """The file of a build; a context manager.

    Args:
        out: the index that is being made.
        settings: all that the vectors depend on; JSON.
        width: D.
        restart: drop what a build with other settings left.

    Attributes:
        done: recordings that an earlier build read.

    Raises:
        ConfigError: a build with other settings left something, and `restart` is off.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], width: int, restart: bool) -> None:
        self.path, self.width = out.with_name(f"{out.name}.partial"), width
        self.done: dict[RecordingKey, EmbeddedRecording] = {}
        self._file: TextIO | None = None
        self._flushed = time.monotonic()
        self._head = json.dumps(settings, sort_keys=True)
        self._intact = 0  # bytes up to which the file is not torn
        if self.path.is_file() and not self._read() and not restart:
            raise ConfigError(
                f"{self.path} is left of a build with another model or other settings",
                "the same as then, to resume it",
                "repeat that command, or pass --overwrite to start from scratch",
            )

    def add(self, recording: EmbeddedRecording) -> None:
        """Append a recording."""
        if self._file is None:
            self._file = self._open()
        source, times, vectors = recording
        data = base64.b64encode(np.ascontiguousarray(vectors, "<f2").tobytes()).decode()
        self._file.write(json.dumps({"source": recordings.to_json(source), "times": times, "vectors": data}) + "\n")
        self.done[source.key] = recording
        if time.monotonic() - self._flushed > _FLUSH:
            self._file.flush()
            self._flushed = time.monotonic()

    def kept(self, need: Collection[RecordingKey]) -> str:
        """Say how many of the recordings that are needed are in the file."""
        return f"{sum(key in self.done for key in need)} of {len(need)} recordings are kept in {self.path}"

    def __enter__(self) -> PartialBuild:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            # A full disk tears the last line; the error that is being raised says more.
            with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
                self._file.close()

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._intact:
            os.truncate(self.path, self._intact)
            return self.path.open("a", encoding="utf-8")
        file = self.path.open("w", encoding="utf-8")
        file.write(self._head + "\n")
        return file

    def _read(self) -> bool:
        """Read the recordings in the file; False where it is of another build."""
        with self.path.open("rb") as file:
            first = file.readline()
            if first != self._head.encode() + b"\n":
                return not first.endswith(b"\n")  # torn in its first line, it holds nothing
            self._intact = len(first)
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
                self.done[source.key] = EmbeddedRecording(source, times, vectors)
                self._intact += len(line)
        return True
