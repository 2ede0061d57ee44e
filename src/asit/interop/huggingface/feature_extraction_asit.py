"""Feature extractor of ASiT for Hugging Face's transformers: waveforms to normalised log-mel spectrograms.

This file is copied into exported folders and depends on transformers, torch and numpy, not on asit or torchaudio. The
log-mel is that of Kaldi's compute-fbank-feats with a Hann window, no dither and no energy.

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
    """Mono waveforms at the model's rate to `input_values` (B, T, F) and `attention_mask` (B, T).

    Args:
        feature_size: F.
        sampling_rate: in Hz.
        padding_value: pads the shorter clips of a batch; masked.
        window_ms: Hann window in ms.
        shift_ms: hop in ms.
        low_hz: lower edge of the mel bank in Hz.
        high_hz: upper edge in Hz; 0 or less is relative to half the rate.
        preemphasis: coefficient.
        mean: of the log-mel values (natural log of power).
        std: their standard deviation; the input is (x - mean) / (2 std).
        padding_rule: how short clips are padded: "silence" (zeros in the waveform), "zero" (0.0 in the log-mel before
            normalisation) or "repeat" (the waveform repeated).
        num_frames: T of the training view.
        patch_frames: frames of a patch.
        patch_stride_frames: stride of the patches.
        pad_to: default padding: "max_length" for a classifier, "longest" for an encoder.
        resampler: of the training data; not used here.
        kwargs: of SequenceFeatureExtractor.

    Raises:
        ValueError: unknown rule or padding.
    """

    _auto_class = "AutoFeatureExtractor"  # save_pretrained copies this file
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
        """Compute the model's inputs.

        Args:
            raw_speech: one waveform (S,), a list of them, or (B, S); floats in [-1, 1], mono.
            sampling_rate: theirs, in Hz; None: the model's.
            padding: "max_length": each clip is padded to the training view by the padding rule, as a classifier
                expects; a longer one becomes consecutive windows along T, the last of which ends with the clip, and the
                classifier averages their scores. True or "longest": a clip has the frames of its full patches, and the
                batch is padded to its longest. False: likewise, without padding the batch. None: `pad_to`.
            truncation: cut longer clips to the training view.
            return_attention_mask: return 1 for a clip's frames and 0 for the batch's padding; None: the default.
            return_tensors: "pt" or "np"; None: a list of arrays.
            kwargs: ignored.

        Raises:
            ValueError: another rate, more than one channel, a waveform that is empty, not finite or not floating point,
                or unknown padding.
        """
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            raise ValueError(
                f"the audio is at {sampling_rate} Hz and this model needs {self.sampling_rate} Hz; resample it first, "
                "for instance with soxr or librosa"
            )
        modes = {None: self.pad_to, True: "longest", False: "do_not_pad"}
        mode = (
            modes[padding] if padding is None or isinstance(padding, bool) else str(getattr(padding, "value", padding))
        )
        if mode not in ("max_length", "longest", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}; it can be 'max_length', 'longest' (True) or False")
        features = [
            self._features(waveform, mode == "max_length", truncation) for waveform in self._waveforms(raw_speech)
        ]
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

    def _waveforms(self, given: np.ndarray | Tensor | Sequence[Any]) -> list[Tensor]:
        """Return each clip as (S,) float32."""
        one = not isinstance(given, list | tuple) or (len(given) > 0 and isinstance(given[0], float | int))
        if isinstance(given, np.ndarray | Tensor) and given.ndim == 2:
            one = False
        if not one and _transposed(given):
            raise ValueError(
                "the clips have their samples along the first axis; (clips, samples) is expected, with fewer clips "
                "than samples: transpose, and average the channels of one clip"
            )
        waveforms = []
        for i, waveform in enumerate([given] if one else given):
            samples = waveform.detach().cpu() if isinstance(waveform, Tensor) else torch.from_numpy(np.array(waveform))
            name = "the clip" if one else f"clip {i}"
            if samples.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(samples.shape)}; mono waveforms (samples,) are expected")
            if not samples.is_floating_point():
                raise ValueError(f"{name} holds {samples.dtype}; floats in [-1, 1] are expected: divide int16 by 32768")
            if not len(samples):
                raise ValueError(f"{name} is empty; at least one sample is expected")
            samples = samples.float()
            if not samples.isfinite().all():
                raise ValueError(f"{name} has {int((~samples.isfinite()).sum())} samples that are not finite")
            waveforms.append(samples)
        if not waveforms:
            raise ValueError("there is no clip in the list; at least one is expected")
        return waveforms

    def _features(self, waveform: Tensor, whole_views: bool, truncation: bool) -> np.ndarray:
        """Return the normalised log-mel (T, F) of a waveform."""
        shift, window = self._samples(self.shift_ms), self._samples(self.window_ms)
        if whole_views:
            frames = self.num_frames
        else:
            # Full patch columns, and one more if at least half of what it adds is covered.
            there = 0 if len(waveform) < window else 1 + (len(waveform) - window) // shift
            columns = max(1, int((there - self.patch_frames) / self.patch_stride_frames + 1.5))
            frames = (columns - 1) * self.patch_stride_frames + self.patch_frames
            frames = min(frames, self.num_frames) if truncation else frames
        need = (frames - 1) * shift + window
        starts = [0]
        if whole_views and not truncation:
            # Half a hop of the log-mel does not need another window.
            count = 1 + max(0, math.ceil((len(waveform) - need - shift / 2) / need))
            starts = [*range(0, (count - 1) * need, need), max(0, len(waveform) - need)]
        parts = [self._view(waveform[start : start + need], need, frames) for start in starts]
        logmel = torch.cat(parts)
        return ((logmel - self.mean) / (2 * self.std)).numpy()

    def _view(self, waveform: Tensor, need: int, frames: int) -> Tensor:
        """Return the log-mel (frames, F) of at most `need` samples, padded by the rule."""
        if self.padding_rule == "repeat":
            waveform = waveform.repeat(math.ceil(need / len(waveform)))[:need]
        elif self.padding_rule == "silence" or len(waveform) < self._samples(self.window_ms):
            until = need if self.padding_rule == "silence" else self._samples(self.window_ms)
            waveform = torch.nn.functional.pad(waveform, (0, until - len(waveform)))
        logmel = self._fbank(waveform)
        return torch.nn.functional.pad(logmel, (0, 0, 0, frames - len(logmel)))

    @torch.no_grad()
    def _fbank(self, waveform: Tensor) -> Tensor:
        """Return log mel energies (T, F) of a waveform (S,): frames without mean, pre-emphasised, windowed."""
        window = self._samples(self.window_ms)
        size = 1 << (window - 1).bit_length()
        high = self.high_hz if self.high_hz > 0 else self.sampling_rate / 2 + self.high_hz
        frames = waveform.unfold(0, window, self._samples(self.shift_ms))
        frames = frames - frames.mean(1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - self.preemphasis * before) * torch.hann_window(window, periodic=False)
        power = torch.view_as_real(torch.fft.rfft(frames, n=size)).square().sum(2)
        # Summed in float64, whatever the process's precision settings.
        energy = power.double() @ _mel_bank(self.sampling_rate, size, self.feature_size, self.low_hz, high)
        return energy.clamp_(min=torch.finfo(torch.float32).eps).log_().float()

    def _samples(self, milliseconds: float) -> int:
        return int(self.sampling_rate * milliseconds * 0.001)


@functools.lru_cache(maxsize=8)
def _mel_bank(rate: int, size: int, bins: int, low_hz: float, high_hz: float) -> Tensor:
    """Return triangles on the mel scale 1127 ln(1 + f / 700), (N // 2 + 1, F), built in float32 as in Kaldi."""
    low, high = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (low_hz, high_hz))
    step = (high - low) / (bins + 1)
    index = torch.arange(bins)
    left, centre, right = (low + (index + shift) * step for shift in (0, 1.0, 2.0))
    points = 1127.0 * (1.0 + rate / size * torch.arange(size / 2) / 700.0).log().unsqueeze(1)
    up, down = (points - left) / (centre - left), (right - points) / (right - centre)
    return torch.nn.functional.pad(torch.minimum(up, down).clamp_(min=0.0), (0, 0, 0, 1)).double()


def _transposed(given: Any) -> bool:
    """Whether arrays or nested lists look like (samples, channels): more than 64 rows, and more than columns."""
    if isinstance(given, list | tuple):
        return bool(given) and isinstance(given[0], list | tuple) and len(given) > max(len(given[0]), 64)
    return given.ndim == 2 and given.shape[0] > max(given.shape[1], 64)


__all__ = ["ASiTFeatureExtractor"]
