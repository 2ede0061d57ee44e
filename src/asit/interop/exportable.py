"""Outputs, input lengths, checks and metadata of exported models.

`Waveform` is traced; `reference` computes the same with the model's own parts, and every exported file is compared with
it. Letters: B rows, S samples, T frames, W samples a window, F mel bins, K bins of the Fourier transform, P patches,
N tokens (prefix and patches), D width, C classes.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

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
from asit.model.blocks import PostBlock
from asit.model.inference.embedding import longest
from asit.model.vit import Tokens

Output = Literal["scores", "logits", "embedding", "frames"]
"""scores (B, C): sigmoids if a clip may have several labels, else a softmax; logits (B, C); embedding (B, D): mean of
the patch tokens, as `AudioModel.embed(...).clip`; frames (B, time, D): their means over mel."""

FRACTIONS = (0.05, 0.1, 0.5, 1.0, 1.3)
"""Lengths to check a file at, as shares of the training input."""


def output_of(model: AudioModel, wanted: str | None) -> Output:
    """Return the requested output; None: scores of a classifier, the embedding of an encoder.

    Raises:
        ConfigError: unknown output, or one that needs a head.
    """
    if wanted is None:
        return "scores" if model.head is not None else "embedding"
    if wanted not in get_args(Output):
        expected = f"one of {', '.join(get_args(Output))}"
        raise ConfigError(f"no output is named {wanted!r}", expected, "choose one of them")
    if wanted in ("scores", "logits") and model.head is None:
        raise ConfigError(
            f"{wanted} were requested, and this model has no head and no labels: it is an encoder",
            "embedding or frames of an encoder",
            "fine-tune it first (`asit finetune`), or pass --output embedding",
        )
    return cast(Output, wanted)


@dataclass(frozen=True)
class Extent:
    """Number of patch columns for a number of samples.

    Attributes:
        window, shift: of the log-mel, in samples.
        patch, step: size and stride of the patches, in frames.
        view: columns of the training input.
        least: columns that shorter inputs are padded to: the view for a classifier, else one.
        most: largest number of columns; positions are resized for more than the view.
        slack: frames beyond the training input that a classifier ignores.
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
        """Return full columns, and one more if at least half of what it adds is covered."""
        more = self.frames(samples) - self.slack - self.patch
        return max(self.least, (2 * more + 3 * self.step) // (2 * self.step))

    def frames(self, samples: int) -> int:
        """Return full frames."""
        return 0 if samples < self.window else 1 + (samples - self.window) // self.shift

    @property
    def training(self) -> int:
        """Samples of the training input, the window for long recordings."""
        return self.window + self.shift * (self.step * (self.view - 1) + self.patch - 1)

    @property
    def longest(self) -> int:
        """Most samples that fit `most` columns."""
        frames = math.ceil((2 * self.step * (self.most + 1) - 3 * self.step) / 2) + self.patch + self.slack
        return self.window + self.shift * (frames - 1) - 1


def extent_of(model: AudioModel, output: Output) -> Extent:
    """Return the `Extent` of a model for an output."""
    encoder, front_end = model.encoder, model.front_end
    view, slack = encoder.grid[0], 0
    scored = output in ("scores", "logits")
    if scored and model.labelling is not None:
        frames = front_end.frames_for(round(model.labelling.seconds * model.rate) + 1)
        slack = max(0, frames - model.frames)
    return Extent(
        front_end.window,
        front_end.shift,
        encoder.patch[0],
        encoder.stride[0],
        view,
        view if scored else 1,
        longest(encoder),
        slack,
    )


@torch.no_grad()
def reference(model: AudioModel, output: Output, waveforms: Tensor) -> Tensor:
    """Return the output computed by the model's own parts, for waveforms (B, S) of at most `Extent.longest` samples."""
    extent, front_end, encoder = extent_of(model, output), model.front_end, model.encoder
    columns = extent.columns(waveforms.shape[1])
    frames = encoder.span(columns)
    filled = torch.stack([front_end.pad(waveform, front_end.samples_for(frames)) for waveform in waveforms])
    logmel = front_end.fbank(filled.to(front_end.hann.device))[:, :frames]
    x = front_end.normalise(torch.stack([front_end.pad_frames(one, frames) for one in logmel]))
    tokens = encoder(x[:, None], stretch=columns > extent.view, layer=layers_of(model, output))
    return output_of_tokens(model.head, model.multi, output, tokens).cpu()


def output_of_tokens(head: nn.Module | None, multi: bool, output: Output, tokens: Tokens) -> Tensor:
    """Compute the output from the encoder's tokens."""
    if output == "embedding":
        return tokens.patches.mean(1)
    if output == "frames":
        return tokens.patches.unflatten(1, tokens.grid).mean(2)
    assert head is not None, "output_of refused it"
    logits: Tensor = head(tokens)
    if output == "logits":
        return logits
    return logits.sigmoid() if multi else logits.softmax(1)


def layers_of(model: AudioModel, output: Output) -> tuple[int, ...]:
    """Return the blocks that an output reads, 0 the first."""
    own = model.head.layers if model.head is not None and output in ("scores", "logits") else ()
    return own or (model.encoder.depth - 1,)


def on_cpu(model: AudioModel) -> AudioModel:
    """Return the model, or a copy on the CPU if it is on another device."""
    return model if model.encoder.pos_embed.device.type == "cpu" else copy.deepcopy(model).to("cpu")


def check_waveforms(extent: Extent, rate: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield waveforms (B, S) of chirps, clicks and noise to check a file with; B is 1 or 2."""
    for i, fraction in enumerate(FRACTIONS):
        samples = max(1, min(round(fraction * extent.training), extent.longest))
        yield np.stack([_check_waveform(samples, rate, seed) for seed in range(1 + i % 2)])


def _check_waveform(samples: int, rate: int, seed: int) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng([samples, seed])
    t = np.arange(samples) / rate
    low, high = np.sort(rng.uniform(80, rate / 3, 2))
    phase = 2 * np.pi * (low * t + (high - low) * t**2 / (2 * max(t[-1], 1 / rate)))
    strength = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 4) * t)
    waveform = 0.3 * strength * np.sin(phase) + 0.02 * rng.standard_normal(samples)
    waveform[:: max(1, rate // 3)] += 0.4
    return waveform.astype(np.float32)


def compare(
    model: AudioModel, output: Output, run: Callable[[npt.NDArray[np.float32]], Any], tolerance: float, what: str
) -> dict[str, Any]:
    """Compare an exported function with the model at several lengths and numbers of rows.

    Args:
        model: the model.
        output: the exported output.
        run: the exported function of waveforms (B, S).
        tolerance: largest difference, relative to the largest output beyond 1.
        what: the file, for messages.

    Returns:
        Metadata: the largest difference, and the lengths in seconds.

    Raises:
        CheckpointError: a larger difference, another shape, or numbers that are not finite.
    """
    extent, worst, seconds = extent_of(model, output), 0.0, []
    for waveforms in check_waveforms(extent, model.rate):
        want = reference(model, output, torch.from_numpy(waveforms)).numpy()
        got = np.asarray(run(waveforms))
        length = waveforms.shape[1] / model.rate
        fault = ""
        if got.shape != want.shape or not np.isfinite(got).all():
            fault = f"gives {got.shape}" + ("" if np.isfinite(got).all() else ", not all finite")
        else:
            difference = float(np.abs(got - want).max() / max(1.0, float(np.abs(want).max())))
            worst = max(worst, difference)
            seconds.append(round(length, 3))
            if not difference <= tolerance:
                fault = f"differs from the model by {difference:.1e}"
        if fault:
            raise CheckpointError(
                f"{what} {fault} for {len(waveforms)} waves of {length:.2f} s",
                f"{want.shape}, finite, within {tolerance:.0e} of the model",
                "this is a fault of the export or of the runtime: report it with the model's card",
            )
    return {"largest_difference": worst, "tolerance": tolerance, "seconds": seconds, "rows": [1, 2]}


def facts_of(model: AudioModel, output: Output, license: str | None) -> dict[str, Any]:
    """Return the metadata of the exported file, as JSON."""
    extent = extent_of(model, output)
    head = {} if model.head is None else {f"head.{name}": value for name, value in model.head.state_dict().items()}
    tensors = {**model.encoder.state_dict(), **head}
    weights = safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    license = license or model.training.get("license")
    return {
        "output": output,
        "rate": model.rate,
        "window": extent.training,
        "longest": extent.longest,
        "classes": list(model.classes or ()) if output in ("scores", "logits") else [],
        "multi": model.multi,
        "card": model.card,
        "license": str(license) if license else "",
        "asit": asit.__version__,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


class Waveform(nn.Module):
    """Waveforms (B, S) float32 at the model's rate to the output, traced by `torch.export` and torch's ONNX exporter.

    It equals `reference` with dynamic numbers of rows and samples, and is fast in onnxruntime: the number of columns is
    looked up in a table, the Fourier transform is a matrix product (3.5 ms for 10 s of audio, against 9 ms and four
    times the error of onnxruntime's DFT), and tokens have shape (B N, D), so that each linear layer is one product.
    """

    columns: Tensor
    hann: Tensor
    fourier: Tensor
    bank: Tensor
    prefix: Tensor
    positions: Tensor

    def __init__(self, model: AudioModel, output: Output) -> None:
        super().__init__()
        encoder, self.head = model.encoder, model.head
        if encoder.prefix == 0:
            raise ConfigError(
                f"a model of family {encoder.settings.family}, whose relative positions are not exported",
                "ASiT, AST, SSAST, AudioMAE or EAT",
                "use it with asit.load",
            )
        self.output: Output = output
        self.multi = model.multi
        self.extent = extent = extent_of(model, output)
        self.settings = model.front_end.settings
        # Only parts of the encoder, or the blocks' weights would be in the file twice.
        self.patch_embed, self.norm = encoder.patch_embed, encoder.norm
        self.layers = layers_of(model, output)
        self.blocks = nn.ModuleList(_Block(block) for block in encoder.blocks[: max(self.layers) + 1])
        self.norm_first, self.width = encoder.norm_first, encoder.width
        # Learned positions are resized; fixed ones have a formula for the longest input.
        learned = encoder.settings.family == "vit"
        self.grid = encoder.grid if learned else (extent.most, encoder.grid[1])
        table = (encoder.pos_embed if learned else encoder.positions(self.grid)).detach()
        names = ("cls_token", "dist_token")[: encoder.prefix]
        prefix, patches = table.split([encoder.prefix, self.grid[0] * self.grid[1]], dim=1)
        self.register_buffer("prefix", torch.cat([getattr(encoder, name).detach() for name in names], dim=1) + prefix)
        self.register_buffer("positions", patches.unflatten(1, self.grid).permute(0, 3, 1, 2).contiguous())
        # For 0 to the most frames; every runtime refuses an index beyond the table.
        longest = extent.window + extent.shift * np.arange(-1, extent.frames(extent.longest))
        self.register_buffer("columns", torch.tensor([extent.columns(samples) for samples in longest.tolist()]))
        self.register_buffer("hann", model.front_end.hann)
        fourier, bank = _tables(mel_bank(self.settings), extent.window)
        self.register_buffer("fourier", fourier)
        self.register_buffer("bank", bank)

    def forward(self, waveforms: Tensor) -> Tensor:
        """Return the output; inputs longer than `Extent.longest` are an error of the runtime."""
        extent = self.extent
        # A tensor, since torch.export cannot show that the plain expression is an integer.
        samples = torch.full((1,), waveforms.shape[1], dtype=torch.int64)
        own_frames = (samples - extent.window).div(extent.shift, rounding_mode="floor").add(1).clamp(min=0)
        columns: Any = self.columns.index_select(0, own_frames).item()
        torch._check(columns >= extent.least)
        torch._check(columns <= extent.most)
        frames = (columns - 1) * extent.step + extent.patch
        x = self._logmel(self._filled(waveforms, (frames + extent.window // extent.shift) * extent.shift), frames)
        if self.settings.padding == "zero":
            own = torch.arange(frames)[:, None] < own_frames.clamp(min=1)
            x = torch.where(own, x, 0.0)
        assert not isinstance(self.settings.mean, str), "AudioModel has numbers"
        assert not isinstance(self.settings.std, str), "AudioModel has numbers"
        x = (x - self.settings.mean) / (2 * self.settings.std)
        return output_of_tokens(self.head, self.multi, self.output, self._tokens(x[:, None], columns))

    def _filled(self, waveforms: Tensor, samples: int) -> Tensor:
        """Cut or pad waveforms (B, S) to `samples`, with silence or by repetition."""
        if self.settings.padding == "repeat":
            return waveforms.index_select(1, torch.arange(samples) % torch.full((), waveforms.shape[1]))
        extent = self.extent
        reach = extent.shift * (extent.step * (extent.most - 1) + extent.patch) + extent.window
        return F.pad(waveforms, (0, reach))[:, :samples]

    def _logmel(self, waveforms: Tensor, frames: int) -> Tensor:
        """Return the log-mel (B, T, F), not normalised, of waveforms slightly longer than the frames."""
        shift = self.extent.shift
        full, rest = divmod(self.extent.window, shift)
        hops = waveforms.reshape(waveforms.shape[0], frames + full, shift)
        parts = [hops[:, i : i + frames] for i in range(full)]
        if rest:
            parts.append(hops[:, full : full + frames, :rest])
        x = torch.cat(parts, dim=2)
        x = x - x.mean(2, keepdim=True)
        x = (x - self.settings.preemphasis * torch.cat([x[..., :1], x[..., :-1]], dim=2)) * self.hann
        spectrum = x @ self.fourier
        return (spectrum * spectrum @ self.bank).clamp(min=FLOOR).log()

    def _tokens(self, x: Tensor, columns: int) -> Tokens:
        rows, first = x.shape[0], self.prefix.shape[1]
        patches = self.patch_embed(x) + self._positions(columns)
        tokens = torch.cat([self.prefix.expand(rows, -1, -1), patches], dim=1).flatten(0, 1)
        if self.norm_first:
            tokens = self.norm(tokens)
        outputs = []
        for block in self.blocks:
            outputs.append(tokens := block(tokens, rows))
        read = [outputs[layer] if self.norm_first else self.norm(outputs[layer]) for layer in self.layers]
        tokens = torch.cat([one.view(rows, -1, self.width) for one in read], dim=2)
        return Tokens(tokens[:, :first].mean(1), tokens[:, first:], (columns, self.grid[1]))

    def _positions(self, columns: int) -> Tensor:
        """Return the positions of the patches (1, P, D): those of the first columns, or all of them resized."""
        own, (view, mel) = self.positions, self.grid
        if self.extent.most > view:
            own = F.interpolate(own, size=(torch.sym_max(columns, view), mel), mode="bicubic", align_corners=False)
        return own[:, :, :columns].permute(0, 2, 3, 1).flatten(1, 2)


class _Block(nn.Module):
    """A block of the encoder on tokens (B N, D); the scale of the attention is in the queries' weights."""

    # Queries, keys and values have separate layers, since splitting one layer's output costs copies.

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.proj, self.norm2, self.mlp = block.norm1, block.attn.proj, block.norm2, block.mlp
        self.post = isinstance(block, PostBlock)
        self.heads, self.size = block.attn.heads, self.proj.in_features // block.attn.heads
        weights, biases = block.attn.qkv.weight.detach().chunk(3), block.attn.qkv.bias.detach().chunk(3)
        factor = self.size**-0.5
        self.query = _linear(weights[0] * factor, biases[0] * factor)
        self.key, self.value = (_linear(weights[i].clone(), biases[i].clone()) for i in (1, 2))

    def forward(self, x: Tensor, rows: int) -> Tensor:
        h = x if self.post else self.norm1(x)
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(h).view(rows, -1, self.heads, self.size).transpose(1, 2) for layer in layers)
        if torch.onnx.is_in_onnx_export():  # exported, torch's attention transposes the keys twice
            mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        if self.post:
            x = self.norm1(x)
            x = self.norm2(x + self.mlp(x))
        else:
            x = x + self.mlp(self.norm2(x))
        return x


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer with this weight (out, in) and bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _tables(bank: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the Fourier transform (W, 2 K), cosines and sines, and the bank (2 K, F) for its squares, of bins read."""
    used = np.flatnonzero(bank.sum(1).numpy() > 0)
    bins = np.arange(used[0], used[-1] + 1) if len(used) else np.arange(1)
    size = 2 * (len(bank) - 1)
    # Full periods are removed first, so that the angle is exact in float64 at any length.
    angle = 2 * np.pi * (np.arange(window)[:, None] * bins[None] % size) / size
    table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return torch.from_numpy(table), bank[bins].repeat(2, 1)
