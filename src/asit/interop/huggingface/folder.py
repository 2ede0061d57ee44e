"""Write and read model folders of Hugging Face's transformers; code in them is never run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface.fields import CODE, MODEL_TYPE, config_of, extractor_of, folder_settings
from asit.interop.huggingface.readme import readme
from asit.io import atomic, checkpoint, parsing, safe_load
from asit.model.audio_model import AudioModel
from asit.model.vit import empty_encoder, meta_encoder, shape_of

CONFIG, EXTRACTOR, WEIGHTS, README = "config.json", "preprocessor_config.json", "model.safetensors", "README.md"

_ENCODER, _HEAD = "encoder.", "head."


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
        with torch.device("meta"):  # no random initialisation
            head = parts.head(encoder.width)
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
