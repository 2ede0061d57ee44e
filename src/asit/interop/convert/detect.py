"""What a file of weights is, by the names in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.errors import CheckpointError, ConfigError
from asit.interop.convert import families, hf_ast, image_vit, official_asit, official_ast
from asit.interop.convert.converted import Ask, Taken

KINDS: dict[str, tuple[str, Callable[[Path, Mapping[str, Any], Ask], Taken]]] = {
    "asit": ("ASiT's own pretraining (v1, v2), or fine-tuned from it", official_asit.official),
    "asit-sed": ("ASiT of PretrainedSED (ASIT_ssl, ASIT_weak, ASIT_strong_1)", official_asit.sed),
    "ast": ("AST as its authors save it", official_ast.original),
    "hf-ast": ("AST of Hugging Face (a folder, or the file in it)", hf_ast.hugging_face),
    "ssast": ("SSAST as its authors save it, pretrained or fine-tuned", official_ast.ssast),
    "vit": ("an image transformer with timm's names (ViT, DeiT)", image_vit.image),
}
"""What can be converted: a description, and the function that does it."""


@dataclass(frozen=True)
class Likeness:
    """The kinds that a file can be, the likeliest first, and whether its names alone decide."""

    kinds: tuple[str, ...]
    sure: bool = True


def choose(path: Path, content: Mapping[str, Any], asked: str) -> tuple[str, list[str]]:
    """The kind of a file, and what the user is to be told of the choice.

    Raises:
        ConfigError: there is no such kind.
        CheckpointError: the file is of none, of another than asked for, or of one that its names do not tell.
    """
    if asked != "auto" and asked not in KINDS:
        raise ConfigError(f"there is no kind {asked!r}", "auto, " + ", ".join(KINDS), "see asit convert --help")
    found = look(content)
    known = families.family(families.names_in(content), families.channels_of(content))
    if known is not None:
        families.refuse(path, known, KINDS)
    if found is None:
        names = ", ".join(list(_flat(content))[:4]) or "nothing"
        raise CheckpointError(
            f"{path} is of no kind that is known ({names})",
            "; ".join(f"{kind}: {text}" for kind, (text, _) in KINDS.items()),
            "none of these: asit has no way to read it",
        )
    like = " or ".join(KINDS[kind][0] for kind in found.kinds)
    if asked != "auto":
        if asked not in found.kinds:
            raise CheckpointError(f"{path} looks like {like}", KINDS[asked][0], f"pass --kind {found.kinds[0]}")
        return asked, []
    if not found.sure:
        raise CheckpointError(
            f"{path} is {like}: its names do not tell",
            "one of " + ", ".join(found.kinds),
            " or ".join(f"--kind {kind}" for kind in found.kinds),
        )
    others = " or ".join(f"--kind {kind}" for kind in found.kinds[1:])
    notes = [f"taken for {KINDS[found.kinds[0]][0]}; else pass {others}"] if others else []
    return found.kinds[0], notes


def look(content: Mapping[str, Any]) -> Likeness | None:
    """What a file's names can be; None: nothing that is known."""
    if any(isinstance(content.get(name), Mapping) for name in ("teacher", "student")):
        return Likeness(("asit",))
    found = {name.removeprefix("module."): value for name, value in _flat(content).items()}
    bare = {name.removeprefix(hf_ast.PREFIX) for name in found}
    if "embeddings.distillation_token" in bare:
        return Likeness(("hf-ast",))
    if "model.asit.cls_token" in found or "model.cls_token" in found:
        return Likeness(("asit-sed",))
    if "backbone.cls_token" in found:
        return Likeness(("asit",))
    if "v.cls_token" in found:
        filters = found.get("v.patch_embed.proj.weight")
        square = filters is not None and filters.ndim == 4 and filters.shape[2] == filters.shape[3]
        if "p_input_fdim" in found or not square:
            return Likeness(("ssast",))
        if "v.dist_token" in found:
            # A fine-tuned SSAST of patches has AST's very names; without a head nobody would save one.
            return Likeness(("ast", "ssast"))
        return Likeness(("asit", "ssast"), sure=False)
    if "cls_token" in found:
        filters = found.get("patch_embed.proj.weight")
        coloured = filters is not None and filters.ndim == 4 and filters.shape[1] == 3
        # An ASiT that was built for three channels has an image transformer's very names.
        return Likeness(("vit", "asit") if coloured else ("asit",))
    return None


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The named tensors, as they are or under "model" or "state_dict"."""
    nest = next((content[name] for name in ("model", "state_dict") if isinstance(content.get(name), Mapping)), content)
    return {str(name): value for name, value in nest.items() if isinstance(value, Tensor)}
