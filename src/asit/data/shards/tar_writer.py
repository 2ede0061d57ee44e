"""Write one tar shard atomically; its bytes do not depend on the time, the machine or the process."""

from __future__ import annotations

import json
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

from asit.data.catalogue.catalogue import Clip
from asit.data.catalogue.columns import SHARD
from asit.data.shards import encode as members
from asit.data.shards.shard_plan import PackSettings
from asit.errors import AudioError
from asit.io import local_files, storage


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
                    made = members.encode_clip(clip, settings.encode, settings.rate)
                except (AudioError, OSError, RuntimeError, ValueError, MemoryError) as error:
                    # Any error of a decoder or the disk: one recording must not end the work on millions.
                    text = f"{clip.path}: {type(error).__name__}: {error}"
                    reason = getattr(error, "reason", "unreadable") if isinstance(error, AudioError) else "unreadable"
                    skipped.append({"path": known, "reason": reason, "detail": getattr(error, "found", text)})
                    continue
                key = _free(members.key_of(known), keys)
                offset = _add(archive, key + made.suffix, made.data)
                facts = members.facts(clip, known, made)
                sidecar = {column: value for column, value in facts.items() if value is not None}
                _add(archive, key + ".json", json.dumps(sidecar, separators=(",", ":")).encode())
                cut += made.cut
                changed = {"row": row, "start": None, "seconds": made.seconds}
                if settings.encode != "original" or made.cut:
                    changed["sha256"] = None
                place = {SHARD: name, "offset": offset, "size": len(made.data)}
                rows.append({**facts, **changed, **place})
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
    archive.addfile(header, BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return int(archive.offset) - blocks * tarfile.BLOCKSIZE
