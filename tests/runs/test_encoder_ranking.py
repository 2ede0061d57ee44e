"""Several encoders compared on the same clips: numbers against loops and SciPy, failures, speed, table and picture."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import soundfile
import torch

from asit import cli
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, ConfigError
from asit.evaluate import encoder_speed
from asit.evaluate.bootstrap import DRAWS
from asit.evaluate.encoder_ranking import rank_encoders, short_names
from asit.evaluate.frozen import evaluate_frozen, open_catalogue
from asit.evaluate.frozen_scores import FrozenSettings
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder
from asit.report import ranking_table, report
from asit.runtime import World

ALONE = World(0, 1, torch.device("cpu"), "")
CLASSES = ("low", "mid", "high")


def encoder(folder: Path, rate: int, mels: int, width: int, seed: int) -> str:
    settings = EncoderSettings(size="custom", width=width, depth=2, heads=2, patch_frames=16, patch_mels=16)
    made = Encoder(settings, 48, mels)
    made.init_weights(torch.Generator().manual_seed(seed))
    front_end = FrontEndSettings(rate=rate, mels=mels, mean=-8.0, std=3.5)
    AudioModel.from_parts(made, front_end, settings, 48, {"step": 0}).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encoders of other rates and widths, a folder that is none, and 90 noisy notes of three pitches."""
    folder = tmp_path_factory.mktemp("room")
    encoder(folder / "wide" / "model", 16000, 64, 48, 0)
    encoder(folder / "small" / "model", 8000, 32, 16, 1)
    (folder / "broken").mkdir()
    rng, t = np.random.default_rng(0), np.arange(4000) / 8000
    with (folder / "notes.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["path", "label", "split", "speaker"])
        for i in range(90):
            hertz = (300, 500, 800)[i % 3] * rng.uniform(0.7, 1.4)
            wave = 0.1 * np.sin(2 * np.pi * hertz * t) + 0.1 * rng.standard_normal(len(t))
            soundfile.write(folder / f"{i:02d}.wav", wave.astype(np.float32), 8000, subtype="FLOAT")
            lines.writerow([f"{i:02d}.wav", CLASSES[i % 3], "train" if i < 45 else "test", f"s{i // 5}"])
    return folder


def models(room: Path) -> list[str]:
    return [str(room / "small" / "model"), str(room / "broken"), str(room / "wide" / "model")]


@pytest.fixture(scope="module")
def ranked(room: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_speed, "ROUNDS", (2, 2))
        found = rank_encoders(models(room), str(room / "notes.csv"), FrozenSettings(baselines=True), world=ALONE)
    assert found is not None
    return found


def right(room: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Whether the linear probe of one encoder alone is right (N,), and the group of each clip (N,)."""
    model = AudioModel.load(room / name / "model")
    catalogue = open_catalogue(str(room / "notes.csv"), model, ALONE, bad_files=0.0)
    kept: list[Any] = []
    settings = FrozenSettings(probes=("linear",))
    found = evaluate_frozen(model, catalogue, settings, world=ALONE, keep=lambda record, scored: kept.append(scored))
    assert found is not None
    clips: Catalogue = catalogue.subset(kept[0].rows)
    truth = [found.classes.index(str(label)) for label in clips.texts("label")]
    return kept[0].scores.argmax(1) == truth, np.array([int(str(group)[1:]) for group in clips.texts("group")])


def rows_of(ranked: dict[str, Any], probe: str) -> list[dict[str, Any]]:
    return [row for row in ranked["scores"] if row["probe"] == probe]


def test_rows_are_ordered_by_their_scores(ranked: dict[str, Any]) -> None:
    for probe in ("linear", "knn"):
        rows = rows_of(ranked, probe)
        assert {row["encoder"] for row in rows} == {"small", "wide", "untrained", "log-mel statistics"}
        values = [row["value"] for row in rows]
        assert values == sorted(values, reverse=True)
        assert [row["against"] for row in rows] == [None] + [rows[0]["encoder"]] * 3
        for row in rows[1:]:
            assert row["difference"] == pytest.approx(row["value"] - rows[0]["value"])


def test_differences_are_those_of_a_loop_and_of_scipy(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_speed, "ROUNDS", (1, 1))
    found = rank_encoders(models(room)[::2], str(room / "notes.csv"), FrozenSettings(probes=("linear",)), world=ALONE)
    assert found is not None
    rows = {row["encoder"]: row for row in found["scores"]}
    two, one = rows  # the best first
    (first, groups), (second, _) = right(room, one), right(room, two)
    hits = {one: first, two: second}
    for name, own in hits.items():
        assert rows[name]["value"] == pytest.approx(own.mean())
    names, member = np.unique(groups, return_inverse=True)
    rng, drawn = np.random.default_rng([0, len(names)]), []
    for _ in range(DRAWS):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))[member]
        drawn.append(
            sum(t * (int(a) - int(b)) for t, a, b in zip(times, hits[one], hits[two], strict=True)) / sum(times)
        )
    centre = hits[one].mean() - hits[two].mean()
    low, high = np.quantile(np.array(drawn) - np.mean(drawn) + centre, [0.025, 0.975])
    assert rows[one]["difference_interval"] == pytest.approx([low, high])
    by_group = [[int(hits[n][member == g].sum()) for g in range(len(names))] for n in (one, two)]
    theirs = scipy.stats.bootstrap(
        by_group,
        lambda a, b, axis: (a.sum(axis) - b.sum(axis)) / len(groups),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=0,
    )
    interval = theirs.confidence_interval
    np.testing.assert_allclose(rows[one]["difference_interval"], [interval.low, interval.high], atol=0.03)


def test_size_and_speed_are_of_each_encoder(ranked: dict[str, Any], room: Path) -> None:
    encoders = {one["encoder"]: one for one in ranked["encoders"]}
    for name, rate in (("small", 8000), ("wide", 16000)):
        model = AudioModel.load(room / name / "model")
        assert encoders[name]["rate"] == rate
        assert encoders[name]["parameters"] == sum(tensor.numel() for tensor in model.encoder.parameters())
        assert encoders[name]["clips_per_second"] > 0
    widths = {row["encoder"]: row["width"] for row in rows_of(ranked, "linear")}
    assert widths == {"small": 3 * 16, "wide": 3 * 48, "untrained": 3 * 16, "log-mel statistics": 2 * 32}
    assert encoders["untrained"]["model"] is None
    assert encoders["log-mel statistics"]["parameters"] == 0


def test_a_model_that_fails_is_a_row_with_its_reason(ranked: dict[str, Any], room: Path) -> None:
    last = ranked["encoders"][-1]
    assert (last["encoder"], last["model"]) == ("broken", str(room / "broken"))
    assert last["failed"]
    text = ranking_table.markdown(ranked)
    assert text.count("| broken             | not scored") == 2
    assert f"broken is not scored: {last['failed']}" in text
    with pytest.raises(AsitError, match="no model could be scored") as raised:
        rank_encoders(
            [str(room / "broken"), str(room / "none")], str(room / "notes.csv"), FrozenSettings(), world=ALONE
        )
    assert all(str(room / name) in raised.value.found for name in ("broken", "none"))
    # What is wrong with the data is said once, as with a single model.
    with pytest.raises(AsitError, match="there is no split dev"):
        rank_encoders(models(room)[::2], str(room / "notes.csv"), FrozenSettings(test=("dev",)), world=ALONE)


def test_the_picture_has_the_numbers_of_the_table(ranked: dict[str, Any], tmp_path: Path) -> None:
    ranking_table.write(ranked, tmp_path)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for panel, probe in zip(ranking_table.picture(ranked).axes, ("linear", "knn"), strict=True):
        assert panel.get_xscale() == "log"
        points = sorted(
            (float(bars.lines[0].get_xdata()[0]), float(bars.lines[0].get_ydata()[0])) for bars in panel.containers
        )
        expected = [line for line in lines if line["probe"] == probe]
        assert points == sorted((float(line["clips_per_second"]), float(line["value"])) for line in expected)
        assert len(points) == 4
    assert [line["note"] for line in lines if line["encoder"] == "broken"] == [ranked["encoders"][-1]["failed"]]


def test_few_labels_have_a_table_for_each_part_with_several_seeds(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_speed, "ROUNDS", (1, 1))
    settings = FrozenSettings(probes=("knn", "prototype"), per_class=(2,), shares=(0.5,), seeds=2, pooling=("mean",))
    found = rank_encoders(models(room)[::2], str(room / "notes.csv"), settings, world=ALONE)
    assert found is not None
    titles = ranking_table.scores(found)
    assert list(titles) == [
        "knn probe, mean, 50 % of the labels",
        "prototype probe, patch tokens, 50 % of the labels",
        "knn probe, mean, 2 labels a class",
        "prototype probe, patch tokens, 2 labels a class",
    ]
    for row in (row for rows in titles.values() for row in rows):
        of_seeds = [
            record["metrics"]["accuracy"]["value"]
            for record in found["results"]
            if all(record[name] == row[name] for name in ("encoder", "probe", "features", "labels"))
        ]
        assert len(of_seeds) == row["seeds"] == 2
        assert row["value"] == pytest.approx(np.mean(of_seeds))
        assert row["width"] == {"small": 16, "wide": 48}[row["encoder"]]


def test_encoders_take_turns_and_the_median_round_counts(monkeypatch: pytest.MonkeyPatch, room: Path) -> None:
    now, turns = [0.0], []
    seconds = {"a": iter([100.0, 1.0, 9.0, 2.0]), "b": iter([100.0, 8.0, 4.0, 4.0])}  # the first pass is not counted

    class Reader:
        kinds = ()
        front_end = FrontEndSettings(rate=8000)

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, wave: np.ndarray, kinds: tuple[str, ...]) -> dict[str, Any]:
            return {}

    def make(reader: Reader, sounds: Any) -> Any:
        def one() -> None:
            turns.append(reader.name)
            now[0] += next(seconds[reader.name])

        return one

    model = AudioModel.load(room / "small" / "model")
    catalogue = open_catalogue(str(room / "notes.csv"), model, ALONE, bad_files=0.0)
    monkeypatch.setattr(encoder_speed, "_pass", make)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    readers: Any = {name: Reader(name) for name in "ab"}
    found, _ = encoder_speed.measure_speed(readers, catalogue)
    assert "".join(turns) == "abababab"
    assert (found["clips"], found["rounds"]) == (16, 3)
    assert found["seconds"] == pytest.approx(16 * 0.5)
    assert found["clips_per_second"] == {"a": 8.0, "b": 4.0}


def test_names_are_short_where_they_differ(tmp_path: Path) -> None:
    for name in ("a/model", "b", "c/model", "c/b", "untrained"):
        (tmp_path / name).mkdir(parents=True)
    a, b, other, own = (str(tmp_path / name) for name in ("a/model", "b", "c/b", "untrained"))
    assert short_names([a, b, "owner/name@v1", "ast"]) == ["a", "b", "owner/name@v1", "ast"]
    assert short_names([a, b, other]) == [a, b, other]
    assert short_names([a, own]) == [a, own]  # the name of a baseline


def test_the_verb_writes_a_folder_of_which_report_makes_a_page(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_speed, "ROUNDS", (1, 1))
    out = tmp_path / "out"
    how = ["--data", str(room / "notes.csv"), "--device", "cpu", "--cache", str(tmp_path / "cache")]
    for _ in range(2):  # the folder may be written again
        assert cli.main(["evaluate", *models(room), *how, "--probe", "knn", "--baselines", "--out", str(out)]) == 0
        assert capsys.readouterr().out == (out / "table.md").read_text()
    held = json.loads((out / "results.json").read_text())
    page = report(out).read_text()
    for one in held["encoders"]:
        assert f"<td>{one['encoder']}</td>" in page
    for row in held["scores"]:
        assert f"<td>{row['value']:.3f} (" in page
    assert "not scored: " in page
    assert "4 of 5 encoders are scored" in page
    best, *others = held["scores"]
    close = [row["encoder"] for row in others if row["difference_interval"][1] >= 0]
    told = (
        f"these clips do not tell it apart from {', '.join(close)}"
        if close
        else "the intervals of all differences exclude 0"
    )
    assert f"Knn probe, class+mean+std: {best['encoder']} is best; {told}." in page
    (out / "results.json").write_text('{"encoders": [], "scores": 7}')
    with pytest.raises(ConfigError, match="another kind than asit writes"):
        report(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{small}", "{small}"], "is given twice"),
        (["{small}", "{wide}", "--verify"], "--verify with several models"),
        (["{small}", "{wide}", "--out", "{room}"], "a folder of something else"),
        (["{small}", "{wide}", "--probe", "cosine"], "probe cosine"),
        (["{room}/broken", "{room}/none"], "no model could be scored"),
    ],
)
def test_wrong_calls_are_refused(
    arguments: list[str], message: str, room: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"room": room, **{name: room / name / "model" for name in ("small", "wide")}}
    given = [argument.format(**names) for argument in arguments]
    assert cli.main(["evaluate", *given, "--data", str(room / "notes.csv"), "--device", "cpu", "--cache", "none"]) == 2
    assert message in capsys.readouterr().err


def test_two_processes_give_the_table_of_one(room: Path, tmp_path: Path, ranks: Any) -> None:
    torch.set_num_threads(1)
    call = f"evaluate {' '.join(models(room))} --data {room}/notes.csv --device cpu --threads 1 --baselines".split()
    for size in (1, 2):
        ended = ranks(size, lambda size=size: cli.main([*call, "--cache", "none", "--out", f"{tmp_path}/{size}"]))
        assert [e.code for e in ended] == [0] * size, ended
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in "12")
    assert (one["scores"], one["results"]) == (two["scores"], two["results"])
