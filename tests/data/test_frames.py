"""Tables in memory give the catalogue that a CSV gives; pandas, polars, datasets, pyarrow and lists."""

import dataclasses
import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asit
from asit.config import TableSettings
from asit.data.catalogue import frames, scan
from asit.data.catalogue.inputs import expand
from asit.data.catalogue.tables import TableRow, read_table
from asit.errors import CatalogueError

CSV = "file_name,species,fold,start,end,note\none.wav,dog;cat,1,,,x\ntwo.wav,,2,0.5,1.5,\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for name in ("one.wav", "two.wav"):
        soundfile.write(tmp_path / "data" / name, np.random.default_rng(0).normal(0, 0.1, 16000), 8000)
    (tmp_path / "data" / "t.csv").write_text(CSV)
    monkeypatch.chdir(tmp_path / "data")
    return tmp_path / "data"


def rows():
    return [
        {"file_name": "one.wav", "species": ["dog", "cat"], "fold": 1, "start": None, "end": None, "note": "x"},
        {"file_name": Path("two.wav"), "species": None, "fold": np.int64(2), "start": 0.5, "end": np.float32(1.5)},
    ]


def tables(folder):
    yield "a list of dicts", rows()
    yield "a list of TableRow", read_table(folder / "t.csv")
    pandas = pytest.importorskip("pandas")
    yield "pandas", pandas.read_csv(folder / "t.csv")
    yield "pandas with missing values of its own", pandas.read_csv(folder / "t.csv").convert_dtypes()
    pa = pytest.importorskip("pyarrow")
    yield "pyarrow", pa.Table.from_pandas(pandas.read_csv(folder / "t.csv"))


def test_a_table_in_memory_gives_the_catalogue_of_the_csv(folder):
    how = {"workers": 1, "statistics_clips": 2}
    wanted = scan.build("t.csv", folder / "w.jsonl", **how)
    for name, table in tables(folder):
        found = asit.build_catalogue(table, folder / "f.jsonl", **how)
        assert (folder / "f.jsonl").read_bytes() == (folder / "w.jsonl").read_bytes(), name
        assert found.digest == wanted.digest
        assert [item.name for item in expand(table)] == ["one.wav", "two.wav"]


def test_polars_and_datasets(folder):
    for name, make in (("polars", "read_csv"), ("datasets", "Dataset")):
        package = pytest.importorskip(name)
        table = package.read_csv("t.csv") if make == "read_csv" else package.Dataset.from_csv("t.csv")
        scan.build("t.csv", folder / "w.jsonl", workers=1, statistics_clips=0)
        scan.build(table, folder / "f.jsonl", workers=1, statistics_clips=0)
        assert (folder / "f.jsonl").read_bytes() == (folder / "w.jsonl").read_bytes()


@dataclasses.dataclass(frozen=True)
class Audio:
    decode: bool = True


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    names: tuple[str, ...]


class Dataset:
    """What `datasets.Dataset` offers of which `stored` makes use."""

    def __init__(self, rows, features):
        self.rows, self.features, self.column_names = rows, features, list(features)

    def cast_column(self, column, feature):
        return Dataset(self.rows, self.features | {column: feature})

    def __iter__(self):
        assert not any(getattr(feature, "decode", False) for feature in self.features.values())
        return iter(self.rows)


def test_a_dataset_with_classes_and_audio_as_bytes(folder):
    content = io.BytesIO()
    soundfile.write(content, np.random.default_rng(1).normal(0, 0.1, 8000), 8000, format="FLAC")
    features = {"audio": Audio(), "label": ClassLabel(("cat", "dog"))}
    first = [{"audio": {"path": str(folder / "one.wav"), "bytes": None}, "label": 1}]
    second = [{"audio": {"path": "x.flac", "bytes": content.getvalue()}, "label": -1}]
    kept = read_table(frames.stored({"train": Dataset(first, features), "test": Dataset(second, features)}))
    assert [(row.label, row.split) for row in kept] == [("dog", "train"), (None, "test")]
    assert kept[0].path == str(folder / "one.wav")
    assert Path(kept[1].path).read_bytes() == content.getvalue()
    assert kept[1].path.endswith(".flac")


def test_the_same_rows_are_one_file_and_columns_are_named_here(folder):
    odd = [{"where": "one.wav", "animal": "wolf"}]
    how = TableSettings(columns={"path": "where", "label": "animal"})
    name, taken = frames.take(odd, how)
    assert frames.take(odd, how)[0] == name
    assert taken == TableSettings()
    assert read_table(name) == [TableRow(str(folder / "one.wav"), "wolf")]
    assert frames.take("t.csv", how) == ("t.csv", how)


def test_what_is_no_table_is_refused(folder):
    for data, message in (
        ([], "no rows"),
        (3, "the data are a int"),
        ([3], "row 1 is a int"),
        ({"path": ["one.wav"]}, "the data are a dict"),
        ([{"path": "one.wav"}, {"path": None}], "row 2: path is None"),
        ([{"path": {"array": [0.0], "sampling_rate": 8000}}], "row 1: path is None"),
        ([{"name": "one.wav"}], "the data: no column with the path"),
    ):
        with pytest.raises(CatalogueError, match=message):
            frames.stored(data)


def test_windows_of_a_table_in_memory(folder):
    parts = [{"path": "one.wav", "label": "dog", "start": 0.2, "end": 0.8}]
    made = scan.build(parts, folder / "c.jsonl", table=TableSettings(window=1, background=True), statistics_clips=0)
    assert [(clip.start, clip.label, clip.group) for clip in made] == [
        (0.0, "dog", "one.wav"),
        (1.0, "background", "one.wav"),
    ]
    assert made.header["root"] == os.path.realpath(folder)
