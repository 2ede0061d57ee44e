"""Encoder: a pre-norm vision transformer (arXiv 2010.11929) over log-mel patches, as in ASiT (arXiv 2211.13189).

Letters: R rows, T frames, F mel bins, P patches, D width, N tokens, H heads. Tokens are the class token, if `distilled`
DeiT's distillation token (arXiv 2012.12877), then the patches, time-major: all mel patches of a time column, then the
next column. Parameters are named as in timm and the official ASiT files. The factors of stochastic depth (arXiv
1603.09382) are arguments, so that a saved batch replays a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.config import SIZES, EncoderSettings
from asit.errors import ConfigError
from asit.model.blocks import Block, init_transformer
from asit.model.cpu.bf16 import Stamp, can_be_stamped, linear
from asit.model.positions import grid_of, patch_of, prefix_of, resize_positions, stride_of

_GRIDS = 64
"""Grids whose resized positions are cached: more than the lengths from one to one and a half views of 10 s."""


@dataclass
class Tokens:
    """Output of the encoder: cls (R, D), patches (R, P, D) time-major, grid (time, mel) of the input.

    With `keep`, P is the number of kept patches. cls is the class token, or the mean of class and distillation token in
    a distilled encoder, as in AST, or of the patches in BEATs.
    """

    cls: Tensor
    patches: Tensor
    grid: tuple[int, int]


def shape_of(settings: EncoderSettings) -> tuple[int, int, int]:
    """Return (width, depth, heads) of the settings.

    Raises:
        ConfigError: a custom size lacks one of them, a named size sets one, or heads do not divide width.
    """
    given = {"width": settings.width, "depth": settings.depth, "heads": settings.heads}
    custom = settings.size == "custom"
    missing = [name for name, value in given.items() if value is None]
    if custom and missing:
        raise ConfigError(
            f"encoder.size is custom, without {', '.join(missing)}",
            "a custom size has width, depth and heads",
            "set " + ", ".join(f"encoder.{name}" for name in missing) + f", or use one of {', '.join(SIZES)}",
        )
    if not custom and len(missing) < len(given):
        extra = [f"{name} {value}" for name, value in given.items() if value is not None]
        raise ConfigError(
            f"encoder.size is {settings.size}, and {', '.join(extra)} is set too",
            "a named size fixes width, depth and heads",
            "set encoder.size to custom, or omit the others",
        )
    width, depth, heads = (value or 0 for value in given.values()) if custom else SIZES[settings.size]
    if width % heads:
        raise ConfigError(
            f"encoder.width is {width} and encoder.heads is {heads}",
            "a width that the heads divide evenly",
            f"set encoder.width to a multiple of {heads}, such as {-(-width // heads) * heads}",
        )
    return width, depth, heads


def size_of(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Return the settings that give an encoder this shape: the named size that has it, else a custom one."""
    name = next((name for name, shape in SIZES.items() if shape == (width, depth, heads)), None)
    return {"size": name} if name else {"size": "custom", "width": width, "depth": depth, "heads": heads}


def drop_path_rates(settings: EncoderSettings) -> np.ndarray:
    """Return each block's probability to drop a branch, linear from 0 to `drop_path`: (depth,) float64."""
    return np.linspace(0.0, settings.drop_path, shape_of(settings)[1])


def draw_drop_path(rng: np.random.Generator, rates: np.ndarray) -> np.ndarray:
    """Draw one row's stochastic-depth factors for attention and MLP of each block: (depth, 2), 0 or 1/(1 - p)."""
    keep = rng.random((len(rates), 2)) >= rates[:, None]
    factors: np.ndarray = (keep / (1.0 - rates[:, None])).astype(np.float32)
    return factors


def cut(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut a spectrogram into patches: (R, 1, T, F) -> (R, P, height * breadth), time-major."""
    rows, _, frames, mels = x.shape
    height, breadth = patch
    split = x.reshape(rows, frames // height, height, mels // breadth, breadth).transpose(2, 3)
    return split.reshape(rows, -1, height * breadth)


class PatchEmbed(nn.Module):
    """Patch embedding: (R, 1, T, F) -> (R, P, D), or with `keep` (R, K) patches -> (R, K, D)."""

    def __init__(self, width: int, patch: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.patch = patch
        self.stride = stride
        # The convolution holds weights of the official shape (D, 1, time, mel) but is applied as a matrix product:
        # faster on a CPU, and patches that are not `valid` are masked before the product.
        self.proj = nn.Conv2d(1, width, kernel_size=patch, stride=stride)

    def forward(self, x: Tensor, valid: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        height, breadth = self.patch
        if self.stride == self.patch:
            areas = cut(x, self.patch)
        else:
            areas = x[:, 0].unfold(1, height, self.stride[0]).unfold(2, breadth, self.stride[1])
            areas = areas.reshape(x.shape[0], -1, height * breadth)  # len would be a constant in an export
        if valid is not None:
            areas = torch.where(valid[..., None], areas, 0.0)
        if keep is not None:
            areas = areas.gather(1, keep[..., None].expand(-1, -1, height * breadth))
        return linear(areas, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Vision transformer over patches of a spectrogram.

    Args:
        settings: size, patch, stride, MLP ratio, distillation token and epsilon of the norms.
        frames: T of the training view; with F the grid of the position embedding, see `grid_of`.
        mels: F.

    Attributes:
        prefix: tokens before the patches: 1, or 2 if distilled.

    Raises:
        ConfigError: sizes that do not match.
    """

    stretches: ClassVar[bool] = True
    """Whether there are positions for longer inputs than the training view."""
    norm_first: ClassVar[bool] = False
    """Whether `norm` is before the first block, not after the last one."""
    block: ClassVar[type[Block]] = Block
    pos_embed: Tensor

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
        self.add_positions(self.prefix + self.grid[0] * self.grid[1])
        self.patch_embed = PatchEmbed(self.width, self.patch, self.stride)
        hidden = round(self.width * settings.mlp_ratio)
        eps = settings.norm_eps
        self.blocks = nn.ModuleList(self.block(self.width, self.heads, hidden, eps) for _ in range(self.depth))
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self._resized: dict[tuple[int, int], tuple[Stamp, Tensor]] = {}
        self.init_weights()

    def span(self, columns: int) -> int:
        """Return the frames that `columns` patch columns cover."""
        return (columns - 1) * self.stride[0] + self.patch[0]

    def add_positions(self, count: int) -> None:
        """Add the position embedding of `count` tokens."""
        self.pos_embed = nn.Parameter(torch.empty(1, count, self.width))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter, see `init_transformer`."""
        init_transformer(self, generator)

    def positions(self, grid: tuple[int, int], stretch: bool = True) -> Tensor:
        """Return the position embedding of a grid, (1, prefix + P, D) float32.

        With `stretch`, any other grid than the encoder's gets the embedding resized bicubically, as in the official
        code; without it, a shorter one gets the first columns, so that a column keeps its length.
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
            # A full table is replaced, not cleared: other threads may be reading it.
            table = self._resized if len(self._resized) < _GRIDS else {}
            table[grid] = kept
            self._resized = table
        return kept[1]

    def block_index(self, layer: int) -> int:
        """Return the index of a block from 0; `layer` may count from the end.

        Raises:
            ConfigError: no such block.
        """
        if not isinstance(layer, int | np.integer) or not -self.depth <= layer < self.depth:
            raise ConfigError(
                f"layer {layer} of an encoder of {self.depth} blocks",
                f"{-self.depth} to {self.depth - 1}",
                f"use {self.depth - 1} or -1 for the last block",
            )
        return int(layer) % self.depth

    def block_indices(self, layer: int | Sequence[int] | None) -> list[int]:
        """Return the indices of one or several blocks from 0, as for `block_index`; None: of the last.

        Raises:
            ConfigError: no such block, or none is given.
        """
        if layer is None:
            return [self.depth - 1]
        layers = [layer] if not isinstance(layer, Sequence) else layer
        if not layers:
            raise ConfigError("no layer is given", "at least one", "leave it out for the last block")
        return [self.block_index(one) for one in layers]

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
        layer: int | Sequence[int] | None = None,
        stretch: bool = True,
        keep: Tensor | None = None,
    ) -> Tokens:
        """Encode spectrograms.

        Args:
            x: (R, 1, T, F), normalised, of any size that `grid_of` accepts.
            drop: (depth, 2, R) factors of stochastic depth, see `draw_drop_path`.
            valid: (R, P) bool; other patches are neither read nor attended to, and their tokens are 0. An overlapping
                patch is valid if all of it is within the clip.
            layer: block to return, after the final norm (0 the first, -1 the last); None: the last. Of several, each
                token is the concatenation, k D wide.
            stretch: how to resize positions, see `positions`.
            keep: (R, K) int64, the only patches to encode; not together with `valid`.

        Raises:
            ConfigError: T or F does not fit the patches, or there is no such layer.
        """
        layers, outputs = self.block_indices(layer), dict[int, Tensor]()
        several = len(layers) > 1
        tokens, grid = self.hidden(x, max(layers) + 1, drop, valid, stretch, keep, outputs if several else None)
        prefix = self.prefix
        if not self.norm_first:
            tokens = self.norm(tokens)
            outputs = {i: self.norm(outputs[i]) for i in outputs if i in layers}
        if several:
            tokens = torch.cat([outputs[i] for i in layers], -1)
        patches = tokens[:, prefix:]
        if valid is not None:
            patches = torch.where(valid[..., None], patches, 0.0)
        return Tokens(self.summary(tokens, valid), patches, grid)

    def summary(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """Return the vector of each row: the class token, or the mean of both tokens before the patches."""
        return tokens[:, 0] if self.prefix == 1 else tokens[:, : self.prefix].mean(1)

    def hidden(
        self,
        x: Tensor,
        blocks: int,
        drop: Tensor | None = None,
        valid: Tensor | None = None,
        stretch: bool = True,
        keep: Tensor | None = None,
        outputs: dict[int, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[int, int]]:
        """Return the tokens (R, N, D) after the first blocks, before the final norm, and the grid; see `forward`.

        `outputs` is filled with the tokens after each of them, by index.
        """
        tokens, grid, context = self.embedded(x, valid, stretch, keep)
        for i in range(blocks):
            tokens = self.blocks[i](tokens, None if drop is None else drop[i], *context)
            if outputs is not None:
                outputs[i] = tokens
        return tokens, grid

    def embedded(
        self, x: Tensor, valid: Tensor | None, stretch: bool, keep: Tensor | None
    ) -> tuple[Tensor, tuple[int, int], tuple[Tensor | None, ...]]:
        """Return the tokens (R, N, D) before the first block, the grid, and the mask for the blocks; see `forward`."""
        grid, prefix = grid_of(x.shape[2], x.shape[3], self.patch, self.stride), self.prefix
        positions = self.positions(grid, stretch)
        if keep is None:
            patches = self.patch_embed(x, valid) + positions[:, prefix:]
        else:
            patches = self.patch_embed(x, keep=keep) + F.embedding(keep, positions[0, prefix:])
        first = torch.cat([self.cls_token, self.dist_token], dim=1) if prefix == 2 else self.cls_token
        tokens = torch.cat([(first + positions[:, :prefix]).expand(len(x), -1, -1), patches], dim=1)
        if self.norm_first:
            tokens = self.norm(tokens)
        mask = None if valid is None else F.pad(valid, (prefix, 0), value=True)[:, None, None, :]
        return tokens, grid, (mask,)
