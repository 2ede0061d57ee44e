"""Which patch tokens a step computes with: those the student sees, and those the local loss is taken on.

Both are drawn in the loader, the same number in each view, so that shapes never change; a stored batch replays a step.
P patches, K of them seen, S in the local loss, V views, M masked copies of each.

Sources: patches that are masked are not seen by the encoder in masked autoencoders (arXiv 2111.06377), data2vec 2.0
(arXiv 2212.07525) and EAT (arXiv 2401.03497), the latter two with several masks of one view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from asit.config import LossSettings, MaskingSettings
from asit.pretrain.masking import MASKED, BoolArray, IntArray, ViewMask


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens of one clip.

    Attributes:
        masks: of M * V views, copy by copy; what the student does not see is wiped in them.
        keep: (M * V, K) int64, ascending: patches that the student sees; None: all.
        local: (V, S) int64, ascending: patches of the local loss, the same in all copies of a view; None: all.
    """

    masks: list[ViewMask]
    keep: IntArray | None
    local: IntArray | None


def count_of(share: float, patches: int) -> int | None:
    """Return a share of the patches as a number, at least one; None, for all, where the share is 1."""
    return None if share == 1.0 else max(1, round(share * patches))


def choose(
    rng: np.random.Generator,
    masks: Sequence[ViewMask],
    masking: MaskingSettings,
    losses: LossSettings,
    patch: tuple[int, int],
) -> ChosenTokens:
    """Draw the tokens of one clip, whose views are complete patches.

    Args:
        rng: seeded by the caller; not advanced where every token is chosen.
        masks: of its M * V views, copy by copy.
        masking: `keep` and `copies`.
        losses: `local_share` and `local_tokens`.
        patch: (frames, mels) of a patch.
    """
    grid = masks[0].drop.shape[0] // patch[0] * (masks[0].drop.shape[1] // patch[1])
    views = len(masks) // masking.copies
    chosen, keep, local = list(masks), None, None
    if seen := count_of(masking.keep, grid):
        keep = np.zeros((len(masks), seen), dtype=np.int64)
        for i, mask in enumerate(masks):
            chosen[i], keep[i] = leave_out(rng, mask, seen, patch)
    if wanted := count_of(losses.local_share, grid):
        local = np.zeros((views, wanted), dtype=np.int64)
        for view in range(views):
            score = np.zeros(grid)
            if losses.local_tokens == "masked":
                for mask in chosen[view::views]:
                    score += areas(mask.any, patch) > MASKED
            local[view] = np.sort(_ranked(rng, score)[:wanted])
    return ChosenTokens(chosen, keep, local)


def leave_out(rng: np.random.Generator, mask: ViewMask, seen: int, patch: tuple[int, int]) -> tuple[ViewMask, IntArray]:
    """Choose the patches that the student does not see: those wiped most, equals in random order.

    Args:
        rng: seeded by the caller.
        mask: of the view.
        seen: K.
        patch: (frames, mels) of a patch.

    Returns:
        The mask with what is left out wiped completely, and the patches that are seen (K,), ascending. Where more than
        P - K patches are wiped, the rest of them are seen as they are: wiped.
    """
    ranked = _ranked(rng, areas(mask.drop, patch))
    drop = np.array(mask.drop, order="C")
    time, mel = np.divmod(ranked[: len(ranked) - seen], drop.shape[1] // patch[1])
    _cut(drop, patch)[time, :, mel] = True
    return replace(mask, drop=drop), np.sort(ranked[len(ranked) - seen :])


def areas(mask: BoolArray, patch: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Share of each patch's area that is set: (T, F) -> (P,), time-major."""
    shares: npt.NDArray[np.float64] = _cut(mask, patch).mean((1, 3), dtype=np.float64).reshape(-1)
    return shares


def _ranked(rng: np.random.Generator, score: npt.NDArray[np.float64]) -> IntArray:
    """Indices by falling score, equals in random order."""
    return np.lexsort((rng.random(len(score)), -score))


def _cut(mask: BoolArray, patch: tuple[int, int]) -> BoolArray:
    """(T, F), of complete patches, as (time, height, mel, breadth), a view of it."""
    return mask.reshape(mask.shape[0] // patch[0], patch[0], mask.shape[1] // patch[1], patch[1])


def touched(mask: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches with anything corrupted: (R, 1, T, F) bool -> (R, P) bool, time-major."""
    rows, _, frames, mels = mask.shape
    split = mask.view(rows, frames // patch[0], patch[0], mels // patch[1], patch[1])
    return split.any(4).any(2).flatten(1)


def copied(x: Tensor, copies: int) -> Tensor:
    """(R, ...) as (copies * R, ...), one after the other."""
    return x if copies == 1 else x.repeat(copies, *(1,) * (x.ndim - 1))
