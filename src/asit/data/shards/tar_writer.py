"""One tar shard written from clips: in one pass, whole or not at all, the same bytes whoever writes it, and when."""

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
class Way:
    """How shards are written.

    Attributes:
        out: folder or URL that they go to.
        encode: see `members.member`.
        rate: Hz, of sound written anew.
    """

    out: str
    encode: members.Encoding
    rate: int


class StoppedError(Exception):
    """The writer was told to stop between two clips; nothing of its shard stays."""


def write_shard(
    name: str, clips: Sequence[tuple[int, str, Clip]], way: Way, stopped: Callable[[], bool]
) -> dict[str, Any]:
    """Write one shard and tell what is in it.

    Args:
        name: of the tar file.
        clips: place in the catalogue, name for the index, and the clip.
        way: where and how.
        stopped: asked before each clip.

    Returns:
        name, bytes, sha256, rows (lines of the index, each with its place as "row"), skipped (path, reason and detail)
        and cut (how many are parts of files), fit for JSON.

    Raises:
        StoppedError: `stopped` said so.
        StoreError: the shard cannot be written, or a source's shard not be read.
    """
    with storage.create(storage.join(way.out, name)) as draft, draft.open("wb") as file:
        return _fill(_Hashed(file), name, clips, way, stopped)


class _Hashed:
    """A file that is written once, front to back, and what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _fill(
    out: _Hashed, name: str, clips: Sequence[tuple[int, str, Clip]], way: Way, stopped: Callable[[], bool]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    keys: set[str] = set()
    cuts = 0
    sink: Any = out
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        for place, known, clip in clips:
            if stopped():
                raise StoppedError
            try:
                made = members.member(clip, way.encode, way.rate)
            except AudioError as error:
                skipped.append({"path": known, "reason": getattr(error, "reason", "unreadable"), "detail": error.found})
                continue
            except (OSError, RuntimeError, ValueError, MemoryError) as error:
                # Whatever a decoder or the disk comes up with: one recording must not end the work on millions.
                detail = f"{clip.path}: {type(error).__name__}: {error}"
                skipped.append({"path": known, "reason": "unreadable", "detail": detail})
                continue
            key = _free(members.key_of(known), keys)
            offset = _add(archive, key + made.suffix, made.data)
            _add(archive, key + ".json", members.sidecar(clip, known, made))
            cuts += made.cut
            rows.append(
                {
                    "row": place,
                    "path": known,
                    "seconds": made.seconds,
                    "rate": made.rate,
                    "channels": made.channels,
                    "label": clip.label,
                    "split": clip.split,
                    "fold": clip.fold,
                    "group": clip.group,
                    "sha256": clip.sha256 if way.encode == "original" and not made.cut else None,
                    SHARD: name,
                    "offset": offset,
                    "size": len(made.data),
                }
            )
    return {
        "name": name,
        "bytes": out.bytes,
        "sha256": out.sum.hexdigest(),
        "cut": cuts,
        "rows": [{key: value for key, value in row.items() if value is not None} for row in rows],
        "skipped": skipped,
    }


def _free(key: str, taken: set[str]) -> str:
    # Compared as file systems do that a shard may be unpacked on, some of which know neither case nor Unicode forms.
    fresh, number = key, 1
    while (same := unicodedata.normalize("NFC", fresh).casefold()) in taken:
        number += 1
        fresh = f"{key}~{number}"
    taken.add(same)
    return fresh


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Add a member, and tell where its bytes begin."""
    header = tarfile.TarInfo(name)
    # What would differ from machine to machine stays at nothing: owner, and time of change.
    header.size, header.mode = len(data), 0o644
    archive.addfile(header, BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return int(archive.offset) - blocks * tarfile.BLOCKSIZE


def check_out(out: str) -> None:
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
