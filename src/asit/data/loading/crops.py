"""Crops of a clip's waveform and what is to be changed in each: views are made from them, in the loader or on a device.

Letters: B clips, V crops of a clip, R = V * B rows, crop-major; S samples, t frames read, T frames, F mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from asit.audio import augment
from asit.audio.augment import ViewDraw
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
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


class CropFrontEnd(nn.Module):
    """Stacked crops to log-mels on the training device, without synchronising it and the host.

    Equal to `Crops.logmels` in the loader, but for rounding.

    Args:
        front_end: its settings; mean and std are numbers.
        warp: whether the mel axis of any crop is changed.
        gain: whether the level of any crop is changed.
    """

    def __init__(self, front_end: FrontEndSettings, *, warp: bool, gain: bool) -> None:
        super().__init__()
        self.front_end = FrontEnd(front_end)
        self.warp, self.gain = warp, gain

    @torch.no_grad()
    def forward(self, mel: Tensor, crops: StackedCrops, rows: slice, frames: int) -> Tensor:
        """Cut crops of one length out of the log-mels of their clips.

        Args:
            mel: (B, t, F), of `logmel`.
            crops: on this module's device.
            rows: of the R crops, a multiple of B.
            frames: T.

        Returns:
            (rows, 1, T, F), normalised.
        """
        spans, changes = crops.spans[rows], crops.changes[rows]
        clip = torch.arange(len(spans), device=mel.device) % len(mel)
        view = augment.crop_time(mel, clip, spans[:, 0], spans[:, 1], frames)
        if self.warp:
            view = augment.warp_mel(view, changes[:, 0])
        if self.gain:
            view = augment.gain(view, changes[:, 1])
        return self.front_end.normalise(view).unsqueeze(1)

    @torch.no_grad()
    def logmel(self, crops: StackedCrops) -> Tensor:
        """Return the log-mels (B, t, F) that the crops are cut from, not normalised."""
        mel = self.front_end.fbank(crops.waveforms)
        if self.front_end.settings.padding == "zero":
            beyond = torch.arange(mel.shape[1], device=mel.device) >= crops.have[:, None]
            mel.masked_fill_(beyond[..., None], 0.0)
        return mel


def pack(mask: Tensor) -> Tensor:
    """Pack a bool tensor (..., F) into bits (..., ceil(F / 8)) uint8: an eighth of the copy to a device."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def unpack(bits: Tensor, size: int) -> Tensor:
    """Unpack bits of `pack` into (..., size) bool, on their device."""
    shift = 7 - torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits.unsqueeze(-1) >> shift) & 1).flatten(-2)[..., :size].bool()
