"""Encode clips (as they are, as FLAC or Opus) and write one tar shard of them atomically.

Its bytes do not depend on the time, the machine or the process.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asit.audio import files, ogg
from asit.data.catalogue.catalogue import Clip
from asit.data.catalogue.columns import SHARD, WORDS
from asit.data.shards.shard_plan import Encoding, PackSettings
from asit.errors import AudioError
from asit.io import local_files, storage

_BLOCK = 1 << 16  # samples given to the encoder at a time
_SUFFIX = re.compile(rf"({'|'.join(map(re.escape, sorted(files.SUFFIXES)))})(@[^@]*)?$", re.IGNORECASE)
"""The end of a recording's name, or of a part's, such as name.wav@12.5."""
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
        suffixes = (Path(clip.path).suffix.lower(), "." + info.format.split("/")[0].lower())
        return EncodedClip(
            data=content if isinstance(content, bytes) else Path(content).read_bytes(),
            suffix=next((suffix for suffix in suffixes if suffix in files.SUFFIXES), ".wav"),
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


def stem_of(name: str) -> str:
    """Return a member's name without its suffix.

    It is the recording's, but webdataset ends a key at the first dot of the last part, so a dot there becomes "_".
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    parts = ["_" if part == ".." else part.replace(":", "_") for part in parts]
    *folders, last = parts or ["_"]
    stem = _SUFFIX.sub(lambda found: found[2] or "", last)
    return "/".join([*folders, stem.replace(".", "_") or "_"])


class StoppedError(Exception):
    """Writing was stopped between two clips; nothing of the shard stays."""


def write_shard(
    name: str,
    clips: Sequence[tuple[int, str, Clip]],
    out: str,
    settings: PackSettings,
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Write one shard.

    Args:
        name: of the tar file.
        clips: row in the catalogue, name for the index, and the clip.
        out: their folder or URL.
        settings: how they are encoded.
        stopped: called before each clip; True ends the work.

    Returns:
        name, bytes, sha256, rows (lines of the index, each with its row in the catalogue as "row"), skipped (path,
        reason and detail) and cut (how many are parts of files), for JSON.

    Raises:
        StoppedError: `stopped` returned True.
        StoreError: the shard cannot be written, or a source's shard cannot be read.
    """
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    keys: set[str] = set()
    cut = 0
    with storage.create(storage.join(out, name)) as draft:
        with tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as archive:
            for row, known, clip in clips:
                if stopped():
                    raise StoppedError
                try:
                    made = encode_clip(clip, settings.encode, settings.rate)
                except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
                    # Any error of a decoder or the disk: one recording must not end the work on millions.
                    text = f"{clip.path}: {type(error).__name__}: {error}"
                    reason = getattr(error, "reason", "unreadable") if isinstance(error, AudioError) else "unreadable"
                    skipped.append({"path": known, "reason": reason, "detail": getattr(error, "found", text)})
                    continue
                key = _free(stem_of(known), keys)
                offset = _add(archive, key + made.suffix, made.data)
                facts = {
                    "path": known,
                    "seconds": round(made.seconds, 6),
                    "rate": made.rate,
                    "channels": made.channels,
                    "start": round(clip.start, 6) or None,
                    **{name: getattr(clip, name) for name in (*WORDS, "sha256")},
                }
                sidecar = {column: value for column, value in facts.items() if value is not None}
                _add(archive, key + ".json", json.dumps(sidecar, separators=(",", ":")).encode())
                cut += made.cut
                changed = {"row": row, "start": None, "seconds": made.seconds}
                if settings.encode != "original" or made.cut:
                    changed["sha256"] = None
                rows.append({**facts, **changed, SHARD: name, "offset": offset, "size": len(made.data)})
        size, digest = draft.stat().st_size, local_files.sha256(draft)
    return {
        "name": name,
        "bytes": size,
        "sha256": digest,
        "cut": cut,
        "rows": [{key: value for key, value in row.items() if value is not None} for row in rows],
        "skipped": skipped,
    }


def _free(key: str, taken: set[str]) -> str:
    # Compared as by file systems that ignore case and Unicode forms, on which a shard may be unpacked.
    fresh, number = key, 1
    while (same := unicodedata.normalize("NFC", fresh).casefold()) in taken:
        number += 1
        fresh = f"{key}~{number}"
    taken.add(same)
    return fresh


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member, and return where its bytes begin."""
    header = tarfile.TarInfo(name)
    # Owner and time of change, which would differ from machine to machine, stay empty.
    header.size, header.mode = len(data), 0o644
    archive.addfile(header, io.BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return int(archive.offset) - blocks * tarfile.BLOCKSIZE
