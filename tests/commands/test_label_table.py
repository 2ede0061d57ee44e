"""Labels as lines."""

from __future__ import annotations

import csv
import io
import json

import pytest

from asit import logs
from asit.terminal import stdout
from asit.terminal.stdout import Row

CLIP = [Row(0.0, 1.5, [("dog", 0.91), ("rain", 0.04)])]


def test_a_clip_is_a_heading_with_its_labels_beneath() -> None:
    lines = list(stdout.table_lines("street.wav", 1.5, CLIP, 80, timed=False))
    assert lines[0] == "street.wav  1.50 s"
    assert lines[1].split() == ["dog", "0.910", "█" * 21 + "▉"]  # 0.91 of 24 cells is 21.84
    assert lines[2].split() == ["rain", "0.040", "█"]
    assert list(stdout.table_lines("a.wav", 1.5, CLIP, 80, timed=False, blocks=False))[1].endswith("#" * 22)


@pytest.mark.parametrize("columns", [60, 80])
def test_no_line_is_wider_than_the_terminal(columns: int) -> None:
    labels = [("a very long label that goes on and on, as AudioSet's do, to the end of the line " * 2, 0.5)]
    wide = [("犬の鳴き声と車の音と人の声と鳥の声と風の音と雨の音と波の音と鐘の音と電話の音", 0.4)]
    rows = [Row(0.0, 3700.0, labels), Row(3700.0, 7300.0, labels + wide)]
    path = "/a/folder/with/a/long/name/and/another/one/below/it/" + "recording" * 8 + ".wav"
    for given, timed in ((rows, True), ([Row(0.0, 1.0, labels + wide)], False), (rows[:1], True)):
        lines = list(stdout.table_lines(path, 7300.0, given, columns, timed))
        assert len(lines) > 1
        assert max(map(logs.width, lines)) <= columns
    assert ".wav" in lines[0]
    assert "…" in lines[0]


def test_windows_show_as_many_labels_as_fit_and_one_at_least() -> None:
    rows = [Row(0.0, 1.0, [("dog", 0.9), ("rain", 0.05), ("b" * 90, 0.01)]), Row(1.0, 2.0, [("b" * 90, 1.0)])]
    lines = list(stdout.table_lines("a.wav", 2.0, rows, 60, timed=True))
    assert lines[1] == "  0:00.00 - 0:01.00  dog 0.900  rain 0.050"
    assert lines[2].startswith("  0:01.00 - 0:02.00  bbb")
    assert lines[2].endswith("… 1.000")


def test_headings_and_what_stands_in_for_no_labels() -> None:
    assert list(stdout.table_lines("a.wav", 2.0, [], 60, timed=True))[1] == "  no label above the threshold"
    lines = list(stdout.table_lines("\x1b[2Jevil\n.wav", 1.0, CLIP, 80, timed=False))
    assert lines[0] == "\\x1b[2Jevil\\x0a.wav  1.00 s"  # names cannot steer the terminal


def test_json_and_csv_are_read_back() -> None:
    odd = [Row(0.25, 1.5, [('a "quoted", label', 0.5), ("نباح كلب", 0.25)])]
    (line,) = stdout.json_lines("a.wav", odd, flat=False)
    assert json.loads(line) == {
        "path": "a.wav",
        "start": 0.25,
        "end": 1.5,
        "labels": [{"label": 'a "quoted", label', "score": 0.5}, {"label": "نباح كلب", "score": 0.25}],
    }
    assert "نباح كلب" in line
    (flat,) = stdout.json_lines("a.wav", CLIP[:1], flat=True)
    assert json.loads(flat) == {"path": "a.wav", "start": 0.0, "end": 1.5, "label": "dog", "score": 0.91}
    text = "\n".join([stdout.csv_header(), *stdout.csv_lines("a,b\n.wav", odd)])
    read = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [(row["path"], float(row["start"]), row["label"], float(row["score"])) for row in read] == [
        ("a,b\n.wav", 0.25, 'a "quoted", label', 0.5),
        ("a,b\n.wav", 0.25, "نباح كلب", 0.25),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00.00"), (59.999, "1:00.00"), (3599.5, "59:59.50"), (3661.25, "1:01:01.25")]
)
def test_times_are_read_as_clocks(seconds: float, text: str) -> None:
    assert stdout.clock(seconds) == text
