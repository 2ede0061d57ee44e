"""From a clip's waveform to its views: cut by the loader, made into log-mel there or, a batch at once, on the device.

Letters: B clips, V views of a clip, global ones first, R = V * B rows, view-major; S samples, t frames read, T frames
of a view, F mel bins. Both ways give the same views, but for rounding; what is drawn is drawn by the loader.
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

_WHOLE = 1 << 14
"""Waveforms of a batch are filled up to a multiple of this: sizes that recur are taken from the allocator's stock."""


@dataclass(frozen=True)
class Cuts:
    """One clip's views, not yet log-mel.

    Attributes:
        wave: (S,) float32, which begins with the first frame that any view holds.
        have: frames that the wave gives.
        frames: frames that the views span together; where the wave has fewer, the front end's padding fills them up.
        places: (first frame, frames) of each view, counted from the wave's start.
        draws: what is changed in each view.
    """

    wave: Tensor
    have: int
    frames: int
    places: Sequence[tuple[int, int]]
    draws: Sequence[ViewDraw]

    def logmels(self, front_end: FrontEnd, wanted: Sequence[int]) -> list[Tensor]:
        """Each view as (T, F), normalised; `wanted`: frames of each. One pass of the front end serves them all."""
        mel = front_end.pad_frames(front_end.fbank(self.wave[None])[0], self.frames)
        out = []
        for (start, length), drawn, frames in zip(self.places, self.draws, wanted, strict=True):
            view = augment.resize_time(mel[start : start + length], frames)
            view = augment.warp_mel(view, drawn.mel_warp)
            out.append(front_end.normalise(augment.gain(view, drawn.gain_db)))
        return out

    def filled(self, front_end: FrontEnd) -> Cuts:
        """The same with a wave that gives all frames, those beyond `have` of silence: by the padding rule "zero" the
        front end's padding is of frames, and a batch of short clips would have none to put it in."""
        missing = front_end.samples_for(self.frames) - len(self.wave)
        return replace(self, wave=nn.functional.pad(self.wave, (0, missing))) if missing > 0 else self


@dataclass(frozen=True)
class Stacked:
    """The cuts of a batch.

    Attributes:
        waves: (B, S) float32, filled up with zeros.
        have: (B,) int64, frames that a clip's own wave gives.
        places: (R, 2) int64, first frame and frames of each view.
        changes: (R, 2) float32, factor on the mel axis and gain in dB of each view.
    """

    waves: Tensor
    have: Tensor
    places: Tensor
    changes: Tensor


def stack(cuts: Sequence[Cuts]) -> Stacked:
    """The cuts of B clips as tensors."""
    longest = max(len(cut.wave) for cut in cuts)
    waves = torch.zeros(len(cuts), -(-longest // _WHOLE) * _WHOLE)
    for row, cut in zip(waves, cuts, strict=True):
        row[: len(cut.wave)] = cut.wave
    have = torch.tensor([cut.have for cut in cuts])
    places = torch.tensor([cut.places for cut in cuts]).transpose(0, 1).flatten(0, 1)
    changes = torch.tensor([[(drawn.mel_warp, drawn.gain_db) for drawn in cut.draws] for cut in cuts])
    return Stacked(waves, have, places.contiguous(), changes.transpose(0, 1).flatten(0, 1).contiguous())


class LogMels(nn.Module):
    """Stacked cuts to views on any device: a few kernels for the batch, and nothing that the host waits for.

    Args:
        front_end: its settings; mean and std are numbers.
        warp: whether any view's mel axis is changed.
        gain: whether any view's level is.
    """

    def __init__(self, front_end: FrontEndSettings, *, warp: bool, gain: bool) -> None:
        super().__init__()
        self.front_end = FrontEnd(front_end)
        self.warp, self.gain = warp, gain

    @torch.no_grad()
    def forward(self, mel: Tensor, stacked: Stacked, rows: slice, frames: int) -> Tensor:
        """Some of the views, all of one length.

        Args:
            mel: (B, t, F), of `whole`.
            stacked: on this module's device.
            rows: of the R views, a whole number of times B.
            frames: T.

        Returns:
            (rows, 1, T, F), normalised.
        """
        places, changes = stacked.places[rows], stacked.changes[rows]
        clip = torch.arange(len(places), device=mel.device) % len(mel)
        view = augment.crop_time(mel, clip, places[:, 0], places[:, 1], frames)
        if self.warp:
            view = augment.warp_mel(view, changes[:, 0])
        if self.gain:
            view = augment.gain(view, changes[:, 1])
        return self.front_end.normalise(view).unsqueeze(1)

    @torch.no_grad()
    def whole(self, stacked: Stacked) -> Tensor:
        """(B, t, F): the log-mel that the views are cut from, not normalised."""
        mel = self.front_end.fbank(stacked.waves)
        if self.front_end.settings.padding == "zero":
            beyond = torch.arange(mel.shape[1], device=mel.device) >= stacked.have[:, None]
            mel.masked_fill_(beyond[..., None], 0.0)
        return mel


def pack(mask: Tensor) -> Tensor:
    """A bool tensor (..., F) as bits, (..., ceil(F / 8)) uint8: an eighth of what has to be copied to a device."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=-1))


def unpack(bits: Tensor, size: int) -> Tensor:
    """`pack` undone: (..., size) bool, on the bits' device."""
    place = 7 - torch.arange(8, device=bits.device, dtype=torch.uint8)
    found = (bits.unsqueeze(-1) >> place) & 1
    return found.flatten(-2)[..., :size].bool()
