"""asit: self-supervised audio spectrogram transformers from a folder of recordings (ASiT, arXiv 2211.13189)."""

from __future__ import annotations

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asit.api import Embedder, create_encoder, finetune, pretrain
    from asit.config import FinetuneSettings, FrontEndSettings, PretrainSettings, TableSettings
    from asit.data.catalogue.catalogue import Catalogue
    from asit.data.catalogue.scan import build as build_catalogue
    from asit.data.catalogue.tables import TableRow
    from asit.errors import AsitError
    from asit.interop.loading import load as load
    from asit.interop.model_registry import list_models
    from asit.model.audio_model import AudioModel, Embedding
    from asit.report import report

__version__ = "0.1.0"

__all__ = [
    "AsitError",
    "AudioModel",
    "Catalogue",
    "Embedder",
    "Embedding",
    "FinetuneSettings",
    "FrontEndSettings",
    "PretrainSettings",
    "TableRow",
    "TableSettings",
    "__version__",
    "build_catalogue",
    "create_encoder",
    "finetune",
    "list_models",
    "load",
    "pretrain",
    "report",
]

_PUBLIC = {
    "AsitError": ("asit.errors", "AsitError"),
    "AudioModel": ("asit.model.audio_model", "AudioModel"),
    "Catalogue": ("asit.data.catalogue.catalogue", "Catalogue"),
    "Embedder": ("asit.api", "Embedder"),
    "Embedding": ("asit.model.audio_model", "Embedding"),
    "FinetuneSettings": ("asit.config", "FinetuneSettings"),
    "FrontEndSettings": ("asit.config", "FrontEndSettings"),
    "PretrainSettings": ("asit.config", "PretrainSettings"),
    "TableSettings": ("asit.config", "TableSettings"),
    "TableRow": ("asit.data.catalogue.tables", "TableRow"),
    "build_catalogue": ("asit.data.catalogue.scan", "build"),
    "create_encoder": ("asit.api", "create_encoder"),
    "list_models": ("asit.interop.model_registry", "list_models"),
    "load": ("asit.interop.loading", "load"),
}
"""Public names, as (module, its attribute): imported on first use, since torch takes seconds."""

_CALLABLE = {
    "asit.finetune": ("asit.api", "finetune"),
    "asit.pretrain": ("asit.api", "pretrain"),
    "asit.report": ("asit.report", "report"),
}
"""Public functions with the name of a package: the package can be called (docs/design.md)."""


class _Package(types.ModuleType):
    """A package whose modules are attributes that are imported on first use, as `asit.audio.fbank`."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == "asit" and name in _PUBLIC:
            module, attribute = _PUBLIC[name]
            self.__dict__[name] = value = getattr(importlib.import_module(module), attribute)
            return value
        full = f"{self.__name__}.{name}"
        try:
            return importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name != full:  # the module exists, but not one that it imports
                raise
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets an imported module on its package by this.
        if isinstance(value, types.ModuleType) and hasattr(value, "__path__"):
            value.__class__ = _CallablePackage if value.__name__ in _CALLABLE else _Package
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        import pkgutil

        modules = {found.name for found in pkgutil.iter_modules(self.__path__)} - {"__main__"}
        return sorted({*(__all__ if self.__name__ == "asit" else super().__dir__()), *modules})


class _CallablePackage(_Package):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    @property
    def _function(self) -> Any:
        module, attribute = _CALLABLE[self.__name__]
        return getattr(importlib.import_module(module), attribute)

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return str(self._function.__doc__)

    @property
    def __signature__(self) -> Any:  # read by inspect.signature
        import inspect

        return inspect.signature(self._function)

    def __reduce__(self) -> Any:  # a pool's processes may be given it, as they may a function
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Package
logging.getLogger(__name__).addHandler(logging.NullHandler())  # a library is silent unless its user turns the log on
