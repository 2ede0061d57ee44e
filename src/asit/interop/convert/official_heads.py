"""Heads and centres of an official ASiT pretraining, in asit's names, for pretraining that goes on with them.

Sources: Sara-Ahmed/ASiT (v1: vision_transformer.py, losses.py; v2: main_ASiT.py) for the names: v1 has two last layers
with norms of 1 and the centres `loss_cls.center` and `loss_data.center`; v2 has one for both kinds of tokens, with
trained norms, and `CLS_PATCH_loss.center` and `center2`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.errors import CheckpointError

_NORMS = {
    "weight_g": "weight_g",
    "weight_v": "weight_v",
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
_LAYERS = {
    "head_cls.cls_layer": "projection.class_layer",
    "head_cls.data_layer": "projection.patch_layer",
    "head.last_layer": "projection.class_layer",
}
_PARTS = {
    r"head(?:_cls)?\.mlp\.(\d\.\w+)": r"projection.mlp.\1",
    r"head_recons\.mlp\.(\d\.\w+)": r"reconstruction.mlp.\1",
    r"head_recons\.convTrans\.(\w+)": r"reconstruction.\1",
}
_CENTRES = (
    ("class_centre", (("loss_cls", "center"), ("CLS_PATCH_loss", "center"))),
    ("patch_centre", (("loss_data", "center"), ("CLS_PATCH_loss", "center2"))),
)


@dataclass(frozen=True)
class PretrainingHeads:
    """What pretraining has beside the encoder.

    Attributes:
        state: tensors "projection.*", "reconstruction.*" and, where the file has them, "class_centre" and
            "patch_centre"; a shared last layer is kept once, as "projection.class_layer".
        settings: of `HeadSettings`.
        names: of the file's tensors in `state`.
    """

    state: dict[str, Tensor]
    settings: dict[str, Any]
    names: tuple[str, ...]


def heads_of(
    path: Path, found: Mapping[str, Tensor], content: Mapping[str, Any], required: bool
) -> PretrainingHeads | None:
    """Return the heads in a network of an official file; None: it has none.

    Args:
        path: of the file.
        found: the network's tensors, without "module.".
        content: of the file, for the centres.
        required: raise for heads of which a part is missing, rather than take them for none.

    Raises:
        CheckpointError: a part of them is missing.
    """
    renamed = {name: own for name in found if (own := _ours(name)) is not None}
    if not renamed:
        return None
    state = {own: found[name].float() for name, own in renamed.items()}
    try:
        settings = _settings(state)
    except (KeyError, IndexError, ValueError) as error:  # a missing tensor, or one of other axes
        if not required:
            return None
        raise CheckpointError(
            f"{path} has incomplete heads of pretraining ({error.args[0]})",
            "head_cls.* or head.*, and head_recons.*, as in an official checkpoint",
            "omit --keep-heads, or get the file again",
        ) from error
    for name, places in _CENTRES:
        for holder, key in places:
            held = content.get(holder)
            if isinstance(held, Mapping) and isinstance(held.get(key), Tensor):
                state[name] = held[key].float().flatten()
    return PretrainingHeads(state, settings, tuple(renamed))


def _ours(name: str) -> str | None:
    """Return asit's name of a head's tensor; None: it is of no head."""
    for layer, own in _LAYERS.items():
        if name.startswith(f"{layer}.") and (part := _NORMS.get(name.removeprefix(f"{layer}."))):
            return f"{own}.{part}"
    return next((re.sub(old, new, name) for old, new in _PARTS.items() if re.fullmatch(old, name)), None)


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that the shapes show."""
    shared = "projection.patch_layer.weight_v" not in state
    classes, bottleneck = state["projection.class_layer.weight_v"].shape
    patches = classes if shared else len(state["projection.patch_layer.weight_v"])
    norms = [state[name] for name in state if name.endswith("weight_g")]
    return {
        "hidden": len(state["projection.mlp.0.weight"]),
        "bottleneck": bottleneck,
        "class_prototypes": classes,
        "patch_prototypes": patches,
        "share_prototypes": shared,
        "train_norm": shared or any(bool((norm != 1).any()) for norm in norms),
        "reconstruction_hidden": [len(state[f"reconstruction.mlp.{i}.weight"]) for i in (0, 2, 4)],
    }
