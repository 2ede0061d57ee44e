"""Fine-tuning runs: exact resuming, the choice of the best epoch by validation alone, and reported mistakes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit import cli
from asit.config import FinetuneSettings, finetune_settings, presets, yaml
from asit.data.catalogue import scan
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.evaluate.result_records import ClipScores
from asit.finetune import final_scores, finetune_setup, validation
from asit.finetune import finetune_run as runs
from asit.model.audio_model import AudioModel
from asit.tools.run_estimate import dry_run


def go(settings: FinetuneSettings, **how: Any) -> runs.FinetuneResult:
    return runs.finetune(settings, **how)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line for line in found if line["kind"] == kind]


def held(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text("utf-8")))


def table(folder: Path, rows: list[list[str]], head: str = "path,label,split", name: str = "t.csv") -> Path:
    out = folder / name
    out.write_text("\n".join([head, *(",".join(row) for row in rows)]) + "\n")
    return out


def clips(notes: Path, count: int = 24) -> list[list[str]]:
    """[path, label, split] of the first notes."""
    rows = [line.split(",") for line in notes.read_text().splitlines()[1 : count + 1]]
    return [[f"{notes.parent}/{row[0]}", row[1], row[2]] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def unstopped(whole: Path, tuned: Any) -> Path:
    """The run that was never stopped; made by the first test that asks."""
    if not whole.exists():
        assert go(tuned(whole)).finished
    return whole


@pytest.fixture
def equal(unstopped: Path, state: Any, metrics: Any, same: Any) -> Callable[[Path], None]:
    """A run's last checkpoint, records, results and models are those of the run that was never stopped."""

    def compare(run: Path) -> None:
        same(state(run), state(unstopped))
        assert metrics(run) == metrics(unstopped)
        for kind in ("validation", "test"):
            assert lines(run, kind) == lines(unstopped, kind)
        assert held(run) == held(unstopped)
        for name in ("model", "model-best"):
            ours, theirs = AudioModel.load(run / name), AudioModel.load(unstopped / name)
            same(ours.encoder.state_dict(), theirs.encoder.state_dict())
            assert ours.head is not None
            assert theirs.head is not None
            same(ours.head.state_dict(), theirs.head.state_dict())
            assert ours.training == theirs.training

    return compare


# equality


@pytest.mark.parametrize(
    ("stops", "workers"),
    [
        pytest.param([2], 0, id="in mid-epoch"),
        pytest.param([3], 0, id="at the epoch's border"),
        pytest.param([1, 4, 5], 1, id="again and again, with a worker"),
    ],
)
def test_parts_equal_the_whole(stops: list[int], workers: int, equal: Any, tuned: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for i, stop in enumerate(stops):
        result = go(tuned(run, stop_after=stop, workers=workers), resume=i > 0)
        assert (result.step, result.total, result.finished, result.results) == (stop, 6, False, [])
        assert not (run / "results.json").exists()
        assert [line["step"] for line in lines(run, "validation")] == [3] * (stop >= 3)
    assert go(tuned(run, workers=workers), resume=True).finished
    equal(run)


def test_everything_moves_so_that_equality_says_something(
    unstopped: Path, tuned: Any, tmp_path: Path, state: Any
) -> None:
    first, last = tmp_path / "first", state(unstopped)
    go(tuned(first, stop_after=1))
    start = state(first)
    for part in ("task/network.", "task/averaged.", "optimiser/"):
        assert any(not torch.equal(start[n], last[n]) for n in last if n.startswith(part) and n in start), part
    assert int(last["task/seen"]) == 6
    steps = lines(unstopped, "train")
    assert len({step["loss"] for step in steps}) == 6


def dies(where: str) -> Callable[[], None]:
    """Make this process die at step 3: before the validation, or with the best weights saved and not yet recorded."""

    def before() -> None:
        real = validation.Validation._validate

        def validate(self: Any, records: Any, scorer: Any, step: int) -> None:
            os._exit(9) if step == 3 else real(self, records, scorer, step)

        validation.Validation._validate = validate  # type: ignore[method-assign]

    def unrecorded() -> None:
        real = validation.Records.write

        def write(self: Any, kind: str, step: int, values: Any) -> None:
            os._exit(9) if (kind, step) == ("validation", 3) else real(self, kind, step, values)

        validation.Records.write = write  # type: ignore[method-assign]

    def scored() -> None:
        def save(*_: Any) -> None:
            os._exit(9)

        final_scores.save_scores = save

    return {"before": before, "unrecorded": unrecorded, "scored": scored}[where]


@pytest.mark.parametrize(
    ("where", "every"), [("before", 3), ("unrecorded", 3), ("unrecorded", 2), ("unrecorded", 100), ("scored", 2)]
)
def test_killed_around_a_validation(where: str, every: int, equal: Any, tuned: Any, tmp_path: Path, fork: Any) -> None:
    """With a checkpoint of that very step, of an earlier one, or none; or at the first scores of the end."""
    run, records = tmp_path / "run", {"checkpoint_every": every}

    def call() -> None:
        dies(where)()
        go(tuned(run, records=records))

    assert fork(call).end().code == 9
    assert go(tuned(run, records=records), resume=True).finished
    equal(run)


def test_sigterm(equal: Any, tuned: Any, tmp_path: Path, fork: Any) -> None:
    run, file = tmp_path / "run", tmp_path / "settings.yaml"
    file.write_text(yaml.to_yaml(tuned(run)))

    def call() -> int:
        real = validation.Validation._validate

        def validate(self: Any, records: Any, scorer: Any, step: int) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            real(self, records, scorer, step)

        validation.Validation._validate = validate  # type: ignore[method-assign]
        return cli.main(["finetune", "--config", str(file)])

    ended = fork(call).end()
    assert ended.code == 143
    assert f"resume: asit finetune --out {run} --resume" in ended.said
    assert "stopped by SIGTERM at step 4 of 6" in ended.said
    assert go(tuned(run), resume=True).finished
    equal(run)


def test_a_finished_run_is_not_scored_again(unstopped: Path, tuned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it scored again")

    monkeypatch.setattr(ClassifierScorer, "__call__", refuse)
    before = [line for line in (unstopped / "metrics.jsonl").read_text().splitlines() if '"test"' in line]
    result = go(tuned(unstopped), resume=True)
    assert result.finished
    assert result.results == held(unstopped)["results"]
    assert before == [json.dumps(line) for line in lines(unstopped, "test")]


def test_weights_that_were_chosen_and_are_gone(tuned: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(tuned(run, stop_after=4))
    (run / "model-best").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="model-best is not there, and 1 validations"):
        go(tuned(run), resume=True)


@pytest.mark.slow
def test_log_mels_made_on_the_device(tuned: Any, tmp_path: Path, state: Any, close: Any) -> None:
    """The same run but for rounding, whose loader hands over waveforms."""
    changes = {"mixup": 0.5, "noise": 0.1, "time_mask": 8, "gain_db": 3.0}
    out = {place: tmp_path / place for place in ("loader", "device")}
    for place, run in out.items():
        assert runs.finetune(tuned(run, front_end_on=place, augment=changes, epochs=1)).finished
    assert "log-mels: on cpu" in (out["device"] / "log.txt").read_text("utf-8")
    close(state(out["loader"]), state(out["device"]))


def test_a_run_of_a_version_that_had_no_choice_of_place_goes_on(tuned: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not runs.finetune(tuned(run, stop_after=2)).finished
    text = (run / "config.yaml").read_text("utf-8")
    assert "\nfront_end_on: loader\n" in text
    (run / "config.yaml").write_text(text.replace("\nfront_end_on: loader\n", "\n"), "utf-8")
    assert runs.finetune(tuned(run), resume=True).finished


def test_no_global_draws(tuned: Any, tmp_path: Path, no_global_draws: None) -> None:
    go(tuned(tmp_path / "run", epochs=1))


# processes


def test_two_processes_learn_what_one_does(
    unstopped: Path, tuned: Any, tmp_path: Path, ranks: Any, state: Any, close: Any
) -> None:
    run = tmp_path / "run"
    ranks(2, lambda: 0 if go(tuned(run)).finished else 1, code=0)
    close(state(run), state(unstopped), "task/network.", rtol=2e-3, atol=1e-4)
    assert [line["step"] for line in lines(run, "validation")] == [3, 6]
    mine, other = held(run), held(unstopped)
    for one, two in zip(mine["results"], other["results"], strict=True):
        assert all(one[name] == two[name] for name in ("list", "clips", "split", "weights"))
    scores = [np.load(folder / "scores" / "test-last.npz")["scores"] for folder in (run, unstopped)]
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-3)


# choice


def test_validation_alone_chooses(tuned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = tmp_path / "run", []
    real = ClassifierScorer.__call__

    def watched(self: ClassifierScorer, *given: Any, **more: Any) -> ClipScores:
        asked.append(len(self.windows.rows))
        return real(self, *given, **more)

    monkeypatch.setattr(ClassifierScorer, "__call__", watched)
    result = go(tuned(run, epochs=4, validation={"every": 2}, optim={"average": "none"}))
    assert asked == [6, 6, 6, 6, 7, 7]  # two validations; at the end both weights on validation, then on test
    seen = lines(run, "validation")
    assert [line["step"] for line in seen] == [6, 12]
    values = [line["metrics"]["accuracy"] for line in seen]
    chosen = seen[int(np.argmax(values))]["step"]
    assert [(r["split"], r["weights"], r["step"]) for r in result.results] == [
        ("validation", "last", 12),
        ("validation", "best", chosen),
        ("test", "last", 12),
        ("test", "best", chosen),
    ]
    assert result.results[1]["metrics"]["accuracy"]["value"] == max(values)
    assert held(run)["chosen_by"] == "accuracy"
    assert AudioModel.load(run / "model-best").training["validation"] == max(values)
    assert [line["weights"] for line in lines(run, "test")] == ["last", "best"]
    assert {path.name for path in (run / "scores").iterdir()} == {
        f"{split}-{weights}.npz" for split in ("validation", "test") for weights in ("last", "best")
    }


@pytest.mark.parametrize("side", [True, False])
def test_without_a_choice_there_is_the_last_alone(side: bool, tuned: Any, tmp_path: Path, notes: Path) -> None:
    rows = [[*row[:2], row[2] if side else row[2].replace("validation", "test")] for row in clips(notes)]
    run = tmp_path / "run"
    result = go(tuned(run, data=table(tmp_path, rows), epochs=1, validation={"every": int(not side)}))
    splits = ["validation", "test"] if side else ["test"]
    assert [(r["split"], r["weights"]) for r in result.results] == [(split, "last") for split in splits]
    assert held(run)["chosen_by"] is None
    assert not (run / "model-best").exists()
    assert lines(run, "validation") == []
    assert "the last weights alone are scored" in (run / "log.txt").read_text()


def test_few_labels(tuned: Any, tmp_path: Path) -> None:
    settings = tuned(tmp_path / "run", epochs=1, sampling={"order": "shuffle", "per_class": 2})
    result = go(settings)
    assert held(tmp_path / "run")["train_clips"] == 6
    assert "labels of 6 of 12 training clips are used" in (tmp_path / "run" / "log.txt").read_text()
    assert result.total == 1
    assert yaml.build(FinetuneSettings, yaml.read_yaml(tmp_path / "run" / "config.yaml"), "c").label_seed == 3


# the folder


def test_the_folder_and_the_card(unstopped: Path) -> None:
    assert {path.name for path in unstopped.iterdir()} == {
        *("config.yaml", "environment.json", "metrics.jsonl", "log.txt", "checkpoints", "catalogue.jsonl"),
        *("model", "model-best", "results.json", "scores"),
    }
    model = AudioModel.load(unstopped / "model")
    assert (model.classes, model.multi) == (("high", "low", "middle"), False)
    assert model.card["labels"]["pooling"] == "class+mean"
    assert model.training["from"] == "fresh weights"
    found = held(unstopped)
    assert (found["task"], found["kind"], found["classes"]) == ("any", "single", ["high", "low", "middle"])
    for record in found["results"]:
        assert record["clips"] == sum(row["clips"] for row in record["per_class"])
        assert len(record["list"]) == 16
        assert np.sum(record["confusion"]) == record["clips"]
    with np.load(unstopped / "scores" / "test-last.npz") as scores:
        np.testing.assert_allclose(scores["scores"].sum(1), 1.0, atol=1e-5)
        truth, said = scores["indices"], scores["scores"].argmax(1)
        test = next(r for r in found["results"] if (r["split"], r["weights"]) == ("test", "last"))
        assert test["metrics"]["accuracy"]["value"] == pytest.approx((truth == said).mean())
        assert [m["path"] for m in test["mistakes"]] == [
            f"{scores['root']}/{scores['ids'][i]}"
            for i in sorted(np.flatnonzero(truth != said), key=lambda i: -scores["scores"][i].max())
        ]
        assert test["bootstrap"]["unit"] == "group"
    wave, _ = soundfile.read(
        json.loads((unstopped / "catalogue.jsonl").read_text().splitlines()[0])["root"] + "/09.wav"
    )
    part = torch.from_numpy(wave[:4000]).float()[None]
    assert model.scores(part).argmax(1).item() in (0, 1, 2)


# mistakes


def mistake(capsys: pytest.CaptureFixture[str], command: str) -> str:
    """What a command that must fail as a user's mistake says."""
    code = cli.main(shlex.split(command))
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert "fix:" in said or "expected" in said
    return said


ALL = range(24)
BAD: dict[str, tuple[int, dict[int, str], list[str]]] = {
    "a label in test alone": (1, {9: "squeak"}, ["1 of 4 classes are in test and not in train: squeak (1 clips)"]),
    "one class": (1, dict.fromkeys(ALL, "low"), ["all clips have the same label: low"]),
    "no labels": (1, dict.fromkeys(ALL, ""), ["none of the 24 clips has a label"]),
    "some without a label": (
        *(1, {3: "", 5: ""}),
        ["2 of 24 clips have no label: ", "03.wav, ", "take these rows out of the table"],
    ),
    "a soft label out of range": (1, {3: "low:1.5"}, ["low:1.5", "a weight from 0 to 1"]),
    "an unknown column": (1, {}, ["lable"]),
    "missing files": (0, dict.fromkeys(range(5), "/nowhere/a.wav"), ["missing", "/nowhere/a.wav"]),
    "nothing to score on": (2, dict.fromkeys(ALL, "train"), ["all 24 clips train", "--sides.hold-out"]),
    "nothing to train on": (2, dict.fromkeys(ALL, "test"), ["no clip to train on", "test (24 clips)"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(name: str, notes: Path, tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column, values, wanted = BAD[name]
    rows = clips(notes)
    for i, value in values.items():
        rows[i][column] = value
    data = table(tmp_path, rows, "path,label,split" if values else "path,lable,split")
    (tmp_path / "s.yaml").write_text(yaml.to_yaml(tuned(tmp_path / "run", data=data)))
    said = mistake(capsys, f"finetune --config {tmp_path}/s.yaml")
    for text in wanted:
        assert text in said, said
    left = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {"catalogue.jsonl", "catalogue.skipped.jsonl", "catalogue.jsonl.partial"}


def test_a_speaker_on_both_sides(notes: Path, tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [[*row, "anna" if i in (0, 1, 9, 10) else f"s{i}"] for i, row in enumerate(clips(notes))]
    data = table(tmp_path, rows, "path,label,split,group")
    file = tmp_path / "s.yaml"
    file.write_text(yaml.to_yaml(tuned(tmp_path / "run", data=data, epochs=1)))
    said = mistake(capsys, f"finetune --config {file}")
    assert "1 groups are in train and in test: anna (2 and 2 clips)" in said
    assert cli.main(["finetune", "--config", str(file), "--sides.shared-groups"]) == 0
    record = held(tmp_path / "run")["results"][-1]
    assert record["bootstrap"]["unit"] == "clip"


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--model nowhere", "nowhere does not exist"),
        ("--out ''", "no folder for the run was given"),
        ("--data ''", "no data were given"),
        ("--data nowhere", "nowhere"),
        ("--fresh", "with none the weights are fresh already"),
        ("--sides.fold 7", "there is no fold 7"),
        ("--sides.test late", "there is no split late"),
        ("--labels multi --sampling.order inverse", "sampling.order is inverse"),
        ("--labels multi --validation.metric accuracy", "validation.metric is accuracy, and clips have several labels"),
        ("--validation.metric mAP", "validation.metric is mAP, and clips have one label each"),
        ("--encoder.drop-path 0.3", "encoder.drop_path is 0.3, and would be 0.1"),
        ("--input.seconds 0.01", "input.seconds is 0.01"),
        ("--batch-size 3 --accumulate 2", "batch_size is 3, which accumulate 2 does not divide"),
        ("--optim.warmup 9", "the warm-up must end before the run"),
        ("--sampling.share 2", "Error parsing sampling"),
        ("--task esc5", "did you mean esc50"),
        ("--epoch 3", "epoch"),
        ("--resume", "is not there"),
    ],
)
def test_bad_settings(
    flags: str,
    wanted: str,
    tuned: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(yaml.to_yaml(tuned(tmp_path / "run")))
    try:
        code = cli.main(["finetune", "--config", "s.yaml", *shlex.split(flags)])
    except SystemExit as stopped:  # of the parser of the command line
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2, said
    assert wanted in (said.err + said.out).replace("\n", " "), said
    assert "Traceback" not in said.err
    assert not list(tmp_path.glob("run/*"))


def test_clips_that_the_scan_left_out_are_told(notes: Path, tuned: Any, tmp_path: Path) -> None:
    rows = clips(notes)
    soundfile.write(tmp_path / "still.wav", np.zeros(4000), 8000)
    data = table(tmp_path, [*rows, ["/nowhere/a.wav", "low", "test"], [f"{tmp_path}/still.wav", "low", "test"]])
    assert go(tuned(tmp_path / "run", data=data, epochs=1)).finished
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "warning: the catalogue lacks 2 clips that could not be used: 1 missing, 1 silent" in log


def test_unreadable_clips(notes: Path, tuned: Any, tmp_path: Path) -> None:
    """Clips that can no longer be read are replaced in training; scores count and name them."""
    folder = tmp_path / "copy"
    shutil.copytree(notes.parent, folder)
    settings = tuned(tmp_path / "run", data=tmp_path / "c.jsonl", epochs=1, bad_files=0.2)
    scan.build(folder / "notes.csv", tmp_path / "c.jsonl", front_end=settings.front_end, workers=1)
    (folder / "09.wav").write_bytes(b"no sound")
    result = go(settings)
    test = next(r for r in result.results if r["split"] == "test")
    assert (test["clips"], test["unreadable"]) == (6, 1)
    assert "not scored (test):" in (tmp_path / "run" / "log.txt").read_text()
    assert "09.wav" in (tmp_path / "run" / "log.txt").read_text()
    (folder / "10.wav").unlink()
    with pytest.raises(
        CatalogueError, match=r"2 of 7 clips could not be read: .*09\.wav.*; .*10\.wav.*\n.*at most 0\.2"
    ):
        go(tuned(tmp_path / "other", data=tmp_path / "c.jsonl", epochs=1, bad_files=0.2))
    assert not (tmp_path / "other" / "results.json").exists()


# recipes


@pytest.mark.parametrize("task", presets.recipes(FinetuneSettings))
def test_recipes_build(task: str) -> None:
    settings = presets.build(FinetuneSettings, task)
    finetune_settings.check(settings)
    assert settings.task == task
    resolved = finetune_settings.resolve(
        settings, multi=settings.labels == "multi", found={"input": {"seconds": 1.0, "keep_gb": 0.0}}
    )
    finetune_settings.check(resolved)
    assert resolved.validation.metric in finetune_setup.METRICS["multi" if settings.labels == "multi" else "single"]


# looking before


@pytest.mark.parametrize("fold", ["", "all"])
def test_a_dry_run_writes_nothing(fold: str, tuned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a cross-validation the first of the two folds is measured, and its time doubled."""
    caplog.set_level("INFO", "asit")
    measured = dry_run(tuned(tmp_path / "run", sides={"fold": fold}))
    assert list(tmp_path.iterdir()) == []
    assert measured.shapes["inputs"] == [4, 1, 48, 32]
    assert measured.shapes["tokens an input"] == 7
    assert measured.memory_gb["cpu"] > 0.05
    assert "warmup: 0.5" in measured.settings
    assert ("a run for each of 2 folds: fold 1 is measured" in caplog.messages) is (fold == "all")
    assert measured.total_seconds == pytest.approx(6 * (2 if fold else 1) * measured.seconds_per_step)


def test_a_dry_run_refuses_what_a_run_refuses(tuned: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the warm-up must end before the run"):
        dry_run(tuned(tmp_path / "run", optim={"warmup": 5}))
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        dry_run(tuned(tmp_path / "run", model=str(tmp_path / "nowhere")))
    assert list(tmp_path.iterdir()) == []
