"""The encoder: a pre-norm vision transformer over log-mel patches.

Letters: R rows, T frames, F mel bins, P patches, D width, N tokens, H heads. N is P and the class token, and where the
settings say `distilled` the distillation token of DeiT (arXiv 2012.12877) between class token and patches. Patches are
time-major: all mel patches of the first column of time, then the next. Names of parameters are those of timm and of the
official ASiT files, so that their weights load key by key.

Sources: the ViT of arXiv 2010.11929 with the settings of ASiT (arXiv 2211.13189); stochastic depth of
arXiv 1603.09382, its factors drawn outside and handed in, so that a saved batch replays a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.config import SIZES, EncoderSettings
from asit.errors import ConfigError
from asit.model.blocks import Block, init_transformer
from asit.model.cpu.bf16 import linear
from asit.model.cpu.weight_cache import Stamp, can_be_stamped
from asit.model.positions import grid_of, patch_of, prefix_of, resize_positions, stride_of

_GRIDS = 64
"""Grids whose resized positions an encoder keeps: more than the lengths between one view of 10 s and one and a half."""


@dataclass
class Tokens:
    """What the encoder gives: cls (R, D), patches (R, P, D) time-major, grid (time, mel) with time x mel = P.

    Where only some patches were seen, P is their number and grid still the whole one.

    cls is the class token; of a distilled encoder the mean of class and distillation token, as in AST.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


def shape_of(settings: EncoderSettings) -> tuple[int, int, int]:
    """The (width, depth, heads) of the settings.

    Raises:
        ConfigError: a custom size lacks one of the three, a named size has one, or heads do not divide width.
    """
    given = {"width": settings.width, "depth": settings.depth, "heads": settings.heads}
    if settings.size == "custom":
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ConfigError(
                f"encoder.size is custom, without {', '.join(missing)}",
                "a custom size has width, depth and heads",
                "set " + ", ".join(f"encoder.{name}" for name in missing) + f", or take one of {', '.join(SIZES)}",
            )
        width, depth, heads = (value for value in given.values() if value is not None)
    else:
        extra = [f"{name} {value}" for name, value in given.items() if value is not None]
        if extra:
            raise ConfigError(
                f"encoder.size is {settings.size}, and {', '.join(extra)} is set too",
                "a named size fixes width, depth and heads",
                "set encoder.size to custom, or take the others out",
            )
        width, depth, heads = SIZES[settings.size]
    if width % heads:
        raise ConfigError(
            f"encoder.width is {width} and encoder.heads is {heads}",
            "a width that the heads divide evenly",
            f"set encoder.width to a multiple of {heads}, such as {-(-width // heads) * heads}",
        )
    return width, depth, heads


def drop_path_rates(settings: EncoderSettings) -> np.ndarray:
    """Probability that a block's branches are left out, linear from 0 to `drop_path` over depth: (depth,) float64."""
    return np.linspace(0.0, settings.drop_path, shape_of(settings)[1])


def draw_drop_path(rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
    """One row's stochastic-depth factors, for attention and MLP of each block: (depth, 2) float32, 0 or 1/(1 - p)."""
    keep = rng.random((len(rates), 2)) >= rates[:, None]
    factors: np.ndarray = (keep / (1.0 - rates[:, None])).astype(np.float32)
    return factors


def cut(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Every patch's area, side by side: (R, 1, T, F) -> (R, P, height * breadth), time-major."""
    rows, _, frames, mels = x.shape
    height, breadth = patch
    split = x.reshape(rows, frames // height, height, mels // breadth, breadth).transpose(2, 3)
    return split.reshape(rows, -1, height * breadth)


class PatchEmbed(nn.Module):
    """Patches to tokens: (R, 1, T, F) -> (R, P, D), or of the patches `keep` (R, K) alone -> (R, K, D)."""

    def __init__(self, width: int, patch: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.stride = stride
        # The convolution holds the weights in the official shape (D, 1, time, mel) and is applied as a matrix
        # product: faster on a CPU, and what is not `valid` is then out before it is multiplied by anything.
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=stride)

    def forward(self, x: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        height, breadth = self.patch
        if self.stride == self.patch:
            areas = cut(x, self.patch)
        else:
            areas = x[:, 0].unfold(1, height, self.stride[0]).unfold(2, breadth, self.stride[1])
            areas = areas.reshape(x.shape[0], -1, height * breadth)  # not len: that would be a constant in an export
        if valid is not None:
            areas = torch.where(valid[..., None], areas, 0.0)
        if keep is not None:
            areas = areas.gather(1, keep[..., None].expand(-1, -1, height * breadth))
        return linear(areas, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """The transformer over patches of a spectrogram.

    Args:
        settings: size, patch, its stride, MLP ratio, second token and epsilon of the norms.
        frames: T of the training view, as `grid_of` wants it; fixes the grid of the position embedding.
        mels: F, likewise.

    Attributes:
        prefix: tokens before the patches: 1, or 2 of a distilled encoder.

    Raises:
        ConfigError: sizes that cannot go together.
    """

    def __init__(self, settings: EncoderSettings, frames: int, mels: int) -> None:
        super().__init__()
        self.settings = settings
        self.patch, self.stride = patch_of(settings), stride_of(settings)
        self.frames, self.mels = frames, mels
        self.grid = grid_of(frames, mels, self.patch, self.stride)
        self.width, self.depth, self.heads = shape_of(settings)
        self.prefix = prefix_of(settings)
        self.cls_token = nn.Parameter(torch.empty(1, 1, self.width))
        if settings.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.empty(1, self.prefix + self.grid[0] * self.grid[1], self.width))
        self.patch_embed = PatchEmbed(self.width, self.patch, self.stride)
        hidden = round(self.width * settings.mlp_ratio)
        eps = settings.norm_eps
        self.blocks = nn.ModuleList(Block(self.width, self.heads, hidden, eps) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self._resized: dict[tuple[int, int], tuple[Stamp, Tensor]] = {}
        self.init_weights()

    def span(self, columns: int) -> int:
        """Frames that this many columns of patches cover, 1 or more."""
        return (columns - 1) * self.stride[0] + self.patch[0]

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Set every parameter anew: see `blocks.init_transformer`."""
        init_transformer(self, generator)

    def positions(self, grid: tuple[int, int], stretch: bool = True) -> Tensor:
        """The position embedding of a grid: (1, prefix + P, D) float32; those of the prefix come first.

        `stretch`: a grid other than the encoder's own gets the whole embedding resized bicubically, as in the
        official code; without it a shorter one gets the first columns as they are, so a column keeps its length.
        """
        time, mel = grid
        if grid == self.grid:
            return self.pos_embed
        if not stretch and time <= self.grid[0] and mel == self.grid[1]:
            return self.pos_embed[:, : self.prefix + time * mel]
        own = self.pos_embed
        wanted = self.training or (torch.is_grad_enabled() and own.requires_grad)
        if wanted or torch.compiler.is_compiling() or not can_be_stamped(own):
            return resize_positions(own, self.grid, grid, self.prefix)
        kept = self._resized.get(grid)
        if kept is None or not kept[0].holds(own):
            stamp = Stamp(own)
            with torch.inference_mode(False), torch.no_grad():  # usable in and out of inference mode
                kept = stamp, resize_positions(own, self.grid, grid, self.prefix)
            # Other threads may read meanwhile: a table is replaced when full, never emptied.
            table = self._resized if len(self._resized) < _GRIDS else {}
            table[grid] = kept
            self._resized = table
        return kept[1]

    def block_index(self, layer: int) -> int:
        """Number of a block, counted from 0, that may be counted from the end.

        Raises:
            ConfigError: there is no such block.
        """
        if not isinstance(layer, int | np.integer) or not -self.depth <= layer < self.depth:
            raise ConfigError(
                f"layer {layer} of an encoder of {self.depth} blocks",
                f"{-self.depth} to {self.depth - 1}",
                f"use {self.depth - 1} or -1 for the last block",
            )
        return int(layer) % self.depth

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self._resized = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_resized": {}}  # a copy has parameters of its own

    def forward(
        self,
        x: Tensor,
        drop: Tensor | None = None,
        valid: Tensor | None = None,
        layer: int | None = None,
        stretch: bool = True,
        keep: Tensor | None = None,
    ) -> Tokens:
        """Spectrograms to tokens.

        Args:
            x: (R, 1, T, F), normalised; any size that `grid_of` takes, other grids get resized positions.
            drop: (depth, 2, R) factors of stochastic depth (`draw_drop_path`), 0 or 1/(1 - p).
            valid: (R, P) bool; other patches are neither read nor attended to, and come out as 0. Where patches
                overlap, one is valid that lies within the clip as a whole.
            layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
            stretch: how positions follow another grid, see `positions`.
            keep: (R, K) int64, the patches that are seen; the others are left out, and `Tokens.patches` is (R, K, D).
                Not together with `valid`.

        Raises:
            ConfigError: T or F does not fit the patches, or there is no such layer.
        """
        grid = grid_of(x.shape[2], x.shape[3], self.patch, self.stride)
        last = self.depth if layer is None else self.block_index(layer) + 1
        positions, prefix = self.positions(grid, stretch), self.prefix
        if keep is None:
            patches = self.patch_embed(x, valid) + positions[:, prefix:]
        else:
            patches = self.patch_embed(x, keep=keep) + F.embedding(keep, positions[0, prefix:])
        first = torch.cat([self.cls_token, self.dist_token], dim=1) if prefix == 2 else self.cls_token
        tokens = torch.cat([(first + positions[:, :prefix]).expand(len(x), -1, -1), patches], dim=1)
        mask = None if valid is None else F.pad(valid, (prefix, 0), value=True)[:, None, None, :]
        for i in range(last):
            tokens = self.blocks[i](tokens, None if drop is None else drop[i], mask)
        tokens = self.norm(tokens)
        patches = tokens[:, prefix:]
        if valid is not None:
            patches = torch.where(valid[..., None], patches, 0.0)
        return Tokens(tokens[:, 0] if prefix == 1 else tokens[:, :prefix].mean(1), patches, grid)


def empty_encoder(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """An encoder whose weights are yet to be loaded: drawing them first would take longer than reading them."""
    with torch.inference_mode(False):  # made in inference mode they would count no writes
        return meta_encoder(settings, frames, mels).to_empty(device="cpu")


def meta_encoder(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """An encoder on the meta device: names and shapes of weights, without the memory for them."""
    with torch.device("meta"):
        return Encoder(settings, frames, mels)
