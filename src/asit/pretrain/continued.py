"""Continued pretraining: what a run takes from the model that it starts from, and what its card then says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from asit.config import (
    SIZES,
    EncoderSettings,
    FrontEndSettings,
    HeadSettings,
    PretrainSettings,
    Settings,
    presets,
    yaml,
)
from asit.config.pretrain_settings import shape_conflicts
from asit.config.run_settings import refuse
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.interop import hub_files, initial_encoder, loading, model_names
from asit.io import local_files, parsing
from asit.io.checkpoint import check_numbers, load_heads, load_strict
from asit.model.audio_model import AudioModel
from asit.model.imagenet import load_imagenet
from asit.model.vit import Encoder, shape_of
from asit.pretrain.method import ASiT
from asit.training import open_data, run_dir

log = logging.getLogger(__name__)

FREE = ("mean", "std", "padding", "resampler", "drop_path", "patch_stride_frames", "patch_stride_mels")
"""Settings of the front end and the encoder that may differ from the card."""
FACTS = "continued_from"
"""Name of the facts in the card of the resulting model, in its `training`."""


@dataclass(frozen=True)
class StartingModel:
    """What a run continues from.

    Attributes:
        name: as the user named it.
        facts: for the card of the resulting model.
        model: the model; None: a file of image weights.
        file: of image weights.
        heads: tensors that it keeps of its pretraining, of `checkpoint.load_heads`, to go on with; none: fresh heads.
        restored: the weights will come from a checkpoint of the run, and are not loaded here.
    """

    name: str
    facts: dict[str, Any]
    model: AudioModel | None = None
    file: Path | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    restored: bool = False

    def fill(self, encoder: Encoder) -> None:
        """Load the first weights into the student's encoder, with positions resized to the views' grid."""
        if not self.restored:
            initial_encoder.fill(encoder, str(self.file or self.name), self.model, "docs/pretrain.md")

    def fill_heads(self, task: ASiT) -> None:
        """Load the heads and centres that the model keeps into student and teacher."""
        if not self.heads:
            return
        where = f"the heads that {self.name} keeps"
        for network in filter(None, (task.student, task.teacher)):
            for part in ("projection", "reconstruction"):
                head = getattr(network, part)
                state = {n.removeprefix(f"{part}."): v for n, v in self.heads.items() if n.startswith(f"{part}.")}
                if part == "projection" and task.settings.heads.share_prototypes:
                    of_class = [name for name in state if name.startswith("class_layer.")]
                    state |= {name.replace("class_layer.", "patch_layer."): state[name] for name in of_class}
                if head is not None:
                    load_strict(head, state, where)
        for centre in ("class_centre", "patch_centre"):
            if centre in self.heads:
                load_strict(getattr(task, centre), {"value": self.heads[centre]}, where)


def start(settings: PretrainSettings, *, restored: bool = False) -> tuple[PretrainSettings, StartingModel | None]:
    """Open the model that a run continues from.

    Args:
        settings: checked; fields of the front end and the encoder that are unset are taken from the model's card.
        restored: the run has a checkpoint, so that the model need not be there any more.

    Returns:
        The settings with the front end and the encoder of the run, and the source; None: fresh weights.

    Raises:
        CheckpointError: there is no such model, or it is damaged, or its weights are not finite.
        ConfigError: lists all settings that contradict its card, and what pretraining cannot do.
    """
    name = settings.model
    if not name:
        return settings, None
    if restored and (kept := _kept_facts(Path(settings.out))) is not None:
        return settings, StartingModel(name, kept, restored=True)
    files = model_names.find(name)
    file = initial_encoder.image_weights(files)
    if file is not None:
        settings = presets.with_model_groups(settings)
        _kept_heads(settings, file.parent)
        refuse(shape_conflicts(settings))
        # Every check of the file comes before the recordings are scanned.
        load_imagenet(file, settings.encoder, settings.encoder.patch_frames, settings.front_end.mels)
        log.info(f"Continuing from image weights of {name}; {_schedule(settings)}")
        of_file = {"model": name, "sha256": local_files.sha256(file), "kind": "image weights"}
        return settings, StartingModel(name, of_file, file=file)
    folder = loading.folder_of(files)
    model = loading.load(folder)
    check_numbers(name, model.encoder.state_dict())
    heads, of_heads = _kept_heads(settings, folder)
    settings = _with_card(settings, model, of_heads)
    width, depth, _ = shape_of(settings.encoder)
    input_ = f"{settings.front_end.rate} Hz, {settings.front_end.mels} mel bins"
    log.info(f"Continuing from {name}: encoder {width} wide with {depth} blocks, {input_}; {_schedule(settings)}")
    if model.classes is not None:
        log.info(
            f"The head of {name} ({len(model.classes)} classes) is left out: the encoder alone is pretrained further"
        )
    if heads:
        log.info(f"The heads and centres that {name} keeps of its pretraining are trained further")
    facts = {
        "model": name,
        "sha256": local_files.sha256(folder / hub_files.OWN[1]),
        "kind": model.card["kind"],
        "training": model.training,
        **({"license": license} if (license := (model.training or {}).get("license")) else {}),
    }
    return settings, StartingModel(name, facts, model, heads=heads)


def log_data(front_end: FrontEndSettings, catalogue: Catalogue) -> None:
    """Log the data's own mean and std beside those that are used, and recordings of a lower rate than the model's."""
    try:
        own = open_data.measured(front_end.model_copy(update={"mean": "auto", "std": "auto"}), catalogue)
        measured = f"the data's own are {own.mean:.4f} and {own.std:.4f}"
    except CatalogueError as error:
        measured = f"the data's own are not known: {error.found}"
    log.info(f"Log-mel mean {front_end.mean:.4f} and std {front_end.std:.4f} are used; {measured}")
    if lower := int((catalogue.rate < front_end.rate).sum()):
        log.info(
            f"{lower} of {len(catalogue)} recordings have a lower rate than the model's {front_end.rate} Hz: "
            "resampled, with the upper mel bins empty"
        )


def _schedule(settings: PretrainSettings) -> str:
    gentle = settings.preset == PretrainSettings.CONTINUED_RECIPE
    return f"preset {settings.preset}" + ", the default with a model: a gentler schedule" * gentle


def _kept_heads(settings: PretrainSettings, folder: Path) -> tuple[Mapping[str, Tensor], HeadSettings | None]:
    """Return the heads that a model's folder keeps, and their settings; none where fresh ones are wanted."""
    if not settings.keep_heads:
        return {}, None
    found = load_heads(folder)
    if found is None:
        raise ConfigError(
            f"{settings.model} keeps no heads of its pretraining, and keep_heads is on",
            "a model that was converted with its heads, from an official ASiT checkpoint",
            "asit convert CHECKPOINT --keep-heads --out MODEL; or leave out --keep-heads",
        )
    return found[0], yaml.build(HeadSettings, found[1], str(folder / "heads.json"))


def _with_card(settings: PretrainSettings, model: AudioModel, heads: HeadSettings | None) -> PretrainSettings:
    """Return the settings with the card's front end and encoder under the fields of `FREE` that are set.

    The same for the settings of the heads that are kept, if any.
    """
    card: dict[str, FrontEndSettings | EncoderSettings | HeadSettings] = {
        "front_end": model.front_end.settings,
        "encoder": model.encoder.settings,
    }
    if heads is not None:
        card["heads"] = heads
    taken: dict[str, Any] = {"encoder": {"drop_path": settings.encoder.drop_path}}
    wrong: list[str] = []
    for group, theirs in card.items():
        given = getattr(settings, group)
        named = {name: getattr(given, name) for name in type(given).model_fields if name in given.model_fields_set}
        free = {name: value for name, value in named.items() if name in FREE}
        taken[group] = theirs.model_dump() | taken.get(group, {}) | free
        wrong += _contradictions(group, {name: value for name, value in named.items() if name not in FREE}, theirs)
    found = settings.changed(taken)
    wrong += shape_conflicts(found)
    if wrong:
        count = f"{len(wrong)} point{'s' * (len(wrong) > 1)}"
        raise ConfigError(
            f"pretraining cannot continue from {settings.model}, in {count}:\n    " + "\n    ".join(wrong),
            "the front end and the encoder of its card, in which " + ", ".join(FREE) + " alone may be changed",
            "leave these settings out, or leave out --model to start from fresh weights",
        )
    return found


def _contradictions(group: str, named: dict[str, Any], card: Settings) -> Iterator[str]:
    """Yield each setting that has another value in the card; sizes are compared by width, blocks and heads."""
    theirs = dict(card)
    if isinstance(card, EncoderSettings):
        shape, size = shape_of(card), named.pop("size", "custom")
        theirs |= dict(zip(("width", "depth", "heads"), shape, strict=True))
        if size != "custom" and SIZES[size] != shape:
            yield f"{group}.size is {size} (width, depth and heads {SIZES[size]}), and {shape} in the card"
    for name, value in named.items():
        if value not in (None, theirs[name]):
            yield f"{group}.{name} is {value}, and {theirs[name]} in the card"


def _kept_facts(out: Path) -> dict[str, Any] | None:
    """Return the facts in the card of a run's model, which is written before each checkpoint; None: none are there."""
    try:
        card = parsing.json_object(out / run_dir.MODEL / hub_files.OWN[0], CheckpointError)
        kept = card["training"][FACTS]
    except (OSError, CheckpointError, KeyError, TypeError):
        return None
    return kept if isinstance(kept, dict) else None
