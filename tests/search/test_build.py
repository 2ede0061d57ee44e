"""Building and updating an index: what is read, what is kept, and what an interruption leaves."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit import search
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.model.audio_model import AudioModel
from asit.model.inference.overlap import ClipPooling as Pooling
from asit.search import Index, IndexSettings, builder

from .conftest import RATE, make_model, write  # type: ignore[import-not-found]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the recordings that builds read from here on."""
    names: list[str] = []
    real = builder.embed_sources

    def embed_sources(model: AudioModel, sources: Any, *rest: Any, **more: Any) -> Iterator[Any]:
        names.extend(source.name for source in sources)
        return real(model, sources, *rest, **more)

    monkeypatch.setattr(builder, "embed_sources", embed_sources)
    return names


def left_of(out: Path) -> Path:
    """The folder from which a build resumes."""
    return out.with_name(f"{out.name}.partial")


def names(index: Index) -> set[str]:
    return {source.name for source in index.sources}


# What is new is read, what is there stays.


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_window_longer_than_the_view_is_one_row(
    archive: Path, model: AudioModel, tmp_path: Path, pooling: Pooling
) -> None:
    """Its stretches come one by one; together they are what the model says about all of it."""
    ask = IndexSettings(window=5.0, pooling=pooling, batch=1)
    search.build(model, [str(archive / "long.wav")], tmp_path / "index", ask)
    index = Index.read(tmp_path / "index")
    assert [(index.clip(row).start, index.clip(row).end) for row in range(len(index))] == [(0.0, 3.0)]
    found = model.embed(archive / "long.wav")
    alone = (found.clip if pooling == "mean" else found.class_token).numpy()
    np.testing.assert_allclose(index.vector(0), alone / np.linalg.norm(alone), atol=1e-3)


def test_adding_reads_only_what_is_new_or_changed(
    made: Index, model: AudioModel, archive: Path, read: list[str], tmp_path: Path
) -> None:
    before = made
    vectors = {before.clip(row).name: before.vector(row) for row in range(8)}
    read.clear()
    write(archive / "new.wav", 0.5, 20)
    write(archive / "4.wav", 0.5, 21)
    (archive / "5.wav").unlink()
    built = search.build(model, [str(archive)], tmp_path / "index", add=True)
    assert read == ["4.wav", "new.wav"]
    assert (built.read, built.kept, built.dropped, built.failures) == (2, 7, 1, [])
    after = Index.read(tmp_path / "index")
    assert names(after) == {*(f"{i}.wav" for i in (0, 1, 2, 3, 4, 6, 7)), "long.wav", "new.wav"}
    for row in range(len(after)):
        place = after.clip(row)
        if place.name in vectors and place.name != "4.wav":
            np.testing.assert_array_equal(after.vector(row), vectors[place.name])
    for name, seed in (("4.wav", 21), ("new.wav", 20), ("long.wav", 50)):
        hit = after.nearest(after.vector_of(archive / name, model), 1)[0]
        assert hit.name == name, seed
    fresh = search.build(model, [str(archive)], tmp_path / "fresh")
    assert (fresh.rows, fresh.recordings) == (built.rows, built.recordings)


def test_adding_another_folder_keeps_what_is_elsewhere(
    made: Index, model: AudioModel, read: list[str], tmp_path: Path
) -> None:
    write(tmp_path / "more" / "m.wav", 0.5, 30)
    read.clear()
    built = search.build(model, [str(tmp_path / "more")], tmp_path / "index", add=True)
    assert (read, built.kept, built.recordings) == (["m.wav"], 9, 10)
    again = search.build(model, [], tmp_path / "index", add=True)  # nothing named: what is there is looked at
    assert (again.read, again.kept, again.dropped) == (0, 10, 0)
    (tmp_path / "more" / "m.wav").unlink()
    assert search.build(model, [], tmp_path / "index", add=True).dropped == 1


def test_adding_keeps_the_indexs_settings_and_refuses_others(archive: Path, model: AudioModel, tmp_path: Path) -> None:
    search.build(model, [str(archive)], tmp_path / "index", IndexSettings(window=0.5, pooling="class"))
    write(archive / "new.wav", 1.5, 20)
    search.build(model, [str(archive)], tmp_path / "index", add=True)
    assert Index.read(tmp_path / "index").card["window"] == 0.5
    with pytest.raises(ConfigError, match=r"other settings: window 0.5 in the index, 0.4 given; pooling class"):
        search.build(model, [str(archive)], tmp_path / "index", IndexSettings(window=0.4, pooling="mean"), add=True)
    with pytest.raises(ConfigError, match="another model: not the same weights"):
        search.build(make_model(1), [str(archive)], tmp_path / "index", add=True)


def test_a_stopped_build_resumes(
    archive: Path, model: AudioModel, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    real = builder.embed_sources
    for after in (5, 0):  # the second time before anything is read

        def stopped(*args: Any, limit: int = after, **more: Any) -> Iterator[Any]:
            yield from itertools.islice(real(*args, **more), limit)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(builder, "embed_sources", stopped)
            with pytest.raises(KeyboardInterrupt, match=r"5 of 9 recordings are kept in .*index\.partial"):
                search.build(model, [str(archive)], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.partial", "sounds"]
    assert len(Index.read(left_of(out))) == 5
    write(archive / "1.wav", 0.5, 40)  # changed since
    (archive / "2.wav").unlink()
    read.clear()
    built = search.build(model, [str(archive)], out)
    assert read == ["1.wav", "5.wav", "6.wav", "7.wav", "long.wav"]
    assert (built.read, built.kept, built.dropped, built.recordings) == (8, 0, 0, 8)
    assert not left_of(out).exists()
    search.build(model, [str(archive)], tmp_path / "once")
    one, two = Index.read(out), Index.read(tmp_path / "once")
    assert sorted(one.sources, key=lambda source: source.name) == two.sources
    for row in range(len(two)):
        same = [at for at in range(len(one)) if replace(one.clip(at), row=row) == two.clip(row)]
        np.testing.assert_allclose(one.vector(*same), two.vector(row), atol=1e-3)


def test_a_killed_build_resumes_from_what_it_saved(
    made: Index, model: AudioModel, archive: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that is killed while it writes; what the index had counts as kept."""
    out = made.folder
    for i in range(3):
        write(archive / f"new{i}.wav", 0.5, 20 + i)
    (archive / "4.wav").unlink()
    monkeypatch.setattr(builder, "_SAVE", 0.0)

    class KilledError(Exception):
        pass

    write_folder = builder.atomic.write_folder

    def killed(folder: Path, **options: Any) -> Any:
        if folder == out:
            raise KilledError
        return write_folder(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builder.atomic, "write_folder", killed)
        with pytest.raises(KilledError):
            search.build(model, [str(archive)], out, add=True)
    read.clear()
    built = search.build(model, [str(archive)], out, add=True)
    assert read == ["new1.wav", "new2.wav"]  # saved after the first, and then not for 50 times as long as that took
    assert (built.read, built.kept, built.dropped, built.recordings) == (3, 8, 1, 11)


def test_what_another_build_left_is_not_taken(archive: Path, model: AudioModel, tmp_path: Path) -> None:
    out = tmp_path / "index"
    search.build(model, [str(archive)], left_of(out), IndexSettings(layer=0))
    damaged = tmp_path / "damaged"
    search.build(model, [str(archive)], left_of(damaged))
    (left_of(damaged) / "vectors.npy").write_bytes(b"torn")
    left_of(tmp_path / "old").write_text("of an earlier version")
    for folder in (out, damaged, tmp_path / "old"):
        with pytest.raises(ConfigError, match="left of a build with another model or other settings, or is damaged"):
            search.build(model, [str(archive)], folder)
        assert search.build(model, [str(archive)], folder, overwrite=True).recordings == 9
        assert not left_of(folder).exists()


def test_bad_recordings_are_listed_and_the_rest_goes_on(archive: Path, model: AudioModel, tmp_path: Path) -> None:
    (archive / "2.wav").write_bytes(b"no sound")
    (archive / "6.wav").write_bytes((archive / "6.wav").read_bytes()[:3000])
    soundfile.write(archive / "nan.wav", np.full(4000, np.nan, np.float32), RATE, subtype="FLOAT")
    (archive / "gone.wav").symlink_to(archive / "nothing.wav")
    built = search.build(model, [str(archive)], tmp_path / "index")
    assert {name for name, _ in built.failures} == {"2.wav", "6.wav", "nan.wav", "gone.wav"}
    lines = (tmp_path / "index" / "failures.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == built.failures
    index = Index.read(tmp_path / "index")
    assert names(index) == {"0.wav", "1.wav", "3.wav", "4.wav", "5.wav", "7.wav", "long.wav"}
    for row in range(len(index)):
        assert index.clip(row).name not in {"2.wav", "6.wav"}


def test_nothing_is_written_where_nothing_could_be_read(model: AudioModel, tmp_path: Path) -> None:
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "a.wav").write_bytes(b"no sound")
    with pytest.raises(AudioError, match=r"none of 1 recordings could be read, such as\s+a\.wav"):
        search.build(model, [str(tmp_path / "sounds")], tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["sounds"]


@pytest.mark.parametrize(
    ("owner", "name", "text"),
    [
        (np, "save", "index was not written"),
        (builder, "sha256", "index was not written"),
        (builder._Build, "save", r"index was not written; 0 of 9 recordings are kept in .*index\.partial"),
    ],
)
def test_a_full_disk_leaves_no_index(
    archive: Path, model: AudioModel, tmp_path: Path, owner: Any, name: str, text: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, full)
        patch.setattr(builder, "_SAVE", 0.0 if owner is builder._Build else 60.0)
        with pytest.raises(CheckpointError, match=f"the disk is full: .*{text}"):
            search.build(model, [str(archive)], tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["sounds"]
    assert search.build(model, [str(archive)], tmp_path / "index").recordings == 9


def test_only_an_index_is_replaced(made: Index, model: AudioModel, archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds an index(.|\n)*--add(.|\n)*--overwrite"):
        search.build(model, [str(archive)], tmp_path / "index")
    with pytest.raises(ConfigError, match="choose one"):
        search.build(model, [str(archive)], tmp_path / "index", add=True, overwrite=True)
    with pytest.raises(ConfigError, match="already exists, and is no index"):
        search.build(model, [str(archive)], archive, overwrite=True)
    with pytest.raises(ConfigError, match="an index to add to"):
        search.build(model, [str(archive)], tmp_path / "none", add=True)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"is no index: its card\.json says kind 'audio-encoder'"):
        search.build(model, [str(archive)], tmp_path / "model", overwrite=True)
    assert search.build(model, [str(archive)], tmp_path / "index", overwrite=True).recordings == 9
