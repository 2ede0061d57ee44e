"""The verbs: their options and what they print. A module is imported when its verb is called, and torch when needed."""

from __future__ import annotations

import importlib
from typing import Any

_PLACES = {
    "catalogue": "data",
    "compare": "pages",
    "convert": "converting",
    "demo": "trying",
    "doctor": "doctor",
    "download": "download",
    "embed": "using",
    "evaluate": "scoring",
    "export": "exporting",
    "finetune": "training",
    "index": "searching",
    "info": "looking",
    "plan": "planning",
    "pretrain": "training",
    "probe": "scoring",
    "report": "pages",
    "serve": "serving",
    "settings": "trying",
    "shard": "sharding",
    "similar": "searching",
    "tag": "tagging",
}


def verb(name: str) -> Any:
    """The function of a verb: (prog, summary, arguments) -> exit status."""
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
