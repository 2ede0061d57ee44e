"""Find the kind of a file of weights by the names of its tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.errors import CheckpointError, ConfigError
from asit.interop.convert import (
    families,
    hf_ast,
    image_vit,
    official_asit,
    official_ast,
    official_audiomae,
    official_beats,
    official_eat,
)
from asit.interop.convert.source_model import SourceModel, SourceOptions

log = logging.getLogger(__name__)

KINDS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], SourceOptions], SourceModel]]] = {
    "asit": ("ASiT's own pretraining (v1, v2), or fine-tuned from it", official_asit.official),
    "asit-sed": ("ASiT of PretrainedSED (ASIT_ssl, ASIT_weak, ASIT_strong_1)", official_asit.sed),
    "ast": ("AST as its authors save it", official_ast.original),
    "hf-ast": ("AST of Hugging Face (a folder, or the file in it)", hf_ast.hugging_face),
    "ssast": ("SSAST as its authors save it, pretrained or fine-tuned", official_ast.ssast),
    "audiomae": ("AudioMAE as its authors save it, pretrained or fine-tuned", official_audiomae.audiomae),
    "eat": ("EAT, of fairseq or of Hugging Face (a folder, or the file in it)", official_eat.eat),
    "beats": ("BEATs as its authors save it, pretrained or fine-tuned", official_beats.beats),
    "vit": ("an image transformer with timm's names (ViT, DeiT)", image_vit.image),
}
"""Supported kinds: a description and the function that converts it."""


PEERS = ("audiomae", "eat", "beats")
"""Kinds of families whose names `families.FAMILIES` shows too."""

AMBIGUOUS = ("asit", "ssast")
"""Kinds between which names cannot decide."""


def choose(path: Path, content: Mapping[str, Any], requested: str) -> str:
    """Return the kind of a file; an assumption is logged.

    Raises:
        ConfigError: unknown `requested` kind.
        CheckpointError: the file is of no kind, not of the requested one, or its names are ambiguous.
    """
    if requested != "auto" and requested not in KINDS:
        raise ConfigError(f"there is no kind {requested!r}", "auto, " + ", ".join(KINDS), "see asit convert --help")
    found = candidates(content)
    if requested == "audiomae" and found == ("asit",):
        return requested  # its encoder alone has an ASiT's names
    known = families.family(families.names_in(content), families.channels_of(content))
    if known is not None and not set(found) & set(PEERS):
        families.refuse(path, known, KINDS)
    if not found:
        raise CheckpointError(
            f"{path} is of no known kind ({', '.join(list(_flat(content))[:4]) or 'nothing'})",
            "; ".join(f"{kind}: {text}" for kind, (text, _) in KINDS.items()),
            "asit cannot read any other",
        )
    like = " or ".join(KINDS[kind][0] for kind in found)
    if requested != "auto":
        if requested not in found:
            raise CheckpointError(f"{path} looks like {like}", KINDS[requested][0], f"pass --kind {found[0]}")
        return requested
    if found == AMBIGUOUS:
        raise CheckpointError(
            f"{path} is {like}: its names are ambiguous",
            "one of " + ", ".join(found),
            " or ".join(f"--kind {kind}" for kind in found),
        )
    if len(found) > 1:
        log.info(f"Assumed to be {KINDS[found[0]][0]}; else pass --kind {found[1]}")
    return found[0]


def candidates(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the kinds that a file's names allow, the likeliest first."""
    if any(isinstance(content.get(name), Mapping) for name in ("teacher", "student")):
        return ("asit",)
    found = {name.removeprefix("module."): value for name, value in _flat(content).items()}
    if any(name.removeprefix(hf_ast.PREFIX) == "embeddings.distillation_token" for name in found):
        return ("hf-ast",)
    if official_beats.is_beats(found):
        return ("beats",)
    if official_eat.is_eat(found):
        return ("eat",)
    if official_audiomae.is_audiomae(found):
        return ("audiomae",)
    if "model.asit.cls_token" in found or "model.cls_token" in found:
        return ("asit-sed",)
    if "backbone.cls_token" in found:
        return ("asit",)
    if "v.cls_token" in found:
        filters = found.get("v.patch_embed.proj.weight")
        square = filters is not None and filters.ndim == 4 and filters.shape[2] == filters.shape[3]
        if "p_input_fdim" in found or not square:
            return ("ssast",)
        # A fine-tuned SSAST of patches has AST's very names; without a head nobody would save one.
        return ("ast", "ssast") if "v.dist_token" in found else AMBIGUOUS
    if "cls_token" in found:
        filters = found.get("patch_embed.proj.weight")
        coloured = filters is not None and filters.ndim == 4 and filters.shape[1] == 3
        # An ASiT that was built for three channels has an image transformer's very names.
        return ("vit", "asit") if coloured else ("asit",)
    return ()


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the named tensors, top-level or under "model" or "state_dict"."""
    nest = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)), content)
    return {str(name): value for name, value in nest.items() if isinstance(value, Tensor)}
