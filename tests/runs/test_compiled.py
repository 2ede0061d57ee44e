"""Compiled blocks in whole runs: alone, in several processes, sharded and recomputed, each against the plain run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asit.config import yaml
from asit.finetune import finetune_run
from asit.pretrain import pretrain_run

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"batch_size": 16, "epochs": 2, "records": {"figure_every": 0, "checkpoint_every": 100}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for this session alone: code that another build of torch left in the default one corrupts the heap."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))


def go(settings: Any) -> int:
    return 0 if pretrain_run.pretrain(settings).finished else 1


def compiled(run: Path) -> None:
    log = (run / "log.txt").read_text()
    assert "one by one (torch.compile, inductor)" in log
    if "compile: off" in log:
        pytest.skip("torch.compile does not work here")


def test_alone_and_computed_again(tiny: Any, tmp_path: Path, state: Any, close: Any) -> None:
    """Left-out patches bring a decoder and shapes of their own."""
    chosen = {**SHORT, "masking": {"align": True, "keep": 0.5}, "losses": {"local_share": 0.5}}
    runs = [tmp_path / name for name in ("plain", "compiled", "again")]
    for run, given in zip(
        runs, ({}, {"compile": True}, {"compile": True, "checkpoint_activations": True}), strict=True
    ):
        assert go(tiny(run, **chosen, **given)) == 0
    for run in runs[1:]:
        compiled(run)
        close(state(run), state(runs[0]))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_in_two_processes(parallel: str, tiny: Any, tmp_path: Path, state: Any, close: Any) -> None:
    """Gradients averaged or weights in shards, two micro-batches a step, blocks computed again."""
    plain, made = tmp_path / "plain", tmp_path / "made"
    assert go(tiny(plain, accumulate=2, **SHORT)) == 0
    settings = tiny(made, accumulate=2, compile=True, parallel=parallel, checkpoint_activations=True, **SHORT)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.to_yaml(settings))
    # Not forked: a child of a process that has compiled waits for the compiler's own processes for ever.
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "asit"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*call, "pretrain", "--config", str(file)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr
    compiled(made)
    close(state(made), state(plain))


def test_fine_tuning(tuned: Any, tmp_path: Path, state: Any, close: Any) -> None:
    runs = tmp_path / "plain", tmp_path / "made"
    for run, compile_ in zip(runs, (False, True), strict=True):
        assert finetune_run.finetune(tuned(run, compile=compile_)).finished
    compiled(runs[1])
    close(state(runs[1]), state(runs[0]))
