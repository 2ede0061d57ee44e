"""Tables of clips: every form says the same, and what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from asit.data.tables import TableRow, read_table
from asit.errors import CatalogueError


def table(tmp_path: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'path,label,split\na.wav,dog,train\n"b, c.wav",,\n'),
        ("t.csv", '\ufefffile,category,SPLIT\r\na.wav,dog,train\r\n"b, c.wav",,\r\n'),
        ("t.tsv", "split\tfilename\tlabels\ntrain\ta.wav\tdog\n\tb, c.wav\t\n"),
        ("t.jsonl", '{"file": "a.wav", "class": ["dog"], "split": "train"}\n\n{"path": "b, c.wav", "label": null}\n'),
    ],
)
def test_tables_of_every_form_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    rows = read_table(table(tmp_path, text, name))
    assert rows == [TableRow(str(tmp_path / "a.wav"), "dog", "train"), TableRow(str(tmp_path / "b, c.wav"))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "path,labels,fold,speaker,start,end\na.wav,dog:0.7;cat:0.25,1,ann,0.5,2\na.wav,,,,2,\n"),
        (
            "t.jsonl",
            '{"path": "a.wav", "label": {"dog": 0.7, "cat": 0.25}, "fold": 1, "group": "ann", "start": 0.5, "end": 2}\n'
            '{"path": "a.wav", "start_seconds": 2, "end_seconds": null}\n',
        ),
    ],
)
def test_folds_groups_parts_and_soft_labels(tmp_path: Path, name: str, text: str) -> None:
    path = str(tmp_path / "a.wav")
    assert read_table(table(tmp_path, text, name)) == [
        TableRow(path, "dog:0.7;cat:0.25", fold="1", group="ann", start=0.5, end=2.0),
        TableRow(path, start=2.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,lable,notes\na.wav,x,y\n", r"'lable' \(did you mean 'label'\?\), 'notes'(.|\n)*group \(or speaker\)"),
        ("path,speaker,group\na,b,c\n", "speaker and group are both the group"),
        ("path,start,end\na.wav,1,2\nb.wav,half,1\n", "line 3: start is 'half'"),
        ("path,start,end\na.wav,-1,2\n", "line 2: start is '-1'"),
        ("path,start,end\na.wav,0,nan\n", "line 2: end is 'nan'"),
        ("path,start_seconds,end_seconds\na.wav,2,2\n", "line 2: from 2 s to 2 s"),
        ("path,end\na.wav,0\n", "line 2: from 0 s to 0 s"),
        ("path,start,end\na.wav,1,2\na.wav,2,3\na.wav,1.0,2\n", "line 4: a.wav from 1 s stands in the table twice"),
        ("path;label\na.wav;x\n", "part the columns by commas"),
        ("a/b.wav,dog\nc.wav,cat\n", r"the first line is 'a/b\.wav, dog'"),
        ("label,split\nx,y\n", "none with the path"),
        ("path,file\na,b\n", "path and file are both the path"),
        ("path,label\na.wav,x\nb.wav,x,y\n", "line 3: 3 cells under 2 columns"),
        ("path,label\n,x\n", "line 2: no path"),
        ("path\na.wav\n./a.wav\n", "line 3: ./a.wav stands in the table twice"),
        ("path\n", "no rows"),
        ("", "no rows"),
        (b"path\n\xff\xfe.wav\n", "not UTF-8"),
        ('path\n"a.wav\n', "cannot be read"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        read_table(table(tmp_path, text))


def test_tables_that_cannot_be_in_other_forms(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="line 2: not JSON"):
        read_table(table(tmp_path, '{"path": "a.wav"}\n{"path"\n', "t.jsonl"))
    with pytest.raises(CatalogueError, match=r"line 1: \[1\]"):
        read_table(table(tmp_path, "[1]\n", "t.jsonl"))
    for label, message in [
        ('["a;b"]', "line 1: label is .*names without ';'"),
        ('{"a": 1.5}', "line 1: label is .*a weight from 0 to 1"),
        ('{"a": "much"}', "line 1: label is .*a weight from 0 to 1"),
    ]:
        with pytest.raises(CatalogueError, match=f"(?s){message}"):
            read_table(table(tmp_path, f'{{"path": "a.wav", "label": {label}}}\n', "t.jsonl"))
    with pytest.raises(CatalogueError, match="line 1: split is "):
        read_table(table(tmp_path, '{"path": "a.wav", "split": ["train"]}\n', "t.jsonl"))
    with pytest.raises(CatalogueError, match=r"did you mean .*t\.jsonl"):
        read_table(tmp_path / "tt.jsonl")
    with pytest.raises(CatalogueError, match="not a table by its name"):
        read_table(table(tmp_path, "path\n", "t.xlsx"))


def test_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").touch()
    for name, found in (("", "is a folder"), ("nowhere", "there is no .*nowhere"), ("rows.txt", "not a table by its")):
        with pytest.raises(CatalogueError, match=rf"{found}(.|\n)*\.csv, \.jsonl, \.tsv"):
            read_table(tmp_path / name)
