"""Tiny recordings, tiny settings, and runs in processes of their own that can be killed."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from torch import Tensor

from asit import logs
from asit.config import EncoderSettings, FinetuneSettings, FrontEndSettings, PretrainSettings
from asit.data.catalogue import scan
from asit.errors import AsitError
from asit.io import checkpoint
from asit.model.encoders import empty_encoder
from asit.pretrain import pretrain_run

if sys.platform == "win32":
    pytest.skip("forked runs need a POSIX system", allow_module_level=True)


@pytest.fixture(autouse=True)
def few_draws_in_all_runs(few_draws: None) -> None:
    """Most tests here compare runs, whose scores take longer than their training."""


RATE = 8000
FRONT_END = {"rate": RATE, "mels": 32, "mean": -8.0, "std": 3.5}
TINY: dict[str, Any] = {
    "seed": 3,
    "epochs": 2,
    "batch_size": 4,
    "device": "cpu",
    "precision": "float32",
    "workers": 0,
    "threads": 1,
    "front_end": FRONT_END,
    "views": {"seconds": 0.5, "local_views": 1, "local_seconds": 0.2, "gain_db": 3.0, "stretch": 0.1},
    "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 1, "patch_frames": 16, "patch_mels": 16},
    "heads": {"hidden": 64, "bottleneck": 32, "class_prototypes": 64, "patch_prototypes": 48},
    "optim": {"lr": 0.05, "warmup": 0.5, "freeze_last_layer": 0.5},
    "losses": {"teacher_warmup": 1.0},
    "records": {"log_every": 1, "figure_every": 0, "checkpoint_every": 2, "keep": 2, "tensorboard": False},
}


def write_wave(path: Path, seconds: float, seed: int, rate: int = RATE) -> Path:
    """A chirp in noise, another for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.2 * np.sin(2 * np.pi * rng.uniform(100, 1500) * t * (1 + rng.uniform(0, 1) * t))
    soundfile.write(path, (wave + 0.02 * rng.standard_normal(len(t))).astype(np.float32), rate, subtype="FLOAT")
    return path


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 16 recordings of about a second; nothing may change it."""
    folder = tmp_path_factory.mktemp("recordings")
    for i in range(16):
        write_wave(folder / f"{i:02d}.wav", 0.8 + 0.02 * i, i)
    return folder


@pytest.fixture(scope="session")
def listed(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their catalogue."""
    out = tmp_path_factory.mktemp("listed") / "c.jsonl"
    scan.build(recordings, out, front_end=FrontEndSettings(**FRONT_END), workers=1)
    return out


@pytest.fixture
def tiny(listed: Path) -> Callable[..., PretrainSettings]:
    """Settings of a run of 8 steps in 2 epochs; groups given are laid over these."""

    def make(out: Path, data: Path | None = None, **over: Any) -> PretrainSettings:
        values = {name: {**TINY[name], **over.pop(name, {})} for name, v in TINY.items() if isinstance(v, dict)}
        return PretrainSettings(data=str(data or listed), out=str(out), **{**TINY, **values, **over})

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the uninterrupted pretraining run, which `unstopped` makes once per session."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def unstopped(whole: Path, tiny: Callable[..., PretrainSettings]) -> Path:
    """A finished run of `tiny`; nothing may change it."""
    if not whole.exists():
        assert pretrain_run.pretrain(tiny(whole)).finished
    return whole


@pytest.fixture(scope="session")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 25 recordings of low, middle and high notes, 0.4 to 0.9 s and one of 1.7 s; nothing may change it.

    12 train, 6 validate, 7 test; folds 1 and 2; the group is of three recordings.
    """
    folder, rng = tmp_path_factory.mktemp("notes"), np.random.default_rng(0)
    rows = []
    for i in range(25):
        pitch, seconds = i % 3, 1.7 if i == 24 else 0.4 + 0.02 * i
        t = np.arange(round(seconds * RATE)) / RATE
        wave = 0.2 * np.sin(2 * np.pi * (300, 900, 2200)[pitch] * (1 + 0.01 * i) * t) + 0.1 * rng.standard_normal(
            len(t)
        )
        soundfile.write(folder / f"{i:02d}.wav", wave.astype(np.float32), RATE, subtype="FLOAT")
        split = "test" if i == 24 else ("train", "train", "validation", "test")[i // 3 % 4]
        rows.append([f"{i:02d}.wav", ("low", "middle", "high")[pitch], split, str(i // 3 % 2 + 1), f"g{i // 3}"])
    with (folder / "notes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "fold", "group"], *rows])
    return folder / "notes.csv"


@pytest.fixture(scope="session")
def labelled(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their catalogue."""
    out = tmp_path_factory.mktemp("labelled") / "c.jsonl"
    scan.build(notes, out, front_end=FrontEndSettings(**FRONT_END), workers=1)
    return out


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """ImageNet ViT weights, 64 wide with 2 blocks, in timm's names."""
    generator, path = torch.Generator().manual_seed(0), tmp_path / "vit.safetensors"
    made = empty_encoder(EncoderSettings(size="custom", width=64, depth=2, heads=1), 64, 32)
    state = {name: torch.randn(x.shape, generator=generator) * 0.02 for name, x in made.state_dict().items()}
    state["patch_embed.proj.weight"] = torch.randn(64, 3, 16, 16, generator=generator)
    state["pos_embed"] = torch.randn(1, 1 + 14 * 14, 64, generator=generator)
    state["head.weight"] = torch.zeros(10, 64)
    safetensors.torch.save_file(state, path)
    return path


TUNED: dict[str, Any] = {
    **{name: TINY[name] for name in ("seed", "epochs", "batch_size", "device", "precision", "workers", "threads")},
    "model": "none",
    "front_end": FRONT_END,
    "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2},
    "input": {"seconds": 0.5},
    "network": {"dropout": 0.2},
    "augment": {
        **{"mixup": 0.5, "mixup_probability": 0.5, "roll_seconds": 0.1, "gain_db": 3.0, "noise": 0.1, "stretch": 0.1},
        **{"mel_warp": 0.1, "mel_mask": 6, "time_mask": 8},
    },
    "sampling": {"order": "balanced"},
    "optim": {"lr": 3e-3, "warmup": 0.5, "average": "ema", "ema": 0.7},
    "records": {"log_every": 1, "checkpoint_every": 2, "keep": 2, "tensorboard": False},
}


@pytest.fixture
def tuned(labelled: Path) -> Callable[..., FinetuneSettings]:
    """Settings of a fine-tuning run of 6 steps in 2 epochs with all there is; groups given are laid over these."""

    def make(out: Path, data: Path | None = None, **over: Any) -> FinetuneSettings:
        values = {name: {**value, **over.pop(name, {})} for name, value in TUNED.items() if isinstance(value, dict)}
        return FinetuneSettings(data=str(data or labelled), out=str(out), **{**TUNED, **values, **over})

    return make


@dataclass
class Ended:
    """How a process ended and what it said; `code` is minus the signal's number where one killed it."""

    code: int
    said: str


@dataclass
class Child:
    """A forked process that may be signalled."""

    process: Any
    output: Path
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self, seconds: float = 60.0) -> Ended:
        self.process.join(seconds)
        alive = self.process.is_alive()
        if alive:
            self.process.kill()
            self.process.join()
        said = self.output.read_text("utf-8")
        assert not alive, f"the process did not end:\n{said}"
        return Ended(self.process.exitcode, said)


def _body(call: Callable[[], Any], output: Path, environment: Mapping[str, str]) -> None:
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(environment)
    try:
        with logs.console():
            code = call()
    except AsitError as error:
        sys.stderr.write(f"asit: {error}\n")
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


@pytest.fixture
def fork(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start a call in a forked process (nothing is imported again); its number is the exit status."""
    children: list[Child] = []

    def start(call: Callable[[], Any], environment: Mapping[str, str] | None = None) -> Child:
        output = tmp_path / f"output-{len(children)}.txt"
        output.touch()
        process = multiprocessing.get_context("fork").Process(target=_body, args=(call, output, environment or {}))
        process.start()
        children.append(Child(process, output))
        return children[-1]

    yield start
    for child in children:
        if child.process.is_alive():
            child.process.kill()
            child.process.join()


@pytest.fixture
def start_ranks(fork: Callable[..., Child]) -> Callable[..., list[Child]]:
    """Start a call in several processes that train together, as torchrun starts them."""

    def start(size: int, call: Callable[[], Any]) -> list[Child]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common |= {"LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
        return [fork(call, {**common, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]

    return start


@pytest.fixture
def ranks(start_ranks: Callable[..., list[Child]]) -> Callable[..., list[Ended]]:
    """Run a call in several processes that train together, to their ends, with this exit status, if any."""

    def run(size: int, call: Callable[[], Any], code: int | None = None) -> list[Ended]:
        ended = [child.end() for child in start_ranks(size, call)]
        assert code is None or [one.code for one in ended] == [code] * size, ended
        return ended

    return run


@pytest.fixture
def reaches() -> Callable[..., None]:
    """Wait until a run has written this many lines of metrics while its processes live."""

    def wait(run: Path, lines: int, children: Sequence[Child], seconds: float = 60.0) -> None:
        file, end = run / "metrics.jsonl", time.monotonic() + seconds
        while not file.exists() or file.read_bytes().count(b"\n") < lines:
            for child in children:
                assert child.process.is_alive(), child.output.read_text("utf-8")
            assert time.monotonic() < end, "it never came to that"
            time.sleep(0.005)

    return wait


@pytest.fixture
def state() -> Callable[[Path], dict[str, Tensor]]:
    """Everything in the newest checkpoint of a run: weights, teacher, centres, optimiser."""

    def read(run: Path) -> dict[str, Tensor]:
        last = checkpoint.latest_state(run / "checkpoints")
        assert last is not None
        return checkpoint.load_state(last)[0]

    return read


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """The training lines of a run without what the clock decides."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        timed = ("clips_per_second", "data_wait", "seconds")
        return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == "train"]

    return read


@pytest.fixture
def same() -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]:
    """Two states are equal bit for bit."""

    def compare(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []

    return compare


@pytest.fixture
def equal_runs(state: Any, same: Any, metrics: Any) -> Callable[..., None]:
    """Two runs have the same last checkpoint, bit for bit, and, where `lines`, the same lines of training."""

    def compare(left: Path, right: Path, lines: bool = False) -> None:
        same(state(left), state(right))
        assert not lines or metrics(left) == metrics(right)

    return compare


@pytest.fixture
def close() -> Callable[..., None]:
    """Tensors of two states are equal but for rounding."""

    def without_keys(name: str, value: Tensor) -> Tensor:
        """The bias of the keys, which softmax cancels, set to 0: its gradient is 0 but for rounding."""
        if not name.endswith("attn.qkv.bias"):
            return value
        third = len(value) // 3
        return torch.cat([value[:third], value[2 * third :]])

    def compare(
        left: Mapping[str, Tensor],
        right: Mapping[str, Tensor],
        prefix: str = "task/",
        rtol: float = 1e-3,
        atol: float = 5e-5,
        steps: float = 0.0,
    ) -> None:
        """One value in 10,000 may differ by `steps`."""
        assert left.keys() == right.keys()
        names = [name for name in left if name.startswith(prefix)]
        assert names
        pairs = [(without_keys(name, left[name]).float(), without_keys(name, right[name]).float()) for name in names]
        if steps:
            apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
            allowed = torch.cat([atol + rtol * b.abs().flatten() for _, b in pairs])
            assert apart.max() <= steps
            assert (apart > allowed).float().mean() <= 1e-4, f"{int((apart > allowed).sum())} of {len(apart)} differ"
            return
        for name, (a, b) in zip(names, pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")

    return compare
