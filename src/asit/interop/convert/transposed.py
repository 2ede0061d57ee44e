"""Transpose weights of libraries with (mel, time) axes to asit's (time, mel), and find the grid of their patches.

AST and SSAST have filters (D, 1, mel, time) and mel-major positions. Letters: D width, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from asit.errors import CheckpointError

Pair = tuple[int, int]
"""(time, mel) or (frames, mel bins)."""


def transpose_filters(filters: Tensor) -> Tensor:
    """Transpose (D, C, mel, time) to (D, C, time, mel)."""
    return filters.transpose(2, 3).contiguous()


def transpose_positions(positions: Tensor, grid: Pair, prefix: int) -> Tensor:
    """Transpose positions (1, prefix + P, D) of a (time, mel) grid from mel-major to time-major."""
    time, mel = grid
    transposed = positions.clone()
    transposed[:, prefix:] = positions[:, prefix:].unflatten(1, (mel, time)).transpose(1, 2).flatten(1, 2)
    return transposed


def fit_grid(path: Path, count: int, patch: Pair, mels: int, strides: Sequence[Pair]) -> tuple[Pair, Pair]:
    """Return the first stride for which P = `count` positions fill a grid over `mels` bins, and that (time, mel) grid.

    `patch` and `strides` are (frames, mel bins).

    Raises:
        CheckpointError: no stride fits.
    """
    tried = []
    for stride in strides:
        rows = (mels - patch[1]) // stride[1] + 1 if mels >= patch[1] else 0
        if rows > 0 and count >= rows and count % rows == 0:
            return stride, (count // rows, rows)
        tried.append(f"{stride[0]}x{stride[1]} makes {rows} rows")
    raise CheckpointError(
        f"{path} has positions of {count} patches of {patch[0]}x{patch[1]} (frames x mel bins); over {mels} mel bins "
        f"stride {', '.join(tried)}",
        "rows of patches that divide their number",
        "pass the --stride and --mels that the network was trained with, such as --stride 10",
    )


def frames_of(grid: Pair, patch: Pair, stride: Pair) -> int:
    """Return the frames that these columns cover."""
    return (grid[0] - 1) * stride[0] + patch[0]
