"""Write and read model folders of Hugging Face's transformers; code in them is never run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.config.yaml import build
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface.readme import public, readme
from asit.io import atomic, checkpoint, parsing, safe_load
from asit.model.audio_model import AudioModel
from asit.model.card import check_front_end, head_of
from asit.model.classifier import Labelling
from asit.model.encoders import empty_encoder, meta_encoder
from asit.model.vit import shape_of, size_of

MODEL_TYPE = "asit"
"""`model_type` in config.json."""

CONFIG, EXTRACTOR, WEIGHTS, README = "config.json", "preprocessor_config.json", "model.safetensors", "README.md"

CODE = ("configuration_asit.py", "modeling_asit.py", "feature_extraction_asit.py")
"""Files copied into exported folders, to load them without asit."""

_ENCODER, _HEAD = "encoder.", "head."
_AUTO = {
    "AutoConfig": "configuration_asit.ASiTConfig",
    "AutoFeatureExtractor": "feature_extraction_asit.ASiTFeatureExtractor",
    "AutoModel": "modeling_asit.ASiTModel",
    "AutoModelForAudioClassification": "modeling_asit.ASiTForAudioClassification",
}
_SAME = ("window_ms", "shift_ms", "low_hz", "high_hz", "preemphasis", "mean", "std", "resampler")
"""Front-end settings with the same name in preprocessor_config.json."""


@dataclass(frozen=True)
class FolderSettings:
    """The content of both configurations as asit's settings; `norm`: whether a classifier's head has a LayerNorm."""

    encoder: EncoderSettings
    front_end: FrontEndSettings
    frames: int
    labels: Labelling | None
    norm: bool
    training: dict[str, Any]


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
        **({"pooling_layers": list(labels.layers)} if labels is not None and labels.layers else {}),
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
    (frames, mels), (down, along) = config["patch_size"], config["patch_stride"]
    encoder = build(
        EncoderSettings,
        {
            **size_of(config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]),
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
        tuple(config.get("pooling_layers") or ()),
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


def write(
    model: AudioModel,
    out: Path,
    *,
    license: str | None = None,
    title: str | None = None,
    overwrite: bool = False,
    run: Path | None = None,
) -> None:
    """Write a folder that transformers loads offline and that can be pushed to the hub.

    It holds weights (safetensors), both configurations, the three code files for `trust_remote_code`, and README.md as
    the model card. Neither transformers nor huggingface_hub is needed.

    Args:
        model: encoder or classifier.
        out: the folder.
        license: of the weights, as the hub names it, such as "apache-2.0"; None: that of the card.
        title: of the model card; None: the folder's name.
        overwrite: replace an earlier export.
        run: fine-tuning run whose results.json gives the metrics; None: no metrics.

    Raises:
        CheckpointError: out exists and overwrite is off, the disk is full, or results.json cannot be read.
        ConfigError: overwrite is on and out holds something else.
    """
    family, front = model.encoder.settings.family, model.front_end.settings
    if family != "vit" or (front.window, front.scale) != ("hann", 1):
        raise ConfigError(
            f"a model of family {family}, window {front.window} and scale {front.scale}, and the code of a folder for "
            "transformers has no such network or front end",
            "ASiT, AST or SSAST",
            "export AudioMAE and EAT with --to onnx or --to torch",
        )
    out = Path(out)
    if overwrite:
        _check_ours(out)
    with parsing.as_written(run or "the card", "export without the run's folder", CheckpointError):
        text = readme(model, title or out.resolve().name, license, run)
    with atomic.write_folder(out, overwrite=overwrite) as draft:
        _fill(draft, model, text)


def read(folder: Path) -> AudioModel:
    """Read a folder that `write` or transformers' `save_pretrained` wrote, without running its code.

    Raises:
        CheckpointError: a file is missing, damaged or of another model, or weights and configurations do not match.
    """
    folder = Path(folder)
    config, extractor = check(folder / CONFIG), _json(folder / EXTRACTOR)
    tensors = _weights(folder / WEIGHTS)
    of_head = {name.removeprefix(_HEAD): value for name, value in tensors.items() if name.startswith(_HEAD)}
    rest = {name: value for name, value in tensors.items() if not name.startswith(_HEAD)}
    if of_head or all(name.startswith(_ENCODER) for name in rest):
        rest = {name.removeprefix(_ENCODER): value for name, value in rest.items()}
    try:
        parts = folder_settings(config, extractor, bool(of_head))
        size = parts.encoder, parts.frames, parts.front_end.mels
        # Compare shapes first, so that a wrong file allocates no memory.
        if shape_of(parts.encoder)[1] > len(rest):
            raise ValueError(f"{shape_of(parts.encoder)[1]} blocks, and weights of {len(rest)} tensors")
        checkpoint.check_fit(meta_encoder(*size), rest, str(folder / WEIGHTS))
        front_end, encoder = FrontEnd(parts.front_end), empty_encoder(*size)
        labels, head = parts.labels, None
        if labels is not None:
            with torch.device("meta"):  # no random initialisation
                head = head_of(encoder.width, labels, parts.norm)
    except (*parsing.UNFIT, ConfigError) as error:
        what = error.found if isinstance(error, ConfigError) and not error.expected else str(error)
        what = f"the field {error} is missing" if isinstance(error, KeyError) else what
        raise CheckpointError(
            f"{folder / CONFIG} and {EXTRACTOR} cannot be used: {what}",
            "the fields as asit writes them",
            "get the folder again, or upgrade asit",
        ) from error
    if head is not None:
        head.to_empty(device="cpu")
        checkpoint.load_strict(head, of_head, f"{folder / WEIGHTS} (its head.*)")
    checkpoint.load_strict(encoder, rest, str(folder / WEIGHTS))
    return AudioModel(encoder, front_end, parts.training, head, parts.labels)


def check(path: Path) -> Mapping[str, Any]:
    """Return the content of a config.json of an asit model.

    Raises:
        CheckpointError: it is missing, damaged, or another model's.
    """
    config = _json(path)
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} says model_type {config.get('model_type')!r}",
            f"model_type {MODEL_TYPE!r}",
            f"convert other models with: asit convert {path.parent} --out DIR",
        )
    return config


def _fill(to: Path, model: AudioModel, text: str) -> None:
    encoder, head = model.encoder.state_dict(), {} if model.head is None else model.head.state_dict()
    prefix = _ENCODER if head else ""
    tensors = {f"{prefix}{name}": value for name, value in encoder.items()}
    tensors |= {f"{_HEAD}{name}": value for name, value in head.items()}
    # Older transformers need the format.
    safetensors.torch.save_file({name: _own(value) for name, value in tensors.items()}, to / WEIGHTS, {"format": "pt"})
    for name, value in ((CONFIG, config_of(model)), (EXTRACTOR, extractor_of(model))):
        (to / name).write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    for name in CODE:
        shutil.copyfile(Path(__file__).with_name(name), to / name)
    (to / README).write_text(text, encoding="utf-8")


def _own(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that shares no memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_ours(out: Path) -> None:
    """Raise ConfigError if overwriting `out` would delete something else."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    try:
        ours = _json(out / CONFIG).get("model_type") == MODEL_TYPE
    except CheckpointError:
        ours = False
    if not ours:
        names = sorted(path.name for path in out.iterdir())
        raise ConfigError(
            f"{out} holds something else: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}",
            "a new or empty folder, or an earlier export to overwrite",
            "choose another --out",
        )


def _json(path: Path) -> Mapping[str, Any]:
    expected = f"a folder with {CONFIG}, {EXTRACTOR} and {WEIGHTS}"
    remedy = "get the complete folder again; the feature extractor's save_pretrained writes preprocessor_config.json"
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}", expected, remedy)
    return parsing.json_object(path, CheckpointError, "a JSON object", remedy)


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.iterdir() if p.suffix in safe_load.SUFFIXES)
        raise CheckpointError(
            f"{path.parent} has no {path.name}" + (f", but {', '.join(there[:3])}" if there else ""),
            "all weights in one safetensors file",
            "save it again with save_pretrained(folder, max_shard_size='100GB'), which writes safetensors",
        )
    return checkpoint.read_tensors(path, "get the complete folder again")
