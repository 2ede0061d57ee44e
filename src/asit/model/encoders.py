"""The encoder of each family, with random, uninitialised or no weights."""

from __future__ import annotations

import torch

from asit.config import EncoderSettings, custom_classes
from asit.model.beats import Beats
from asit.model.fixed_positions import Eat, FixedPositions
from asit.model.vit import Encoder

CLASSES: dict[str, type[Encoder]] = {
    "vit": Encoder,
    "audiomae": FixedPositions,
    "audiomae-finetuned": FixedPositions,
    "eat": Eat,
    "beats": Beats,
}
"""Classes of encoders by `EncoderSettings.family`."""


def new_encoder(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """Return an encoder with random weights; arguments and errors are those of `Encoder`.

    The module of an encoder of one's own must have been imported: a model's card imports nothing.
    """
    family = settings.family
    made = CLASSES.get(family) or custom_classes.find(family, Encoder, "encoder.family", imports=False)
    return made(settings, frames, mels)


def empty_encoder(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """Return an encoder with uninitialised weights to load into; drawing them would take longer than reading."""
    with torch.inference_mode(False):  # tensors made in inference mode count no writes
        return meta_encoder(settings, frames, mels).to_empty(device="cpu")


def meta_encoder(settings: EncoderSettings, frames: int, mels: int) -> Encoder:
    """Return an encoder on the meta device: names and shapes of weights, without memory."""
    with torch.device("meta"):
        return new_encoder(settings, frames, mels)
