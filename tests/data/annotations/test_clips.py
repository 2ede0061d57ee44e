"""Windows of annotated recordings against a slow loop over float64, and what becomes of odd annotations."""

import numpy as np
import pytest
import soundfile

import asit
from asit.config import TableSettings
from asit.data.annotations.clips import rows_of, windows
from asit.data.catalogue import scan
from asit.data.catalogue.labels import BACKGROUND
from asit.data.catalogue.tables import TableRow
from asit.errors import CatalogueError, ConfigError

SECONDS = 20.0


@pytest.fixture
def wav(tmp_path):
    path = tmp_path / "rec.wav"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(SECONDS * 4000)), 4000)
    return str(path)


def slow(parts, settings):
    """Label each window of 20 s by sampling both intervals every millisecond."""
    hop, out = settings.hop or settings.window, {}
    for k in range(int(SECONDS / hop) + 1):
        first, last = k * hop, k * hop + settings.window
        if first >= SECONDS:
            break
        labels, touched = [], False
        for part in parts:
            grid = np.arange(round(first * 1000), round(last * 1000))
            common = int(((grid >= round(part.start * 1000)) & (grid < round(part.end * 1000))).sum()) / 1000
            touched |= common > 0
            if common and common >= settings.box_share * min(settings.window, part.end - part.start) - 1e-9:
                labels.append(part.label)
        if labels:
            out[first] = set(labels)
        elif not touched and settings.background and last <= SECONDS:
            out[first] = {BACKGROUND}
    return out


@pytest.mark.parametrize("seed", range(8))
def test_windows_equal_a_slow_loop(wav, seed):
    rng = np.random.default_rng(seed)
    window = float(rng.choice([1.0, 2.5, 3.0]))
    settings = TableSettings(
        window=window,
        hop=float(rng.choice([0.0, 0.5, window / 2])),
        box_share=float(rng.choice([0.1, 0.5, 0.75, 1.0])),
        background=bool(seed % 2),
    )
    parts = []
    for _ in range(6):
        start = round(float(rng.uniform(0, SECONDS - 5)), 3)
        parts.append(
            TableRow(wav, str(rng.integers(3)), start=start, end=round(start + float(rng.uniform(0.05, 5)), 3))
        )
    found = list(windows(parts, settings))
    assert {row.start: set(row.label.split(";")) for row in found} == slow(parts, settings)
    assert all(row.end == pytest.approx(row.start + window) and row.path == wav for row in found)


def test_points_parts_without_label_and_recordings_without_parts(wav):
    parts = [TableRow(wav, "click", start=2.0, end=2.0), TableRow(wav, None, start=4.5, end=5.5)]
    found = list(windows(parts, TableSettings(window=2, background=True)))
    assert [(row.start, row.label) for row in found[:3]] == [(0.0, BACKGROUND), (2.0, "click"), (6.0, BACKGROUND)]
    assert [row.label for row in windows([], TableSettings(window=5, background=True), [wav])] == [BACKGROUND] * 4
    assert not list(windows([], TableSettings(window=5), [wav]))


def test_a_part_without_end_lasts_to_the_end_of_the_recording(wav):
    found = list(windows([TableRow(wav, "rain", start=9.0)], TableSettings(window=4)))
    assert [row.start for row in found] == [8.0, 12.0, 16.0]


def test_overlapping_parts_in_a_table_become_windows_of_several_labels(tmp_path, wav):
    table = tmp_path / "t.csv"
    table.write_text("File,Start (s),End (s),Common name\nrec.wav,0,3,wren\nrec.wav,1,2.5,owl\nrec.wav,0,3,jay\n")
    rows = list(rows_of(table, TableSettings(window=3)))
    assert [(row.start, row.end, row.label, row.group) for row in rows] == [(0.0, 3.0, "wren;owl;jay", "rec.wav")]
    with pytest.raises(CatalogueError, match=r"line 4: rec\.wav from 0 s is in the table twice"):
        list(rows_of(table))


def test_each_part_is_a_clip_without_windows(tmp_path, wav):
    (tmp_path / "rec.txt").write_text("1\t2\twren\n1\t2\towl\n1\t2\twren\n1.5\t3\tjay\n")
    made = scan.build(tmp_path, tmp_path / "c.jsonl", labels="annotations", workers=1, statistics_clips=0)
    assert [(clip.start, clip.seconds, clip.label, clip.group) for clip in made] == [
        (1.0, 1.0, "wren;owl", "rec.wav"),
        (1.5, 1.5, "jay", "rec.wav"),
    ]
    (tmp_path / "rec.txt").write_text("1\t1\twren\n")
    with pytest.raises(CatalogueError, match=r"label 'wren' at the point 1 s(?s:.*)--window 3"):
        list(rows_of(tmp_path / "rec.txt"))
    (tmp_path / "rec.txt").write_text("")
    with pytest.raises(CatalogueError, match="annotates nothing"):
        list(rows_of(tmp_path / "rec.txt"))


def test_a_catalogue_of_windows_keeps_how_it_was_cut(tmp_path, wav):
    (tmp_path / "rec.txt").write_text("1\t2\twren\n18.5\t19.5\towl\n")
    how = TableSettings(window=3)
    made = scan.build(tmp_path, tmp_path / "c.jsonl", table=how, workers=1, statistics_clips=0)
    assert made.header["table"] == {"window": 3.0}
    assert made.header["shortened"] == 1  # the last window, which the recording ends in
    read = asit.Catalogue.read(tmp_path / "c.jsonl")
    assert [(clip.start, clip.seconds, clip.label) for clip in read] == [(0.0, 3.0, "wren"), (18.0, 2.0, "owl")]


def test_absent_recordings_are_left_out_as_missing(tmp_path, wav):
    head = "Selection\tBegin Time (s)\tEnd Time (s)\tBegin File\tSpecies\n"
    (tmp_path / "t.txt").write_text(head + "1\t1\t2\trec.wav\twren\n2\t1\t2\tgone.wav\towl\n")
    for how in (TableSettings(window=3), TableSettings(window=3, background=True)):
        made = scan.build(tmp_path / "t.txt", tmp_path / "c.jsonl", table=how, bad_files=0.5, statistics_clips=0)
        assert made.header["skipped"] == {"missing": 1}
        assert made.labels[0] == "wren"
    with pytest.raises(CatalogueError, match=r"1 missing\n.*gone\.wav"):
        scan.build(tmp_path / "t.txt", tmp_path / "c.jsonl", table=TableSettings(window=3), statistics_clips=0)


@pytest.mark.parametrize("how", [{"hop": 1.0}, {"background": True}, {"columns": "path=Begin File"}])
def test_settings_that_do_not_go_together(tmp_path, wav, how):
    (tmp_path / "rec.txt").write_text("1\t2\twren\n")
    with pytest.raises(ConfigError):
        list(rows_of(tmp_path / "rec.txt", TableSettings(**how)))
