"""The two heads of pretraining: projection to prototypes, and reconstruction of the spectrogram.

Letters: R rows, P patches, D width, K prototypes of the class token, K2 of patch tokens, T frames, F mel bins.
Sources: the projection of DINO (arXiv 2104.14294) and iBOT (arXiv 2111.07832), as used by ASiT (arXiv 2211.13189);
weight normalisation of arXiv 1602.07868.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asit.config import HeadSettings
from asit.model.cpu.bf16 import Linear, linear


class Prototypes(nn.Module):
    """Weight g v / |v| for each output of a linear layer without bias: (..., bottleneck) -> (..., K).

    `weight_v` (K, bottleneck) is trained; `weight_g` (K, 1) stays at 1 unless `train_norm`.
    """

    weight_g: Tensor

    def __init__(self, bottleneck: int, prototypes: int, train_norm: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck))
        if train_norm:
            self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        else:
            self.register_buffer("weight_g", torch.ones(prototypes, 1))

    def weight(self) -> Tensor:
        """Return the normalised weight (K, bottleneck), float32."""
        normed = F.normalize(self.weight_v, dim=1)
        return normed * self.weight_g if isinstance(self.weight_g, nn.Parameter) else normed


class ProjectionHead(nn.Module):
    """Tokens to logits over prototypes.

    Args:
        width: D.
        settings: widths, prototypes, whether the last layer is shared and whether its norm is trained.
    """

    def __init__(self, width: int, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        self.mlp = nn.Sequential(
            Linear(width, settings.hidden),
            nn.GELU(),
            Linear(settings.hidden, settings.hidden),
            nn.GELU(),
            Linear(settings.hidden, settings.bottleneck),
        )
        self.class_layer = Prototypes(settings.bottleneck, settings.class_prototypes, settings.train_norm)
        self.patch_layer = (
            self.class_layer
            if settings.share_prototypes
            else Prototypes(settings.bottleneck, settings.patch_prototypes, settings.train_norm)
        )
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters: truncated normal (0.02) for weights, zero biases, unit norms."""
        _init(self, generator)

    def embed(self, x: Tensor) -> Tensor:
        """Project (..., D) to the L2-normalised bottleneck (..., bottleneck)."""
        return F.normalize(self.mlp(x), dim=-1)

    def last_layers(self) -> list[nn.Parameter]:
        """Return the parameters after the bottleneck, each once: those that `freeze_last_layer` keeps fixed."""
        return list(dict.fromkeys(itertools.chain(self.class_layer.parameters(), self.patch_layer.parameters())))


class ReconstructionHead(nn.Module):
    """Patch tokens to a spectrogram: an MLP with GELU, then a transposed convolution of kernel = stride = patch.

    Args:
        width: D.
        settings: `reconstruction_hidden`, the MLP's widths; auto: D three times.
        patch: (frames, mel bins) of a patch.
    """

    def __init__(self, width: int, settings: HeadSettings, patch: tuple[int, int]) -> None:
        super().__init__()
        hidden = settings.reconstruction_hidden
        widths = [width, *((width,) * 3 if hidden == "auto" else hidden)]
        self.patch = patch
        layers: list[nn.Module] = []
        for i, o in itertools.pairwise(widths):
            layers += [Linear(i, o), nn.GELU()]
        self.mlp = nn.Sequential(*layers)
        # Patches do not overlap, so the transposed convolution is a linear layer onto the patch's area; one output
        # channel, so its bias is one number.
        self.weight = nn.Parameter(torch.empty(widths[-1], 1, *patch))
        self.bias = nn.Parameter(torch.empty(1))
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters: truncated normal (0.02) for weights, zero biases."""
        _init(self, generator)

    def areas(self, patches: Tensor) -> Tensor:
        """Tokens to the areas of their patches: (..., D) -> (..., height * breadth)."""
        # Biases are added by broadcasting onto the patch's area, as the transposed convolution adds its one.
        return linear(self.mlp(patches), self.weight.flatten(1).t(), self.bias.expand(self.patch[0] * self.patch[1]))

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(R, P, D) and the grid (time, mel) -> (R, 1, T, F)."""
        (time, mel), (height, breadth) = grid, self.patch
        out = self.areas(patches).view(-1, time, mel, height, breadth).transpose(2, 3)
        return out.reshape(-1, 1, time * height, mel * breadth)


@torch.no_grad()
def _init(head: nn.Module, generator: torch.Generator | None) -> None:
    for name, parameter in head.named_parameters():
        if name.endswith("weight_g"):
            parameter.fill_(1.0)
        elif parameter.ndim == 1:
            parameter.zero_()
        else:
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
