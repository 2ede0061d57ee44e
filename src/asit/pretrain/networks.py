"""The networks of ASiT: encoder and heads, for the student and for the teacher.

Source: arXiv 2211.13189. Letters: B clips, V global views, L local views, R rows of global views (V * B, or so many of
each masked copy), P patches, K prototypes, D width, T frames, F mel bins.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from asit.config import PretrainSettings, custom_classes
from asit.errors import ConfigError
from asit.model.blocks import Block, init_transformer
from asit.model.encoders import new_encoder
from asit.model.vit import Encoder, Tokens
from asit.pretrain import custom
from asit.pretrain.chunked_loss import Projected
from asit.pretrain.heads import ProjectionHead, ReconstructionHead

if TYPE_CHECKING:
    from asit.pretrain.pretrain_dataset import PretrainBatch


class Decoder(nn.Module):
    """Fills the grid again from the K seen patches: a learned mask token at the others, positions, blocks and a norm.

    Source: masked autoencoders (arXiv 2111.06377), whose decoder also gets the class token; here it is as wide as the
    encoder, so that nothing has to be projected.

    Args:
        width: D.
        heads: of attention.
        hidden: of the MLPs.
        depth: blocks.
        patches: P.
        eps: of the norms.
    """

    def __init__(self, width: int, heads: int, hidden: int, depth: int, patches: int, eps: float) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, patches, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.init_weights()

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise all parameters: see `blocks.init_transformer`."""
        init_transformer(self, generator)

    def forward(self, cls: Tensor, seen: Tensor, keep: Tensor) -> Tensor:
        """Turn class token (R, D), seen patches (R, K, D) and their positions (R, K) int64 into (R, P, D)."""
        rows, _, width = seen.shape
        empty = self.mask_token.to(seen.dtype).expand(rows, self.pos_embed.shape[1], width)
        grid = empty.scatter(1, keep[..., None].expand(-1, -1, width), seen)
        tokens = torch.cat([cls[:, None], grid + self.pos_embed], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        # The class token served the patches; its own output is not used.
        out: Tensor = self.norm(tokens[:, 1:])
        return out


class Outputs(NamedTuple):
    """Outputs of the networks; a part that no loss needs is None."""

    class_logits: Tensor | None
    """(R, K)."""
    patches: Projected | None
    """Patch tokens before the last layer, (R * P, bottleneck) or (R * S, bottleneck) of the chosen ones, and the layer:
    the loss computes their logits in chunks. The weight is an output so that wrappers of the networks (DDP) see its
    gradient."""
    reconstruction: Tensor | None
    """(R, 1, T, F), or the area of each chosen patch, (n, height * breadth)."""
    local_class_logits: Tensor | None
    """(L * B, K)."""
    class_token: Tensor
    """(R, D)."""
    custom: Tensor | None = None
    """Loss of the objective of one's own."""
    tokens: Tokens | None = None
    """Of the global views, where such an objective needs the teacher's."""


class Networks(nn.Module):
    """Encoder and the heads that the losses need: the student, and, without reconstruction, the teacher.

    Heads of a loss whose weight is 0 are not built.
    """

    def __init__(self, settings: PretrainSettings, frames: int, *, reconstruct: bool) -> None:
        super().__init__()
        weights = settings.losses
        if ":" in settings.encoder.family:
            custom_classes.find(settings.encoder.family, Encoder, "encoder.family")  # imports its module
        self.encoder = new_encoder(settings.encoder, frames, settings.front_end.mels)
        if self.encoder.prefix == 0:
            raise ConfigError(
                f"an encoder of family {settings.encoder.family}, which has no class token",
                "a class token, whose agreement between views ASiT trains",
                "pretrain another encoder; this one can be fine-tuned (asit finetune)",
            )
        self.projection: ProjectionHead | None = None
        self.reconstruction: ReconstructionHead | None = None
        self.wants_class, self.wants_patch = weights.global_weight > 0, weights.local_weight > 0
        if self.wants_class or self.wants_patch:
            self.projection = ProjectionHead(self.encoder.width, settings.heads)
            if not settings.heads.share_prototypes:
                # A layer that no loss reaches would have no gradient, which several processes cannot average.
                if not self.wants_class:
                    self.projection.class_layer = self.projection.patch_layer
                elif not self.wants_patch:
                    self.projection.patch_layer = self.projection.class_layer
        self.objective: custom.Objective | None = None
        self.gives_tokens = False
        if settings.custom.objective:
            made = custom_classes.find(settings.custom.objective, custom.Objective, "custom.objective")  # type: ignore[type-abstract]
            objective = made(self.encoder.width, self.encoder.grid, self.encoder.patch)
            self.objective = objective if reconstruct else None
            self.gives_tokens = objective.needs_teacher and not reconstruct
        self.decoder: Decoder | None = None
        if reconstruct and weights.reconstruction_weight > 0:
            self.reconstruction = ReconstructionHead(self.encoder.width, settings.heads, self.encoder.patch)
        if reconstruct and settings.masking.keep < 1.0 and (self.wants_patch or self.reconstruction is not None):
            hidden = round(self.encoder.width * settings.encoder.mlp_ratio)
            shape = (self.encoder.width, self.encoder.heads, hidden, settings.masking.decoder_depth)
            self.decoder = Decoder(*shape, math.prod(self.encoder.grid), settings.encoder.norm_eps)

    def forward(
        self,
        x: Tensor,
        local: Tensor | None = None,
        drop: Tensor | None = None,
        keep: Tensor | None = None,
        chosen: Tensor | None = None,
        rebuilt: Tensor | None = None,
        given: tuple[Tokens | None, PretrainBatch, torch.Generator] | None = None,
    ) -> Outputs:
        """Return what the losses need of the views.

        Args:
            x: (R, 1, T, F), global views.
            local: (L * B, 1, T', F), local views.
            drop: (depth, 2, R + L * B), factors of stochastic depth.
            keep: (R, K) int64, patches that the encoder sees; the decoder fills in the others. None: all.
            chosen: (R, S) int64, patches that are projected; None: all.
            rebuilt: (n,) int64, patches among R * P that are reconstructed; None: all.
            given: what the objective of one's own takes besides the student's tokens.
        """
        rows = len(x)
        tokens = self.encoder(x, None if drop is None else drop[:, :, :rows], keep=keep)
        patches = (
            tokens.patches if keep is None or self.decoder is None else self.decoder(tokens.cls, tokens.patches, keep)
        )
        class_logits = projected = local_logits = reconstruction = None
        if self.projection is not None:
            kinds = [tokens.cls] if self.wants_class else []
            if self.wants_patch:
                width = patches.shape[-1]
                wanted = patches if chosen is None else patches.gather(1, chosen[..., None].expand(-1, -1, width))
                kinds.append(wanted.flatten(0, 1))
            if self.wants_class and local is not None:
                kinds.append(self.encoder(local, None if drop is None else drop[:, :, rows:]).cls)
            # One pass of the projection over all tokens: its matrices are read once.
            z = list(self.projection.embed(torch.cat(kinds)).split([len(k) for k in kinds]))
            if self.wants_class:
                class_weight = self.projection.class_layer.weight()
                class_logits = nn.functional.linear(z.pop(0), class_weight)
            if self.wants_patch:
                layer = self.projection.patch_layer
                shared = self.wants_class and layer is self.projection.class_layer
                projected = Projected(z.pop(0), class_weight if shared else layer.weight())
            if z:
                local_logits = nn.functional.linear(z.pop(0), class_weight)
        if self.reconstruction is not None:
            if rebuilt is None:
                reconstruction = self.reconstruction(patches, tokens.grid)
            else:
                reconstruction = self.reconstruction.areas(patches.flatten(0, 1).index_select(0, rebuilt))
        own = None
        if self.objective is not None and given is not None:
            own = custom.checked_loss(self.objective, self.objective(tokens, *given))
        kept = tokens if self.gives_tokens else None
        return Outputs(class_logits, projected, reconstruction, local_logits, tokens.cls, own, kept)
