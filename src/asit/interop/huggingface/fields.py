"""Convert between the model card and transformers' config.json and preprocessor_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from asit.audio.fbank import FrontEnd
from asit.config import SIZES, EncoderSettings, FrontEndSettings
from asit.config.yaml import build
from asit.model.audio_model import AudioModel
from asit.model.card import check_front_end
from asit.model.classifier import Head, Labelling

MODEL_TYPE = "asit"
"""`model_type` in config.json."""

CODE = ("configuration_asit.py", "modeling_asit.py", "feature_extraction_asit.py")
"""Files copied into exported folders, to load them without asit."""

_AUTO = {
    "AutoConfig": "configuration_asit.ASiTConfig",
    "AutoFeatureExtractor": "feature_extraction_asit.ASiTFeatureExtractor",
    "AutoModel": "modeling_asit.ASiTModel",
    "AutoModelForAudioClassification": "modeling_asit.ASiTForAudioClassification",
}
_SAME = ("window_ms", "shift_ms", "low_hz", "high_hz", "preemphasis", "mean", "std", "resampler")
"""Front-end settings with the same name in preprocessor_config.json."""

_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*(?=[^\s/\\])")
"""Folders of an absolute path within a text."""
_ABSOLUTE = re.compile(r"(?:~\w*|[A-Za-z]:)?[/\\].*[^/\\]")
"""A text that starts with an absolute path."""


@dataclass(frozen=True)
class FolderSettings:
    """The content of both configurations as asit's settings; `norm`: whether a classifier's head has a LayerNorm."""

    encoder: EncoderSettings
    front_end: FrontEndSettings
    frames: int
    labels: Labelling | None
    norm: bool
    training: dict[str, Any]

    def head(self, width: int) -> Head | None:
        """Return a head for an encoder of this width; None without labels."""
        if self.labels is None:
            return None
        return Head(width, len(self.labels.classes), self.labels.pooling, norm=self.norm, norm_eps=self.labels.norm_eps)


def config_of(model: AudioModel) -> dict[str, Any]:
    """Return the content of config.json."""
    encoder, settings, labels = model.encoder, model.encoder.settings, model.labelling
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["ASiTModel" if labels is None else "ASiTForAudioClassification"],
        "auto_map": _AUTO,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "mlp_ratio": settings.mlp_ratio,
        "layer_norm_eps": settings.norm_eps,
        "num_mel_bins": encoder.mels,
        "num_frames": encoder.frames,
        "patch_size": list(encoder.patch),
        "patch_stride": list(encoder.stride),
        "distilled": settings.distilled,
        "drop_path_rate": settings.drop_path,
        "pooling": "mean" if labels is None else labels.pooling,
        "training": public(model.training),
    }
    if labels is None or model.head is None:
        return config
    # transformers refuses single_label_classification with one class, and uses a softmax if none is given.
    kind = "single_label_classification" if len(labels.classes) > 1 else None
    return {
        **config,
        "classifier_norm": model.head.norm is not None,
        "classifier_norm_eps": labels.norm_eps,
        "input_seconds": labels.seconds,
        "problem_type": "multi_label_classification" if labels.multi else kind,
        "id2label": {str(i): name for i, name in enumerate(labels.classes)},
        "label2id": {name: i for i, name in enumerate(labels.classes)},
    }


def public(facts: Any) -> Any:
    """Return facts of a card (JSON) with absolute paths reduced to their last part, for publication."""
    if isinstance(facts, dict):
        return {name: public(value) for name, value in facts.items()}
    if isinstance(facts, list):
        return [public(value) for value in facts]
    if not isinstance(facts, str):
        return facts
    if _ABSOLUTE.match(facts):  # folders may have spaces in their names
        return re.split(r"[/\\]", facts.rstrip("/\\"))[-1]
    return _FOLDERS.sub("", facts)


def extractor_of(model: AudioModel) -> dict[str, Any]:
    """Return the content of preprocessor_config.json."""
    settings, encoder = model.front_end.settings, model.encoder
    return {
        "feature_extractor_type": "ASiTFeatureExtractor",
        "auto_map": {"AutoFeatureExtractor": _AUTO["AutoFeatureExtractor"]},
        "feature_size": settings.mels,
        "sampling_rate": settings.rate,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
        **{name: getattr(settings, name) for name in _SAME},
        "padding_rule": settings.padding,
        "num_frames": encoder.frames,
        "patch_frames": encoder.patch[0],
        "patch_stride_frames": encoder.stride[0],
        "pad_to": "longest" if model.labelling is None else "max_length",
    }


def folder_settings(config: Mapping[str, Any], extractor: Mapping[str, Any], classifier: bool) -> FolderSettings:
    """Read the settings from both files, written by asit or by transformers.

    Args:
        config: content of config.json.
        extractor: content of preprocessor_config.json.
        classifier: whether the weights have a head.

    Raises:
        KeyError, TypeError, ValueError, ConfigError: a field is missing or invalid.
    """
    shape = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    size = next((name for name, known in SIZES.items() if known == shape), "custom")
    own = dict(zip(("width", "depth", "heads"), shape, strict=True)) if size == "custom" else {}
    (frames, mels), (down, along) = config["patch_size"], config["patch_stride"]
    encoder = build(
        EncoderSettings,
        {
            "size": size,
            **own,
            "mlp_ratio": config["mlp_ratio"],
            "patch_frames": frames,
            "patch_mels": mels,
            "patch_stride_frames": None if down == frames else down,
            "patch_stride_mels": None if along == mels else along,
            "distilled": config["distilled"],
            "norm_eps": config["layer_norm_eps"],
            "drop_path": config["drop_path_rate"],
        },
        "config.json",
    )
    renamed = {
        "rate": extractor["sampling_rate"],
        "mels": extractor["feature_size"],
        "padding": extractor["padding_rule"],
    }
    front_end = build(FrontEndSettings, renamed | {name: extractor[name] for name in _SAME}, "preprocessor_config.json")
    check_front_end(front_end)
    _agree(config, extractor)
    labels = _labels(config, front_end, config["num_frames"]) if classifier else None
    norm = classifier and bool(config["classifier_norm"])
    return FolderSettings(encoder, front_end, config["num_frames"], labels, norm, dict(config.get("training") or {}))


def _labels(config: Mapping[str, Any], front_end: FrontEndSettings, frames: int) -> Labelling:
    named = {int(i): name for i, name in config["id2label"].items()} if config.get("id2label") else {}
    # transformers omits its two default labels.
    named = named or {i: f"LABEL_{i}" for i in range(2)}
    if sorted(named) != list(range(len(named))) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(f"id2label does not name the outputs 0 to {len(named) - 1}")
    view = FrontEnd(front_end)
    return Labelling(
        tuple(named[i] for i in range(len(named))),
        config.get("problem_type") == "multi_label_classification",
        config["pooling"],
        float(config.get("input_seconds") or view.samples_for(frames) / front_end.rate),
        float(config["classifier_norm_eps"]),
    )


def _agree(config: Mapping[str, Any], extractor: Mapping[str, Any]) -> None:
    """Raise ValueError if the files contradict each other."""
    pairs = {
        "num_mel_bins": (config["num_mel_bins"], extractor["feature_size"]),
        "num_frames": (config["num_frames"], extractor["num_frames"]),
        "patch_size": (config["patch_size"][0], extractor["patch_frames"]),
        "patch_stride": (config["patch_stride"][0], extractor["patch_stride_frames"]),
    }
    for name, (first, second) in pairs.items():
        if first != second:
            raise ValueError(f"{name} is {first} in config.json and {second} in preprocessor_config.json")
