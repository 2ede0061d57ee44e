"""asit: self-supervised audio spectrogram transformers from a folder of recordings (ASiT, arXiv 2211.13189)."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asit.data.catalogue import Catalogue
    from asit.data.scan import build as build_catalogue
    from asit.errors import AsitError
    from asit.interop.loading import load as load
    from asit.model.audio_model import AudioModel, Embedding
    from asit.recipes import finetune, pretrain
    from asit.report import report
    from asit.settings import FinetuneSettings, PretrainSettings

__version__ = "0.1.0"

__all__ = [
    "AsitError",
    "AudioModel",
    "Catalogue",
    "Embedding",
    "FinetuneSettings",
    "PretrainSettings",
    "__version__",
    "build_catalogue",
    "finetune",
    "load",
    "pretrain",
    "report",
]

_PLACES = {
    "AsitError": ("asit.errors", "AsitError"),
    "AudioModel": ("asit.model.audio_model", "AudioModel"),
    "Catalogue": ("asit.data.catalogue", "Catalogue"),
    "Embedding": ("asit.model.audio_model", "Embedding"),
    "FinetuneSettings": ("asit.settings", "FinetuneSettings"),
    "PretrainSettings": ("asit.settings", "PretrainSettings"),
    "build_catalogue": ("asit.data.scan", "build"),
    "finetune": ("asit.recipes", "finetune"),
    "load": ("asit.interop.loading", "load"),
    "pretrain": ("asit.recipes", "pretrain"),
    "report": ("asit.report", "report"),
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import asit` and `asit --help` stay fast: torch takes seconds.
    if name not in _PLACES:
        raise AttributeError(f"module 'asit' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Public(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing a room puts it on this module; `asit.pretrain` and
        # `asit.report` must stay the functions, and not become the rooms.
        if not (name in _PLACES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Public
