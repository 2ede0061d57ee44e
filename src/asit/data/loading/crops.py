"""Crops of a clip's waveform, and what is to be changed in each: what a view is made from.

Letters: B clips, V crops of a clip, R = V * B rows, crop-major; S samples, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from asit.audio import augment
from asit.audio.augment import ViewDraw
from asit.audio.fbank import FrontEnd
from asit.data.loading.loader import TensorBatch

_MULTIPLE = 1 << 14
"""Waveforms of a batch are padded to a multiple of this, so that the allocator can reuse its blocks."""


@dataclass(frozen=True)
class Crops:
    """The crops of one clip, before the log-mel.

    Attributes:
        waveform: (S,) float32, from the first frame that any crop holds.
        have: frames that the waveform gives.
        frames: frames that the crops span together; the front end's padding fills up what the waveform lacks.
        spans: (first frame, frames) of each crop, counted from the waveform's start.
        draws: what is changed in each crop.
    """

    waveform: Tensor
    have: int
    frames: int
    spans: Sequence[tuple[int, int]]
    draws: Sequence[ViewDraw]

    def logmels(self, front_end: FrontEnd, frames: Sequence[int]) -> list[Tensor]:
        """Return each crop as a normalised log-mel (T, F), resized to T of `frames`, in one pass of the front end."""
        mel = front_end.pad_frames(front_end.fbank(self.waveform[None])[0], self.frames)
        out = []
        for (start, length), drawn, size in zip(self.spans, self.draws, frames, strict=True):
            view = augment.resize_time(mel[start : start + length], size)
            view = augment.warp_mel(view, drawn.mel_warp)
            out.append(front_end.normalise(augment.gain(view, drawn.gain_db)))
        return out

    def padded(self, front_end: FrontEnd) -> Crops:
        """Return the crops with silence appended to the waveform, so that it gives all frames.

        The padding "zero" pads frames, not samples: a batch of short clips alone would have no frames to pad.
        """
        missing = front_end.samples_for(self.frames) - len(self.waveform)
        return replace(self, waveform=nn.functional.pad(self.waveform, (0, missing))) if missing > 0 else self


@dataclass(frozen=True)
class StackedCrops(TensorBatch):
    """The crops of a batch.

    Attributes:
        waveforms: (B, S) float32, padded with zeros.
        have: (B,) int64, frames that a clip's own waveform gives.
        spans: (R, 2) int64, first frame and frames of each crop.
        changes: (R, 2) float32, factor on the mel axis and gain in dB of each crop.
    """

    waveforms: Tensor
    have: Tensor
    spans: Tensor
    changes: Tensor


def stack(crops: Sequence[Crops]) -> StackedCrops:
    """Return the crops of B clips as tensors."""
    longest = max(len(crop.waveform) for crop in crops)
    waveforms = torch.zeros(len(crops), -(-longest // _MULTIPLE) * _MULTIPLE)
    for row, crop in zip(waveforms, crops, strict=True):
        row[: len(crop.waveform)] = crop.waveform
    have = torch.tensor([crop.have for crop in crops])
    spans = torch.tensor([crop.spans for crop in crops]).transpose(0, 1).flatten(0, 1)
    changes = torch.tensor([[(drawn.mel_warp, drawn.gain_db) for drawn in crop.draws] for crop in crops])
    return StackedCrops(waveforms, have, spans.contiguous(), changes.transpose(0, 1).flatten(0, 1).contiguous())
