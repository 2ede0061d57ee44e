"""Several processes: they agree before anything is written, none waits for a lost one, and torchrun restarts resume."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from asit import cli, runtime
from asit.config import FrontEndSettings, PretrainSettings, yaml
from asit.data.catalogue import scan
from asit.errors import CheckpointError, ConfigError, TrainingError
from asit.finetune import cross_validation, finetune_run
from asit.io import checkpoint
from asit.pretrain import pretrain_run
from asit.training import run_claim
from asit.training.metrics_log import Records
from asit.training.stopping import Failures

LONG: dict[str, Any] = {"epochs": 30, "records": {"checkpoint_every": 5, "keep": 2}}
"""120 steps."""


def go(settings: PretrainSettings, **how: Any) -> int:
    return 0 if pretrain_run.pretrain(settings, **how).finished else 1


class Ranks:
    """What several processes would give each other, set beforehand."""

    def __init__(self, *values: Any) -> None:
        self.values, self.size = list(values), len(values)

    def gather(self, value: Any) -> list[Any]:
        return self.values


# agreement


def test_what_differs_is_named_with_its_ranks() -> None:
    common = {"seed": 3, "optim.lr": 0.05, "version of torch": "2.13"}
    other = {**common, "optim.lr": 0.5, "views.roll": 0.5}
    world = Ranks(("node1", common), ("node1", common), ("node2", other), ("node2", common))
    with pytest.raises(TrainingError) as caught:
        run_claim.agree(world, common)  # type: ignore[arg-type]
    text = str(caught.value)
    assert "the 4 processes of this run disagree about 2 things" in text
    assert "optim.lr: 0.05 on ranks 0, 1, 3 (node1, node2); 0.5 on rank 2 (node2)" in text
    assert "views.roll: not there on ranks 0, 1, 3 (node1, node2); 0.5 on rank 2 (node2)" in text
    assert "seed" not in text
    run_claim.agree(Ranks(("a", common), ("b", dict(common))), common)  # type: ignore[arg-type]


def test_each_machine_may_have_its_own_paths_and_processes(tiny: Any, tuned: Any, tmp_path: Path) -> None:
    ours, theirs = (
        run_claim.of_settings(tiny(tmp_path, data=tmp_path / name, workers=w, threads=w, views={"keep_gb": float(w)}))
        for name, w in (("here", 1), ("there", 2))
    )
    assert ours == theirs
    assert ours["optim.lr"] == 0.05
    assert "records.checkpoint_every" in ours
    assert run_claim.of_settings(tuned(tmp_path))["augment.mixup"] == 0.5


def test_the_code_is_compared_by_its_source() -> None:
    code = run_claim.of_code()
    assert code["version of torch"] == torch.__version__
    assert len(code["source of asit (SHA-256)"]) == 16


@pytest.mark.parametrize("kind", ["tiny", pytest.param("tuned", marks=pytest.mark.slow)])
def test_processes_that_differ_all_stop(kind: str, request: pytest.FixtureRequest, tmp_path: Path, ranks: Any) -> None:
    make, run = request.getfixturevalue(kind), tmp_path / "run"
    start: Any = pretrain_run.pretrain if kind == "tiny" else finetune_run.finetune

    def body() -> int:
        rate = 0.05 if os.environ["RANK"] == "0" else 0.04
        start(make(run, optim={"lr": rate}))
        return 0

    ended = ranks(2, body)
    assert [e.code for e in ended] == [2, 2]
    for one in ended:
        assert f"optim.lr: 0.05 on rank 0 ({socket.gethostname()}); 0.04 on rank 1" in one.said
        assert "Traceback" not in one.said
    assert not run.exists()


# resuming by themselves


def test_auto_resume_begins_and_goes_on(tiny: Any, tmp_path: Path, equal_runs: Any) -> None:
    run, file = tmp_path / "run", tmp_path / "s.yaml"
    file.write_text(yaml.to_yaml(tiny(run, epochs=1, stop_after=1)))
    call = ["pretrain", "--config", str(file), "--auto-resume"]
    assert cli.main(call) == 0
    assert cli.main([*call, "--stop-after", "0"]) == 0
    assert cli.main([*call, "--stop-after", "0"]) == 0  # finished: nothing is left to do, and nothing is wrong
    go(tiny(tmp_path / "whole", epochs=1))
    equal_runs(run, tmp_path / "whole")


def test_auto_resume_goes_with_neither_of_the_others(
    tiny: Any, tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in ("pretrain", "finetune"):
        for other in ("--resume", "--overwrite"):
            assert cli.main([verb, "--out", str(tmp_path / "run"), "--auto-resume", other]) == 2
            assert f"--auto-resume and {other} were both given" in capsys.readouterr().err
    for call, settings in (
        (pretrain_run.pretrain, tiny(tmp_path / "run")),
        (cross_validation.run, tuned(tmp_path / "run", sides={"fold": "all"})),
    ):
        with pytest.raises(ConfigError, match="--resume and --overwrite were both given"):
            call(settings, resume="auto", overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_restart_goes_on_with_what_the_same_torchrun_began(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert go(tiny(run, epochs=1, stop_after=1)) == 1
    assert json.loads((run / "environment.json").read_text())["elastic"] == "job-1"
    with pytest.raises(ConfigError, match="holds a run already"):
        go(tiny(run, epochs=1, stop_after=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = pretrain_run.pretrain(tiny(run, epochs=1, stop_after=2), overwrite=True)
    assert result.step == 2
    assert "resumed from step 1" in (run / "log.txt").read_text()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    with pytest.raises(ConfigError, match="holds a run already"):
        go(tiny(run, epochs=1))


# what cannot be read, or written


def test_what_any_process_could_not_read_is_told_and_counted(
    tiny: Any, recordings: Path, tmp_path: Path, ranks: Any
) -> None:
    """Six of sixteen recordings are damaged after they were listed; each process meets some of them."""
    data, listed = tmp_path / "data", tmp_path / "c.jsonl"
    shutil.copytree(recordings, data)
    scan.build(data, listed, front_end=FrontEndSettings(**tiny(data).front_end.model_dump()), workers=1)
    for number in range(6):
        (data / f"{number:02d}.wav").write_bytes(b"no sound")
    settings = {"data": listed, "epochs": 1, "bad_files": 1.0, "views": {"keep_gb": 0.0}}
    ranks(2, lambda: go(tiny(tmp_path / "run", **settings)), code=0)
    log_lines = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "left out: " in line]
    assert sorted(re.findall(r"(\d\d)\.wav", " ".join(log_lines))) == [f"{number:02d}" for number in range(6)]


@pytest.mark.slow
def test_too_many_that_several_processes_could_not_read_end_all(ranks: Any) -> None:
    """Each has met fewer than it takes; together they are too many."""

    def body() -> int:
        with runtime.world("cpu", 1) as world:
            failures = Failures(3, Records(None, 1, 0), world)
            failures.add([f"{world.rank}-{i}.wav is gone" for i in range(2)], 1)
            failures.share(1)
            failures.add([], 2)
        return 0

    for ended in ranks(2, body):
        assert ended.code == 2
        assert re.search(
            r"4 recordings could not be read, the last: \d-1.wav is gone\n  expected: at most 3", ended.said
        )


@pytest.mark.slow
def test_a_full_disk_ends_all_processes(tiny: Any, tmp_path: Path, ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoint.save_state

    def full(root: Path, step: int, *more: Any) -> Path:
        if step == 10:
            raise CheckpointError("the disk is full")
        return save(root, step, *more)

    monkeypatch.setattr(checkpoint, "save_state", full)
    run = tmp_path / "run"
    ended = ranks(2, lambda: go(tiny(run, **LONG)))
    assert [e.code for e in ended] == [2, 2]
    assert "the disk is full" in ended[0].said
    assert "the main process of this run could not write a checkpoint" in ended[1].said
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000005"]


# what dies


@pytest.mark.slow
def test_a_killed_rank_leaves_no_other_waiting(tiny: Any, tmp_path: Path, start_ranks: Any, reaches: Any) -> None:
    run = tmp_path / "run"
    children = start_ranks(2, lambda: go(tiny(run, **{**LONG, "epochs": 4000})))
    reaches(run, 8, children)
    children[1].signal(signal.SIGKILL)
    began = time.monotonic()
    ended = [child.end() for child in children]
    assert time.monotonic() - began < 20
    assert [e.code for e in ended] == [2, -signal.SIGKILL]
    assert "rank 0 lost another process of this run" in ended[0].said
    assert "--resume" in ended[0].said
    assert "Traceback" not in ended[0].said
    assert not (run / "run.lock").exists()
    step = int(sorted(path.name for path in (run / "checkpoints").iterdir())[-1].removeprefix("step-"))
    assert go(tiny(run, **{**LONG, "epochs": 4000}, stop_after=step + 1), resume=True) == 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_so_long_and_no_longer(
    tiny: Any, tmp_path: Path, start_ranks: Any, reaches: Any
) -> None:
    run = tmp_path / "run"
    children = start_ranks(2, lambda: go(tiny(run, process_timeout=0.05, **{**LONG, "epochs": 4000})))
    reaches(run, 8, children)
    children[1].signal(signal.SIGSTOP)
    try:
        ended = children[0].end(40)
    finally:
        children[1].signal(signal.SIGKILL)
    assert ended.code == 2
    assert "answer within 0.05 minutes (process_timeout)" in ended.said


# torchrun


class Torchrun:
    """A run under torchrun's agent on this machine."""

    def __init__(self, size: int, restarts: int, call: Sequence[str], output: Path) -> None:
        self.output, environment = output, {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["--max-restarts", str(restarts), "-m", "asit", *call]
        with output.open("w") as file:
            self.agent = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def pids(self) -> dict[int, int]:
        """Rank -> process."""
        found = {}
        for process in Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split():
            said = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            found |= {int(line[5:]): int(process) for line in said if line.startswith(b"RANK=")}
        return found

    def end(self, seconds: float = 120.0) -> int:
        return self.agent.wait(seconds)

    @property
    def said(self) -> str:
        return self.output.read_text("utf-8")


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("needs /proc")
    made: list[Torchrun] = []

    def start(size: int, restarts: int, *call: str) -> Torchrun:
        made.append(Torchrun(size, restarts, call, tmp_path / f"torchrun-{len(made)}.txt"))
        return made[-1]

    yield start
    for one in made:
        if one.agent.poll() is None:
            one.agent.terminate()
            one.agent.wait(60)


def until(seen: Callable[[], bool], job: Torchrun, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert job.agent.poll() is None, job.said
        assert time.monotonic() < end, job.said
        time.sleep(0.02)


def _has(path: Path) -> Callable[[], bool]:
    return functools.partial(Path.exists, path)


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "victim"), [("pretrain", 0), ("pretrain", 1), ("finetune", 1)])
def test_a_killed_worker_is_started_again_and_nothing_is_seen_of_it(
    verb: str,
    victim: int,
    request: pytest.FixtureRequest,
    torchrun: Any,
    tmp_path: Path,
    ranks: Any,
    equal_runs: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()  # the bootstrap draws as often in this process as in those that torchrun starts
    make: Any = request.getfixturevalue("tiny" if verb == "pretrain" else "tuned")
    call: Any = pretrain_run.pretrain if verb == "pretrain" else finetune_run.finetune
    run, file, whole = tmp_path / "run", tmp_path / "s.yaml", make(tmp_path / "whole", **LONG)
    file.write_text(yaml.to_yaml(make(run, **LONG)))
    job = torchrun(2, 2, verb, "--config", str(file))
    for kill, step in enumerate((10, 40)):
        until(_has(run / "checkpoints" / f"step-{step:08d}"), job)
        os.kill(job.pids()[victim], signal.SIGKILL)
        until(lambda kill=kill: (run / "log.txt").read_text().count("resumed from step") == kill + 1, job)
    assert job.end() == 0, job.said
    ranks(2, lambda: int(not call(whole).finished), code=0)
    equal_runs(run, tmp_path / "whole", lines=True)
    if verb == "finetune":
        ours, theirs = (json.loads((at / "results.json").read_text()) for at in (run, tmp_path / "whole"))
        assert ours["results"] == theirs["results"]


@pytest.mark.slow
def test_sigterm_to_the_agent_leaves_a_checkpoint(torchrun: Any, tiny: Any, tmp_path: Path) -> None:
    """As a scheduler does it: the signal goes to the agent and to its processes, and the agent passes it on too."""
    run, file = tmp_path / "run", tmp_path / "s.yaml"
    file.write_text(yaml.to_yaml(tiny(run, **{**LONG, "epochs": 4000, "records": {"checkpoint_every": 10_000}})))
    job = torchrun(2, 0, "pretrain", "--config", str(file), "--auto-resume")
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > 2000, job)
    workers = job.pids().values()
    job.agent.send_signal(signal.SIGTERM)
    for process in workers:
        os.kill(process, signal.SIGTERM)
    assert job.end() != 0
    assert "stopped by SIGTERM at step" in (run / "log.txt").read_text()
    (last,) = (run / "checkpoints").iterdir()
    step = int(last.name.removeprefix("step-"))
    stopped = torchrun(1, 0, "pretrain", "--config", str(file), "--auto-resume", "--stop-after", str(step + 2))
    assert stopped.end() == 0, stopped.said
    assert f"resumed from step {step}" in (run / "log.txt").read_text()


@pytest.mark.slow
def test_four_processes_then_two_then_one(tiny: Any, tmp_path: Path, ranks: Any, state: Any, metrics: Any) -> None:
    """The same samples and, to rounding, the same losses, although the sums are taken in another order."""
    whole = {"batch_size": 16, "epochs": 6, "masking": {"donor_pool": 4}}
    run = tmp_path / "run"
    ranks(4, lambda: go(tiny(run, **whole, stop_after=2)), code=1)
    ranks(2, lambda: go(tiny(run, **whole, stop_after=4), resume=True), code=1)
    assert go(tiny(run, **whole), resume=True) == 0
    assert go(tiny(tmp_path / "one", **whole)) == 0
    ours, theirs = ([line["loss"] for line in metrics(at)] for at in (run, tmp_path / "one"))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert state(run).keys() == state(tmp_path / "one").keys()


SCRIPT = Path(__file__).parents[2] / "examples" / "slurm_pretrain.sh"
SLURM = {
    # One machine: the options of srun are dropped, and its command is run in a process that scancel finds.
    "srun": 'while [[ $1 == --* ]]; do shift; done; echo $$ > "$PLACE/step"; exec "$@"',
    "scancel": 'echo "scancel $*" >> "$PLACE/calls"; kill -TERM "$(cat "$PLACE/step")"',
    "scontrol": 'echo "scontrol $*" >> "$PLACE/calls"; if [[ $1 == show ]]; then echo 127.0.0.1; fi',
}


@pytest.mark.slow
def test_the_slurm_script_ends_with_a_checkpoint_and_goes_on(tiny: Any, listed: Path, tmp_path: Path) -> None:
    """As far as one machine shows it: srun, scancel and scontrol are stand-ins."""
    run, file, place = tmp_path / "run", tmp_path / "s.yaml", tmp_path / "slurm"
    place.mkdir()
    for name, body in SLURM.items():
        (place / name).write_text(f"#!/bin/bash\n{body}\n")
        (place / name).chmod(0o755)
    file.write_text(yaml.to_yaml(tiny(run, **{**LONG, "epochs": 4000, "records": {"checkpoint_every": 10_000}})))
    given = {"DATA": str(listed), "OUT": str(run), "PYTHON": sys.executable, "PROCESSES": "2", "PLACE": str(place)}
    given |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "x", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **given, "PATH": f"{place}:{os.environ['PATH']}"}
    call = ["bash", str(SCRIPT), "--config", str(file)]
    job = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end, lines = time.monotonic() + 120, run / "metrics.jsonl"
    while not lines.exists() or lines.stat().st_size < 2000:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 0, said
    calls = (place / "calls").read_text().splitlines()
    assert calls[1:] == [f"scancel --signal=TERM {os.getpid()}", f"scontrol requeue {os.getpid()}"]
    (last,) = (run / "checkpoints").iterdir()
    step = int(last.name.removeprefix("step-"))
    again = subprocess.run(
        [*call, "--stop-after", str(step + 2)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert f"resumed from step {step}" in (run / "log.txt").read_text()
    assert len((place / "calls").read_text().splitlines()) == 4  # not asked to end: not put into the queue again
