"""Tables of clips: all formats give the same rows, and errors name the line."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from asit.data.catalogue.columns import identifier, normal
from asit.data.catalogue.tables import TableRow, read_table
from asit.errors import CatalogueError, ConfigError


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
        ("parts.csv", "path,labels,fold,speaker,start,end\na.wav,dog:0.7;cat:0.25,1,ann,0.5,2\na.wav,,,,2,\n"),
        (
            "parts.jsonl",
            '{"path": "a.wav", "label": {"dog": 0.7, "cat": 0.25}, "fold": 1, "group": "ann", "start": 0.5, "end": 2}\n'
            '{"path": "a.wav", "start_seconds": 2, "end_seconds": null}\n',
        ),
    ],
)
def test_tables_of_every_form_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    path = str(tmp_path / "a.wav")
    expected = [TableRow(path, "dog", "train"), TableRow(str(tmp_path / "b, c.wav"))]
    if name.startswith("parts"):
        first = TableRow(path, "dog:0.7;cat:0.25", fold="1", group="ann", start=0.5, end=2.0)
        expected = [first, TableRow(path, start=2.0)]
    assert read_table(table(tmp_path, text, name)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,lable,notes\na.wav,x,y\n", r"columns 'lable' \(did you mean 'label'\?\)\n(.|\n)*group \(or speaker\)"),
        ("path,label,folds\na.wav,x,1\n", "'folds' .did you mean 'fold'"),
        ("path,gruop\na.wav,x\n", "'gruop' .did you mean 'group'"),
        ("path,speaker,group\na,b,c\n", "speaker and group are both the group"),
        ("path,start,end\na.wav,1,2\nb.wav,half,1\n", "line 3: start is 'half'"),
        ("path,start,end\na.wav,-1,2\n", "line 2: start is '-1'"),
        ("path,start,end\na.wav,0,nan\n", "line 2: end is 'nan'"),
        ("path,start_seconds,end_seconds\na.wav,2,2\n", "line 2: from 2 s to 2 s"),
        ("path,end\na.wav,0\n", "line 2: from 0 s to 0 s"),
        ("path,start,end\na.wav,1,2\na.wav,2,3\na.wav,1.0,2\n", "line 4: a.wav from 1 s is in the table twice"),
        ("path;start\na.wav;0,5\n", "line 2: start is '0,5'(.|\n)*with a decimal point"),
        ("path,label\na\rb.wav,dog\n", "line 2: 1 cells under 2 columns(.|\n)*a line break needs quotes"),
        ("path,label\na.wav,dog\n".encode("utf-16-le"), "holds zero bytes: UTF-16 without a byte order mark"),
        ("path,label\na.wav,dög\n".encode("latin-1"), "not UTF-8 text: invalid start byte 0xf6(.|\n)*iconv"),
        ("a/b.wav,dog\nc.wav,cat\n", r"the first line is 'a/b\.wav, dog'"),
        ("label,split\nx,y\n", "no column with the path"),
        ("path,file\na,b\n", "path and file are both the path"),
        ("path,label\na.wav,x\nb.wav,x,y\n", "line 3: 3 cells under 2 columns"),
        ("path,label\n,x\n", "line 2: no path"),
        ("path\na.wav\n./a.wav\n", "line 3: ./a.wav is in the table twice"),
        ("path\n", "no rows"),
        ("", "no rows"),
        (b"path\n\xff\xfe.wav\n", "not UTF-8"),
        ('path\n"a.wav\n', "cannot be read"),
    ],
)
def test_tables_that_cannot_be(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        read_table(table(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sep.csv", "sep=;\npath;label;group\na.wav;dog;é 1\n"),
        ("excel.csv", "\ufeffsep=,\r\n\r\npath,label,group\r\na.wav,dog,é 1\r\n,,\r\n"),
        ("semicolons.csv", "path;label;group\na.wav;dog;é 1\n"),
        ("tabs.csv", "path\tlabel\tgroup\na.wav\tdog\té 1\n"),
        ("commas.tsv", "path, label, group\na.wav, dog, é 1\n"),
        ("returns.csv", "path,label,group\ra.wav,dog,é 1\r"),
        ("utf16.csv", "path,label,group\na.wav,dog,é 1\n".encode("utf-16")),
        ("pandas.csv", ",path,label,group\n0,a.wav,dog,é 1\n"),
        ("trailing.csv", "path,label,group\na.wav,dog,é 1,,\n"),
        ("blanks.csv", "path,label,group\na.wav , dog\t,\u00a0e\u0301   1\u200b\n"),
        ("own.csv", 'path,label,set,group,"note\nof it"\na.wav,dog,x,é 1,"two\nlines"\n'),
        ("hub.jsonl", '{"file_name": "a.wav", "label": "dog", "group": "e\u0301 1", "duration": [1], "x": {"y": 2}}\n'),
    ],
)
def test_tables_as_programs_write_them(tmp_path: Path, name: str, text: str | bytes) -> None:
    assert read_table(table(tmp_path, text, name)) == [TableRow(str(tmp_path / "a.wav"), "dog", group="é 1")]


def test_columns_of_its_own_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = table(tmp_path, "path,label,fold,recordist,licence,gold\na.wav,dog,1,me,CC,x\n")
    assert read_table(path) == read_table(path) == [TableRow(str(tmp_path / "a.wav"), "dog", fold="1")]
    assert caplog.messages == [f"{path}: columns that are not used: 'recordist', 'licence', 'gold'"]


def test_identifiers_are_the_same_whatever_a_file_calls_them() -> None:
    for same, text in [
        (("1", " 1 ", "1.0", "1.", 1, 1.0, np.float32(1), np.int64(1)), "1"),
        (("é b", "e\u0301  b", "\ufeffé\u00a0b", "é\tb\u200b"), "é b"),
        (("True", True), "True"),
        (("", "  ", "nan", "NaN", None, float("nan"), np.float32("nan")), None),
    ]:
        assert {identifier(value) for value in same} == {text}
    assert [identifier(value) for value in ("01", "1.5", "-2.0", "v1.0", 0.5, 1e22)] == [
        *("01", "1.5", "-2", "v1.0", "0.5", "1" + 22 * "0")
    ]
    assert normal("label", " dog : 0.70; cat ;nan") == "dog:0.70;cat"
    with pytest.raises(ValueError, match="half a character"):
        identifier("a\ud800")
    with pytest.raises(ValueError, match="no text"):
        identifier(["a"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("NaN", None),
        ("null", None),
        ('" "', None),
        ("1.0", "1"),
        ("true", "True"),
        ('["dog", 1.0, null, "dog "]', "dog;1;dog"),
        ('{"dog": 0.5, "cat": 1}', "dog:0.5;cat:1.0"),
        ("[]", None),
    ],
)
def test_what_json_has_for_a_label(tmp_path: Path, value: str, text: str | None) -> None:
    (row,) = read_table(table(tmp_path, f'{{"path": "a.wav", "label": {value}}}\n', "t.jsonl"))
    assert row.label == text


def test_names_are_found_as_the_disk_spells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    composed, parted = (unicodedata.normalize(form, "ü/é.wav") for form in ("NFC", "NFD"))
    (tmp_path / composed).parent.mkdir()
    kept = tmp_path / Path(composed).parent / Path(parted).name  # one part in each form
    kept.touch()
    (tmp_path / "b.wav").touch()
    for name, found in [
        (composed, kept),
        (parted, kept),
        (composed.replace("/", "\\"), kept),
        ("~/b.wav", tmp_path / "b.wav"),
        (".\\b.wav", tmp_path / "b.wav"),
        ("C:\\b.wav", tmp_path / "C:\\b.wav"),
        ("gone/é.wav", tmp_path / "gone/é.wav"),
    ]:
        (row,) = read_table(table(tmp_path, f"path\n{name}\n"))
        assert row.path == str(found)
    with pytest.raises(CatalogueError, match=r"line 3: .* is in the table twice"):
        read_table(table(tmp_path, f"path,label\n{composed},a\n{parted},b\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "a.wav"}\n{"path"', "line 2: not a row: it is not JSON"),
        ("[1]", r"line 1: \[1\]"),
        ('{"path": "a.wav", "label": ["a;b"]}', "line 1: label is .*names without ';'"),
        ('{"path": "a.wav", "label": {"a": 1.5}}', "line 1: label is .*a weight from 0 to 1"),
        ('{"path": "a.wav", "label": {"a": "much"}}', "line 1: label is .*a weight from 0 to 1"),
        ('{"path": "a.wav", "label": [["x"]]}', "line 1: label is "),
        ('{"path": "a.wav", "split": ["train"]}', "line 1: split is "),
        ('{"path": "a.wav", "label": "x", "label": "y"}', "line 1: not a row: the key 'label' occurs twice"),
        ("[" * 100_000, "line 1: not a row: it is nested more than 100 deep"),
        (f'{{"path": "a.wav", "fold": {"9" * 5000}}}', "line 1: not a row: it holds an integer of 5000 digits"),
        ('{"path": "a.wav", "label": "\\ud800"}', "line 1: not a row: .*half of a surrogate pair"),
        ('{"path": "\\ud800.wav"}', "line 1: not a row: .*half of a surrogate pair"),
        ('{"\\ud800path": "a.wav"}', "line 1: not a row: .*half of a surrogate pair"),
        ('{"path": ["a.wav"]}', "line 1: path is "),
        ('{"path": "a.wav", "start": true}', "line 1: start is 'True'"),
    ],
    ids=range(15),
)
def test_lines_of_json_that_cannot_be(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(CatalogueError, match=f"(?s){message}"):
        read_table(table(tmp_path, line + "\n", "t.jsonl"))


@pytest.mark.slow
def test_whatever_happens_to_a_table_it_is_read_or_refused(tmp_path: Path) -> None:
    """1,000 damaged tables: no error but those for the user."""
    rng = np.random.default_rng(0)
    tables = {
        "t.csv": b'sep=,\npath,label,split,fold,group,start,note\na.wav,"cat;dog:0.5",train,1.0,x y,0.5,"q"" \n z"\n',
        "t.tsv": "path\tlabel\né\tx\n".encode("utf-16"),
        "t.jsonl": b'{"path":"a.wav","label":["a",1.0,null],"fold":1.0}\n{"path":"b.wav","label":{"a":0.5},"x":[1]}\n',
    }
    pieces = [
        *(b",", b";", b"\t", b"\n", b"\r", b'"', b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"nan", b"Infinity"),
        *(b"-1", b"9" * 4400, b"[" * 4000, b"{", b"}", b"null", b"\\ud800", b"\xed\xa0\x80", b"~nobody/", b"\\"),
        *(b"path", b":", b"=", b" "),
    ]
    read = 0
    for _ in range(1000):
        name = str(rng.choice([*tables]))
        content = bytearray(tables[name])
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(content) + 1))
            content[at : at + int(rng.integers(4))] = pieces[rng.integers(len(pieces))]
        try:
            read += bool(read_table(table(tmp_path, bytes(content), name)))
        except CatalogueError:
            continue
    assert 50 < read < 950


def test_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").touch()
    for name, found in (("", "is a folder"), ("nowhere", "there is no .*nowhere"), ("rows.txt", "not a table by its")):
        with pytest.raises(CatalogueError, match=rf"{found}(.|\n)*\.csv, \.jsonl, \.parquet, \.tsv"):
            read_table(tmp_path / name)
    table(tmp_path, "path\n", "t.jsonl")
    with pytest.raises(CatalogueError, match=r"did you mean .*t\.jsonl"):
        read_table(tmp_path / "tt.jsonl")


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ("file_name,label", {"path": "a.wav", "label": "1"}),
        ("Audiofilename,Starttime,Endtime,species", {"path": "a.wav", "start": 1.0, "end": 2.0, "label": "3"}),
        ("begin_file,onset,offset,event_label", {"path": "a.wav", "start": 1.0, "end": 2.0, "label": "3"}),
        ("audio,label:species", {"path": "a.wav", "label": "1"}),
        ("audio_filepath,offset,duration", {"path": "a.wav"}),
        ("path,audio,species,label", {"path": "a.wav", "label": "3"}),
        ("species,class_name,filepath", {"path": "2", "label": "a.wav"}),
    ],
)
def test_names_of_other_programs_are_known(tmp_path, header, wanted):
    table = tmp_path / "t.csv"
    cells = ["a.wav", "1", "2", "3"][: header.count(",") + 1]
    table.write_text(f"{header}\n{','.join(cells)}\n")
    (row,) = read_table(table)
    found = {name: getattr(row, name) for name in ("label", "start", "end") if getattr(row, name) is not None}
    assert found | {"path": Path(row.path).name} == wanted


def test_columns_name_the_columns(tmp_path, caplog):
    table = tmp_path / "t.csv"
    table.write_text("slice_file_name,start,end,class,Species Name\nx.wav,7,9,dog,wolf\n")
    how = "path=slice_file_name, label=species name,start=,end="
    with caplog.at_level("INFO"):
        assert read_table(table, how) == [TableRow(str(tmp_path / "x.wav"), "wolf")]
    assert "path from 'slice_file_name', label from 'Species Name'" in caplog.text
    assert "not used: 'start', 'end', 'class'" in caplog.text
    with pytest.raises(CatalogueError, match=r"no column 'specis name'(?s:.*)did you mean species name"):
        read_table(table, "label=specis name")
    for wrong in ("lable=class", "label", "label=a,label=b"):
        with pytest.raises(ConfigError, match="columns"):
            read_table(table, wrong)


def test_parquet_equals_csv(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "t.csv").write_text("path,label,fold,start,end\na.wav,dog;cat,1,,\nb.wav,,2,0.5,1.5\n")
    rows = {
        "path": ["a.wav", "b.wav"],
        "label": [["dog", "cat"], None],
        "fold": [1, 2],
        "start": [None, 0.5],
        "end": [float("nan"), 1.5],
    }
    parquet.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert read_table(tmp_path / "t.parquet") == read_table(tmp_path / "t.csv")
    parquet.write_table(pa.table(rows | {"start": [0.0, -1.0]}), tmp_path / "t.parquet")
    with pytest.raises(CatalogueError, match=r"t\.parquet, line 2: start is '-1\.0'"):
        read_table(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-9])
    with pytest.raises(CatalogueError, match=r"t\.parquet cannot be read"):
        read_table(tmp_path / "t.parquet")
