"""CSV lines: any name is read back by Python's own reader."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asit.io import csv_lines
from asit.io.csv_lines import csv_line


def read(line: str) -> list[str]:
    """The cells, by universal newlines, which is how a lone carriage return splits a line."""
    (cells,) = csv.reader(io.StringIO(line + "\n", newline=None if "\r" not in line else ""), strict=True)
    return cells


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=2, max_size=4))
def test_any_cells_come_back(cells: list[str]) -> None:
    assert read(csv_line(cells)) == cells


def test_no_other_module_writes_csv() -> None:
    source = Path(csv_lines.__file__).parents[1]
    assert not [str(path) for path in source.rglob("*.py") if re.search(r"csv\.(Dict)?[wW]riter", path.read_text())]


def test_what_is_quoted() -> None:
    assert csv_line(["a\rb", "a\nb", 'a"b', "a,b", " a", "a b", "é"]) == '"a\rb","a\nb","a""b","a,b"," a",a b,é'
    assert csv_line([1, -0.5, None, np.float32(2.5), "", "-1"]) == "1,-0.5,,2.5,,-1"


def test_names_that_a_spreadsheet_would_run() -> None:
    names = ["=1+1", "+1", "-x.wav", "@sum", "\t=1", "\r=1", "＝1", "a=1", "é"]
    assert read(csv_line(names)) == names
    assert read(csv_line(names, spreadsheet=True)) == [f"'{name}" for name in names[:7]] + names[7:]
    assert csv_line([-1.5, "-1.5"], spreadsheet=True) == "-1.5,'-1.5"
