"""Recognise unsupported encoders by the names of their tensors.

To support a family, remove it from `FAMILIES` and add a kind to `detect.KINDS`.

Sources of the names: facebookresearch/AudioMAE, microsoft/unilm (beats, wavlm), cwx-worst-one/EAT,
Audio-WestlakeU/audiossl (ATST), nttcslab/m2d, kkoutini/PaSST, XiaoMi/dasheng, facebookresearch/fairseq,
openai/whisper, LAION-AI/CLAP, YuanGongND/cav-mae, qiuqiangkong/audioset_tagging_cnn, facebookresearch/dinov2, and the
models of those names in transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from asit.errors import CheckpointError

MASKED = "AudioMAE, or another masked autoencoder such as M2D or MSM-MAE"
FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "EAT": ((r"modality_encoders\.IMAGE\.",), (r"(^|\.)local_encoder\.proj\.", r"(^|\.)extra_tokens$")),
    "data2vec 2.0": ((r"modality_encoders\.",),),
    "PaSST": ((r"(freq|time)_new_pos_embed$",),),
    "CAV-MAE": ((r"(^|\.)patch_embed_a\.",), (r"(^|\.)blocks_a\.\d+\.",)),
    "Dasheng or CED": ((r"(^|\.)time_pos_embed$", r"(^|\.)freq_pos_embed$"),),
    "ATST": ((r"(^|\.)norm_frame\.",), (r"patch_embed\.patch_embed\.",)),
    "CLAP": (
        (r"(^|\.)audio_branch\.",),
        (r"(^|\.)audio_model\.audio_encoder\.",),
        (r"(^|\.)caption_encoder\.",),
        (r"(^|\.)audio_encoder\.layers\.\d+\.blocks\.",),
    ),
    "HTS-AT": ((r"(^|\.)tscam_conv\.",),),
    "PANNs": ((r"(^|\.)conv_block1\.conv1\.",),),
    "Whisper": (
        (r"(^|\.)conv1\.weight$", r"encoder\.(layers|blocks)\.\d+\.(self_attn|attn|attn_ln)"),
        (r"(^|\.)conv1\.weight$", r"(^|\.)embed_positions\.weight$"),
    ),
    "WavLM": ((r"feature_extractor\.conv_layers\.", r"gru_rel_pos|grep_linear|rel_attn_embed"),),
    "HuBERT": ((r"label_embs_concat$",), (r"(^|\.)hubert\.",)),
    "data2vec": ((r"(^|\.)data2vec_audio\.",), (r"pos_conv_embed\.layers\.",)),
    "wav2vec2": ((r"(^|\.)(w2v_model|wav2vec2|quantizer)\.", r"feature_extractor\.conv_layers\."),),
    "wav2vec2 or HuBERT": ((r"feature_extractor\.conv_layers\.",),),
    "BEATs": ((r"grep_(linear|a)\b",), (r"(^|\.)patch_embedding\.weight$", r"(^|\.)post_extract_proj\.")),
    "M2D": ((r"(^|\.)norm_stats$",), (r"ar\.runtime\.backbone\.",)),
    "an image transformer of another build than ViT or DeiT (DINOv2, BEiT, Swin, CLIP)": (
        (r"blocks\.\d+\.(ls1|ls2)\.",),
        (r"(^|\.)register_tokens$",),
        (r"relative_position_bias_table$",),
        (r"blocks\.\d+\.gamma_[12]$",),
        (r"(^|\.)visual\.transformer\.",),
    ),
    MASKED: ((r"(^|\.)decoder_(embed|blocks|pred|pos_embed)\b",), (r"(^|\.)mask_token$",), (r"(^|\.)fc_norm\.",)),
    "ViT of Hugging Face": ((r"embeddings\.cls_token$", r"patch_embeddings\.projection\."),),
}
"""Names of families, with alternative tuples of patterns; a file matches one if each of its patterns is found in some
name. The first family that matches counts."""


def channels_of(content: Mapping[str, Any], depth: int = 3) -> int:
    """Return the channels of the patch filters; 1 if there are none."""
    for name, value in content.items():
        if isinstance(value, Tensor) and str(name).endswith("patch_embed.proj.weight") and value.ndim == 4:
            return value.shape[1]
        if isinstance(value, Mapping) and depth > 0 and (found := channels_of(value, depth - 1)) != 1:
            return found
    return 1


def names_in(content: Mapping[str, Any], depth: int = 3) -> list[str]:
    """Return all names in a file, those of nested mappings included."""
    out: list[str] = []
    for name, value in content.items():
        out.append(str(name))
        if isinstance(value, Mapping) and depth > 0:
            out += names_in(value, depth - 1)
    return out


def family(names: Iterable[str], channels: int = 1) -> str | None:
    """Return the unsupported family that tensor names (or any strings of a file) show; None if there is none."""
    given = list(names)

    def shows(sign: tuple[str, ...]) -> bool:
        return all(any(re.search(pattern, name) for name in given) for pattern in sign)

    found = next((name for name, signs in FAMILIES.items() if any(map(shows, signs))), None)
    if found == MASKED and channels != 1:
        return "a masked autoencoder of images (MAE), or fine-tuned from one"
    if found == "ViT of Hugging Face" and shows((r"distillation_token$",)):
        return None  # AST's names
    return found


def refuse(path: Path, name: str, kinds: Mapping[str, tuple[str, Any]]) -> NoReturn:
    """Raise CheckpointError for a file of the unsupported family `name`; `kinds` are `detect.KINDS`."""
    raise CheckpointError(
        f"{path} is, by the names in it, {name}, "
        + ("and its positions are not AudioMAE's" if name == MASKED else "which asit does not support"),
        "; ".join(f"{kind}: {text}" for kind, (text, _) in kinds.items()),
        "if it is AudioMAE, pass --kind audiomae; no option converts another"
        if name == MASKED
        else "use it with the code it was published with; no option converts it",
    )


def are_sines(positions: Tensor, prefix: int) -> bool:
    """Whether positions (1, prefix + P, D) are sines and cosines of one or two coordinates instead of learned."""
    found = positions[0, prefix:].float()
    width = found.shape[-1]
    if width % 4 or not len(found):
        return False
    halves = found.unflatten(1, (2, 2, width // 4))  # of each coordinate its sines, then its cosines
    layouts = [halves.square().sum(2), found.unflatten(1, (2, width // 2)).square().sum(1)]
    layouts.append(found.unflatten(1, (width // 2, 2)).square().sum(2))  # alternating
    return any(bool((one - 1).abs().mean() < 0.1) for one in layouts)  # learned ones are near 0
