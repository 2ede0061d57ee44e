"""What a user asks of a conversion, and what one kind of file gives: our names, our axes, and what was left out.

Letters: T frames, F mel bins, P patches, D width, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.config import SIZES, EncoderSettings, FrontEndSettings
from asit.config.yaml import build
from asit.errors import CheckpointError, ConfigError
from asit.model.card import check_front_end
from asit.model.classifier import Pooling
from asit.model.imagenet import HEAD_WIDTH
from asit.model.positions import whole_frames

MEAN, STD = -4.2677393, 4.5689974
"""AudioSet's, with which AST, SSAST and ASiT were trained (YuanGongND/ast, egs/audioset; Sara-Ahmed/ASiT)."""

FINE_TUNED = {35: ("Speech Commands", -6.845978, 5.5654526), 50: ("ESC-50", -6.6268077, 5.358466)}
"""Data set, mean and std of AST's recipes (egs/speechcommands, egs/esc50), by their number of classes."""

PUBLISHED = "AudioSet's, as published with the code"
SAID = "as given"

LONGEST = 100_000
"""Frames that positions are resized to at most, a quarter of an hour: beyond, attention takes all memory there is."""


@dataclass(frozen=True)
class Ask:
    """What the user says about a file; None: read off the file, or the published default.

    Attributes:
        kind: see `detect.KINDS`, or "auto".
        which: network of an ASiT pretraining.
        frames: T that the positions are to be resized to.
        seconds: the same in seconds.
        stride: step from patch to patch as (frames, mel bins), of the source.
        mels: F of the source.
        rate: Hz.
        mean: of the log-mel.
        std: of the log-mel.
        labels: file with the names of the classes.
        answer: whether a clip has one class or several.
        pooling: what the head reads.
        license: of the weights, for the card.
        no_head: take the encoder alone, whatever is beside it.
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


@dataclass
class TakenHead:
    """A linear classifier on the tokens.

    Attributes:
        state: "linear.weight", "linear.bias" and, where it has a norm, "norm.weight" and "norm.bias".
        pooling: what it reads.
        eps: of its norm.
        classes: names of the outputs where the source has them.
        multi: whether a clip may have several, where the source says so.
    """

    state: dict[str, Tensor]
    pooling: Pooling = "class"
    eps: float = 1e-5
    classes: tuple[str, ...] | None = None
    multi: bool | None = None


@dataclass
class Taken:
    """What a file gives.

    Attributes:
        settings: of the encoder.
        frames: T of the positions.
        front_end: with mean and std.
        state: the encoder's tensors, in our names and axes.
        mapped: how many of the file's tensors went into encoder and head.
        left_out: the file's other entries, and why.
        head: where there is one.
        source: facts for the card.
        notes: what was assumed or changed, for the user.
    """

    settings: EncoderSettings
    frames: int
    front_end: FrontEndSettings
    state: dict[str, Tensor]
    mapped: int
    left_out: dict[str, str]
    head: TakenHead | None = None
    source: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


OURS = re.compile(
    r"(cls_token|dist_token|pos_embed|(patch_embed\.proj|norm"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias))"
)
"""Names of an encoder's tensors: timm's, the official ASiT's and ours."""

Rule = tuple[str, str]
"""A regular expression for whole names, and why these tensors are left out."""


_INNER = re.compile(r"(blocks|layers|patch_embed|embeddings|norm|cls_token|dist_token|pos_embed|rel_pos|reg_token)")
"""How names of what an encoder computes with begin: none of them may be left out."""
NO_HEAD = "outside the encoder, left out as asked (--no-head)"


def sort_out(
    path: Path,
    found: Mapping[str, Tensor],
    rules: Iterable[Rule],
    prefix: str = "",
    heads: Iterable[str] = (),
    no_head: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """Every name of a file has its place: the encoder's, a head's, or one of the reasons to leave it out.

    Args:
        found: tensors by name.
        rules: what is left out, by the names in the file.
        prefix: before the names of the encoder's tensors.
        heads: names of a head's tensors.
        no_head: leave out what is outside the encoder.

    Returns:
        the encoder's tensors without the prefix, the head's, and the reasons for the others.

    Raises:
        CheckpointError: names without a place.
    """
    rules, heads = list(rules), set(heads)
    state: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    unknown = []
    for name, value in found.items():
        own = name.removeprefix(prefix)
        if name.startswith(prefix) and OURS.fullmatch(own):
            state[own] = value
        elif name in heads and not no_head:
            head[name] = value
        elif reason := next((why for pattern, why in rules if re.fullmatch(pattern, name)), None):
            left_out[name] = reason
        elif no_head and not _within(name, prefix):
            left_out[name] = NO_HEAD
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{path} has {len(unknown)} tensors without a place ({', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}), beside {len(state)} of an encoder",
            "tensors of the encoder, of its head, or of parts that are known to be left out",
            "say with --kind what the file is; a network that was changed cannot be converted"
            if any(_within(name, prefix) for name in unknown)
            else "pass --no-head to take the encoder alone: these are outside it",
        )
    if not state:
        raise CheckpointError(f"{path} has no tensors of an encoder", "such as cls_token and blocks.0.norm1.weight")
    return state, head, left_out


def _within(name: str, prefix: str) -> bool:
    """Whether a name is of what the encoder computes with."""
    return name.startswith(prefix) and _INNER.match(name.removeprefix(prefix)) is not None


def settings_of(
    path: Path, state: Mapping[str, Tensor], stride: tuple[int, int] | None = None, **over: Any
) -> EncoderSettings:
    """The encoder's settings as its tensors, in our axes, show them.

    Args:
        stride: step from patch to patch as (frames, mel bins); None: the patch's own.
        over: settings that the tensors do not show: heads, norm_eps.

    Raises:
        CheckpointError: tensors that every encoder has are missing or of another shape.
    """
    filters, fc1 = shaped(path, state, "patch_embed.proj.weight", 4), shaped(path, state, "blocks.0.mlp.fc1.weight", 2)
    width, channels, *patch = filters
    numbers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    depth, heads = len(numbers), int(over.pop("heads", width // HEAD_WIDTH))
    if channels != 1 or numbers != set(range(depth)) or min(filters) < 1 or heads < 1 or width % heads:
        raise CheckpointError(
            f"{path} has {channels} channels, a width of {width} and blocks {sorted(numbers)[:3]} to {max(numbers)}",
            f"1 channel, blocks from 0 on without a gap, and heads of {HEAD_WIDTH}",
            "image weights have 3 channels: --kind vit" if channels == 3 else "give an unchanged network",
        )
    for i in range(depth):  # before an encoder of that size is made: what the file says must be what it holds
        for name, want in (("attn.qkv", (3 * width, width)), ("mlp.fc1", fc1)):
            if shaped(path, state, f"blocks.{i}.{name}.weight", 2) != want:
                raise CheckpointError(
                    f"{path} has blocks.{i}.{name}.weight of shape {tuple(state[f'blocks.{i}.{name}.weight'].shape)}",
                    f"{want}: its patches are {width} wide",
                    "give an unchanged network",
                )
    size = next((name for name, shape in SIZES.items() if shape == (width, depth, heads)), None)
    shape: dict[str, Any] = (
        {"size": size} if size else {"size": "custom", "width": width, "depth": depth, "heads": heads}
    )
    if stride is not None and stride != tuple(patch):
        shape |= {"patch_stride_frames": stride[0], "patch_stride_mels": stride[1]}
    shape |= {"patch_frames": patch[0], "patch_mels": patch[1], "mlp_ratio": fc1[0] / width}
    return build(EncoderSettings, {**shape, **over, "distilled": "dist_token" in state}, str(path))


def shaped(path: Path, state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that has to be there.

    Raises:
        CheckpointError: it is not, or has another number of axes.
    """
    found = state.get(name)
    if found is None or found.ndim != axes or 0 in found.shape:
        raise CheckpointError(
            f"{path} has {'no ' + name if found is None else f'{name} of shape {tuple(found.shape)}'}",
            f"{name} with {axes} axes",
            "say with --kind what the file is",
        )
    return tuple(found.shape)


def whole(ask: Ask, settings: EncoderSettings, heard: FrontEndSettings) -> int | None:
    """T that is asked for, of whole columns of patches; None: nothing is.

    Raises:
        ConfigError: both frames and seconds are given, or more than `LONGEST`.
    """
    if ask.frames is not None and ask.seconds is not None:
        raise ConfigError("frames and seconds are both asked for", "one of them", "leave --frames or --seconds out")
    frames = ask.frames
    if ask.seconds is not None:
        frames = whole_frames(FrontEnd(heard).frames_for(round(ask.seconds * heard.rate)), settings)
    if frames is not None and frames > LONGEST:
        raise ConfigError(
            f"positions for {frames} frames are asked for",
            f"at most {LONGEST}: the longest input that is seen at once",
            "leave it out: longer sounds are heard in windows",
        )
    return frames


def front_end(ask: Ask, mels: int, **known: Any) -> tuple[FrontEndSettings, str]:
    """The front end of a source, and where its mean and std are from; what the user gave comes before what is known.

    Raises:
        ConfigError: numbers that cannot be.
    """
    given = {name: value for name in ("rate", "mean", "std") if (value := getattr(ask, name)) is not None}
    origin = SAID if {"mean", "std"} <= set(given) else str(known.pop("origin", PUBLISHED))
    if len({"mean", "std"} & set(given)) == 1:
        origin = f"{SAID} in part, else {origin}"
    known.pop("origin", None)
    facts = {"mean": MEAN, "std": STD} | known | given | {"mels": mels}
    try:
        settings = FrontEndSettings(**facts)
        check_front_end(settings)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        said = ", ".join(f"{name} {value}" for name, value in facts.items())
        raise ConfigError(
            f"a front end of {said}",
            "a rate and mel bins above 0 and within reason, a mean, and a std above 0",
            "give what the network was trained with: --rate, --mels, --mean, --std",
        ) from error
    return settings, origin
