"""A cache of features on disk, so that a clip is read and encoded once.

A shelf holds one kind of feature of one model, in files of some dozen clips each. Shelves and clips are named by hashes
of all that the numbers depend on, so nothing is ever out of date; the least recently used files are deleted when the
folder grows over its limit. Several processes may write one shelf: files are written atomically, and a clip that two
wrote is the same in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from asit.errors import ConfigError
from asit.io import atomic
from asit.io.local_files import cache_folder
from asit.io.parsing import UNFIT

SUFFIX = ".safetensors"
LIMIT_GB = 20.0
"""Default limit of the folder's size."""
_LOW = 0.9  # share of the limit that remains after deleting, so that this is rare

Array = npt.NDArray[Any]


def default_folder() -> Path:
    """Return the folder of cached features."""
    return cache_folder("features")


def open_store(folder: str | None, limit_gb: float = LIMIT_GB) -> Store | None:
    """Return the store of `--cache`: None is the default folder, "none" is no store; errors are those of `Store`."""
    if folder is not None and folder.lower() == "none":
        return None
    return Store(default_folder() if folder is None else Path(folder), limit_gb)


class Store:
    """Shelves of features under one folder.

    Args:
        folder: is created where it does not exist.
        limit_gb: limit of its size, in units of 1e9 bytes.

    Attributes:
        trouble: why nothing more is written, such as a full disk; "": nothing is wrong.

    Raises:
        ConfigError: a limit below 0, or the folder cannot be made or written.
    """

    def __init__(self, folder: Path, limit_gb: float = LIMIT_GB) -> None:
        if not limit_gb > 0:
            raise ConfigError(
                f"a cache limit of {limit_gb:g} GB", "more than 0", "pass --cache none for a run without a cache"
            )
        self.folder, self.limit, self.trouble = folder, int(limit_gb * 1e9), ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                f"the cache folder {folder} cannot be written: {error.strerror}",
                "a folder for features",
                "pass --cache FOLDER for another folder, or --cache none",
            ) from None
        self._size = self.size()

    def shelf(self, *facts: str) -> Shelf:
        """Return the shelf of features that depend on these facts: model, front end, kind of feature."""
        return Shelf(self, self.folder / key_of(*facts).hex())

    def write(self, path: Path, arrays: dict[str, Array]) -> bool:
        """Write one file atomically and return whether it was; after an OSError nothing more is written."""
        if self.trouble:
            return False
        data = safetensors.numpy.save(arrays)
        if self._size + len(data) > self.limit:
            self._make_room(len(data))
        if len(data) > self.limit:
            return False
        try:
            with atomic.write_file(path, sync=False) as draft:
                draft.write_bytes(data)
        except OSError as error:
            self.trouble = error.strerror or str(error)
            return False
        self._size += len(data)
        return True

    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """Return (last used, bytes, path) of every file, and delete drafts of killed writers."""
        found = []
        for shelf in self.folder.iterdir():
            atomic.sweep(shelf)
        for path in self.folder.glob(f"*/*{SUFFIX}"):
            with contextlib.suppress(OSError):  # removed by another process between listing and looking
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _make_room(self, needed: int) -> None:
        entries = sorted(self._entries())
        self._size = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._size + needed <= _LOW * self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            self._size -= size


class Shelf:
    """One kind of feature of one model: key of a clip -> array (rows, width)."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.folder = store, folder
        self._entries: dict[bytes, tuple[Path, int]] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                with safetensors.safe_open(path, "numpy") as file:
                    keys = file.get_tensor("keys")
                self._entries.update({key.tobytes(): (path, i) for i, key in enumerate(keys)})
            except (OSError, safetensors.SafetensorError, *UNFIT):
                self._remove(path)

    def get(self, keys: Iterable[bytes]) -> dict[bytes, Array]:
        """Return the arrays of these keys; those whose file is missing or damaged are left out."""
        by_file: dict[Path, list[tuple[bytes, int]]] = {}
        for key in keys:
            if key in self._entries:
                path, index = self._entries[key]
                by_file.setdefault(path, []).append((key, index))
        out: dict[bytes, Array] = {}
        for path, wanted in by_file.items():
            if (arrays := self._load(path)) is not None:
                out.update({key: arrays[index] for key, index in wanted})
        return out

    def put(self, arrays: Mapping[bytes, Array]) -> None:
        """Write arrays of one width by their keys, into one file."""
        if not arrays:
            return
        path = self.folder / f"{key_of(*(key.hex() for key in arrays)).hex()}{SUFFIX}"
        held = {
            "keys": np.frombuffer(b"".join(arrays), np.uint8).reshape(len(arrays), -1),
            "values": np.concatenate(list(arrays.values())),
            "counts": np.array([len(array) for array in arrays.values()], np.int64),
        }
        if self.store.write(path, held):
            self._entries.update({key: (path, i) for i, key in enumerate(arrays)})

    def _load(self, path: Path) -> list[Array] | None:
        try:
            held: dict[str, Array] = safetensors.numpy.load_file(path)
            found = np.split(held["values"], np.cumsum(held["counts"])[:-1])
            fits = all(part.ndim == 2 and part.dtype.kind == "f" for part in found) and len(found) == len(held["keys"])
        except (OSError, safetensors.SafetensorError, *UNFIT):
            fits = False
        if not fits:
            self._remove(path)
            self._entries = {key: entry for key, entry in self._entries.items() if entry[0] != path}
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now
        return found

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):  # removed or repaired by another process
            path.unlink()


def key_of(*facts: str) -> bytes:
    """Return the hash of these facts: 20 bytes."""
    digest = hashlib.blake2b(digest_size=20)
    for fact in facts:
        data = fact.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little") + data)  # with its length, so that different lists differ
    return digest.digest()
