"""Settings of a fine-tuning run: from a pretrained encoder, or none, to a scored classifier.

Recipes of AST (arXiv 2104.01778), SSAST (2110.09784), AudioMAE (2207.06405), EAT (2401.03497) and others are named
where a default comes from one of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from asit.config.base import AboveZero, Auto, Count, NonNegative, Positive, Seed, Settings, Share
from asit.config.model_settings import EncoderSettings, FrontEndSettings
from asit.config.record_settings import RecordSettings


class InputSettings(Settings):
    """What the network is shown of a clip."""

    seconds: AboveZero | Auto = "auto"
    """Length of the input; a shorter clip is padded by the front end's rule, of a longer one training sees a random
    part and scoring all windows; auto: the longest of 19 in 20 training clips, at most 10 s."""
    window_overlap: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Overlap of the windows over which a longer clip is scored; their probabilities are averaged."""
    keep_gb: NonNegative | Auto = "auto"
    """Each loader process keeps decoded recordings in memory when all of them take at most this many GB; auto: a
    twentieth of the machine's memory."""


class NetworkSettings(Settings):
    """The head, and what of the encoder may differ from its pretraining."""

    pooling: Literal["class", "mean", "class+mean"] = "class+mean"
    """What the head reads: the class token, the mean of the patch tokens, or both side by side."""
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


class SideSettings(Settings):
    """Which clips train, choose and score."""

    train: tuple[str, ...] = ("train", "balanced", "unbalanced")
    """Splits to train on; the usual synonyms (training; val, valid, dev; testing, eval) are one name."""
    validation: tuple[str, ...] = ("validation",)
    """Splits that choose the best epoch."""
    test: tuple[str, ...] = ("test",)
    """Splits that are only scored."""
    fold: str = ""
    """This fold is the test side, all others train; "all": each fold in turn, with mean and spread."""
    hold_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training side that becomes the validation side where the data have none."""
    unseen_classes: Literal["error", "skip"] = "error"
    """What to do where validation or test clips have a class that no training clip has: stop, or leave these clips out,
    go on without the class, and say so in the results."""
    shared_groups: bool = False
    """Groups (such as speakers) may lie on several sides, as in speaker identification."""


class ValidationSettings(Settings):
    """How often the validation side is scored."""

    every: Count = 1
    """Epochs between scores of the validation side; 0: never, and no best epoch is chosen."""
    metric: Literal["auto", "accuracy", "balanced_accuracy", "mAP"] = "auto"
    """What the best epoch is chosen by; auto: accuracy, for several labels a clip mAP."""


class ClassifierLossSettings(Settings):
    """The loss; soft labels (from mixup, smoothing or the data) stay soft under both kinds."""

    kind: Literal["auto", "ce", "bce"] = "auto"
    """ce: cross-entropy over the classes; bce: binary cross-entropy for each class; auto: ce for one label a clip."""
    smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing: this share of a target is spread evenly over all classes."""


class FinetuneOptimSettings(Settings):
    """AdamW, its schedule, layer-wise decay, and averaging of weights."""

    lr: AboveZero = 5e-4
    """Peak learning rate of the head and the last block, as it is: not scaled with the batch."""
    min_lr: NonNegative = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: NonNegative | Auto = "auto"
    """Epochs of linear warm-up; auto: a tenth of the run, at most 10."""
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
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's betas (AST: 0.95, 0.999)."""
    clip: NonNegative = 3.0
    """Largest norm of the whole gradient; 0: no clipping."""
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


class FinetuneSettings(Settings):
    """One fine-tuning run, whole: the file RUN/config.yaml is this, resolved."""

    data: str = ""
    """Catalogue with labels, labelled table, folder with one sub-folder a class, or shards with labels: their index or
    folder, as a path or a URL."""
    out: str = ""
    """The run's folder."""
    model: str = ""
    """Model to start from, wherever `asit.load` finds one; a file of ImageNet ViT weights (timm's names); or "none":
    fresh weights."""
    task: str = "any"
    """The recipe these settings started from."""
    fresh: bool = False
    """Take the model's architecture and front end with fresh weights: the baseline from scratch."""
    seed: Seed = 0
    """Seed of every draw."""
    label_seed: Seed | Auto = "auto"
    """Seed of the draw of sampling.share or per_class; auto: the seed."""
    labels: Literal["auto", "single", "multi"] = "auto"
    """One label a clip or several; auto: as found in the data."""
    epochs: Positive = 50
    """Passes over the training clips."""
    batch_size: Positive = 64
    """Clips in a step, over all processes and accumulation steps."""
    accumulate: Positive = 1
    """Forward and backward passes a step."""
    score_batch: Positive = 64
    """Clips scored together; it does not depend on the number of processes, so neither do scores."""
    stop_after: Count = 0
    """Stop after this many steps of the schedule, with a checkpoint; 0: go to the end."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the network; weights and optimiser stay float32."""
    workers: Count | Auto = "auto"
    """Loader processes for each training process."""
    threads: Count = 0
    """CPU threads of each training process; 0: torch's choice, and where a run goes on, as many as it began with."""
    process_timeout: AboveZero = 30.0
    """Minutes that a process waits for the others before the run stops (torch's own: 30 with gloo, 10 with NCCL). A
    process that dies is noticed at once; this is for one that hangs, and must be longer than a probe takes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: ddp: each holds everything and gradients are averaged; fsdp: weights,
    gradients and optimiser are in shards, a block's weights gathered when its turn comes (for networks too large for
    one device). Checkpoints are the same files; may change when a run goes on."""
    checkpoint_activations: bool = False
    """Keep each block's input alone for the backward pass and compute the rest again: less memory, about a third more
    work (arXiv 1604.06174). The gradients are the same."""
    compile: bool | Auto = False
    """Compile the network's blocks with torch.compile, where it works; auto: on a CUDA device."""
    front_end_on: Literal["auto", "loader", "device"] = "auto"
    """Where the log-mels of training are computed: by the loader's processes, or on the training device for a whole
    batch, whose waveforms the loader hands over; auto: there on a CUDA device, else by the loader. Equal but for
    rounding."""
    bad_files: Share = 0.1
    """Share of unusable files above which the run stops instead of leaving them out."""
    front_end: FrontEndSettings = Field(default_factory=FrontEndSettings)
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    input: InputSettings = Field(default_factory=InputSettings)
    network: NetworkSettings = Field(default_factory=NetworkSettings)
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    sides: SideSettings = Field(default_factory=SideSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    loss: ClassifierLossSettings = Field(default_factory=ClassifierLossSettings)
    optim: FinetuneOptimSettings = Field(default_factory=FinetuneOptimSettings)
    records: RecordSettings = Field(default_factory=RecordSettings)
