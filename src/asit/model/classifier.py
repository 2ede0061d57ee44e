"""Classifier: encoder, pooling, and AST's head of LayerNorm and Linear (arXiv 2104.01778).

The pooling is the class token, the mean of the patch tokens (SSAST, arXiv 2110.09784), or both concatenated; heads that
are fitted on frozen features (`asit.evaluate.saved_probe`) also have the standard deviation of the patch tokens.
Letters: R rows, T frames, F mel bins, P patches, D width, k blocks, C classes.
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

Pooling = Literal["class", "mean", "class+mean", "mean+std", "class+mean+std"]
"""Vector of a clip: class token, mean and population standard deviation of the patch tokens, concatenated."""


@dataclass(frozen=True)
class Labelling:
    """Meaning of a classifier's outputs, stored in the model card.

    Attributes:
        classes: names of the C outputs.
        multi: whether a clip may have several: scores are sigmoids, else a softmax.
        pooling: what the head reads.
        seconds: length of the training input.
        norm_eps: epsilon of the head's LayerNorm: 1e-6 in asit, 1e-5 in AST, 1e-12 in Hugging Face's AST.
        layers: blocks whose outputs the head reads, 0 the first, each token their concatenation; none: the last.

    Raises:
        ConfigError: no or duplicate classes, unknown pooling, or a length or epsilon that is not positive.
    """

    classes: tuple[str, ...]
    multi: bool
    pooling: Pooling
    seconds: float
    norm_eps: float = 1e-6
    layers: tuple[int, ...] = ()

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
        if any(not isinstance(layer, int) or layer < 0 for layer in self.layers):
            raise ConfigError(f"layers {self.layers}", "indices of blocks, 0 the first")


class Head(nn.Module):
    """Pooling, LayerNorm, dropout and Linear: tokens to logits, always in float32.

    Args:
        width: D.
        classes: C.
        pooling: norm and linear layer are as wide as the vectors that it names.
        dropout: probability in training; the factors are drawn by `draw_dropout`.
        norm: whether there is a LayerNorm.
        norm_eps: its epsilon.
        layers: see `Labelling`.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        pooling: Pooling = "class",
        dropout: float = 0.0,
        norm: bool = True,
        norm_eps: float = 1e-6,
        layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self.classes = classes
        self.dropout = dropout
        self.layers = layers
        self.features = features_of(width, pooling, layers)
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
        """Pool tokens to (R, features) float32; mean and standard deviation are over `valid` (R, P) patches."""
        parts, patches = [tokens.cls.float()] * self.pooling.startswith("class"), tokens.patches.float()

        def mean_of(x: Tensor) -> Tensor:
            if valid is None:
                return x.mean(1)
            return torch.where(valid[..., None], x, 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

        if self.pooling != "class":
            parts.append(mean_of(patches))
        if self.pooling.endswith("std"):
            parts.append(mean_of((patches - parts[-1].unsqueeze(1)).square()).sqrt())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def tokens(self, encoder: Encoder, x: Tensor, drop: Tensor | None = None, valid: Tensor | None = None) -> Tokens:
        """Return the encoder's tokens of spectrograms (R, 1, T, F), of the blocks that the head reads."""
        found: Tokens = encoder(x, drop=drop, valid=valid, layer=self.layers or None)
        return found

    def forward(self, tokens: Tokens, valid: Tensor | None = None, dropout: Tensor | None = None) -> Tensor:
        """Return logits (R, C) float32.

        Args:
            tokens: of the encoder, see `tokens`.
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
        logits: Tensor = self.head(self.head.tokens(self.encoder, x, drop, valid), valid=valid, dropout=dropout)
        return logits


def features_of(width: int, pooling: Pooling, layers: tuple[int, ...] = ()) -> int:
    """Return how wide a head's pooled vector is."""
    return width * max(1, len(layers)) * (pooling.count("+") + 1)


def check_head(encoder: Encoder, head: Head) -> None:
    """Raise ConfigError if the head is for an encoder of another width."""
    if encoder.prefix == 0 and head.pooling.startswith("class"):
        raise ConfigError(
            f"pooling {head.pooling}, and {encoder.settings.family} has no class token",
            "the mean of the patch tokens",
            "pass --network.pooling mean",
        )
    encoder.block_indices(head.layers or None)
    expected = features_of(encoder.width, head.pooling, head.layers)
    if head.features != expected:
        raise ConfigError(
            f"a head of {head.features} features, an encoder of width {encoder.width}",
            f"{expected} features for pooling {head.pooling}",
            "build the head with the encoder's width",
        )
