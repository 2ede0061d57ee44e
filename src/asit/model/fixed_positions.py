"""Encoders with fixed positions, sines and cosines: of AudioMAE (arXiv 2207.06405) and EAT (arXiv 2401.03497).

Letters: P patches, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.blocks import PostBlock
from asit.model.positions import sincos_table
from asit.model.vit import Encoder


class FixedPositions(Encoder):
    """A vision transformer whose position embedding is no parameter; that of the class token is 0.

    The embedding is saved, since a file's own values differ from the formula by rounding. AudioMAE numbers the patches
    of an input of C columns and M bands of mel as a table of M rows and C columns, although they are time-major; so a
    longer input than the encoder's has no positions. A fine-tuned AudioMAE has no norm after the last block.
    """

    stretches = False

    def __init__(self, settings: EncoderSettings, frames: int, mels: int) -> None:
        super().__init__(settings, frames, mels)
        if settings.family == "audiomae-finetuned":
            self.norm = nn.Identity()  # type: ignore[assignment]

    def add_positions(self, count: int) -> None:
        """See `Encoder.add_positions`."""
        if self.width % 4:
            raise ConfigError(f"an encoder of width {self.width} with fixed positions", "a multiple of 4", "")
        self.register_buffer("pos_embed", torch.empty(1, count, self.width))

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter, and the positions by the formula."""
        super().init_weights(generator)
        if not self.pos_embed.is_meta:
            self.pos_embed[:, : self.prefix] = 0.0
            self.pos_embed[:, self.prefix :] = self.table(self.grid)

    def table(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of the patches of a (time, mel) grid by the formula: (1, P, D) float32, on the CPU."""
        return sincos_table(grid[1], grid[0], self.width)

    def positions(self, grid: tuple[int, int], stretch: bool = True) -> Tensor:
        """Return the position embedding of a grid, (1, prefix + P, D) float32: that of the first columns.

        Raises:
            ConfigError: the grid has more columns than the encoder's, or other bands of mel.
        """
        (time, mel), (most, bands) = grid, self.grid
        if mel != bands or time > most:
            raise ConfigError(
                f"an input of {time} x {mel} patches (time x mel), and fixed positions of {most} x {bands}",
                f"at most {most} columns ({self.frames} frames) of {bands}: {self.settings.family} has no others",
                "give shorter windows",
            )
        return self.pos_embed[:, : self.prefix + time * mel]


class Eat(FixedPositions):
    """EAT's encoder: norms after the sums, one before the first block, and (time, mel) positions for any length."""

    stretches, norm_first, block = True, True, PostBlock

    def table(self, grid: tuple[int, int]) -> Tensor:
        """See `FixedPositions.table`; a row is a time column."""
        return sincos_table(*grid, self.width)

    def positions(self, grid: tuple[int, int], stretch: bool = True) -> Tensor:
        """Return the position embedding of a grid, (1, prefix + P, D) float32: by the formula for a longer input."""
        if grid[0] <= self.grid[0] or grid[1] != self.grid[1]:
            return super().positions(grid, stretch)
        table = self.table(grid).to(self.pos_embed)
        return torch.cat([self.pos_embed[:, : self.prefix], table], dim=1)
