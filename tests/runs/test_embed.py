"""asit embed: what is in the files, in which order, whatever stops it, whoever shares the work, and what is refused."""

from __future__ import annotations

import errno
import json
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit import cli, runtime
from asit.audio import files
from asit.audio.fbank import FrontEnd
from asit.audio.stream import open_sound
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue.inputs import Item, expand
from asit.errors import AsitError, AudioError, CatalogueError, CheckpointError, ConfigError
from asit.infer import embed_blocks
from asit.infer.embed_files import OutputSettings, Summary, embed_files, failures_of
from asit.infer.embed_rows import EmbedSettings
from asit.model.audio_model import AudioModel
from asit.model.inference import batching
from asit.model.inference.batching import Done, Result, run_recordings
from asit.model.inference.embedding import WindowEmbedder
from asit.model.vit import Encoder

FRAMES = 48
TINY = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
SECONDS = (0.3, 0.51, 2.0, 0.05, 0.6, 9.0, 0.52, 0.3, 0.31, 1.0)
"""Lengths of the recordings: within the view of 0.48 s, somewhat above it, and many windows long."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> AudioModel:
    encoder = Encoder(TINY, FRAMES, 32)
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    front_end = FrontEnd(FrontEndSettings(mels=32, mean=-6.0, std=3.0))
    model = AudioModel(encoder, front_end)
    model.save(tmp_path_factory.mktemp("model") / "model")
    return model


@pytest.fixture
def saved(model: AudioModel, tmp_path: Path) -> str:
    model.save(tmp_path / "model")
    return str(tmp_path / "model")


def write(path: Path, seconds: float, seed: int, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = np.random.default_rng(seed).standard_normal((round(seconds * rate), 1)).cumsum(0)
    soundfile.write(path, 0.3 * np.sin(x / 5), rate)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i, seconds in enumerate(SECONDS):
        write(folder / f"{i:02d}.flac", seconds, i, 16000 if i % 2 else 22050)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three recordings a block, in float32."""
    monkeypatch.setattr(embed_blocks, "MOST_FILES", 3)
    monkeypatch.setattr(runtime, "best_precision", lambda device: runtime.Precision("float32", "for the test"))
    monkeypatch.setattr(runtime, "_product_seconds", lambda dtype: 1.0)


def go(model: AudioModel, inputs: Any, out: Path, settings: EmbedSettings | None = None, **how: Any) -> Summary:
    settings = settings or EmbedSettings(batch=4)
    items = expand([str(inputs)]) if isinstance(inputs, str | Path) else inputs
    threads = how.pop("threads", 2)
    summary = embed_files(model, items, out, settings, OutputSettings(**how), threads=threads)
    assert summary is not None
    return summary


def vectors_of(path: Path) -> np.ndarray:
    found: np.ndarray = np.load(path)["vectors"]
    return found


def table_of(path: Path) -> tuple[Any, np.ndarray]:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (the extra parquet)")
    table = parquet.read_table(path)
    return table, table["vector"].combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)


@pytest.mark.parametrize("pooling", ["mean", "class", "class+mean"])
@pytest.mark.parametrize("suffix", ["parquet", "npz", "csv"])
def test_a_vector_a_file_as_the_model_gives_it(
    model: AudioModel, clips: Path, tmp_path: Path, pooling: Any, suffix: str
) -> None:
    out = tmp_path / f"emb.{suffix}"
    summary = go(model, clips, out, EmbedSettings(pooling=pooling, layer=0, batch=4))
    width = 64 if pooling == "class+mean" else 32
    assert (summary.files, summary.rows, summary.width, summary.failures) == (10, 10, width, [])
    expected = []
    for path in sorted(clips.iterdir()):
        found = model.embed(path, layer=0)
        expected.append(
            torch.cat(
                {"mean": [found.clip], "class": [found.class_token]}.get(pooling, [found.class_token, found.clip])
            )
        )
    names = [f"{i:02d}.flac" for i in range(10)]
    if suffix == "parquet":
        table, vectors = table_of(out)
        assert table["path"].to_pylist() == names
        assert table["seconds"].to_pylist() == pytest.approx(SECONDS, abs=1e-4)
        assert table["start"].to_pylist() == [0.0] * 10
        about = json.loads(table.schema.metadata[b"asit"])
        assert (about["pooling"], about["layer"], about["precision"], about["count"]) == (pooling, 0, "float32", 10)
        assert len(about["model"]) == 64
    elif suffix == "npz":
        file = np.load(out)
        assert sorted(file) == ["about", "paths", "seconds", "starts", "vectors"]
        assert file["paths"].tolist() == names
        assert file["seconds"] == pytest.approx(SECONDS, abs=1e-4)
        vectors = file["vectors"]
    else:
        lines = [line.split(",") for line in out.read_text().splitlines()]
        assert lines[0] == ["path", "start", "seconds", *(f"v{i}" for i in range(width))]
        assert [line[0] for line in lines[1:]] == names
        vectors = np.array([line[3:] for line in lines[1:]], np.float32)
    np.testing.assert_allclose(vectors, torch.stack(expected).numpy(), atol=2e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]


@pytest.mark.parametrize(("window", "hop"), [(0.4, None), (0.4, 0.15), (3.0, 3.0)])
def test_a_vector_a_window_with_its_start_and_end(
    model: AudioModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: float, hop: float | None
) -> None:
    monkeypatch.setattr(embed_blocks, "_PIECE", 700)  # five vectors: pieces end within recordings
    (tmp_path / "list.csv").write_text(
        "path,start,end\n" + "".join(f"{clips / '05.flac'},{start},{end}\n" for start, end in ((0, 9), (1.5, 4)))
    )
    expected = []
    for begin, end in ((0.0, 9.0), (1.5, 4.0)):
        wave = files.read(clips / "05.flac", rate=16000, start=begin, seconds=end - begin)
        at = begin
        while True:
            last = at + window >= end - 1e-3
            start = max(begin, end - window) if last else at
            part = wave[round((start - begin) * 16000) :][: round(window * 16000)]
            expected.append((start, min(start + window, end), model.embed(part).clip.numpy()))
            if last:
                break
            at += hop or window
    for name in ("emb.parquet", "emb.csv", "emb.npz"):
        settings = EmbedSettings(window=window, hop=hop, batch=4)
        summary = go(model, tmp_path / "list.csv", tmp_path / name, settings)
        assert (summary.files, summary.rows) == (2, len(expected))
    table, vectors = table_of(tmp_path / "emb.parquet")
    assert table.column_names == ["path", "start", "end", "vector"]
    npz = np.load(tmp_path / "emb.npz")
    assert sorted(npz) == ["about", "ends", "paths", "starts", "vectors"]
    lines = [line.split(",") for line in (tmp_path / "emb.csv").read_text().splitlines()]
    assert lines[0][:4] == ["path", "start", "end", "v0"]
    rows = np.array([line[1:] for line in lines[1:]], np.float64)
    for starts, ends, found in (
        (table["start"].to_numpy(), table["end"].to_numpy(), vectors),
        (npz["starts"], npz["ends"], npz["vectors"]),
        (rows[:, 0], rows[:, 1], rows[:, 2:]),
    ):
        np.testing.assert_allclose(starts, [start for start, _, _ in expected], atol=1e-4)
        np.testing.assert_allclose(ends, [end for _, end, _ in expected], atol=1e-4)
        np.testing.assert_allclose(found, [vector for *_, vector in expected], atol=2e-5)
    assert table["path"].to_pylist() == npz["paths"].tolist() == [line[0] for line in lines[1:]]


@pytest.mark.parametrize("hop", [None, 0.02])
@pytest.mark.parametrize("level", ["frames", "patches"])
def test_many_rows_a_file_as_the_model_gives_them(
    model: AudioModel, clips: Path, tmp_path: Path, level: Any, hop: float | None
) -> None:
    for suffix in ("parquet", "npz"):
        go(model, clips, tmp_path / f"emb.{suffix}", EmbedSettings(level=level, hop=hop, batch=4))
    file = np.load(tmp_path / "emb.npz")
    table, vectors = table_of(tmp_path / "emb.parquet")
    np.testing.assert_array_equal(vectors, file["vectors"])
    np.testing.assert_array_equal(table["time"].to_numpy(), file["times"])
    names = np.array(table["path"].to_pylist())
    bands = 4 if level == "patches" else 1
    for i, path in enumerate(sorted(clips.iterdir())):
        found = model.embed(path, hop=hop)
        rows = slice(file["offsets"][i], file["offsets"][i + 1])
        expected = found.frames if level == "frames" else found.patches
        assert expected is not None
        np.testing.assert_allclose(vectors[rows], expected.numpy(), atol=2e-5)
        np.testing.assert_allclose(file["times"][rows], np.repeat(found.times.numpy(), bands), atol=1e-5)
        assert set(names[rows]) == {path.name}
        if level == "patches":
            assert table["band"].to_pylist()[rows] == [0, 1, 2, 3] * found.grid[0]
            assert file["bands"][rows].tolist() == [0, 1, 2, 3] * found.grid[0]


def test_parts_of_files_and_members_of_shards(model: AudioModel, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,start,end\n{clips}/05.flac,2.5,3.5\n{clips}/05.flac,,\n")
    summary = go(model, tmp_path / "list.csv", tmp_path / "a.npz", EmbedSettings(level="frames"))
    file = np.load(tmp_path / "a.npz")
    assert file["starts"].tolist() == [2.5, 0.0]
    assert file["seconds"] == pytest.approx([1.0, 9.0], abs=1e-3)
    with open_sound(str(clips / "05.flac"), None, 16000, start=2.5, seconds=1.0) as part:
        found = model.embed(part)
    count = found.grid[0]
    assert summary.rows == count + file["offsets"][2] - file["offsets"][1]
    np.testing.assert_allclose(file["vectors"][:count], found.frames.numpy(), atol=2e-5)
    np.testing.assert_allclose(file["times"][:count], found.times.numpy() + 2.5, atol=1e-5)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for path in sorted(clips.iterdir()):
            archive.add(path, path.name)
        archive.addfile(tarfile.TarInfo("../up.wav"))
    summary = go(model, tmp_path / "s.tar", tmp_path / "b.npz")
    go(model, clips, tmp_path / "c.npz")
    np.testing.assert_array_equal(vectors_of(tmp_path / "b.npz"), vectors_of(tmp_path / "c.npz"))
    assert [name for name, _ in summary.failures] == [f"{tmp_path}/s.tar/../up.wav"]


@pytest.mark.parametrize("level", ["clip", "frames"])
def test_what_cannot_be_read_is_left_out_and_listed(model: AudioModel, clips: Path, tmp_path: Path, level: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in clips.iterdir():
        (folder / path.name).symlink_to(path)
    long = write(folder / "055.flac", 20, 1)
    content = bytearray(long.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # found out after half of it
    long.write_bytes(content)
    (folder / "03a.wav").write_text("no sound")
    (folder / "zz.mp3").symlink_to("nowhere")
    out = tmp_path / "emb.npz"
    summary = go(model, folder, out, EmbedSettings(level=level, batch=2))
    go(model, clips, tmp_path / "clean.npz", EmbedSettings(level=level, batch=2))
    assert (summary.files, [name for name, _ in summary.failures]) == (10, ["03a.wav", "055.flac", "zz.mp3"])
    found, clean = np.load(out), np.load(tmp_path / "clean.npz")
    for name in ("paths", "seconds", "starts"):
        np.testing.assert_array_equal(found[name], clean[name])
    np.testing.assert_allclose(found["vectors"], clean["vectors"], atol=2e-5)
    listed = [json.loads(line) for line in failures_of(out).read_text().splitlines()]
    assert [row["path"] for row in listed] == ["03a.wav", "055.flac", "zz.mp3"]
    assert "begins with the bytes" in listed[0]["reason"]
    assert "cannot be decoded after" in listed[1]["reason"] or "truncated" in listed[1]["reason"]
    assert "does not exist" in listed[2]["reason"]
    with pytest.raises(CatalogueError, match=r"of 13 inputs cannot be read[\s\S]*at most 1 \(--bad-files 0.1\)"):
        go(model, folder, tmp_path / "b.npz", bad_files=0.1)
    assert not (tmp_path / "b.npz").exists()
    go(model, clips, out, EmbedSettings(level=level, batch=2), overwrite=True)
    assert not failures_of(out).exists()


def test_the_result_does_not_depend_on_threads(model: AudioModel, clips: Path, tmp_path: Path) -> None:
    for threads in (1, 4):
        for suffix in ("npz", "parquet"):
            go(model, clips, tmp_path / f"{threads}.{suffix}", EmbedSettings(level="patches", batch=2), threads=threads)
    for suffix in ("npz", "parquet"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"4.{suffix}").read_bytes()


def test_long_windows_go_through_a_cpu_in_small_batches(
    model: AudioModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: Any
) -> None:
    sizes = stopping(-1, ValueError())
    go(model, clips, tmp_path / "all.npz", EmbedSettings(level="frames", batch=9))
    assert max(sizes) == 9
    sizes.clear()
    monkeypatch.setattr(batching, "_PATCHES", 50)  # for each of two threads: four windows of 6 columns x 4 bands
    go(model, clips, tmp_path / "few.npz", EmbedSettings(level="frames", batch=9))
    assert max(sizes) in (4, 5)
    np.testing.assert_allclose(vectors_of(tmp_path / "few.npz"), vectors_of(tmp_path / "all.npz"), atol=2e-5)
    sizes.clear()
    monkeypatch.setattr(batching, "_PATCHES", 1)
    go(model, clips, tmp_path / "one.npz", EmbedSettings(level="frames", batch=9))
    assert set(sizes) == {1}


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[int]]:
    """Let the encoder's so-manieth call end in an error; gives the list that grows by the windows of each call."""

    def arrange(calls: int, error: BaseException) -> list[int]:
        run, sizes = WindowEmbedder.run, list[int]()

        def counted(self: WindowEmbedder, windows: Any) -> Any:
            sizes.append(len(windows))
            if len(sizes) == calls:
                raise error
            return run(self, windows)

        monkeypatch.setattr(WindowEmbedder, "run", counted)
        return sizes

    return arrange


@pytest.mark.parametrize("level", ["clip", "frames"])
def test_a_stopped_call_resumes_to_the_same_file(
    model: AudioModel, clips: Path, tmp_path: Path, stopping: Any, level: Any
) -> None:
    settings = EmbedSettings(level=level, batch=2)
    go(model, clips, tmp_path / "whole.npz", settings)
    sizes = stopping(-1, ValueError())
    go(model, clips, tmp_path / "counted.npz", settings)
    total, before = len(sizes), threading.active_count()
    sizes = stopping(total - 1, KeyboardInterrupt())
    out = tmp_path / "emb.npz"
    with pytest.raises(
        KeyboardInterrupt, match=r"9 of 10 inputs are kept in .*emb.npz.parts; the same command resumes"
    ):
        go(model, clips, out, settings)
    assert threading.active_count() == before
    assert not out.exists()
    folder = tmp_path / "emb.npz.parts"
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "000000.json",
        "000001.json",
        "000002.json",
        "plan.json",
    ]
    (folder / "000001.json").write_text("{")  # cut short
    vectors = folder / "000002.vectors"
    vectors.write_bytes(vectors.read_bytes()[:-4])
    (folder / ".1.npz.tmp").write_text("the beginning of a file whose writer was killed")
    sizes = stopping(-1, ValueError())
    go(model, clips, out, settings)
    assert 0 < len(sizes) < total
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not folder.exists()


def test_blocks_of_another_call_are_refused(model: AudioModel, clips: Path, tmp_path: Path, stopping: Any) -> None:
    out = tmp_path / "emb.npz"
    stopping(4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(model, clips, out)
    parts = sorted((tmp_path / "emb.npz.parts").iterdir())
    other = AudioModel(Encoder(TINY, FRAMES, 32), model.front_end)
    with pytest.raises(ConfigError, match=r"holds the beginning of another call:\n    model: .* then, .* now\n"):
        go(other, clips, out)
    with pytest.raises(ConfigError, match=r"    layer: None then, 0 now\n[\s\S]*--overwrite to start from scratch"):
        go(model, clips, out, EmbedSettings(batch=4, layer=0))
    with pytest.raises(ConfigError, match="precision: float32 then, bf16 now"):
        go(model, clips, out, EmbedSettings(batch=4, precision="bf16"))
    changed = [Item(item.name, item.path, start=0.01) for item in expand([str(clips)])]
    with pytest.raises(ConfigError, match="inputs: "):
        go(model, changed, out)
    assert sorted((tmp_path / "emb.npz.parts").iterdir()) == parts
    summary = go(model, clips, out, EmbedSettings(batch=4, layer=0), overwrite=True)
    assert summary.rows == 10
    go(model, clips, tmp_path / "clean.npz", EmbedSettings(batch=4, layer=0))
    np.testing.assert_array_equal(vectors_of(out), vectors_of(tmp_path / "clean.npz"))
    foreign = tmp_path / "b.npz.parts"
    foreign.mkdir()
    (foreign / "thesis.json").write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds other files"):
            go(model, clips, tmp_path / "b.npz", overwrite=overwrite)
    assert (foreign / "thesis.json").exists()


def test_shards_follow_one_another(model: AudioModel, clips: Path, tmp_path: Path) -> None:
    go(model, clips, tmp_path / "whole.npz")
    for i in range(4):
        summary = go(model, clips, tmp_path / "emb.npz", shard=(i, 4))
        assert summary.out.name == f"emb-0000{i}-of-00004.npz"
    files = [np.load(tmp_path / f"emb-0000{i}-of-00004.npz") for i in range(4)]
    whole = np.load(tmp_path / "whole.npz")
    for name in ("paths", "seconds"):
        np.testing.assert_array_equal(np.concatenate([file[name] for file in files]), whole[name])
    np.testing.assert_allclose(np.concatenate([file["vectors"] for file in files]), whole["vectors"], atol=2e-5)
    with pytest.raises(ConfigError, match="shard 0 of 11 of 10 inputs is empty"):
        go(model, clips, tmp_path / "emb.npz", shard=(0, 11))


def test_two_processes_give_the_file_of_one(model: AudioModel, clips: Path, tmp_path: Path, ranks: Any) -> None:
    settings = EmbedSettings(level="frames", batch=2)
    torch.set_num_threads(1)
    go(model, clips, tmp_path / "one.npz", settings, threads=1)

    def body(out: str, bad: float, source: Path) -> int:
        with runtime.world("cpu", 1) as world:
            items = expand([str(source)])
            try:
                summary = embed_files(
                    model, items, tmp_path / out, settings, OutputSettings(bad_files=bad), threads=1, world=world
                )
            except AsitError as error:
                print(error)
                return 2
            assert (summary is None) == (not world.main)
        return 0

    ended = ranks(2, lambda: body("two.npz", 1.0, clips))
    assert [e.code for e in ended] == [0, 0], ended
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert not (tmp_path / "two.npz.parts").exists()
    # An error of one process is every process' error.
    ended = ranks(2, lambda: body("two.npz", 1.0, clips))
    assert [e.code for e in ended] == [2, 2], ended
    assert all("two.npz already exists" in e.said for e in ended)


def test_refusals_leave_nothing(
    model: AudioModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, settings, text in [
        ("emb.pkl", EmbedSettings(), r"--out .*emb.pkl\n  expected: a name that ends in .parquet, .npz, .csv"),
        ("emb.csv", EmbedSettings(level="frames"), "--level frames"),
        ("there.npz", EmbedSettings(), "there.npz already exists"),
        ("emb.npz", EmbedSettings(hop=0.03), "a hop of 0.03 s"),
        ("emb.npz", EmbedSettings(hop=0.0), "a hop of 0 s"),
        ("emb.npz", EmbedSettings(window=0.001), "windows of 0.001 s"),
        ("emb.npz", EmbedSettings(layer=7), "layer 7 of an encoder of 2 blocks"),
    ]:
        (tmp_path / "there.npz").write_text("mine")
        with pytest.raises(ConfigError, match=text):
            go(model, clips, tmp_path / name, settings)
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        with pytest.raises(ConfigError, match=r"needs pyarrow[\s\S]*pip install 'asit-audio\[parquet\]'"):
            go(model, clips, tmp_path / "emb.parquet")
    for make, text in [
        (lambda: EmbedSettings(level="frames", pooling="class"), "--pooling class with --level frames"),
        (lambda: EmbedSettings(batch=0), "batch 0"),
        (lambda: EmbedSettings(window=1.0, hop=1.5), "a hop of 1.5 s between windows of 1 s"),
        (lambda: EmbedSettings(window=1.0, level="frames"), "--window with --level frames"),
    ]:
        with pytest.raises(ConfigError, match=text):
            make()
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(4):
        (bad / f"{i}.wav").write_text("no sound")
    with pytest.raises(CatalogueError, match="all 4 inputs failed, the first: "):
        go(model, bad, tmp_path / "emb.npz")
    assert (tmp_path / "there.npz").read_text() == "mine"
    assert not [path.name for path in tmp_path.iterdir() if path.name not in ("there.npz", "bad")]


@pytest.mark.parametrize("where", ["blocks", "file"])
def test_a_full_disk(
    model: AudioModel, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    out = tmp_path / "emb.npz"
    with monkeypatch.context() as patch:
        if where == "blocks":
            patch.setattr(embed_blocks.BlockWriter, "add", lambda *_: (_ for _ in ()).throw(full))
        else:
            patch.setattr("asit.infer.embed_blocks._stream", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(CheckpointError, match="the disk is full"):
            go(model, clips, out)
    assert [path.name for path in tmp_path.iterdir()] == ["emb.npz.parts"]
    assert not list((tmp_path / "emb.npz.parts").glob(".*"))
    assert go(model, clips, out).rows == 10
    with pytest.raises(ConfigError, match=r"below.npz may not be written: (File exists|Not a directory)"):
        go(model, clips, out / "below.npz")


def say(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["embed", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_line(
    model: AudioModel, saved: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stopping: Any
) -> None:
    (tmp_path / "bad.wav").write_text("no sound")
    code, out, err = say(capsys, saved, str(clips), str(tmp_path / "bad.wav"), "--out", str(tmp_path / "new/emb.npz"))
    assert (code, out) == (2, f"{tmp_path}/new/emb.npz: 10 vectors of 32 values from 10 files\n")
    assert "warning: 1 of 11 inputs failed and were left out; all are in" in err
    assert "embed: 11/11  1 bad" in err
    found = np.load(tmp_path / "new/emb.npz")
    assert found["paths"][0] == f"{clips}/00.flac"
    code, _, err = say(capsys, saved, str(clips), "--out", str(tmp_path / "new/emb.npz"))
    assert (code, err.splitlines()[0]) == (2, f"asit: {tmp_path}/new/emb.npz already exists")
    # Lines on standard output.
    code, out, err = say(capsys, saved, str(clips / "0[0-2].flac"), str(tmp_path / "bad.wav"))
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 2
    assert f"warning: {tmp_path}/bad.wav begins" in err
    assert [row["path"] for row in rows] == [f"{clips}/0{i}.flac" for i in range(3)]
    np.testing.assert_allclose([row["clip"] for row in rows], found["vectors"][:3], atol=1e-5)
    assert rows[0]["patches"] == [4, 4]
    code, out, _ = say(capsys, saved, str(clips / "00.flac"), "--level", "patches")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["time"], row["band"]) for row in rows[3:5]] == [(0.0475, 3), (0.1275, 0)]
    for more, text in [
        (["--shard", "1/4"], "--shard or --overwrite without --out"),
        (["--shard", "4/4", "--out", "a.npz"], "--shard 4/4"),
        (["--out", "a.txt"], "--out a.txt"),
        (["--out", "a.npz", "--threads", "-1"], "--threads -1\n  expected: greater than or equal to 0"),
        (["--out", "a.npz", "--bad-files", "-3"], "--bad-files -3.0\n  expected: greater than or equal to 0"),
    ]:
        code, _, err = say(capsys, saved, str(clips), *more)
        assert (code, text in err) == (2, True)
    stopping(2, KeyboardInterrupt())
    code, _, err = say(capsys, saved, str(clips), "--out", str(tmp_path / "c.npz"), "--batch", "2")
    assert code == 130
    assert "asit: stopped: " in err
    assert "the same command resumes" in err


def test_threads_do_not_run_ahead_of_the_encoder(model: AudioModel) -> None:
    embedder, opened, lock = model.embedder(), list[int](), threading.Lock()
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 8000).astype(np.float32)

    def pieces(index: int) -> Iterator[tuple[float, np.ndarray]]:
        with lock:
            opened.append(index)
        if index == 1:
            raise AudioError("this one cannot be opened")
        if index == 2:
            raise ZeroDivisionError
        for start in range(3):
            yield float(start), wave

    results = run_recordings(embedder, 10_000, pieces, batch=1, threads=3, ends=[1])
    first = [next(results) for _ in range(4)]
    assert [(one.start, one.seconds) for one in first if isinstance(one, Result)] == [(i, 0.5) for i in range(3)]
    assert first[3] == Done(0)
    time.sleep(0.05)
    assert len(opened) < 60
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no fault of a file
        list(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prepare")]


def test_one_long_file_among_short_ones_holds_nobody_up(model: AudioModel) -> None:
    wave = np.random.default_rng(0).uniform(-0.1, 0.1, 16000 * 60).astype(np.float32)

    def pieces(index: int) -> Iterator[tuple[float, np.ndarray]]:
        yield 0.0, wave if index in (0, 7) else wave[:4000]

    found = list(run_recordings(model.embedder(), 20, pieces, batch=2, partial=True, threads=2))
    assert [one.index for one in found if isinstance(one, Done)] == list(range(20))
    stretches = [one.found.frames for one in found if isinstance(one, Result) and one.index == 7]
    assert len(stretches) > 3
    frames = torch.cat(stretches)
    torch.testing.assert_close(frames, model.embed(wave).frames, atol=2e-5, rtol=1e-5)
