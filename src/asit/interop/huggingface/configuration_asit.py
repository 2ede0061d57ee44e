"""Configuration of an ASiT encoder or classifier for Hugging Face's transformers.

This file is copied into exported folders and depends on transformers alone.
Letters: T frames, F mel bins, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig


class ASiTConfig(PretrainedConfig):
    """A vision transformer over log-mel patches (ASiT, arXiv 2211.13189).

    Args:
        hidden_size: D.
        num_hidden_layers: blocks.
        num_attention_heads: of each block; they divide D.
        mlp_ratio: hidden width of the MLP over D.
        layer_norm_eps: epsilon of the norms.
        num_mel_bins: F.
        num_frames: T of the training view in frames; fixes the grid of the position embeddings.
        patch_size: (frames, mel bins) of a patch.
        patch_stride: (frames, mel bins); less than the patch if patches overlap.
        distilled: whether a distillation token follows the class token, as in DeiT and AST.
        pooling: "class" (the class token, or the mean of both if distilled), "mean" (of the patch tokens),
            "class+mean", "mean+std" (population standard deviation of the patch tokens) or "class+mean+std".
        pooling_layers: blocks whose normalised outputs are concatenated before pooling, 0 the first; none: the last.
        classifier_norm: a LayerNorm before the classifier's linear layer.
        classifier_norm_eps: its epsilon.
        classifier_dropout: dropout probability before the linear layer.
        drop_path_rate: stochastic depth in training, linear from 0 over the blocks.
        initializer_range: standard deviation of initial weights.
        input_seconds: length of a classifier's training input; None for an encoder.
        training: facts of the training from asit's model card.
        kwargs: of PretrainedConfig, such as id2label and problem_type.

    Raises:
        ValueError: unknown pooling.
    """

    model_type = "asit"
    _auto_class = "AutoConfig"  # save_pretrained copies this file

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        layer_norm_eps: float = 1e-6,
        num_mel_bins: int = 128,
        num_frames: int = 592,
        patch_size: Sequence[int] = (16, 16),
        patch_stride: Sequence[int] = (16, 16),
        distilled: bool = False,
        pooling: str = "mean",
        classifier_norm: bool = True,
        classifier_norm_eps: float = 1e-6,
        classifier_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        input_seconds: float | None = None,
        training: dict[str, Any] | None = None,
        pooling_layers: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        known = ("class", "mean", "class+mean", "mean+std", "class+mean+std")
        if pooling not in known:
            raise ValueError(f"pooling is {pooling!r}; it can be one of {', '.join(known)}")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mlp_ratio = mlp_ratio
        self.layer_norm_eps = layer_norm_eps
        self.num_mel_bins = num_mel_bins
        self.num_frames = num_frames
        self.patch_size = list(patch_size)
        self.patch_stride = list(patch_stride)
        self.distilled = distilled
        self.pooling = pooling
        self.classifier_norm = classifier_norm
        self.classifier_norm_eps = classifier_norm_eps
        self.classifier_dropout = classifier_dropout
        self.drop_path_rate = drop_path_rate
        self.initializer_range = initializer_range
        self.input_seconds = input_seconds
        self.training = dict(training or {})
        self.pooling_layers = list(pooling_layers)
        super().__init__(**kwargs)


__all__ = ["ASiTConfig"]
