"""Settings that travel with the weights in a model's card: front end and encoder."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from asit.config.base import Auto, Hertz, Milliseconds, Positive, Settings, Share
from asit.config.custom_classes import ClassName


class FrontEndSettings(Settings):
    """Waveform to normalised log-mel; travels with the weights in the model card."""

    rate: Positive = 16000
    """Sample rate in Hz; files at other rates are resampled (v1 read 32 kHz settings, v2 16 kHz)."""
    mels: Positive = 128
    """Mel bins."""
    window_ms: Milliseconds = 25.0
    """Hann window in ms."""
    shift_ms: Milliseconds = 10.0
    """Hop in ms."""
    low_hz: Hertz = 20.0
    """Lower edge of the mel bank in Hz."""
    high_hz: Hertz = 0.0
    """Upper edge in Hz; 0 or less is counted from Nyquist, as in Kaldi."""
    preemphasis: Share = 0.97
    """Pre-emphasis coefficient, as in Kaldi."""
    mean: Annotated[float, Field(ge=-1e6, le=1e6)] | Auto = "auto"
    """Mean of the log-mel values (natural log of power); auto: measured on the catalogue. AudioSet: -4.2677393."""
    std: Annotated[float, Field(ge=1e-6, le=1e6)] | Auto = "auto"
    """Standard deviation; the input is (x - mean) / (2 std), as in AST and ASiT. AudioSet: 4.5689974."""
    padding: Literal["silence", "zero", "repeat"] = "silence"
    """How audio shorter than a view is filled: silence (zeros in the waveform), zero (0.0 in the log-mel before
    normalisation: what AST and v1 do), repeat (the waveform from its start)."""
    resampler: Literal["soxr-hq", "soxr-vhq", "soxr-mq"] = "soxr-hq"
    """Resampling quality."""
    window: Literal["hann", "povey"] = "hann"
    """Window of a frame; povey: Hann to the power 0.85, Kaldi's own, as in BEATs."""
    scale: Literal[1, 32768] = 1
    """Factor of the samples before the log-mel; 32768: as integers of 16 bits, as in BEATs."""

    later: ClassVar[tuple[str, ...]] = ("window", "scale")


class EncoderSettings(Settings):
    """The vision transformer over log-mel patches."""

    size: Literal["tiny", "small", "base", "large", "custom"] = "base"
    """tiny 192 wide, 12 blocks, 3 heads; small 384/12/6; base 768/12/12; large 1024/24/16; custom: the three below."""
    width: Positive | None = None
    """Token width; with size custom."""
    depth: Positive | None = None
    """Blocks; with size custom."""
    heads: Positive | None = None
    """Attention heads; with size custom."""
    mlp_ratio: Annotated[float, Field(gt=0.0, le=1e3)] = 4.0
    """Hidden width of the MLP over the token width."""
    patch_frames: Positive = 16
    """Patch height in frames (time)."""
    patch_mels: Positive = 16
    """Patch width in mel bins."""
    patch_stride_frames: Positive | None = None
    """Step between patches in frames; less than the patch's height makes them overlap (AST: 10); null: no overlap."""
    patch_stride_mels: Positive | None = None
    """Step between patches in mel bins (AST: 10); null: no overlap."""
    distilled: bool = False
    """A second token before the patches, the distillation token of DeiT; AST has it too. The class token that is given
    out is then the mean of both, as in AST."""
    norm_eps: Annotated[float, Field(ge=1e-20, lt=1.0)] = 1e-6
    """Epsilon of the LayerNorms. ViT, DeiT and ASiT: 1e-6; AST as Hugging Face has it: 1e-12."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Stochastic depth of the student, linear in depth; the teacher has none."""
    family: Literal["vit", "audiomae", "audiomae-finetuned", "eat", "beats"] | ClassName = "vit"
    """Network of another project that `asit convert` made; vit: ASiT, AST and all with learned positions; module:Class:
    an encoder of one's own (docs/research.md)."""
    max_distance: Positive = 800
    """Patches beyond which BEATs' relative positions are one; of no effect in other families."""

    later: ClassVar[tuple[str, ...]] = ("family", "max_distance")


SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
"""Encoder sizes as (width, blocks, heads)."""
