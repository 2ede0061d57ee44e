"""The front end on the training device: crops of a batch to log-mels, with no synchronisation of host and device.

Equal to `Crops.logmels` in the loader, but for rounding. Letters: as in `asit.data.loading.crops`; t frames read.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from asit.audio import augment
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.data.loading.crops import StackedCrops


class CropFrontEnd(nn.Module):
    """Stacked crops to log-mels.

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
