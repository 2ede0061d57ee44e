"""The index: what it finds, what it leaves out, and damaged files that it refuses."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit import search
from asit.errors import AsitError, CheckpointError, ConfigError
from asit.io import storage
from asit.model.audio_model import AudioModel
from asit.search import Index, index_files

from .conftest import RATE, make_model, sound  # type: ignore[import-not-found]


def test_short_recordings_are_one_row_and_long_ones_windows(index: Index) -> None:
    assert len(index) == 8 + 8
    assert [index.clip(row).name for row in range(8)] == [f"{i}.wav" for i in range(8)]
    assert [(round(index.clip(row).start, 3), round(index.clip(row).end, 3)) for row in range(8, 16)] == [
        *[(round(0.4 * i, 3), round(0.4 * i + 0.4, 3)) for i in range(7)],
        (2.6, 3.0),
    ]
    assert {source.path for source in index.sources} == {
        str(path) for path in (index.folder.parent / "sounds").resolve().iterdir()
    }


def test_a_row_is_the_embedding_of_its_stretch_alone(index: Index, model: AudioModel) -> None:
    wave = sound(3.0, 50)
    for row in (8, 11, 15):
        place = index.clip(row)
        alone = model.embed(wave[round(place.start * RATE) : round(place.end * RATE)]).clip.numpy()
        np.testing.assert_allclose(index.vector(row), alone / np.linalg.norm(alone), atol=1e-3)


def test_nearest_is_the_exact_order(index: Index) -> None:
    rng = np.random.default_rng(0)
    everything = np.stack([index.vector(row) for row in range(len(index))]).astype(np.float64)
    for _ in range(10):
        query = rng.standard_normal(everything.shape[1])
        cosine = everything @ query / np.linalg.norm(query) / np.linalg.norm(everything, axis=1)
        best = np.argsort(-cosine)
        found = index.nearest(5 * query, 4)
        assert [hit.row for hit in found] == best[:4].tolist()
        np.testing.assert_allclose([hit.similarity for hit in found], cosine[best[:4]], atol=1e-3)
        left = index.nearest(query, 4, without=best[:2])
        assert [hit.row for hit in left] == best[2:6].tolist()
    assert len(index.nearest(query, 100)) == len(index)
    assert len(index.nearest(query, 100, without=np.arange(10))) == len(index) - 10
    assert index.nearest(query, 5, without=np.arange(len(index))) == []


def test_a_recording_finds_others_before_itself_only_on_request(index: Index, model: AudioModel, sounds: Path) -> None:
    hits = index.similar(sounds / "3.wav", 3, model, include_self=True)
    assert (hits[0].name, hits[0].row) == ("3.wav", 3)
    assert hits[0].similarity == pytest.approx(1.0, abs=1e-3)
    others = index.similar(sounds / "3.wav", 3, model)
    assert [hit.row for hit in others[:2]] == [hit.row for hit in hits[1:]]
    assert "3.wav" not in {hit.name for hit in index.similar(sounds / "3.wav", 50, model)}


def test_a_link_to_a_recording_is_the_recording(index: Index, model: AudioModel, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(sounds)
    for path in (tmp_path / "way" / "3.wav", os.path.relpath(sounds / "3.wav")):
        assert 3 not in {hit.row for hit in index.similar(path, 50, model)}


def test_a_part_of_a_long_recording_leaves_only_that_part_out(index: Index, model: AudioModel, sounds: Path) -> None:
    hits = index.similar(sounds / "long.wav", 50, model, start=0.8, seconds=0.4)
    assert len(hits) == len(index) - 1
    assert not [hit for hit in hits if hit.name == "long.wav" and hit.start < 1.15 and hit.end > 0.85]
    own = index.similar(sounds / "long.wav", 1, model, start=0.8, seconds=0.4, include_self=True)
    assert (own[0].start, own[0].similarity) == (pytest.approx(0.8), pytest.approx(1.0, abs=1e-3))


def test_arrays_bytes_and_files_are_the_same_query(index: Index, model: AudioModel, sounds: Path) -> None:
    path = sounds / "long.wav"
    query = index.vector_of(path, model)
    np.testing.assert_allclose(index.vector_of(path.read_bytes(), model), query, atol=1e-4)
    np.testing.assert_allclose(index.vector_of(sound(3.0, 50), model), query, atol=1e-4)
    np.testing.assert_allclose(index.vector_of(np.repeat(sound(3.0, 50), 2), model, rate=2 * RATE), query, atol=0.5)
    # The mean of the windows' vectors.
    rows = index.rows_of(str(path))
    np.testing.assert_allclose(query, np.sum([index.vector(row) for row in rows], 0), atol=1e-2)


def test_threads_may_search_at_once(index: Index) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda row: index.nearest(index.vector(row % 16), 1)[0].row, range(64))
        assert list(found) == [row % 16 for row in range(64)]


@pytest.mark.parametrize(
    ("vector", "k", "message"),
    [
        (np.ones(7), 1, r"shape \(7,\)"),
        (np.ones((2, 24)), 1, r"shape \(2, 24\)"),
        (np.zeros(24), 1, "zero or not finite"),
        (np.full(24, np.nan), 1, "zero or not finite"),
        (np.ones(24), 0, "k is 0"),
    ],
)
def test_invalid_queries(index: Index, vector: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        index.nearest(vector, k)


def test_rows_that_are_not_there(index: Index) -> None:
    for row in (-1, len(index)):
        for ask in (index.clip, index.vector, index.source):
            with pytest.raises(ConfigError, match=f"row {row}"):
                ask(row)


@pytest.mark.parametrize("pooling", ["class", "class+mean"])
def test_poolings_and_layers_are_the_indexs_own(archive: Path, model: AudioModel, tmp_path: Path, pooling: Any) -> None:
    ask = search.IndexSettings(pooling=pooling, layer=0, window=0.5, hop=0.25)
    search.build(model, [str(archive)], tmp_path / "index", ask)
    index = Index.read(tmp_path / "index")
    embedded = model.embed(archive / "2.wav", layer=0)
    cls, mean = embedded.class_token.numpy(), embedded.clip.numpy()
    alone = cls if pooling == "class" else np.concatenate([cls, mean])
    np.testing.assert_allclose(index.vector(2), alone / np.linalg.norm(alone), atol=1e-3)
    np.testing.assert_allclose(index.vector_of(archive / "2.wav", model), alone / np.linalg.norm(alone), atol=1e-3)
    assert len(index.rows_of(str(archive / "long.wav"))) == 11  # 3 s, half a second every quarter


def test_labels_parts_and_tar_members(archive: Path, model: AudioModel, tmp_path: Path) -> None:
    (archive / "list.csv").write_text("path,label,start,end\nlong.wav,first,0,0.5\nlong.wav,second,2,2.5\n")
    with tarfile.open(archive / "shard.tar", "w") as tar:
        for seed in (70, 71):
            data = io.BytesIO()
            soundfile.write(data, sound(0.5, seed), RATE, format="WAV", subtype="FLOAT")
            facts = tarfile.TarInfo(f"{seed}.wav")
            facts.size = len(data.getvalue())
            tar.addfile(facts, io.BytesIO(data.getvalue()))
    search.build(model, [str(archive / "list.csv"), str(archive / "shard.tar")], tmp_path / "index")
    index = Index.read(tmp_path / "index")
    assert [(place.start, place.end, place.label, place.member) for place in map(index.clip, range(4))] == [
        (0.0, 0.5, "first", None),
        (2.0, 2.5, "second", None),
        (0.0, 0.5, None, "70.wav"),
        (0.0, 0.5, None, "71.wav"),
    ]
    hit = index.nearest(index.vector_of(sound(0.5, 71), model), 1)[0]
    assert (hit.member, hit.similarity) == ("71.wav", pytest.approx(1.0, abs=1e-3))
    again = index.vector_of(index.source(3).item().sound(), model)
    np.testing.assert_allclose(again, index.vector(3), atol=1e-3)
    assert index.rows_of(str(archive / "shard.tar"), "71.wav").tolist() == [3]
    assert index.rows_of(str(archive / "long.wav"), start=1.9, seconds=0.3).tolist() == [1]
    storage.write("memory://search/shard.tar", (archive / "shard.tar").read_bytes())
    search.build(model, ["memory://search/shard.tar"], tmp_path / "stored")
    stored = Index.read(tmp_path / "stored")
    np.testing.assert_array_equal(stored.vector(1), index.vector(3))
    assert stored.clip(1).path == "memory://search/shard.tar"


# What is not believed.


def _hash_again(folder: Path) -> None:
    """The card made to fit the files, as whoever altered them would."""
    card = json.loads((folder / "card.json").read_text())
    card["sha256"] = {name: index_files.sha256(folder / name) for name in card["sha256"]}
    (folder / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize("name", ["vectors.npy", "rows.npy", "sources.jsonl"])
def test_altered_files_are_refused(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[-2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its SHA-256"):
        Index.read(copied)
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"it has no {name}"):
        Index.read(copied)


class _Spy:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("vectors.npy", lambda path: np.save(path, np.array([_Spy()], object), allow_pickle=True), "vectors.npy"),
        ("vectors.npy", lambda path: np.save(path, np.zeros((3, 24), "<f2")), "shape"),
        ("vectors.npy", lambda path: np.save(path, np.zeros((16, 24), "<f4")), "float32"),
        ("vectors.npy", lambda path: path.write_bytes(path.read_bytes()[:-100]), "vectors.npy"),
        ("vectors.npy", lambda path: path.write_bytes(b"PK\3\4"), "vectors.npy"),
        ("vectors.npy", lambda path: path.write_bytes(b""), "vectors.npy"),
        ("rows.npy", lambda path: _edit(path, "file", 9), "beyond"),
        ("rows.npy", lambda path: _edit(path, "file", 0), "out of order"),
        ("rows.npy", lambda path: _edit(path, "end", np.nan), "not times"),
        ("rows.npy", lambda path: _edit(path, "start", 1e9), "not times"),
        ("rows.npy", lambda path: _edit(path, "start", -1.0), "not times"),
        ("sources.jsonl", lambda path: path.write_text("[1]\n" * 9), "no JSON object"),
        ("sources.jsonl", lambda path: path.write_text('{"name": 1}\n' * 9), "name: 1"),
        ("sources.jsonl", lambda path: path.write_text('{"name": "a"}\n' * 9), "only name"),
        ("sources.jsonl", lambda path: path.write_text('{"run": "x"}\n' * 9), "run"),
        ("sources.jsonl", lambda path: path.write_bytes(b"\xff\n" * 9), "sources.jsonl"),
        ("sources.jsonl", lambda path: path.write_text("[" * 100_000), "sources.jsonl"),
    ],
)
def test_files_that_fit_the_card_and_make_no_sense_are_refused(
    copied: Path, name: str, write: Callable[[Path], Any], message: str
) -> None:
    write(copied / name)
    _hash_again(copied)
    with pytest.raises(CheckpointError, match=message):
        Index.read(copied)


def _edit(path: Path, field: str, value: float) -> None:
    rows = np.load(path)
    rows[field][-1] = value
    np.save(path, rows)


def test_the_graph_of_an_earlier_release_is_not_read(copied: Path, index: Index) -> None:
    (copied / "graph.usearch").write_bytes(b"whatever usearch would trust")
    card = json.loads((copied / "card.json").read_text())
    card |= {"search": "graph", "graph": {"connectivity": 16}, "sha256": {**card["sha256"], "graph.usearch": "0"}}
    (copied / "card.json").write_text(json.dumps(card))
    hits = [one.nearest(index.vector(3), 5) for one in (Index.read(copied), index)]
    assert hits[0] == hits[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "audio-encoder"}, "is no index"),
        ({"format": 99}, "upgrade asit"),
        ({"format": None}, "format None"),
        ({"rows": 10**12}, "fields are not those"),
        ({"rows": "16"}, "fields are not those"),
        ({"rows": 15}, "vectors.npy"),
        ({"recordings": 8}, "beyond the 9"),
        ({"width": 0}, "fields are not those"),
        ({"pooling": "max"}, "fields are not those"),
        ({"window": 0}, "fields are not those"),
        ({"hop": float("nan")}, "fields are not those"),
        ({"model": []}, "fields are not those"),
        ({"model": {"path": 3}}, "fields are not those"),
        ({"layer": "x"}, "fields are not those"),
        ({"precision": "auto"}, "fields are not those"),
        ({"sha256": []}, "fields are not those"),
        ({"sha256": {}}, "SHA-256"),
    ],
)
def test_cards_that_cannot_be(copied: Path, change: dict[str, Any], message: str) -> None:
    card = json.loads((copied / "card.json").read_text())
    (copied / "card.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(CheckpointError, match=message):
        Index.read(copied)


def test_folders_that_are_no_index(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Index.read(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no card\.json"):
        Index.read(archive)
    for text in ("{", "[]", "\0"):
        (archive / "card.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"damaged|no index"):
            Index.read(archive)


def test_the_model_is_found_again_or_requested(
    archive: Path, model_folder: Path, model: AudioModel, tmp_path: Path
) -> None:
    where = tmp_path / "model"
    model.save(where)
    search.build(model, [str(archive)], tmp_path / "index", model_path=str(where))
    index = Index.read(tmp_path / "index")
    assert index.similar(archive / "3.wav", 1, include_self=True)[0].name == "3.wav"
    with pytest.raises(ConfigError, match="another model: not the same weights"):
        index.similar(archive / "3.wav", 1, make_model(1))
    where.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"cannot be loaded(.|\n)*--model MODEL"):
        Index.read(tmp_path / "index").model()
    make_model(1).save(where)
    with pytest.raises(ConfigError, match="another model: not the same weights"):
        Index.read(tmp_path / "index").model()
    index.check(AudioModel.load(model_folder))  # the same weights from elsewhere
    search.build(model, [str(archive)], tmp_path / "nameless")
    with pytest.raises(AsitError, match="has no path of its model"):
        Index.read(tmp_path / "nameless").model()
