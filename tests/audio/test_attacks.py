"""Headers that ask for much, and samples that make everything of them overflow: refused at once, in every door."""

from __future__ import annotations

import io

import numpy as np
import soundfile


def slow_flac(rate: int = 1) -> bytes:
    """A FLAC of 262 bytes or so, with 65,535 samples that are one value each frame, at a rate that is not there."""
    out = io.BytesIO()
    steps = np.repeat(np.arange(40, dtype=np.int16) * 500, 4096)
    soundfile.write(out, steps, 44100, format="FLAC")
    content = bytearray(out.getvalue())
    content[18:21] = (rate << 4 | content[20] & 15).to_bytes(3, "big")  # 20 bits of the header
    return bytes(content)


def loud(value: float = 3e38) -> bytes:
    x = (0.1 * np.sin(np.arange(16000) / 5)).astype(np.float32)
    x[5000] = value
    out = io.BytesIO()
    soundfile.write(out, x, 16000, format="WAV", subtype="FLOAT")
    return out.getvalue()
