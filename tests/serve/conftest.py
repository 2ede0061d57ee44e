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
import torch

from asit.config import EncoderSettings, FrontEndSettings
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder
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


def _model(labels: Labelling | None) -> AudioModel:
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
    front_end = FrontEndSettings(mels=32, mean=-6.0, std=3.0)
    encoder = Encoder(settings, 48, 32)
    head = None if labels is None else Head(32, len(labels.classes), labels.pooling)
    with torch.no_grad():
        parts = [*encoder.parameters(), *([] if head is None else head.parameters())]
        for i, parameter in enumerate(parts):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(i))
    return AudioModel.from_parts(encoder, front_end, settings, 48, {"step": 7}, head, labels)


@pytest.fixture(scope="session")
def encoder() -> AudioModel:
    """A tiny encoder of windows of half a second."""
    return _model(None)


NAMES = ("صفر", "نعم", "<img src=x onerror='window.hit=1'>", "a label that is so long that it hardly fits " * 3, "dog")


@pytest.fixture(scope="session")
def tagger() -> AudioModel:
    """The same with a head, and labels that are right to left, long, or would be HTML."""
    return _model(Labelling(NAMES, False, "class+mean", 0.495))
