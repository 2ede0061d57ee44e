"""Bytes of a recording to what a page shows, as JSON. Nothing here knows of a web library.

Letters: S samples, D width, N frames.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from asit.audio.files import Wave
from asit.audio.stream import OpenSound, open_sound
from asit.errors import AsitError, AudioError, ConfigError
from asit.model.inference.embedding import OVERLAP
from asit.model.inference.tagging import join_tags
from asit.serve import answers, pictures, uploads
from asit.serve.answers import Heard
from asit.serve.limits import Job, Limits, RefusedError, TooLongError

if TYPE_CHECKING:
    from asit.model.audio_model import AudioModel
    from asit.search import Index

BATCH = 8
"""Windows that go through the network at once; in between a request may be given up."""

PLAYED = 60.0
"""Longest part of an indexed recording that is played, in seconds."""

_BLOCK = 1 << 16  # samples of a decoded recording that are handed on at once


class Analyst:
    """A model, and perhaps an index of recordings made with it, asked about recordings.

    The methods may be called from several threads at once. All but `facts` take the request's `Job`, the body or a
    number of the index, the limits and the endpoint's options (`asit.serve.options`), and give the answer's bytes.

    Args:
        model: what is asked.
        name: of the model, as the page shows it.
        index: recordings to look for neighbours in.
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
        """The model and the index for the page; JSON."""
        model, card, index = self.model, self.model.card, self.index
        encoder, front_end = model.encoder, model.front_end
        view = front_end.samples_for(model.frames) / model.rate
        return {
            "name": self.name,
            "kind": card["kind"],
            "rate": model.rate,
            "seconds": round(view, 3),
            "parameters": sum(p.numel() for p in encoder.parameters()),
            "width": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "grid": list(encoder.grid),
            "classes": None if model.classes is None else list(model.classes),
            "multi": model.multi,
            "card": card,
            "formats": uploads.formats(),
            "index": None if index is None else {"clips": len(index), "seconds": index.card["window"]},
        }

    def hear(self, job: Job, body: bytes, limits: Limits) -> Heard:
        """Decode a recording; what is too long is noticed on the way, whatever the header says.

        Raises:
            AudioError: it cannot be read, or holds samples that are not finite.
            TooLongError: it is beyond the limits.
        """
        try:
            return self._decoded(job, body, limits)
        except TooLongError:
            raise
        except AudioError as error:
            raise uploads.told(error, body) from error

    def _decoded(self, job: Job, body: bytes, limits: Limits) -> Heard:
        """As `hear`, with errors in the words of `asit.audio`."""
        job.check()
        model, start = self.model, time.monotonic()
        parts: list[Wave] = []
        count, most = 0, round(limits.seconds * model.rate)
        with open_sound(body, None, model.rate, model.front_end.settings.resampler) as sound:
            if sound.channels > limits.channels:
                raise TooLongError(f"{sound.channels} channels", f"{limits.channels} at most", "mix them down first")
            # A header that understates is found out below; one that overstates is not waited for.
            if sound.seconds is not None and sound.seconds > limits.seconds + 0.5:
                raise _too_long(f"{sound.seconds:.1f} s of sound", limits)
            for block in sound.blocks():
                job.check()
                parts.append(block)
                count += len(block)
                if count > most + model.rate // 2:
                    raise _too_long(f"more than {limits.seconds:g} s of sound", limits)
                if time.monotonic() - start > limits.decode:
                    raise TooLongError(
                        f"{count / model.rate:.1f} s of sound took {limits.decode:g} s to decode",
                        "a recording that is decoded faster than that",
                        "send it at a lower sample rate, or cut it",
                    )
            return Heard(np.concatenate(parts), sound.rate, sound.channels, sound.format)

    def tag(
        self,
        job: Job,
        body: bytes,
        limits: Limits,
        *,
        top: int,
        threshold: float,
        window: float | None,
        hop: float | None,
    ) -> bytes:
        """Scores of the labels."""
        self._with_labels()
        heard = self.hear(job, body, limits)
        return answers.as_json(
            answers.sound(heard, self.model.rate) | self._labels(job, heard.wave, top, threshold, window, hop)
        )

    def embed(
        self, job: Job, body: bytes, limits: Limits, *, level: str, layer: int | None, hop: float | None
    ) -> bytes:
        """The clip's vector, and those of its frames."""
        heard, model = self.hear(job, body, limits), self.model
        step = model.encoder.stride[0] * model.front_end.shift / model.rate if hop is None else hop
        numbers = round(len(heard.wave) / model.rate / step) * model.encoder.width
        if numbers > limits.numbers:
            raise TooLongError(
                f"{len(heard.wave) / model.rate:.1f} s with {model.encoder.width} numbers every {step:g} s: {numbers}",
                f"{limits.numbers} numbers at most",
                "send a shorter recording, or leave hop out or make it larger",
            )
        frames, times = self._frames(job, heard.wave, layer, hop)
        out = answers.sound(heard, model.rate) | {"dimension": frames.shape[1], "clip": answers.rounded(frames.mean(0))}
        if level != "frames":
            return answers.as_json(out)
        rows = answers.rows(frames, job.check)
        return b'%s,"frames":[%s]}' % (answers.as_json(out | {"times": answers.rounded(times, 4)})[:-1], rows)

    def neighbours(
        self, job: Job, body: bytes, limits: Limits, *, k: int, start: float, seconds: float | None
    ) -> bytes:
        """The most similar clips of the index, to the sound or to a part of it."""
        self._with_index()
        heard = self.hear(job, body, limits)
        length = len(heard.wave) / self.model.rate
        if start >= length:
            raise RefusedError(
                400, f"start={start:g} in a recording of {length:.3f} s", "a start before its end", "leave start out"
            )
        found = self._similar(job, heard.wave, k, start, seconds)
        return answers.as_json(answers.sound(heard, self.model.rate) | {"neighbours": found})

    def attention(self, job: Job, body: bytes, limits: Limits, *, layer: int) -> bytes:
        """Attention of a block's class token, window by window."""
        model = self.model
        heard = self.hear(job, body, limits)
        column = model.encoder.stride[0] * model.front_end.shift
        view, step = model.front_end.samples_for(model.frames), model.encoder.grid[0] * column
        maps, times = [], []
        for first in range(0, max(1, len(heard.wave) - column // 2), step):  # less than half a column shows nothing
            job.check()
            found = model.attention(heard.wave[first : first + view], layer=layer)
            # In parts of an even share: a last window with fewer patches is then no brighter than the others.
            maps.append(found.map.float().numpy() * (found.grid[0] * found.grid[1]))
            times.append(found.times.numpy() + first / model.rate)
        values, peaks = pictures.attention(np.concatenate(maps, axis=1))
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

    def analyse(
        self,
        job: Job,
        body: bytes,
        limits: Limits,
        *,
        top: int,
        threshold: float,
        window: float | None,
        hop: float | None,
        k: int,
    ) -> bytes:
        """All that the page shows."""
        heard = self.hear(job, body, limits)
        out = answers.sound(heard, self.model.rate)
        out["spectrogram"] = pictures.spectrogram(self.model.front_end, heard.wave, job.check)
        labels = None
        if self.model.classes is not None:
            labels = self._labels(job, heard.wave, top, threshold, window, hop)
        frames, times = self._frames(job, heard.wave)
        view = self.model.encoder.grid[0]
        out["labels"] = labels
        out["embedding"] = {
            "dimension": frames.shape[1],
            "clip": answers.rounded(frames.mean(0)),
            "times": answers.rounded(times, 4),
            "colours": pictures.colours(frames, view - view // OVERLAP),
        }
        out["neighbours"] = None if self.index is None else self._similar(job, heard.wave, k)
        return answers.as_json(out)

    def alike(self, job: Job, number: int, limits: Limits, *, k: int) -> bytes:
        """The most similar clips of a clip of the index, without itself."""
        index = self._with_number(number)
        found = index.nearest(index.vector(number), min(k, len(index)), np.array([number]))
        return answers.as_json({"neighbours": answers.neighbours(found)})

    def clip(self, job: Job, number: int, limits: Limits) -> bytes:
        """The sound of a clip of the index, decoded and written anew as 16-bit WAV: nothing but sound leaves.

        Raises:
            RefusedError: 404, there is no such clip, or its file is no recording any more.
        """
        index, rate = self._with_number(number), self.model.rate
        place, item = index.clip(number), index.source(number).item()
        parts: list[Wave] = []
        try:
            start, seconds = item.start + place.start, min(place.end - place.start, PLAYED)
            with open_sound(item.sound(), None, rate, "soxr-hq", start, seconds) as sound:
                for block in sound.blocks():
                    job.check()
                    parts.append(block)
        except (AsitError, OSError) as error:
            raise RefusedError(
                404,
                f"clip {number} of the index, {place.name}, cannot be read",
                "the recording as it was when it was indexed",
                "bring it back to where it was, or bring the index up to date with asit index --add",
            ) from error
        buffer = io.BytesIO()
        soundfile.write(buffer, np.concatenate(parts), rate, format="WAV", subtype="PCM_16")
        return buffer.getvalue()

    def _frames(
        self, job: Job, wave: Wave, layer: int | None = None, hop: float | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Frames (N, D) and their times (N,); the job may be stopped on the way."""
        frames, times = [], []
        for found in self.model.stream(wave, layer=layer, precision=self.precision, hop=hop, batch=BATCH):
            job.check()
            frames.append(found.frames.numpy())
            times.append(found.times.numpy())
        return np.concatenate(frames), np.concatenate(times)

    def _labels(
        self, job: Job, wave: Wave, top: int, threshold: float, window: float | None, hop: float | None
    ) -> dict[str, Any]:
        pieces = []
        for piece in self.model.stream_tags(wave, precision=self.precision, window=window, hop=hop, batch=BATCH):
            job.check()
            pieces.append(piece)
        return answers.labels(join_tags(pieces), top, threshold)

    def _with_labels(self) -> None:
        if self.model.classes is None:
            raise ConfigError(
                f"{self.name} has no labels: it is an encoder",
                "a classifier, as fine-tuning writes it",
                "ask /api/embed or /api/analyse, or serve a fine-tuned model",
            )

    def _with_index(self) -> Index:
        if self.index is None:
            raise RefusedError(
                404,
                "the server has no index",
                "an index of recordings",
                "make one with asit index, and start the server with --index",
            )
        return self.index

    def _with_number(self, number: int) -> Index:
        index = self._with_index()
        if not 0 <= number < len(index):
            raise RefusedError(
                404, f"clip {number}", f"0 to {len(index) - 1}, the clips of the index", "see /api/neighbours"
            )
        return index

    def _similar(
        self, job: Job, wave: Wave, k: int, start: float = 0.0, seconds: float | None = None
    ) -> list[dict[str, Any]]:
        index, rate = self._with_index(), self.model.rate

        # In blocks, so that the job is looked at between the batches of a long recording.
        def blocks(begin: int, stop: int | None) -> Iterator[Wave]:
            end = len(wave) if stop is None else min(stop, len(wave))
            for first in range(begin, end, _BLOCK):
                job.check()
                yield wave[first : min(first + _BLOCK, end)]

        part = OpenSound("the recording", len(wave), rate, 1, "float32", blocks, rate, "soxr-hq", start, seconds)
        asked = index.vector_of(part, self.model)
        job.check()
        return answers.neighbours(index.nearest(asked, min(k, len(index))))


def _too_long(found: str, limits: Limits) -> TooLongError:
    return TooLongError(
        found, f"{limits.seconds:g} s at most", "cut the recording, or start the server with a larger --max-seconds"
    )
