"""Base classes of one's own masks, changes of views and objectives, and their use with checks (docs/research.md).

R rows (V views of B clips, view-major, in M masked copies), T frames, F mel bins, P patches, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asit.config import custom_classes
from asit.errors import ConfigError
from asit.model.blocks import init_transformer
from asit.pretrain.masking import BoolArray, ViewMask

if TYPE_CHECKING:
    from asit.model.vit import Tokens
    from asit.pretrain.pretrain_dataset import PretrainBatch

Spectrogram = npt.NDArray[np.float32]


class Mask(ABC):
    """Base class of masks, `custom.mask`; used in the loader's processes."""

    @abstractmethod
    def draw(self, rng: np.random.Generator, frames: int, mels: int, patch: tuple[int, int]) -> ViewMask | BoolArray:
        """Draw the mask of one view.

        Args:
            rng: seeded by (seed, epoch, clip); the only source of randomness.
            frames: T.
            mels: F.
            patch: (frames, mels) of a patch.

        Returns:
            (T, F) bool, what is wiped; or a `ViewMask`, which also says what is taken from another clip.
        """


class ViewChange(ABC):
    """Base class of changes of views, `custom.view`; used in the loader's processes."""

    @abstractmethod
    def change(self, rng: np.random.Generator, view: Spectrogram) -> Spectrogram:
        """Change one view, which student and teacher see.

        Args:
            rng: seeded by (seed, epoch, clip); the only source of randomness.
            view: (T, F) float32, the normalised log-mel of a global or local view; may be changed in place.

        Returns:
            The same shape.
        """


class Objective(nn.Module, ABC):
    """Base class of objectives, `custom.objective`: a loss on the student's tokens, trained with the student.

    Args:
        width: D of the encoder.
        grid: (time, mel) patches of a global view.
        patch: (frames, mels) of a patch.

    Attributes:
        needs_teacher: whether the tokens of the EMA teacher are given; it is then kept without ASiT's own losses too.
    """

    needs_teacher: ClassVar[bool] = False

    def __init__(self, width: int, grid: tuple[int, int], patch: tuple[int, int]) -> None:
        super().__init__()
        self.width, self.grid, self.patch = width, grid, patch

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter, as `init_transformer` does; override it to draw in another way, and buffers."""
        init_transformer(self, generator)

    @abstractmethod
    def forward(
        self, student: Tokens, teacher: Tokens | None, batch: PretrainBatch, generator: torch.Generator
    ) -> Tensor:
        """Return the loss of a micro-batch.

        Args:
            student: of the M * R corrupted views; with `masking.keep` below 1 of the patches `batch.keep` alone.
            teacher: of the R clean views, without gradient; None unless `needs_teacher`.
            batch: the views and their masks.
            generator: on the device, seeded by (seed, step, process, pass); the only source of randomness.

        Returns:
            A scalar, the mean over the micro-batch.
        """


def drawn_mask(
    mask: Mask, rng: np.random.Generator, shape: tuple[int, int], patch: tuple[int, int], donors: bool
) -> ViewMask:
    """Draw the mask of one view of `shape` (T, F); without donors, what would be replaced is wiped.

    Raises:
        ConfigError: the class raised an error, or gave something else than a mask of this shape.
    """
    found: Any = custom_classes.call("custom.mask", mask.draw, rng, *shape, patch)
    if not isinstance(found, ViewMask):
        found = ViewMask(found, np.zeros(shape, dtype=bool))
    for part in (found.drop, found.replace):
        if not (isinstance(part, np.ndarray) and part.dtype == bool and part.shape == shape):
            raise ConfigError(
                f"custom.mask: {type(mask).__name__}.draw returned {_described(part)}",
                f"a bool array of shape {shape} (frames, mels), or a ViewMask of two",
                "return such a mask",
            )
    return found if donors else ViewMask(found.any, np.zeros(shape, dtype=bool))


def changed_view(change: ViewChange, rng: np.random.Generator, view: Tensor) -> Tensor:
    """Return a view (T, F), changed.

    Raises:
        ConfigError: the class raised an error, or gave an array of another shape.
    """
    found: Any = custom_classes.call("custom.view", change.change, rng, view.numpy().copy())
    if not (isinstance(found, np.ndarray) and found.shape == tuple(view.shape) and found.dtype.kind == "f"):
        raise ConfigError(
            f"custom.view: {type(change).__name__}.change returned {_described(found)}",
            f"a float array of shape {tuple(view.shape)} (frames, mels)",
            "return the view in its own shape",
        )
    return torch.from_numpy(np.ascontiguousarray(found, dtype=np.float32))


def checked_loss(objective: Objective, found: Any) -> Tensor:
    """Return what an objective gave.

    Raises:
        ConfigError: it is no scalar, or has no gradient.
    """
    if isinstance(found, Tensor) and found.ndim == 0 and found.requires_grad:
        return found
    what = _described(found)
    if isinstance(found, Tensor) and found.ndim == 0:
        what = "a scalar without a gradient"
    raise ConfigError(
        f"custom.objective: {type(objective).__name__}.forward returned {what}",
        "a scalar tensor computed from the student's tokens",
        "return the mean over the micro-batch",
    )


def _described(found: Any) -> str:
    shape, kind = getattr(found, "shape", None), getattr(found, "dtype", None)
    return f"a {type(found).__name__}" if shape is None else f"{kind} of shape {tuple(shape)}"
