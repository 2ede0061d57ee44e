"""Trackers: what they are given, that none stops a run, and that they hold it up no longer than agreed.

wandb, mlflow and trackio are stand-ins, with the signatures of wandb 0.31, mlflow 3.17 and trackio 0.43; where the
packages are installed, they are also tried themselves, offline and without a server.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asit.config import PretrainSettings, yaml
from asit.errors import ConfigError
from asit.training import trackers
from asit.training.callbacks import Callback, Guarded, started
from asit.training.metrics_log import Records

Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins for the packages, and what is called of them."""
    made: Calls = []
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    def run(package: str, name: str) -> Any:
        def log(data: dict[str, float], step: int | None = None) -> None:
            made.append((package, "log", step, data))

        def finish(exit_code: int | None = None) -> None:
            made.append((package, "finish", exit_code))

        return types.SimpleNamespace(id=name, log=log, finish=finish, info=types.SimpleNamespace(run_id=name))

    def wandb_init(
        *, project: str, dir: str, id: str | None, name: str, config: dict[str, Any], resume: str, settings: Any
    ) -> Any:
        made.append(("wandb", "init", project, id, name, resume, config["seed"]))
        return run("wandb", id or "w1")

    def trackio_init(project: str, name: str, config: dict[str, Any], resume: str, embed: bool) -> Any:
        made.append(("trackio", "init", project, resume, name.rpartition("-")[0]))
        return run("trackio", name)

    def start_run(run_id: str | None = None, run_name: str | None = None) -> Any:
        made.append(("mlflow", "start_run", run_id, run_name))
        return run("mlflow", run_id or "m1")

    def log_params(params: dict[str, Any]) -> None:
        assert len(params) <= 100
        made.append(("mlflow", "log_params", params.get("seed")))

    mlflow = types.SimpleNamespace(
        set_experiment=lambda name: made.append(("mlflow", "set_experiment", name)),
        start_run=start_run,
        log_params=log_params,
        log_metrics=lambda metrics, step: made.append(("mlflow", "log", step, metrics)),
        end_run=lambda status: made.append(("mlflow", "finish", status)),
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=wandb_init, Settings=lambda **given: given))
    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=trackio_init))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return made


def settings(*names: str, tensorboard: bool | str = False) -> PretrainSettings:
    return PretrainSettings(seed=5, records={"trackers": names, "tensorboard": tensorboard})


def track(chosen: list[Callback], folder: Path, step: int = 0, finished: bool = True) -> None:
    """Three lines of training, an event, and the end."""
    given = settings().model_dump(mode="json")
    with Records(folder, 10, step, callbacks=chosen) as records, started(chosen, folder, given, step) as ended:
        records.event(step, "begins")
        for at in range(step + 1, step + 4):
            records.write("train", at, {"loss": 2.0 * at, "parts": {"global": 0.5}, "text": "no number"})
        ended(finished)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_what_a_tracker_is_given(name: str, calls: Calls, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    track(trackers.chosen(settings(name)), folder, finished=False)
    track(trackers.chosen(settings(name)), folder, step=3)
    logged = [call[2:] for call in calls if call[:2] == (name, "log")]
    assert logged == [(at, {"train/loss": 2.0 * at, "train/parts/global": 0.5}) for at in range(1, 7)]
    kept = (folder / "trackers" / f"{name}.txt").read_text().strip()
    begun = [call[1:] for call in calls if call[1] in ("init", "start_run")]
    expected = {
        "wandb": [("init", "asit", None, "run", "allow", 5), ("init", "asit", "w1", "run", "allow", 5)],
        "mlflow": [("start_run", None, "run"), ("start_run", "m1", None)],
        "trackio": [("init", "asit", "allow", "run")] * 2,
    }
    assert begun == expected[name]
    assert kept == {"wandb": "w1", "mlflow": "m1"}.get(name, kept)
    ends = {"wandb": [1, 0], "mlflow": ["KILLED", "FINISHED"], "trackio": [None, None]}
    assert [call[2] for call in calls if call[1] == "finish"] == ends[name]
    if name == "mlflow":
        assert calls.count(("mlflow", "set_experiment", "asit")) == 2
        assert [call[2] for call in calls if call[1] == "log_params" and call[2]] == ["5"]  # once


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for asked in (settings(tensorboard=True), settings("tensorboard"), settings("tensorboard", tensorboard=True)):
        assert len(trackers.chosen(asked)) == 1
    track(trackers.chosen(settings(tensorboard="auto")), tmp_path)
    track(trackers.chosen(settings(tensorboard=True)), tmp_path, step=2)
    read = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"train/loss", "train/parts/global"}
    # What came after the checkpoint is taken out here as in metrics.jsonl, and the checkpoint's own step stays.
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(s, 2.0 * s) for s in range(1, 6)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_package_that_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    package = {"tensorboard": r"asit-audio\[tensorboard\]"}.get(name, name)
    with pytest.raises(ConfigError, match=rf"names {name}, and the package(.|\n)*pip install '{package}'"):
        trackers.chosen(settings(name))
    if name == "tensorboard":
        with pytest.raises(ConfigError, match=r"tensorboard is not installed(.|\n)*--records\.tensorboard False"):
            trackers.chosen(settings(tensorboard=True))
        with caplog.at_level(logging.INFO):
            assert trackers.chosen(settings(tensorboard="auto")) == []
        assert "pip install 'asit-audio[tensorboard]'" in caplog.text


def read_wandb(folder: Path) -> dict[int, float]:
    """Read the offline files: records of protobuf in LevelDB's log format, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for path in sorted(folder.rglob("*.wandb")):
        held, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(held):
            if 32768 - at % 32768 < 7:  # no header begins in the last bytes of a block
                at += 32768 - at % 32768
            size, kind = int.from_bytes(held[at + 4 : at + 6], "little"), held[at + 6]
            parts += held[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record, parts = wandb_internal_pb2.Record.FromString(parts), b""
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                if "train/loss" in items:
                    found[int(items["_step"])] = float(items["train/loss"])
    return found


def read_mlflow(folder: Path) -> dict[int, float]:
    import mlflow

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("asit").experiment_id])
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "5")
    return {one.step: one.value for one in client.get_metric_history(run.info.run_id, "train/loss")}


def read_trackio(folder: Path) -> dict[int, float]:
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("asit")
    logs = SQLiteStorage.get_logs("asit", name)
    return {line["step"]: line["train/loss"] for line in logs}


@pytest.mark.parametrize(("name", "read"), [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)])
def test_the_package_itself_without_a_network(
    name: str, read: Callable[[Path], dict[int, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = tmp_path / "run"
    folder.mkdir()
    track(trackers.chosen(settings(name)), folder, finished=False)
    track(trackers.chosen(settings(name)), folder, step=3)
    said = [one.message for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("asit")]
    assert said == []
    assert read(folder) == {step: 2.0 * step for step in range(1, 7)}


class Failing(Callback):
    """Fails at a call, in one of the ways in which packages fail."""

    def __init__(self, at: str, error: BaseException) -> None:
        self.at, self.error = at, error

    def _call(self, name: str) -> None:
        if name == self.at:
            raise self.error

    def on_start(self, *given: Any) -> None:
        self._call("start")

    def on_metrics(self, *given: Any) -> None:
        self._call("metrics")

    def on_end(self, finished: bool) -> None:
        self._call("end")


@pytest.mark.parametrize("at", ["make", "start", "metrics", "end"])
@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host\nand more"), OSError(28, "No space left on device"), SystemExit(1)]
)
def test_a_tracker_that_fails_is_said_once(
    at: str, error: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Callback:
        if at == "make":
            raise error
        return Failing(at, error)

    track([Guarded("wandb", make)], tmp_path)
    (said,) = [one.message for one in caplog.records if one.levelno == logging.WARNING]
    assert said.startswith(f"tracker wandb failed: {type(error).__name__}: ")
    assert said.endswith("the run goes on without it, and metrics.jsonl has every number")
    assert "and more" not in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3]


def test_a_tracker_that_hangs_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """At the end after `wait` seconds, and while training as soon as too many calls wait for it."""
    release = threading.Event()

    class Hanging(Callback):
        def on_metrics(self, *given: Any) -> None:
            release.wait(60)

    slow = Guarded("slow", Hanging, wait=0.05)
    slow.on_metrics("train", 1, {})
    slow.on_end(True)
    full = Guarded("full", Hanging, wait=0.05, waiting=3)
    for step in range(100):
        full.on_metrics("train", step, {})
    full.on_end(True)
    assert [one.message.partition(";")[0] for one in caplog.records] == [
        "tracker slow did not end within 0.05 s",
        "tracker full did not answer for 3 calls",
    ]
    release.set()


def test_trackers_are_not_in_settings_until_they_are_chosen() -> None:
    """Runs of before have no such lines, and are read."""
    plain = yaml.to_yaml(PretrainSettings())
    assert "trackers" not in plain
    assert "callbacks" not in plain
    chosen = settings("wandb", "mlflow")
    assert yaml.build(PretrainSettings, chosen.model_dump(mode="json"), "x").records.trackers == ("wandb", "mlflow")
    with pytest.raises(ConfigError, match=r"records\.trackers"):
        yaml.build(PretrainSettings, {"records": {"trackers": ["wandbb"]}}, "x")
