"""Models to be exported: tiny, with weights on which every part has an effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from asit.config import EncoderSettings, FrontEndSettings
from asit.interop.exportable import facts_of
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.positions import round_up_frames
from asit.model.vit import Encoder

CLASSES = ("dog", "مطر", "door")
MakeModel = Callable[..., AudioModel]
MakeWaves = Callable[..., np.ndarray]


@pytest.fixture(autouse=True)
def _notes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "asit")


@pytest.fixture
def make_model() -> MakeModel:
    """(head=True, multi, pooling, norm, front={...}, **encoder settings) -> a model of about half a second."""

    def make(
        head: bool = True,
        multi: bool = False,
        pooling: Any = "mean",
        norm: bool = True,
        front: dict[str, Any] | None = None,
        **encoder: Any,
    ) -> AudioModel:
        sizes = {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_frames": 8, "patch_mels": 8}
        settings = EncoderSettings(**{**sizes, **encoder})
        front_end = FrontEndSettings(**{"mels": 32, "mean": -6.0, "std": 3.0, **(front or {})})
        frames = round_up_frames(48, settings)
        network = Encoder(settings, frames, 32)
        on_top = Head(network.width, 3, pooling, norm=norm)
        with torch.no_grad():
            for i, (name, parameter) in enumerate([*network.named_parameters(), *on_top.named_parameters()]):
                mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(mean, 0.3, generator=torch.Generator().manual_seed(i))
        if not head:
            return AudioModel.from_parts(network, front_end, settings, frames, {"steps": 7})
        labels = Labelling(CLASSES, multi, pooling, frames / 100)
        return AudioModel.from_parts(network, front_end, settings, frames, {"license": "cc0-1.0"}, on_top, labels)

    return make


@pytest.fixture
def make_waves() -> MakeWaves:
    """(samples, rows=1, seed=0) -> (rows, samples) float32 at 16 kHz: voiced tones that come and go over a hiss."""

    def make(samples: int, rows: int = 1, seed: int = 0) -> np.ndarray:
        t = np.arange(samples) / 16000
        waves = []
        for row in range(rows):
            rng = np.random.default_rng([seed, row])
            pitch = rng.uniform(90, 300)
            voice = sum(np.sin(2 * np.pi * k * pitch * t * (1 + 0.2 * t)) / k for k in range(1, 12))
            swell = np.clip(np.sin(2 * np.pi * rng.uniform(2, 6) * t + rng.uniform(0, 6)), 0, 1)
            waves.append(0.2 * voice * swell + 0.003 * rng.standard_normal(samples))
        return np.stack(waves).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def traces() -> dict[str, bytes]:
    return {}


@pytest.fixture
def one_trace_a_model(traces: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's exporter takes seconds: a model's graph is traced once in all tests, and a copy of it given out."""
    onnx = pytest.importorskip("onnx")
    from asit.interop import onnx as onnx_file

    traced = onnx_file.trace

    def kept(model: AudioModel, output: Any, opset: int) -> Any:
        key = json.dumps([facts_of(model, output, None), opset])
        if key not in traces:
            traces[key] = traced(model, output, opset).SerializeToString()
        return onnx.load_from_string(traces[key])

    monkeypatch.setattr(onnx_file, "trace", kept)
