"""How tables and annotations become clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from asit.config.base import NonNegative, Settings


def _joined(value: Any) -> Any:
    return ",".join(f"{ours}={theirs}" for ours, theirs in value.items()) if isinstance(value, Mapping) else value


class TableSettings(Settings):
    """How a table or annotations (Raven, Audacity, Praat) become clips; see docs/annotations.md."""

    later: ClassVar[tuple[str, ...]] = ("columns", "window", "hop", "box_share", "background")

    columns: Annotated[str, BeforeValidator(_joined)] = ""
    """Names of a table's columns, such as label=species,path=file_name; label also names the tier of a TextGrid or the
    column of a Raven table. label= (nothing) leaves a column out."""
    window: NonNegative = 0.0
    """Seconds: cut recordings into windows of this length, with the labels of the annotated parts that they overlap; a
    folder is then read by the annotation files in it. 0: each annotated part is one clip."""
    hop: NonNegative = 0.0
    """Seconds between the starts of windows; 0: the window's length."""
    box_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """A window has the label of a part if they overlap by this share of the shorter of the two."""
    background: bool = False
    """Label windows that no annotated part touches as background; without it they are left out."""

    @property
    def reading(self) -> TableSettings:
        """These settings alone, of a class with more."""
        return TableSettings(**{name: getattr(self, name) for name in TableSettings.model_fields})
