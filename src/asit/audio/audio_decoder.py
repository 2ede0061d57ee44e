"""The base class of decoders: a file's header, and its samples as mono blocks, checked against the header.

Letters in shapes: S samples, n samples of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from asit.audio import faults
from asit.audio.faults import AudioFileError, Levels, Wave
from asit.audio.sniff import Content, error_text

_ALLOCATED = 1 << 26  # most samples allocated because a header promises them


@dataclass(frozen=True)
class AudioInfo:
    """What a file's header says.

    Attributes:
        path: the file; None for bytes and open files.
        frames: samples of one channel; 0 if unknown, as in streams. Counted for mp3 and raw aac without a tag.
        rate: samples a second.
        channels: channels in the file; everything read is their mean.
        format: container and codec, such as "WAV/PCM_16".
    """

    path: Path | None
    frames: int
    rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        """Length in seconds."""
        return self.frames / self.rate


class AudioDecoder:
    """An open file.

    Attributes:
        content: what is decoded.
        info: its header.
        name: path and codec, for messages.
        slack: number of samples that may be missing; None if the header has no length.
        levels: ranges of the samples read so far.

    Raises:
        AudioFileError: a rate, number of channels or length out of bounds.
    """

    def __init__(self, content: Content, info: AudioInfo, slack: int | None) -> None:
        self.content, self.info, self.slack = content, info, slack
        self.name = f"{content.name} ({info.format})"
        faults.check_bounds(self.name, info.rate, info.channels, None)
        faults.check_length(self.name, info.seconds, content.data.size)
        self.levels = Levels(self.name)

    def blocks(self, start: int, stop: int | None) -> Iterator[Wave]:
        """Yield mono samples from `start` to `stop` or the end, in blocks (n,), none of them empty."""
        raise NotImplementedError

    def stream(self, start: int, stop: int | None) -> Iterator[Wave]:
        """Yield `blocks`; raises at the end of a truncated file, or one whose channels cancel each other."""
        promised, held = self.promised(start, stop), 0
        for block in self.blocks(start, stop):
            held += len(block)
            yield block
            faults.check_length(self.name, held / self.info.rate, self.content.data.size)
        self._check_end(start, held, promised)

    def read(self, start: int, stop: int | None) -> Wave:
        """Read samples `start` to `stop` as one array (S,), without a copy if the header's length is right."""
        promised = self.promised(start, stop)
        out, filled = np.empty(min(promised, _ALLOCATED), np.float32), 0
        for block in self.stream(start, stop):
            if filled + len(block) > len(out):
                room = max(len(block), filled)
                if filled < promised:
                    room = max(len(block), min(room, promised - filled))
                out = np.concatenate([out[:filled], np.empty(room, np.float32)])
            out[filled : filled + len(block)] = block
            filled += len(block)
        return out[:filled]

    def promised(self, start: int, stop: int | None) -> int:
        """Return how many samples from `start` to `stop` the header promises."""
        return max(0, (self.info.frames if stop is None else min(stop, self.info.frames)) - start)

    def _check_end(self, start: int, held: int, promised: int) -> None:
        failure = self.content.failure
        if failure is not None:
            found = f"{self.name} cannot be read after {(start + held) / self.info.rate:.3f} s: {error_text(failure)}"
            expected = "a file that can be read to its end"
            raise AudioFileError("unreadable", found, expected, "open it again") from failure
        if not held and not start:
            raise faults.empty(self.name)
        if self.slack is not None and held < promised - self.slack:
            raise faults.truncated(self.name, start + held, self.info.frames, self.info.rate)
        if (cancelled := self.levels.cancelled) is not None:
            raise cancelled

    def close(self) -> None:
        """Close the decoder."""
        raise NotImplementedError

    def failed(self, after: int, error: Exception) -> AudioFileError:
        """Make the error about a decoder that failed after so many samples."""
        where = f"after {after / self.info.rate:.3f} of {self.info.seconds:.3f} s"
        found = f"{self.name} cannot be decoded {where}: {error_text(error)}"
        fix = "fetch or convert it again, or leave it out"
        return AudioFileError("truncated" if after else "unreadable", found, "a complete recording", fix)
