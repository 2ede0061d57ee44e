"""Front end, encoder and card as one thing: saved, loaded, and asked for embeddings of sound, or for scores.

Letters: S samples, T frames, F mel bins, P patches, D width, R rows, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asit import checkpoint
from asit.audio.fbank import FrontEnd
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.model.classifier import Head, Labelling, check_head
from asit.model.embedding import Embedder, Embedding, Precision, Sound
from asit.model.vit import Encoder, blank
from asit.settings import EncoderSettings, FrontEndSettings

__all__ = ["AudioModel", "Embedding", "Sound", "load"]

ENCODER, CLASSIFIER = "audio-encoder", "audio-classifier"
"""The kinds of models in a card."""

AXES = "(time, mel)"


class AudioModel:
    """A trained encoder with the front end it was trained on; with a head and names for its outputs, a classifier.

    Args:
        encoder: is put into evaluation mode and frozen.
        front_end: with numbers for mean and std.
        training: facts of the training for the card; any JSON.
        head: of a classifier; is put into evaluation mode and frozen too.
        labels: what the head's outputs mean; goes with a head.

    Raises:
        ConfigError: mean or std is still "auto", front end and encoder have other mel bins, head and labels do not
            go together, or the head was made for another width.
    """

    def __init__(
        self,
        encoder: Encoder,
        front_end: FrontEnd,
        training: Mapping[str, Any] | None = None,
        head: Head | None = None,
        labels: Labelling | None = None,
    ) -> None:
        settings = front_end.settings
        if "auto" in (settings.mean, settings.std):
            raise ConfigError(
                f"front_end.mean is {settings.mean}, front_end.std is {settings.std}",
                "numbers: they travel with the weights",
                "take them from the catalogue that the encoder was trained on",
            )
        if settings.mels != encoder.mels:
            raise ConfigError(
                f"a front end of {settings.mels} mel bins, an encoder of {encoder.mels}",
                "the same number",
                "build the encoder with front_end.mels",
            )
        _check_labels(encoder, head, labels)
        self.encoder = encoder.eval().requires_grad_(False)
        self.front_end = front_end
        self.training = dict(training or {})
        self.head = None if head is None else head.eval().requires_grad_(False)
        self.labelling = labels

    @classmethod
    def from_parts(
        cls,
        encoder: Encoder,
        front_end_settings: FrontEndSettings,
        encoder_settings: EncoderSettings,
        frames: int,
        training: Mapping[str, Any] | None = None,
        head: Head | None = None,
        labels: Labelling | None = None,
    ) -> AudioModel:
        """A model, on the CPU, of a copy of the weights of `encoder` and `head`, so that their training can go on.

        Args:
            frames: T of the training view.

        Raises:
            ConfigError: as the class.
            CheckpointError: the encoder is not of these settings.
        """
        own = blank(encoder_settings, frames, front_end_settings.mels)
        checkpoint.load_strict(own, encoder.state_dict(), "the encoder handed in")
        own_head = None if head is None else copy.deepcopy(head).to("cpu")
        return cls(own, FrontEnd(front_end_settings), training, own_head, labels)

    @property
    def frames(self) -> int:
        """T of the training view, the longest window that the encoder is shown."""
        return self.encoder.frames

    @property
    def rate(self) -> int:
        """Sample rate in Hz that the encoder hears; everything else is resampled to it."""
        return self.front_end.settings.rate

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the C outputs in their order; None: the model is no classifier."""
        return None if self.labelling is None else self.labelling.classes

    @property
    def multi(self) -> bool:
        """Whether a clip may have several labels; False where the model is no classifier."""
        return self.labelling is not None and self.labelling.multi

    @property
    def card(self) -> dict[str, Any]:
        """What has to be known to use the weights; JSON."""
        card: dict[str, Any] = {
            "kind": ENCODER,
            "front_end": self.front_end.settings.model_dump(mode="json"),
            "encoder": self.encoder.settings.model_dump(mode="json"),
            "frames": self.frames,
            "grid": list(self.encoder.grid),
            "axes": AXES,
            "padding": self.front_end.settings.padding,
            "training": self.training,
        }
        if self.head is None or self.labelling is None:
            return card
        labels = {
            **dataclasses.asdict(self.labelling),
            "classes": list(self.labelling.classes),
            "norm": self.head.norm is not None,
        }
        return {**card, "kind": CLASSIFIER, "labels": labels}

    def to(self, device: str | torch.device) -> AudioModel:
        """Move the model; returns itself."""
        self.encoder.to(device)
        self.front_end.to(device)
        if self.head is not None:
            self.head.to(device)
        return self

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write `model.safetensors` and `card.json` into a new folder; the head's tensors are named "head.*".

        Raises:
            CheckpointError: the folder exists and overwrite is off, or the disk is full.
        """
        head = {} if self.head is None else {f"head.{name}": value for name, value in self.head.state_dict().items()}
        checkpoint.save_model(Path(folder), {**self.encoder.state_dict(), **head}, self.card, overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
        """Read what `save` wrote.

        Raises:
            CheckpointError: files are missing, damaged, of a newer format, of another kind, or do not fit the card.
        """
        tensors, card = checkpoint.load_model(Path(folder))
        where, weights = Path(folder) / "card.json", str(Path(folder) / "model.safetensors")
        kind = card.get("kind")
        if kind not in (ENCODER, CLASSIFIER) or card.get("axes") != AXES:
            raise CheckpointError(
                f"{where} says kind {kind!r}, axes {card.get('axes')!r}",
                f"kind {ENCODER!r} or {CLASSIFIER!r}, axes {AXES!r}",
                "give a model folder written by asit",
            )
        if (kind == CLASSIFIER) != ("labels" in card):
            raise CheckpointError(
                f"{where} says kind {kind!r}, {'with' if 'labels' in card else 'without'} labels",
                f"labels in a card of kind {CLASSIFIER!r}, and in no other",
                "copy the model folder again from where it was saved",
            )
        try:
            front_end = FrontEnd(FrontEndSettings(**card["front_end"]))
            encoder = blank(EncoderSettings(**card["encoder"]), card["frames"], front_end.settings.mels)
            labels, norm = _read_labels(card["labels"]) if kind == CLASSIFIER else (None, False)
        except (KeyError, TypeError, ValueError, ConfigError) as error:  # pydantic's errors are ValueErrors
            raise CheckpointError(
                f"{where} cannot be used: {error}",
                "front_end, encoder, frames and labels as asit writes them",
                "copy the model folder again, or upgrade asit",
            ) from error
        if list(encoder.grid) != card.get("grid"):
            raise CheckpointError(
                f"{where} says grid {card.get('grid')}, and {card['frames']} frames make {list(encoder.grid)}",
                "a card that agrees with itself",
                "copy the model folder again from where it was saved",
            )
        head = None
        if labels is not None:
            with torch.device("meta"):  # as the encoder: nothing is drawn
                head = Head(encoder.width, len(labels.classes), labels.pooling, norm=norm)
            head.to_empty(device="cpu")
            of_head = {name: value for name, value in tensors.items() if name.startswith("head.")}
            tensors = {name: value for name, value in tensors.items() if name not in of_head}
            named = {name.removeprefix("head."): value for name, value in of_head.items()}
            checkpoint.load_strict(head, named, f"{weights} (its head.*)")
        checkpoint.load_strict(encoder, tensors, weights)
        return cls(encoder, front_end, card.get("training"), head, labels).to(device)

    def logits(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Spectrograms to logits of the classes, without gradients.

        Args:
            x: (R, 1, T, F), normalised, on the model's device.
            valid: (R, P) bool; other patches have no part in the answer.

        Returns:
            (R, C) float32, on the model's device.

        Raises:
            ConfigError: the model is no classifier, or T or F does not fit the patches.
        """
        head = self._classifier()
        with torch.no_grad():
            out: Tensor = head(self.encoder(x, valid=valid), valid=valid)
        return out

    def scores(self, waves: Tensor, precision: Precision = "float32") -> Tensor:
        """Waves to the probabilities of the classes: sigmoids where a clip may have several labels, else a softmax.

        Args:
            waves: (R, S) float at the model's rate, at most as long as the input was in training; shorter ones are
                filled up by the card's padding rule.
            precision: arithmetic of the encoder; the head's is float32.

        Returns:
            (R, C) float32, on the CPU.

        Raises:
            ConfigError: the model is no classifier.
            AudioError: waves of another shape, longer than in training, or with samples that are not finite.
        """
        self._classifier()
        device = self.encoder.pos_embed.device
        cast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        x = self.input(waves)
        with cast:
            logits = self.logits(x)
        return (logits.sigmoid() if self.multi else logits.softmax(1)).cpu()

    def input(self, waves: Tensor) -> Tensor:
        """Waves to the encoder's input of the training length, the same for every row, on the model's device.

        Args:
            waves: as for `scores`; the model need not be a classifier.

        Returns:
            (R, 1, T, F) float32 with T = `frames`.

        Raises:
            AudioError: as for `scores`.
        """
        front_end, frames = self.front_end, self.frames
        need = front_end.samples_for(frames)
        most = need if self.labelling is None else max(need, round(self.labelling.seconds * self.rate) + 1)
        if waves.ndim != 2 or not waves.is_floating_point() or not 0 < waves.shape[1] <= most:
            raise AudioError(
                f"waves of shape {tuple(waves.shape)}, {waves.dtype}",
                f"(rows, samples) floats of 1 to {most} samples ({most / self.rate:.3f} s at {self.rate} Hz)",
                "cut a longer clip into windows of that length",
            )
        if not waves.isfinite().all():
            bad = (~waves.isfinite().all(1)).nonzero().flatten().tolist()
            raise AudioError(
                f"{len(bad)} of {len(waves)} waves hold samples that are not finite (rows {bad[:3]})",
                "numbers in [-1, 1]",
                "mend them or leave them out",
            )
        if waves.shape[1] < need:
            waves = torch.stack([front_end.pad(wave, need) for wave in waves])
        logmel = front_end.fbank(waves.to(self.encoder.pos_embed.device))[:, :frames]
        if logmel.shape[1] < frames:
            logmel = torch.stack([front_end.pad_frames(one, frames) for one in logmel])
        return front_end.normalise(logmel).unsqueeze(1)

    def _classifier(self) -> Head:
        if self.head is None:
            raise ConfigError(
                "this model has no head and no labels: it is an encoder",
                "a classifier, as fine-tuning writes it",
                "fine-tune it first (`asit finetune`), or ask it for embeddings with embed",
            )
        return self.head

    def embed(
        self,
        x: Sound,
        rate: int | None = None,
        layer: int | None = None,
        precision: Precision = "float32",
    ) -> Embedding:
        """Embed one clip; see `embed_batch`."""
        return self.embed_batch([x], rate, layer, precision)[0]

    def embed_batch(
        self,
        sounds: Iterable[Sound],
        rate: int | None = None,
        layer: int | None = None,
        precision: Precision = "float32",
        batch: int = 16,
    ) -> list[Embedding]:
        """Embed clips of any lengths; what one gives does not depend on its neighbours.

        A clip becomes as many patch columns as it covers; a last column of whose new part at least half is covered is
        filled by the front end's padding rule, one less covered is left out, and there is at least one. Positions are
        those of the first columns of the training view, not stretched. A clip up to half as long again as the
        training view is seen whole, with resized positions. A longer one is cut into windows of the view's length,
        end to end; the last is moved back to end with the clip, and gives only the columns that the others lack.

        Args:
            sounds: files of any rate, or arrays or tensors (S,) or (channels, S), whose channels are averaged.
            rate: sample rate of the arrays in Hz; None: they are at the model's own. Files know theirs.
            layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
            precision: arithmetic of the encoder.
            batch: windows that go through the encoder at once.

        Raises:
            AudioError: a sound that is empty, not finite, not floating point, of another shape, or unreadable.
            ConfigError: no such layer.
        """
        return Embedder(self.encoder, self.front_end)(sounds, rate, layer, precision, batch)


def _check_labels(encoder: Encoder, head: Head | None, labels: Labelling | None) -> None:
    if (head is None) != (labels is None):
        raise ConfigError(
            "a head without labels" if labels is None else "labels without a head",
            "both, for a classifier, or neither, for an encoder",
            "hand in the missing one",
        )
    if head is None or labels is None:
        return
    if (head.classes, head.pooling) != (len(labels.classes), labels.pooling):
        raise ConfigError(
            f"a head of {head.classes} classes on {head.pooling}, labels of {len(labels.classes)} on {labels.pooling}",
            "the same",
            "build the head from the labels",
        )
    check_head(encoder, head)


def _read_labels(field: Mapping[str, Any]) -> tuple[Labelling, bool]:
    """The labels of a card, and whether its head has a norm."""
    classes, multi, norm = field["classes"], field["multi"], field["norm"]
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not isinstance(multi, bool) or not isinstance(norm, bool):
        raise TypeError("labels: classes is no list of names, or multi or norm is neither true nor false")
    return Labelling(tuple(classes), multi, field["pooling"], float(field["seconds"])), norm


def load(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
    """The trained model in a folder, such as RUN/model; see `AudioModel.load`."""
    return AudioModel.load(folder, device)
