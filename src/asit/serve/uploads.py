"""Decode recordings that clients send, within the limits, with errors that make sense to the sender.

The errors of `asit.audio` name a file or an array; over HTTP there are only bytes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from asit.audio import sniff
from asit.audio.faults import AudioFileError
from asit.audio.files import Wave
from asit.audio.stream import open_sound
from asit.errors import AudioError
from asit.serve.request_queue import Job, RequestLimits, TooLongError

if TYPE_CHECKING:
    from asit.model.audio_model import AudioModel

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
    return AudioError(
        f"no audio that can be read: {found.replace(name, 'it')}", f"a recording: {', '.join(formats())}", remedy
    )
