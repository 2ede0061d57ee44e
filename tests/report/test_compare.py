"""Tables of finished runs: columns, seeds, paired differences, and what cannot be compared."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from asit.errors import AsitError, ConfigError
from asit.evaluate.metrics import paired_difference
from asit.report import comparison_table
from asit.report.compare import compare


def lines(text: str) -> list[list[str]]:
    """Cells of all Markdown rows."""
    found = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in found if row[0] != "---"]


def test_two_runs_and_their_paired_difference(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    weak, strong = make.example(words, 100, 1.5), make.example(words, 100, 3.0, seed=1)
    first = make.run(tmp_path / "scratch", weak, fresh=True)
    second = make.run(tmp_path / "pretrained", strong, sampling={"share": 0.1}, epochs=100)
    order = np.random.default_rng(0).permutation(100)
    strong.write_scores(second, order=order)  # another order of clips must not matter
    found = compare([first, second], seed=3)
    text = comparison_table.markdown(found)
    head, one, two, _, difference = lines(text)
    assert head[:2] == ["run", "started from"]
    low, high = weak.record()["metrics"]["accuracy"]["interval"]
    accuracy = float((weak.scores.argmax(1) == weak.truth).mean())
    assert one[2:] == [
        *("words", "test", "last", "all", "4"),
        f"accuracy {accuracy:.3f} ({low:.3f} to {high:.3f})",
        *("100", weak.record()["list"]),
    ]
    assert two[5:7] == ["10 %", "100"]
    by_id = np.argsort(np.array(strong.ids))
    want = paired_difference(strong.scores[by_id], weak.scores[by_id], strong.truth[by_id], "accuracy", seed=3)
    ends = "{:+.3f} to {:+.3f}".format(*want["interval"])
    assert difference == [str(second), "last", "accuracy", f"{want['difference']:+.3f} ({ends})", "100"]
    assert found.differences[0].value.value == pytest.approx(
        (strong.scores.argmax(1) == strong.truth).mean() - accuracy
    )
    assert found.warnings == []
    assert found.seeds == []
    # On a terminal, columns that are the same in all rows are named once.
    short = comparison_table.markdown(found, compact=True)
    common = f"started from runs/a/model; task words; split test; weights last; clips 100; list {weak.record()['list']}"
    assert short.startswith(f"Of all: {common}\n")
    assert lines(short)[:2] == [["run", "labels", "epochs", "score (95 % interval)"], [one[0], "all", "4", one[7]]]


def test_several_labels_are_compared_by_map(tmp_path: Path, make: SimpleNamespace) -> None:
    names = [f"sound {i}" for i in range(6)]
    examples = [make.example(names, 80, skill, multi=True) for skill in (1.0, 3.0)]
    runs = [make.run(tmp_path / str(i), example) for i, example in enumerate(examples)]
    found = compare(runs)
    assert [row.metric for row in found.rows] == ["mAP", "mAP"]
    values = [example.record()["metrics"]["mAP"]["value"] for example in examples]
    (difference,) = found.differences
    assert difference.value.value == pytest.approx(values[1] - values[0], abs=1e-6)
    assert 0 < difference.value.low < difference.value.value < difference.value.high


def test_seeds_are_put_together(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    examples = [make.example(words, 100, 2.0, seed=i) for i in range(3)]
    runs = [make.run(tmp_path / f"seed-{i}", example, seed=i) for i, example in enumerate(examples)]
    other = make.run(tmp_path / "other", examples[0], seed=5, epochs=9)
    found = compare([*runs, other])
    (group,) = found.seeds
    values = [float((e.scores.argmax(1) == e.truth).mean()) for e in examples]
    assert group.values == pytest.approx(values)
    assert (group.mean, group.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert f"accuracy {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f} | 3 |" in comparison_table.markdown(found)
    # the same seed twice is no spread over seeds
    again = make.run(tmp_path / "again", examples[0], seed=0)
    assert compare([runs[0], again]).seeds == []


def test_other_lists_of_clips_are_warned_about(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    first = make.run(tmp_path / "a", make.example(words, 100, 2.0))
    second = make.run(tmp_path / "b", make.example(words, 90, 2.0))
    found = compare([first, second])
    assert found.differences == []
    (warning,) = found.warnings
    assert "words, test: 2 different lists of clips, so scores cannot be compared" in warning
    assert f"(90 clips) in {second}" in warning
    assert f"Warning: {warning}" in comparison_table.markdown(found)


def test_a_cross_validation_is_one_line(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    examples = [[make.example(words, 50, skill, seed=i, prefix=f"fold{i}") for i in range(3)] for skill in (2.0, 3.0)]
    runs = [make.folds(tmp_path / str(i), folds) for i, folds in enumerate(examples)]
    found = compare(runs)
    values = [[float((e.scores.argmax(1) == e.truth).mean()) for e in folds] for folds in examples]
    assert [row.value.value for row in found.rows] == pytest.approx([np.mean(v) for v in values])
    assert [row.deviation for row in found.rows] == pytest.approx([np.std(v, ddof=1) for v in values])
    assert [(row.folds, row.clips) for row in found.rows] == [(3, 150), (3, 150)]
    assert (
        f"accuracy {np.mean(values[0]):.3f} ± {np.std(values[0], ddof=1):.3f} over 3 folds"
        in comparison_table.markdown(found)
    )
    # all folds' clips together
    assert found.differences[0].clips == 150
    assert found.differences[0].value.value == pytest.approx(np.mean(values[1]) - np.mean(values[0]))


def test_groups_are_drawn_where_the_run_drew_them(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    examples = [make.example(words, 100, skill) for skill in (2.0, 2.5)]
    runs = [make.run(tmp_path / str(i), example) for i, example in enumerate(examples)]
    over_clips = compare(runs).differences[0]
    for run in runs:
        held = json.loads((run / "results.json").read_text())
        held["results"][0]["bootstrap"] = {"unit": "group", "units": 5}
        (run / "results.json").write_text(json.dumps(held))
    over_groups = compare(runs).differences[0]
    speakers = np.array([f"speaker {i % 5}" for i in range(100)])
    want = paired_difference(*(e.scores for e in examples[::-1]), examples[0].truth, "accuracy", groups=speakers)
    assert [over_groups.value.low, over_groups.value.high] == want["interval"]
    assert over_groups.value.low != over_clips.value.low


def test_runs_without_scores(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    done = make.run(tmp_path / "done", make.example(words, 50, 2.0))
    going = make.run(tmp_path / "going", None)
    folds = make.folds(tmp_path / "cv", [make.example(words, 50, 3.0)], finished=False)
    make.run(folds / "fold-2", None)
    text = comparison_table.markdown(compare([done, going, folds]))
    assert f"No score: {going} is not finished. Still running, or cut off: the last record is of step 50" in text
    assert f"No score: {folds} is not finished: 1 folds scored, still to do: 2" in text
    assert len(lines(text)) == 2
    pretraining = tmp_path / "pretraining"
    pretraining.mkdir()
    (pretraining / "config.yaml").write_text("preset: default\n")
    with pytest.raises(AsitError, match="is a pretraining run, which has no scores"):
        compare([done, pretraining])
    with pytest.raises(AsitError, match="nowhere is not there"):
        compare([done, tmp_path / "nowhere"])


def test_a_split_can_be_chosen(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    example = make.example(words, 50, 2.0)
    run = make.run(tmp_path / "run", example, best=True)
    held = json.loads((run / "results.json").read_text())
    held["results"].append(example.record(split="validation"))
    (run / "results.json").write_text(json.dumps(held))
    assert [(row.split, row.weights) for row in compare([run]).rows] == [("test", "last"), ("test", "best")]
    assert [row.split for row in compare([run], split="validation").rows] == ["validation"]
    with pytest.raises(AsitError, match="no run has a score on the split dev"):
        compare([run], split="dev")


def test_files_of_records(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    example = make.example(words, 50, 2.0)
    run, path = make.run(tmp_path / "run", example), tmp_path / "probe.json"
    record = example.record("linear probe", None)
    for held in ([record], {"model": "runs/a/model", "results": [record]}, record):
        path.write_text(json.dumps(held))
        found = compare([run, path])
        assert found.rows[1].weights == "linear probe"
        assert found.rows[1].start == ("runs/a/model" if "results" in held else "")
        assert found.warnings == [
            f"no paired difference between {path} and {run}: {path} keeps no scores of single clips"
        ]
    drawn = [record | {"labels": "10 %", "seed": seed} for seed in range(3)]
    path.write_text(json.dumps({"results": [record | {"labels": "all", "seed": 0}, *drawn]}))
    found = compare([path])
    assert [(row.labels, row.seed) for row in found.rows] == [("all", 0), ("10 %", 0), ("10 %", 1), ("10 %", 2)]
    assert [(group.row.labels, len(group.values)) for group in found.seeds] == [("10 %", 3)]
    trials = {"EER": {"value": 0.125, "interval": [0.1, 0.15]}, "minDCF": {"value": 0.7, "interval": None}}
    path.write_text(json.dumps([{"split": "test", "weights": "class", "clips": 9, "list": "ab", "metrics": trials}]))
    assert "EER 0.125 (0.100 to 0.150)" in comparison_table.markdown(compare([path]))
    path.write_text("[]")
    with pytest.raises(AsitError, match=r"probe\.json holds no result records"):
        compare([path])
    path.write_text("x")
    with pytest.raises(ConfigError, match=r"probe\.json is no JSON"):
        compare([path])


def test_labels_that_disagree_are_named(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    examples = [make.example(words, 50, 2.0, seed=i) for i in range(2)]
    runs = [make.run(tmp_path / str(i), example) for i, example in enumerate(examples)]
    examples[1].indices = np.roll(examples[1].indices, 1)
    examples[1].write_scores(runs[1])
    found = compare(runs)
    assert found.differences == []
    assert "50 clips have other labels in the one than in the other" in found.warnings[0]
    (runs[1] / "scores" / "test-last.npz").unlink()
    assert "test-last.npz is not there" in compare(runs).warnings[0]


def test_csv_and_json(tmp_path: Path, make: SimpleNamespace, words: list[str]) -> None:
    examples = [make.example(words, 50, 2.0, seed=i) for i in range(2)]
    runs = [make.run(tmp_path / f"a|{i}", example, seed=i) for i, example in enumerate(examples)]
    found = compare(runs)
    comparison_table.write(found, tmp_path / "new" / "table.csv")
    with (tmp_path / "new" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == ["score", "score", "seeds"]
    assert [float(row["value"]) for row in rows[:2]] == [row.value.value for row in found.rows]
    assert float(rows[1]["difference"]) == found.differences[0].value.value
    assert (rows[2]["seeds"], float(rows[2]["deviation"])) == ("2", found.seeds[0].deviation)
    comparison_table.write(found, tmp_path / "table.json")
    held = json.loads((tmp_path / "table.json").read_text())
    assert held["differences"][0]["interval"] == [found.differences[0].value.low, found.differences[0].value.high]
    assert held["rows"][0]["list"] == examples[0].record()["list"]
    assert held["rows"][0]["deviation"] is None
    comparison_table.write(found, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == comparison_table.markdown(found)
    assert "a\\|0" in comparison_table.markdown(found)
    with pytest.raises(ConfigError, match=r"table\.txt\n  expected: a name that ends in \.md, \.csv, \.json"):
        comparison_table.write(found, tmp_path / "table.txt")
    assert not re.findall(r"\.tmp$", " ".join(p.name for p in tmp_path.iterdir()))


def test_the_verb(tmp_path: Path, make: SimpleNamespace, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from asit.cli import main

    runs = [str(make.run(tmp_path / str(i), make.example(words, 50, 2.0, seed=i))) for i in range(2)]
    assert main(["compare", *runs, "--out", str(tmp_path / "table.md")]) == 0
    out, _ = capsys.readouterr()
    written = (tmp_path / "table.md").read_text()
    assert "| list |" in written
    assert "| list |" not in out
    assert out[out.index("Difference to") :] == written[written.index("Difference to") :]
    assert main(["compare", *runs, "--out", "table.xls"]) == 2
    assert "table.xls" in capsys.readouterr().err
    assert main(["report", runs[0]]) == 0
    assert capsys.readouterr().out.strip() == f"{runs[0]}/report.html"
