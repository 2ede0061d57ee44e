"""An encoder for X-ARES.

Source: X-ARES (https://github.com/jimbozhang/xares, arXiv 2505.16369), "Notes on Encoder implementation" and
audio_encoder_checker.py: a module whose class is named ...Encoder, with sampling_rate, output_dim and hop_size_in_ms,
that maps (B, N) or (N,) of up to 10 minutes to (B, T, D). X-ARES loads it from a Python file in which exactly one name
ends in "Encoder", and calls it without arguments; so no other such name may be in this module.

    ASIT_MODEL=RUN/model python -m xares.run asit/xares.py src/tasks/esc50_task.py

Letters: B sounds, N samples, T frames, D width.
"""

from __future__ import annotations

import os
from typing import Literal

from torch import Tensor

from asit.hear import RegularFrames, model_named
from asit.interop import loading


class AsitEncoder(RegularFrames):
    """An asit model for X-ARES; `.to(device)` moves it.

    Args:
        model: as for `asit.load`; None: the value of the environment variable ASIT_MODEL.
        hop: seconds between frames; None: the longest up to 0.05 that divides a patch column (0.04 for patches of 16
            frames).
        layer: block whose output is taken, 0 the first; None: the last.
        precision: arithmetic of the encoder: float32, bf16 or auto.
        batch: windows in a batch.

    Attributes:
        sampling_rate: Hz of the audio for `forward`.
        output_dim: D.
        hop_size_in_ms: milliseconds between frames.

    Raises:
        ConfigError: no model is named.
        CheckpointError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        hop: float | None = None,
        layer: int | None = None,
        precision: Literal["auto", "float32", "bf16"] = "float32",
        batch: int = 16,
    ) -> None:
        super().__init__(loading.load(model_named(model)), hop, layer, precision, batch)
        self.sampling_rate = self.model.rate
        self.output_dim = int(self.model.encoder.width)
        milliseconds = round(1000.0 * self.hop, 6)
        self.hop_size_in_ms = int(milliseconds) if milliseconds.is_integer() else milliseconds

    def forward(self, audio: Tensor) -> Tensor:
        """Return the frames of sounds.

        Args:
            audio: (B, N) or (N,) float in [-1, 1] at `sampling_rate`, on any device.

        Returns:
            (B, T, D) float32 on the device of `audio`; T is the length in hops, rounded.

        Raises:
            AudioError: audio of another shape, empty or not finite.
        """
        waveforms = audio[None] if audio.ndim == 1 else audio
        return self.frames(waveforms).to(audio.device)
