"""The initial classifier of fine-tuning: from a pretrained model, ImageNet weights, or fresh weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from pydantic import BaseModel

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FinetuneSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import ConfigError
from asit.finetune.finetune_dataset import blank_head
from asit.interop import initial_encoder, loading, model_names
from asit.io.checkpoint import load_strict
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier
from asit.model.encoders import empty_encoder
from asit.training import open_data

log = logging.getLogger(__name__)

NONE = "none"


@dataclass(frozen=True)
class Origin:
    """Where the first weights come from.

    Attributes:
        front_end, encoder: settings that the run will have.
        model: the pretrained model, where there is one.
        text: describes it in the log, the card and the results.
    """

    front_end: FrontEndSettings
    encoder: EncoderSettings
    model: AudioModel | None
    text: str


def pretrained(settings: FinetuneSettings) -> AudioModel | None:
    """Return the model to start from; None for fresh weights or a file of image weights.

    Raises:
        ConfigError: none was named, or image weights with `fresh`.
        CheckpointError: it cannot be read.
    """
    given = settings.model
    if not given:
        raise ConfigError(
            "no model was given to start from",
            "a model as for asit.load, such as RUN/model, a file of ImageNet ViT weights, or none",
            "pass --model RUN/model, or --model none for fresh weights",
        )
    if given == NONE:
        return None
    files = model_names.find(given)
    if initial_encoder.image_weights(files) is not None:
        if settings.fresh:
            raise ConfigError(
                f"model is {given}, a file of image weights, and fresh is on",
                "a model with a card, whose architecture a fresh network can have",
                "take --model none",
            )
        return None
    return loading.load(loading.folder_of(files))


def origin(settings: FinetuneSettings, model: AudioModel | None, catalogue: Catalogue) -> Origin:
    """Return the front end and the encoder: a pretrained model's from its card, others from the settings.

    Args:
        settings: as given.
        model: of `pretrained`.
        catalogue: measured mean and std, where there is no model.

    Raises:
        ConfigError: settings of front end or encoder were given that the model overrides.
        CatalogueError: mean and std are needed, and the catalogue has none.
    """
    given = settings.model
    if model is None:
        front_end, base = open_data.measured(settings.front_end, catalogue), settings.encoder
        text = "fresh weights" if given == NONE else f"image weights of {given}"
    else:
        front_end, base = model.front_end.settings, model.encoder.settings
        text = f"fresh weights, architecture of {given}" if settings.fresh else f"weights of {given}"
    network = settings.network
    encoder = base.changed(
        {
            "drop_path": network.drop_path,
            "patch_stride_frames": network.stride_frames or base.patch_stride_frames,
            "patch_stride_mels": network.stride_mels or base.patch_stride_mels,
        }
    )
    lost = _lost("encoder", settings.encoder, encoder) + _lost("front_end", settings.front_end, front_end)
    if lost:
        raise ConfigError(
            f"settings that the run would not have: {'; '.join(lost)}",
            "the front end and the encoder of the model"
            if model is not None
            else "stochastic depth from network.drop_path",
            "leave these out (stochastic depth and strides are network.drop_path, network.stride_frames and "
            "network.stride_mels); an encoder of other settings starts from --model none",
        )
    return Origin(front_end, encoder, model, text)


def build(start: Origin, settings: FinetuneSettings, frames: int, classes: tuple[str, ...], multi: bool) -> Classifier:
    """Return the network to be trained, with its weights.

    The model's head is kept where it has the same classes, pooling and kind; else the head is fresh.

    Args:
        start: of `origin`.
        settings: with the front end and the encoder of `start`.
        frames: T of the input.
        classes: C names.
        multi: whether a clip may have several.

    Raises:
        CheckpointError: the weights do not fit.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    encoder = empty_encoder(settings.encoder, frames, settings.front_end.mels)
    if settings.fresh or settings.model == NONE:
        encoder.init_weights(generator)
    else:
        image = initial_encoder.image_weights(model_names.find(settings.model)) if start.model is None else None
        initial_encoder.fill(encoder, str(image or settings.model), start.model, "docs/finetune.md")
    head = blank_head(settings, len(classes)).to_empty(device="cpu")
    head.init_weights(generator)
    had = start.model.labelling if start.model is not None and not settings.fresh else None
    if had is not None and start.model is not None and start.model.head is not None:
        same = (had.classes, had.multi, had.pooling) == (classes, multi, settings.network.pooling)
        norm = start.model.head.norm
        if same and norm is not None and head.norm is not None and norm.eps == head.norm.eps:
            load_strict(head, start.model.head.state_dict(), f"the head of {settings.model}")
            log.info("the model's head is of these very classes: it is trained further")
        else:
            log.info("the model's head is of another kind or of other classes: a fresh one replaces it")
    return Classifier(encoder, head)


def frames_of(start: Origin, seconds: float) -> int:
    """Return T of an input of this many seconds: complete patch columns that hold all of it.

    Raises:
        ConfigError: it holds no window of the front end.
    """
    front_end = start.front_end
    frames = FrontEnd(front_end).frames_for(round(seconds * front_end.rate))
    if frames < 1:
        raise ConfigError(f"input.seconds is {seconds:g}", f"at least {front_end.window_ms / 1000:g} s", "raise it")
    return positions.round_up_frames(frames, start.encoder)


def _lost(group: str, given: BaseModel, taken: BaseModel) -> list[str]:
    """Settings that were given, for they are not the default, and that the run has otherwise."""
    default, wanted, has = dict(type(given)()), dict(given), dict(taken)
    return [
        f"{group}.{name} is {value}, and would be {has[name]}"
        for name, value in wanted.items()
        if value not in (default[name], has[name])
    ]
