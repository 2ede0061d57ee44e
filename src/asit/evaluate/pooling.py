"""Pooling of an encoder's tokens to one vector per clip, and the log-mel statistics that are its baseline.

Letters: R clips, S samples, P patches, D width, F mel bins.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd

Pooling = Literal["class", "mean", "class+mean", "time-mean", "mel-mean", "mean+std"]


def pool(cls: Tensor, patches: Tensor, grid: tuple[int, int], kind: Pooling) -> Tensor:
    """Pool an encoder's tokens to one vector per clip.

    Args:
        cls: class tokens (R, D).
        patches: patch tokens (R, P, D), time-major: all mel patches of the first time column, then the next.
        grid: (time, mel) patches, whose product is P.
        kind: "class": the class token, (R, D);
            "mean": the mean over all patches, (R, D);
            "class+mean": both concatenated, (R, 2 D);
            "time-mean": the mean over time for each mel patch, lowest band first, (R, mel * D);
            "mel-mean": the mean over mel for each time patch, earliest first, (R, time * D);
            "mean+std": mean and population standard deviation over all patches, (R, 2 D).
    """
    if kind == "class":
        return cls
    if kind in ("time-mean", "mel-mean"):
        return patches.unflatten(1, grid).mean(1 if kind == "time-mean" else 2).flatten(1)
    mean = patches.mean(1)
    if kind == "mean":
        return mean
    return torch.cat([cls, mean] if kind == "class+mean" else [mean, patches.std(1, correction=0)], 1)


@torch.inference_mode()
def log_mel_statistics(front_end: FrontEnd, waveforms: Tensor) -> Tensor:
    """Compute mean and standard deviation over time of each log-mel bin: waveforms (R, S) to (R, 2 F)."""
    spectrogram = front_end.fbank(waveforms)
    return torch.cat([spectrogram.mean(1), spectrogram.std(1, correction=0)], 1)
