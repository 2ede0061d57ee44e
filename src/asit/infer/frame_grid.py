"""Frames on a regular grid from the start of a sound to its end, as benchmarks of encoders expect them.

`AudioModel.embed` has a frame where a full patch is within the sound, so the first is centred half a patch after the
start. Here the sound is padded with silence on both ends, so that frame k is centred at (k + 1/2) hops.

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
"""Environment variable with the model, for benchmarks that cannot pass one."""

FINEST = 0.05
"""Longest default hop in s: HEAR scores onsets to 50 ms."""


def model_named(given: str | os.PathLike[str] | None) -> str:
    """Return the given model, or the one in the environment; raises ConfigError where there is neither."""
    name = os.fspath(given) if given else os.environ.get(MODEL, "")
    if not name:
        raise ConfigError(
            f"no model was named, and {MODEL} is not set",
            "a model folder, such as RUN/model, or a hub id",
            f"pass it, or set it: export {MODEL}=RUN/model",
        )
    return name


def hop_of(model: AudioModel, most: float = FINEST) -> float:
    """Return the longest hop up to `most`, in s, that divides a patch column into whole frames of the log-mel.

    For a column of 16 frames of 10 ms it is 40 ms, for AST's 10 frames 50 ms. At least one frame.
    """
    step, shift = model.encoder.stride[0], model.front_end.shift / model.rate
    fits = [frames for frames in range(1, step + 1) if step % frames == 0 and frames * shift <= most + 1e-9]
    return max(fits, default=1) * shift


def frames_in(samples: int, rate: int, hop: float) -> int:
    """Return T of a sound: its length in hops, rounded, at least one."""
    return max(1, int(samples / rate / hop + 0.5))


def regular_frames(
    model: AudioModel,
    waveforms: Tensor,
    hop: float,
    layer: int | None = None,
    precision: Precision = "float32",
    batch: int = 16,
) -> Tensor:
    """Return the mean patch token of each hop.

    Args:
        model: the model.
        waveforms: (B, N) float at the model's rate, on any device.
        hop: seconds between frames, such as `hop_of` gives.
        layer: block whose output is taken; None: the last.
        precision: arithmetic of the encoder: auto, float32 or bf16.
        batch: windows in a batch.

    Returns:
        (B, T, D) float32 on the CPU, frame k centred at (k + 1/2) hop, T = `frames_in`.

    Raises:
        AudioError: waveforms of another shape, empty or not finite.
        ConfigError: a hop that does not divide a column, no such layer.
    """
    check_sounds(waveforms)
    front_end, rate = model.front_end, model.rate
    count, span = frames_in(waveforms.shape[1], rate, hop), front_end.samples_for(model.encoder.patch[0])
    before = max(0, round((span - hop * rate) / 2))
    after = max(0, round((count - 1) * hop * rate) + span - before - waveforms.shape[1])
    padded = torch.nn.functional.pad(waveforms.detach().float().cpu(), (before, after))
    found = model.embed_batch(list(padded), hop=hop, layer=layer, precision=precision, batch=batch, patches=False)
    return (
        torch.stack([one.frames[:count] for one in found])
        if found
        else waveforms.new_zeros(0, count, model.encoder.width)
    )
