"""Classifier: encoder, pooling, and AST's head of LayerNorm and Linear (arXiv 2104.01778).

The pooling is the class token, the mean of the patch tokens (SSAST, arXiv 2110.09784), or both concatenated.
Letters: R rows, T frames, F mel bins, P patches, D width, C classes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asit.errors import ConfigError
from asit.model.vit import Encoder, Tokens

Pooling = Literal["class", "mean", "class+mean"]
"""Vector of a clip: the class token, the mean of its patch tokens, or both concatenated."""


@dataclass(frozen=True)
class Labelling:
    """Meaning of a classifier's outputs, stored in the model card.

    Attributes:
        classes: names of the C outputs.
        multi: whether a clip may have several: scores are sigmoids, else a softmax.
        pooling: what the head reads.
        seconds: length of the training input.
        norm_eps: epsilon of the head's LayerNorm: 1e-6 in asit, 1e-5 in AST, 1e-12 in Hugging Face's AST.

    Raises:
        ConfigError: no or duplicate classes, unknown pooling, or a length or epsilon that is not positive.
    """

    classes: tuple[str, ...]
    multi: bool
    pooling: Pooling
    seconds: float
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(self.classes).items() if count > 1]
        if not self.classes or twice:
            named = f": {', '.join(map(repr, twice[:3]))} more than once" if twice else ""
            raise ConfigError(f"{len(self.classes)} classes{named}", "at least one class, each named once")
        if self.pooling not in get_args(Pooling):
            raise ConfigError(f"pooling {self.pooling!r}", f"one of {', '.join(get_args(Pooling))}")
        if not 0 < self.seconds < float("inf"):
            raise ConfigError(f"an input of {self.seconds} seconds", "a positive length")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(f"a norm's epsilon of {self.norm_eps}", "a small positive number, such as 1e-6")


class Head(nn.Module):
    """Pooling, LayerNorm, dropout and Linear: tokens to logits, always in float32.

    Args:
        width: D.
        classes: C.
        pooling: "class+mean" doubles the width of norm and linear layer.
        dropout: probability in training; the factors are drawn by `draw_dropout`.
        norm: whether there is a LayerNorm.
        norm_eps: its epsilon.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        pooling: Pooling = "class",
        dropout: float = 0.0,
        norm: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.classes = classes
        self.dropout = dropout
        self.features = 2 * width if pooling == "class+mean" else width
        self.norm = nn.LayerNorm(self.features, eps=norm_eps) if norm else None
        self.linear = nn.Linear(self.features, classes)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter: truncated normal (0.02) for the weight, zero biases, unit norm."""
        nn.init.trunc_normal_(self.linear.weight, std=0.02, generator=generator)
        self.linear.bias.zero_()
        if self.norm is not None:
            self.norm.weight.fill_(1.0)
            self.norm.bias.zero_()

    def pool(self, tokens: Tokens, valid: Tensor | None = None) -> Tensor:
        """Pool tokens to (R, D), or (R, 2 D) for "class+mean", float32; the mean is over `valid` (R, P) patches."""
        if self.pooling == "class":
            return tokens.cls.float()
        patches = tokens.patches.float()
        if valid is None:
            mean = patches.mean(1)
        else:
            mean = torch.where(valid[..., None], patches, 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        return mean if self.pooling == "mean" else torch.cat([tokens.cls.float(), mean], dim=1)

    def forward(self, tokens: Tokens, valid: Tensor | None = None, dropout: Tensor | None = None) -> Tensor:
        """Return logits (R, C) float32.

        Args:
            tokens: of the encoder.
            valid: (R, P) bool, patches in the mean.
            dropout: (R, features) factors from `draw_dropout`; required in training if dropout is not 0.
        """
        if dropout is None and self.training and self.dropout > 0:
            raise ValueError(f"a head with dropout {self.dropout} in training needs factors from draw_dropout")
        with torch.autocast(tokens.cls.device.type, enabled=False):
            x = self.pool(tokens, valid)
            if self.norm is not None:
                x = self.norm(x)
            if dropout is not None:
                x = x * dropout
            logits: Tensor = self.linear(x)
        return logits


def draw_dropout(rng: np.random.Generator, head: Head) -> npt.NDArray[np.float32]:
    """Draw one row's dropout factors: (features,) float32, 0 or 1/(1 - p)."""
    keep = rng.random(head.features) >= head.dropout
    return (keep / (1.0 - head.dropout)).astype(np.float32)


class Classifier(nn.Module):
    """Encoder and head as one network for training, with parameters "encoder.*" and "head.*".

    Raises:
        ConfigError: the head is for another width.
    """

    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        check_head(encoder, head)
        self.encoder = encoder
        self.head = head

    def forward(
        self, x: Tensor, drop: Tensor | None = None, valid: Tensor | None = None, dropout: Tensor | None = None
    ) -> Tensor:
        """Return logits (R, C) float32 of spectrograms (R, 1, T, F); see `Encoder.forward` and `Head.forward`."""
        logits: Tensor = self.head(self.encoder(x, drop=drop, valid=valid), valid=valid, dropout=dropout)
        return logits


def check_head(encoder: Encoder, head: Head) -> None:
    """Raise ConfigError if the head is for an encoder of another width."""
    if encoder.prefix == 0 and head.pooling != "mean":
        raise ConfigError(
            f"pooling {head.pooling}, and {encoder.settings.family} has no class token",
            "the mean of the patch tokens",
            "pass --network.pooling mean",
        )
    expected = encoder.width * (2 if head.pooling == "class+mean" else 1)
    if head.features != expected:
        raise ConfigError(
            f"a head of {head.features} features, an encoder of width {encoder.width}",
            f"{expected} features for pooling {head.pooling}",
            "build the head with the encoder's width",
        )
