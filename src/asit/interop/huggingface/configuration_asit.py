"""Settings of an ASiT encoder and its classifier, as Hugging Face's transformers holds them.

This file travels with exported models and stands alone: it needs transformers, and neither asit nor anything else.
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
        num_attention_heads: heads of each; they divide D evenly.
        mlp_ratio: hidden width of the MLP over D.
        layer_norm_eps: epsilon of the blocks' norms and of the last one.
        num_mel_bins: F.
        num_frames: T of the training view in frames; fixes the grid of the position embeddings.
        patch_size: (frames, mel bins) of a patch.
        patch_stride: from patch to patch; less than the patch where patches overlap.
        distilled: a distillation token follows the class token, as in DeiT and AST.
        pooling: what stands for a clip: "class" (the class token; the mean of both where distilled), "mean" (of the
            patch tokens) or "class+mean" (one after the other).
        classifier_norm: a LayerNorm before the classifier's linear layer.
        classifier_norm_eps: its epsilon.
        classifier_dropout: probability that a feature before it is left out in training.
        drop_path_rate: stochastic depth in training, linear from 0 over the blocks.
        initializer_range: standard deviation of fresh weights.
        input_seconds: length of a classifier's input in training, in seconds; None: an encoder's.
        training: facts of the training, as asit's model card has them.
        kwargs: what every configuration has, such as id2label and problem_type.

    Raises:
        ValueError: no such pooling.
    """

    model_type = "asit"
    _auto_class = "AutoConfig"  # save_pretrained then carries this file along

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
        **kwargs: Any,
    ) -> None:
        if pooling not in ("class", "mean", "class+mean"):
            raise ValueError(f"pooling is {pooling!r}; it can be 'class', 'mean' or 'class+mean'")
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
        super().__init__(**kwargs)


__all__ = ["ASiTConfig"]
