"""Cross-validation: a run for each fold, mean and spread over the folds, and resuming."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest

from asit import cli
from asit.config import yaml
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.finetune import cross_validation, validation
from asit.finetune import finetune_run as runs
from asit.io import checkpoint


def held(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text("utf-8")))


ALL: dict[str, Any] = {"epochs": 1, "sides": {"fold": "all", "hold_out": 0.3}}


@pytest.fixture
def unstopped(tmp_path_factory: pytest.TempPathFactory, tuned: Any) -> Path:
    """A run over both folds, made once."""
    run = tmp_path_factory.getbasetemp() / "unstopped"
    if not run.exists():
        assert cross_validation.run(tuned(run, **ALL)).finished
    return run


def test_each_fold_mean_and_spread(unstopped: Path, labelled: Path) -> None:
    found = held(unstopped)
    assert [fold["fold"] for fold in found["folds"]] == ["1", "2"]
    assert (found["task"], found["kind"], found["classes"]) == ("any", "single", ["high", "low", "middle"])
    tests = []
    for fold in found["folds"]:
        own = held(unstopped / f"fold-{fold['fold']}")
        assert own == {key: value for key, value in fold.items() if key != "fold"}
        tests += [r for r in own["results"] if (r["split"], r["weights"]) == ("test", "last")]
    assert [record["clips"] for record in tests] == [13, 12]
    assert tests[0]["list"] != tests[1]["list"]
    values = [record["metrics"]["accuracy"]["value"] for record in tests]
    summary = found["summary"]["test last accuracy"]
    assert summary["values"] == values
    assert summary["mean"] == pytest.approx(statistics.mean(values))
    assert summary["std"] == pytest.approx(statistics.stdev(values))
    assert summary["pooled"] == pytest.approx((13 * values[0] + 12 * values[1]) / 25)
    assert {"test best accuracy", "validation best accuracy"} <= set(found["summary"])
    assert yaml.read_yaml(unstopped / "fold-2" / "config.yaml")["sides"]["fold"] == "2"


def test_stopped_in_the_second_fold(
    unstopped: Path, tuned: Any, tmp_path: Path, fork: Any, state: Any, same: Any
) -> None:
    run, file = tmp_path / "run", tmp_path / "s.yaml"
    file.write_text(yaml.to_yaml(tuned(run, **ALL, records={"checkpoint_every": 1})))

    def call() -> int:
        real = validation.Records.write

        def write(self: Any, kind: str, step: int, values: Any) -> None:
            if (kind, step) == ("train", 1) and "fold-2" in str(self.folder):
                os.kill(os.getpid(), signal.SIGTERM)
            real(self, kind, step, values)

        validation.Records.write = write  # type: ignore[method-assign]
        return cli.main(["finetune", "--config", str(file)])

    ended = fork(call).end()
    assert ended.code == 143, ended.said
    assert f"resume: asit finetune --out {run} --resume" in ended.said
    assert not (run / "results.json").exists()
    first = (run / "fold-1" / "log.txt").read_bytes()
    assert cli.main(["finetune", "--out", str(run), "--resume"]) == 0
    assert (run / "fold-1" / "log.txt").read_bytes() == first
    assert held(run) == held(unstopped)
    same(state(run / "fold-2"), state(unstopped / "fold-2"))
    with pytest.raises(ConfigError, match="--resume to resume it, or --overwrite"):
        cross_validation.run(tuned(run, **ALL))
    with pytest.raises(ConfigError, match=r"epochs: 1 in the run, 2 now"):
        cross_validation.run(tuned(run, **{**ALL, "epochs": 2}), resume=True)


def test_a_signal_at_the_end_of_a_fold_stops_there(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cross_validation.finetune

    def late(*given: Any, **how: Any) -> Any:
        return dataclasses.replace(real(*given, **how), stopped_by="SIGINT")

    monkeypatch.setattr(cross_validation, "finetune", late)
    found = cross_validation.run(tuned(tmp_path / "run", **ALL))
    assert (found.finished, found.stopped_by) == (False, "SIGINT")
    assert sorted(path.name for path in (tmp_path / "run").glob("fold-*")) == ["fold-1"]
    assert cross_validation.run(tuned(tmp_path / "run", **ALL), resume=True).finished


def test_overwrite_takes_all_folds_away(tuned: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cross_validation.run(tuned(run, **ALL, stop_after=1))
    (run / "fold-9").mkdir()  # a fold that was killed as it began
    assert not cross_validation.run(tuned(run, **ALL, stop_after=1, seed=4), overwrite=True).finished
    assert {path.name for path in run.iterdir()} == {"catalogue.jsonl", "config.yaml", "fold-1"}
    other = tmp_path / "other"
    (other / "fold-1").mkdir(parents=True)
    (other / "fold-1" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="files that are not a run's: fold-1"):
        cross_validation.run(tuned(other, **ALL), overwrite=True)
    assert (other / "fold-1" / "mine.txt").exists()


def test_folds_are_looked_at_before_the_first_is_trained_on(
    notes: Path, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it trained")

    rows = [line.split(",") for line in notes.read_text().splitlines()[1:]]
    made = [[f"{notes.parent}/{path}", label, fold] for path, label, _, fold, _ in rows]

    def table(name: str, changed: list[list[str]]) -> Path:
        out = tmp_path / name
        out.write_text("path,label,fold\n" + "\n".join(",".join(row) for row in changed) + "\n")
        return out

    monkeypatch.setattr(cross_validation, "finetune", refuse)
    gap = table("gap.csv", [[*row[:2], "4" if row[2] == "2" else row[2]] for row in made])
    with pytest.raises(CatalogueError, match=r"folds without a clip: 2, 3\n.*1 \(13 clips\), 4 \(12 clips\)"):
        cross_validation.run(tuned(tmp_path / "run", data=gap, **ALL))
    unseen = table("unseen.csv", [[row[0], "squeak" if i == 0 else row[1], row[2]] for i, row in enumerate(made)])
    with pytest.raises(
        CatalogueError, match=r"fold 1: 1 of 4 classes are in test and not in train: squeak \(1 clips\)"
    ):
        cross_validation.run(tuned(tmp_path / "run", data=unseen, **ALL))
    one = table("one.csv", [[*row[:2], "1"] for row in made])
    with pytest.raises(CatalogueError, match="there is only one fold"):
        cross_validation.run(tuned(tmp_path / "run", data=one, **ALL))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_first_fold_that_cannot_begin_leaves_the_folder_free(tuned: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"fold 1: settings that the run would not have: encoder.drop_path is 0.3"):
        cross_validation.run(tuned(run, **ALL, encoder={"drop_path": 0.3}))
    assert {path.name for path in run.iterdir()} == {"catalogue.jsonl"}
    assert not cross_validation.run(tuned(run, **ALL, stop_after=1)).finished
    # Where to stop was said of that call: going on with the run's own settings does not stop there again.
    assert yaml.read_yaml(run / "config.yaml")["stop_after"] == 0


def test_folds_without_splits_and_a_class_that_one_fold_alone_has(
    notes: Path, tuned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asit")
    rows = [line.split(",") for line in notes.read_text().splitlines()[1:]]
    lost = rows[0][3]
    names = ["squeak" if i == 0 else row[1] for i, row in enumerate(rows)]
    data, run = tmp_path / "own.csv", tmp_path / "run"
    text = "".join(f"{notes.parent}/{row[0]},{name},{row[3]},me\n" for row, name in zip(rows, names, strict=True))
    data.write_text("path,label,fold,recordist\n" + text)
    asked = tuned(run, data=data, epochs=1, sides={"unseen_classes": "skip"})
    ended = cross_validation.run(asked)
    assert isinstance(ended, cross_validation.CrossValidation)
    assert "a run for each fold (one alone: --sides.fold NAME)" in caplog.text
    assert {path.name for path in run.glob("fold-*")} == {"fold-1", "fold-2"}
    assert ended.unseen == {lost: ["squeak"]}
    found = held(run)["folds"]
    assert {fold["fold"]: fold["unseen_classes"] for fold in found if fold["unseen_classes"]} == ended.unseen
    assert sum(fold["results"][0]["clips"] for fold in found) == len(rows) - 1
    log = (run / f"fold-{lost}" / "log.txt").read_text()
    assert "1 of 4 classes have no training clip: squeak; their 1 validation and test clips are left out" in log
    assert cross_validation.run(asked, resume=True) == ended
    assert cross_validation.over_folds(tuned(run, data=run / "catalogue.jsonl"), False)
    for other in ({"hold_out": 0.3}, {"fold": "1"}):
        assert not cross_validation.over_folds(tuned(run, data=data, sides=other), False)
    assert not cross_validation.over_folds(tuned(run, data=notes), False)  # it has splits


def test_a_fold_may_have_any_name() -> None:
    assert [cross_validation.folder_of(name) for name in ("1", "é b", "../x", "a:b%")] == [
        *("fold-1", "fold-é b", "fold-..%2fx", "fold-a%3ab%25")
    ]


def test_one_fold_and_several_processes(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cross_validation.run(tuned(tmp_path / "run", epochs=1, sides={"fold": "2"}))
    assert isinstance(result, runs.FinetuneResult)
    assert [(r["split"], r["weights"], r["clips"]) for r in result.results] == [("test", "last", 12)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"--sides\.fold NAME"):
        cross_validation.run(tuned(tmp_path / "all", **ALL))


@pytest.mark.parametrize(
    ("fold", "way"),
    [
        ("1", "give the same command again, from step 0: no checkpoint was written yet"),
        ("2", "give the same command with --resume, which resumes with this fold"),
    ],
)
def test_a_disk_that_fills_at_the_first_checkpoint_of_a_fold(
    fold: str, way: str, tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_state

    def full(root: Path, *given: Any) -> Path:
        if f"fold-{fold}" in str(root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(root, *given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", full)
        with pytest.raises(CheckpointError, match=f"fold {fold}: the disk is full") as caught:
            cross_validation.run(tuned(tmp_path / "run", **ALL))
    assert way in caught.value.remedy
    assert cross_validation.run(tuned(tmp_path / "run", **ALL), resume=fold == "2").finished
