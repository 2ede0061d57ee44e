"""Other libraries' axes turned to ours, and the grid of patches that positions lie on.

Letters: D width, P patches. AST and SSAST read spectrograms as (mel, time): their filters are (D, 1, mel, time), and of
their positions all columns of the lowest mel row come first. Ours are (time, mel).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from asit.errors import CheckpointError

Pair = tuple[int, int]
"""(time, mel) or (frames, mel bins)."""


def turn_filters(filters: Tensor) -> Tensor:
    """(D, C, mel, time) to (D, C, time, mel)."""
    return filters.transpose(2, 3).contiguous()


def turn_positions(positions: Tensor, grid: Pair, prefix: int) -> Tensor:
    """(1, prefix + P, D) from mel-major to time-major; those of the `prefix` first tokens stay.

    Args:
        grid: ours, (time, mel).
        prefix: tokens before the patches.
    """
    time, mel = grid
    turned = positions.clone()
    turned[:, prefix:] = positions[:, prefix:].unflatten(1, (mel, time)).transpose(1, 2).flatten(1, 2)
    return turned


def lay(path: Path, count: int, patch: Pair, mels: int, strides: Sequence[Pair]) -> tuple[Pair, Pair]:
    """The first stride that gives whole columns for a number of positions, and the grid: (stride, (time, mel)).

    Args:
        count: P.
        patch: (frames, mel bins).
        mels: F.
        strides: to be tried, (frames, mel bins).

    Raises:
        CheckpointError: none of them does.
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
        "say with --stride and --mels what the network was trained with, such as --stride 10",
    )


def frames_of(grid: Pair, patch: Pair, stride: Pair) -> int:
    """T that these columns cover."""
    return (grid[0] - 1) * stride[0] + patch[0]
