"""A study end to end, stopped, resumed and shared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asit.data.catalogue.catalogue import Catalogue
from asit.errors import ConfigError, TrainingError
from asit.io import lock
from asit.pretrain import pretrain_run
from asit.study import study_plan, study_report, study_run, study_table
from asit.study.study_plan import Request, Scoring, Study

ARMS: dict[str, dict[str, Any]] = {"all": {}, "global": {"losses.local_weight": 0, "losses.reconstruction_weight": 0}}
QUICK = Scoring(probes=("linear", "knn"))


def test_a_study_is_run_scored_and_written_once(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = Scoring(shares=(1.0,), epochs=1, scratch_rates=(1e-3, 1e-2))
    study = study_plan.prepare(request_of(tmp_path / "out", ARMS, scoring=scoring))
    end = study_run.run(study, [0], list(ARMS))
    assert (end.done, end.total, end.others, end.failed) == (4, 4, [], {})
    text = study_report.write(Study.read(tmp_path / "out"))
    assert (tmp_path / "out/figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out/table.md").read_text("utf-8") == text
    found = {(row.score, row.system): row for row in study_table.rows(study)}
    systems = {"all", "global", "untrained", "log-mel statistics"}
    assert {system for score, system in found if score == "knn probe"} == systems
    assert {system for score, system in found if score == "prototype probe"} == systems - {"log-mel statistics"}
    tuned = [system for score, system in found if score == "fine-tuned, all labels"]
    assert tuned[:2] == ["all", "global"]
    assert len(tuned) == 3, "of the rates from scratch the best alone is shown"
    # The mean over folds is that of `asit evaluate`.
    held = json.loads((study.scores("global", 0, "tones") / "results.json").read_text("utf-8"))["results"]
    values = [record["metrics"]["accuracy"]["value"] for record in held if record["probe"] == "linear"]
    row = found["linear probe", "global"]
    assert row.value.value == pytest.approx(sum(values) / 2)
    assert (row.folds, row.clips, row.seeds) == (2, 16, 1)
    assert found["linear probe", "global"].minutes > 0

    def again(*_: object, **__: object) -> None:
        raise AssertionError("a finished part is done again")

    for name in ("_pretrain", "_probe", "_tune"):
        monkeypatch.setattr(study_run, name, again)
    assert study_run.run(study, [0], list(ARMS)).done == 4


def test_a_begun_run_is_resumed_and_its_time_added(request_of: Callable[..., Request], tmp_path: Path) -> None:
    study = study_plan.prepare(request_of(tmp_path / "out", {"all": {}}, scoring=QUICK))
    run = study.run("all", 0)
    settings = study.arms["all"].changed({"data": study.data_path, "out": str(run), "seed": 0, "stop_after": 1})
    assert not pretrain_run.pretrain(settings).finished
    study_run.cost_file(run).write_text('{"seconds": 1000.0}', "utf-8")
    assert study_run.run(study, [0], ["all"]).done == 1
    assert "resumed from step 1" in (run / "metrics.jsonl").read_text("utf-8")
    assert 1000 < json.loads(study_run.cost_file(run).read_text("utf-8"))["seconds"] < 1500


def test_a_signal_ends_the_study_and_a_failed_arm_does_not(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_plan.prepare(request_of(tmp_path / "out", ARMS, scoring=QUICK))

    def stop(*_: object) -> None:
        raise study_run._StoppedError("SIGTERM")

    def fail(*_: object) -> None:
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(study_run, "_pretrain", stop)
    assert study_run.run(study, [0], list(ARMS)).stopped_by == "SIGTERM"
    monkeypatch.setattr(study_run, "_pretrain", fail)
    assert list(study_run.run(study, [0], list(ARMS)).failed) == ["all, seed 0", "global, seed 0"]


def test_units_are_claimed_and_shared(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, begun = study_plan.prepare(request_of(tmp_path / "out", ARMS, scoring=QUICK)), list[str]()
    for name in ("_pretrain", "_probe"):
        monkeypatch.setattr(study_run, name, lambda study, arm, seed, *_: begun.append(f"{arm}-s{seed}"))
    with lock.writing(study.run("global", 1)):
        end = study_run.run(study, [0, 1], list(ARMS))
    assert end.others == ["global, seed 1"]
    assert begun == ["all-s0"] * 2 + ["global-s0"] * 2 + ["all-s1"] * 2
    shares = []
    for i in (1, 2, 3):
        begun.clear()
        study_run.run(study, [0, 1], list(ARMS), (i, 3))
        shares.append(set(begun))
    assert shares == [{"all-s0", "global-s1"}, {"global-s0"}, {"all-s1"}]


def test_a_plan_is_kept_and_another_is_refused(
    request_of: Callable[..., Request], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = study_plan.prepare(request_of(out, {"all": {}}, scoring=QUICK))
    assert first.arms == Study.read(out).arms
    added = study_plan.prepare(request_of(out, ARMS, scoring=QUICK))
    assert list(added.arms) == list(added.grid.arms) == ["all", "global"]
    assert added.grid.reference == "all"
    for changed, said in (
        ({"settings": {"optim": {"lr": 0.5}}}, r"the arm all: .*\n.*optim.lr"),
        ({"minutes": 1.0}, "minutes are not given in it, 1.0 now"),
        ({"scoring": Scoring(shares=(0.1,))}, "other probes or fine-tuning"),
    ):
        with pytest.raises(ConfigError, match=said):
            study_plan.prepare(request_of(out, ARMS, **{"scoring": QUICK, **changed}))
    (tmp_path / "full/other").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not a study's: other"):
        study_plan.prepare(request_of(tmp_path / "full", ARMS))
    with pytest.raises(ConfigError, match="holds no study"):
        Study.read(tmp_path)


def test_what_makes_scores_too_good_is_said(
    request_of: Callable[..., Request], labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "bare.csv"
    lines = labelled.read_text("utf-8").splitlines()
    table.write_text("\n".join(f"{labelled.parent}/{line}".rsplit(",", 1)[0] for line in lines), "utf-8")
    bare = table.read_text("utf-8").replace(f"{labelled.parent}/path", "path")
    table.write_text(bare, "utf-8")
    request = request_of(tmp_path / "out", {"all": {}})
    base = request.base.changed({"data": str(labelled.parent)})
    study = study_plan.prepare(Request(grid=request.grid, base=base, tables=(str(table),)))
    assert ["16 of 16 clips" in study.notes[0], "no groups" in study.notes[1]] == [True, True]
    assert study.notes[0] in caplog.text


def test_minutes_become_epochs(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"all": 0.5, "longer": 0.25}
    monkeypatch.setattr(study_plan, "seconds_per_step", lambda arms, data, **_: {arm: costs[arm] for arm in arms})
    arms: dict[str, dict[str, Any]] = {"all": {}, "longer": {"epochs": "x2"}}
    study = study_plan.prepare(request_of(tmp_path / "out", arms, minutes=1.0, scoring=QUICK))
    # 12 clips are 3 steps of 4: 60 s / (3 * 0.5 s), and 120 s / (3 * 0.25 s).
    assert {arm: settings.epochs for arm, settings in study.arms.items()} == {"all": 40, "longer": 160}
    monkeypatch.setattr(study_plan, "seconds_per_step", lambda arms, data, **_: 1 / 0)
    assert study_plan.prepare(request_of(tmp_path / "out", arms, minutes=1.0, scoring=QUICK)).arms == study.arms


def test_a_warm_up_that_few_minutes_would_not_hold_becomes_auto(
    request_of: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = {"short": 20.0, "long": 2.0}
    monkeypatch.setattr(study_plan, "seconds_per_step", lambda arms, data, **_: {arm: costs[arm] for arm in arms})
    arms: dict[str, dict[str, Any]] = {"short": {}, "long": {"masking.drop": 0.4}}
    settings = {"optim": {"warmup": 1}, "epochs": 9}
    study = study_plan.prepare(request_of(tmp_path / "out", arms, minutes=1.0, scoring=QUICK, settings=settings))
    assert [(one.epochs, one.optim.warmup) for one in study.arms.values()] == [(1, "auto"), (10, 1.0)]
    again = request_of(tmp_path / "out", arms, minutes=1.0, scoring=QUICK, settings=settings)
    assert study_plan.prepare(again).arms == study.arms


def test_a_failed_start_leaves_no_list_for_the_next(
    request_of: Callable[..., Request], labelled: Path, tmp_path: Path
) -> None:
    first = request_of(tmp_path / "out", {"all": {"losses.global_weight": "much"}})
    with pytest.raises(ConfigError, match="the arm all"):
        study_plan.prepare(first)
    base = first.base.changed({"data": str(labelled.parent)})
    request = request_of(tmp_path / "out", {"all": {}})
    study = study_plan.prepare(Request(grid=request.grid, base=base, tables=request.tables))
    assert len(Catalogue.read(study.data_path)) == 16
