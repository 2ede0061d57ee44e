"""Features on disk, so that a clip is read and encoded once: named by what they were made of, written whole.

A shelf holds one kind of feature of one model: files of some dozen clips each, and in each file the clips' keys, which
are hashes of everything about a clip that its numbers depend on. A change of anything gives another shelf or another
key, so nothing is ever out of date; what has not been used for longest goes when the folder grows over its limit.
Two processes may write one shelf: files are renamed into place, and a clip that both wrote is the same in both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from asit.errors import ConfigError
from asit.io import atomic
from asit.io.parsing import UNFIT

SUFFIX = ".safetensors"
LIMIT_GB = 20.0
"""Size to which the folder is kept, unless told otherwise."""
_LOW = 0.9  # share of the limit that is left after making room, so that room is made seldom

_OPEN = 8  # files of a shelf that are held in memory

Array = npt.NDArray[Any]


def default_folder() -> Path:
    """`asit/features` under XDG_CACHE_HOME, or under ~/.cache (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "asit" / "features"  # noqa: PTH117


def open_store(folder: str | None, limit_gb: float = LIMIT_GB) -> Store | None:
    """The store that `--cache` asks for: None is the default folder, "none" is no store at all.

    Raises:
        ConfigError: a limit below 0, or the folder cannot be made or written.
    """
    if folder is not None and folder.lower() == "none":
        return None
    return Store(default_folder() if folder is None else Path(folder), limit_gb)


class Store:
    """Shelves of features under one folder.

    Args:
        folder: is made where it is not there.
        limit_gb: size that the folder is kept to, in units of 1e9 bytes.

    Attributes:
        trouble: why nothing more is written, such as a full disk; "" while all is well.

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
                "pass --cache FOLDER for another place, or --cache none",
            ) from None
        self._size = self.size()

    def shelf(self, *facts: str) -> Shelf:
        """The shelf of what depends on these facts: model, front end, kind of feature."""
        return Shelf(self, self.folder / key_of(*facts).hex())

    def write(self, path: Path, arrays: dict[str, Array]) -> bool:
        """Write one file atomically; a disk that is full ends the keeping, not the run."""
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
        """Bytes of all files."""
        return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last used, bytes, path) of every file; drafts of killed writers are removed on the way."""
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
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._open: OrderedDict[Path, list[Array]] = OrderedDict()
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            try:
                with safetensors.safe_open(path, "numpy") as file:
                    keys = file.get_tensor("keys")
                self._places.update({key.tobytes(): (path, i) for i, key in enumerate(keys)})
            except (OSError, safetensors.SafetensorError, *UNFIT):
                self._remove(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def get(self, key: bytes) -> Array | None:
        """The array kept under a key; None where there is none, or where its file is gone or damaged."""
        place = self._places.get(key)
        if place is None:
            return None
        path, index = place
        if path not in self._open and not self._load(path):
            self._places = {key: (at, i) for key, (at, i) in self._places.items() if at != path}
            return None
        self._open.move_to_end(path)
        return self._open[path][index]

    def put(self, keys: Sequence[bytes], arrays: Sequence[Array]) -> None:
        """Keep arrays of one width, one a key, in one file."""
        if not keys:
            return
        path = self.folder / f"{key_of(*(key.hex() for key in keys)).hex()}{SUFFIX}"
        held = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
            "values": np.concatenate(arrays),
            "counts": np.array([len(array) for array in arrays], np.int64),
        }
        if self.store.write(path, held):
            self._places.update({key: (path, i) for i, key in enumerate(keys)})

    def _load(self, path: Path) -> bool:
        try:
            held: dict[str, Array] = safetensors.numpy.load_file(path)
            found = np.split(held["values"], np.cumsum(held["counts"])[:-1])
            fits = all(part.ndim == 2 and part.dtype.kind == "f" for part in found) and len(found) == len(held["keys"])
        except (OSError, safetensors.SafetensorError, *UNFIT):
            fits = False
        if not fits:
            self._remove(path)
            return False
        with contextlib.suppress(OSError):
            os.utime(path)  # used now: the last to go
        self._open[path] = found
        if len(self._open) > _OPEN:
            self._open.popitem(last=False)
        return True

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):  # removed or mended by another process
            path.unlink()


def key_of(*facts: str) -> bytes:
    """The name of what depends on exactly these facts: 20 bytes."""
    whole = hashlib.blake2b(digest_size=20)
    for fact in facts:
        data = fact.encode("utf-8", "surrogateescape")
        whole.update(len(data).to_bytes(8, "little") + data)  # with its length, so that no two lists read alike
    return whole.digest()
