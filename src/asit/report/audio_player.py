"""Sound inside a page: encoded small, as a player that needs no other file."""

from __future__ import annotations

import base64
import io
from html import escape

import numpy as np
import soundfile
from numpy.typing import NDArray

AUDIO_SECONDS = 10.0
"""Longest sound put in a page."""
_MP3_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}


def player(wave: NDArray[np.float32], rate: int, label: str) -> str:
    """An <audio> element: MP3 where the rate has one, since every browser plays it; else FLAC.

    Args:
        wave: (S,) float32.
        rate: samples a second.
        label: what a screen reader says.
    """
    mp3 = rate in _MP3_RATES and "MP3" in soundfile.available_formats()
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="MP3" if mp3 else "FLAC", compression_level=0.9)
    source = f"data:audio/{'mpeg' if mp3 else 'flac'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<audio controls preload="metadata" aria-label="{escape(label)}" src="{source}"></audio>'
