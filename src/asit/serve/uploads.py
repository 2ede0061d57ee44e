"""What can be sent, and what is wrong with a recording in the words of whoever sent it.

The errors of `asit.audio` speak to a program that has a file or an array; over HTTP there are only bytes.
"""

from __future__ import annotations

import importlib.util

from asit.audio import sniff
from asit.audio.faults import AudioFileError
from asit.errors import AudioError

_REMEDIES = {
    "truncated": "send all of its bytes; if it is cut off where it lies, fetch it anew",
    "non-finite": "convert it anew",
    "empty": "send a recording with sound in it",
}


def formats() -> list[str]:
    """Names of what this server decodes; more with the extra av."""
    more = ["M4A", "AAC", "WebM"] if importlib.util.find_spec("av") is not None else []
    return ["WAV", "FLAC", "MP3", "Ogg", "Opus", "AIFF", *more]


def told(error: AudioError, body: bytes) -> AudioError:
    """An error about the recording that was sent, as its sender is told it.

    Args:
        error: of decoding.
        body: what was sent.
    """
    found, name = error.found, sniff.name_of(body)
    if not isinstance(error, AudioFileError) or error.reason != "unreadable":
        remedy = _REMEDIES.get(error.reason, error.remedy) if isinstance(error, AudioFileError) else error.remedy
        return AudioError(found.replace(name, "the recording"), error.expected, remedy)
    remedy = "convert it to one of these, and send all of its bytes"
    if body.startswith(b"--") and b"form-data" in body[:1000]:
        remedy = "send the file alone, not a form: curl --data-binary @clip.wav instead of -F"
    elif sniff.by_ffmpeg(body) and "M4A" not in formats():
        remedy = f"convert it, or, where asit serve runs, {error.remedy}"
    return AudioError(
        f"no audio that can be read: {found.replace(name, 'it')}", f"a recording: {', '.join(formats())}", remedy
    )
