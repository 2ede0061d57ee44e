"""Every setting of a run, typed, with its unit and the source of its default; imports no torch."""

from asit.config.base import Settings
from asit.config.finetune_settings import (
    AugmentSettings,
    FinetuneSettings,
    NetworkSettings,
    ResolvedFinetuneSettings,
)
from asit.config.model_settings import SIZES, EncoderSettings, FrontEndSettings
from asit.config.pretrain_settings import (
    CustomSettings,
    HeadSettings,
    LossSettings,
    MaskingSettings,
    PretrainOptimSettings,
    PretrainSettings,
    ResolvedPretrainSettings,
    ViewSettings,
)
from asit.config.run_settings import RunSettings
from asit.config.table_settings import TableSettings

__all__ = [
    "SIZES",
    "AugmentSettings",
    "CustomSettings",
    "EncoderSettings",
    "FinetuneSettings",
    "FrontEndSettings",
    "HeadSettings",
    "LossSettings",
    "MaskingSettings",
    "NetworkSettings",
    "PretrainOptimSettings",
    "PretrainSettings",
    "ResolvedFinetuneSettings",
    "ResolvedPretrainSettings",
    "RunSettings",
    "Settings",
    "TableSettings",
    "ViewSettings",
]
