"""Settings that both kinds of run share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from asit.config.base import AboveZero, Auto, Count, NonNegative, Positive, Seed, Settings, Share
from asit.config.custom_classes import ClassName
from asit.config.model_settings import EncoderSettings, FrontEndSettings
from asit.config.table_settings import TableSettings
from asit.errors import ConfigError


class RecordSettings(Settings):
    """What is written down, and how often."""

    log_every: Positive = 10
    """Steps between lines of metrics.jsonl."""
    figure_every: Count = 500
    """Steps between figures of clean, corrupted, reconstructed and mask; 0: none."""
    checkpoint_every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 3
    """Checkpoints kept."""
    save_in_background: bool = True
    """Write checkpoints in the background, from copies of the tensors (which need their memory twice); off: training
    waits until they are written."""
    tensorboard: bool | Literal["auto"] = "auto"
    """Write TensorBoard event files; auto: where the package tensorboard is installed."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers of experiments that get every number too (docs/research.md); one that fails never stops the run."""
    callbacks: tuple[ClassName, ...] = ()
    """Callbacks of one's own, as module:Class or module:Class(every=10); see docs/research.md."""

    later: ClassVar[tuple[str, ...]] = ("trackers", "callbacks")


class OptimSettings(Settings):
    """AdamW settings that both kinds of run share."""

    min_lr: NonNegative = 1e-6
    """Learning rate at the end of the schedule."""
    warmup: NonNegative | Auto = "auto"
    """Epochs of linear warm-up (v1, v2: 10); auto: a tenth of the run, at most 10."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """AdamW's betas (AST: 0.95, 0.999)."""
    clip: NonNegative = 3.0
    """Largest gradient norm; 0: no clipping."""


class RunSettings(TableSettings):
    """Settings of a training run of either kind; RUN/config.yaml holds them resolved."""

    VERB: ClassVar[str]
    """Verb of the command line that trains with these settings."""
    PURPOSE: ClassVar[str]
    """What such a run is called in messages."""
    RECIPE: ClassVar[str]
    """Setting that names the recipe; recipes are in the folder of its plural."""
    DEFAULT_RECIPE: ClassVar[str]

    data: str = ""
    """The recordings: see the two kinds of run."""
    out: str = ""
    """The run's folder."""
    seed: Seed = 0
    """Seed of every draw."""
    epochs: Positive | AboveZero = 100
    """Passes over the training clips, 12.5 for instance (v1, v2: 100)."""
    batch_size: Positive = 128
    """Clips in a step, over all processes and accumulation steps (v1: 4 x 32; v2: 4 x 20)."""
    accumulate: Positive = 1
    """Forward and backward passes a step; each sees batch_size / processes / accumulate clips."""
    stop_after: Count = 0
    """Stop after this many steps of the schedule, with a checkpoint; 0: go to the end."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Arithmetic of the networks; weights and optimiser stay float32."""
    workers: Count | Auto = "auto"
    """Loader processes for each training process."""
    threads: Count = 0
    """CPU threads of each training process; 0: torch's choice, and on resume as many as the run began with."""
    process_timeout: AboveZero = 30.0
    """Minutes that a process waits for the others before the run stops (torch's own: 30 with gloo, 10 with NCCL). A
    process that dies is noticed at once; this is for one that hangs, and must be longer than a probe takes."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: ddp: each holds everything and gradients are averaged; fsdp: weights,
    gradients and optimiser are in shards, a block's weights gathered when its turn comes (for networks too large for
    one device). Checkpoints are the same files; may change on resume."""
    checkpoint_activations: bool = False
    """Keep each block's input alone for the backward pass and recompute the rest: less memory, about a third more
    work (arXiv 1604.06174). The gradients are the same."""
    compile: bool | Auto = False
    """Compile the networks' blocks with torch.compile, where it works; auto: on a CUDA device."""
    front_end_on: Literal["auto", "loader", "device"] = "auto"
    """Where log-mels are computed: by the loader's processes, or on the training device for a batch at once, whose
    waveforms the loader hands over; auto: there on a CUDA device, else by the loader. Equal but for rounding."""
    bad_files: Share = 0.1
    """Share of unusable files above which the run stops instead of leaving them out."""
    front_end: FrontEndSettings = Field(default_factory=FrontEndSettings)
    encoder: EncoderSettings = Field(default_factory=EncoderSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    records: RecordSettings = Field(default_factory=RecordSettings)


def shared_conflicts(settings: RunSettings) -> list[str]:
    """Return the combinations of settings that cannot be, of those that both kinds of run have."""
    found, warmup = [], settings.optim.warmup
    if warmup != "auto" and warmup >= settings.epochs:
        found.append(
            f"epochs is {settings.epochs} and optim.warmup is {warmup:g}: the warm-up must end before the run; "
            "take auto, or more epochs"
        )
    if settings.batch_size % settings.accumulate:
        found.append(
            f"batch_size is {settings.batch_size}, which accumulate {settings.accumulate} does not divide; take "
            f"batch_size {-(-settings.batch_size // settings.accumulate) * settings.accumulate}"
        )
    return found


def refuse(conflicts: list[str]) -> None:
    """Raise a ConfigError that lists the combinations; none: do nothing."""
    if conflicts:
        raise ConfigError(
            f"{len(conflicts)} combination{'s' * (len(conflicts) > 1)} of settings cannot be:\n    "
            + "\n    ".join(conflicts),
            remedy="change one setting of each",
        )
