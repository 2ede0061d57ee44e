"""What all groups of settings share: the base class and the kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

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
    """Base of all settings: an unknown name is an error, and values are checked on assignment."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
