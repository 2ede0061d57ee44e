"""The verbs: their options and what they print. A module is imported when its verb is called, and torch when needed."""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "catalogue": "catalogue",
    "compare": "report",
    "convert": "convert",
    "demo": "demo",
    "doctor": "doctor",
    "download": "download",
    "embed": "embed",
    "evaluate": "evaluate",
    "export": "export",
    "finetune": "finetune",
    "index": "index",
    "info": "info",
    "plan": "plan",
    "pretrain": "pretrain",
    "probe": "evaluate",
    "report": "report",
    "serve": "serve",
    "settings": "demo",
    "shard": "shard",
    "similar": "index",
    "tag": "tag",
}


def verb(name: str) -> Any:
    """The function of a verb: (prog, summary, arguments) -> exit status."""
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
