"""Bytes of a recording to what a page shows, as JSON. Nothing here knows of a web library.

Letters: S samples, C classes, W windows, D width, N frames.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from asit.audio.files import Wave
from asit.audio.sounds import open_sound
from asit.errors import AsitError, ConfigError
from asit.model.tagging import Tag, join_tags
from asit.serve import pictures
from asit.serve.limits import Job, Limits, RefusedError, TooLongError

if TYPE_CHECKING:
    from asit.model.audio_model import AudioModel
    from asit.search import Index, Neighbour

TRACKS, FEWEST = 24, 5
"""Most labels of the timeline, those with the highest scores in any window; and how many there are even if these scores
are low."""

BATCH = 8
"""Windows that go through the network at once; in between a request may be given up."""

PLAYED = 60.0
"""Longest part of an indexed recording that is played, in seconds."""


@dataclass(frozen=True)
class Heard:
    """A decoded recording.

    Attributes:
        wave: (S,) mono at the model's rate.
        rate, channels, format: of the file.
    """

    wave: Wave
    rate: int
    channels: int
    format: str


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
            "index": None if index is None else {"clips": len(index), "seconds": index.card["window"]},
        }

    def hear(self, job: Job, body: bytes, limits: Limits) -> Heard:
        """Decode a recording; what is too long is noticed on the way, whatever the header says.

        Raises:
            AudioError: it cannot be read, or holds samples that are not finite.
            TooLongError: it is beyond the limits.
        """
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
        return _json(_told(heard, self.model.rate) | self._labels(job, heard.wave, top, threshold, window, hop))

    def embed(
        self, job: Job, body: bytes, limits: Limits, *, level: str, layer: int | None, hop: float | None
    ) -> bytes:
        """The clip's vector, and those of its frames."""
        heard = self.hear(job, body, limits)
        job.check()
        found = self.model.embed(heard.wave, layer=layer, precision=self.precision, hop=hop, patches=False)
        out = _told(heard, self.model.rate) | {"dimension": len(found.clip), "clip": _rounded(found.clip.numpy())}
        if level == "frames":
            out |= {"times": _rounded(found.times.numpy(), 4), "frames": _rounded(found.frames.numpy())}
        return _json(out)

    def neighbours(
        self, job: Job, body: bytes, limits: Limits, *, k: int, start: float, seconds: float | None
    ) -> bytes:
        """The most similar clips of the index, to the sound or to a part of it."""
        self._with_index()
        heard = self.hear(job, body, limits)
        found = self._similar(job, heard.wave, k, start, seconds)
        return _json(_told(heard, self.model.rate) | {"neighbours": found})

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
        return _json(
            {
                "heads": len(peaks),
                "bands": maps[0].shape[2],
                "layer": layer % model.encoder.depth,
                "column": column / model.rate,
                "times": _rounded(np.concatenate(times), 4),
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
        out = _told(heard, self.model.rate)
        out["spectrogram"] = pictures.spectrogram(self.model.front_end, heard.wave, job.check)
        labels = None
        if self.model.classes is not None:
            labels = self._labels(job, heard.wave, top, threshold, window, hop)
        job.check()
        found = self.model.embed(heard.wave, precision=self.precision, patches=False)
        out["labels"] = labels
        out["embedding"] = {
            "dimension": len(found.clip),
            "clip": _rounded(found.clip.numpy()),
            "times": _rounded(found.times.numpy(), 4),
            "colours": pictures.colours(found.frames.numpy()),
        }
        out["neighbours"] = None if self.index is None else self._similar(job, heard.wave, k)
        return _json(out)

    def alike(self, job: Job, number: int, limits: Limits, *, k: int) -> bytes:
        """The most similar clips of a clip of the index, without itself."""
        index = self._with_number(number)
        found = index.nearest(index.vector(number), min(k, len(index)), np.array([number]))
        return _json({"neighbours": _near(found)})

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

    def _labels(
        self, job: Job, wave: Wave, top: int, threshold: float, window: float | None, hop: float | None
    ) -> dict[str, Any]:
        pieces = []
        for piece in self.model.stream_tags(wave, precision=self.precision, window=window, hop=hop, batch=BATCH):
            job.check()
            pieces.append(piece)
        tags = join_tags(pieces)
        scores = tags.windows.numpy()  # (W, C)
        best = scores.max(0)
        ranked = np.argsort(-best, kind="stable").tolist()
        shown = [i for place, i in enumerate(ranked[:TRACKS]) if place < FEWEST or best[i] >= threshold]
        tops, segments = tags.top(min(top, len(tags.classes))), tags.segments(threshold)
        named = {tag.label for tag in (*tops, *segments)} | {tags.classes[i] for i in shown}
        return {
            "multi": tags.multi,
            "tags": [_tag(tag) for tag in tops],
            "segments": [_tag(tag) for tag in segments],
            "scores": {
                label: {"clip": round(float(tags.clip[i]), 6), "highest": round(float(best[i]), 6)}
                for i, label in enumerate(tags.classes)
                if label in named
            },
            "starts": _rounded(np.asarray(tags.starts), 4),
            "ends": _rounded(np.asarray(tags.ends), 4),
            "tracks": [
                {"label": tags.classes[i], "scores": _rounded(scores[:, i])}
                for i in sorted(shown, key=lambda i: -float(tags.clip[i]))
            ],
        }

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
        index = self._with_index()
        job.check()
        asked = index.ask(wave, self.model, None, start, seconds)
        return _near(index.nearest(asked, min(k, len(index))))


def _near(found: Sequence[Neighbour]) -> list[dict[str, Any]]:
    """What is told of neighbours: what the user called them, not where they lie on this machine."""
    return [
        {
            "number": one.row,
            "name": one.name,
            "start": round(one.start, 3),
            "end": round(one.end, 3),
            "label": one.label,
            "similarity": round(one.similarity, 6),
        }
        for one in found
    ]


def _told(heard: Heard, rate: int) -> dict[str, Any]:
    return {
        "seconds": round(len(heard.wave) / rate, 4),
        "rate": heard.rate,
        "channels": heard.channels,
        "format": heard.format,
    }


def _tag(tag: Tag) -> dict[str, Any]:
    return {"label": tag.label, "score": round(tag.score, 6), "start": round(tag.start, 4), "end": round(tag.end, 4)}


def _too_long(found: str, limits: Limits) -> TooLongError:
    return TooLongError(
        found, f"{limits.seconds:g} s at most", "cut the recording, or start the server with a larger --max-seconds"
    )


def _rounded(values: Any, digits: int = 6) -> list[Any]:
    rounded: list[Any] = np.round(np.asarray(values, dtype=np.float64), digits).tolist()
    return rounded


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
