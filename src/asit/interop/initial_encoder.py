"""The first weights of an encoder that a run trains: of a pretrained model, or of a file of ImageNet ViT weights."""

from __future__ import annotations

import logging
from pathlib import Path

from asit.errors import CheckpointError
from asit.interop.convert import detect
from asit.interop.model_names import ModelFiles
from asit.io import safe_load
from asit.io.checkpoint import load_strict
from asit.model import imagenet, positions
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

log = logging.getLogger(__name__)


def image_weights(files: ModelFiles) -> Path | None:
    """Return the file of ImageNet ViT weights (timm's names) that a named model is; None: it is another model."""
    if not files.convertible or files.path.is_dir():
        return None
    try:
        content = safe_load.read(files.path, training_state=True)
    except CheckpointError:  # the conversion says more about it
        return None
    return files.path if detect.candidates(content)[:1] == ("vit",) else None


def fill(encoder: Encoder, source: str, model: AudioModel | None, page: str) -> None:
    """Load first weights into an encoder, with the positions resized to its grid.

    Args:
        encoder: of the run; its settings may differ from the model's in strides and stochastic depth.
        source: what the user named, or the file of image weights.
        model: loaded from `source`; None: `source` is a file of image weights.
        page: documentation of the positions, for the log.

    Raises:
        CheckpointError: the file cannot be read, or its weights do not fit.
    """
    if model is None:
        state, left_out = imagenet.load_imagenet(Path(source), encoder.settings, encoder.frames, encoder.mels)
        load_strict(encoder, state, source)
        log.info(f"left out of {source}: {', '.join(left_out) or 'nothing'}")
        return
    theirs = model.encoder
    state = positions.adapt_positions(
        theirs.state_dict(),
        theirs.settings,
        encoder.settings,
        old_frames=model.frames,
        frames=encoder.frames,
        mels=encoder.mels,
    )
    load_strict(encoder, state, source)
    if encoder.grid != theirs.grid:
        log.info(f"positions of {theirs.grid} patches (time, mel) made into {encoder.grid}: {page}")
