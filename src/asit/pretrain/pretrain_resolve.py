"""Checks of pretraining's settings, and their values where the length of the run or its data decide them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asit.config import PretrainSettings, ResolvedPretrainSettings, yaml
from asit.config.run_settings import refuse, shared_conflicts
from asit.model.positions import patch_of, stride_of


def resolve(settings: PretrainSettings, found: Mapping[str, Any] | None = None) -> ResolvedPretrainSettings:
    """Return the settings with every auto that enters a step as a number.

    Args:
        settings: checked.
        found: nested values of what the data, the device and the processes decide; they replace those of `settings`.
    """
    epochs = settings.epochs
    autos = {
        "optim.warmup": min(10.0, 0.1 * epochs),
        "optim.freeze_last_layer": min(1.0, 0.01 * epochs),
        "losses.teacher_warmup": min(30.0, 0.3 * epochs),
    }
    values = yaml.fill_auto(settings.model_dump(), autos)
    return ResolvedPretrainSettings.model_validate(yaml.merge(values, found or {}))


def check(settings: PretrainSettings) -> None:
    """Refuse settings that cannot go together; front end and encoder of a model's card are checked when it is read.

    Raises:
        ConfigError: lists all of them.
    """
    loss, m, wrong = settings.losses, settings.masking, shared_conflicts(settings)
    if loss.global_weight == loss.local_weight == loss.reconstruction_weight == 0:
        wrong.append(
            "losses.global_weight, local_weight and reconstruction_weight are all 0: nothing would be learnt; "
            "raise one of them"
        )
    if (
        loss.reconstruction_weight > 0
        and loss.global_weight == loss.local_weight == 0
        and m.drop == 0
        and m.replace == 0
    ):
        wrong.append(
            "masking.drop and masking.replace are 0 and reconstruction is the only loss: nothing is corrupted; "
            "raise one of these, or losses.global_weight"
        )
    if settings.heads.share_prototypes and settings.heads.class_prototypes != settings.heads.patch_prototypes:
        wrong.append(
            f"heads.share_prototypes is on, class_prototypes is {settings.heads.class_prototypes} and "
            f"patch_prototypes is {settings.heads.patch_prototypes}: they must be equal; give one of them alone"
        )
    if settings.model == "none":
        wrong.append("model is none: pretraining starts from fresh weights where no model is given; leave out model")
    refuse(wrong if settings.has_card else wrong + shape_conflicts(settings))


def shape_conflicts(settings: PretrainSettings) -> list[str]:
    """Return what pretraining cannot do of a front end and an encoder."""
    wrong = []
    if settings.front_end.mels % settings.encoder.patch_mels:
        mels, step = settings.front_end.mels, settings.encoder.patch_mels
        near = " or ".join(str(count * step) for count in (mels // step, mels // step + 1) if count)
        fits = max(size for size in range(1, min(step, mels) + 1) if mels % size == 0)
        wrong.append(
            f"front_end.mels is {mels}, which encoder.patch_mels {step} does not divide; "
            f"take front_end.mels {near}, or encoder.patch_mels {fits}"
        )
    patch, stride = patch_of(settings.encoder), stride_of(settings.encoder)
    if stride != patch:
        wrong.append(
            f"patches of {patch} overlap, with a stride of {stride} (time, mel): pretraining needs patches side by "
            f"side; take --encoder.patch-stride-frames {patch[0]} --encoder.patch-stride-mels {patch[1]} (a model's "
            "positions are resized to such a grid), and network.stride_frames and stride_mels in fine-tuning"
        )
    return wrong
