"""Every setting of a run, typed, with its unit and where its value comes from.

No torch here: the command line reads these before anything heavy is imported.
"""

from asit.config.base import Auto, NonNegative, Positive, Settings, Share
from asit.config.finetune_settings import (
    AugmentSettings,
    ClassifierLossSettings,
    FinetuneOptimSettings,
    FinetuneSettings,
    InputSettings,
    NetworkSettings,
    SamplingSettings,
    SideSettings,
    ValidationSettings,
)
from asit.config.model_settings import SIZES, EncoderSettings, FrontEndSettings
from asit.config.pretrain_settings import (
    HeadSettings,
    LossSettings,
    MaskingSettings,
    OptimSettings,
    PretrainSettings,
    ProbeSettings,
    ViewSettings,
)
from asit.config.record_settings import RecordSettings

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
    "OptimSettings",
    "Positive",
    "PretrainSettings",
    "ProbeSettings",
    "RecordSettings",
    "SamplingSettings",
    "Settings",
    "Share",
    "SideSettings",
    "ValidationSettings",
    "ViewSettings",
]
