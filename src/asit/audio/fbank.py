"""Waveform to log-mel: Kaldi's filter bank features as one batched module.

The values are those of Kaldi's ``compute-fbank-feats`` (and of ``torchaudio.compliance.kaldi.fbank``) with a Hann
window, no dither, no energy, ``htk_compat`` and ``snip_edges``: each frame loses its mean, is pre-emphasised, windowed
and padded to a power of two; its power spectrum is summed by triangles on the mel scale; the natural logarithm is
floored at the epsilon of float32.

Letters in shapes: R rows, S samples, T frames, F mel bins, W samples a window, N samples of the Fourier transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from asit.config import FrontEndSettings
from asit.errors import AudioError, ConfigError
from asit.runtime import autocast

FLOOR = torch.finfo(torch.float32).eps
"""Smallest mel energy; its logarithm, -15.94, is what digital silence gives."""

_BLOCK = 512  # frames at a time on a CPU, so that the temporaries stay in its cache
_GPU_BLOCK = 1 << 17  # frames at a time elsewhere: temporaries of about a gigabyte, whatever the batch


def mel_bank(settings: FrontEndSettings) -> Tensor:
    """Return triangles on the mel scale, (N // 2 + 1, F) float32; the bin at Nyquist has no weight, as in Kaldi.

    The scale is mel(f) = 1127 ln(1 + f / 700), as in HTK. It is computed in float32 as in torchaudio: a float64 bank
    changes the log-mel by more than rounding does. Where the transform is coarser than the bank (16 kHz, 128 bins: bin
    3) a triangle can be empty, as in Kaldi.
    """
    size = _transform_size(settings)
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (settings.low_hz, _upper_edge(settings)))
    step = (high - low) / (settings.mels + 1)
    bins = torch.arange(settings.mels)
    left, centre, right = (low + (bins + shift) * step for shift in (0, 1.0, 2.0))
    points = 1127.0 * (1.0 + settings.rate / size * torch.arange(size / 2) / 700.0).log().unsqueeze(1)
    up, down = (points - left) / (centre - left), (right - points) / (right - centre)
    return nn.functional.pad(torch.minimum(up, down).clamp_(min=0.0), (0, 0, 0, 1))


class FrontEnd(nn.Module):
    """Computes the normalised log-mel (R, 1, T, F) of waveforms (R, S), always in float32.

    The module has no parameters and no saved state: its settings are in the model card. Its tables are recomputed on
    every move, so neither ``.half()`` nor a start on the meta device can spoil them. No gradient flows through it.

    Args:
        settings: sample rate, window, hop, mel bank, mean and std; with mean or std "auto" only `fbank` works.

    Raises:
        ConfigError: an impossible window, hop or mel bank.
    """

    hann: Tensor
    bank: Tensor

    def __init__(self, settings: FrontEndSettings) -> None:
        super().__init__()
        self.settings = settings
        self.shift = _samples(settings.rate, settings.shift_ms)
        self.window = _samples(settings.rate, settings.window_ms)
        _check(settings, self.window, self.shift)
        self.register_buffer("hann", torch.empty(0), persistent=False)
        self.register_buffer("bank", torch.empty(0), persistent=False)
        self._fill_tables(self.hann.device)

    def _fill_tables(self, device: torch.device) -> None:
        with torch.device("cpu"):
            hann = torch.hann_window(self.window, periodic=False, dtype=torch.float32)
            if self.settings.window == "povey":
                hann = hann.pow(0.85)
            hann *= self.settings.scale  # a power of two, which rounds nothing
            bank = mel_bank(self.settings)
        self.hann, self.bank = hann.to(device), bank.to(device)
        self._triangles = sparse.csr_array(bank.t().numpy())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FrontEnd:
        super()._apply(fn, recurse)
        self._fill_tables(self.hann.device)
        return self

    @property
    def band(self) -> tuple[float, float]:
        """Lowest and highest frequency of the mel bins, Hz."""
        return self.settings.low_hz, _upper_edge(self.settings)

    def frames_for(self, samples: int) -> int:
        """Return the frames of so many samples: 1 + (S - W) // shift, or 0 below one window."""
        return 0 if samples < self.window else 1 + (samples - self.window) // self.shift

    def samples_for(self, frames: int) -> int:
        """Return the fewest samples that give so many frames."""
        return 0 if frames < 1 else (frames - 1) * self.shift + self.window

    @torch.no_grad()
    def fbank(self, wave: Tensor) -> Tensor:
        """Compute the log-mel, natural log of power, not normalised.

        Frame t depends on the W samples from t * shift alone: a crop that starts on the hop grid is a crop of the
        log-mel, on a CPU bit for bit for any number of frames, rows or threads. On other devices, and between two kinds
        of processor, this holds up to the rounding of a matrix product.

        Args:
            wave: (R, S), any float type, any device; samples in [-1, 1].

        Returns:
            (R, T, F) float32.

        Raises:
            AudioError: the waveform is shorter than one window.
        """
        if wave.dim() != 2:
            raise ValueError(f"fbank takes a waveform of shape (rows, samples), not {tuple(wave.shape)}")
        rows, samples = wave.shape
        if samples < self.window:
            raise AudioError(
                f"the waveform has {samples} samples ({1000 * samples / self.settings.rate:.1f} ms)",
                f"at least one window of {self.window} samples ({self.settings.window_ms:g} ms at "
                f"{self.settings.rate} Hz)",
                "pad it first, for example with FrontEnd.pad, or leave it out",
            )
        with autocast("float32", wave.device):
            frames = wave.float().unfold(1, self.window, self.shift)
            out = torch.empty(rows, frames.shape[1], self.settings.mels, device=wave.device)
            for part, into in _blocks(frames, out):
                self._log_mel(part, into)
        return out

    def _log_mel(self, frames: Tensor, out: Tensor) -> None:
        """Write the log-mel of frames (r, t, W), overlapping views of a waveform, into `out` (r, t, F)."""
        padded = frames.new_zeros(*frames.shape[:2], _transform_size(self.settings))
        x = padded[..., : self.window]
        torch.sub(frames, frames.mean(2, keepdim=True), out=x)
        # x[j] -= c x[j - 1], with x[-1] = x[0]. Kaldi rounds the product, so no fused multiply-add.
        before = x[..., :-1] * self.settings.preemphasis
        x[..., 1:] -= before
        x[..., 0] -= before[..., 0]
        x *= self.hann
        parts = torch.view_as_real(torch.fft.rfft(padded)).flatten(0, 1).square_()
        if parts.device.type == "cpu":
            # A dense product's rounding depends on its shape, processor and threads; SciPy's is a loop over the bins.
            power = parts.new_empty(parts.shape[1], len(parts))
            torch.add(parts[..., 0].t(), parts[..., 1].t(), out=power)
            energy = torch.from_numpy(self._triangles @ power.numpy()).t()
        else:
            product = _product_type(parts.device)
            energy = (parts.sum(2).to(product) @ self.bank.to(product)).float()
        out.copy_(energy.clamp_(min=FLOOR).log_().unflatten(0, out.shape[:2]))

    def normalise(self, x: Tensor) -> Tensor:
        """Return (x - mean) / (2 std), the input scale of AST and ASiT; any shape.

        Raises:
            ConfigError: mean or std is still "auto".
        """
        mean, std = self.settings.mean, self.settings.std
        if isinstance(mean, str) or isinstance(std, str):
            raise ConfigError(
                f"front_end.mean is {mean}, front_end.std is {std}",
                "numbers, before anything can be normalised",
                "take them from a catalogue (`asit catalogue` measures them), or set AudioSet's: mean -4.2677393, "
                "std 4.5689974",
            )
        return x.sub(mean).div_(2 * std)

    def forward(self, wave: Tensor) -> Tensor:
        """Compute the encoder's input (R, 1, T, F) of waveforms (R, S): `normalise` of `fbank`."""
        return self.normalise(self.fbank(wave)).unsqueeze(1)

    def pad(self, wave: Tensor, samples: int) -> Tensor:
        """Pad a short waveform by the padding rule; a longer one is returned unchanged.

        Args:
            wave: (S,).
            samples: of the result.

        Returns:
            (samples,): by the rule "silence" zeros follow the waveform, by "repeat" the waveform itself, from its
            start. By "zero" `pad_frames` pads, and the waveform is padded to one window at most.

        Raises:
            AudioError: the waveform is empty.
        """
        have = wave.shape[0]
        if have == 0:
            raise AudioError("the waveform has no samples", "at least one", "leave the clip out")
        if self.settings.padding == "repeat":
            return wave if have >= samples else wave.repeat(math.ceil(samples / have))[:samples]
        if self.settings.padding == "zero":
            samples = min(samples, self.window)
        return wave if have >= samples else nn.functional.pad(wave, (0, samples - have))

    def pad_frames(self, logmel: Tensor, frames: int) -> Tensor:
        """Pad a log-mel (T, F), not normalised, to `frames` with 0.0 if the padding rule is "zero" (AST, v1)."""
        missing = frames - logmel.shape[0]
        if self.settings.padding != "zero" or missing <= 0:
            return logmel
        return nn.functional.pad(logmel, (0, 0, 0, missing))


def logmel_statistics(x: Tensor) -> tuple[float, float, int]:
    """Return sum, sum of squares and count of the values of a log-mel of any shape, in float64.

    NumPy sums on one thread, so that a catalogue's statistics do not depend on the number of threads.
    """
    values = x.detach().double().cpu().numpy()
    return float(values.sum()), float(np.square(values).sum()), values.size


def _samples(rate: int, milliseconds: float) -> int:
    return int(rate * milliseconds * 0.001)  # truncated, and in this order, as in torchaudio


def _transform_size(settings: FrontEndSettings) -> int:
    return 1 << (_samples(settings.rate, settings.window_ms) - 1).bit_length()


def _upper_edge(settings: FrontEndSettings) -> float:
    return settings.high_hz if settings.high_hz > 0 else settings.rate / 2 + settings.high_hz


def _check(settings: FrontEndSettings, window: int, shift: int) -> None:
    nyquist = settings.rate / 2
    if window < 2 or shift < 1:
        raise ConfigError(
            f"front_end.window_ms {settings.window_ms:g} and shift_ms {settings.shift_ms:g} are {window} and {shift} "
            f"samples at {settings.rate} Hz",
            "a window of 2 samples or more and a hop of 1 or more",
            "use longer ones, such as 25 and 10 ms",
        )
    if not 0 <= settings.low_hz < _upper_edge(settings) <= nyquist:
        found = f"front_end.low_hz {settings.low_hz:g} and high_hz {settings.high_hz:g} at {settings.rate} Hz"
        expected = f"0 <= low_hz < high_hz <= {nyquist:g} (half the rate; high_hz of 0 or less is counted from there)"
        raise ConfigError(found, expected, "set high_hz to 0, or raise front_end.rate")


def _blocks(frames: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split (R, T, ...) pairs into parts of about _BLOCK frames on a CPU, _GPU_BLOCK elsewhere."""
    count, block = frames.shape[1], _BLOCK if frames.device.type == "cpu" else _GPU_BLOCK
    rows, parts = max(1, block // count), math.ceil(count / block)
    for few, few_out in zip(frames.split(rows), out.split(rows), strict=True):
        yield from zip(few.tensor_split(parts, 1), few_out.tensor_split(parts, 1), strict=True)


def _product_type(device: torch.device) -> torch.dtype:
    """Return the type of a device's matrix product: float64 if the process allows TF32, which would change log-mels."""
    if device.type != "cuda":
        return torch.float32
    return torch.float32 if torch.backends.cuda.matmul.fp32_precision in ("none", "ieee") else torch.float64
