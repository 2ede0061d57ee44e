"""Shards: written, listed, read back, moved, interrupted, damaged and missing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit.audio import files, ogg
from asit.data.catalogue import scan
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.shards import pack as shards
from asit.data.shards import tar_index
from asit.data.shards import tar_writer as members
from asit.data.shards.shard_plan import Encoding, PackSettings
from asit.errors import CatalogueError, ConfigError, StoreError, TrainingError
from asit.io import storage

RATE = 16000


@pytest.fixture
def sounds(tmp_path: Path) -> Catalogue:
    """Seven recordings in two folders, one of them stereo at another rate, and two parts of one file."""
    rng, clips = np.random.default_rng(0), []
    for i in range(7):
        rate, channels = (22050, 2) if i == 3 else (RATE, 1)
        path = tmp_path / "in" / f"c{i % 2}" / f"a.{i}.{'flac' if i == 4 else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, (rate // 4 + i, channels)), rate)
        info = files.probe(path)
        clips.append(Clip(str(path), info.seconds, rate, channels, f"c{i % 2}", "train", None, None, f"g{i}"))
    long = tmp_path / "in" / "long.wav"
    soundfile.write(long, rng.uniform(-0.5, 0.5, RATE), RATE)
    clips += [Clip(str(long), 0.25, RATE, 1, "c0", start=start) for start in (0.0, 0.5)]
    header = {"mean": -4.0, "std": 4.5, "task": "some"}
    return Catalogue.from_clips(clips, root=tmp_path / "in", header=header)


def waveform(clip: Clip) -> files.Wave:
    """Read a clip out of its shard."""
    assert clip.shard is not None
    return files.read(storage.read_range(clip.shard, clip.offset, clip.size), rate=RATE)


def pack(source: Catalogue, out: Path | str, **options: Any) -> shards.Packed:
    """Small shards, without further processes' noise."""
    calls = {name: options.pop(name) for name in ("resume", "overwrite", "progress") if name in options}
    return shards.pack(source, str(out), PackSettings(**{"clips": 4, **options}), **calls)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_originals_are_packed_and_read(sounds: Catalogue, tmp_path: Path) -> None:
    made = pack(sounds, tmp_path / "out")
    assert sorted(bytes_of(tmp_path / "out")) == ["index.jsonl", *(f"shard-00000{i}.tar" for i in range(3))]
    index = Catalogue.read(tmp_path / "out" / "index.jsonl")
    assert index.header["asit_catalogue"] == 3
    assert (index.header["mean"], index.header["std"], index.header["task"]) == (-4.0, 4.5, "some")
    assert index.root == str(tmp_path / "out")
    assert index.ids() == sounds.ids()
    assert [*index] == [*made.index]
    assert made.cut == 2
    for was, now in zip(sounds, index, strict=True):
        assert (now.label, now.split, now.group, now.start) == (was.label, was.split, was.group, 0.0)
        assert now.seconds == pytest.approx(was.seconds, abs=1e-6)
        assert now.shard is not None
        assert now.path.startswith(now.shard + "/")
        if was.path.endswith("long.wav"):
            part = files.read(was.path, start=was.start, seconds=was.seconds)
            np.testing.assert_allclose(waveform(now), part, atol=1 / 32768)
        else:
            assert storage.read_range(now.shard, now.offset, now.size) == Path(was.path).read_bytes()
    whole = Catalogue.from_clips([*sounds][:7], root=sounds.root)
    assert pack(whole, tmp_path / "whole").index.digest == whole.digest  # a run may be resumed with shards of its files
    assert index.digest != sounds.digest
    assert tar_index.check(str(tmp_path / "out")).header == index.header
    with pytest.raises(CatalogueError, match=r"index\.jsonl is the index of tar shards"):
        scan.build(tmp_path / "out", tmp_path / "out" / "index.jsonl")
    with pytest.raises(CatalogueError, match=r"shard-000000\.tar is a file(.|\n)*give the shards' folder"):
        tar_index.check(str(tmp_path / "out" / "shard-000000.tar"))


def test_tar_readers_find_keys_and_sidecars(sounds: Catalogue, tmp_path: Path) -> None:
    pack(sounds, tmp_path / "out", clips=9)
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        names = archive.getnames()
        assert names[:4] == ["c0/a_0.wav", "c0/a_0.json", "c1/a_1.wav", "c1/a_1.json"]
        assert names[-2:] == ["long@0_5.flac", "long@0_5.json"]
        assert {(member.mtime, member.uid, member.uname) for member in archive} == {(0, 0, "")}
        sidecar = json.load(archive.extractfile("c1/a_3.json") or io.BytesIO())
    assert sidecar["path"] == "c1/a.3.wav"
    assert (sidecar["rate"], sidecar["channels"], sidecar["label"], sidecar["group"]) == (22050, 2, "c1", "g3")


@pytest.mark.parametrize("encode", ["flac", "opus"])
def test_reencoded_audio(encode: Encoding, sounds: Catalogue, tmp_path: Path) -> None:
    index = pack(sounds, tmp_path / "out", encode=encode).index
    assert index.digest != sounds.digest
    for was, now in zip(sounds, index, strict=True):
        want = files.read(was.path, rate=RATE, start=was.start, seconds=was.seconds)
        got = waveform(now)
        assert (now.rate, now.channels, len(got)) == (RATE, 1, len(want))
        if encode == "flac":
            np.testing.assert_allclose(got, want, atol=1 / 32768)
    with pytest.raises(ConfigError, match="--encode opus at 22050 Hz"):
        pack(sounds, tmp_path / "other", encode="opus", rate=22050)


def test_the_bytes_do_not_depend_on_who_writes_or_when(sounds: Catalogue, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        pack(sounds, tmp_path / name, encode="opus", workers=workers, shuffle=1)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "three")
    index = Catalogue.read(tmp_path / "one" / "index.jsonl")
    assert index.ids() == sounds.ids()
    assert index.shards is not None
    assert (np.diff(index.shards.codes) < 0).any()  # shuffled into the shards, in order in the index


def test_opus_pages_keep_their_checksums() -> None:
    tone = np.sin(np.arange(RATE) / 9).astype(np.float32)
    first, second = (members.encoded(tone, RATE, ".opus") for _ in range(2))
    assert first == second
    other = ogg.renumbered(first, 77)
    assert other != first
    np.testing.assert_array_equal(files.read(other), files.read(first))  # a wrong checksum loses the page
    assert ogg.renumbered(other, 1) == first
    with pytest.raises(ValueError, match="no Ogg page at byte 0"):
        ogg.renumbered(b"RIFF" + bytes(40))


def test_moved_shards_and_shards_in_a_store(sounds: Catalogue, tmp_path: Path) -> None:
    pack(sounds, tmp_path / "out")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    moved = Catalogue.read(tmp_path / "moved" / "index.jsonl")
    stored = pack(sounds, "memory://set/a").index
    read = Catalogue.read("memory://set/a/index.jsonl")
    assert read.header == stored.header
    assert [clip.shard for clip in read][:1] == ["memory://set/a/shard-000000.tar"]
    for clip, other in zip(moved, read, strict=True):
        np.testing.assert_array_equal(waveform(clip), waveform(other))
    assert sorted(storage.list("memory://set/a")) == sorted(bytes_of(tmp_path / "moved"))
    tar_index.check("memory://set/a")
    read.write(tmp_path / "c.jsonl")  # elsewhere: it says where the shards are
    assert Catalogue.read(tmp_path / "c.jsonl")[0] == read[0]
    again = Catalogue.from_clips([*read])
    assert [*again] == [*read]
    packed = pack(read, tmp_path / "again")  # shards of shards
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    with pytest.raises(ConfigError, match="link holds the shards that are to be packed"):
        pack(moved, tmp_path / "link", overwrite=True)
    with pytest.raises(ConfigError, match="memory://set/a holds the shards that are to be packed"):
        pack(read, "memory://set/a", overwrite=True)
    assert packed.index.digest == read.digest


def test_recordings_that_cannot_be_read_are_left_out_and_named(sounds: Catalogue, tmp_path: Path) -> None:
    Path(sounds[2].path).write_bytes(b"none")
    Path(sounds[5].path).unlink()
    made = pack(sounds, tmp_path / "out", bad_files=0.5)
    assert made.index.header["skipped"] == {"missing": 1, "unreadable": 1}
    assert [name for name in sounds.ids() if name not in made.index.ids()] == ["c0/a.2.wav", "c1/a.5.wav"]
    named = [json.loads(line) for line in (tmp_path / "out" / "index.skipped.jsonl").read_text().splitlines()]
    assert [row["path"] for row in named] == ["c0/a.2.wav", "c1/a.5.wav"]
    with pytest.raises(CatalogueError, match=r"1 of 9 clips cannot be read, such as: .*a.2.wav"):
        pack(sounds, tmp_path / "strict", bad_files=0.0, clips=3)


def test_stopped_and_resumed(sounds: Catalogue, tmp_path: Path) -> None:
    pack(sounds, tmp_path / "whole", clips=2)

    def stop(done: int, _: int, __: int) -> None:
        if done and any((tmp_path / "out").glob("*.done.json")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"\d of 5 shards are written to .*out; continue with --resume"):
        pack(sounds, tmp_path / "out", clips=2, progress=stop)
    assert not (tmp_path / "out" / "index.jsonl").exists()
    (tmp_path / "out" / ".shard-000003.tar.1.tmp").write_bytes(b"of a killed process")
    with pytest.raises(ConfigError, match="out holds shards already"):
        pack(sounds, tmp_path / "out", clips=2)
    with pytest.raises(ConfigError, match="were begun with other settings: encode original, now flac"):
        pack(sounds, tmp_path / "out", clips=2, encode="flac", resume=True)
    made = pack(sounds, tmp_path / "out", clips=2, resume=True)
    assert made.kept >= 1
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    with pytest.raises(ConfigError, match="out is finished"):
        pack(sounds, tmp_path / "out", clips=2, resume=True)
    pack(sounds, tmp_path / "out", clips=9, overwrite=True)
    assert sorted(bytes_of(tmp_path / "out")) == ["index.jsonl", "shard-000000.tar"]
    (tmp_path / "out" / "index.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"holds 1 shards, such as shard-000000.tar, and no shards.plan.json"):
        pack(sounds, tmp_path / "out", resume=True)  # they may be another program's
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds files that are not shards: notes.txt"):
        pack(sounds, tmp_path / "out", overwrite=True)


def test_missing_short_and_damaged_shards_are_named(sounds: Catalogue, tmp_path: Path) -> None:
    index = pack(sounds, tmp_path / "out").index
    first, second, third = (tmp_path / "out" / f"shard-00000{i}.tar" for i in range(3))
    content = bytearray(first.read_bytes())
    content[600] ^= 1
    first.write_bytes(content)
    tar_index.verify_sizes(index)
    with pytest.raises(StoreError, match=r"1 of 3 shards in .* are damaged: shard-000000.tar"):
        tar_index.check(str(tmp_path / "out"))
    second.write_bytes(second.read_bytes()[:3000])
    third.unlink()
    with pytest.raises(StoreError, match=r"of 3 shards 1 missing: .*2.tar; 1 too short: .*1.tar \(3,000 of"):
        tar_index.verify_sizes(index)
    first.unlink()
    with pytest.raises(CatalogueError, match=r"lists .*shard-000000.tar, which does not exist"):
        Catalogue.read(tmp_path / "out" / "index.jsonl")


@pytest.mark.slow
def test_a_writer_killed_by_the_system(sounds: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(members, "encode_clip", killed)
    with pytest.raises(TrainingError, match=r"a process that wrote a shard was killed[\s\S]*fewer --workers"):
        pack(sounds, tmp_path / "out", workers=2)
    monkeypatch.undo()
    pack(sounds, tmp_path / "out", resume=True)
    pack(sounds, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_no_path_of_this_machine_goes_into_shards(sounds: Catalogue, tmp_path: Path) -> None:
    elsewhere = Catalogue.from_clips([*sounds], root=tmp_path / "lists")
    made = pack(elsewhere, tmp_path / "out")
    assert made.index.ids() == sounds.ids()
    assert all(str(tmp_path).encode() not in content for content in bytes_of(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.c.wav", "a/b_c"),
        ("x.wav@12.5", "x@12_5"),
        ("x.wav@12", "x@12"),
        ("/abs/../y.flac", "abs/_/y"),
        ("noext", "noext"),
        ("v1.2", "v1_2"),
        (".hid.wav", "_hid"),
    ],
)
def test_keys(name: str, key: str) -> None:
    assert members.stem_of(name) == key


def test_clips_of_one_key_stay_apart(tmp_path: Path) -> None:
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, np.full(4000, 0.1), RATE)
    source = Catalogue.from_clips([Clip(str(tmp_path / name), 0.25, RATE, 1) for name in ("a.wav", "a.flac")])
    pack(source, tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        assert archive.getnames() == ["a.wav", "a.json", "a~2.flac", "a~2.json"]


@pytest.mark.parametrize("change", [{"size": 0}, {"offset": -1}, {"offset": None}, {"size": "many"}])
def test_a_damaged_line_of_an_index_is_named(change: dict[str, Any], sounds: Catalogue, tmp_path: Path) -> None:
    pack(sounds, tmp_path / "out")
    path = tmp_path / "out" / "index.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | change)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CatalogueError, match=r"index.jsonl, line 4: damaged"):
        Catalogue.read(path)


def test_clips_in_shards_and_files_of_their_own_in_one_list(sounds: Catalogue, tmp_path: Path) -> None:
    index = pack(sounds, tmp_path / "out").index
    mixed = Catalogue.from_clips([sounds[0], index[1]])
    mixed.write(tmp_path / "c.jsonl")
    read = Catalogue.read(tmp_path / "c.jsonl")
    assert [*map(vars_of, (read[0], read[1]))] == [*map(vars_of, (sounds[0], index[1]))]
    assert read.shards is not None
    assert read.shards.codes.tolist() == [-1, 0]


def vars_of(clip: Clip) -> dict[str, Any]:
    return {**dataclasses.asdict(clip), "seconds": round(clip.seconds, 4)}
