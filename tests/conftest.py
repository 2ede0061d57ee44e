"""What several rooms' tests share."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from asit.config import EncoderSettings, FrontEndSettings
from asit.evaluate.result_records import label_metrics
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder

REPOSITORY = Path(__file__).parents[1]

# At the first backward pass torch starts a thread for each kind of device that is registered by then, and a process
# with such threads cannot be forked. Builds for CUDA register more of them as further modules are imported, so the
# first pass is made here, before any test.
torch.ones(1, requires_grad=True).sum().backward()

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, keep a file's tests in one process, so that fixtures shared by them are set up once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture
def run_example(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_example(name, *arguments)`: run examples/NAME/run.sh, at most five commands, with this Python and asit."""

    def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        script = repository / "examples" / name / "run.sh"
        commands = [line for line in script.read_text().splitlines() if line.startswith(("asit ", "python "))]
        assert len(commands) <= 5
        binaries = tmp_path / "bin"
        binaries.mkdir()
        for command, given in (("python", '"$@"'), ("asit", '-m asit "$@"')):
            (binaries / command).write_text(f'#!/bin/sh\nexec "{sys.executable}" {given}\n')
            (binaries / command).chmod(0o755)
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        call = ["sh", script, *arguments]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the development recordings; skips where there is none."""
    folder = Path(os.environ.get("ASIT_SHARED_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no development recordings: set ASIT_SHARED_DATA to the folder that holds them")
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the user's cache of features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of 20 draws of the bootstrap instead of 1000; tests/evaluate has the interval itself."""
    monkeypatch.setitem(label_metrics.__kwdefaults__, "draws", 20)


@pytest.fixture(scope="session")
def small_model() -> Callable[..., AudioModel]:
    """`small_model(labels)`: an encoder of windows of half a second with drawn weights, and a head for labels."""

    def make(labels: Labelling | None = None, training: Mapping[str, Any] | None = None) -> AudioModel:
        settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
        encoder = Encoder(settings, 48, 32)
        head = None if labels is None else Head(32, len(labels.classes), labels.pooling)
        with torch.no_grad():
            for i, parameter in enumerate([*encoder.parameters(), *(head.parameters() if head else ())]):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(i))
        front_end = FrontEndSettings(mels=32, mean=-6.0, std=3.0)
        return AudioModel.from_parts(encoder, front_end, settings, 48, training or {"step": 7}, head, labels)

    return make


@pytest.fixture
def no_global_draws(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Draws from the global generators of Python and numpy raise; torch's must be where it was at the end."""

    def forbid(module: ModuleType, owner: object) -> None:
        def refuse(name: str) -> Callable[..., NoReturn]:
            def draw(*_: Any, **__: Any) -> NoReturn:
                raise AssertionError(f"{name} draws from a global generator")

            return draw

        names = [name for name in dir(module) if getattr(getattr(module, name), "__self__", None) is owner]
        assert "uniform" in names
        for name in names:
            if name not in ("getstate", "get_state", "setstate", "set_state"):
                monkeypatch.setattr(module, name, refuse(f"{module.__name__}.{name}"))

    forbid(random, random._inst)  # type: ignore[attr-defined]
    forbid(np.random, np.random.mtrand._rand)
    torch = sys.modules.get("torch")
    before = (torch.initial_seed(), torch.get_rng_state()) if torch else None
    yield
    if torch and before:
        assert torch.initial_seed() == before[0], "the code under test seeded torch's global generator"
        assert torch.equal(torch.get_rng_state(), before[1]), "the code under test drew from torch's global generator"
