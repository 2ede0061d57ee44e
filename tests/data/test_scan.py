"""A scan: what is listed, what is left out and why, and that an interrupted scan resumes to the same catalogue."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asit.audio import files
from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.scan import build
from asit.data.catalogue.splits import make_splits
from asit.data.catalogue.tables import TableRow, read_table
from asit.errors import CatalogueError, ConfigError

SETTINGS = FrontEndSettings(mels=40)
SHARED = Path(os.environ.get("ASIT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def noise(
    path: Path, seconds: float = 0.3, rate: int = 16000, channels: int = 1, level: float = 0.1, **how: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name) + sum(path.name.encode()))
    wave = rng.normal(0, level, (round(seconds * rate), channels)).clip(-1, 1)
    soundfile.write(path, wave, rate, **how)
    return path


def make(folder: Path, **more: Any) -> Catalogue:
    """build() with small settings; out is c.jsonl in the folder's parent."""
    how = {"front_end": SETTINGS, "workers": 1, **more}
    return build(folder, how.pop("out", folder.parent / "c.jsonl"), **how)


def stop_at(count: int) -> Callable[[int, int, int], None]:
    """A progress function that stops the scan after so many files."""

    def stop(done: int, total: int, bad: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Twelve good files of several kinds in nested folders."""
    folder = tmp_path / "sounds"
    for i in range(6):
        noise(folder / "b" / f"{i}.wav", 0.2 + 0.05 * i, 16000)
    for name, *how in [
        *((f"a/{i}.flac", 0.4, 22050, 2) for i in range(3)),
        *(("z.ogg", 0.5, 8000), ("Übung.wav", 0.3, 44100, 6), ("a.b.mp3", 0.5, 16000)),
    ]:
        noise(folder / name, *how)
    return folder


# what is listed


def test_a_folder_is_listed_in_order_with_what_the_files_say(sounds: Path, tmp_path: Path) -> None:
    expected = {str(p.relative_to(sounds)) for p in sounds.rglob("*") if p.is_file()}
    (sounds / "note.txt").write_text("no sound")
    noise(sounds / ".hidden.wav")
    noise(sounds / ".cache" / "x.wav")
    made = make(sounds, checksum=True)
    header, *lines = lines_of(tmp_path / "c.jsonl")
    names = [line["path"] for line in lines]
    assert ({*names}, len(names)) == (expected, 12)
    assert [n for n in names if "/" in n] == sorted(n for n in names if "/" in n)
    for clip in made:
        info = soundfile.info(clip.path)
        assert Path(clip.path).is_absolute()
        assert (clip.rate, clip.channels) == (info.samplerate, info.channels)
        assert clip.seconds == pytest.approx(info.duration, rel=1e-6)
        assert clip.sha256 == hashlib.sha256(Path(clip.path).read_bytes()).hexdigest()
    assert header == made.header
    assert (header["clips"], header["skipped"], header["ignored"]) == (12, {}, {".txt": 1})
    assert header["seconds"] == pytest.approx(sum(c.seconds for c in made), abs=1e-3)
    assert header["front_end"]["mels"] == 40
    assert (tmp_path / "c.skipped.jsonl").read_bytes() == b""
    assert {p.name for p in tmp_path.iterdir()} == {"sounds", "c.jsonl", "c.skipped.jsonl"}


def test_links_are_followed_once(sounds: Path, tmp_path: Path) -> None:
    (sounds / "b" / "up").symlink_to(sounds)
    (sounds / "c").symlink_to(sounds / "a")
    assert len(make(sounds, check="header")) == 12
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(sounds / "b")
    assert make(tmp_path / "in", check="header")[0].path == str(tmp_path / "in" / "link" / "0.wav")


def test_a_table_gives_labels_and_splits_and_its_own_order(sounds: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    outside = noise(tmp_path.parent / f"{tmp_path.name}-outside.wav")
    table.write_text(f"Filename,class,split\nsounds/z.ogg,dog,test\n./sounds/b/0.wav,,train\n{outside},cat,\n")
    made = make(table)
    assert list(made.labels) == ["dog", None, "cat"]
    assert list(made.texts("split")) == ["test", "train", None]
    assert [c.path for c in made] == [str(sounds / "z.ogg"), str(sounds / "b" / "0.wav"), str(outside)]
    again = Catalogue.read(tmp_path / "c.jsonl")
    assert [*again] == [*made]
    assert again.root == str(tmp_path)
    stored = [line["path"] for line in lines_of(tmp_path / "c.jsonl")[1:]]
    assert stored == ["sounds/z.ogg", "sounds/b/0.wav", str(outside)]


# what is left out


@pytest.fixture
def damaged(sounds: Path) -> dict[str, str]:
    """Bad files of every kind beside the good ones: name -> reason."""
    wave = np.full(8000, 0.1)
    soundfile.write(sounds / "nan.wav", np.where(np.arange(8000) == 5000, np.nan, wave), 16000, subtype="FLOAT")
    soundfile.write(sounds / "zeros.wav", np.zeros(8000), 16000)
    soundfile.write(sounds / "hush.wav", np.full(8000, 1e-5), 16000, subtype="FLOAT")
    soundfile.write(sounds / "none.wav", np.zeros(0), 16000)
    noise(sounds / "blip.wav", 0.01)
    (sounds / "void.flac").write_bytes(b"")
    (sounds / "page.mp3").write_text("<html>404</html>" * 50)
    (sounds / "gone.wav").symlink_to(sounds / "nowhere.wav")
    os.mkfifo(sounds / "pipe.wav")
    for name in ("cut.flac", "cut.wav", "cut.mp3"):
        whole = noise(sounds / name, 10.0).read_bytes()
        (sounds / name).write_bytes(whole[: len(whole) // 2])
    return {
        **dict.fromkeys(("cut.flac", "cut.wav", "cut.mp3"), "truncated"),
        **dict.fromkeys(("zeros.wav", "hush.wav"), "silent"),
        **dict.fromkeys(("none.wav", "void.flac"), "empty"),
        **dict.fromkeys(("page.mp3", "pipe.wav"), "unreadable"),
        **{"nan.wav": "non-finite", "blip.wav": "too short", "gone.wav": "missing"},
    }


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def test_bad_files_are_left_out_with_their_reasons(sounds: Path, damaged: dict[str, str], tmp_path: Path) -> None:
    made = make(sounds, bad_files=0.6)
    rows = lines_of(tmp_path / "c.skipped.jsonl")
    assert {row["path"]: row["reason"] for row in rows} == damaged
    assert all(row["detail"] for row in rows)
    assert made.header["skipped"] == Counter(damaged.values())
    assert len(made) == 12
    kept = make(sounds, bad_files=0.6, silence_db=None)
    assert {Path(clip.path).name for clip in kept} & damaged.keys() == {"zeros.wav", "hush.wav"}
    assert kept.header["silence_db"] is None
    assert lines_of(tmp_path / "c.jsonl")[0]["silence_db"] is None


def test_too_many_bad_files_stop_the_scan_and_are_counted(
    sounds: Path, damaged: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CatalogueError) as caught:
        make(sounds)
    for text in ("12 of the 24 files", "3 truncated", "2 silent", "bad_files", "too short: blip.wav: 10.0 ms"):
        assert text in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"sounds", "c.jsonl.partial"}
    first: list[int] = []
    made = make(sounds, bad_files=0.5, progress=lambda done, total, bad: first.append(done))
    assert first[0] == 12
    assert len(made) == 12


def test_a_folder_that_may_not_be_read_is_one_bad_file(sounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.scandir

    def scandir(path: Any) -> Any:  # root, who runs some tests, may read a folder of any mode
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    made = make(sounds, check="header", statistics_clips=0, bad_files=0.2)
    assert (made.header["skipped"], len(made)) == ({"unreadable": 1}, 9)


# normalisation


def test_mean_and_std_are_those_of_an_outside_log_mel(tmp_path: Path) -> None:
    knf = pytest.importorskip("kaldi_native_fbank")
    for i in range(5):
        noise(tmp_path / "in" / f"{i}.wav", 0.3 + 0.1 * i, level=0.02 * (i + 1))
    made = make(tmp_path / "in")
    options = knf.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.window_type = "hanning"
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = 40
    values = []
    for clip in made:
        wave, _ = soundfile.read(clip.path, dtype="float32")
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(16000, wave.tolist())
        fbank.input_finished()
        values += [fbank.get_frame(t) for t in range(fbank.num_frames_ready)]
    flat = np.array(values, np.float64)
    assert made.header["mean"] == pytest.approx(flat.mean(), abs=1e-4)
    assert made.header["std"] == pytest.approx(flat.std(), abs=1e-4)
    assert made.header["statistics_clips"] == 5


def test_statistics_depend_on_the_seed_alone(sounds: Path, tmp_path: Path) -> None:
    noise(sounds / "long.wav", 25.0, 8000)
    for i in range(20):  # three processes are not started for a handful of files
        noise(sounds / f"more{i}.wav", 0.1)
    one = make(sounds, statistics_clips=12).header["mean"]
    bytes_of_one = (tmp_path / "c.jsonl").read_bytes()
    make(sounds, statistics_clips=12, workers=3)
    assert (tmp_path / "c.jsonl").read_bytes() == bytes_of_one
    assert make(sounds, statistics_clips=12, seed=1).header["mean"] != one
    # Opening alone gives the same sample at the same places.
    opened = make(sounds, statistics_clips=12, check="header").header["mean"]
    assert opened == pytest.approx(one, abs=1e-3)
    assert make(sounds, statistics_clips=0).header["mean"] is None


def test_at_most_ten_seconds_of_a_file_are_measured(tmp_path: Path) -> None:
    # Silence but for the last part: were all of it measured, the mean would not hang on the seed.
    wave = np.append(np.zeros(8000 * 20), np.random.default_rng(0).normal(0, 0.1, 8000 * 20))
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", wave, 8000)
    assert len({make(tmp_path / "in", seed=seed, check="header").header["mean"] for seed in range(4)}) > 1


# parts of files


@pytest.fixture
def tones(tmp_path: Path) -> Path:
    """Four seconds at 16 kHz: a second each of noise at 0.1, silence, noise at 0.01, noise at 0.1 with a NaN."""
    rng = np.random.default_rng(0)
    wave = np.concatenate([level * rng.normal(0, 1, 16000) for level in (0.1, 0.0, 0.01, 0.1)])
    wave[3 * 16000 + 100] = np.nan
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "four.wav", wave, 16000, subtype="FLOAT")
    return tmp_path / "in" / "four.wav"


def test_parts_are_held_against_the_length_of_their_file(tones: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    lines = ["0,1", "0.5,2", "2,", "2,2.01", "3.5,9.5", "4,", "1,2", "2.9,3.1", ",4.00001"]
    table.write_text("path,start,end,label\n" + "".join(f"in/four.wav,{line},{i}\n" for i, line in enumerate(lines)))
    made = make(table, bad_files=0.9)
    skipped = lines_of(tmp_path / "c.skipped.jsonl")
    assert [(tuple(row["part"]), row["reason"]) for row in skipped] == [
        ((2, None), "non-finite"),
        ((2, 2.01), "too short"),
        ((4, None), "outside the file"),
        ((1, 2), "silent"),
        ((2.9, 3.1), "non-finite"),
        ((0, 4.00001), "non-finite"),
    ]
    assert [(clip.start, clip.seconds, clip.label) for clip in made] == [(0, 1, "0"), (0.5, 1.5, "1"), (3.5, 0.5, "4")]
    assert made.header["shortened"] == 1
    assert made.ids() == ["in/four.wav", "in/four.wav@0.5", "in/four.wav@3.5"]
    headers = make(table, check="header", statistics_clips=0, bad_files=0.9)
    assert headers.header["skipped"] == {"outside the file": 1, "too short": 1}
    with pytest.raises(
        CatalogueError, match=r"6 of the 9 (.|\n)*in/four\.wav: starts at 4 s, and the file ends at 4\.000 s"
    ):
        make(table)


def test_only_the_part_is_measured(tones: Path, tmp_path: Path) -> None:
    whole = {}
    for start in (0, 2):
        wave, _ = soundfile.read(tones, start=start * 16000, frames=16000)
        (tmp_path / str(start)).mkdir()
        soundfile.write(tmp_path / str(start) / "a.wav", wave, 16000, subtype="FLOAT")
        whole[start] = make(tmp_path / str(start)).header["mean"]
    assert abs(whole[0] - whole[2]) > 3
    for check in ("full", "header"):
        for start, mean in whole.items():
            made = make(tones.parent, rows=[TableRow(str(tones), start=start, end=start + 1)], check=check)
            assert made.header["mean"] == pytest.approx(mean, abs=1e-6)
            assert made.header["statistics_clips"] == 1


def test_a_stopped_scan_of_parts_resumes(tones: Path, tmp_path: Path) -> None:
    rows = [TableRow(str(tones), start=i / 10, end=i / 10 + 0.1) for i in range(9)]
    rows += [TableRow(str(tones), start=2.5), TableRow(str(tones), end=1.0)]
    make(tones.parent, rows=rows, out=tmp_path / "whole.jsonl")

    with pytest.raises(KeyboardInterrupt):
        make(tones.parent, rows=rows, progress=stop_at(5))
    seen: list[int] = []
    make(tones.parent, rows=iter(rows), progress=lambda done, total, bad: seen.append(done))
    assert seen[0] == 5
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# rows of a corpus's reader, and labels from folders


def test_rows_and_facts_of_a_reader(sounds: Path, tmp_path: Path) -> None:
    rows = (
        TableRow(str(sounds / "b" / f"{i}.wav"), "ab"[i % 2], ["train", "test"][i // 3], str(i // 2), f"speaker {i}")
        for i in range(6)
    )
    made = make(sounds, rows=rows, facts={"task": "letters", "classes": ["b", "a"], "mean": "not mine"})
    assert made.header["task"] == "letters"
    assert made.header["classes"] == ["b", "a"]
    assert isinstance(made.header["mean"], float)
    again = Catalogue.read(tmp_path / "c.jsonl")
    for name, texts in [
        ("label", ["a", "b"] * 3),
        ("split", ["train"] * 3 + ["test"] * 3),
        ("fold", ["0", "0", "1", "1", "2", "2"]),
        ("group", [f"speaker {i}" for i in range(6)]),
    ]:
        assert list(again.texts(name)) == texts
    assert "shortened" not in again.header


def test_rows_that_cannot_be(sounds: Path) -> None:
    row, other = TableRow(str(sounds / "z.ogg")), TableRow(str(sounds / "b" / "0.wav"))
    gone = [TableRow(str(sounds / f"{i}.wav")) for i in range(3)]
    (sounds / "void.wav").touch()
    void = TableRow(str(sounds / "void.wav"))
    for rows, message, how in [
        ([void], r"1 of the 1 files .* 1 empty(.|\n)*at least one", {"bad_files": 1.0}),
        ([row, other, row], r"1 clips are listed twice: z\.ogg", {}),
        ([], "no clips were named", {}),
        ([row, *gone], r"3 of the 4 .* 3 missing\n    missing: 0\.wav does not exist", {}),
        ([row], "labels='folder' for rows", {"labels": "folder"}),
    ]:
        with pytest.raises(CatalogueError, match=message):
            make(sounds, rows=rows, **how)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("dog/1 dog/deep/2 cat/3", "cat dog dog"),
        ("train/1 bus/2 car/test/3", "bus car train"),  # a class may be called train
        ("train/dog/1 train/dog/deep/2 Test/dog/1 val/cat/1", "dog,Test dog,train dog,train cat,val"),
        ("dog/train/1 dog/train/deep/2 dog/Test/1 cat/val/1", "cat,val dog,Test dog,train dog,train"),
    ],
)
def test_labels_and_splits_from_folders(tmp_path: Path, names: str, expected: str) -> None:
    for name in names.split():
        noise(tmp_path / "in" / f"{name}.wav")
    for labels in ("auto", "none"):
        assert not any(make(tmp_path / "in", labels=labels).labels)
    made = make(tmp_path / "in", labels="folder")
    assert [",".join(filter(None, (clip.label, clip.split))) for clip in made] == expected.split()
    assert ("folders" in made.header) == ("," in expected)
    if "," in expected:
        assert [len(rows) for _, rows in make_splits(made).items()] == [2, 1, 1]
        assert made.header["folders"] == "the sub-folders are splits and classes"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/1.wav", "test/dog/1.wav"), r"splits \(test, train\) beside others \(recordings in no class\)"),
        (("train/1.wav", "test/2.wav"), r"splits \(test, train\) beside others \(recordings in no class\)"),
        (("train/dog/1.wav", "test/dog/1.wav", "cat/1.wav"), r"after splits \(test, train\) beside others \(cat"),
        (("dog/train/1.wav", "dog/test/1.wav", "cat/1.wav"), r"splits \(test, train\) beside others \(recordings in"),
        (("dog/train/1.wav", "dog/test/1.wav", "cat/old/1.wav"), r"splits \(test, train\) beside others \(old\)"),
        (("dog/1.wav", "loose.wav"), r"1 of 2 recordings are directly in .*: loose\.wav"),
        (("dog/1.wav", "a;b/4.wav"), r"sub-folder 'a;b' .* cannot name a label"),
    ],
)
def test_folders_that_may_be_splits_or_classes_or_name_none(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        noise(tmp_path / "in" / name)
    with pytest.raises(CatalogueError, match=message) as caught:
        make(tmp_path / "in", labels="folder")
    assert "SPLIT/CLASS" in caught.value.remedy or "splits" not in message


# stopping and going on

SCAN = """
    import os, signal, sys
    from pathlib import Path
    from asit.data.catalogue.scan import build
    from asit.config import FrontEndSettings

    def progress(done, total, bad):
        if done >= int(sys.argv[3]):
            os.kill(os.getpid(), getattr(signal, sys.argv[4]))

    if __name__ == "__main__":
        build(sys.argv[1], sys.argv[2], front_end=FrontEndSettings(mels=40), workers=2, bad_files=0.5, checksum=True,
              statistics_clips=int(sys.argv[5]), progress=progress)
"""


def stopped(source: Path, out: Path, after: int, how: str, sampled: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(SCAN), source, out, str(after), how, str(sampled)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_killed_scan_resumes_and_ends_the_same(sounds: Path, damaged: dict[str, str], tmp_path: Path) -> None:
    how: dict[str, Any] = {"bad_files": 0.5, "checksum": True}
    make(sounds, out=tmp_path / "whole.jsonl", **how)
    out = tmp_path / "c.jsonl"
    assert stopped(sounds, out, 7, "SIGKILL", sampled=1000).returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / "c.jsonl.partial"
    with partial.open("ab") as file:
        file.write(b'{"path":"b/0.wav","size":1')  # as a kill in the middle of a line leaves it
    opened = {json.loads(line)["path"] for line in partial.read_bytes().splitlines()[1:-1] if b"reason" not in line}
    seen: list[tuple[int, int, int]] = []
    make(sounds, progress=lambda *now: seen.append(now), **how)
    assert seen[0][0] == len(opened) > 0
    assert seen[-1][0] == seen[-1][1] == 24
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "c.skipped.jsonl").read_bytes() == (tmp_path / "whole.skipped.jsonl").read_bytes()
    assert not partial.exists()


def test_changed_added_and_removed_files_are_noticed_on_resume(sounds: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make(sounds, progress=stop_at(12))
    noise(sounds / "b" / "0.wav", 0.9)
    noise(sounds / "a" / "new.wav", 0.7)
    (sounds / "z.ogg").unlink()
    seen: list[int] = []
    made = make(sounds, progress=lambda done, total, bad: seen.append(done))
    assert seen[0] == 10
    lengths = {Path(c.path).relative_to(sounds).as_posix(): c.seconds for c in made}
    assert lengths["b/0.wav"] == pytest.approx(0.9)
    assert lengths["a/new.wav"] == pytest.approx(0.7)
    assert len(lengths) == 12
    assert "z.ogg" not in lengths
    resumed = out.read_bytes()
    make(sounds)
    assert out.read_bytes() == resumed


def test_ctrl_c_says_how_to_resume(sounds: Path, tmp_path: Path) -> None:
    result = stopped(sounds, tmp_path / "c.jsonl", 3, "SIGINT")
    assert "KeyboardInterrupt: stopped after" in result.stderr
    assert "c.jsonl.partial" in result.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"sounds", "c.jsonl.partial"}


def test_other_settings_do_not_resume_a_stopped_scan(sounds: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
        make(sounds, checksum=True, progress=stop_at(0))
    with pytest.raises(CatalogueError, match=r"checksum true, now false(.|\n)*restart"):
        make(sounds)
    assert len(make(sounds, restart=True)) == 12


@pytest.mark.skipif(sys.platform != "linux", reason="the crash is put in by fork")
def test_a_file_that_kills_the_decoder_is_left_out(sounds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = files.probe

    def probe(path: Any) -> Any:
        if Path(path).name == "3.wav":
            os._exit(11)
        return whole(path)

    monkeypatch.setattr(files, "probe", probe)
    made = make(sounds, workers=2, check="header")
    assert made.header["skipped"] == {"unreadable": 1}
    assert len(made) == 11
    skipped = json.loads((sounds.parent / "c.skipped.jsonl").read_text())
    assert skipped["path"] == "b/3.wav"
    assert "died" in skipped["detail"]


# errors that cost nothing to find


def test_sources_and_outs_that_cannot_be(sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("1.txt", "2.txt", "deep/3.TXT", "4.jpg"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).touch()
    (tmp_path / "mine.csv").write_text("path\nz.ogg\n")
    make(sounds, check="header")
    make(sounds, check="header")  # an older catalogue is replaced
    before = {p.name for p in tmp_path.iterdir()}
    for source, out, message in [
        ("soundz", "d.jsonl", r"there is no .*soundz(.|\n)*did you mean .*sounds\?"),
        ("empty", "d.jsonl", "empty is empty"),
        ("texts", "d.jsonl", r"no audio; 4 files: 3 \.txt, 1 \.jpg(.|\n)*\.flac"),
        ("sounds/z.ogg", "d.jsonl", "one recording"),
        ("c.jsonl", "d.jsonl", "already a catalogue"),
        ("sounds", "sounds", "is a folder"),
        ("sounds", "mine.csv", r"mine\.csv exists and is no catalogue"),
    ]:
        with pytest.raises(CatalogueError, match=message):
            make(tmp_path / source, out=tmp_path / out)
    with pytest.raises(ConfigError, match=r"c\.jsonl may not be written"):
        make(sounds, out=sounds / "z.ogg" / "c.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == before
    assert (tmp_path / "mine.csv").read_text() == "path\nz.ogg\n"


def test_a_full_disk_leaves_the_old_catalogue(sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(sounds, check="header")
    before = (tmp_path / "c.jsonl").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CatalogueError, match="No space left"):
        made.subset([0]).write(tmp_path / "c.jsonl")
    assert (tmp_path / "c.jsonl").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"sounds", "c.jsonl", "c.skipped.jsonl"}


def test_moved_data_are_found_by_root(sounds: Path, tmp_path: Path) -> None:
    made = make(sounds, check="header")
    moved = tmp_path / "moved"
    sounds.rename(moved)
    with pytest.raises(CatalogueError, match=r"not exist(.|\n)*as root"):
        Catalogue.read(tmp_path / "c.jsonl")
    read = Catalogue.read(tmp_path / "c.jsonl", root=moved)
    assert Path(read[0].path).exists()
    assert read.digest == made.digest
    assert read.header["root"] == str(moved)


# real recordings


def test_real_recordings_by_table_and_folder(tmp_path: Path) -> None:
    lists = SHARED / "arabic-speech-commands"
    if not lists.exists():
        pytest.skip(f"no development data at {SHARED}")
    rows = read_table(lists / "val.csv")
    with (lists / "val.csv").open(newline="") as file:
        raw = list(csv.reader(file))[1:]
    assert [(os.path.relpath(row.path, lists), row.label) for row in rows] == [tuple(cells) for cells in raw]
    part = tmp_path / "part.csv"
    part.write_text("path,label\n" + "".join(f"{row.path},{row.label}\n" for row in rows[::60]))
    made = make(part, workers=2)
    assert len(made) == 40
    assert set(made.labels) == {cells[1] for cells in raw}
    assert set(made.seconds.tolist()) == {1.0}
    digits = make(SHARED / "free-spoken-digit-dataset", check="header", statistics_clips=20, out=tmp_path / "d.jsonl")
    assert len(digits) == 3000
    assert set(digits.rate.tolist()) == {8000}


def test_import_needs_no_torch() -> None:
    code = "import sys, asit.data.catalogue.scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
