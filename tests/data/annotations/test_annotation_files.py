"""Annotation files, written here after their public descriptions, against values by hand and against crowsetta."""

import shutil

import crowsetta
import numpy as np
import pytest
import soundfile

from asit.data.annotations import audacity, raven, textgrid
from asit.data.annotations.annotation_files import kind_of, read_annotations
from asit.errors import CatalogueError

RAVEN = (
    "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tLow Freq (Hz)\tHigh Freq (Hz)\tAnnotation\n"
    "1\tWaveform 1\t1\t0.500000000\t1.250000000\t0\t24000\t\n"
    "1\tSpectrogram 1\t1\t0.500000000\t1.250000000\t2878.2\t4049.0\tEATO\n"
    "2\tSpectrogram 1\t1\t1.000000000\t3.000000000\t3189.0\t9180.4\tCORA\n"
)
AUDACITY = "2.150000\t2.150000\tpoint label\n3.400000\t6.100000\tregion label\n\\\t1484.669312\t2969.338523\n7\t8\t\n"
LONG = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.3
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "Mary"
        xmin = 0
        xmax = 2.3
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.7
            text = ""
        intervals [2]:
            xmin = 0.7
            xmax = 1.6
            text = "the ""œuf"" ! 3"
        intervals [3]:
            xmin = 1.6
            xmax = 2.3
            text = "two
lines"
    item [2]:
        class = "TextTier"
        name = "bell"
        xmin = 0
        xmax = 2.3
        points: size = 1
        points [1]:
            number = 1.5e0
            mark = "ding"
"""
SHORT = """File type = "ooTextFile"
Object class = "TextGrid"

! a comment with 3 and "text"
0
2.3
<exists>
2
"IntervalTier" "Mary" 0 2.3 3 ! the first tier
0 0.7 "" 0.7 1.6
"the ""œuf"" ! 3"
1.6
2.3
"two
lines"
"TextTier"
"bell"
0
2.3
1
1.5
"ding"
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("rec.wav", "talk.flac", "bird.v2.wav", "deep/far.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, 8 * 8000), 8000)
    return tmp_path


def boxes(path, label=""):
    return [(row.path, row.start, row.end, row.label) for row in read_annotations(path, label)[0]]


def test_raven_rows_beside_the_recording(folder):
    table = folder / "bird.v2.Table.1.selections.txt"
    table.write_text(RAVEN)
    wav = str(folder / "bird.v2.wav")
    assert boxes(table) == [(wav, 0.5, 1.25, None), (wav, 0.5, 1.25, "EATO"), (wav, 1.0, 3.0, "CORA")]
    assert boxes(table, "view")[0][3] == "Waveform 1"


def test_raven_equals_crowsetta(folder):
    table = folder / "rec.txt"
    table.write_text("".join(line for line in RAVEN.splitlines(True) if "Waveform" not in line))
    oracle = crowsetta.formats.bbox.Raven.from_file(table, annot_col="Annotation").to_annot().bboxes
    found = raven.read_selection_table(table)
    assert [(box.start, box.end, box.label) for box in found] == [(one.onset, one.offset, one.label) for one in oracle]


def test_raven_names_recordings_by_path_file_and_name_in_the_folder(folder):
    head = "Selection\tBegin Time (s)\tEnd Time (s)\tBegin Path\tBegin File\tFile Offset (s)\tSpecies\n"
    rows = f"1\t1\t2\t{folder}/talk.flac\t\t1\towl\n2\t65.0\t66.5\tD:\\field\\far.wav\tfar.wav\t5.0\twren\n"
    (folder / "all.selections.txt").write_text(head + rows + "3\t1\t2\t\tgone.wav\t1\tjay\n")
    wanted = [("talk.flac", 1.0, 2.0, "owl"), ("deep/far.wav", 5.0, 6.5, "wren"), ("gone.wav", 1.0, 2.0, "jay")]
    assert boxes(folder) == [(str(folder / name), *rest) for name, *rest in wanted]


def test_raven_labels_of_birdnet(folder):
    head = "Selection\tView\tChannel\tBegin Time (s)\tEnd Time (s)\tCommon Name\tSpecies Code\tConfidence\tBegin Path\t"
    row = f"1\tSpectrogram 1\t1\t3.0\t6.0\tGreat Tit\tgretit1\t0.9\t{folder}/rec.wav\t3.0\n"
    (folder / "rec.BirdNET.selection.table.txt").write_text(head + "File Offset (s)\n" + row)
    assert boxes(folder) == [(str(folder / "rec.wav"), 3.0, 6.0, "Great Tit")]


def test_label_track(folder):
    (folder / "rec.txt").write_text(AUDACITY)
    (folder / "README.txt").write_text("Recorded by me\n")
    (folder / "talk.txt").write_text("a transcript\n")
    wav = str(folder / "rec.wav")
    assert boxes(folder) == [(wav, 2.15, 2.15, "point label"), (wav, 3.4, 6.1, "region label"), (wav, 7.0, 8.0, None)]


def test_label_track_equals_crowsetta(folder):
    track = folder / "rec.txt"
    track.write_text("0.0\t0.25\ta\n0.3\t1.125\tb c\n")
    oracle = crowsetta.formats.seq.AudSeq.from_file(track).to_seq()
    found = audacity.read_label_track(track)
    assert [box.start for box in found] == oracle.onsets_s.tolist()
    assert [box.end for box in found] == oracle.offsets_s.tolist()
    assert [box.label for box in found] == oracle.labels.tolist()


def test_an_empty_label_track_is_a_recording_in_which_nothing_was_heard(folder):
    (folder / "rec.txt").write_text("")
    assert read_annotations(folder / "rec.txt") == ([], [str(folder / "rec.wav")])


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_textgrid(folder, text, encoding):
    grid = folder / "talk.TextGrid"
    text = ("\ufeff" if encoding == "utf-16-be" else "") + text
    grid.write_bytes(text.replace("\n", "\r\n" if encoding == "utf-16" else "\n").encode(encoding))
    flac = str(folder / "talk.flac")
    assert boxes(grid, "Mary") == [(flac, 0.7, 1.6, 'the "œuf" ! 3'), (flac, 1.6, 2.3, "two lines")]
    assert boxes(grid, "bell") == [(flac, 1.5, 1.5, "ding")]


def test_textgrid_equals_crowsetta(folder):
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n2.3\n<exists>\n1\n'
    short = head + '"IntervalTier"\n"Mary"\n0\n2.3\n2\n0\n0.7\n""\n0.7\n2.3\n"the end"\n'
    for text in (LONG, short):
        grid = folder / "talk.TextGrid"
        grid.write_text(text.replace("two\nlines", "two"))
        oracle = crowsetta.formats.seq.TextGrid.from_file(grid).to_seq(tier="Mary")
        found = textgrid.read_textgrid(grid, "Mary")
        kept = [i for i, label in enumerate(oracle.labels) if label]
        assert [box.start for box in found] == oracle.onsets_s[kept].tolist()
        assert [box.end for box in found] == oracle.offsets_s[kept].tolist()


def test_a_tier_is_asked_for_where_several_have_annotations(folder):
    (folder / "talk.TextGrid").write_text(LONG)
    with pytest.raises(CatalogueError, match="2 tiers: 'Mary', 'bell'"):
        read_annotations(folder)
    with pytest.raises(CatalogueError, match=r"no tier 'Marie'.*did you mean Mary"):
        read_annotations(folder, "Marie")
    (folder / "talk.TextGrid").write_text(LONG.replace('"ding"', '""'))
    assert len(boxes(folder)) == 2


DAMAGED = {
    "a time of Raven": ("rec.txt", RAVEN.replace("3.000000000", "3,0"), "line 4: End Time \\(s\\) is '3,0'"),
    "the order of Raven": ("rec.txt", RAVEN.replace("3.000000000", "0.5"), "line 4: from 1 s to 0.5 s"),
    "a cell of Raven": ("rec.txt", RAVEN.replace("\tCORA", ""), "line 4: 7 cells under 8 columns"),
    "a column of Raven": ("rec.txt", RAVEN.replace("End Time (s)", "End"), "line 1: 0 columns 'End Time"),
    "a time of Audacity": ("rec.txt", AUDACITY.replace("6.100000", "x"), "line 2: end is 'x'"),
    "the order of Audacity": ("rec.txt", AUDACITY.replace("6.100000", "1.5"), "line 2: from 3.4 s to 1.5 s"),
    "the separator of Audacity": ("rec.txt", AUDACITY.replace("\t", " "), "line 1: '2.150000 2.150000 point label'"),
    "a negative time": ("rec.txt", "-1\t1\ta\n", "line 1: start is '-1'"),
    "a cut TextGrid": ("rec.TextGrid", LONG[:-30], "line 35: the end of the file in place of"),
    "a TextGrid's number": ("rec.TextGrid", LONG.replace("0.7", "zero"), "line 18: text in place of xmax"),
    "a TextGrid's count": ("rec.TextGrid", LONG.replace("intervals: size = 3", "size = 9"), "line 29: text 'TextTier'"),
    "a TextGrid's order": ("rec.TextGrid", LONG.replace("xmax = 1.6", "xmax = 0.1"), "line 21: from 0.7 s to 0.1 s"),
    "another file of Praat": ("rec.TextGrid", LONG.replace('"TextGrid"', '"Pitch 1"'), 'line 2: "Pitch 1"'),
    "no file of Praat": ("rec.TextGrid", "nothing", "line 1: the end of the file in place of"),
    "zero bytes": ("rec.TextGrid", LONG.replace("\n", "\0\n"), "zero bytes"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_refused_with_its_name_line_and_field(folder, what):
    name, text, message = DAMAGED[what]
    (folder / name).write_text(text)
    with pytest.raises(CatalogueError, match=f"(?s){name}.*{message}"):
        read_annotations(folder / name)


def test_other_encodings_are_refused(folder):
    (folder / "rec.txt").write_bytes("0\t1\tgrünspecht\n".encode("latin-1"))
    with pytest.raises(CatalogueError, match=r"rec\.txt is not UTF-8 text"):
        read_annotations(folder / "rec.txt")


def test_no_recording_or_several(folder):
    (folder / "Label Track.txt").write_text(AUDACITY)
    with pytest.raises(CatalogueError, match=r"Label Track\.txt names no recording(?s:.*)Label Track\.wav"):
        read_annotations(folder / "Label Track.txt")
    (folder / "rec.txt").write_text(AUDACITY)
    shutil.copy(folder / "rec.wav", folder / "rec.flac")
    with pytest.raises(CatalogueError, match=r"may belong to .*rec\.flac or .*rec\.wav"):
        read_annotations(folder / "rec.txt")
    with pytest.raises(CatalogueError, match="holds no annotations"):
        read_annotations(folder / "deep")
    with pytest.raises(CatalogueError, match="there is no "):
        read_annotations(folder / "absent")


def test_kinds_are_told_by_their_first_line(folder):
    for name, text, alone, inside in (
        ("a.txt", RAVEN, "Raven selection table", "Raven selection table"),
        ("a.tsv", RAVEN, "Raven selection table", "Raven selection table"),
        ("a.txt", AUDACITY, "Audacity label track", "Audacity label track"),
        ("a.txt", "hello", "Audacity label track", None),
        ("a.csv", "path,label\n", None, None),
        ("a.textgrid", "", "Praat TextGrid", "Praat TextGrid"),
    ):
        (folder / name).write_text(text)
        assert kind_of(folder / name) == alone
        assert kind_of(folder / name, alone=False) == inside
    assert kind_of(folder / "rec.wav") is None
