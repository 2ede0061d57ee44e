"""Inputs of commands: what files, folders, patterns, lists and tar shards name, in which order, and what is refused."""

from __future__ import annotations

import io
import os
import tarfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asit.audio.stream import read_sound
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.inputs import Item, expand
from asit.data.catalogue.listing import list_files
from asit.errors import AsitError, AudioError, CatalogueError, ConfigError
from asit.io import storage


def wav(seed: int = 0) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.random.default_rng(seed).uniform(-0.1, 0.1, 800), 16000, format="WAV")
    return out.getvalue()


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(wav() if content is None else content)
    return path


def shard(path: Path, members: dict[str, bytes], **kinds: bytes) -> Path:
    """An uncompressed tar; `kinds`: further members of other types."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
        for name, kind in kinds.items():
            header = tarfile.TarInfo(f"{name}.wav")
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    return path


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("data/b.wav", "data/a.flac", "data/in/ä c.mp3", "data/notes.txt", "data/.hidden.wav", "other/b.wav"):
        put(tmp_path / name)
    return tmp_path


def names(*inputs: str) -> list[str]:
    return [item.name for item in expand(inputs)]


def test_folders_files_and_patterns_in_the_order_given(material: Path) -> None:
    assert names("data") == ["a.flac", "b.wav", "in/ä c.mp3"]
    assert [item.path for item in expand(["data/"])] == ["data/a.flac", "data/b.wav", "data/in/ä c.mp3"]
    assert names(str(material / "data")) == names("data")
    # Names of several folders must not meet.
    assert names("other", "data") == ["other/b.wav", "data/a.flac", "data/b.wav", "data/in/ä c.mp3"]
    assert names("other/b.wav", "data/notes.txt") == ["other/b.wav", "data/notes.txt"]
    assert names("data/*") == ["data/a.flac", "data/b.wav", "data/in/ä c.mp3"]
    assert names("data/**") == ["data/a.flac", "data/b.wav", "data/in/ä c.mp3"]
    assert names("**/*.wav") == ["data/b.wav", "other/b.wav"]
    assert names("data/[ab].*") == ["data/a.flac", "data/b.wav"]
    put(material / "data/[x].wav")
    assert names("data/[x].wav") == ["data/[x].wav"]


def test_catalogues_and_tables(material: Path) -> None:
    clips = [
        Clip(str(material / "data/b.wav"), 1.5, 16000, 1, label="dog", start=2.5),
        Clip(str(material / "data/b.wav"), 1.0, 16000, 1),
        Clip(str(material / "data/in/ä c.mp3"), 4.0, 16000, 1),
    ]
    Catalogue.from_clips(clips, root=material / "data").write(material / "lists.jsonl")
    found = expand(["lists.jsonl"])
    assert found == [
        Item("b.wav", str(material / "data/b.wav"), start=2.5, seconds=1.5, label="dog"),
        Item("b.wav", str(material / "data/b.wav"), seconds=1.0),
        Item("in/ä c.mp3", str(material / "data/in/ä c.mp3"), seconds=4.0),
    ]
    (material / "table.csv").write_text("path,label,start,end\ndata/b.wav,cat,1.5,2\nother/b.wav,,,\n")
    assert expand(["table.csv"]) == [
        Item("data/b.wav", str(material / "data/b.wav"), start=1.5, seconds=0.5, label="cat"),
        Item("other/b.wav", str(material / "other/b.wav")),
    ]


def test_a_shard_is_read_where_its_bytes_lie(material: Path) -> None:
    long = "deep/" * 40 + "x.wav"
    members = {"a.wav": wav(1), "a.json": b"{}", "sub/b.WAV": wav(2), long: wav(3), "._a.wav": b"fork"}
    shard(material / "s.tar", members, link=tarfile.SYMTYPE, pipe=tarfile.FIFOTYPE, device=tarfile.CHRTYPE)
    before = sorted(material.iterdir())
    found = expand(["s.tar"])
    assert [item.name for item in found] == ["s.tar/a.wav", "s.tar/sub/b.WAV", f"s.tar/{long}"]
    for item, seed in zip(found, (1, 2, 3), strict=True):
        assert item.sound() == wav(seed)
        assert len(read_sound(item.sound(), None, 16000)) == 800
    assert sorted(material.iterdir()) == before
    put(material / "shards/0.wav")
    shard(material / "shards/1.tar", {"a.wav": wav(1)})
    put(material / "shards/2.tar", b"nothing of the kind")
    found = expand(["shards"])
    assert [item.name for item in found] == ["0.wav", "1.tar/a.wav", "2.tar"]
    with pytest.raises(AudioError, match=r"2.tar: shards/2.tar is no tar file"):
        found[2].sound()


@pytest.mark.parametrize("name", ["../up.wav", "/etc/up.wav", "a/../../up.wav", "..\\up.wav", "C:/up.wav"])
def test_names_that_lead_out_of_a_shard_are_faults(material: Path, name: str) -> None:
    shard(material / "s.tar", {name: wav(), "good.wav": wav()})
    bad, good = expand(["s.tar"])
    assert good.fault is None
    with pytest.raises(AudioError, match="its name leads out of the tar"):
        bad.sound()


def test_shards_cut_off_shortened_and_damaged(material: Path) -> None:
    path = shard(material / "s.tar", {"a.wav": wav(), "b.wav": wav(), "c.wav": wav()})
    whole = path.read_bytes()
    path.write_bytes(whole[: 2 * (512 + 2048) + 512 + 100])
    found = expand(["s.tar"])
    assert [(item.name, item.fault is None) for item in found][:3] == [
        *(("s.tar/a.wav", True), ("s.tar/b.wav", True), ("s.tar/c.wav", False))
    ]
    path.write_bytes(whole[:1000])
    with pytest.raises(AudioError, match="is shorter now"):
        found[0].sound()
    path.write_bytes(whole[:2560] + b"\xff" * 512 + whole[3072:])
    assert [item.name for item in expand(["s.tar"])] == ["s.tar/a.wav", "s.tar"]
    assert expand(["s.tar"])[1].fault == "damaged at byte 2560: no header there"
    path.unlink()
    with pytest.raises(AudioError, match="No such file"):
        found[0].sound()


@pytest.mark.parametrize(
    ("inputs", "kind", "text"),
    [
        ([], ConfigError, "no input"),
        ([""], CatalogueError, "an input is ''"),
        (["a\0b"], CatalogueError, "an input is"),
        (["data/c.wav"], CatalogueError, "there is no data/c.wav"),
        (["dat"], CatalogueError, "did you mean data?"),
        (["data/*.ogg"], CatalogueError, "nothing matches data/*.ogg"),
        (["data/*.txt"], CatalogueError, "the pattern data/*.txt holds no audio; 1 files: 1 .txt"),
        (["empty"], CatalogueError, "the folder empty is empty"),
        (["texts"], CatalogueError, "the folder texts holds no audio; 2 files: 2 .txt"),
        (["none.tar"], CatalogueError, "the tar file none.tar holds no audio; 1 files: 1 .json"),
        (["bad.tar"], CatalogueError, "bad.tar is no tar file"),
        (["packed.tar"], CatalogueError, "packed.tar is no tar file: "),
        (["packed.tar.gz"], CatalogueError, "packed.tar.gz is compressed"),
        (["data/a.flac", "data/b.wav", "data/a.flac"], ConfigError, "1 input is given twice: data/a.flac"),
        (["data", "data/b.wav"], ConfigError, "1 input is given twice: data/b.wav"),
        (["data/b.wav", "./data/b.wav"], ConfigError, "2 inputs are the same: data/b.wav, ./data/b.wav"),
        (["twice.tar"], ConfigError, "1 input is given twice: twice.tar/a.wav"),
    ],
)
def test_what_matches_nothing_or_twice_is_refused(
    material: Path, inputs: list[str], kind: type[AsitError], text: str
) -> None:
    (material / "empty").mkdir()
    put(material / "texts/a.txt")
    put(material / "texts/b.txt")
    shard(material / "none.tar", {"a.json": b"{}"})
    put(material / "bad.tar", b"x" * 2000)
    with tarfile.open(material / "packed.tar.gz", "w:gz") as archive:
        archive.add(material / "data")
    put(material / "packed.tar", (material / "packed.tar.gz").read_bytes())
    with tarfile.open(material / "twice.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.wav"))
    with pytest.raises(kind) as caught:
        expand(inputs)
    assert text in str(caught.value)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_is_shut_is_a_fault(material: Path) -> None:
    shut = material / "data" / "shut"
    shut.mkdir(mode=0)
    try:
        assert [item.name for item in expand(["data"]) if item.fault] == ["shut"]
    finally:
        shut.chmod(0o700)


def test_links_are_followed_once_and_a_broken_one_is_an_item(material: Path) -> None:
    (material / "data/in/again").symlink_to(material / "data")
    (material / "data/gone.wav").symlink_to(material / "nowhere.wav")
    for name in ("self", "self.wav", "self.tar"):
        (material / "data" / name).symlink_to(name)
    found = expand(["data"])
    assert [item.name for item in found] == ["a.flac", "b.wav", "gone.wav", "in/ä c.mp3", "self.tar", "self.wav"]
    assert found[4].fault is not None
    with pytest.raises(AudioError, match=r"self\.wav"):
        read_sound(found[5].sound(), None, 16000)
    assert names("data/gone.wav") == ["data/gone.wav"]
    assert [*list_files(material / "data").names] == ["a.flac", "b.wav", "gone.wav", "in/ä c.mp3", "self.wav"]
    assert storage.list(str(material / "data"))["self.tar"] is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_pipes_among_recordings_are_faults(material: Path) -> None:
    os.mkfifo(material / "data/pipe.wav")
    os.mkfifo(material / "data/pipe.tar")
    (material / "data/linked.wav").symlink_to("pipe.wav")
    (material / "data/endless.wav").symlink_to("/dev/zero")
    os.mkfifo(material / "data/index.jsonl")
    for given in ("data", "data/*"):
        found = {Path(item.path).name: item.fault for item in expand([given]) if item.fault}
        assert found == {
            "endless.wav": "it is a device, not a regular file",
            **dict.fromkeys(("linked.wav", "pipe.tar", "pipe.wav"), "it is a pipe, not a regular file"),
        }


def test_patterns_enter_each_folder_once(material: Path) -> None:
    """With glob a loop of links gives each file 41 times, and two loops never end."""
    (material / "data/loop").symlink_to(".")
    (material / "data/in/up").symlink_to("..")
    (material / "data/in/other").symlink_to("../../other")
    (material / "data/in/self").symlink_to("self")
    everything = ["data/a.flac", "data/b.wav", "data/in/other/b.wav", "data/in/ä c.mp3"]
    for pattern in ("data/**", "data/**/*", "data/**/**/*"):
        assert sorted(names(pattern)) == everything
    assert names("**/*.wav") == ["data/b.wav", "data/in/other/b.wav"]
    assert names("*/**/*.wav") == ["data/b.wav", "data/in/other/b.wav"]
    assert names("data/*/b.wav") == ["data/loop/b.wav"]
    assert names(f"{material}/data/**/in/*.mp3") == [f"{material}/data/in/ä c.mp3"]
    with pytest.raises(ConfigError, match=r"2 inputs are the same: data/b\.wav, data/loop/b\.wav"):
        expand(["data/b.wav", "data/loop/b.wav"])


def test_a_folder_of_compressed_tars_says_so(material: Path) -> None:
    put(material / "packed/a.tar.gz")
    put(material / "packed/b.TGZ")
    for call in (lambda: expand(["packed"]), lambda: list_files(material / "packed")):
        with pytest.raises(CatalogueError, match=r"2 files: 1 .tar.gz, 1 .tgz(.|\n)*unpack the .tar.gz, .tgz files"):
            call()


def test_names_of_any_unicode_form_and_not_utf8(material: Path) -> None:
    for form in ("NFC", "NFD"):
        (item,) = expand([unicodedata.normalize(form, "data/in/ä c.mp3")])
        assert Path(item.path).exists()
    put(material / "odd" / os.fsdecode(b"\xff.wav"))
    (item,) = expand(["odd"])
    assert len(read_sound(item.sound(), None, 16000)) == 800


def test_many_files_take_no_time_each(tmp_path: Path) -> None:
    for number in range(2000):
        put(tmp_path / str(number % 10) / f"{number}.wav", b"")
    began = time.process_time()
    assert len(expand([str(tmp_path)])) == 2000
    assert time.process_time() - began < 0.5
