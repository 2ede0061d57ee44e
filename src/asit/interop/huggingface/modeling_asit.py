"""ASiT's encoder and classifier for Hugging Face's transformers.

This file is copied into exported folders and depends on transformers and torch, not on asit. Parameters are named as in
timm; a classifier's are "encoder.*" and "head.*".

Letters: B clips, T frames, F mel bins, P patches, D width, N tokens (class, distillation if any, patches), H heads,
C classes. Patches are time-major: all mel patches of a time column, then the next column.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from .configuration_asit import ASiTConfig

_WINDOWS = 16
"""Windows of long clips per forward pass without gradients."""


class ASiTAttention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D) and, on request, its weights (B, H, N, N)."""

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attended: Tensor | None = None
        if weights or self.config._attn_implementation == "eager":
            products = q @ k.transpose(2, 3) * (width // self.heads) ** -0.5
            if mask is not None:
                products = products.masked_fill(~mask, float("-inf"))
            attended = products.softmax(3, dtype=torch.float32).to(v.dtype)
            out = attended @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(rows, tokens, width)), attended


class ASiTMLP(nn.Module):
    """Linear, GELU, linear: (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__()
        hidden = round(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden)
        self.fc2 = nn.Linear(hidden, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class ASiTBlock(nn.Module):
    """Pre-norm transformer block with stochastic depth (arXiv 1603.09382) in training."""

    def __init__(self, config: ASiTConfig, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = ASiTAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ASiTMLP(config)
        self.drop = drop

    def forward(self, x: Tensor, mask: Tensor | None, weights: bool) -> tuple[Tensor, Tensor | None]:
        out, attended = self.attn(self.norm1(x), mask, weights)
        x = x + self._drop_path(out)
        return x + self._drop_path(self.mlp(self.norm2(x))), attended

    def _drop_path(self, branch: Tensor) -> Tensor:
        """Apply stochastic depth to a branch."""
        if not self.training or self.drop == 0.0:
            return branch
        return branch * F.dropout(branch.new_ones(len(branch), 1, 1), self.drop)


class ASiTPatchEmbeddings(nn.Module):
    """Patch embedding: (B, T, F) -> (B, P, D); patches that are not `valid` (B, P) are not read."""

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__()
        (height, breadth), (down, along) = config.patch_size, config.patch_stride
        self.proj = nn.Conv2d(1, config.hidden_size, kernel_size=(height, breadth), stride=(down, along))

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        (height, breadth), (down, along) = self.proj.kernel_size, self.proj.stride
        cut = x.unfold(1, height, down).unfold(2, breadth, along).reshape(len(x), -1, height * breadth)
        if valid is not None:
            cut = torch.where(valid[..., None], cut, 0.0)
        return F.linear(cut.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class ASiTPreTrainedModel(PreTrainedModel):
    """Configuration and initialisation shared by encoder and classifier."""

    config: ASiTConfig
    config_class = ASiTConfig
    base_model_prefix = "encoder"
    main_input_name = "input_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ASiTBlock"]  # noqa: RUF012 (transformers declares it so)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise: truncated normal for weights and embeddings, zero biases, unit norms."""
        std = self.config.initializer_range
        drawn = [getattr(module, name, None) for name in ("cls_token", "dist_token", "pos_embed")]
        if isinstance(module, nn.Linear | nn.Conv2d):
            drawn.append(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        for parameter in drawn:
            if isinstance(parameter, nn.Parameter):
                nn.init.trunc_normal_(parameter, std=std, generator=None)


class ASiTModel(ASiTPreTrainedModel):
    """The encoder: normalised log-mel (B, T, F) to tokens.

    `last_hidden_state` (B, N, D) holds the class token, the distillation token if any, then the patches; those
    outside the mask are 0. `pooler_output` (B, features) is what `pool` returns.
    """

    _auto_class = "AutoModel"  # save_pretrained copies this file

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__(config)
        width, (height, breadth), (down, along) = config.hidden_size, config.patch_size, config.patch_stride
        self.prefix = 2 if config.distilled else 1
        self.grid = (config.num_frames - height) // down + 1, (config.num_mel_bins - breadth) // along + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], width))
        self.patch_embed = ASiTPatchEmbeddings(config)
        last = max(1, config.num_hidden_layers - 1)
        self.blocks = nn.ModuleList(
            ASiTBlock(config, config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.patch_embed

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Encode spectrograms.

        Args:
            input_values: (B, T, F) from the feature extractor. A clip shorter than the training view uses the positions
                of the view's first columns, a longer one all of them, resized bicubically.
            attention_mask: (B, T), 1 for frames of the clip; a patch is valid if all of its frames are.
            output_attentions: return each block's weights (B, H, N, N).
            output_hidden_states: return the tokens (B, N, D) before the first and after each block, without the last
                norm.
            return_dict: False: return a tuple.

        Raises:
            ValueError: an input or mask of another shape, or a T that does not fit the patches.
        """
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        grid = self._grid_of(input_values)
        valid = self._valid(attention_mask, input_values, grid)
        positions = self._positions(grid, valid)
        patches = self.patch_embed(input_values, valid) + positions[:, self.prefix :]
        first = torch.cat([self.cls_token, self.dist_token], dim=1) if self.prefix == 2 else self.cls_token
        first = (first + positions[:, : self.prefix]).expand(len(patches), -1, -1)
        x = torch.cat([first, patches], dim=1)
        mask = None if valid is None else F.pad(valid, (self.prefix, 0), value=True)[:, None, None, :]
        states, weights = [x], []
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x, attended = self._gradient_checkpointing_func(block.__call__, x, mask, bool(attentions))
            else:
                x, attended = block(x, mask, bool(attentions))
            states.append(x)
            weights.append(attended)
        x = self._finished(x, valid)
        read = [self._finished(states[layer + 1], valid) for layer in config.pooling_layers] or [x]
        out = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pool(torch.cat(read, dim=2), valid),
            hidden_states=tuple(states) if hidden else None,
            attentions=tuple(weights) if attentions else None,
        )
        return out if _as_dict(config, return_dict) else out.to_tuple()

    def _finished(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Return tokens (B, N, D) after the last norm; those outside the mask are 0."""
        x = self.norm(x)
        return x if valid is None else torch.where(F.pad(valid, (self.prefix, 0), value=True)[..., None], x, 0.0)

    def pool(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Pool tokens (B, N, D) to one vector per clip; `valid` (B, P): patches in the mean."""
        pooling, patches = self.config.pooling, tokens[:, self.prefix :]
        parts = [tokens[:, : self.prefix].mean(1)] * pooling.startswith("class")

        def mean_of(x: Tensor) -> Tensor:
            if valid is None:
                return x.mean(1)
            return torch.where(valid[..., None], x, 0.0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)

        if pooling != "class":
            parts.append(mean_of(patches))
        if pooling.endswith("std"):
            parts.append(mean_of((patches - parts[-1].unsqueeze(1)).square()).sqrt())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _grid_of(self, x: Tensor) -> tuple[int, int]:
        """Return the (time, mel) grid of patches of an input."""
        (height, _), (down, _) = self.config.patch_size, self.config.patch_stride
        if x.ndim != 3 or x.shape[2] != self.config.num_mel_bins:
            raise ValueError(
                f"input_values has shape {tuple(x.shape)}; (clips, frames, {self.config.num_mel_bins} mel bins) is "
                "expected, as the feature extractor returns it"
            )
        if x.shape[1] < height or (x.shape[1] - height) % down:
            below = max(0, x.shape[1] - height) // down * down + height
            raise ValueError(
                f"input_values has {x.shape[1]} frames; patches of {height} every {down} need {below} or {below + down}"
            )
        return (x.shape[1] - height) // down + 1, self.grid[1]

    def _valid(self, frames: Tensor | None, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Return the valid patches (B, P); None: all."""
        if frames is None:
            return None
        if frames.shape != x.shape[:2]:
            raise ValueError(f"attention_mask has shape {tuple(frames.shape)}; {tuple(x.shape[:2])} is expected")
        if not torch.compiler.is_compiling() and bool(frames.all()):
            return None
        (height, _), (down, _) = self.config.patch_size, self.config.patch_stride
        return frames.bool().unfold(1, height, down).all(2).repeat_interleave(grid[1], dim=1)

    def _positions(self, grid: tuple[int, int], valid: Tensor | None) -> Tensor:
        """Return the position embeddings of a batch: (1, N, D), or (B, N, D) if clips need different ones."""
        if valid is None or grid[0] <= self.grid[0] or torch.compiler.is_compiling():
            return self._positions_of(grid[0])
        # They depend on each clip's own length, so that its tokens do not depend on the batch.
        columns = valid.view(-1, *grid).any(2).sum(1).clamp(min=1).tolist()
        count = self.prefix + grid[0] * grid[1]
        found = {own: self._positions_of(own) for own in set(columns)}
        filled = {own: F.pad(one, (0, 0, 0, count - one.shape[1])) for own, one in found.items()}
        return torch.cat([filled[own] for own in columns])

    def _positions_of(self, columns: int) -> Tensor:
        """Return the position embeddings for `columns`, (1, prefix + patches, D)."""
        if columns <= self.grid[0]:
            return self.pos_embed[:, : self.prefix + columns * self.grid[1]]
        own = self.pos_embed[:, self.prefix :].float().unflatten(1, self.grid).permute(0, 3, 1, 2)
        moved = F.interpolate(own, size=(columns, self.grid[1]), mode="bicubic", align_corners=False)
        moved = moved.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        return torch.cat([self.pos_embed[:, : self.prefix], moved], dim=1)


class ASiTClassificationHead(nn.Module):
    """Pooled tokens to logits: LayerNorm if configured, dropout, linear."""

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__()
        assert config.num_labels is not None, "transformers sets it, to 2 by default"
        features = config.hidden_size * max(1, len(config.pooling_layers)) * (config.pooling.count("+") + 1)
        self.norm = nn.LayerNorm(features, eps=config.classifier_norm_eps) if config.classifier_norm else None
        self.linear = nn.Linear(features, config.num_labels)
        self.dropout = config.classifier_dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        out: Tensor = self.linear(F.dropout(x, self.dropout, self.training))
        return out


class ASiTForAudioClassification(ASiTPreTrainedModel):
    """Encoder, pooling and classification head."""

    _auto_class = "AutoModelForAudioClassification"

    def __init__(self, config: ASiTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.encoder = ASiTModel(config)
        self.head = ASiTClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Return logits (B, C).

        An input longer than the training view is split into consecutive windows, the last of which ends with the input;
        windows without a frame of the clip are skipped. The logits are then those of the mean score of the windows, so
        that softmax or sigmoid return this mean.

        Args:
            input_values: (B, T, F) from the feature extractor.
            attention_mask: (B, T), 1 for frames of the clip.
            labels: classes (B,), or targets (B, C) if `config.problem_type` is "multi_label_classification".
            output_attentions, output_hidden_states: see `ASiTModel.forward`; not for longer inputs.
            return_dict: False: return a tuple.

        Returns:
            `loss` if labels are given (cross-entropy, or binary cross-entropy for multi-label), `logits`, and the
            requested states.

        Raises:
            ValueError: as `ASiTModel.forward`, or hidden states or attentions of a longer input are requested.
        """
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states, weights = None, None
        if input_values.ndim == 3 and input_values.shape[1] > config.num_frames:
            if attentions or hidden:
                raise ValueError(
                    f"the input has {input_values.shape[1]} frames, more than the {config.num_frames} of training: its "
                    "windows are scored separately; pass one window to get its hidden states or attentions"
                )
            logits = self._windows(input_values, attention_mask)
        else:
            found = self.encoder(input_values, attention_mask, attentions, hidden, return_dict=True)
            states, weights = found.hidden_states, found.attentions
            logits = self.head(found.pooler_output)
        loss = None if labels is None else self._loss(logits, labels)
        out = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states, attentions=weights)
        return out if _as_dict(config, return_dict) else out.to_tuple()

    def _windows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits of the mean score of the windows, (B, C) float32."""
        view, clips, frames = self.config.num_frames, *x.shape[:2]
        starts = [*range(0, frames - view, view), frames - view]
        rows = _split_windows(x, starts, view)
        mask = torch.ones(clips, frames, device=x.device) if mask is None else mask
        frames_of = _split_windows(mask, starts, view)
        picked = frames_of.bool().any(1).nonzero().flatten()
        some = picked.split(len(picked) if torch.is_grad_enabled() else _WINDOWS)
        pooled = [self.encoder(rows[part], frames_of[part], return_dict=True).pooler_output for part in some]
        logits = self.head(torch.cat(pooled)).float()
        multi = self.config.problem_type == "multi_label_classification"
        scores = logits.sigmoid() if multi else logits.softmax(1)
        owner = torch.arange(clips, device=x.device).repeat_interleave(len(starts))[picked]
        count = torch.zeros(clips, 1, device=x.device).index_add(0, owner, torch.ones(len(owner), 1, device=x.device))
        mean = torch.zeros(clips, logits.shape[1], device=x.device).index_add(0, owner, scores) / count.clamp(min=1.0)
        mean = mean.clamp(torch.finfo(torch.float32).tiny, 1.0)
        return mean.log() - (-mean).log1p().clamp(min=-30.0) if multi else mean.log()

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind == "regression":
            raise ValueError("problem_type is 'regression'; an ASiT classifier has single or multiple labels")
        if kind is None:
            kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


def _split_windows(x: Tensor, starts: list[int], size: int) -> Tensor:
    """Return the windows of each clip (B, T, ...) along time as (B W, size, ...)."""
    return torch.stack([x[:, start : start + size] for start in starts], dim=1).flatten(0, 1)


def _as_dict(config: ASiTConfig, requested: bool | None) -> bool:
    chosen: bool | None = config.return_dict if requested is None else requested
    return chosen is not False


__all__ = ["ASiTForAudioClassification", "ASiTModel", "ASiTPreTrainedModel"]
