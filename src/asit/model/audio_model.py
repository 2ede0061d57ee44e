"""Front end, encoder and card as one thing: saved, loaded, and asked for embeddings of sound.

Letters: S samples, T frames, F mel bins, P patches, D width, R windows in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from torch import Tensor

from asit import checkpoint
from asit.audio import files
from asit.audio.fbank import FrontEnd
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.model.vit import Encoder
from asit.settings import EncoderSettings, FrontEndSettings

KIND = "audio-encoder"
AXES = "(time, mel)"
WHOLE = 1.5
"""A clip up to this many times as long as the training view is seen whole."""

Sound = str | os.PathLike[str] | np.ndarray | Tensor
"""A file, or samples in [-1, 1] as (S,) or (channels, S)."""


@dataclass(frozen=True)
class Embedding:
    """What a model says about one clip; float32, on the CPU.

    Attributes:
        clip: (D,) mean of the patch tokens: the vector to compare and to classify clips by.
        patches: (P, D) time-major: all mel patches of the first column of time, then the next.
        grid: (time, mel), with time x mel = P.
        times: (time,) centres of the columns, in seconds from the clip's start.
        class_token: (D,); of a long clip, the mean over windows, weighted by the time that each adds.
    """

    clip: Tensor
    patches: Tensor
    grid: tuple[int, int]
    times: Tensor
    class_token: Tensor


@dataclass
class _Window:
    """A stretch of a clip that fits the training view; its last `fresh` columns are not in the window before."""

    clip: int
    wave: Tensor
    columns: int
    fresh: int


class AudioModel:
    """A pretrained encoder with the front end it was trained on.

    Args:
        encoder: is put into evaluation mode and frozen.
        front_end: with numbers for mean and std.
        training: facts of the training for the card; any JSON.

    Raises:
        ConfigError: mean or std is still "auto", or front end and encoder have other mel bins.
    """

    def __init__(self, encoder: Encoder, front_end: FrontEnd, training: Mapping[str, Any] | None = None) -> None:
        settings = front_end.settings
        if "auto" in (settings.mean, settings.std):
            raise ConfigError(
                f"front_end.mean is {settings.mean}, front_end.std is {settings.std}",
                "numbers: they travel with the weights",
                "take them from the catalogue that the encoder was trained on",
            )
        if settings.mels != encoder.grid[1] * encoder.patch[1]:
            raise ConfigError(
                f"a front end of {settings.mels} mel bins, an encoder of {encoder.grid[1] * encoder.patch[1]}",
                "the same number",
                "build the encoder with front_end.mels",
            )
        self.encoder = encoder.eval().requires_grad_(False)
        self.front_end = front_end
        self.training = dict(training or {})

    @classmethod
    def from_parts(
        cls,
        encoder: Encoder,
        front_end_settings: FrontEndSettings,
        encoder_settings: EncoderSettings,
        frames: int,
        training: Mapping[str, Any] | None = None,
    ) -> AudioModel:
        """A model of a copy of `encoder`'s weights, so that its training can go on.

        Args:
            frames: T of the training view.

        Raises:
            ConfigError: as the class.
            CheckpointError: the encoder is not of these settings.
        """
        own = _blank(encoder_settings, frames, front_end_settings.mels)
        checkpoint.load_strict(own, encoder.state_dict(), "the encoder handed in")
        return cls(own, FrontEnd(front_end_settings), training)

    @property
    def frames(self) -> int:
        """T of the training view, the longest window that the encoder is shown."""
        return self.encoder.grid[0] * self.encoder.patch[0]

    @property
    def rate(self) -> int:
        """Sample rate in Hz that the encoder hears; everything else is resampled to it."""
        return self.front_end.settings.rate

    @property
    def card(self) -> dict[str, Any]:
        """What has to be known to use the weights; JSON."""
        return {
            "kind": KIND,
            "front_end": self.front_end.settings.model_dump(mode="json"),
            "encoder": self.encoder.settings.model_dump(mode="json"),
            "frames": self.frames,
            "grid": list(self.encoder.grid),
            "axes": AXES,
            "padding": self.front_end.settings.padding,
            "training": self.training,
        }

    def to(self, device: str | torch.device) -> AudioModel:
        """Move the model; returns itself."""
        self.encoder.to(device)
        self.front_end.to(device)
        return self

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write `model.safetensors` and `card.json` into a new folder.

        Raises:
            CheckpointError: the folder exists and overwrite is off, or the disk is full.
        """
        checkpoint.save_model(Path(folder), self.encoder.state_dict(), self.card, overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
        """Read what `save` wrote.

        Raises:
            CheckpointError: files are missing, damaged, of a newer format, of another kind, or do not fit the card.
        """
        tensors, card = checkpoint.load_model(Path(folder))
        where = Path(folder) / "card.json"
        if card.get("kind") != KIND or card.get("axes") != AXES:
            raise CheckpointError(
                f"{where} says kind {card.get('kind')!r}, axes {card.get('axes')!r}",
                f"kind {KIND!r}, axes {AXES!r}",
                "give a model folder written by asit",
            )
        try:
            front_end = FrontEnd(FrontEndSettings(**card["front_end"]))
            encoder = _blank(EncoderSettings(**card["encoder"]), card["frames"], front_end.settings.mels)
        except (KeyError, TypeError, pydantic.ValidationError, ConfigError) as error:
            raise CheckpointError(
                f"{where} cannot be used: {error}",
                "front_end, encoder and frames as asit writes them",
                "copy the model folder again, or upgrade asit",
            ) from error
        if list(encoder.grid) != card.get("grid"):
            raise CheckpointError(
                f"{where} says grid {card.get('grid')}, and {card['frames']} frames make {list(encoder.grid)}",
                "a card that agrees with itself",
                "copy the model folder again from where it was saved",
            )
        checkpoint.load_strict(encoder, tensors, str(Path(folder) / "model.safetensors"))
        return cls(encoder, front_end, card.get("training")).to(device)

    def embed(
        self,
        x: Sound,
        rate: int | None = None,
        layer: int | None = None,
        precision: Literal["float32", "bf16"] = "float32",
    ) -> Embedding:
        """Embed one clip; see `embed_batch`."""
        return self.embed_batch([x], rate, layer, precision)[0]

    def embed_batch(
        self,
        sounds: Iterable[Sound],
        rate: int | None = None,
        layer: int | None = None,
        precision: Literal["float32", "bf16"] = "float32",
        batch: int = 16,
    ) -> list[Embedding]:
        """Embed clips of any lengths; what one gives does not depend on its neighbours.

        A clip becomes as many patch columns as it covers; a last column at least half covered is filled by the
        front end's padding rule, one less covered is left out, and there is at least one. Positions are those of the
        first columns of the training view, not stretched. A clip up to half as long again as the training view is
        seen whole, with resized positions. A longer one is cut into windows of the view's length, end to end; the
        last is moved back to end with the clip, and gives only the columns that the others do not have.

        Args:
            sounds: files of any rate, or arrays or tensors (S,) or (channels, S), whose channels are averaged.
            rate: sample rate of the arrays in Hz; None: they are at the model's own. Files know theirs.
            layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
            precision: arithmetic of the encoder.
            batch: windows that go through the encoder at once.

        Raises:
            AudioError: a sound that is empty, not finite, not floating point, of another shape, or unreadable.
            ConfigError: no such layer.
        """
        if isinstance(sounds, str | os.PathLike | np.ndarray | Tensor):
            raise AudioError(
                f"embed_batch was given one {type(sounds).__name__}", "a list of sounds", "call embed, or wrap it in []"
            )
        found: list[list[tuple[Tensor, Tensor, int]]] = []
        pool: list[_Window] = []
        for i, sound in enumerate(sounds):
            found.append([])
            pool.extend(self._windows(i, self._wave(sound, rate)))
            if len(pool) >= 4 * batch:
                self._run(pool, found, layer, precision, batch)
                pool = []
        self._run(pool, found, layer, precision, batch)
        return [self._embedding(parts) for parts in found]

    def _wave(self, sound: Sound, rate: int | None) -> Tensor:
        """The sound as (S,) float32 at the model's rate, on the CPU; never empty, always finite."""
        if isinstance(sound, str | os.PathLike):
            name, wave = (
                str(sound),
                files.read(Path(sound), rate=self.rate, resampler=self.front_end.settings.resampler),
            )
        elif isinstance(sound, np.ndarray | Tensor):
            name = f"the {type(sound).__name__} of shape {tuple(sound.shape)}"
            samples = sound.detach().cpu() if isinstance(sound, Tensor) else torch.from_numpy(np.array(sound))
            if not samples.is_floating_point():
                raise AudioError(
                    f"{name} holds {samples.dtype}",
                    "floating-point samples in [-1, 1]",
                    "divide by the type's largest value, such as 32768 for int16",
                )
            if samples.ndim not in (1, 2) or (samples.ndim == 2 and samples.shape[0] > max(samples.shape[1], 1)):
                raise AudioError(f"{name} is not a clip", "(samples,) or (channels, samples)", "turn the axes")
            mono = samples.float().mean(0) if samples.ndim == 2 else samples.float()
            wave = mono.numpy()
            if rate is not None and rate != self.rate and wave.size:
                wave = files.resample(wave, rate, self.rate, self.front_end.settings.resampler)
        else:
            raise AudioError(f"a {type(sound).__name__}", "a path, an array or a tensor", "see AudioModel.embed")
        if not wave.size:
            raise AudioError(f"{name} is empty", "at least one sample", "leave it out")
        if not np.isfinite(wave).all():
            bad = int((~np.isfinite(wave)).sum())
            raise AudioError(f"{name} has {bad} samples that are not finite", "numbers in [-1, 1]", "mend or leave out")
        return torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))

    def _windows(self, clip: int, wave: Tensor) -> Iterator[_Window]:
        step, view = self.encoder.patch[0], self.encoder.grid[0]
        columns = max(1, int(self.front_end.frames_for(len(wave)) / step + 0.5))
        wave = self.front_end.pad(wave, self.front_end.samples_for(columns * step))
        if columns <= WHOLE * view:
            view = max(view, columns)
        starts = [0] if columns <= view else [*range(0, columns - view, view), columns - view]
        done = 0
        for start in starts:
            end = min(start + view, columns)
            first = start * step * self.front_end.shift
            part = wave[first : first + self.front_end.samples_for((end - start) * step)]
            yield _Window(clip, part, end - start, end - done)
            done = end

    def _run(
        self,
        windows: Sequence[_Window],
        found: list[list[tuple[Tensor, Tensor, int]]],
        layer: int | None,
        precision: str,
        batch: int,
    ) -> None:
        """Put the windows through the encoder and add (class token, fresh patches, columns) to each one's clip."""
        # Neighbours of like length waste least on padding. The sort is stable, so a clip's windows stay in order.
        ordered = sorted(windows, key=lambda window: window.columns)
        device, (view, mel) = self.encoder.pos_embed.device, self.encoder.grid
        cast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        for part in _batches(ordered, batch, self.encoder.grid[0]):
            most = part[-1].columns
            with torch.inference_mode(), cast:
                x = torch.stack([self._input(window, most) for window in part]).unsqueeze(1)
                counts = torch.tensor([window.columns for window in part], device=device)
                valid = torch.arange(most * mel, device=device) < counts[:, None] * mel
                padded = part[0].columns < most
                resized = most > view
                tokens = self.encoder(x, valid=valid if padded else None, layer=layer, stretch=resized)
            # Copied outside inference mode: the results can then be used in training something on top.
            cls, patches = tokens.cls.cpu().float().clone(), tokens.patches.cpu().float().clone()
            for i, window in enumerate(part):
                own = patches[i, (window.columns - window.fresh) * mel : window.columns * mel]
                found[window.clip].append((cls[i], own, window.fresh))

    def _input(self, window: _Window, columns: int) -> Tensor:
        """The window's normalised log-mel (T, F) on the model's device, T filled up to `columns` with zeros."""
        frames = window.columns * self.encoder.patch[0]
        logmel = self.front_end.fbank(window.wave[None].to(self.encoder.pos_embed.device))[0]
        x = self.front_end.normalise(self.front_end.pad_frames(logmel, frames)[:frames])
        return torch.nn.functional.pad(x, (0, 0, 0, columns * self.encoder.patch[0] - frames))

    def _embedding(self, parts: list[tuple[Tensor, Tensor, int]]) -> Embedding:
        patches = torch.cat([patches for _, patches, _ in parts])
        weights = torch.tensor([float(fresh) for _, _, fresh in parts])
        cls = (torch.stack([cls for cls, _, _ in parts]) * (weights / weights.sum())[:, None]).sum(0)
        columns = int(weights.sum())
        frames, shift = self.encoder.patch[0], self.front_end.shift
        middle = (self.front_end.samples_for(frames) / 2 + torch.arange(columns) * (frames * shift)) / self.rate
        return Embedding(patches.mean(0), patches, (columns, self.encoder.grid[1]), middle, cls)


def _batches(windows: Sequence[_Window], batch: int, view: int) -> Iterator[Sequence[_Window]]:
    """Windows, sorted by length, in batches; those longer than the view only with their like: positions are resized."""
    at = 0
    while at < len(windows):
        end = min(at + batch, len(windows))
        group = max(view, windows[at].columns)
        while windows[end - 1].columns > group:
            end -= 1
        yield windows[at:end]
        at = end


def _blank(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """An encoder whose weights are yet to be loaded: drawing them first would take longer than reading them."""
    with torch.device("meta"):
        encoder = Encoder(settings, frames, mels)
    return encoder.to_empty(device="cpu")


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
    """The pretrained model in a folder, such as RUN/model; see `AudioModel.load`."""
    return AudioModel.load(folder, device)
