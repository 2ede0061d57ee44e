"""The catalogue in memory and on disk: clips go in and come out, and a damaged file is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asit.data.catalogue import Catalogue, Clip
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
    longer = [*CLIPS[:-1], Clip(CLIPS[-1].path, 99.0, 16000, 1)]
    assert Catalogue.from_clips(longer).digest != made.digest
    renamed = [*CLIPS[:-1], Clip("/data/3/x.wav", CLIPS[-1].seconds, 16000, 1)]
    assert Catalogue.from_clips(renamed).digest != made.digest


def test_files_that_are_no_whole_catalogue(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    Catalogue.from_clips(CLIPS).write(path)
    lines = path.read_text().splitlines(keepends=True)

    def read(*new: str) -> None:
        path.write_text("".join(new))
        Catalogue.read(path, look=False)

    with pytest.raises(CatalogueError, match="not a catalogue"):
        read('{"path": "a.wav"}\n')
    with pytest.raises(CatalogueError, match="not a catalogue"):
        read("")
    with pytest.raises(CatalogueError, match="version 7"):
        read(lines[0].replace('"asit_catalogue":1', '"asit_catalogue":7'), *lines[1:])
    with pytest.raises(CatalogueError, match="holds 9 clips, its header says 10"):
        read(*lines[:-1])
    with pytest.raises(CatalogueError, match="line 5: damaged"):
        read(*lines[:4], lines[4][:20] + "\n", *lines[5:])
    with pytest.raises(CatalogueError, match="line 3: damaged"):
        read(*lines[:2], lines[2].replace('"seconds":', '"seconds":-'), *lines[3:])
    with pytest.raises(CatalogueError, match=r"there is no .*b\.jsonl(.|\n)*did you mean .*c\.jsonl"):
        Catalogue.read(tmp_path / "b.jsonl")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(min_size=1).filter(lambda b: not {0, ord("/")} & set(b) and b not in (b".", b"..")), max_size=8)
)
def test_any_file_name_survives(tmp_path_factory: pytest.TempPathFactory, names: list[bytes]) -> None:
    clips = [Clip("/r/" + os.fsdecode(name), 1.0, 8000, 1) for name in names]
    path = tmp_path_factory.getbasetemp() / "names.jsonl"
    Catalogue.from_clips(clips, root="/r").write(path)
    assert [c.path for c in Catalogue.read(path, look=False)] == [c.path for c in clips]


def test_columns_are_small() -> None:
    count = 20_000
    clips = [Clip(f"/data/{i:07d}.wav", 1.0, 16000, 1, "dog", "train") for i in range(count)]
    # 11 bytes of name, 8 of its end, 4 + 4 + 2 of numbers, 4 + 4 of codes.
    assert len(pickle.dumps(Catalogue.from_clips(clips))) < 40 * count
