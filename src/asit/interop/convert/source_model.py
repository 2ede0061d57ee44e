"""The options of a conversion, and a source's tensors in asit's names and axes.

AST and SSAST have filters (D, 1, mel, time) and mel-major positions. Letters: T frames, F mel bins, P patches, D width,
C classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.config.yaml import build
from asit.errors import CheckpointError, ConfigError
from asit.interop.convert.official_heads import PretrainingHeads
from asit.model.card import check_front_end
from asit.model.classifier import Pooling
from asit.model.imagenet import HEAD_WIDTH
from asit.model.positions import patch_of, prefix_of, round_up_frames
from asit.model.vit import size_of

MEAN, STD = -4.2677393, 4.5689974
"""Of AudioSet, as AST, SSAST and ASiT were trained (YuanGongND/ast, egs/audioset; Sara-Ahmed/ASiT)."""

FINE_TUNED = {35: ("Speech Commands", -6.845978, 5.5654526), 50: ("ESC-50", -6.6268077, 5.358466)}
"""Data set, mean and std of AST's recipes (egs/speechcommands, egs/esc50), by number of classes."""

PUBLISHED = "AudioSet's, as published with the code"
NORM_AND_LINEAR = {"mlp_head.0.weight": "norm.weight", "mlp_head.0.bias": "norm.bias"}
NORM_AND_LINEAR |= {"mlp_head.1.weight": "linear.weight", "mlp_head.1.bias": "linear.bias"}
"""Head of AST, by asit's names."""
Pair = tuple[int, int]
"""(time, mel) or (frames, mel bins)."""

LONGEST = 100_000
"""Most frames that positions are resized to, a quarter of an hour; attention over more exhausts memory."""


@dataclass(frozen=True)
class SourceOptions:
    """What the user specifies of a source, as the options of `asit convert`; None: from the file, or as published.

    `stride` is (frames, mel bins); `frames` or `seconds` is the length to resize the positions to. `keep_heads` keeps
    the heads of an official ASiT pretraining; None: where the file has them.
    """

    kind: str = "auto"
    which: Literal["teacher", "student"] = "teacher"
    frames: int | None = None
    seconds: float | None = None
    stride: tuple[int, int] | None = None
    mels: int | None = None
    rate: int | None = None
    mean: float | None = None
    std: float | None = None
    labels: Path | None = None
    answer: Literal["auto", "single", "multi"] = "auto"
    pooling: Literal["auto", "class", "mean"] = "auto"
    license: str | None = None
    no_head: bool = False
    keep_heads: bool | None = False


@dataclass
class SourceHead:
    """A linear classifier on pooled tokens.

    Attributes:
        state: "linear.weight", "linear.bias" and, with a norm, "norm.weight" and "norm.bias".
        pooling: what it reads.
        eps: epsilon of its norm.
        classes: names of the outputs, if the source has them.
        multi: whether a clip may have several classes, if the source says so.
        seconds: length of its clips, if the frames do not cover all of it.
    """

    state: dict[str, Tensor]
    pooling: Pooling = "class"
    eps: float = 1e-5
    classes: tuple[str, ...] | None = None
    multi: bool | None = None
    seconds: float | None = None


@dataclass
class SourceModel:
    """The encoder and head of a file.

    Attributes:
        settings: of the encoder.
        frames: T of the positions.
        front_end: with mean and std.
        state: the encoder's tensors, in asit's names and axes.
        mapped: number of the file's tensors in encoder and head.
        left_out: the file's other entries, with the reason.
        head: the head, if any.
        facts: `training.source` of the card.
        pretraining: heads of an official ASiT pretraining.
    """

    settings: EncoderSettings
    frames: int
    front_end: FrontEndSettings
    state: dict[str, Tensor]
    mapped: int
    left_out: dict[str, str]
    head: SourceHead | None
    facts: dict[str, Any]
    pretraining: PretrainingHeads | None = None


class Tensors(NamedTuple):
    """Tensors of a file in asit's names: of the encoder, of the head, and the reasons to leave out the others."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]
    left_out: dict[str, str]


OURS = re.compile(
    r"(cls_token|dist_token|pos_embed|(patch_embed\.proj|norm"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias))"
)
"""Names of an encoder's tensors in timm, the official ASiT and asit."""
_INNER = re.compile(
    r"(blocks|layers|encoder\.layer|patch_embed|embeddings|norm|layernorm|cls_token|dist_token|pos_embed|rel_pos|reg_token)"
)
"""Beginnings of the names of an encoder's parts; none of them may be left out."""
NO_HEAD = "outside the encoder (--no-head)"


def assign_tensors(
    path: Path,
    found: Mapping[str, Tensor],
    rules: Mapping[str, str],
    prefix: str = "",
    heads: Iterable[Mapping[str, str]] = (),
    no_head: bool = False,
) -> Tensors:
    """Assign every tensor of a file to the encoder, to a head, or to a reason to leave it out.

    Args:
        found: tensors by name.
        rules: patterns of full names, with the reason why these tensors are left out.
        prefix: of the names of the encoder's tensors.
        heads: names of each head that the file may have, with asit's names.
        no_head: leave out everything outside the encoder.

    Raises:
        CheckpointError: unknown names, or a part of a head.
    """
    heads = list(heads)
    of_head = set().union(*heads)
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    unknown = []
    for name, value in found.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and OURS.fullmatch(own):
            state[own] = value
        elif name in of_head and not no_head:
            head[name] = value
        elif reason := next((why for pattern, why in rules.items() if re.fullmatch(pattern, name)), None):
            left_out[name] = reason
        elif no_head and not _within(name, prefix):
            left_out[name] = NO_HEAD
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} unknown tensors ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}) besides {len(state)} of an encoder",
            "tensors of the encoder, of its head, or of parts known to be left out",
            "pass --kind; a modified network cannot be converted"
            if any(_within(name, prefix) for name in unknown)
            else "pass --no-head to convert the encoder alone: these are outside it",
        )
    if not state:
        raise CheckpointError(f"{path} has no tensors of an encoder", "such as cls_token and blocks.0.norm1.weight")
    names = next((names for names in heads if set(names) == set(head)), {})
    if head and not names:
        known = ", or ".join(", ".join(names) for names in heads)
        raise CheckpointError(f"{path} has of a head only {', '.join(sorted(head))}", known, "get the file again")
    return Tensors(state, {own: head[name] for name, own in names.items()}, left_out)


def _within(name: str, prefix: str) -> bool:
    """Whether a name is of a part of the encoder."""
    return name.startswith(prefix) and _INNER.match(name.removeprefix(prefix)) is not None


def encoder_settings(
    path: Path, state: Mapping[str, Tensor], stride: tuple[int, int] | None = None, **over: Any
) -> EncoderSettings:
    """Return the encoder's settings from its tensors, with asit's axes.

    Args:
        stride: of the patches as (frames, mel bins); None: the patch size.
        over: settings that tensors do not show: heads, norm_eps.

    Raises:
        CheckpointError: tensors of every encoder are missing or of another shape.
    """
    filters = tensor_shape(path, state, "patch_embed.proj.weight", 4)
    fc1 = tensor_shape(path, state, "blocks.0.mlp.fc1.weight", 2)
    width, channels, *patch = filters
    numbers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    depth, heads = len(numbers), int(over.pop("heads", width // HEAD_WIDTH))
    if channels != 1 or numbers != set(range(depth)) or min(filters) < 1 or heads < 1 or width % heads:
        raise CheckpointError(
            f"{path} has {channels} channels, a width of {width} and blocks {sorted(numbers)[:3]} to {max(numbers)}",
            f"1 channel, blocks from 0 on without a gap, and heads of {HEAD_WIDTH}",
            "image weights have 3 channels: --kind vit" if channels == 3 else "give an unchanged network",
        )
    for i in range(depth):  # before memory is allocated for this size
        for name, want in (("attn.qkv", (3 * width, width)), ("mlp.fc1", fc1)):
            if tensor_shape(path, state, f"blocks.{i}.{name}.weight", 2) != want:
                raise CheckpointError(
                    f"{path} has blocks.{i}.{name}.weight of shape {tuple(state[f'blocks.{i}.{name}.weight'].shape)}",
                    f"{want}: its patches are {width} wide",
                    "give an unchanged network",
                )
    shape = size_of(width, depth, heads)
    if stride is not None and stride != tuple(patch):
        shape |= {"patch_stride_frames": stride[0], "patch_stride_mels": stride[1]}
    shape |= {"patch_frames": patch[0], "patch_mels": patch[1], "mlp_ratio": fc1[0] / width}
    return build(EncoderSettings, {**shape, **over, "distilled": "dist_token" in state}, str(path))


def tensor_shape(path: Path, state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor.

    Raises:
        CheckpointError: it is missing, empty, or has another number of axes.
    """
    found = state.get(name)
    if found is None or found.ndim != axes or 0 in found.shape:
        raise CheckpointError(
            f"{path} has {'no ' + name if found is None else f'{name} of shape {tuple(found.shape)}'}",
            f"{name} with {axes} axes",
            "pass --kind",
        )
    return tuple(found.shape)


def patch_count(path: Path, state: Mapping[str, Tensor]) -> int:
    """Return the number of positions of patches, those of the tokens before them left out."""
    return tensor_shape(path, state, "pos_embed", 3)[1] - (2 if "dist_token" in state else 1)


def requested_frames(options: SourceOptions, settings: EncoderSettings, front_end: FrontEndSettings) -> int | None:
    """Return the requested T, rounded up to whole patch columns; None if none is requested.

    Raises:
        ConfigError: both frames and seconds are given, or more than `LONGEST`.
    """
    if options.frames is not None and options.seconds is not None:
        raise ConfigError("frames and seconds are both given", "one of them", "omit --frames or --seconds")
    frames = options.frames
    if options.seconds is not None:
        frames = round_up_frames(FrontEnd(front_end).frames_for(round(options.seconds * front_end.rate)), settings)
    if frames is not None and frames > LONGEST:
        raise ConfigError(
            f"positions for {frames} frames are requested",
            f"at most {LONGEST} frames",
            "omit it: longer recordings are processed in windows",
        )
    return frames


def front_end(options: SourceOptions, mels: int, **known: Any) -> tuple[FrontEndSettings, str]:
    """Return the front end of a source and the origin of its mean and std; options override what is known.

    Raises:
        ConfigError: impossible numbers.
    """
    given = {name: value for name in ("rate", "mean", "std") if (value := getattr(options, name)) is not None}
    origin = str(known.pop("origin", PUBLISHED))
    if own := {"mean", "std"} & set(given):
        origin = "as given" if len(own) == 2 else f"as given in part, else {origin}"
    facts = {"mean": MEAN, "std": STD, "rate": 16000} | known | given | {"mels": mels}
    try:
        settings = FrontEndSettings(**facts)
        check_front_end(settings)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        raise ConfigError(
            f"a front end of {', '.join(f'{name} {value}' for name, value in facts.items())}",
            "plausible rate and mel bins, a mean, and a std above 0",
            "give what the network was trained with: --rate, --mels, --mean, --std",
        ) from error
    return settings, origin


def fit_grid(path: Path, count: int, patch: Pair, mels: int, strides: Sequence[Pair]) -> tuple[Pair, Pair]:
    """Return the first stride for which P = `count` positions fill a grid over `mels` bins, and that (time, mel) grid.

    `patch` and `strides` are (frames, mel bins).

    Raises:
        CheckpointError: no stride fits.
    """
    tried = []
    for stride in strides:
        rows = (mels - patch[1]) // stride[1] + 1 if mels >= patch[1] else 0
        if rows > 0 and count >= rows and count % rows == 0:
            return stride, (count // rows, rows)
        tried.append(f"{stride[0]}x{stride[1]} makes {rows} rows")
    raise CheckpointError(
        f"{path} has positions of {count} patches of {patch[0]}x{patch[1]} (frames x mel bins); over {mels} mel bins "
        f"stride {', '.join(tried)}",
        "rows of patches that divide their number",
        "pass the --stride and --mels that the network was trained with, such as --stride 10",
    )


def frames_of(grid: Pair, patch: Pair, stride: Pair) -> int:
    """Return the frames that these columns cover."""
    return (grid[0] - 1) * stride[0] + patch[0]


def source_model(
    path: Path,
    kind: str,
    tensors: Tensors,
    patches: tuple[Pair, Pair],
    front: tuple[FrontEndSettings, str],
    head: SourceHead | None = None,
    *,
    transposed: bool = False,
    over: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> SourceModel:
    """Return the model of a file's tensors.

    Args:
        path: the file.
        kind: of `detect.KINDS`.
        tensors: in asit's names.
        patches: stride and (time, mel) grid.
        front: what `front_end` returned.
        head: the head, if any.
        transposed: whether the file's axes are (mel, time), to be transposed.
        over: settings of the encoder that its tensors do not show.
        facts: more of `training.source`.
    """
    state, (stride, grid) = tensors.state, patches
    if transposed and tensor_shape(path, state, "patch_embed.proj.weight", 4):
        state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].transpose(2, 3).contiguous()
    settings = encoder_settings(path, state, stride, **(over or {}))
    if transposed:
        parts = state["pos_embed"].split([prefix_of(settings), grid[0] * grid[1]], dim=1)
        state["pos_embed"] = torch.cat([parts[0], parts[1].unflatten(1, grid[::-1]).transpose(1, 2).flatten(1, 2)], 1)
    axes = "(mel, time), transposed to (time, mel)" if transposed else "(time, mel)"
    known = {"kind": kind, "axes": axes, "grid": list(grid), "stride": list(stride), "statistics": front[1]}
    mapped = len(state) + len(tensors.head)
    frames = frames_of(grid, patch_of(settings), stride)
    return SourceModel(settings, frames, front[0], state, mapped, tensors.left_out, head, {**known, **(facts or {})})
