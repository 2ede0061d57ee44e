"""Checks of fine-tuning's settings, and their values where the length of the run, its data or its model decide them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asit.config import FinetuneSettings, ResolvedFinetuneSettings, yaml
from asit.config.run_settings import refuse, shared_conflicts
from asit.io import local_files


def resolve(settings: FinetuneSettings, *, multi: bool, found: Mapping[str, Any]) -> ResolvedFinetuneSettings:
    """Return the settings with every auto that enters a step or a score as a value.

    Args:
        settings: checked.
        multi: whether a clip may have several labels, or soft ones.
        found: nested values of what the data, the model, the device and the processes decide, `input.seconds` and
            `input.keep_gb` among them; they replace those of `settings`.
    """
    autos = {
        "optim.warmup": min(10.0, 0.1 * settings.epochs),
        "optim.average_from": 0.5 * settings.epochs,
        "loss.kind": "bce" if multi else "ce",
        "validation.metric": "mAP" if multi else "accuracy",
        "label_seed": settings.seed,
    }
    values = yaml.fill_auto(settings.model_dump(), autos) | {"labels": "multi" if multi else "single"}
    return ResolvedFinetuneSettings.model_validate(yaml.merge(values, found))


def check(settings: FinetuneSettings) -> None:
    """Refuse settings that cannot go together.

    Raises:
        ConfigError: lists all of them.
    """
    o, sampling, wrong = settings.optim, settings.sampling, shared_conflicts(settings)
    if o.average == "epochs" and o.average_from != "auto" and o.average_from > settings.epochs:
        wrong.append(
            f"epochs is {settings.epochs} and optim.average_from is {o.average_from:g}: there would be no average; "
            "take auto, or more epochs"
        )
    if sampling.share < 1.0 and sampling.per_class:
        wrong.append(f"sampling.share is {sampling.share:g} and sampling.per_class {sampling.per_class}: take one")
    if sampling.order == "shuffle" and sampling.epoch_clips:
        wrong.append(
            f"sampling.epoch_clips is {sampling.epoch_clips} and sampling.order shuffle, which takes every clip once; "
            "take sampling.order balanced or inverse"
        )
    if settings.fresh and settings.model == "none":
        wrong.append("model is none and fresh is on: with none the weights are fresh already; leave out fresh")
    elif settings.fresh and local_files.is_weights_file(settings.model):
        wrong.append(f"model is {settings.model}, a file of image weights, and fresh is on: take --model none")
    if o.average == "epochs" and o.average_from == 0:
        wrong.append(
            "optim.average is epochs and optim.average_from 0: the first end of an epoch is that of epoch 1; take 1"
        )
    refuse(wrong)
