"""Waveforms to the normalised log-mel that an ASiT model reads, as a feature extractor of Hugging Face's transformers.

This file travels with exported models and stands alone: it needs transformers, torch and numpy, neither asit nor
torchaudio. The log-mel is that of Kaldi's compute-fbank-feats with a Hann window, no dither and no energy.

Letters: B clips, S samples, T frames, F mel bins, W samples of a window, N samples of the Fourier transform.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor


class ASiTFeatureExtractor(SequenceFeatureExtractor):
    """Mono waves at the model's rate to `input_values` (B, T, F) and `attention_mask` (B, T).

    Args:
        feature_size: F.
        sampling_rate: in Hz.
        padding_value: what fills the shorter clips of a batch; the mask leaves it out.
        window_ms: Hann window in ms.
        shift_ms: hop in ms.
        low_hz: lower edge of the mel bank in Hz.
        high_hz: upper edge in Hz; 0 or less is counted from half the rate.
        preemphasis: coefficient.
        mean: of the log-mel values (natural log of power).
        std: their standard deviation; the input is (x - mean) / (2 std).
        padding_rule: how a clip shorter than wanted is filled: "silence" (zeros in the wave), "zero" (0.0 in the
            log-mel before it is normalised) or "repeat" (the wave from its start).
        num_frames: T of the training view.
        patch_frames: frames of a patch.
        patch_stride_frames: from patch to patch.
        pad_to: the padding of calls that name none: "max_length" of a classifier, "longest" of an encoder.
        resampler: how the training's recordings were brought to the rate; told, not used here.
        kwargs: what every feature extractor has.

    Raises:
        ValueError: no such rule or padding.
    """

    _auto_class = "AutoFeatureExtractor"  # save_pretrained then carries this file along
    model_input_names = ["input_values", "attention_mask"]  # noqa: RUF012 (transformers declares it so)

    def __init__(
        self,
        feature_size: int = 128,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        window_ms: float = 25.0,
        shift_ms: float = 10.0,
        low_hz: float = 20.0,
        high_hz: float = 0.0,
        preemphasis: float = 0.97,
        mean: float = -4.2677393,
        std: float = 4.5689974,
        padding_rule: str = "silence",
        num_frames: int = 592,
        patch_frames: int = 16,
        patch_stride_frames: int = 16,
        pad_to: str = "max_length",
        resampler: str = "soxr-hq",
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if padding_rule not in ("silence", "zero", "repeat"):
            raise ValueError(f"padding_rule is {padding_rule!r}; it can be 'silence', 'zero' or 'repeat'")
        if pad_to not in ("max_length", "longest"):
            raise ValueError(f"pad_to is {pad_to!r}; it can be 'max_length' or 'longest'")
        self.window_ms = window_ms
        self.shift_ms = shift_ms
        self.low_hz = low_hz
        self.high_hz = high_hz
        self.preemphasis = preemphasis
        self.mean = mean
        self.std = std
        self.padding_rule = padding_rule
        self.num_frames = num_frames
        self.patch_frames = patch_frames
        self.patch_stride_frames = patch_stride_frames
        self.pad_to = pad_to
        self.resampler = resampler

    def __call__(
        self,
        raw_speech: np.ndarray | Tensor | Sequence[Any],
        sampling_rate: int | None = None,
        padding: bool | str | None = None,
        truncation: bool = False,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Waves to what the model reads.

        Args:
            raw_speech: one wave (S,) or several: a list of them, or (B, S); floats in [-1, 1], mono.
            sampling_rate: theirs, in Hz; None: the model's.
            padding: "max_length": every clip gets the training view's length by the padding rule, as a classifier
                expects; a longer one becomes windows of that length, end to end, the last moved back to end with the
                clip, one after the other along T, and the classifier gives the mean of their scores. True or
                "longest": a clip gets as many frames as its whole patches need, and the batch those of its longest.
                False: likewise, without making the clips of a batch equal. None: `pad_to`.
            truncation: a clip longer than the training view is cut to it.
            return_attention_mask: give the frames that are a clip's own as 1, those that fill up the batch as 0;
                None: as the extractor is set, which is to give them.
            return_tensors: "pt" or "np"; None: a list of arrays.
            kwargs: taken as other extractors take it, and not used.

        Raises:
            ValueError: another rate, more than one channel, a wave that is empty, not finite or not floating point,
                or no such padding.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the sound is at {sampling_rate} Hz and this model hears {self.sampling_rate} Hz; resample it first, "
                "for instance with soxr or librosa"
            )
        modes = {None: self.pad_to, True: "longest", False: "do_not_pad"}
        mode = (
            modes[padding] if padding is None or isinstance(padding, bool) else str(getattr(padding, "value", padding))
        )
        if mode not in ("max_length", "longest", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}; it can be 'max_length', 'longest' (True) or False")
        features = [self._features(wave, mode == "max_length", truncation) for wave in self._waves(raw_speech)]
        own = [len(one) for one in features]
        if mode != "do_not_pad":
            features = [
                np.pad(one, ((0, max(own) - len(one)), (0, 0)), constant_values=self.padding_value) for one in features
            ]
        data: dict[str, Any] = {"input_values": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = [
                (np.arange(len(one)) < count).astype(np.int64) for one, count in zip(features, own, strict=True)
            ]
        return BatchFeature(data, tensor_type=return_tensors)

    def _waves(self, given: np.ndarray | Tensor | Sequence[Any]) -> list[Tensor]:
        """Each clip as (S,) float32."""
        one = not isinstance(given, list | tuple) or (len(given) > 0 and isinstance(given[0], float | int))
        if isinstance(given, np.ndarray | Tensor) and given.ndim == 2:
            one = False
        if not one and _turned(given):
            raise ValueError(
                "the sounds have their samples along the first axis; (sounds, samples) is wanted, fewer sounds than "
                "samples: turn the axes, and average the channels of one sound"
            )
        waves = []
        for i, wave in enumerate([given] if one else given):
            samples = wave.detach().cpu() if isinstance(wave, Tensor) else torch.from_numpy(np.array(wave))
            name = "the sound" if one else f"sound {i}"
            if samples.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(samples.shape)}; mono waves (samples,) are wanted")
            if not samples.is_floating_point():
                raise ValueError(f"{name} holds {samples.dtype}; floats in [-1, 1] are wanted: divide int16 by 32768")
            if not len(samples):
                raise ValueError(f"{name} is empty; at least one sample is wanted")
            samples = samples.float()
            if not samples.isfinite().all():
                raise ValueError(f"{name} has {int((~samples.isfinite()).sum())} samples that are not finite")
            waves.append(samples)
        if not waves:
            raise ValueError("there is no sound in the list; at least one is wanted")
        return waves

    def _features(self, wave: Tensor, whole_views: bool, truncation: bool) -> np.ndarray:
        """One wave to its normalised log-mel (T, F)."""
        shift, window = self._samples(self.shift_ms), self._samples(self.window_ms)
        if whole_views:
            frames = self.num_frames
        else:
            # Whole columns of patches, and one more where at least half of what it adds is there.
            there = 0 if len(wave) < window else 1 + (len(wave) - window) // shift
            columns = max(1, int((there - self.patch_frames) / self.patch_stride_frames + 1.5))
            frames = (columns - 1) * self.patch_stride_frames + self.patch_frames
            frames = min(frames, self.num_frames) if truncation else frames
        need = (frames - 1) * shift + window
        starts = [0]
        if whole_views and not truncation:
            # Half a hop of the log-mel is no reason for another window.
            count = 1 + max(0, math.ceil((len(wave) - need - shift / 2) / need))
            starts = [*range(0, (count - 1) * need, need), max(0, len(wave) - need)]
        parts = [self._view(wave[start : start + need], need, frames) for start in starts]
        logmel = torch.cat(parts)
        return ((logmel - self.mean) / (2 * self.std)).numpy()

    def _view(self, wave: Tensor, need: int, frames: int) -> Tensor:
        """At most `need` samples to a log-mel of `frames`, filled up by the rule: (frames, F)."""
        if self.padding_rule == "repeat":
            wave = wave.repeat(math.ceil(need / len(wave)))[:need]
        elif self.padding_rule == "silence" or len(wave) < self._samples(self.window_ms):
            until = need if self.padding_rule == "silence" else self._samples(self.window_ms)
            wave = torch.nn.functional.pad(wave, (0, until - len(wave)))
        logmel = self._fbank(wave)
        return torch.nn.functional.pad(logmel, (0, 0, 0, frames - len(logmel)))

    @torch.no_grad()
    def _fbank(self, wave: Tensor) -> Tensor:
        """(S,) to (T, F) float32: frames without their mean, pre-emphasised and windowed; log of their mel energies."""
        window = self._samples(self.window_ms)
        size = 1 << (window - 1).bit_length()
        high = self.high_hz if self.high_hz > 0 else self.sampling_rate / 2 + self.high_hz
        frames = wave.unfold(0, window, self._samples(self.shift_ms))
        frames = frames - frames.mean(1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - self.preemphasis * before) * torch.hann_window(window, periodic=False)
        power = torch.view_as_real(torch.fft.rfft(frames, n=size)).square().sum(2)
        # Summed in float64, which no setting of this process makes coarser.
        energy = power.double() @ _mel_bank(self.sampling_rate, size, self.feature_size, self.low_hz, high)
        return energy.clamp_(min=torch.finfo(torch.float32).eps).log_().float()

    def _samples(self, milliseconds: float) -> int:
        return int(self.sampling_rate * milliseconds * 0.001)


@functools.lru_cache(maxsize=8)
def _mel_bank(rate: int, size: int, bins: int, low_hz: float, high_hz: float) -> Tensor:
    """Triangles on the mel scale 1127 ln(1 + f / 700), (N // 2 + 1, F), built in float32 as Kaldi's is."""
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (low_hz, high_hz))
    step = (high - low) / (bins + 1)
    index = torch.arange(bins)
    left, centre, right = (low + (index + shift) * step for shift in (0, 1.0, 2.0))
    points = 1127.0 * (1.0 + rate / size * torch.arange(size / 2) / 700.0).log().unsqueeze(1)
    up, down = (points - left) / (centre - left), (right - points) / (right - centre)
    return torch.nn.functional.pad(torch.minimum(up, down).clamp_(min=0.0), (0, 0, 0, 1)).double()


def _turned(given: Any) -> bool:
    """Whether an array, or lists in a list, are (samples, channels): more rows than 64, and than columns."""
    if isinstance(given, list | tuple):
        return bool(given) and isinstance(given[0], list | tuple) and len(given) > max(len(given[0]), 64)
    return given.ndim == 2 and given.shape[0] > max(given.shape[1], 64)


__all__ = ["ASiTFeatureExtractor"]
