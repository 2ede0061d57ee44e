"""The verb embed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from asit.commands.parse import parse
from asit.errors import AsitError


@dataclass
class EmbedOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
    files: Annotated[list[str], tyro.conf.Positional]
    """Recordings."""


def embed(prog: str, summary: str, given: list[str]) -> int:
    options = parse(EmbedOptions, prog, summary, given)
    import asit

    model = asit.load(options.model)
    failed = 0
    for path in options.files:
        try:
            found = model.embed(path)
        except AsitError as error:
            print(f"asit: {error}", file=sys.stderr)
            failed += 1
            continue
        vector = [round(value, 6) for value in found.clip.tolist()]
        print(json.dumps({"path": path, "patches": list(found.grid), "clip": vector}))
    return 2 if failed else 0
