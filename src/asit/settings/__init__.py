"""Every setting of a run, typed, with its unit and where its value comes from.

No torch here: the command line reads these before anything heavy is imported.
"""

from asit.settings.base import Auto, NonNegative, Positive, Settings, Share
from asit.settings.finetune import (
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
from asit.settings.model import SIZES, EncoderSettings, FrontEndSettings
from asit.settings.pretrain import (
    HeadSettings,
    LossSettings,
    MaskingSettings,
    OptimSettings,
    PretrainSettings,
    ProbeSettings,
    ViewSettings,
)
from asit.settings.records import RecordSettings

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
