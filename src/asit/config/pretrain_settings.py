"""Settings of a pretraining run.

"v1" and "v2" are the two published versions of the official code; the paper is arXiv 2211.13189.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from asit.config import yaml
from asit.config.base import AboveZero, Auto, Count, NonNegative, Positive, Settings, Share
from asit.config.custom_classes import ClassName
from asit.config.run_settings import OptimSettings, RunSettings, refuse, shared_conflicts


class ViewSettings(Settings):
    """What is cut out of a recording."""

    segment_seconds: AboveZero = 10.0
    """A recording longer than this counts as several clips of this length; both views come from one clip."""
    seconds: AboveZero | Auto = "auto"
    """Length of a global view; auto: 6 s (the paper), less where clips or segment_seconds are below 10 s."""
    local_views: Count = 0
    """Short clean views for the student only (v1: none; v2: 4)."""
    local_seconds: AboveZero | Auto = "auto"
    """Length of a local view; auto: a third of a global one (v2: 2 s), at least a patch."""
    roll: Share = 0.5
    """Probability of a circular roll of the clip's waveform (v1: 0.5; v2: 0)."""
    gain_db: NonNegative = 0.0
    """Each view's level moves by a uniform draw within plus or minus this, in dB."""
    stretch: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.0
    """Each view is cut between 1 - stretch and 1 + stretch times its length and resized to it in time."""
    mel_warp: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.0
    """Each view's mel axis is scaled by a uniform draw from 1 - mel_warp to 1 + mel_warp (a change of voice size)."""
    keep_gb: NonNegative | Auto = "auto"
    """Each loader process keeps decoded recordings in memory when all of them take at most this many GB; auto: a
    twentieth of the machine's memory."""
    order: Literal["random", "blocks"] = "random"
    """random: each epoch a permutation of the clips; blocks: neighbours in a shard come together, so that shards on an
    object store are read by a seventh of the requests (our own; measured by bench/shards.py)."""
    block: Positive = 8
    """Clips of a block, for order blocks."""
    short_files: Literal["pad", "skip"] = "pad"
    """A file shorter than a view is padded by the front end's rule, or left out; either is counted and logged."""


class MaskingSettings(Settings):
    """GMML: groups of connected patches wiped or replaced in what the student sees."""

    drop: Share = 0.7
    """Largest share of a view's area wiped; the share is U(min(0.5, drop), drop) (v1: 0.7; v2: 0.5)."""
    fill: Literal["zeros", "noise", "time", "freq"] = "zeros"
    """zeros: the mean after normalisation; noise: standard normal at half scale (the scale of normalised
    input); time: complete frames; freq: complete mel bins."""
    replace: Share = 0.3
    """Share of the area replaced by the same area of another clip's view (v1, v2: 0.3)."""
    replace_probability: Share = 0.5
    """Probability that a view is replaced instead of dropped (v1, v2: 0.5)."""
    combine: bool = False
    """Replace and drop in the same view; never done by the official code."""
    align: bool = False
    """Blocks start and end on patch borders (the paper's figure); officially per pixel."""
    max_block: Annotated[float, Field(gt=0.0, le=1.0)] = 0.3
    """Largest height or width of a block over that of the view (v1, v2: 0.3)."""
    donor_pool: Annotated[int, Field(ge=2, le=2**31 - 1)] = 4
    """Replacements come from the other clips in groups of this many neighbours in a step's batch. Where clips a process
    and pass are no multiple of it, donors of its neighbours are read too, so that the draw does not depend on them."""
    copies: Positive = 1
    """Masked copies of each global view that the student sees in a step, each with a mask of its own; the teacher sees
    the view once (data2vec 2.0, arXiv 2212.07525, and EAT, arXiv 2401.03497, have several; v1, v2: 1)."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a global view's patches that the student's encoder sees; the same number in each view, those wiped most
    are left out first, and what is left out counts as wiped. A decoder fills the grid again for the patch losses
    (masked autoencoders, arXiv 2111.06377; EAT sees 0.2). 1: all patches and no decoder (v1, v2). Below 1 `align`
    makes what is left out and what is wiped the same patches."""
    decoder_depth: Positive = 1
    """Blocks of that decoder, as wide as the encoder's; it is not kept with the model."""
    official_bounds: bool = False
    """Officially the upper bounds are exclusive, so the last rows and columns are masked less often."""


class HeadSettings(Settings):
    """Projection and reconstruction heads."""

    hidden: Positive = 2048
    """Width of the two hidden layers of the projection."""
    bottleneck: Positive = 256
    """Width after the projection, where it is L2-normalised."""
    class_prototypes: Positive = 8192
    """Outputs for the class token (v1, v2: 8192)."""
    patch_prototypes: Positive = 1024
    """Outputs for patch tokens (v1: 1024; v2: 8192, shared with the class token)."""
    share_prototypes: bool = False
    """One last layer for both kinds of tokens (v2)."""
    train_norm: bool = False
    """Train the norms of the last layer's weight normalisation (v2)."""
    reconstruction_hidden: tuple[Positive, ...] | Auto = "auto"
    """Hidden widths of the reconstruction head, GELU after each; auto: the token width three times (v2); v1 base:
    768, 768, 128."""


class LossSettings(Settings):
    """Weights, temperatures and centring; a weight of 0 switches a term off."""

    global_weight: NonNegative = 1.0
    """Weight of the class-token loss (v1: 1; v2: 0.5)."""
    local_weight: NonNegative = 1.0
    """Weight of the patch-token loss (v1: 1; v2: 0.5)."""
    reconstruction_weight: NonNegative = 2.0
    """Weight of the reconstruction loss (v1: 2; v2: 1)."""
    local_tokens: Literal["all", "masked"] = "all"
    """Patch tokens that enter the local loss (v1, v2: all)."""
    local_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of each view's patch tokens that the local loss is computed on, drawn for each view, the same number
    in each, masked ones first with `local_tokens` masked; both heads run on these alone (v1, v2: 1)."""
    reconstruction_tokens: Literal["all", "masked"] = "all"
    """Patches that the reconstruction head runs on: all, or those with anything corrupted, which alone enter the loss
    in either case; masked differs in rounding only (v1, v2: all)."""
    student_temperature: AboveZero = 0.1
    """Student temperature."""
    teacher_temperature_start: AboveZero = 0.04
    """Teacher temperature at the start."""
    teacher_temperature: AboveZero = 0.07
    """Teacher temperature after its warm-up."""
    teacher_warmup: NonNegative | Auto = "auto"
    """Epochs of linear temperature warm-up (v1: 30; v2: 5); auto: three tenths of the run, at most 30."""
    centre_momentum: Share = 0.9
    """EMA momentum of the centres."""


class PretrainOptimSettings(OptimSettings):
    """AdamW, its schedules, and the teacher's momentum."""

    lr: AboveZero = 5e-4
    """Peak learning rate for a global batch of 256; scaled linearly with the batch."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """How the learning rate falls after the warm-up: half a cosine (v1, v2), a straight line, or wsd: held at the peak,
    and in the last fifth down by one minus a square root (arXiv 2405.18392)."""
    weight_decay: NonNegative = 0.04
    """Weight decay at the start (cosine); none on biases and one-dimensional parameters."""
    weight_decay_end: NonNegative = 0.4
    """Weight decay at the end."""
    clip_per_parameter: bool = True
    """Clip each parameter tensor by itself (v1, v2) instead of all gradients together."""
    teacher_momentum: Share = 0.996
    """EMA momentum of the teacher at the start; cosine to the value below."""
    teacher_momentum_end: Share = 1.0
    """EMA momentum at the end."""
    freeze_last_layer: NonNegative | Auto = "auto"
    """Epochs in which the projection's last layers stay fixed (v2: 1; v1 sets 1, without effect: its name test
    misses); auto: a hundredth of the run, at most 1."""


class ProbeSettings(Settings):
    """A probe on a labelled table during pretraining: a signal only, nothing is trained by it."""

    table: str | None = None
    """Labelled table (CSV, TSV or JSONL: path, label, split), or a catalogue or shards with these; none: no probe."""
    every: Positive = 1000
    """Steps between probes."""
    clips: Positive = 2000
    """At most this many clips of each split, drawn with the run's seed."""


class CustomSettings(Settings):
    """Classes of one's own, as module:Class or module:Class(width=8); see docs/research.md."""

    mask: ClassName = ""
    """Draws the masks instead of drop, fill's shape, replace and the blocks of `masking`."""
    view: ClassName = ""
    """Changes each view's normalised log-mel, in the loader."""
    objective: ClassName = ""
    """A further loss on the student's tokens, with parameters of its own."""
    objective_weight: AboveZero = 1.0
    """Weight of that loss."""


class PretrainSettings(RunSettings):
    """Settings of a pretraining run."""

    VERB: ClassVar[str] = "asit pretrain"
    PURPOSE: ClassVar[str] = "pretraining"
    RECIPE: ClassVar[str] = "preset"
    DEFAULT_RECIPE: ClassVar[str] = "default"
    CONTINUED_RECIPE: ClassVar[str] = "adapt"
    """The default where pretraining continues from a model."""

    data: str = ""
    """Folder of recordings, a catalogue written by `asit catalogue`, a table, or shards: their index or folder, as a
    path or a URL, or tars without an index."""
    splits: tuple[str, ...] = ()
    """Splits of the data to pretrain on, such as train: the test split should not be among them; none: all clips."""
    model: str = ""
    """Model to continue from, wherever `asit.load` finds one: its card decides the front end and the encoder; or a
    file of ImageNet ViT weights (timm's names), with the front end and the encoder of the preset; none: fresh
    weights."""
    keep_heads: bool = False
    """Go on with the heads and centres that the model keeps of its pretraining (`asit convert --keep-heads`), whose
    widths and prototypes are then those of `heads`; officially a checkpoint's, which holds both."""
    preset: str = "default"
    """The recipe these settings started from; with `model` the default is adapt."""
    views: ViewSettings = Field(default_factory=ViewSettings)
    masking: MaskingSettings = Field(default_factory=MaskingSettings)
    heads: HeadSettings = Field(default_factory=HeadSettings)
    losses: LossSettings = Field(default_factory=LossSettings)
    optim: PretrainOptimSettings = Field(default_factory=PretrainOptimSettings)
    probe: ProbeSettings = Field(default_factory=ProbeSettings)
    custom: CustomSettings = CustomSettings()

    later: ClassVar[tuple[str, ...]] = ("custom",)


class ResolvedPretrainOptim(PretrainOptimSettings):
    """Optimiser settings without auto."""

    warmup: NonNegative
    freeze_last_layer: NonNegative


class ResolvedLosses(LossSettings):
    """Loss settings without auto."""

    teacher_warmup: NonNegative


class ResolvedPretrainSettings(PretrainSettings):
    """Settings of a run whose data, device and length are known: what enters a step is a number."""

    optim: ResolvedPretrainOptim
    losses: ResolvedLosses


def resolve(settings: PretrainSettings, found: Mapping[str, Any] | None = None) -> ResolvedPretrainSettings:
    """Return the settings with every auto that enters a step as a number.

    Args:
        settings: checked.
        found: nested values of what the data, the device and the processes decide; they replace those of `settings`.
    """
    epochs = settings.epochs
    autos = {
        "optim.warmup": min(10.0, 0.1 * epochs),
        "optim.freeze_last_layer": min(1.0, 0.01 * epochs),
        "losses.teacher_warmup": min(30.0, 0.3 * epochs),
    }
    values = yaml.fill_auto(settings.model_dump(), autos)
    return ResolvedPretrainSettings.model_validate(yaml.merge(values, found or {}))


def check(settings: PretrainSettings) -> None:
    """Refuse settings that cannot go together; front end and encoder of a model's card are checked when it is read.

    Raises:
        ConfigError: lists all of them.
    """
    loss, m, wrong = settings.losses, settings.masking, shared_conflicts(settings)
    custom = settings.custom
    if loss.global_weight == loss.local_weight == loss.reconstruction_weight == 0 and not custom.objective:
        wrong.append(
            "losses.global_weight, local_weight and reconstruction_weight are all 0: nothing would be learnt; "
            "raise one of them"
        )
    if (
        loss.reconstruction_weight > 0
        and loss.global_weight == loss.local_weight == 0
        and m.drop == 0
        and m.replace == 0
        and not (custom.mask or custom.objective)
    ):
        wrong.append(
            "masking.drop and masking.replace are 0 and reconstruction is the only loss: nothing is corrupted; "
            "raise one of these, or losses.global_weight"
        )
    if settings.heads.share_prototypes and settings.heads.class_prototypes != settings.heads.patch_prototypes:
        wrong.append(
            f"heads.share_prototypes is on, class_prototypes is {settings.heads.class_prototypes} and "
            f"patch_prototypes is {settings.heads.patch_prototypes}: they must be equal; give one of them alone"
        )
    if custom.view and settings.front_end_on == "device":
        wrong.append(
            f"custom.view is {custom.view} and front_end_on is device: views are changed where the loader makes them; "
            "take front_end_on loader"
        )
    if settings.keep_heads and not settings.model:
        wrong.append("keep_heads is on and no model is given, whose heads would be kept; leave out keep_heads")
    if settings.model == "none":
        wrong.append("model is none: pretraining starts from fresh weights where no model is given; leave out model")
    refuse(wrong if settings.model else wrong + shape_conflicts(settings))


def shape_conflicts(settings: PretrainSettings) -> list[str]:
    """Return what pretraining cannot do of a front end and an encoder."""
    wrong = []
    if settings.front_end.mels % settings.encoder.patch_mels:
        mels, step = settings.front_end.mels, settings.encoder.patch_mels
        near = " or ".join(str(count * step) for count in (mels // step, mels // step + 1) if count)
        fits = max(size for size in range(1, min(step, mels) + 1) if mels % size == 0)
        wrong.append(
            f"front_end.mels is {mels}, which encoder.patch_mels {step} does not divide; "
            f"take front_end.mels {near}, or encoder.patch_mels {fits}"
        )
    encoder, patch = settings.encoder, (settings.encoder.patch_frames, settings.encoder.patch_mels)
    stride = encoder.patch_stride_frames or patch[0], encoder.patch_stride_mels or patch[1]
    if stride != patch:
        how = "overlap" if stride[0] <= patch[0] and stride[1] <= patch[1] else "leave gaps"
        wrong.append(
            f"patches of {patch} {how}, with a stride of {stride} (time, mel): pretraining needs patches side by "
            f"side; take --encoder.patch-stride-frames {patch[0]} --encoder.patch-stride-mels {patch[1]} (a model's "
            "positions are resized to such a grid), and network.stride_frames and stride_mels in fine-tuning"
        )
    return wrong
