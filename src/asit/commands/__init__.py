"""The verbs: their options and what they print. A module is imported when its verb is called, and torch when needed."""

from __future__ import annotations

import importlib
from typing import Any

SUMMARIES = {
    "catalogue": "check a folder or table of recordings and measure its mean and std",
    "shard": "pack a catalogue's recordings into tar shards, locally or in an object store",
    "plan": "estimate the time, memory and cost of a pretraining run",
    "pretrain": "pretrain an encoder on recordings without labels",
    "study": "pretrain and score a grid of settings, such as the paper's ablations, and write table and figure",
    "finetune": "train and score a classifier on labelled recordings, from a pretrained encoder or none",
    "evaluate": "score a model on labelled clips, or compare several: head, probes, few labels, verification",
    "probe": "compare a frozen encoder with an untrained one and log-mel statistics by linear probes",
    "embed": "write the vectors of recordings: one or many for each file",
    "tag": "label recordings, with a model that has labels",
    "info": "describe a model: sizes, labels, licence, training, hashes",
    "models": "list public models that can be named wherever a model is expected, with their sources",
    "convert": "turn weights of ASiT, AST, SSAST or an image transformer into a model folder",
    "export": "write a model as ONNX, torch.export or a Hugging Face folder",
    "index": "make your own recordings searchable by sound",
    "similar": "find the recordings of an index that sound most like one",
    "anomaly": "score recordings by their distance to an index of normal ones, with a threshold and AUC",
    "serve": "open a model in the browser, with an HTTP API behind the page",
    "report": "write one HTML page about a run",
    "compare": "print one table of scored runs, with intervals and paired differences",
    "download": "fetch ESC-50, Speech Commands or the spoken digits; say where to get AudioSet and VoxCeleb1",
    "settings": "list every setting with its meaning: of pretraining for a preset, of fine-tuning for a task",
    "completion": "print a script that completes verbs and flags in bash, zsh or fish",
    "doctor": "show the versions, decoders, devices and extras that are there",
    "demo": "try it all on notes of real instruments (needs the extra asit-audio[demo])",
}
"""The verbs, in the order of `asit --help`, and what each does."""

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
