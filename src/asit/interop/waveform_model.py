"""A model as one function from waveform to output, for torch's exporters.

Letters: B rows, S samples, T frames, W samples a window, F mel bins, K bins of the Fourier transform, P patches,
N tokens (prefix and patches), D width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.audio.fbank import FLOOR, mel_bank
from asit.interop.exportable import Output, extent_of, output_of_tokens
from asit.model.audio_model import AudioModel
from asit.model.vit import Tokens


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
        self.output: Output = output
        self.multi = model.multi
        self.extent = extent = extent_of(model, output)
        self.settings = model.front_end.settings
        # Only parts of the encoder, or the blocks' weights would be in the file twice.
        self.patch_embed, self.norm = encoder.patch_embed, encoder.norm
        self.blocks = nn.ModuleList(_Block(block) for block in encoder.blocks)
        self.grid, self.width = encoder.grid, encoder.width
        names = ("cls_token", "dist_token")[: encoder.prefix]
        prefix, patches = encoder.pos_embed.detach().split([encoder.prefix, encoder.grid[0] * encoder.grid[1]], dim=1)
        self.register_buffer("prefix", torch.cat([getattr(encoder, name).detach() for name in names], dim=1) + prefix)
        self.register_buffer("positions", patches.unflatten(1, encoder.grid).permute(0, 3, 1, 2).contiguous())
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
        whole, rest = divmod(self.extent.window, shift)
        hops = waveforms.reshape(waveforms.shape[0], frames + whole, shift)
        parts = [hops[:, i : i + frames] for i in range(whole)]
        if rest:
            parts.append(hops[:, whole : whole + frames, :rest])
        x = torch.cat(parts, dim=2)
        x = x - x.mean(2, keepdim=True)
        x = (x - self.settings.preemphasis * torch.cat([x[..., :1], x[..., :-1]], dim=2)) * self.hann
        spectrum = x @ self.fourier
        return (spectrum * spectrum @ self.bank).clamp(min=FLOOR).log()

    def _tokens(self, x: Tensor, columns: int) -> Tokens:
        rows, first = x.shape[0], self.prefix.shape[1]
        patches = self.patch_embed(x) + self._positions(columns)
        tokens = torch.cat([self.prefix.expand(rows, -1, -1), patches], dim=1).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, rows)
        tokens = self.norm(tokens).view(rows, -1, self.width)
        return Tokens(tokens[:, :first].mean(1), tokens[:, first:], (columns, self.grid[1]))

    def _positions(self, columns: int) -> Tensor:
        """Return the positions of the patches (1, P, D): those of the first columns, or all of them resized."""
        own, (view, mel) = self.positions, self.grid
        if self.extent.most > view:
            own = F.interpolate(own, size=(torch.sym_max(columns, view), mel), mode="bicubic", align_corners=False)
        return own[:, :, :columns].permute(0, 2, 3, 1).flatten(1, 2)


class _Block(nn.Module):
    """A block of the encoder on tokens (B N, D).

    Queries, keys and values have separate layers, since splitting one layer's output costs copies; the scale of the
    attention is folded into the queries' weights.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.norm1, self.proj, self.norm2, self.mlp = block.norm1, block.attn.proj, block.norm2, block.mlp
        self.heads, self.size = block.attn.heads, self.proj.in_features // block.attn.heads
        weights, biases = block.attn.qkv.weight.detach().chunk(3), block.attn.qkv.bias.detach().chunk(3)
        factor = self.size**-0.5
        self.query = _linear(weights[0] * factor, biases[0] * factor)
        self.key, self.value = (_linear(weights[i].clone(), biases[i].clone()) for i in (1, 2))

    def forward(self, x: Tensor, rows: int) -> Tensor:
        h = self.norm1(x)
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(h).view(rows, -1, self.heads, self.size).transpose(1, 2) for layer in layers)
        if torch.onnx.is_in_onnx_export():  # exported, torch's attention transposes the keys twice
            mixed = (q @ k.transpose(2, 3)).softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2).flatten(0, 1))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """Return a layer with this weight (out, in) and bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _tables(bank: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the Fourier transform of W real samples as a matrix (W, 2 K) of cosines and sines, and the mel bank
    (2 K, F) for its squares, both for the K bins that some mel bin reads."""
    used = np.flatnonzero(bank.sum(1).numpy() > 0)
    bins = np.arange(used[0], used[-1] + 1) if len(used) else np.arange(1)
    size = 2 * (len(bank) - 1)
    # Full periods are removed first, so that the angle is exact in float64 at any length.
    angle = 2 * np.pi * (np.arange(window)[:, None] * bins[None] % size) / size
    table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    return torch.from_numpy(table), bank[bins].repeat(2, 1)
