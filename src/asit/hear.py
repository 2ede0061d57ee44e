"""The HEAR API for asit models, for `hear-validator`, `heareval` and other programs that load such a module.

Source: the API of the HEAR benchmark (https://hearbenchmark.com/hear-api.html; arXiv 2203.03022).

    python -m heareval.embeddings.runner asit.hear --model RUN/model --tasks-dir tasks

Letters: n sounds, S samples, t frames, d width.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from asit.audio import faults
from asit.audio.files import resample
from asit.audio.stream import check_sounds
from asit.errors import ConfigError
from asit.interop import loading
from asit.model.audio_model import AudioModel
from asit.model.inference.embedding import EmbedKeywords, Precision
from asit.model.inference.overlap import ClipPooling

__all__ = ["HearModel", "get_scene_embeddings", "get_timestamp_embeddings", "load_model"]

RATES = (16000, 22050, 32000, 44100, 48000)
"""Sample rates of HEAR's recordings."""
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


class RegularFrames(nn.Module):
    """A model with embeddings at regular times, as benchmarks of encoders expect them; `.to(device)` moves it.

    `AudioModel.embed` has a frame where a full patch is within the sound, so the first is centred half a patch after
    the start. Here the sound is padded with silence on both ends, so that frame k is centred at (k + 1/2) hops.

    Args:
        model: the model.
        hop: seconds between frames; None: `hop_of`.
        layer: block whose output is taken, 0 the first; None: the last.
        precision: arithmetic of the encoder: float32, bf16 or auto.
        batch: windows in a batch.
    """

    def __init__(
        self,
        model: AudioModel,
        hop: float | None = None,
        layer: int | None = None,
        precision: Precision = "float32",
        batch: int = 16,
    ) -> None:
        super().__init__()
        self.encoder, self.front_end = model.encoder, model.front_end  # so that `to` finds them
        self.model, self.hop = model, hop_of(model) if hop is None else hop
        self.options: EmbedKeywords = {"layer": layer, "precision": precision, "patches": False}
        self.batch = batch

    def frames(self, waveforms: Tensor) -> Tensor:
        """Return the mean patch token of each hop.

        Args:
            waveforms: (n, S) float at the model's rate, on any device.

        Returns:
            (n, t, d) float32 on the CPU, t = `frames_in`.

        Raises:
            AudioError: waveforms of another shape, empty or not finite.
            ConfigError: a hop that does not divide a column, no such layer.
        """
        check_sounds(waveforms)
        model, rate, hop = self.model, self.model.rate, self.hop
        count, span = frames_in(waveforms.shape[1], rate, hop), model.front_end.samples_for(model.encoder.patch[0])
        before = max(0, round((span - hop * rate) / 2))
        after = max(0, round((count - 1) * hop * rate) + span - before - waveforms.shape[1])
        padded = torch.nn.functional.pad(waveforms.detach().float().cpu(), (before, after))
        options: EmbedKeywords = {**self.options, "hop": hop}
        found = model.embed_batch(list(padded), batch=self.batch, **options)
        if not found:
            return waveforms.new_zeros(0, count, model.encoder.width)
        return torch.stack([one.frames[:count] for one in found])


class HearModel(RegularFrames):
    """A model of the HEAR API, made by `load_model`; `.to(device)` moves it.

    Args:
        pooling: what a scene embedding is.
        options: of `RegularFrames`.

    Attributes:
        sample_rate: Hz of the audio for the functions below: the model's own where HEAR has it, else the next higher
            one, from which the audio is resampled.
        scene_embedding_size: width of a scene embedding.
        timestamp_embedding_size: width of a timestamp embedding.
        hop: seconds between timestamps.
    """

    def __init__(self, model: AudioModel, pooling: ClipPooling = "mean", **options: Any) -> None:
        super().__init__(model, **options)
        self.pooling = pooling
        self.sample_rate = next((rate for rate in RATES if rate >= model.rate), RATES[-1])
        self.timestamp_embedding_size = int(model.encoder.width)
        self.scene_embedding_size = int(model.encoder.width) * (2 if pooling == "class+mean" else 1)

    def forward(self, audio: Tensor) -> Tensor:
        """Scene embeddings, see `get_scene_embeddings`."""
        return get_scene_embeddings(audio, self)


def load_model(
    model_file_path: str | os.PathLike[str] = "",
    device: str = "auto",
    hop: float | None = None,
    pooling: ClipPooling = "mean",
    layer: int | None = None,
    precision: Precision = "float32",
    batch: int = 16,
) -> HearModel:
    """Load a model for HEAR.

    Args:
        model_file_path: as for `asit.load`; "": the value of the environment variable ASIT_MODEL.
        device: auto (a GPU where there is one), cpu, cuda or mps; HEAR's programs move the model themselves.
        hop: seconds between timestamps; None: the longest up to 0.05 that divides a patch column (0.04 for patches of
            16 frames).
        pooling: what a scene embedding is: the mean of the patch tokens, the class token, or both.
        layer: block whose output is taken, 0 the first; None: the last.
        precision: arithmetic of the encoder: float32, bf16 or auto.
        batch: windows in a batch.

    Raises:
        ConfigError: no model is named, no such pooling, layer or device.
        CheckpointError: the model cannot be loaded.
    """
    if pooling not in ("mean", "class", "class+mean"):
        raise ConfigError(f"pooling {pooling!r}", "mean, class or class+mean")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = loading.load(model_named(model_file_path), device)
    return HearModel(model, pooling, hop=hop, layer=layer, precision=precision, batch=batch)


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Return embeddings at regular times.

    Args:
        audio: (n, S) float in [-1, 1] at `model.sample_rate`, on any device.
        model: of `load_model`.

    Returns:
        Embeddings (n, t, d) float32 and their centres (n, t) in milliseconds, both on the device of `audio`. Centres
        are at half a hop, one and a half, and so on, to the sound's end.

    Raises:
        AudioError: audio of another shape, empty or not finite.
    """
    found = model.frames(_waveforms(audio, model))
    # From frame numbers, not sums: nothing drifts over a long sound.
    times = (torch.arange(found.shape[1], dtype=torch.float64) + 0.5) * (1000.0 * model.hop)
    times = times.clamp(max=1000.0 * audio.shape[1] / model.sample_rate)  # of a sound shorter than half a hop
    return found.to(audio.device), times.float().expand(len(found), -1).contiguous().to(audio.device)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Return one embedding for each sound.

    Args:
        audio: (n, S) float in [-1, 1] at `model.sample_rate`, on any device.
        model: of `load_model`.

    Returns:
        (n, d) float32 on the device of `audio`.

    Raises:
        AudioError: audio of another shape, empty or not finite.
    """
    found = model.model.embed_batch(list(_waveforms(audio, model)), batch=model.batch, **model.options)
    if not found:
        return audio.new_zeros(0, model.scene_embedding_size, dtype=torch.float32)
    return torch.stack([one.pooled(model.pooling) for one in found]).to(audio.device)


def _waveforms(audio: Tensor, model: HearModel) -> Tensor:
    """Return the audio at the model's own rate, on the CPU."""
    check_sounds(audio)
    waveforms = audio.detach().float().cpu()
    for wave in waveforms.numpy():
        faults.Levels("audio").mix(wave[None])  # refuses what is not finite or far outside [-1, 1]
    own, settings = model.model.rate, model.model.front_end.settings
    if model.sample_rate == own or not len(waveforms):
        return waveforms
    rows = [resample(wave, model.sample_rate, own, settings.resampler) for wave in waveforms.numpy()]
    return torch.stack([torch.from_numpy(row) for row in rows])
