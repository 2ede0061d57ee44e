"""The verbs: their options, and what they print. Torch is imported only by the verb that needs it."""

from asit.commands.data import catalogue
from asit.commands.download import download
from asit.commands.pages import compare, report
from asit.commands.scoring import evaluate, probe
from asit.commands.training import finetune, pretrain
from asit.commands.trying import demo, settings
from asit.commands.using import embed

__all__ = [
    "catalogue",
    "compare",
    "demo",
    "download",
    "embed",
    "evaluate",
    "finetune",
    "pretrain",
    "probe",
    "report",
    "settings",
]
