"""Waveforms estimated from log-mels, to listen to reconstructions."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from asit.audio.fbank import FLOOR, FrontEnd, mel_bank
from asit.config import FrontEndSettings
from asit.errors import AudioError


def griffin_lim(logmel: Tensor, settings: FrontEndSettings, iterations: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """Estimate a waveform with this log-mel.

    The power spectrum is the non-negative least-squares solution of the mel bank, divided by the pre-emphasis. The
    phase starts at random and is made consistent by the fast Griffin-Lim algorithm (Griffin and Lim 1984; with momentum
    0.99 by Perraudin, Balazs and Sondergaard 2013).

    Args:
        logmel: (T, F), natural log of power as `FrontEnd.fbank` gives it, not normalised.
        settings: the front end that made it.
        iterations: rounds of phase estimation.
        seed: seed of the first phase.

    Returns:
        (S,) float32 with S = (T - 1) * shift + window; scaled down where it would exceed 1.

    Raises:
        AudioError: no frames, another number of mel bins than the settings', or values that are not finite.
    """
    front_end = FrontEnd(settings)
    if logmel.dim() != 2 or logmel.shape[0] == 0 or logmel.shape[1] != settings.mels:
        found = f"a log-mel of shape {tuple(logmel.shape)}"
        expected = f"(frames, {settings.mels}), with at least one frame"
        raise AudioError(found, expected, "pass one clip and the settings of the front end that made it")
    if not bool(torch.isfinite(logmel).all()):
        raise AudioError("a log-mel with values that are not finite", "finite values", "undo the normalisation first")
    with torch.no_grad():
        magnitude = _magnitude(logmel.detach().float().cpu(), settings)
        wave = _find_phase(magnitude, front_end, iterations, seed)
        wave /= wave.abs().max().clamp_(min=1.0)
    return np.asarray(wave.numpy(), dtype=np.float32)


def _magnitude(logmel: Tensor, settings: FrontEndSettings, rounds: int = 50) -> Tensor:
    """Estimate the magnitude (T, N // 2 + 1) before pre-emphasis of a log-mel (T, F), as Lee and Seung (2001)."""
    bank = mel_bank(settings)
    target = (logmel.exp() - FLOOR).clamp_(min=0.0)
    share = bank / bank.sum(0).clamp(min=FLOOR)
    power: Tensor = target @ share.T
    gram, pulled = bank @ bank.T, target @ bank.T
    for _ in range(rounds):
        power = power * pulled / (power @ gram).clamp_(min=torch.finfo(torch.float32).tiny)
    omega = torch.linspace(0, math.pi, len(bank))
    c = settings.preemphasis
    emphasis = 1 + c * c - 2 * c * omega.cos()  # |1 - c exp(-i omega)|^2
    return (power / emphasis.clamp(min=FLOOR)).sqrt_()


def _find_phase(magnitude: Tensor, front_end: FrontEnd, iterations: int, seed: int) -> Tensor:
    """Estimate the waveform (S,) with this magnitude (T, N // 2 + 1)."""
    size = 2 * (magnitude.shape[1] - 1)
    window, shift = front_end.window, front_end.shift
    samples = front_end.samples_for(len(magnitude))
    hann = front_end.hann

    def overlap_add(frames: Tensor) -> Tensor:
        columns = frames.T.unsqueeze(0)
        return functional.fold(columns, (1, samples), (1, window), stride=(1, shift)).flatten()

    # The window is zero at its ends: the floor avoids a division by zero for the first and last samples.
    weight = overlap_add(hann.square().expand(len(magnitude), -1)).clamp_(min=1e-2)

    def to_wave(spectrum: Tensor) -> Tensor:
        return overlap_add(torch.fft.irfft(spectrum, n=size)[:, :window] * hann) / weight

    phase = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)) * (2 * math.pi)
    spectrum = torch.polar(magnitude, phase)
    before = torch.zeros_like(spectrum)
    for _ in range(iterations):
        consistent = torch.fft.rfft(to_wave(spectrum).unfold(0, window, shift) * hann, n=size)
        pushed = consistent + 0.99 * (consistent - before)
        before = consistent
        spectrum = torch.polar(magnitude, pushed.angle())
    return to_wave(spectrum)
