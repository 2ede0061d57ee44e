"""Encode a clip as a member of a tar shard: its bytes as they are or as FLAC or Opus, its key, and its sidecar."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile

from asit.audio import files, ogg
from asit.data.catalogue.catalogue import Clip
from asit.io import storage

Encoding = Literal["original", "flac", "opus"]

OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
"""Rates that Opus has, Hz (RFC 6716, section 2)."""
_BLOCK = 1 << 16  # samples given to the encoder at a time
_NEAR = 0.02  # s; a clip this much shorter than its file is all of it: catalogues hold lengths in single precision


@dataclass(frozen=True)
class EncodedClip:
    """An encoded clip.

    Attributes:
        data: the recording's bytes.
        suffix: of its name, such as ".flac".
        seconds, rate, channels: of what was written.
        cut: whether it is a part of its file.
    """

    data: bytes
    suffix: str
    seconds: float
    rate: int
    channels: int
    cut: bool


def encode_clip(clip: Clip, encode: Encoding, rate: int) -> EncodedClip:
    """Return a clip as its file's bytes, or as 16-bit mono FLAC or Opus at `rate` Hz.

    A part of a file is cut out of it; with "original" it becomes 16-bit mono FLAC at the file's own rate.

    Raises:
        AudioError: the recording cannot be read.
        StoreError: its shard cannot.
    """
    content: str | bytes = clip.path
    if clip.shard is not None:
        content = storage.read_range(clip.shard, clip.offset, clip.size)
    elif storage.is_url(clip.path):
        content = storage.read(clip.path)
    called = clip.path if isinstance(content, bytes) else None
    info = files.probe(content, called=called)
    cut = clip.start > 0 or clip.seconds < info.seconds - _NEAR
    if encode == "original" and not cut:
        return EncodedClip(
            data=content if isinstance(content, bytes) else Path(content).read_bytes(),
            suffix=_suffix(clip, info.format),
            seconds=clip.seconds,
            rate=info.rate,
            channels=info.channels,
            cut=cut,
        )
    target = info.rate if encode == "original" else rate
    waveform = files.read(content, called=called, rate=target, start=clip.start, seconds=clip.seconds if cut else None)
    suffix = ".opus" if encode == "opus" else ".flac"
    data, seconds = encoded(waveform, target, suffix), len(waveform) / target
    return EncodedClip(data=data, suffix=suffix, seconds=seconds, rate=target, channels=1, cut=cut)


def encoded(waveform: files.Wave, rate: int, suffix: str) -> bytes:
    """Return a mono waveform (S,) as 16-bit FLAC or as Opus; the same samples give the same bytes."""
    steps = np.rint(np.clip(waveform, -1.0, 1.0) * 32768.0).clip(-32768, 32767).astype(np.int16)
    kind = {"format": "FLAC", "subtype": "PCM_16"} if suffix == ".flac" else {"format": "OGG", "subtype": "OPUS"}
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", rate, 1, **kind) as file:
        for first in range(0, len(steps), _BLOCK):
            file.write(steps[first : first + _BLOCK])
    return out.getvalue() if suffix == ".flac" else ogg.renumbered(out.getvalue())


def key_of(name: str) -> str:
    """Return a member's name without its suffix.

    It is the recording's, but webdataset ends a key at the first dot of the last part, so a dot there becomes "_".
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    parts = ["_" if part == ".." else part.replace(":", "_") for part in parts]
    *folders, last = parts or ["_"]
    stem, dot, suffix = last.rpartition(".")
    if not dot or f".{suffix.split('@')[0].lower()}" not in files.SUFFIXES:
        stem = last
    elif "@" in suffix:  # a part of a file: name.wav@12
        stem = f"{stem}@{suffix.split('@', 1)[1]}"
    at = stem.rpartition("@")
    if at[1] and (end := next((s for s in files.SUFFIXES if at[0].lower().endswith(s)), "")):  # name.wav@12.5
        stem = f"{at[0][: -len(end)]}@{at[2]}"
    return "/".join([*folders, stem.replace(".", "_") or "_"])


def facts(clip: Clip, name: str, made: EncodedClip) -> dict[str, Any]:
    """Return what is known of a clip that was encoded."""
    return {
        "path": name,
        "seconds": round(made.seconds, 6),
        "rate": made.rate,
        "channels": made.channels,
        "start": round(clip.start, 6) or None,
        "label": clip.label,
        "split": clip.split,
        "fold": clip.fold,
        "group": clip.group,
        "sha256": clip.sha256,
    }


def _suffix(clip: Clip, form: str) -> str:
    own = Path(clip.path).suffix.lower()
    if own in files.SUFFIXES:
        return own
    suffix = "." + form.split("/")[0].lower()
    return suffix if suffix in files.SUFFIXES else ".wav"
