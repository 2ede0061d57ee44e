"""An interrupted and resumed run equals an uninterrupted one bit for bit; what cannot be resumed is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch

import asit
import asit.io.atomic
from asit import cli
from asit.config import FrontEndSettings, PretrainSettings, yaml
from asit.data.catalogue import scan
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.io import checkpoint
from asit.model.audio_model import AudioModel
from asit.pretrain import pretrain_run as runs


def go(settings: PretrainSettings, **how: Any) -> runs.PretrainResult:
    return runs.pretrain(settings, **how)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# equality


@pytest.mark.parametrize(
    ("stops", "workers"),
    [
        pytest.param([3], 1, id="with a worker"),
        pytest.param([1, 3, 4, 7], 0, id="again and again, once at the epoch's border"),
    ],
)
def test_parts_equal_the_whole(
    stops: list[int], workers: int, unstopped: Path, tiny: Any, tmp_path: Path, metrics: Any, same: Any, equal_runs: Any
) -> None:
    run = tmp_path / "run"
    for i, stop in enumerate(stops):
        result = go(tiny(run, stop_after=stop, workers=workers), resume=i > 0)
        assert (result.step, result.total, result.finished, result.stopped_by) == (stop, 8, False, None)
    result = go(tiny(run, workers=workers), resume=True)
    assert result.finished
    equal_runs(run, unstopped, lines=True)
    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    ours, theirs = AudioModel.load(run / "model"), AudioModel.load(unstopped / "model")
    same(ours.encoder.state_dict(), theirs.encoder.state_dict())
    assert len(names(run / "checkpoints")) == len(names(unstopped / "checkpoints")) == 2


def test_nothing_is_trivially_equal(unstopped: Path, tiny: Any, tmp_path: Path, state: Any, same: Any) -> None:
    """Weights, teacher, centres and optimiser all moved, so that their equality says something; the seed matters."""
    first, last = tmp_path / "first", state(unstopped)
    go(tiny(first, stop_after=1))
    start = state(first)
    kinds = ("task/student.", "task/teacher.", "task/class_centre.", "task/patch_centre.", "optimiser/")
    for kind in kinds:
        moved = [n for n in last if n.startswith(kind) and n in start and not torch.equal(start[n], last[n])]
        assert moved, f"nothing moved in {kind}"
    go(tiny(tmp_path / "other", seed=4))
    with pytest.raises(AssertionError):
        same(state(tmp_path / "other"), last)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tiny: Any, tmp_path: Path, fork: Any, equal_runs: Any) -> None:
    """After kill -9 at any moment the resumed run equals an uninterrupted one."""
    settings = {"epochs": kills, "records": {"checkpoint_every": 1}}
    go(tiny(tmp_path / "whole", **settings))
    rng = np.random.default_rng([2026, kills])
    run, killed = tmp_path / "run", 0

    def reached() -> int:
        last = checkpoint.latest_state(run / "checkpoints")
        return int(last.name.removeprefix("step-")) if last else 0

    while killed < kills:
        begun, wanted = (run / "config.yaml").exists(), reached() + rng.integers(0, 4)
        child = fork(lambda begun=begun: int(not go(tiny(run, **settings), resume=begun).finished))
        # By the steps that it has done and a moment more: however busy the machine is, it is killed in its midst.
        while child.process.is_alive() and reached() < wanted:
            time.sleep(0.002)
        child.process.join(rng.uniform(0.0, 0.1))
        if child.process.exitcode is not None:
            assert child.end().code == 0
            break  # it was quicker than this process: what is left is compared all the same
        child.process.kill()
        assert child.end().code == -signal.SIGKILL
        killed += 1
    assert killed >= kills // 2
    assert go(tiny(run, **settings), resume=(run / "config.yaml").exists()).finished
    equal_runs(run, tmp_path / "whole", lines=True)
    assert not [name for name in names(run) | names(run / "checkpoints") if "tmp" in name]


def killed_at(event: int, call: Callable[[], Any], run: Path) -> Callable[[], int]:
    """The call in a process that ends itself by kill -9 as it is about to change the run's folder the n-th time."""
    seen = itertools.count()
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "open"}

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if name not in changes or not str(arguments[0]).startswith(str(run)):
            return
        if name == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        if next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def body() -> int:
        sys.addaudithook(watch)
        call()
        return 0

    return body


@pytest.mark.parametrize("events", [(17, 41), pytest.param(tuple(range(400)), marks=pytest.mark.slow)])
def test_killed_at_each_change_of_the_folder(
    events: tuple[int, ...], unstopped: Path, tiny: Any, tmp_path: Path, fork: Any, same: Any, equal_runs: Any
) -> None:
    for event in events:
        run = tmp_path / f"run-{event}"
        ended = fork(killed_at(event, lambda run=run: go(tiny(run)), run)).end()
        if ended.code == 0:
            assert event > 60, "so few changes cannot be"
            break
        assert ended.code == -signal.SIGKILL, ended.said
        begun = (run / "config.yaml").exists()
        assert go(tiny(run), resume=begun).finished
        equal_runs(run, unstopped)
        same(asit.load(run / "model").encoder.state_dict(), asit.load(unstopped / "model").encoder.state_dict())
        # What a killed process leaves is no foreign file: the folder may be used again.
        if event == events[-1] or len(events) > 2:
            child = fork(killed_at(event // 2, lambda run=run: go(tiny(run), overwrite=True), run))
            assert child.end().code == -signal.SIGKILL
            go(tiny(run), overwrite=True)
            equal_runs(run, unstopped)
        shutil.rmtree(run)


def test_what_a_killed_writer_left_blocks_nothing(half: Path, tiny: Any, unstopped: Path, equal_runs: Any) -> None:
    """Killed as it removed the old model and the old checkpoint, both still with something in them."""
    for left in (half / ".model.old", half / "checkpoints" / ".step-00000002.tmp-99", half / ".model.tmp-99"):
        left.mkdir()
        (left / "card.json").touch()
    (half / ".metrics.jsonl.tmp").touch()
    (half / "figures").mkdir(exist_ok=True)
    for name in ("metrics.jsonl", "figures/step-00000003.png", "figures/step-00000003.npz", "model"):
        asit.io.atomic.draft_of(half / name).touch()
    page = asit.io.atomic.draft_of(half / "report.html")  # of asit report, which takes no lock
    page.touch()
    assert go(tiny(half), resume=True).finished
    equal_runs(half, unstopped)
    assert list(half.rglob(".*")) == [page]
    assert not [name for name in names(half) | names(half / "checkpoints") if "tmp-" in name or "old" in name]


def test_a_death_between_the_last_checkpoint_and_the_model(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unstopped: Path, same: Any
) -> None:
    """Whichever of the two is written first, the resumed run leaves the last step's model."""
    run = tmp_path / "run"
    for door in (AudioModel, checkpoint):
        with monkeypatch.context() as broken:
            real = getattr(door, "save" if door is AudioModel else "save_state")

            def dies(*arguments: Any, real: Any = real, **more: Any) -> Any:
                step = arguments[1] if isinstance(arguments[1], int) else arguments[0].card["training"]["step"]
                if step == 8:
                    raise KeyboardInterrupt
                return real(*arguments, **more)

            broken.setattr(door, real.__name__, dies)
            with pytest.raises(KeyboardInterrupt):
                go(tiny(run), overwrite=True)
        assert go(tiny(run), resume=True).finished
        same(asit.load(run / "model").encoder.state_dict(), asit.load(unstopped / "model").encoder.state_dict())


# signals


def arguments(settings: PretrainSettings, tmp_path: Path) -> list[str]:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.to_yaml(settings), "utf-8")
    return ["pretrain", "--config", str(file), "--out", settings.out]


LONG: dict[str, Any] = {"epochs": 6, "records": {"checkpoint_every": 10_000, "keep": 1}}


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("long") / "run"


@pytest.fixture
def long_run(long_folder: Path, tiny: Any) -> Path:
    """The run of 24 steps that was never stopped; made once."""
    if not long_folder.exists():
        go(tiny(long_folder, **LONG))
    return long_folder


@pytest.mark.parametrize(("number", "code", "workers"), [(signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 0)])
def test_a_signal_ends_with_a_checkpoint(
    number: signal.Signals,
    code: int,
    workers: int,
    long_run: Path,
    tiny: Any,
    tmp_path: Path,
    fork: Any,
    reaches: Any,
    equal_runs: Any,
) -> None:
    run = tmp_path / "my run"
    child = fork(lambda: cli.main(arguments(tiny(run, workers=workers, **LONG), tmp_path)))
    reaches(run, 3, [child])
    child.signal(number)
    ended = child.end()
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    stopped = checkpoint.latest_state(run / "checkpoints")
    assert stopped is not None
    step = int(stopped.name.removeprefix("step-"))
    assert 2 <= step < 24
    assert f"stopped by {number.name} at step {step} of 24" in ended.said
    advice = next(line for line in ended.said.splitlines() if "--resume" in line)
    _, *command = shlex.split(advice.partition(":")[2])
    assert fork(lambda: cli.main(command)).end().code == 0
    equal_runs(run, long_run, lines=True)


# what cannot go on


@pytest.fixture
def half(unstopped: Path, tmp_path: Path) -> Path:
    """A run of its own that stands at step 6 of 8."""
    run = tmp_path / "half"
    shutil.copytree(unstopped, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    return run


def test_changed_settings_are_named(half: Path, tiny: Any) -> None:
    changed = tiny(half, seed=9, optim={"lr": 0.01}, masking={"drop": 0.4}, workers=1, records={"log_every": 3})
    with pytest.raises(ConfigError) as caught:
        go(changed, resume=True)
    text = str(caught.value)
    assert "seed: 3 in the run, 9 now" in text
    assert "optim.lr: 0.05 in the run, 0.01 now" in text
    assert "masking.drop: 0.7 in the run, 0.4 now" in text
    assert "workers:" not in text
    assert "records.log_every:" not in text


def test_what_does_not_enter_the_steps_may_change(half: Path, tiny: Any, unstopped: Path, equal_runs: Any) -> None:
    assert go(tiny(half, workers=1, records={"log_every": 3, "keep": 5}, bad_files=0.5), resume=True).finished
    equal_runs(half, unstopped)


def test_changed_data_are_refused(half: Path, tiny: Any, recordings: Path, tmp_path: Path) -> None:
    for name in ("00.wav", "01.wav", "02.wav", "03.wav"):
        (tmp_path / "fewer").mkdir(exist_ok=True)
        shutil.copy(recordings / name, tmp_path / "fewer" / name)
    out = tmp_path / "fewer.jsonl"
    front_end = FrontEndSettings(**tiny(half).front_end.model_dump())
    scan.build(tmp_path / "fewer", out, front_end=front_end, workers=1)
    with pytest.raises(CatalogueError, match="another list of recordings"):
        go(tiny(half, data=out), resume=True)


def test_a_checkpoint_of_another_size_is_refused(half: Path, tiny: Any, tmp_path: Path) -> None:
    go(tiny(tmp_path / "wide", encoder={"width": 48}, stop_after=6))
    shutil.rmtree(half / "checkpoints")
    shutil.copytree(tmp_path / "wide" / "checkpoints", half / "checkpoints")
    with pytest.raises(CheckpointError, match=r"(48.*instead of.*32)(.|\n)*checkpoint of another size"):
        go(tiny(half), resume=True)


def test_a_damaged_checkpoint_names_the_older_one(tiny: Any, tmp_path: Path, unstopped: Path, equal_runs: Any) -> None:
    run = tmp_path / "run"
    go(tiny(run, stop_after=6))
    newest = run / "checkpoints" / "step-00000006"
    data = bytearray((newest / "state.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "state.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"SHA-256(.|\n)*remove .*step-00000006 .*step-00000004"):
        go(tiny(run), resume=True)
    shutil.rmtree(newest)
    assert go(tiny(run), resume=True).finished
    equal_runs(run, unstopped)


def test_a_damaged_config_is_refused(half: Path, tiny: Any) -> None:
    (half / "config.yaml").write_text("optim: {lr: fast}\nmaskin: 3\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml(.|\n)*optim\.lr(.|\n)*maskin: no such setting, did you mean masking"
    ):
        go(tiny(half), resume=True)


@pytest.mark.parametrize("full", ["rename", "tensors"])
def test_a_full_disk(
    full: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unstopped: Path, equal_runs: Any
) -> None:
    """The older checkpoint stays, nothing incomplete stays, and with room again the run resumes."""
    run = tmp_path / "run"
    with monkeypatch.context() as disk:
        if full == "tensors":
            real = safetensors.torch.save_file

            def save_file(tensors: Any, path: Any, **more: Any) -> None:
                real(tensors, path, **more)
                if "step-00000004" in str(path):
                    raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

            disk.setattr(safetensors.torch, "save_file", save_file)
        else:
            rename = Path.rename

            def refuse(self: Path, target: Path) -> Path:
                if "step-00000004" in str(target):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
                return rename(self, target)

            disk.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointError, match=r"the disk is full(.|\n)*--resume, which resumes from step 2"):
            go(tiny(run))
    assert names(run / "checkpoints") == {"step-00000002"}
    assert not [name for name in names(run) if "tmp" in name or "old" in name]
    assert asit.load(run / "model").card["training"]["step"] in (2, 4)
    assert go(tiny(run), resume=True).finished
    equal_runs(run, unstopped)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda run: None, "is not there"),
        (lambda run: run.mkdir(), "it is empty"),
        (lambda run: (run.mkdir(), (run / "holiday.jpg").touch()), "holiday.jpg"),
    ],
)
def test_nothing_to_resume(make: Callable[[Path], Any], text: str, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(run)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=text) as caught:
        go(tiny(run), resume=True)
    assert "without --resume" in caught.value.remedy
    assert sorted(tmp_path.rglob("*")) == before


def test_to_resume_needs_no_more_than_the_folder(half: Path, unstopped: Path, equal_runs: Any) -> None:
    """`asit pretrain --out RUN --resume` finds all else in the run."""
    assert cli.main(["pretrain", "--out", str(half), "--resume"]) == 0
    equal_runs(half, unstopped)


def test_a_run_of_a_folder_of_which_short_files_are_left_out(tiny: Any, recordings: Path, tmp_path: Path) -> None:
    """The view's length follows the median clip; what is left out by it must not change it when the run is resumed."""
    data = tmp_path / "data"
    data.mkdir()
    wave, rate = soundfile.read(recordings / "15.wav", dtype="float32")
    for tenths, count in ((3, 15), (8, 6), (12, 10)):
        for i in range(count):
            soundfile.write(data / f"{tenths}-{i}.wav", np.tile(wave, 2)[: rate * tenths // 10], rate, subtype="FLOAT")
    views = {"seconds": "auto", "short_files": "skip", "local_seconds": "auto"}
    go(tiny(tmp_path / "run", data=data, views=views, epochs=1, stop_after=2))
    resolved = yaml.read_yaml(tmp_path / "run" / "config.yaml")
    assert go(tiny(tmp_path / "run", data=data, views=views, epochs=1, stop_after=3), resume=True).step == 3
    assert isinstance(resolved["views"]["seconds"], float)


THREADS = """
import pickle, sys, torch
from asit import logs
from asit.pretrain.pretrain_run import pretrain
torch.set_num_threads(int(sys.argv[2]))  # what torch would take on the machine
with logs.console():
    pretrain(pickle.loads(open(sys.argv[1], "rb").read()), resume=sys.argv[3] == "True")
print(torch.get_num_threads())
"""


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 2])
def test_a_run_goes_on_with_the_threads_that_it_began_with(asked: int, tiny: Any, tmp_path: Path) -> None:
    """Other threads, other last bits: on another machine the run takes its own number, unless one is asked for."""

    def pretrain(threads: int, here: int, resume: bool, stop: int) -> tuple[int, str]:
        # A process of its own: a fork of one that OpenMP has threads in may hang.
        (tmp_path / "settings").write_bytes(pickle.dumps(tiny(tmp_path / "run", threads=threads, stop_after=stop)))
        given = [str(tmp_path / "settings"), str(here), str(resume)]
        done = subprocess.run([sys.executable, "-c", THREADS, *given], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return int(done.stdout), done.stderr

    assert pretrain(0, 3, False, 1)[0] == 3
    threads, said = pretrain(asked, 1, True, 2)
    assert threads == (asked or 3)
    message = (
        "2 CPU threads as requested; only the 3 that the run began" if asked else "3 CPU threads, as when the run began"
    )
    assert message in said


@pytest.mark.parametrize(
    ("write", "way"),
    [
        (0, "give the same command again, from step 0: no checkpoint was written yet"),  # the first model
        (1, "give the same command again, from step 0: no checkpoint was written yet"),  # the first state
        (3, "give the same command with --resume, which resumes from step 1"),
    ],
)
def test_a_disk_that_fills_names_the_checkpoint_that_is_there(
    write: int, way: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, begun, real = tmp_path / "run", itertools.count(), checkpoint._write_pair

    def full(*given: Any) -> None:
        if next(begun) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*given)

    settings = {"epochs": 1, "records": {"checkpoint_every": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_pair", full)
        with pytest.raises(CheckpointError, match="the disk is full") as caught:
            go(tiny(run, **settings))
    assert way in caught.value.remedy
    assert "ended by an error: the disk is full" in (run / "log.txt").read_text()
    assert go(tiny(run, **settings), resume="--resume" in way).finished


def test_a_disk_that_fills_under_the_records(tiny: Any, tmp_path: Path, fork: Any) -> None:
    def body() -> int:
        from asit.training.metrics_log import Records

        def full(self: Records, kind: str, step: int, values: Any) -> None:
            if step >= 2:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        Records.write = full  # type: ignore[method-assign]
        often = {"checkpoint_every": 1, "log_every": 1}
        return cli.main(arguments(tiny(tmp_path / "run", epochs=1, records=often), tmp_path))

    ended = fork(body).end()
    assert ended.code == 2
    assert re.search(r"the disk is full(.|\n)*free space(.|\n)*--resume(.|\n)*from step 1", ended.said)
    assert "Traceback" not in ended.said
