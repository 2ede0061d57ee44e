"""Settings of a fine-tuning run.

Recipes of AST (arXiv 2104.01778), SSAST (2110.09784), AudioMAE (2207.06405), EAT (2401.03497) and others are named
where a default comes from one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from asit.config import yaml
from asit.config.base import AboveZero, Auto, Count, NonNegative, Positive, Seed, Settings, Share
from asit.config.run_settings import OptimSettings, RunSettings, refuse, shared_conflicts


class InputSettings(Settings):
    """The network's input."""

    seconds: AboveZero | Auto = "auto"
    """Length of the input; a shorter clip is padded by the front end's rule; training takes a random part of a longer
    one, scoring all its windows; auto: the longest of 19 in 20 training clips, at most 10 s."""
    window_overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Overlap of the windows over which a longer clip is scored; their probabilities are averaged."""
    keep_gb: NonNegative | Auto = "auto"
    """Each loader process keeps decoded recordings in memory when all of them take at most this many GB; auto: a
    twentieth of the machine's memory."""


class NetworkSettings(Settings):
    """The head, and what of the encoder may differ from its pretraining."""

    pooling: Literal["class", "mean", "class+mean"] = "class+mean"
    """What the head reads: the class token, the mean of the patch tokens, or both concatenated."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout in front of the head's linear layer."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth, linear in depth."""
    stride_frames: Positive | None = None
    """Step between patches in frames; less than the patch's height makes them overlap (AST: 10); none: no overlap."""
    stride_mels: Positive | None = None
    """Step between patches in mel bins (AST: 10); none: no overlap."""


class AugmentSettings(Settings):
    """What training does to its clips; scoring does none of it."""

    mixup: NonNegative = 0.0
    """Waveforms are mixed with a weight from Beta(mixup, mixup), their labels likewise; 0: never (AST: 10)."""
    mixup_probability: Share = 0.5
    """Share of clips that are mixed with another one (AST: 0.5)."""
    roll_seconds: NonNegative = 0.0
    """Largest circular shift of the waveform, either way (AST, Speech Commands: 0.1)."""
    gain_db: NonNegative = 0.0
    """The level moves by a uniform draw within plus or minus this, in dB."""
    noise: NonNegative = 0.0
    """Normal noise on the normalised log-mel, its standard deviation drawn from U(0, noise)."""
    stretch: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.0
    """The clip is cut between 1 - stretch and 1 + stretch times its length and resized to it in time."""
    mel_warp: Annotated[float, Field(ge=0.0, lt=0.9)] = 0.0
    """The mel axis is scaled by a uniform draw from 1 - mel_warp to 1 + mel_warp (a change of voice size)."""
    mel_mask: Count = 0
    """Largest height in mel bins of the stripe that is wiped (SpecAugment, arXiv 1904.08779)."""
    time_mask: Count = 0
    """Largest width in frames of the stripe that is wiped (SpecAugment)."""
    masks: Positive = 1
    """Stripes on each axis."""


class SamplingSettings(Settings):
    """Which labelled clips are trained on, and how often."""

    order: Literal["shuffle", "balanced", "inverse"] = "shuffle"
    """shuffle: each clip once an epoch; balanced: drawn by the sum over its labels of 1000 / (count + 0.01) (AST's
    rule); inverse: drawn by 1 / count of its class (SUPERB's rule)."""
    epoch_clips: Count = 0
    """Clips of an epoch where they are drawn; 0: as many as there are (AudioMAE on AudioSet-2M: 200,000)."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training labels that is used, drawn for each class; at least one clip each."""
    per_class: Count = 0
    """Labelled clips of each class that are used; 0: see share."""


class SplitSettings(Settings):
    """Which clips train, choose and score."""

    train: tuple[str, ...] = ("train", "balanced", "unbalanced")
    """Splits to train on; the usual synonyms (training; val, valid, dev; testing, eval) are one name."""
    validation: tuple[str, ...] = ("validation",)
    """Splits that choose the best epoch."""
    test: tuple[str, ...] = ("test",)
    """Splits that are only scored."""
    fold: str = ""
    """This fold is the test split, all others train; "all": each fold in turn, with mean and spread."""
    hold_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training split that becomes the validation split where the data have none."""
    unseen_classes: Literal["error", "skip"] = "error"
    """What to do where validation or test clips have a class that no training clip has: stop, or leave these clips and
    the class out and record it in the results."""
    shared_groups: bool = False
    """Groups (such as speakers) may be in several splits, as in speaker identification."""


class ValidationSettings(Settings):
    """How often the validation split is scored."""

    every: Count = 1
    """Epochs between scores of the validation split; 0: never, and no best epoch is chosen."""
    metric: Literal["auto", "accuracy", "balanced_accuracy", "mAP"] = "auto"
    """What the best epoch is chosen by; auto: accuracy, for several labels a clip mAP."""


class ClassifierLossSettings(Settings):
    """The loss; soft labels (from mixup, smoothing or the data) stay soft under both kinds."""

    kind: Literal["auto", "ce", "bce"] = "auto"
    """ce: cross-entropy over the classes; bce: binary cross-entropy for each class; auto: ce for one label a clip."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing: this share of a target is spread evenly over all classes."""


class FinetuneOptimSettings(OptimSettings):
    """AdamW, its schedule, layer-wise decay, and averaging of weights."""

    lr: AboveZero = 5e-4
    """Peak learning rate of the head and the last block, as it is: not scaled with the batch."""
    schedule: Literal["cosine", "step"] = "cosine"
    """After the warm-up: half a cosine, or steps (below)."""
    step_from: NonNegative = 5.0
    """Epoch of the first step of the step schedule (AST, ESC-50 and Speech Commands: 5)."""
    step_every: AboveZero = 1.0
    """Epochs between steps."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Factor of each step (AST: 0.85; on AudioSet 0.5)."""
    weight_decay: NonNegative = 0.05
    """Weight decay; none on biases and one-dimensional parameters."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Each block's learning rate is this times that of the one above it (AudioMAE: 0.75; EAT: 0.65); 1: the same."""
    head_lr: AboveZero = 1.0
    """The head's learning rate over lr."""
    average: Literal["none", "ema", "epochs"] = "none"
    """Weights that are scored and saved: the last ones, their moving average, or the mean over the ends of epochs."""
    ema: Share = 0.999
    """Momentum of the moving average, for each step."""
    average_from: NonNegative | Auto = "auto"
    """Epoch from which the ends of epochs enter the mean (AST, AudioSet-2M: 1; 20K: 6); auto: the second half."""


class FinetuneSettings(RunSettings):
    """Settings of a fine-tuning run."""

    VERB: ClassVar[str] = "asit finetune"
    PURPOSE: ClassVar[str] = "fine-tuning"
    RECIPE: ClassVar[str] = "task"
    DEFAULT_RECIPE: ClassVar[str] = "any"

    data: str = ""
    """Catalogue with labels, labelled table, folder with one sub-folder a class, or shards with labels: their index or
    folder, as a path or a URL."""
    model: str = ""
    """Model to start from, wherever `asit.load` finds one; a file of ImageNet ViT weights (timm's names); or "none":
    fresh weights."""
    task: str = "any"
    """The recipe these settings started from."""
    fresh: bool = False
    """Take the model's architecture and front end with fresh weights: the baseline from scratch."""
    epochs: Positive = 50
    """Passes over the training clips."""
    batch_size: Positive = 64
    """Clips in a step, over all processes and accumulation steps."""
    label_seed: Seed | Auto = "auto"
    """Seed of the draw of sampling.share or per_class; auto: the seed."""
    labels: Literal["auto", "single", "multi"] = "auto"
    """One label a clip or several; auto: as found in the data."""
    score_batch: Positive = 64
    """Clips scored together; it does not depend on the number of processes, so neither do scores."""
    input: InputSettings = Field(default_factory=InputSettings)
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    sides: SplitSettings = Field(default_factory=SplitSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    loss: ClassifierLossSettings = Field(default_factory=ClassifierLossSettings)
    optim: FinetuneOptimSettings = Field(default_factory=FinetuneOptimSettings)


class ResolvedInput(InputSettings):
    """Input settings without auto."""

    seconds: AboveZero
    keep_gb: NonNegative


class ResolvedValidation(ValidationSettings):
    """Validation settings without auto."""

    metric: Literal["accuracy", "balanced_accuracy", "mAP"]


class ResolvedClassifierLoss(ClassifierLossSettings):
    """Loss settings without auto."""

    kind: Literal["ce", "bce"]


class ResolvedFinetuneOptim(FinetuneOptimSettings):
    """Optimiser settings without auto."""

    warmup: NonNegative
    average_from: NonNegative


class ResolvedFinetuneSettings(FinetuneSettings):
    """Settings of a run whose data, model and device are known: what enters a step or a score is a value."""

    label_seed: Seed
    labels: Literal["single", "multi"]
    input: ResolvedInput
    validation: ResolvedValidation
    loss: ResolvedClassifierLoss
    optim: ResolvedFinetuneOptim


def resolve(settings: FinetuneSettings, *, multi: bool, found: Mapping[str, Any]) -> ResolvedFinetuneSettings:
    """Return the settings with every auto that enters a step or a score as a value.

    Args:
        settings: checked.
        multi: whether a clip may have several labels, or soft ones.
        found: nested values of what the data, the model, the device and the processes decide, `input.seconds` and
            `input.keep_gb` among them; they replace those of `settings`.
    """
    autos = {
        "optim.warmup": min(10.0, 0.1 * settings.epochs),
        "optim.average_from": 0.5 * settings.epochs,
        "loss.kind": "bce" if multi else "ce",
        "validation.metric": "mAP" if multi else "accuracy",
        "label_seed": settings.seed,
    }
    values = yaml.fill_auto(settings.model_dump(), autos) | {"labels": "multi" if multi else "single"}
    return ResolvedFinetuneSettings.model_validate(yaml.merge(values, found))


def check(settings: FinetuneSettings) -> None:
    """Refuse settings that cannot go together.

    Raises:
        ConfigError: lists all of them.
    """
    o, sampling, wrong = settings.optim, settings.sampling, shared_conflicts(settings)
    if o.average == "epochs" and o.average_from != "auto" and o.average_from > settings.epochs:
        wrong.append(
            f"epochs is {settings.epochs} and optim.average_from is {o.average_from:g}: there would be no average; "
            "take auto, or more epochs"
        )
    if sampling.share < 1.0 and sampling.per_class:
        wrong.append(f"sampling.share is {sampling.share:g} and sampling.per_class {sampling.per_class}: take one")
    if sampling.order == "shuffle" and sampling.epoch_clips:
        wrong.append(
            f"sampling.epoch_clips is {sampling.epoch_clips} and sampling.order shuffle, which takes every clip once; "
            "take sampling.order balanced or inverse"
        )
    if settings.fresh and settings.model == "none":
        wrong.append("model is none and fresh is on: with none the weights are fresh already; leave out fresh")
    if o.average == "epochs" and o.average_from == 0:
        wrong.append(
            "optim.average is epochs and optim.average_from 0: the first end of an epoch is that of epoch 1; take 1"
        )
    refuse(wrong)
