"""Convert EAT: its authors' files of fairseq, pretrained or fine-tuned, and their folders for transformers.

Sources: cwx-worst-one/EAT, models/images.py, base.py, modules.py (AltBlock), EAT_pretraining.py,
EAT_audio_classification.py, data/raw_audio_dataset.py; worstchan/EAT-* on the hub, eat_model.py. Blocks have norms
after the sums, and a norm before the first (epsilon 1e-6); one extra token without a position; fixed positions (time,
mel) of up to 768 columns; clips are padded with 0 before the normalisation. A fine-tuned network's head reads the extra
token through a LayerNorm, of epsilon 1e-6 in fairseq and 1e-5 for transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from asit.errors import CheckpointError
from asit.interop.convert.hf_ast import read_json
from asit.interop.convert.source_model import (
    PUBLISHED,
    SourceHead,
    SourceModel,
    SourceOptions,
    assign_tensors,
    frames_of,
    front_end,
    requested_frames,
    source_model,
    tensor_shape,
)
from asit.io import safe_load
from asit.model.classifier import Pooling

log = logging.getLogger(__name__)

MODEL_TYPE = "eat"
MEAN, STD = -4.268, 4.569
"""Of AudioSet, as EAT was trained; EAT has -6.627 and 5.359 for ESC-50, -6.846 and 5.565 for Speech Commands."""

_EMA = "_ema"
_IMAGE = "modality_encoders.IMAGE."
_PLAIN = {
    "local_encoder.proj.weight": "patch_embed.proj.weight",
    "local_encoder.proj.bias": "patch_embed.proj.bias",
    "extra_tokens": "cls_token",
    "fixed_positional_encoder.positions": "pos_embed",
    **{
        f"{norm}.{kind}": f"norm.{kind}" for norm in ("context_encoder.norm", "pre_norm") for kind in ("weight", "bias")
    },
}
_RULES = {
    r"modality_encoders\.IMAGE\.decoder\..*": "decoder of pretraining",
    r"((recon_proj|cls_proj|shared_decoder)\..*|center)": "head of pretraining",
}
_LINEAR = {"head.weight": "linear.weight", "head.bias": "linear.bias"}
_NORMED = _LINEAR | {"fc_norm.weight": "norm.weight", "fc_norm.bias": "norm.bias"}
_LENGTH = 1024


def eat(path: Path, content: Mapping[str, Any], options: SourceOptions) -> SourceModel:
    """Convert a file of EAT.

    Raises:
        CheckpointError: unknown tensors, another kind of block or pooling, or positions that fit no grid.
    """
    nest = content.get("model")
    given = dict(nest if isinstance(nest, Mapping) else content)
    teacher = given.pop(_EMA, None)
    found = {_own(name): value for name, value in safe_load.tensors(path, given, ()).items()}
    said = _said(path, content)
    _check(path, said)
    tensors = assign_tensors(path, found, _RULES, "", [_NORMED, _LINEAR], options.no_head)
    if teacher is not None:
        tensors.left_out[_EMA] = "the teacher (EMA) of pretraining"
    state, mels = tensors.state, options.mels or 128
    filters, table, first = (
        tensor_shape(path, state, *of) for of in (("patch_embed.proj.weight", 4), ("pos_embed", 3), ("cls_token", 3))
    )
    bands, length = mels // filters[3], _length(said)
    if not bands or table[1] % bands or first[1] != 1 or table[0] != 1:
        raise CheckpointError(
            f"{path} has {first[1]} extra tokens and {table[1]} positions, and {mels} mel bins make {bands} bands",
            "one extra token, and positions of whole columns of bands",
            "pass the --mels that the network was trained with",
        )
    stored = state["pos_embed"]
    columns = min(length // filters[2], table[1] // bands)
    state["pos_embed"] = _positions(stored, columns * bands)
    pooling = _pooling(said)
    head = SourceHead(tensors.head, pooling, 1e-5 if any("pre_norm" in name for name in given) else 1e-6)
    front = front_end(options, mels, mean=MEAN, std=STD, padding="zero", origin=f"{PUBLISHED} of EAT")
    over: dict[str, Any] = {"family": "eat", "norm_eps": said.get("norm_eps", 1e-6)}
    if "num_heads" in said:
        over["heads"] = said["num_heads"]
    stride = filters[2], filters[3]
    source = source_model(
        path, "eat", tensors, (stride, (columns, bands)), front, head if tensors.head else None, over=over
    )
    wanted = requested_frames(options, source.settings, source.front_end)
    if wanted is not None and source.frames < wanted <= frames_of((table[1] // bands, bands), stride, stride):
        source.state["pos_embed"], source.frames = _positions(stored, wanted // stride[0] * bands), wanted
        source.facts["grid"] = [wanted // stride[0], bands]
        log.info(f"Positions of {wanted} frames taken from the file")
    return source


def is_eat(names: Mapping[str, Any]) -> bool:
    """Whether the names of a file's tensors are EAT's, of fairseq or of transformers."""
    own = {re.sub(r"^(module\.)?(model\.)?", "", name) for name in names}
    kinds = (
        (_IMAGE + "extra_tokens", _IMAGE + "local_encoder.proj.weight"),
        ("extra_tokens", "local_encoder.proj.weight"),
    )
    return any(set(kind) <= own for kind in kinds)


def _own(name: str) -> str:
    own = re.sub(r"^(module\.)?(model\.)?", "", name)
    return _PLAIN.get(own.removeprefix(_IMAGE), own)


def _positions(table: Tensor, count: int) -> Tensor:
    """Return the first positions after that of the extra token, which is 0."""
    return F.pad(table[:, :count].float(), (0, 0, 1, 0))


def _said(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json beside the weights, or fairseq's settings in the file, say of the network."""
    out: dict[str, Any] = {}
    if (path.parent / "config.json").is_file():
        config = read_json(path.parent / "config.json")
        if config.get("model_type") == MODEL_TYPE:
            out |= config
    for group in _groups(content.get("cfg")):
        out |= {name: value for name, value in group.items() if value is not None}
    return out


def _groups(cfg: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of the task and the model, those of the pretraining before those of the fine-tuning."""
    model, task = (cfg.get(name) for name in ("model", "task")) if isinstance(cfg, Mapping) else (None, None)
    if isinstance(model, Mapping) and isinstance(model.get("pretrained_model_args"), Mapping):
        yield from _groups(model["pretrained_model_args"])
    yield from (group for group in (task, model) if isinstance(group, Mapping))


def _check(path: Path, said: Mapping[str, Any]) -> None:
    """Refuse what the tensors do not show and the encoder does not have."""
    eps, heads = said.get("norm_eps", 1e-6), said.get("num_heads", 12)
    wrong = [f"{name} {said[name]!r}" for name in ("layer_norm_first", "cosine_attention") if said.get(name)]
    wrong += [] if isinstance(eps, float) and 0 < eps < 1 else [f"norm_eps {eps!r}"]
    wrong += [] if isinstance(heads, int) and heads > 0 else [f"num_heads {heads!r}"]
    wrong += [] if said.get("num_extra_tokens", 1) == 1 else [f"num_extra_tokens {said['num_extra_tokens']!r}"]
    wrong += [] if _mode(said) in ("CLS_TOKEN", "MEAN_POOLING") else [f"prediction_mode {said['prediction_mode']!r}"]
    if wrong:
        raise CheckpointError(
            f"{path} says {', '.join(wrong)}",
            "EAT as published: norms after the sums, one extra token, a head on it or on the mean of the patches",
            "a changed network cannot be converted",
        )


def _mode(said: Mapping[str, Any]) -> str:
    return str(said.get("prediction_mode", "CLS_TOKEN")).rpartition(".")[2]


def _pooling(said: Mapping[str, Any]) -> Pooling:
    return "mean" if _mode(said) == "MEAN_POOLING" else "class"


def _length(said: Mapping[str, Any]) -> int:
    """Return the frames of the input; assumed where nothing says so."""
    size = said.get("img_size")
    length = said.get("target_length", size[0] if isinstance(size, list) and size else None)
    if isinstance(length, int) and length >= 16:
        return length
    log.info(f"An input of {_LENGTH} frames is assumed; else pass --frames")
    return _LENGTH
