"""The verbs: their options and what they print. A module is imported when its verb is called, and torch when needed."""

from __future__ import annotations

import importlib
from typing import Any

_FILES = {
    "pretrain": "train",
    "finetune": "train",
    "models": "info",
    "probe": "evaluate",
    "similar": "index",
    "anomaly": "index",
    "completion": "settings",
}
"""Verbs whose file has another name."""


def verb(name: str) -> Any:
    """Return the function of a verb: (prog, summary, arguments) -> exit status."""
    return getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, name)}"), name)
