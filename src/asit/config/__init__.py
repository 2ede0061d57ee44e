"""Every setting of a run, typed, with its unit and the source of its default; imports no torch."""

from asit.config.base import Auto, NonNegative, Positive, Settings, Share
from asit.config.finetune_settings import (
    AugmentSettings,
    ClassifierLossSettings,
    FinetuneOptimSettings,
    FinetuneSettings,
    InputSettings,
    NetworkSettings,
    ResolvedFinetuneSettings,
    SamplingSettings,
    SplitSettings,
    ValidationSettings,
)
from asit.config.model_settings import SIZES, EncoderSettings, FrontEndSettings
from asit.config.pretrain_settings import (
    HeadSettings,
    LossSettings,
    MaskingSettings,
    PretrainOptimSettings,
    PretrainSettings,
    ProbeSettings,
    ResolvedPretrainSettings,
    ViewSettings,
)
from asit.config.run_settings import RecordSettings, RunSettings

__all__ = [
    "SIZES",
    "AugmentSettings",
    "Auto",
    "ClassifierLossSettings",
    "EncoderSettings",
    "FinetuneOptimSettings",
    "FinetuneSettings",
    "FrontEndSettings",
    "HeadSettings",
    "InputSettings",
    "LossSettings",
    "MaskingSettings",
    "NetworkSettings",
    "NonNegative",
    "Positive",
    "PretrainOptimSettings",
    "PretrainSettings",
    "ProbeSettings",
    "RecordSettings",
    "ResolvedFinetuneSettings",
    "ResolvedPretrainSettings",
    "RunSettings",
    "SamplingSettings",
    "Settings",
    "Share",
    "SplitSettings",
    "ValidationSettings",
    "ViewSettings",
]
