"""Servers on free ports of this machine, each in a thread."""

from __future__ import annotations

import importlib.util
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

from asit.model.audio_model import AudioModel
from asit.model.classifier import Labelling
from asit.serve import server
from asit.serve.guard import Guard


@contextmanager
def serving(app: Guard) -> Iterator[str]:
    """A real server of an application; gives its address, without a slash at its end."""
    listening = server.listen("127.0.0.1", 0)
    running = server.server(app)
    thread = threading.Thread(target=running.run, args=([listening],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not running.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield server.address(listening).rstrip("/")
    finally:
        running.should_exit = True
        thread.join(10)
        app.queue.close()
        listening.close()
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def served() -> Callable[[Guard], Any]:
    """`with served(app) as address:`."""
    return serving


@pytest.fixture(scope="session")
def chromium() -> ModuleType:
    """The module that drives a browser."""
    spec = importlib.util.spec_from_file_location("chromium", Path(__file__).with_name("chromium.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wav() -> Callable[..., bytes]:
    """A chirp of some seconds as the bytes of an audio file."""

    def make(seconds: float = 1.0, rate: int = 16000, kind: str = "WAV", channels: int = 1) -> bytes:
        t = np.arange(round(seconds * rate)) / rate
        wave = (0.3 * np.sin(2 * np.pi * (200 + 150 * t) * t)).astype(np.float32)
        buffer = io.BytesIO()
        soundfile.write(buffer, np.stack([wave] * channels, 1), rate, format=kind)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def encoder(small_model: Callable[..., AudioModel]) -> AudioModel:
    """A small encoder."""
    return small_model()


NAMES = ("صفر", "نعم", "<img src=x onerror='window.hit=1'>", "a label that is so long that it hardly fits " * 3, "dog")


@pytest.fixture(scope="session")
def tagger(small_model: Callable[..., AudioModel]) -> AudioModel:
    """The same with a head, and labels that are right to left, long, or would be HTML."""
    return small_model(Labelling(NAMES, False, "class+mean", 0.495))
