"""A mask, a change of views, an objective, an encoder and a callback of one's own (docs/research.md)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asit.config import EncoderSettings
from asit.model.vit import Encoder, Tokens
from asit.pretrain.custom import Mask, Objective, Spectrogram, ViewChange
from asit.pretrain.masking import BoolArray
from asit.pretrain.pretrain_dataset import PretrainBatch
from asit.training.callbacks import Callback


@dataclass
class Spans(Mask):
    """Wipe spans of whole patch columns until `share` of the time is gone, as wav2vec 2.0 (arXiv 2006.11477) does."""

    share: float = 0.6
    columns: int = 3

    def draw(self, rng: np.random.Generator, frames: int, mels: int, patch: tuple[int, int]) -> BoolArray:
        mask = np.zeros((frames, mels), dtype=bool)
        while mask[:, 0].mean() < self.share:
            start = rng.integers(1 - self.columns, frames // patch[0]) * patch[0]
            mask[max(0, start) : start + self.columns * patch[0]] = True
        return mask


@dataclass
class Tilt(ViewChange):
    """Add a slope over the mel axis, as of another microphone: a normal draw, at the last bin, of the input's scale."""

    std: float = 0.2

    def change(self, rng: np.random.Generator, view: Spectrogram) -> Spectrogram:
        slope = np.linspace(-1.0, 1.0, view.shape[1]) * rng.normal(0.0, self.std)
        return view + slope.astype(np.float32)


class TeacherTokens(Objective):
    """Predict the teacher's normalised tokens of wiped patches, as data2vec (arXiv 2202.03555) does."""

    needs_teacher = True

    def __init__(self, width: int, grid: tuple[int, int], patch: tuple[int, int], *, beta: float = 1.0) -> None:
        super().__init__(width, grid, patch)
        self.beta = beta
        self.predict = nn.Linear(width, width)

    def forward(
        self, student: Tokens, teacher: Tokens | None, batch: PretrainBatch, generator: torch.Generator
    ) -> Tensor:
        assert teacher is not None
        masked = nn.functional.avg_pool2d((batch.drop | batch.replace).float(), self.patch).flatten(1) > 0.5
        copies = len(student.patches) // len(teacher.patches)
        target = nn.functional.layer_norm(teacher.patches.float(), (self.width,)).repeat(copies, 1, 1)
        found = self.predict(student.patches).float()
        loss = nn.functional.smooth_l1_loss(found, target, reduction="none", beta=self.beta).mean(-1)
        return (loss * masked).sum() / masked.sum().clamp(min=1)


class ConvStem(Encoder):
    """The vision transformer behind a small convolution over the spectrogram."""

    def __init__(self, settings: EncoderSettings, frames: int, mels: int, *, channels: int = 8) -> None:
        super().__init__(settings, frames, mels)
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, 1, 3, padding=1))
        self.init_weights()  # the constructor above drew all others

    def embedded(self, x: Tensor, valid: Tensor | None, stretch: bool, keep: Tensor | None) -> Any:
        return super().embedded(x + self.stem(x), valid, stretch, keep)


@dataclass
class LossFile(Callback):
    """Write the losses of each line of metrics to a file of its own, and what the run left behind."""

    name: str = "losses.jsonl"

    def on_start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self.path = folder.parent / self.name

    def _write(self, **entry: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def on_metrics(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if kind == "train":
            self._write(step=step, loss=values["loss"])

    def on_checkpoint(self, step: int, model: Path) -> None:
        self._write(step=step, model=model.name)

    def on_end(self, finished: bool) -> None:
        self._write(finished=finished)
