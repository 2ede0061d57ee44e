"""Catalogues in memory and on disk: round trips, and damaged files are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.columns import identifier, normal
from asit.errors import CatalogueError

CLIPS = [
    Clip(
        f"/data/{i // 3}/{i}.wav", 1.1 * (i + 1), 16000 + i, 1 + i % 2, "dog" if i % 2 else None, "train" if i else None
    )
    for i in range(10)
]


def test_clips_go_in_and_come_out(tmp_path: Path) -> None:
    made = Catalogue.from_clips(CLIPS, header={"mean": -4.0, "std": 4.0})
    assert made.root == "/data"
    assert len(made) == 10
    for clip, out in zip(CLIPS, made, strict=True):
        assert out.seconds == pytest.approx(clip.seconds, rel=1e-6)
        assert (out.path, out.rate, out.channels, out.label, out.split) == (
            *(clip.path, clip.rate, clip.channels, clip.label, clip.split),
        )
    assert made[-1] == made[9]
    assert made[np.int64(2)].path == CLIPS[2].path
    with pytest.raises(IndexError):
        made[10]
    made.write(tmp_path / "c.jsonl")
    read = Catalogue.read(tmp_path / "c.jsonl", look=False)
    assert [*read] == [*made]
    assert read.header == made.header
    assert read.digest == made.digest
    read.write(tmp_path / "d.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()
    again = pickle.loads(pickle.dumps(read))
    assert [*again] == [*made]


def test_subset_by_places_and_by_booleans() -> None:
    made = Catalogue.from_clips(CLIPS, header={"mean": -4.0})
    part = made.subset([7, 0, -1])
    assert [*part] == [made[7], made[0], made[9]]
    assert part.header["clips"] == 3
    assert part.header["mean"] == -4.0
    assert [*made.subset(made.labels == "dog")] == [clip for clip in made if clip.label == "dog"]
    assert len(made.subset([])) == 0
    with pytest.raises(IndexError):
        made.subset([10])


def test_digest_is_of_relative_paths_lengths_and_order() -> None:
    made = Catalogue.from_clips(CLIPS)
    moved = [Clip(c.path.replace("/data", "/else/where"), c.seconds, 1, 1) for c in CLIPS]
    assert Catalogue.from_clips(moved).digest == made.digest
    assert made.subset(np.arange(10)[::-1]).digest != made.digest
    assert made.subset(np.arange(9)).digest != made.digest
    for other in (Clip(CLIPS[-1].path, 99.0, 16000, 1), Clip("/data/3/x.wav", CLIPS[-1].seconds, 16000, 1)):
        assert Catalogue.from_clips([*CLIPS[:-1], other]).digest != made.digest


def test_files_that_are_no_whole_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    Catalogue.from_clips([*CLIPS[:9], dataclasses.replace(CLIPS[9], start=2.0)]).write(path)
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    for new, message in [
        ('{"path": "a.wav"}\n', "not a catalogue"),
        ("", "not a catalogue"),
        ("[" * 100_000, "not a catalogue"),
        (whole.replace('"asit_catalogue":2', '"asit_catalogue":7'), "version 7"),
        ("".join(lines[:-1]), "holds 9 clips, its header says 10"),
        (whole.replace(lines[4], lines[4][:20] + "\n"), "line 5: damaged"),
        (whole.replace(lines[2], lines[2].replace('"seconds":', '"seconds":-')), "line 3: damaged"),
        (whole.replace('"start":2.0', '"start":-2.0'), "line 11: damaged"),
        (whole.replace('"clips":10', '"clips":11') + lines[4], r"lists 1 clips twice: .*\.wav"),
    ]:
        path.write_text(new)
        with pytest.raises(CatalogueError, match=message):
            Catalogue.read(path, look=False)
    with pytest.raises(CatalogueError, match=r"there is no .*b\.jsonl(.|\n)*did you mean .*c\.jsonl"):
        Catalogue.read(tmp_path / "b.jsonl")


def test_columns_are_small() -> None:
    count = 20_000
    clips = [Clip(f"/data/{i:07d}.wav", 1.0, 16000, 1, "dog", "train") for i in range(count)]
    # 11 bytes of name, 8 of its end, 4 + 4 + 2 of numbers, 4 + 4 of codes.
    assert len(pickle.dumps(Catalogue.from_clips(clips))) < 40 * count


NAME = st.binary(min_size=1).filter(lambda name: not {0, ord("/")} & set(name) and name not in (b".", b".."))
TEXT = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).map(identifier)
CLIP = st.builds(
    Clip,
    NAME.map(lambda name: "/r/" + os.fsdecode(name)),
    st.floats(0.5, 40_000, width=32),
    st.integers(1, 200_000),
    st.integers(1, 64),
    TEXT.map(lambda text: normal("label", text)),
    TEXT,
    st.none() | st.binary(min_size=32, max_size=32).filter(any).map(bytes.hex),
    TEXT,
    TEXT,
    st.just(0.0) | st.floats(0, 40_000, width=32),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(CLIP, max_size=6, unique_by=lambda clip: clip.path), st.randoms(use_true_random=False))
def test_every_field_survives(tmp_path_factory: pytest.TempPathFactory, clips: list[Clip], draw: random.Random) -> None:
    path = tmp_path_factory.getbasetemp() / "fields.jsonl"
    made = Catalogue.from_clips(clips, root="/r")
    made.write(path)
    read = Catalogue.read(path, look=False)
    assert [*read] == [*made] == clips
    assert read.digest == made.digest
    assert list(read.texts("fold")) == [clip.fold for clip in clips]
    assert list(read.texts("group")) == [clip.group for clip in clips]
    assert read.starts.tolist() == [clip.start for clip in clips]
    order = draw.sample(range(len(clips)), len(clips))
    assert [*read.subset(order)] == [clips[i] for i in order]


def test_a_catalogue_without_parts_folds_and_groups_is_as_older_ones_are(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    made = Catalogue.from_clips(CLIPS)
    made.write(path)
    header, first, *_ = map(json.loads, path.read_text().splitlines())
    assert header["asit_catalogue"] == 1
    assert set(first) == {"path", "seconds", "rate", "channels"}
    names = [f"{i // 3}/{i}.wav".encode() for i in range(10)]
    parts = [np.cumsum([*map(len, names)]).astype("<i8").tobytes(), *names, made.seconds.astype("<f4").tobytes()]
    assert made.digest == hashlib.sha256(b"".join(parts)).hexdigest()
    for more in ({"start": 1.5}, {"fold": "1"}, {"group": "ann"}):
        newer = Catalogue.from_clips([*CLIPS[:-1], dataclasses.replace(CLIPS[-1], **more)])
        newer.write(path)
        assert json.loads(path.read_text().splitlines()[0])["asit_catalogue"] == 2
        assert (newer.digest == made.digest) == ("start" not in more)


def test_ids_are_relative_and_name_the_start_of_a_part() -> None:
    made = Catalogue.from_clips([*CLIPS[:2], Clip("/data/0/0.wav", 1.0, 16000, 1, start=30.1)], root="/data")
    assert made.ids() == ["0/0.wav", "0/1.wav", "0/0.wav@30.1"]
    assert made.ids([2, 0]) == ["0/0.wav@30.1", "0/0.wav"]
    assert made.subset([0, 1]).ids() == ["0/0.wav", "0/1.wav"]
