"""Frames of a regular grid that covers a sound from its start to its end, as benchmarks of encoders want them.

`AudioModel.embed` gives a frame where a whole patch lies within the sound, so the first is centred half a patch after
the start. Here the sound is set between two stretches of silence, so that frame k is centred at (k + 1/2) hops.

Letters: B sounds, N samples, T frames, D width.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from asit.audio.stream import check_sounds
from asit.errors import ConfigError
from asit.model.audio_model import AudioModel
from asit.model.inference.embedding import Precision

MODEL = "ASIT_MODEL"
"""Environment variable that names the model where a benchmark cannot."""

FINEST = 0.05
"""Seconds that a hop stays within unless asked otherwise: HEAR scores onsets to 50 ms."""


def model_named(given: str | os.PathLike[str] | None) -> str:
    """The model asked for, or the one that the environment names.

    Raises:
        ConfigError: neither names one.
    """
    name = os.fspath(given) if given else os.environ.get(MODEL, "")
    if not name:
        raise ConfigError(
            f"no model was named, and {MODEL} is not set",
            "a model folder, such as RUN/model, or a hub id",
            f"pass it, or set it: export {MODEL}=RUN/model",
        )
    return name


def hop_of(model: AudioModel, most: float = FINEST) -> float:
    """Seconds of the longest hop up to `most` that divides a patch column into whole frames of the log-mel.

    Of 16 frames of 10 ms: 40 ms; of AST's 10: 50 ms. One frame where even that is longer than `most`.
    """
    step, shift = model.encoder.stride[0], model.front_end.shift / model.rate
    fits = [frames for frames in range(1, step + 1) if step % frames == 0 and frames * shift <= most + 1e-9]
    return max(fits, default=1) * shift


def frames_in(samples: int, rate: int, hop: float) -> int:
    """T of a sound: its length in hops, rounded, and at least one."""
    return max(1, int(samples / rate / hop + 0.5))


def regular_frames(
    model: AudioModel,
    waves: Tensor,
    hop: float,
    layer: int | None = None,
    precision: Precision = "float32",
    batch: int = 16,
) -> Tensor:
    """Mean patch token of each hop.

    Args:
        model: the model.
        waves: (B, N) float at the model's rate, on any device.
        hop: seconds between frames, such as `hop_of` gives.
        layer: block whose output is wanted; None: the last.
        precision: arithmetic of the encoder: auto, float32 or bf16.
        batch: windows that go through the encoder together.

    Returns:
        (B, T, D) float32 on the CPU, frame k centred at (k + 1/2) hop, T = `frames_in`.

    Raises:
        AudioError: waves of another shape, empty or not finite.
        ConfigError: a hop that does not divide a column, no such layer.
    """
    check_sounds(waves)
    front_end, rate = model.front_end, model.rate
    count, span = frames_in(waves.shape[1], rate, hop), front_end.samples_for(model.encoder.patch[0])
    before = max(0, round((span - hop * rate) / 2))
    after = max(0, round((count - 1) * hop * rate) + span - before - waves.shape[1])
    padded = torch.nn.functional.pad(waves.detach().float().cpu(), (before, after))
    found = model.embed_batch(list(padded), hop=hop, layer=layer, precision=precision, batch=batch, patches=False)
    return (
        torch.stack([one.frames[:count] for one in found]) if found else waves.new_zeros(0, count, model.encoder.width)
    )
