"""Features of a clip: pooled tokens of an encoder, its patch tokens, or statistics of the log-mel; their settings.

Letters: R clips, S samples, P patches, D width, F mel bins.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION
from asit.errors import ConfigError, suggestion
from asit.model.audio_model import AudioModel
from asit.model.encoders import new_encoder
from asit.model.vit import Encoder

TOKENS = "tokens"
"""The kind of all patch tokens, as float16."""
JOINED: Mapping[Pooling, tuple[Pooling, ...]] = {
    "class+mean": ("class", "mean"),
    "class+mean+std": ("class", "mean+std"),
}
"""Kinds of pooling that are read, and cached, as two parts."""
LOG_MEL = "mean+std of log-mel"
"""The kind of `LogMelReader`."""
WINDOWS = 16
"""Windows of one clip in a batch; features depend on it in the last bits."""
MODEL, UNTRAINED, LOG_MEL_STATISTICS = "model", "untrained", "log-mel statistics"
"""Names of the encoders that are compared, in records."""

Wave = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


Pooling = Literal["class", "mean", "class+mean", "class+mean+std", "time-mean", "mel-mean", "mean+std"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What probes and verification have in common.

    Attributes:
        pooling: vectors that linear and k-NN probes read, and verification compares.
        baselines: also evaluate the same architecture untrained, and log-mel statistics.
        seed: of draws, folds, bootstrap and the untrained weights.
        train, validation, test: names of splits.
        seconds: length that every clip is cut or padded to; None: clips as they are.
        precision: arithmetic of the encoder.
        layers: blocks of the evaluated model whose outputs are concatenated (0 the first, -1 the last); none: the last.
        bad_files: share of clips that may be unreadable.
    """

    pooling: tuple[Pooling, ...] = ("class+mean",)
    baselines: bool = False
    seed: int = 0
    train: tuple[str, ...] = TRAIN
    validation: tuple[str, ...] = VALIDATION
    test: tuple[str, ...] = TEST
    seconds: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    layers: tuple[int, ...] = ()
    bad_files: float = 0.1


def choose(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a choice that is empty, or has a name that is unknown or repeated.

    Raises:
        ConfigError: names it, and the known names.
    """
    wrong = [value for value in given if value not in known]
    if not wrong and given and len(set(given)) == len(given):
        return
    hint = suggestion(wrong[0], known, " (did you mean {}?)") if wrong else ""
    raise ConfigError(
        f"{name} {', '.join(wrong or given) or 'none'}{hint}",
        f"one or more of {', '.join(known)}, each once",
        f"give --{name} with these names separated by commas",
    )


def pool(cls: Tensor, patches: Tensor, grid: tuple[int, int], kind: Pooling) -> Tensor:
    """Pool an encoder's tokens to one vector per clip.

    Args:
        cls: class tokens (R, D).
        patches: patch tokens (R, P, D), time-major: all mel patches of the first time column, then the next.
        grid: (time, mel) patches, whose product is P.
        kind: "class": the class token, (R, D);
            "mean": the mean over all patches, (R, D);
            "class+mean": both concatenated, (R, 2 D);
            "class+mean+std": class token, mean and population standard deviation over all patches, (R, 3 D);
            "time-mean": the mean over time for each mel patch, lowest band first, (R, mel * D);
            "mel-mean": the mean over mel for each time patch, earliest first, (R, time * D);
            "mean+std": mean and population standard deviation over all patches, (R, 2 D).
    """
    if kind == "class":
        return cls
    if kind in ("time-mean", "mel-mean"):
        return patches.unflatten(1, grid).mean(1 if kind == "time-mean" else 2).flatten(1)
    mean = patches.mean(1)
    if kind == "mean":
        return mean
    parts = [cls] * kind.startswith("class") + [mean]
    return torch.cat(parts + [patches.std(1, correction=0)] * kind.endswith("std"), 1)


@torch.inference_mode()
def log_mel_statistics(front_end: FrontEnd, waveforms: Tensor) -> Tensor:
    """Compute mean and standard deviation over time of each log-mel bin: waveforms (R, S) to (R, 2 F)."""
    spectrogram = front_end.fbank(waveforms)
    return torch.cat([spectrogram.mean(1), spectrogram.std(1, correction=0)], 1)


class EncoderReader:
    """Turns a waveform (S,) into one array (rows, width) for each kind of feature of a frozen encoder; thread-safe.

    Kinds are those of `pool`, which come with one row (time-mean: one for each band of mel
    patches, mel-mean: one for each column of time), and `TOKENS`, (P, D) float16, time-major.

    Args:
        model: on the device to run on.
        kinds: to read.
        precision: arithmetic of the encoder.
        seconds: length that every clip is cut or padded to, in whole columns of patches; None: clips as they are.
        layers: as in `FeatureSettings`.
    """

    def __init__(
        self,
        model: AudioModel,
        kinds: tuple[str, ...] = (),
        precision: Literal["float32", "bf16"] = "float32",
        seconds: float | None = None,
        layers: tuple[int, ...] = (),
    ) -> None:
        self.model, self.kinds, self.precision = model, kinds, precision
        self.layers = [model.encoder.block_index(layer) for layer in layers] or None
        self.front_end = model.front_end.settings
        self.samples = None
        if seconds is not None:  # full columns: at least one, at most four views
            encoder, frames = model.encoder, model.front_end.frames_for(round(seconds * model.rate))
            columns = max(1, (frames - encoder.patch[0]) // encoder.stride[0] + 1)
            self.samples = model.front_end.samples_for(encoder.span(min(columns, 4 * encoder.grid[0])))

    @functools.cached_property
    def digest(self) -> str:
        """A name of all that the features depend on except the waveform."""
        model = self.model
        facts = {
            "front_end": self.front_end.model_dump(mode="json"),
            "encoder": model.encoder.settings.model_dump(mode="json"),
            "grid": list(model.encoder.grid),
            "precision": self.precision,
            "samples": self.samples,
            "windows": WINDOWS,
            "device": model.encoder.pos_embed.device.type,
            "torch": torch.__version__,
            **({} if self.layers is None else {"layers": self.layers}),
        }
        return f"{weights_digest(model.encoder)} {json.dumps(facts, sort_keys=True)}"

    def cut(self, wave: Wave) -> Tensor:
        """Return the waveform, cut or padded to the reader's length where it has one."""
        return torch.from_numpy(_cut(self.model.front_end, wave, self.samples))

    def __call__(self, wave: Wave, kinds: tuple[str, ...]) -> dict[str, Array]:
        sound = self.cut(wave)
        device = self.model.encoder.pos_embed.device.type
        with torch.autocast(device, enabled=False):  # embed enables what it needs
            found = self.model.embed_batch([sound], layer=self.layers, precision=self.precision, batch=WINDOWS)[0]
        assert found.patches is not None
        out: dict[str, Array] = {}
        for kind in kinds:
            if kind == TOKENS:
                out[kind] = found.patches.half().numpy()
                continue
            vector = pool(found.class_token[None], found.patches[None], found.grid, kind)  # type: ignore[arg-type]
            rows = {"time-mean": found.grid[1], "mel-mean": found.grid[0]}.get(kind, 1)
            out[kind] = vector.reshape(rows, -1).numpy()
        return out


class HeadReader:
    """Reads a clip as a classifier does: what its head pools of each window, (W, features) float32; kind `TOKENS`.

    Args:
        model: a classifier on the device to run on; its linear layer is not used.
        precision: arithmetic of the encoder.

    Attributes:
        digest: as in `EncoderReader`.
    """

    kinds: tuple[str, ...] = (TOKENS,)

    def __init__(self, model: AudioModel, precision: Literal["float32", "bf16"] = "float32") -> None:
        assert model.labelling is not None, "a classifier"
        self.tagger, self.front_end = model.tagger(precision), model.front_end.settings
        facts = {
            "front_end": self.front_end.model_dump(mode="json"),
            "encoder": model.encoder.settings.model_dump(mode="json"),
            "frames": model.frames,
            "pooling": [model.labelling.pooling, *model.labelling.layers],
            "precision": precision,
            "device": model.encoder.pos_embed.device.type,
            "torch": torch.__version__,
        }
        self.digest = f"head windows {weights_digest(model.encoder)} {json.dumps(facts, sort_keys=True)}"

    def __call__(self, wave: Wave, kinds: tuple[str, ...]) -> dict[str, Array]:
        windows, found = self.tagger.windows_of(iter([wave])), []
        while batch := list(itertools.islice(windows, WINDOWS)):
            found.append(self.tagger.pooled_of(batch).cpu().numpy())
        return dict.fromkeys(kinds, np.concatenate(found))


class LogMelReader:
    """Reads the baseline: mean and standard deviation over time of each log-mel bin, (1, 2 F); kind `LOG_MEL`.

    Args:
        front_end: the encoder's own, so that both have the same input.
        seconds: as `EncoderReader`, to the nearest sample.
    """

    kinds: tuple[str, ...] = (LOG_MEL,)

    def __init__(self, front_end: FrontEnd, seconds: float | None = None) -> None:
        self.fbank, self.front_end = front_end, front_end.settings
        self.samples = None if seconds is None else round(seconds * front_end.settings.rate)
        facts = self.front_end.model_dump(mode="json", exclude={"mean", "std"})
        self.digest = json.dumps(["log-mel", facts, self.samples, torch.__version__], sort_keys=True)

    def __call__(self, wave: Wave, kinds: tuple[str, ...]) -> dict[str, Array]:
        cut = _cut(self.fbank, wave, self.samples if self.samples is not None else max(self.fbank.window, len(wave)))
        sound = torch.from_numpy(cut)[None].to(self.fbank.hann.device)
        return dict.fromkeys(kinds, log_mel_statistics(self.fbank, sound).cpu().numpy())


def readers(
    model: AudioModel, settings: FeatureSettings, pooling: Sequence[Pooling], tokens: bool = False
) -> dict[str, EncoderReader | LogMelReader]:
    """Return what to read: the model, and for `settings.baselines` the same untrained and log-mel statistics.

    Args:
        model: to evaluate.
        settings: length, precision, seed of the untrained weights.
        pooling: kinds of pooling; those in `JOINED` are read as their parts, see `pooled`.
        tokens: also all patch tokens.
    """
    kinds: list[str] = list(dict.fromkeys(kind for name in pooling for kind in JOINED.get(name, (name,))))
    every = tuple(kinds + [TOKENS] * tokens)
    how = settings.precision, settings.seconds, settings.layers
    found: dict[str, EncoderReader | LogMelReader] = {MODEL: EncoderReader(model, every, *how)}
    if settings.baselines:
        found[UNTRAINED] = EncoderReader(untrained(model, settings.seed), every, *how)
        if pooling:
            found[LOG_MEL_STATISTICS] = LogMelReader(model.front_end, settings.seconds)
    return found


def pooled(vectors: Mapping[str, npt.NDArray[np.float32]], kind: str) -> npt.NDArray[np.float32]:
    """Return the (n, width) table of one kind of feature out of those that were read."""
    parts = [vectors[part] for part in JOINED.get(kind, (kind,))]  # type: ignore[call-overload]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, 1)


def weights_digest(encoder: Encoder) -> str:
    """Return the SHA-256 of an encoder's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def untrained(model: AudioModel, seed: int) -> AudioModel:
    """Return the model's architecture and front end with newly initialised weights."""
    encoder = new_encoder(model.encoder.settings, model.frames, model.front_end.settings.mels)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return AudioModel(encoder, FrontEnd(model.front_end.settings)).to(model.encoder.pos_embed.device)


def _cut(front_end: FrontEnd, wave: Wave, samples: int | None) -> Wave:
    """Cut or pad a waveform to a length; where the card's rule is "zero", which fills frames, pad with silence."""
    if samples is None:
        return wave
    filled = front_end.pad(torch.from_numpy(wave[:samples]), samples).numpy()
    return np.pad(filled, (0, samples - len(filled)))
