"""Clips read from tar shards: the samples of the files, few requests, damaged members and missing shards."""

from __future__ import annotations

import functools
import operator
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch

from asit.audio import files
from asit.config import (
    AugmentSettings,
    FinetuneSettings,
    FrontEndSettings,
    MaskingSettings,
    NetworkSettings,
    PretrainSettings,
    ViewSettings,
)
from asit.data.catalogue import inputs
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.columns import Rows
from asit.data.catalogue.labels import read_labels
from asit.data.loading import loader, sampler
from asit.data.loading.waveforms import WaveformReader, read_clip
from asit.data.loading.windows import Windows
from asit.data.shards import range_reader, tar_index
from asit.errors import CatalogueError, StoreError, TrainingError
from asit.finetune.finetune_dataset import FinetuneDataset
from asit.io import storage
from asit.pretrain.pretrain_dataset import PretrainDataset, collate

RATE, FRAMES = 8000, 32
FRONT_END = FrontEndSettings(rate=RATE, mels=32, mean=-6.0, std=3.0)
KINDS = ("wav", "flac", "ogg", "mp3", "wav")


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Twelve recordings of several formats, lengths and rates, the last longer than a view's segment."""
    folder, rng = tmp_path_factory.mktemp("loose"), np.random.default_rng(0)
    clips = []
    for i in range(12):
        kind, seconds, rate = KINDS[i % 5], 2.3 if i == 11 else 0.5 + 0.05 * i, 16000 if i == 3 else RATE
        wave = 0.2 * rng.standard_normal(round(rate * seconds))
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        path = folder / "ab"[i % 2] / f"{i}.{kind}"
        soundfile.write(path, wave, rate)
        clips.append(Clip(str(path), files.probe(path).seconds, rate, 1, "ab"[i % 2]))
    return Catalogue.from_clips(clips, header={"mean": -6.0, "std": 3.0})


def pack(listed: Catalogue, folder: Path, each: int = 5, root: str | None = None) -> Catalogue:
    """The catalogue's files in tars of `each`, as they are, and its index written beside them."""
    rows, found = [], Rows()
    for i, name in enumerate(listed.ids()):
        shard = f"shard-{i // each:06d}.tar"
        with tarfile.open(folder / shard, "a" if i % each else "w") as archive:
            archive.add(listed[i].path, name)
            archive.addfile(tarfile.TarInfo(name.rpartition(".")[0] + ".json"))
        with tarfile.open(folder / shard) as archive:
            member = archive.getmember(name)
        clip = listed[i]
        rows.append(
            {"path": name, "seconds": clip.seconds, "rate": clip.rate, "channels": 1, "label": clip.label}
            | {"shard": shard, "offset": member.offset_data, "size": member.size}
        )
    found.extend(rows)
    made = Catalogue(listed.header, root or str(folder), found.columns())
    made.write(folder / "index.jsonl")
    return made


@pytest.fixture(scope="module")
def packed(loose: Catalogue, tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """The same in three shards; nothing may change them."""
    return pack(loose, tmp_path_factory.mktemp("packed"))


def views_of(listed: Catalogue) -> PretrainDataset:
    views = ViewSettings(segment_seconds=1.0, seconds=0.3, gain_db=3.0)
    settings = PretrainSettings(seed=5, front_end=FRONT_END, views=views, masking=MaskingSettings(fill="noise"))
    return PretrainDataset(listed, settings, (FRAMES, 0))


def labelled_of(listed: Catalogue) -> FinetuneDataset:
    changes = AugmentSettings(mixup=0.5, mixup_probability=0.6, roll_seconds=0.1)
    settings = FinetuneSettings(seed=5, front_end=FRONT_END, augment=changes, network=NetworkSettings(dropout=0.5))
    return FinetuneDataset(listed, np.arange(len(listed)), read_labels(listed), settings, FRAMES)


def same(left: Any, right: Any) -> None:
    for name, value in vars(left).items():
        if name not in ("name", "crops"):  # of the crops x is made
            other = getattr(right, name)
            assert value == other if isinstance(value, list) else np.array_equal(np.asarray(value), np.asarray(other))


@pytest.mark.parametrize("make", [views_of, labelled_of])
@pytest.mark.parametrize("keep", [False, True])
def test_shards_give_the_samples_of_files(
    make: Callable[[Catalogue], Any], keep: bool, loose: Catalogue, packed: Catalogue
) -> None:
    ours, theirs = make(packed), make(loose)
    if keep:
        ours.waveforms.keep()
        theirs.waveforms.keep()
    assert len(ours) == len(theirs)
    keys = [(epoch, index) for epoch in range(2) for index in range(len(ours))]
    for left, right in zip(ours.__getitems__(keys), theirs.__getitems__(keys), strict=True):
        same(left, right)
    assert packed.digest == loose.digest  # so a run begun on the one goes on with the other


def test_windows_are_the_same(loose: Catalogue, packed: Catalogue) -> None:
    rows = np.arange(len(loose))
    ours, theirs = (Windows(listed, rows, FRONT_END, FRAMES, 0.5, 7) for listed in (packed, loose))
    for block in range(len(theirs)):
        assert torch.equal(ours[block].x, theirs[block].x)
        assert not ours[block].failures


def test_a_batch_asks_once_for_neighbours(packed: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, int]] = []
    plain = storage.read_range

    def read(location: str, offset: int, size: int) -> bytes:
        asked.append((location, offset, size))
        return plain(location, offset, size)

    monkeypatch.setattr(storage, "read_range", read)
    mixed = labelled_of(packed)
    mixed.__getitems__([(0, index) for index in range(4)])
    assert len({location for location, *_ in asked}) == len(asked)  # what is mixed in too
    asked.clear()
    samples = views_of(packed)
    samples.__getitems__([(0, index) for index in (3, 0, 7, 2, 1, 6)])
    assert [Path(location).name for location, *_ in asked] == ["shard-000000.tar", "shard-000001.tar"]
    places = [range_reader.span_of(packed[i]) for i in (3, 0, 7, 2, 1, 6)]
    found = range_reader.fetch(location for location in places if location is not None)
    for location in places:
        assert location is not None
        assert found[location] == plain(*location)
    monkeypatch.setattr(range_reader, "_GAP", 0)
    asked.clear()
    apart = [range_reader.span_of(packed[i]) for i in (0, 2, 0)]
    range_reader.fetch(location for location in apart if location is not None)
    assert len(asked) == 2  # nothing between is read, and nothing twice
    monkeypatch.setattr(range_reader, "_AHEAD", places[0].size)  # type: ignore[index]
    assert len(range_reader.fetch(location for location in places if location is not None)) == 1


@pytest.mark.parametrize("start", [0.0, 0.31])
def test_of_a_large_member_only_blocks_are_read(
    start: float, loose: Catalogue, packed: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_reader, "AT_ONCE", 0)
    monkeypatch.setattr(range_reader, "_BLOCK", 1000)
    most = 0
    plain = storage.read_range

    def read(location: str, offset: int, size: int) -> bytes:
        nonlocal most
        most = max(most, size)
        return plain(location, offset, size)

    monkeypatch.setattr(storage, "read_range", read)
    for i in range(len(loose)):
        ours, theirs = (read_clip(listed[i], RATE, start, 0.1) for listed in (packed, loose))
        assert np.array_equal(ours, theirs)
    sizes = [range_reader.span_of(packed[i]).size for i in range(12)]  # type: ignore[index]
    assert most < max(sizes)


def test_a_damaged_member_is_replaced_and_a_missing_shard_is_not(
    loose: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = pack(loose, tmp_path)
    _, offset, size = range_reader.span_of(listed[1])  # type: ignore[misc]
    with (tmp_path / "shard-000000.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    found = views_of(listed).__getitems__([(0, 1)])
    assert isinstance(found, list)
    assert "shard-000000.tar/b/1.flac" in found[0].failures[0]
    (tmp_path / "shard-000001.tar").unlink()
    keys = sampler.MicroBatchSampler(order=sampler.shuffled(0, 12), count=12, batch=4, micro=4)
    gather = functools.partial(collate, donor_pool=1)
    windows = Windows(listed, np.arange(12), FRONT_END, FRAMES, 0.5, 7)
    for large in (False, True):
        if large:
            monkeypatch.setattr(range_reader, "AT_ONCE", 0)
        with pytest.raises(StoreError, match=r"shard-000001\.tar"):
            list(loader.loader(views_of(listed), keys, gather, workers=0, pin=False))
        blocks = [[block] for block in range(len(windows))]
        with pytest.raises(StoreError, match=r"shard-000001\.tar"):
            list(loader.loader(windows, blocks, operator.itemgetter(0), workers=0, pin=False))
        with pytest.raises(StoreError, match=r"shard-000001\.tar"):
            WaveformReader(FRONT_END).read(listed[5], 0.0, 0.2)


def test_tars_without_an_index(loose: Catalogue, packed: Catalogue, tmp_path: Path) -> None:
    folder = shutil.copytree(packed.root, tmp_path / "tars")
    assert tar_index.index_of(str(folder)) == str(folder / "index.jsonl")
    (folder / "index.jsonl").unlink()
    assert tar_index.index_of(str(folder)) is None
    tars = [str(folder / f"shard-{i:06d}.tar") for i in range(3)]
    for given in (folder, folder / "shard-*.tar", *tars[:1]):
        assert tar_index.tars_of(str(given)) == (tars if str(given) != tars[0] else tars[:1])
    shown: list[tuple[int, int, int]] = []
    made = tar_index.build(tars, FRONT_END, progress=lambda *now: shown.append(now))
    assert shown == [(1, 3, 0), (2, 3, 0), (3, 3, 0)]
    assert made.ids() == [f"shard-{i // 5:06d}.tar/{name}" for i, name in enumerate(loose.ids())]
    np.testing.assert_allclose(made.seconds, loose.seconds, rtol=1e-6)
    assert made.labels.tolist() == [None] * 12
    assert made.header["statistics_clips"] == 12
    for i in range(12):
        assert np.array_equal(read_clip(made[i], RATE), read_clip(loose[i], RATE))
    made.write(folder / "kept.jsonl")
    again = Catalogue.read(folder / "kept.jsonl")
    assert (again.digest, again[7]) == (made.digest, made[7])
    shutil.copy(loose[0].path, folder)
    with pytest.raises(CatalogueError, match=r"3 tars and 1 recordings beside them"):
        tar_index.tars_of(str(folder))


def test_a_store_is_read_as_a_folder_is(loose: Catalogue, packed: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASIT_STORE_SECONDS", "0.2")
    for location in Path(packed.root).iterdir():
        storage.write(f"memory://reading/{location.name}", location.read_bytes())
    assert tar_index.index_of("memory://reading") == "memory://reading/index.jsonl"
    listed = Catalogue.read("memory://reading/index.jsonl")
    assert listed.digest == loose.digest
    for key in ((0, 3), (0, 9)):
        same(views_of(listed)[key], views_of(loose)[key])
    items = inputs.expand(["memory://reading"])
    assert [item.name for item in items] == loose.ids()
    assert items[4].sound() == Path(loose[4].path).read_bytes()
    assert [item.label for item in items] == loose.labels.tolist()
    asked: list[str] = []
    plain = storage.read_range
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_range", lambda location, *span: asked.append(location) or plain(location, *span))
        sounds = inputs.InputReader(items)
        with ThreadPoolExecutor(4) as threads:
            got = [*threads.map(sounds, range(12))]
        assert got == [Path(clip.path).read_bytes() for clip in loose]
        assert sorted(asked) == [f"memory://reading/shard-{i:06d}.tar" for i in range(3)]  # neighbours together
        assert not any(run._found for run in sounds.ahead._runs.values())
    storage.remove("memory://reading/index.jsonl")
    tars = tar_index.tars_of("memory://reading")
    assert tars == [f"memory://reading/shard-{i:06d}.tar" for i in range(3)]
    assert tar_index.tars_of("memory://reading/shard-00000[01].tar") == tars[:2]
    assert tar_index.build(tars, FRONT_END).labels.tolist() == [None] * 12
    items = inputs.expand(["memory://reading/*.tar"])
    assert items[7].name == "shard-000001.tar/b/7.ogg"
    assert items[7].sound() == Path(loose[7].path).read_bytes()
    with pytest.raises(CatalogueError, match=r"neither index\.jsonl nor a tar; 0 other names"):
        tar_index.tars_of("memory://nothing")
    sounds = inputs.InputReader(items)
    storage.remove(tars[1])
    for location in (7, 7):
        with pytest.raises(StoreError, match="shard-000001"):
            sounds(location)


def test_an_index_and_its_folder_are_inputs(loose: Catalogue, packed: Catalogue) -> None:
    for given in (packed.root, f"{packed.root}/index.jsonl"):
        items = inputs.expand([given])
        assert [item.name for item in items] == loose.ids()
        assert all(item.sound() == Path(loose[i].path).read_bytes() for i, item in enumerate(items))


def test_blocks_are_an_order_of_neighbours() -> None:
    places_of = np.stack([np.repeat([0, 1, 2], [50, 3, 203]), np.arange(256)], axis=1)
    blocks = sampler.in_blocks(3, places_of, 8)
    first = blocks(0)
    assert sorted(first) == list(range(256))
    assert np.array_equal(first, sampler.in_blocks(3, places_of, 8)(0))
    assert not np.array_equal(first, blocks(1))
    assert not np.array_equal(first, sampler.in_blocks(4, places_of, 8)(0))

    def places(batch: npt.NDArray[np.int64]) -> int:
        ranked = np.sort(batch)
        return int((np.diff(ranked) > 1).sum()) + 1

    batches = range(0, 256, 64)
    assert np.mean([places(first[i : i + 64]) for i in batches]) <= 64 / 8 + 3
    assert np.mean([places(sampler.permutation(3, 0, 256)[i : i + 64]) for i in batches]) > 40
    # Where blocks begin moves, so that the same neighbours do not always come together.
    windows = [{frozenset(blocks(epoch)[i : i + 32].tolist()) for i in range(0, 64, 32)} for epoch in range(2)]
    assert not windows[0] & windows[1]
    # Four blocks are mixed: neighbours in the order are mostly not neighbours in the shard.
    assert (np.abs(np.diff(first)) == 1).mean() < 0.35
    assert sampler.in_blocks(0, np.zeros((5, 2), np.int64), 100)(0).size == 5
    # Shards whose clips lie in another order than the catalogue's: neighbours are those that lie together.
    moved = np.random.default_rng(0).permutation(256)
    assert np.array_equal(moved[sampler.in_blocks(3, places_of[moved], 8)(0)], first)


def test_a_killed_worker_is_reported(monkeypatch: pytest.MonkeyPatch, packed: Catalogue) -> None:
    class Worker:
        pid, exitcode = 77, -9

        def kill(self) -> None: ...

    class Dead:
        _workers = (Worker(),)

        def __iter__(self) -> Dead:
            return self

        def __next__(self) -> Any:
            raise RuntimeError("DataLoader worker (pid(s) 77) exited unexpectedly")

    class Broken(Dead):
        def __next__(self) -> Any:
            raise RuntimeError("something else")

    with pytest.raises(TrainingError, match=r"1 of 1 loader workers ended.*process 77 by SIGKILL") as caught:
        next(loader._raised(Dead()))
    assert "fewer --workers" in caught.value.remedy
    with pytest.raises(RuntimeError, match="something else"):
        next(loader._raised(Broken()))
