"""The base class of all settings, and the kinds of numbers that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from asit.config import yaml

_MOST, _HIGHEST = 2**31 - 1, 1e9  # far beyond any use: products of two of them still fit 64 bits

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
NonNegative = Annotated[float, Field(ge=0.0, le=_HIGHEST)]
AboveZero = Annotated[float, Field(gt=0.0, le=_HIGHEST)]
Milliseconds = Annotated[float, Field(gt=0.0, le=60_000.0)]
Hertz = Annotated[float, Field(ge=-1e6, le=1e6)]
Auto = Literal["auto"]


class Settings(BaseModel):
    """Base of all settings: immutable; an unknown name or a value out of range is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    later: ClassVar[tuple[str, ...]] = ()
    """Fields that are not written while they have their default, so that cards, settings and digests stay as they were
    before the field was added."""

    @model_serializer(mode="wrap")
    def _without_later(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        out: dict[str, Any] = handler(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                out.pop(name, None)
        return out

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return a validated copy with these values; groups are nested mappings. What was unset stays unset."""
        return type(self).model_validate(yaml.merge(self.model_dump(exclude_unset=True), changes))
