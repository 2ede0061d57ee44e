"""A model as one function of the waveform: what is exported, for how many samples, and what the result is checked by.

`Waveform` is the function as torch can trace it, with free numbers of rows and samples; `asit.interop.onnx.graph`
writes the same one node by node; `reference` computes it with the model's own parts, and both are compared with that.

Letters: B rows, S samples, T frames, F mel bins, P patches, D width, C classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import asit
from asit.audio.fbank import FLOOR, mel_bank
from asit.errors import CheckpointError, ConfigError
from asit.model.audio_model import AudioModel
from asit.model.embedding import WHOLE
from asit.model.vit import Tokens

Output = Literal["scores", "logits", "embedding", "frames"]
"""scores (B, C): sigmoids where a clip may have several labels, else a softmax; logits (B, C) before that; embedding
(B, D): mean of the patch tokens, as `AudioModel.embed(...).clip`; frames (B, time, D): their means over mel."""

CUBIC = -0.75
"""The constant of bicubic interpolation in torch; that of ONNX's Resize too."""

FRACTIONS = (0.05, 0.1, 0.5, 1.0, 1.3)
"""Lengths that a file is checked at, as shares of the training input: 0.5, 1, 5, 10 and 13 s for one of 10 s."""


def output_of(model: AudioModel, wanted: str | None) -> Output:
    """What is to come out: as asked for, or scores of a classifier and the embedding of an encoder.

    Raises:
        ConfigError: there is no such output, or it takes a head, and the model has none.
    """
    if wanted is None:
        return "scores" if model.head is not None else "embedding"
    for output in get_args(Output):
        if output == wanted:
            if output in ("scores", "logits") and model.head is None:
                raise ConfigError(
                    f"{output} were asked for, and this model has no head and no labels: it is an encoder",
                    "embedding or frames of an encoder",
                    "fine-tune it first (`asit finetune`), or pass --output embedding",
                )
            return output
    raise ConfigError(f"no output is named {wanted!r}", f"one of {', '.join(get_args(Output))}", "choose one of them")


@dataclass(frozen=True)
class Extent:
    """How many patch columns a number of samples becomes; all counts are those of the model's front end and encoder.

    Attributes:
        window, shift: of the log-mel, in samples.
        patch, step: of the patches, in frames.
        view: columns of the training input.
        least: columns that shorter sounds are filled up to: the view for a classifier, else one.
        most: columns seen whole; positions are resized for more than the view.
        slack: frames beyond the training input that a classifier does not look at.
    """

    window: int
    shift: int
    patch: int
    step: int
    view: int
    least: int
    most: int
    slack: int

    def columns(self, samples: int) -> int:
        """Columns of so many samples: whole ones, and one more where at least half of what it adds is there."""
        frames = 0 if samples < self.window else 1 + (samples - self.window) // self.shift
        return max(self.least, (2 * (frames - self.slack - self.patch) + 3 * self.step) // (2 * self.step))

    @property
    def training(self) -> int:
        """Samples of the training input: the window that a client cuts long recordings into."""
        return self.window + self.shift * (self.step * (self.view - 1) + self.patch - 1)

    @property
    def longest(self) -> int:
        """Most samples that are not more than `most` columns."""
        frames = math.ceil((2 * self.step * (self.most + 1) - 3 * self.step) / 2) + self.patch + self.slack
        return self.window + self.shift * (frames - 1) - 1


def extent_of(model: AudioModel, output: Output) -> Extent:
    """The counts of a model for this output."""
    encoder, front_end = model.encoder, model.front_end
    view, slack = encoder.grid[0], 0
    whole = output in ("scores", "logits")
    if whole and model.labelling is not None:
        heard = front_end.frames_for(round(model.labelling.seconds * model.rate) + 1)
        slack = max(0, heard - model.frames)
    return Extent(
        front_end.window,
        front_end.shift,
        encoder.patch[0],
        encoder.stride[0],
        view,
        view if whole else 1,
        int(WHOLE * view),
        slack,
    )


@torch.no_grad()
def reference(model: AudioModel, output: Output, waves: Tensor) -> Tensor:
    """The function with the model's own front end, encoder and head, on the CPU.

    Args:
        waves: (B, S) float32, of at most `Extent.longest` samples.
    """
    extent, front_end, encoder = extent_of(model, output), model.front_end, model.encoder
    columns = extent.columns(waves.shape[1])
    frames = encoder.span(columns)
    filled = torch.stack([front_end.pad(wave, front_end.samples_for(frames)) for wave in waves])
    logmel = front_end.fbank(filled.to(front_end.hann.device))[:, :frames]
    x = front_end.normalise(torch.stack([front_end.pad_frames(one, frames) for one in logmel]))
    tokens = encoder(x[:, None], stretch=columns > extent.view)
    return _answer(model.head, model.multi, output, tokens).cpu()


def _answer(head: nn.Module | None, multi: bool, output: Output, tokens: Tokens) -> Tensor:
    if output == "embedding":
        return tokens.patches.mean(1)
    if output == "frames":
        return tokens.patches.unflatten(1, tokens.grid).mean(2)
    assert head is not None, "output_of refused it"
    logits: Tensor = head(tokens)
    if output == "logits":
        return logits
    return logits.sigmoid() if multi else logits.softmax(1)


class Waveform(nn.Module):
    """Waves (B, S) float32 at the model's rate to the output, as `torch.export` traces it; shares the weights.

    The front end is written anew, because its own goes through a wave in blocks whose number depends on the length,
    and positions are gathered by a formula that holds for shorter and longer inputs alike.
    """

    hann: Tensor
    bank: Tensor

    def __init__(self, model: AudioModel, output: Output) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head
        self.output: Output = output
        self.multi = model.multi
        self.extent = extent_of(model, output)
        self.settings = model.front_end.settings
        self.register_buffer("hann", model.front_end.hann)
        self.register_buffer("bank", mel_bank(self.settings))

    def forward(self, waves: Tensor) -> Tensor:
        """See the class; more columns than `Extent.most` are a RuntimeError."""
        extent = self.extent
        # Kept as a tensor until it is known: of the plain expression torch.export could not tell that it is even.
        samples = torch.full((), waves.shape[1], dtype=torch.int64)
        heard = (samples - extent.window).div(extent.shift, rounding_mode="floor").add(1).clamp(min=0)
        twice = 2 * (heard - extent.slack - extent.patch) + 3 * extent.step
        columns: Any = twice.div(2 * extent.step, rounding_mode="floor").clamp(min=extent.least).item()
        torch._check(columns >= extent.least)
        torch._check(columns <= extent.most)
        frames = (columns - 1) * extent.step + extent.patch
        x = self._logmel(self._filled(waves, (frames + extent.window // extent.shift) * extent.shift), frames)
        if self.settings.padding == "zero":
            own = torch.arange(frames)[:, None] < heard.clamp(min=1)
            x = torch.where(own, x, 0.0)
        assert not isinstance(self.settings.mean, str), "AudioModel has numbers"
        assert not isinstance(self.settings.std, str), "AudioModel has numbers"
        x = (x - self.settings.mean) / (2 * self.settings.std)
        return _answer(self.head, self.multi, self.output, self._tokens(x[:, None], columns))

    def _filled(self, waves: Tensor, samples: int) -> Tensor:
        """Waves (B, S) cut or filled up to `samples`, by silence or from their beginning."""
        if self.settings.padding == "repeat":
            return waves.index_select(1, torch.arange(samples) % torch.full((), waves.shape[1]))
        reach = self.extent.shift * (self.encoder.span(self.extent.most) + self.extent.window // self.extent.shift)
        return F.pad(waves, (0, reach))[:, :samples]

    def _logmel(self, waves: Tensor, frames: int) -> Tensor:
        """Log-mel (B, T, F), not normalised, of waves that hold a little more than the frames need."""
        shift = self.extent.shift
        whole, rest = divmod(self.extent.window, shift)
        hops = waves.reshape(waves.shape[0], frames + whole, shift)
        parts = [hops[:, i : i + frames] for i in range(whole)]
        if rest:
            parts.append(hops[:, whole : whole + frames, :rest])
        x = torch.cat(parts, dim=2)
        x = x - x.mean(2, keepdim=True)
        x = (x - self.settings.preemphasis * torch.cat([x[..., :1], x[..., :-1]], dim=2)) * self.hann
        parts_of = torch.view_as_real(torch.fft.rfft(x, n=2 * (self.bank.shape[0] - 1)))
        power = parts_of[..., 0].square() + parts_of[..., 1].square()
        return (power @ self.bank).clamp(min=FLOOR).log()

    def _tokens(self, x: Tensor, columns: int) -> Tokens:
        encoder, prefix = self.encoder, self.encoder.prefix
        patches = encoder.patch_embed(x) + self._positions(columns)
        names = ("cls_token", "dist_token")[:prefix]
        first = torch.cat([getattr(encoder, name) for name in names], dim=1) + encoder.pos_embed[:, :prefix]
        tokens = torch.cat([first.expand(x.shape[0], -1, -1), patches], dim=1)
        for block in encoder.blocks:
            tokens = block(tokens)
        tokens = encoder.norm(tokens)
        return Tokens(tokens[:, :prefix].mean(1), tokens[:, prefix:], (columns, encoder.grid[1]))

    def _positions(self, columns: int) -> Tensor:
        """Positions of the patches, (1, P, D): the first columns' as they are, or all of them resized for more.

        Bicubic interpolation along time, the mel axis being what it was; up to the view the places are whole
        numbers, where its weights are exactly 0, 1, 0 and 0.
        """
        encoder, view = self.encoder, self.extent.view
        own = encoder.pos_embed[0, encoder.prefix :].unflatten(0, encoder.grid)
        place = (torch.arange(columns) + 0.5) * (view / torch.full((), columns).clamp(min=view)) - 0.5
        low = place.floor()
        out = torch.zeros_like(place)[:, None, None]
        for i, weight in enumerate(cubic_weights(place - low)):
            index = (low + (i - 1)).clamp(0, view - 1).long()
            out = out + weight[:, None, None] * own[index]
        return out.flatten(0, 1)[None]


def cubic_weights(past: Tensor) -> list[Tensor]:
    """Weights of the four neighbours of a place that lies `past` (0 to 1) the second: Keys' kernel with `CUBIC`."""
    near = [past, 1.0 - past]
    inner = [((CUBIC + 2.0) * x - (CUBIC + 3.0)) * x * x + 1.0 for x in near]
    outer = [((CUBIC * x - 5.0 * CUBIC) * x + 8.0 * CUBIC) * x - 4.0 * CUBIC for x in (past + 1.0, 2.0 - past)]
    return [outer[0], *inner, outer[1]]


def on_cpu(model: AudioModel) -> AudioModel:
    """The model itself where it is on the CPU, else a copy there."""
    if model.encoder.pos_embed.device.type == "cpu":
        return model
    return AudioModel.from_parts(
        model.encoder,
        model.front_end.settings,
        model.encoder.settings,
        model.frames,
        model.training,
        model.head,
        model.labelling,
    )


def probes(extent: Extent, rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """Waves to check a file with: gliding tones, clicks and noise of changing strength, (B, S) with B of 1 and 2."""
    for i, fraction in enumerate(FRACTIONS):
        samples = max(1, min(round(fraction * extent.training), extent.longest))
        yield np.stack([_probe(samples, rate, seed) for seed in range(1 + i % 2)])


def _probe(samples: int, rate: int, seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng([samples, seed])
    t = np.arange(samples) / rate
    low, high = np.sort(rng.uniform(80, rate / 3, 2))
    phase = 2 * np.pi * (low * t + (high - low) * t**2 / (2 * max(t[-1], 1 / rate)))
    strength = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * t)
    wave = 0.3 * strength * np.sin(phase) + 0.02 * rng.standard_normal(samples)
    wave[:: max(1, rate // 3)] += 0.4
    return wave.astype(np.float32)


def compare(
    model: AudioModel, output: Output, run: Callable[[npt.NDArray[np.float32]], Any], tolerance: float, what: str
) -> dict[str, Any]:
    """Run an exported function beside the model at several lengths and numbers of rows.

    Args:
        run: waves (B, S) to what the exported function gives.
        tolerance: largest difference allowed, for outputs beyond 1 in parts of the largest.
        what: the file, for the message.

    Returns:
        facts for the file: the largest difference, and the seconds that were tried.

    Raises:
        CheckpointError: a difference beyond the tolerance, another shape, or numbers that are not finite.
    """
    extent, worst, seconds = extent_of(model, output), 0.0, []
    for waves in probes(extent, model.rate):
        want = reference(model, output, torch.from_numpy(waves)).numpy()
        got = np.asarray(run(waves))
        length = waves.shape[1] / model.rate
        if got.shape != want.shape or not np.isfinite(got).all():
            raise CheckpointError(
                f"{what} gives {got.shape} for {len(waves)} waves of {length:.2f} s"
                + ("" if np.isfinite(got).all() else ", not all finite"),
                f"{want.shape}, finite, as the model",
                "this is a fault of the export or of the runtime: report it with the model's card",
            )
        difference = float(np.abs(got - want).max() / max(1.0, float(np.abs(want).max())))
        worst = max(worst, difference)
        seconds.append(round(length, 3))
        if not difference <= tolerance:
            raise CheckpointError(
                f"{what} differs from the model by {difference:.1e} for {len(waves)} waves of {length:.2f} s",
                f"at most {tolerance:.0e}",
                "this is a fault of the export or of the runtime: report it with the model's card",
            )
    return {"largest_difference": worst, "tolerance": tolerance, "seconds": seconds, "rows": [1, 2]}


def facts_of(model: AudioModel, output: Output, license: str | None) -> dict[str, Any]:
    """What a client has to know, for the file's metadata; JSON."""
    extent = extent_of(model, output)
    head = {} if model.head is None else {f"head.{name}": value for name, value in model.head.state_dict().items()}
    tensors = {**model.encoder.state_dict(), **head}
    weights = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    said = license or model.training.get("license")
    return {
        "output": output,
        "rate": model.rate,
        "window": extent.training,
        "longest": extent.longest,
        "classes": list(model.classes or ()) if output in ("scores", "logits") else [],
        "multi": model.multi,
        "card": model.card,
        "license": str(said) if said else "",
        "asit": asit.__version__,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def as_text(facts: dict[str, Any]) -> dict[str, str]:
    """Facts as strings, everything but a string as JSON: what ONNX keeps as metadata."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in facts.items()
    }
