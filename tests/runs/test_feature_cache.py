"""The cache of features: what is kept comes back, damage and full disks are met, old entries make room."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asit.errors import ConfigError
from asit.evaluate.feature_cache import Shelf, Store, default_folder, key_of, open_store
from asit.io import atomic

KEYS = [key_of(name) for name in "abcde"]
ONE = np.zeros((25, 100), np.float32)  # 10 kB


def only(shelf: Shelf) -> Path:
    """The one file of a shelf."""
    (path,) = shelf.folder.iterdir()
    return path


def held(shelf: Shelf, key: bytes) -> Any:
    """The array of one key, or None."""
    return shelf.get([key]).get(key)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "cache")
    shelf = store.shelf("model", "mean")
    shelf.put({})
    assert not shelf.folder.exists()  # no file for nothing
    assert shelf.get(KEYS) == {}
    arrays = [np.float32([[1e-30, np.pi]]), np.arange(6, dtype=np.float32).reshape(3, 2), np.float32([[1, 2]])]
    first = dict(zip(KEYS, arrays, strict=False))
    shelf.put(first)
    shelf.put({KEYS[3]: np.full((2, 2), 7, np.float32)})
    for again in (shelf, Store(store.folder).shelf("model", "mean")):
        found = again.get(KEYS)
        assert found.keys() == set(KEYS[:4])
        for key, array in first.items():
            assert found[key].dtype == np.float32
            np.testing.assert_array_equal(found[key], array)
    assert store.shelf("model", "class").get(KEYS) == {}
    assert store.shelf("modelmean", "").get(KEYS) == {}
    assert store.size() == sum(path.stat().st_size for path in shelf.folder.iterdir())
    assert len(list(shelf.folder.iterdir())) == 2
    tokens = store.shelf("tokens")
    tokens.put({KEYS[0]: np.ones((4, 2), np.float16)})
    assert held(tokens, KEYS[0]).dtype == np.float16


def test_arrays_of_many_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [key_of(str(i)) for i in range(30)]
    for i, key in enumerate(keys):
        store.shelf("a").put({key: np.full((1, 2), i, np.float32)})
    found = store.shelf("a").get(keys[::-1])
    assert [found[key][0, 0] for key in keys] == list(range(30))


def test_names_depend_on_every_fact_and_on_where_one_ends() -> None:
    names = {key_of("a", "b"), key_of("b", "a"), key_of("ab", ""), key_of("", "ab"), key_of("ab"), key_of("a", "b", "")}
    assert len(names) == 6
    assert key_of("a\udcff") != key_of("a")  # a file's name that is no UTF-8


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_file_is_none_and_is_removed(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = Store(tmp_path)
    shelf = store.shelf("a")
    shelf.put({KEYS[0]: ONE, KEYS[1]: ONE})
    before = store.shelf("a")  # has read the keys while the file was whole
    path = only(shelf)
    path.write_bytes(damage(path.read_bytes()))
    assert before.get(KEYS[:2]) == {}
    assert not path.exists()
    assert store.shelf("a").get(KEYS[:2]) == {}


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_gb=35e-6)
    for age, key in enumerate(KEYS[:3]):
        shelf = store.shelf(key.hex())
        shelf.put({key: ONE})
        os.utime(only(shelf), (age, age))
    assert held(store.shelf(KEYS[0].hex()), KEYS[0]) is not None  # used now
    store.shelf(KEYS[3].hex()).put({KEYS[3]: ONE})
    assert [held(store.shelf(key.hex()), key) is not None for key in KEYS] == [True, False, True, True, False]
    assert store.size() < store.limit
    again = Store(tmp_path, limit_gb=35e-6)  # knows what is there
    for key in (KEYS[4], KEYS[1]):
        again.shelf(key.hex()).put({key: ONE})
    assert again.size() < again.limit
    assert held(again.shelf(KEYS[1].hex()), KEYS[1]) is not None


def test_what_is_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, limit_gb=1e-6)
    shelf = store.shelf("a")
    shelf.put({KEYS[0]: ONE})
    assert shelf.get(KEYS) == {}
    assert not store.trouble


def test_a_full_disk_ends_the_keeping_and_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        store.shelf("a").put({KEYS[0]: ONE})
    assert store.trouble == os.strerror(errno.ENOSPC)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    store.shelf("a").put({KEYS[1]: ONE})
    assert store.size() == 0


def test_drafts_of_killed_writers_are_removed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shelf = store.shelf("a")
    shelf.put({KEYS[0]: ONE})
    whole = only(shelf).stat().st_size
    fresh = atomic.draft_of(shelf.folder / "x.safetensors")
    old = atomic.draft_of(shelf.folder / "x.safetensors")
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 8 * 86400,) * 2)
    assert store.size() == whole
    assert not old.exists()
    assert fresh.exists()
    assert held(store.shelf("a"), KEYS[0]) is not None


def test_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "asit" / "features"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says to ignore these
    assert default_folder() == Path.home() / ".cache" / "asit" / "features"
    assert open_store("none") is None
    store = open_store(str(tmp_path / "mine"), 2)
    assert store is not None
    assert (store.folder, store.limit) == (tmp_path / "mine", 2_000_000_000)


def test_an_invalid_folder_or_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"cache folder .*file cannot be written.*\n.*\n.*--cache none"):
        Store(tmp_path / "file")
    with pytest.raises(ConfigError, match="a cache limit of 0 GB"):
        Store(tmp_path, 0)
