"""Sounds, and files of them in every format."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import scipy.signal
import soundfile

ENCODINGS: dict[str, dict[str, Any]] = {
    "wav": {},
    "flac": {},
    "mp3": {"bitrate_mode": "VARIABLE", "compression_level": 0.6},
    "ogg": {},
    "opus": {"format": "OGG", "subtype": "OPUS"},
}
"""What libsndfile writes, by the suffix."""
AV = {
    "m4a": ("ipod", "aac"), "mp4": ("mp4", "aac"), "aac": ("adts", "aac"), "webm": ("webm", "libopus"),
    "oga": ("ogg", "flac"), "mka": ("matroska", "flac"), "mov": ("mov", "pcm_s16le"), "3gp": ("3gp", "aac"),
    "wma": ("asf", "wmav2"), "wv": ("wv", "wavpack"), "mp2": ("mp2", "mp2"), "caf": ("caf", "pcm_s16be"),
}  # fmt: skip
"""Container and codec of what FFmpeg writes, by the suffix."""


def sound(samples: int, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Coloured noise with pauses: band-limited to 0.4 of the rate, so that lossy coders have bits to borrow."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((samples, channels))
    noise = scipy.signal.sosfilt(scipy.signal.butter(4, 0.4, output="sos"), noise, axis=0)
    gate = 0.02 + (np.sin(2 * np.pi * 3 * np.arange(samples) / rate) > 0)
    return (0.15 * noise * gate[:, None]).clip(-0.9, 0.9).astype(np.float32)


def write(path: Path, x: np.ndarray, rate: int, **encoding: Any) -> Path:
    """Write (samples, channels) to a file of the kind that its suffix says, or as `encoding` says to libsndfile."""
    suffix = path.suffix[1:]
    if suffix in ENCODINGS or encoding:
        path.write_bytes(encoded(x, rate, **{"format": suffix.upper()} | (encoding or ENCODINGS[suffix])))
    else:
        write_av(str(path), x, rate, *AV[suffix])
    return path


def encoded(x: np.ndarray, rate: int, **encoding: Any) -> bytes:
    """The bytes of a file of libsndfile; WAV unless `encoding` says another format."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", rate, x.shape[1], **{"format": "WAV"} | encoding) as file:
        for first in range(0, len(x), 8192):  # libvorbis keeps what it is given on the stack
            file.write(x[first : first + 8192])
    return out.getvalue()


def write_av(file: str | BinaryIO, x: np.ndarray, rate: int, container: str, codec: str, **options: str) -> None:
    """Write (samples, channels) by FFmpeg; the test is skipped where PyAV is not installed."""
    av = pytest.importorskip("av", reason="PyAV is not installed (the extra asit-audio[av])")
    layout = "mono" if x.shape[1] == 1 else "stereo"
    with av.open(file, "w", format=container, options=options) as out:
        # Noise that the decoder makes up would differ from one decoding to the next.
        stream = out.add_stream(codec, rate=rate, layout=layout, options={"aac_pns": "0"} if codec == "aac" else {})
        stream.bit_rate = 64_000 * x.shape[1]
        stream.codec_context.open()  # the size of its frames is known only then
        form, size = stream.codec_context.codec.audio_formats[0].name, stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(format=form, layout=layout, rate=rate, frame_size=size)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T, np.float32), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
