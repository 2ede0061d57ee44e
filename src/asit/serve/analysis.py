"""Compute what the page and the API answer about a recording; independent of any web library.

Letters in shapes: S samples, D width, N frames.
"""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from asit.audio import sniff
from asit.audio.faults import AudioFileError
from asit.audio.files import Wave
from asit.audio.stream import open_sound
from asit.errors import AsitError, AudioError
from asit.model.inference.embedding import OVERLAP
from asit.model.inference.tagging import join_tags
from asit.serve import answers
from asit.serve.index_map import index_map
from asit.serve.request_queue import Job, RefusedError, RequestLimits, TooLongError

if TYPE_CHECKING:
    from asit.model.audio_model import AudioModel
    from asit.search import Index

_REMEDIES = {
    "truncated": "send all of its bytes; if the file itself is cut off, fetch it again",
    "non-finite": "convert it again",
    "empty": "send a recording with sound in it",
}


@dataclass(frozen=True)
class Recording:
    """A decoded recording.

    Attributes:
        waveform: (S,) mono at the model's rate.
        seconds: its length.
        rate, channels, format: of the file.
    """

    waveform: Wave
    seconds: float
    rate: int
    channels: int
    format: str


def decode(job: Job, body: bytes, model: AudioModel) -> Recording:
    """Decode a recording for a model; its length is limited by the header and again while decoding.

    Raises:
        AudioError: it cannot be read, or has samples that are not finite.
        TooLongError: it is beyond the limits.
    """
    job.check()
    limits, parts, count = job.limits, list[Wave](), 0
    try:
        with open_sound(body, None, model.rate, model.front_end.settings.resampler) as sound:
            if sound.channels > limits.channels:
                raise TooLongError(f"{sound.channels} channels", f"{limits.channels} at most", "mix them down first")
            # Decoding finds out a header that understates the length; one that overstates it is refused at once.
            if sound.seconds is not None and sound.seconds > limits.seconds + 0.5:
                raise _too_long(f"{sound.seconds:.1f} s of sound", limits)
            for block in sound.blocks():
                job.check()
                parts.append(block)
                count += len(block)
                if count > round(limits.seconds * model.rate) + model.rate // 2:
                    raise _too_long(f"more than {limits.seconds:g} s of sound", limits)
            return Recording(np.concatenate(parts), count / model.rate, sound.rate, sound.channels, sound.format)
    except TooLongError:
        raise
    except AudioError as error:
        raise _for_sender(error, body) from error


def _too_long(found: str, limits: RequestLimits) -> TooLongError:
    remedy = "cut the recording, or start the server with a larger --max-seconds"
    return TooLongError(found, f"{limits.seconds:g} s at most", remedy)


def formats() -> list[str]:
    """Return the names of the formats that this server decodes; more with the extra av."""
    more = ["M4A", "AAC", "WebM"] if importlib.util.find_spec("av") is not None else []
    return ["WAV", "FLAC", "MP3", "Ogg", "Opus", "AIFF", *more]


def _for_sender(error: AudioError, body: bytes) -> AudioError:
    found, name = error.found, sniff.name_of(body)
    reason = error.reason if isinstance(error, AudioFileError) else ""
    if reason != "unreadable":
        return AudioError(found.replace(name, "the recording"), error.expected, _REMEDIES.get(reason, error.remedy))
    remedy = "convert it to one of these, and send all of its bytes"
    if body.startswith(b"--") and b"form-data" in body[:1000]:
        remedy = "send the file alone, not a form: curl --data-binary @clip.wav instead of -F"
    elif sniff.by_ffmpeg(body) and "M4A" not in formats():
        remedy = f"convert it, or, where asit serve runs, {error.remedy}"
    what = re.sub("begins with the bytes (.. ?)+", "is not a sound file of a known kind", found.replace(name, "it"))
    return AudioError(f"no audio that can be read: {what}", f"a recording: {', '.join(formats())}", remedy)


BATCH = 8
"""Windows that go through the network at once; a request can be stopped in between."""
PLAYED = 60.0
"""Longest part of an indexed recording that is played, in seconds."""


class Analyser:
    """A model, optionally with an index of recordings made with it, that answers requests about recordings.

    The methods may be called from several threads at once. All but `facts` take the request's `Job`, the body or a
    number of the index, and the endpoint's options (`asit.serve.routes`), and return the answer's bytes.

    Args:
        model: the model.
        name: of the model, as the page shows it.
        index: recordings in which neighbours are searched.
        precision: arithmetic; "auto": what is faster here.

    Raises:
        ConfigError: the index was made with another model.
    """

    def __init__(self, model: AudioModel, name: str, index: Index | None = None, precision: str = "auto") -> None:
        self.model, self.name, self.index = model, name, index
        self.precision: Any = precision
        if index is not None:
            index.check(model)

    def facts(self) -> dict[str, Any]:
        """Return the model and the index as the page shows them."""
        model, index, encoder = self.model, self.index, self.model.encoder
        return {
            "name": self.name,
            "kind": model.card["kind"],
            "rate": model.rate,
            "seconds": round(model.front_end.samples_for(model.frames) / model.rate, 3),
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "width": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "grid": list(encoder.grid),
            "classes": None if model.classes is None else list(model.classes),
            "multi": model.multi,
            "card": model.card,
            "formats": formats(),
            "index": None if index is None else {"clips": len(index), "seconds": index.card["window"]},
        }

    def tag(self, job: Job, body: bytes, **options: Any) -> bytes:
        """Return the scores of the labels; options as `_labels`."""
        self.model.tagger(self.precision)  # refuses an encoder
        decoded = decode(job, body, self.model)
        return answers.as_json(answers.recording(decoded) | self._labels(job, decoded.waveform, **options))

    def embed(self, job: Job, body: bytes, *, level: str, layer: int | None, hop: float | None) -> bytes:
        """Return the clip's vector, and with level "frames" those of its frames."""
        decoded, model, limits = decode(job, body, self.model), self.model, job.limits
        step = model.encoder.stride[0] * model.front_end.shift / model.rate if hop is None else hop
        numbers = round(decoded.seconds / step) * model.encoder.width
        if numbers > limits.numbers:
            raise TooLongError(
                f"{decoded.seconds:.1f} s with {model.encoder.width} numbers every {step:g} s: {numbers}",
                f"{limits.numbers} numbers at most",
                "send a shorter recording, or leave hop out or make it larger",
            )
        frames, times = self._frames(job, decoded.waveform, layer, hop)
        clip = {"dimension": frames.shape[1], "clip": answers.rounded(frames.mean(0))}
        out = answers.recording(decoded) | clip
        if level != "frames":
            return answers.as_json(out)
        rows = answers.rows(frames, job.check)
        return b'%s,"frames":[%s]}' % (answers.as_json(out | {"times": answers.rounded(times, 4)})[:-1], rows)

    def neighbours(self, job: Job, body: bytes, *, k: int, start: float, seconds: float | None) -> bytes:
        """Return the most similar clips of the index, to the recording or to a part of it."""
        self._searched()
        decoded = decode(job, body, self.model)
        if start >= decoded.seconds:
            found = f"start={start:g} in a recording of {decoded.seconds:.3f} s"
            raise RefusedError(400, found, "a start before its end", "leave start out")
        similar = self._similar(job, decoded.waveform, k, start, seconds)
        return answers.as_json(answers.recording(decoded) | {"neighbours": similar})

    def attention(self, job: Job, body: bytes, *, layer: int) -> bytes:
        """Return the attention of a block's class token, window by window."""
        model = self.model
        waveform = decode(job, body, model).waveform
        column = model.encoder.stride[0] * model.front_end.shift
        view, step = model.front_end.samples_for(model.frames), model.encoder.grid[0] * column
        maps, times = [], []
        # Less than half a column at the end would show nothing.
        for first in range(0, max(1, len(waveform) - column // 2), step):
            job.check()
            found = model.attention(waveform[first : first + view], layer=layer)
            # In multiples of an even share, so that a last window with fewer patches is not brighter than the others.
            maps.append(found.map.float().numpy() * (found.grid[0] * found.grid[1]))
            times.append(found.times.numpy() + first / model.rate)
        values, peaks = answers.attention(np.concatenate(maps, axis=1))
        return answers.as_json(
            {
                "heads": len(peaks),
                "bands": maps[0].shape[2],
                "layer": layer % model.encoder.depth,
                "column": column / model.rate,
                "times": answers.rounded(np.concatenate(times), 4),
                "peaks": peaks,
                "values": values,
            }
        )

    def analyse(self, job: Job, body: bytes, *, k: int, **options: Any) -> bytes:
        """Return all that the page shows; other options as `_labels`."""
        model, decoded = self.model, decode(job, body, self.model)
        spectrogram = answers.spectrogram(model.front_end, decoded.waveform, job.check)
        labels = None if model.classes is None else self._labels(job, decoded.waveform, **options)
        frames, times = self._frames(job, decoded.waveform)
        view = model.encoder.grid[0]
        return answers.as_json(
            {
                **answers.recording(decoded),
                "spectrogram": spectrogram,
                "labels": labels,
                "embedding": {
                    "dimension": frames.shape[1],
                    "clip": answers.rounded(frames.mean(0)),
                    "times": answers.rounded(times, 4),
                    "colours": answers.colours(frames, view - view // OVERLAP),
                },
                "neighbours": None if self.index is None else self._similar(job, decoded.waveform, k),
            }
        )

    def nearest_to(self, job: Job, number: int, *, k: int) -> bytes:
        """Return the most similar clips of a clip of the index, without itself."""
        index = self._searched(number)
        found = index.nearest(index.vector(number), min(k, len(index)), np.array([number]))
        return answers.as_json({"neighbours": answers.neighbours(found)})

    def map(self, job: Job) -> bytes:
        """Return the rows of the index on a plane; see `index_map`."""
        return answers.as_json(index_map(self._searched(), job.check))

    def clip(self, job: Job, number: int) -> bytes:
        """Return a clip of the index, decoded and re-encoded as 16-bit WAV, so that only sound leaves the machine.

        Raises:
            RefusedError: 404, there is no such clip, or its file is no recording any more.
        """
        index, rate = self._searched(number), self.model.rate
        row, item = index.clip(number), index.source(number).item()
        parts: list[Wave] = []
        try:
            start, seconds = item.start + row.start, min(row.end - row.start, PLAYED)
            with open_sound(item.sound(), None, rate, "soxr-hq", start, seconds) as sound:
                for block in sound.blocks():
                    job.check()
                    parts.append(block)
        except (AsitError, OSError) as error:
            raise RefusedError(
                404,
                f"clip {number} of the index, {row.name}, cannot be read",
                "the recording as it was when it was indexed",
                "restore it, or update the index with asit index --add",
            ) from error
        buffer = io.BytesIO()
        soundfile.write(buffer, np.concatenate(parts), rate, format="WAV", subtype="PCM_16")
        return buffer.getvalue()

    def _frames(
        self, job: Job, waveform: Wave, layer: int | None = None, hop: float | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Frames (N, D) and their times (N,)."""
        frames, times = [], []
        for found in self.model.stream(waveform, layer=layer, precision=self.precision, hop=hop, batch=BATCH):
            job.check()
            frames.append(found.frames.numpy())
            times.append(found.times.numpy())
        return np.concatenate(frames), np.concatenate(times)

    def _labels(
        self, job: Job, waveform: Wave, *, top: int, threshold: float, window: float | None, hop: float | None
    ) -> dict[str, Any]:
        pieces = []
        for piece in self.model.stream_tags(waveform, precision=self.precision, window=window, hop=hop, batch=BATCH):
            job.check()
            pieces.append(piece)
        return answers.labels(join_tags(pieces), top, threshold)

    def _searched(self, number: int = 0) -> Index:
        """The index; raises 404 without one, or without a clip of that number."""
        index = self.index
        if index is None:
            remedy = "make one with asit index, and start the server with --index"
            raise RefusedError(404, "the server has no index", "an index of recordings", remedy)
        if not 0 <= number < len(index):
            expected = f"0 to {len(index) - 1}, the clips of the index"
            raise RefusedError(404, f"clip {number}", expected, "see /api/neighbours")
        return index

    def _similar(
        self, job: Job, waveform: Wave, k: int, start: float = 0.0, seconds: float | None = None
    ) -> list[dict[str, Any]]:
        index, rate = self._searched(), self.model.rate
        first = round(start * rate)
        part = waveform[first : None if seconds is None else first + max(1, round(seconds * rate))]
        query = index.vector_of(part, self.model, check=job.check)
        return answers.neighbours(index.nearest(query, min(k, len(index))))
