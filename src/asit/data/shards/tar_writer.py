"""Write one tar shard atomically; its bytes do not depend on the time, the machine or the process."""

from __future__ import annotations

import hashlib
import tarfile
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from asit.data.catalogue.catalogue import Clip
from asit.data.catalogue.columns import SHARD
from asit.data.shards import encode as members
from asit.errors import AudioError, StoreError
from asit.io import storage


@dataclass(frozen=True)
class ShardFormat:
    """How shards are written.

    Attributes:
        out: their folder or URL.
        encode: see `encode.encode_clip`.
        rate: Hz, of re-encoded audio.
    """

    out: str
    encode: members.Encoding
    rate: int


class StoppedError(Exception):
    """Writing was stopped between two clips; nothing of the shard stays."""


def write_shard(
    name: str, clips: Sequence[tuple[int, str, Clip]], form: ShardFormat, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Write one shard.

    Args:
        name: of the tar file.
        clips: row in the catalogue, name for the index, and the clip.
        form: where and how.
        stopped: called before each clip; True ends the work.

    Returns:
        name, bytes, sha256, rows (lines of the index, each with its row in the catalogue as "row"), skipped (path,
        reason and detail) and cut (how many are parts of files), for JSON.

    Raises:
        StoppedError: `stopped` returned True.
        StoreError: the shard cannot be written, or a source's shard cannot be read.
    """
    with storage.create(storage.join(form.out, name)) as draft, draft.open("wb") as file:
        return _fill(_Hashed(file), name, clips, form, stopped)


class _Hashed:
    """A file that is written front to back, with the SHA-256 and number of its bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _fill(
    out: _Hashed, name: str, clips: Sequence[tuple[int, str, Clip]], form: ShardFormat, stopped: Callable[[], bool]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    keys: set[str] = set()
    cut = 0
    sink: Any = out
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for row, known, clip in clips:
            if stopped():
                raise StoppedError
            try:
                made = members.encode_clip(clip, form.encode, form.rate)
            except AudioError as error:
                skipped.append({"path": known, "reason": getattr(error, "reason", "unreadable"), "detail": error.found})
                continue
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                # Any error of a decoder or the disk: one recording must not end the work on millions.
                detail = f"{clip.path}: {type(error).__name__}: {error}"
                skipped.append({"path": known, "reason": "unreadable", "detail": detail})
                continue
            key = _free(members.key_of(known), keys)
            offset = _add(archive, key + made.suffix, made.data)
            _add(archive, key + ".json", members.sidecar(clip, known, made))
            cut += made.cut
            rows.append(
                {
                    "row": row,
                    "path": known,
                    "seconds": made.seconds,
                    "rate": made.rate,
                    "channels": made.channels,
                    "label": clip.label,
                    "split": clip.split,
                    "fold": clip.fold,
                    "group": clip.group,
                    "sha256": clip.sha256 if form.encode == "original" and not made.cut else None,
                    SHARD: name,
                    "offset": offset,
                    "size": len(made.data),
                }
            )
    return {
        "name": name,
        "bytes": out.bytes,
        "sha256": out.sum.hexdigest(),
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


def make_folder(out: str) -> None:
    """Make the folder that shards go to.

    Raises:
        StoreError: it cannot be made, or is a file.
    """
    if storage.is_url(out):
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise StoreError(f"{out} is a file", "a folder for the shards", "choose another --out") from None
    except OSError as error:
        raise storage.unwritable(out, error) from None
