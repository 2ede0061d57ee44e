"""AudioModel: front end, encoder, head and card, with methods to save, load, embed and tag.

Letters: S samples, T frames, F mel bins, P patches, D width, R rows, C classes, W windows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.audio.stream import Sound
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import ConfigError
from asit.io import checkpoint
from asit.model import card as cards
from asit.model.card import CLASSIFIER, ENCODER
from asit.model.classifier import Head, Labelling
from asit.model.encoders import empty_encoder
from asit.model.inference.embedding import (
    AttentionMap,
    Embedding,
    EmbedKeywords,
    Precision,
    WindowEmbedder,
    attention_of,
    hop_frames,
    several,
)
from asit.model.inference.tagging import Tag, Tagger, TagKeywords, Tags, tagger_of, training_input
from asit.model.vit import Encoder

__all__ = ["CLASSIFIER", "ENCODER", "AttentionMap", "AudioModel", "Embedding", "Sound", "Tag", "Tags"]


class AudioModel:
    """A trained encoder with its front end; with a head and labels, a classifier.

    Args:
        encoder: set to evaluation mode and frozen.
        front_end: with numbers for mean and std.
        training: facts of the training for the card, JSON.
        head: of a classifier; set to evaluation mode and frozen.
        labels: meaning of the head's outputs.

    Raises:
        ConfigError: mean or std is "auto", or front end and encoder, or head and labels, do not match.
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
                "numbers, which the model card stores",
                "use those of the catalogue that the encoder was trained on",
            )
        if settings.mels != encoder.mels:
            raise ConfigError(
                f"a front end of {settings.mels} mel bins, an encoder of {encoder.mels}",
                "the same number",
                "build the encoder with front_end.mels",
            )
        cards.check_labels(encoder, head, labels)
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
        """Return a model on the CPU with copies of the weights, so that training can continue.

        Args:
            encoder: to copy.
            front_end_settings: with numbers for mean and std.
            encoder_settings: of the encoder.
            frames: T of the training view.
            training, head, labels: as for the class.

        Raises:
            ConfigError: as for the class.
            CheckpointError: the encoder does not have these settings.
        """
        own = empty_encoder(encoder_settings, frames, front_end_settings.mels)
        checkpoint.load_strict(own, encoder.state_dict(), "the given encoder")
        own_head = None if head is None else copy.deepcopy(head).to("cpu")
        return cls(own, FrontEnd(front_end_settings), training, own_head, labels)

    def __repr__(self) -> str:
        seconds = self.front_end.samples_for(self.frames) / self.rate
        classes = self.classes or ()
        named = ", ".join(classes[:3]) + (", ..." if len(classes) > 3 else "")
        labels = f"{len(classes)} classes: {named}" if classes else "no labels"
        shape = f"{self.encoder.width} wide, {len(self.encoder.blocks)} blocks"
        return f"AudioModel({shape}, windows of {seconds:.2f} s at {self.rate} Hz, {labels})"

    @property
    def frames(self) -> int:
        """T of the training view, the longest window of the encoder."""
        return self.encoder.frames

    @property
    def rate(self) -> int:
        """Sample rate in Hz; other inputs are resampled to it."""
        return self.front_end.settings.rate

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the C outputs; None if the model is no classifier."""
        return None if self.labelling is None else self.labelling.classes

    @property
    def multi(self) -> bool:
        """Whether a clip may have several labels."""
        return self.labelling is not None and self.labelling.multi

    @property
    def card(self) -> dict[str, Any]:
        """The model card: all that is needed to use the weights, as JSON."""
        return cards.write_card(self.encoder, self.front_end.settings, self.training, self.head, self.labelling)

    @property
    def precision(self) -> runtime.Precision:
        """The precision that "auto" means on the model's device, measured once per process."""
        return runtime.best_precision(self.encoder.pos_embed.device.type)

    def to(self, device: str | torch.device) -> AudioModel:
        """Move the model to a device and return it.

        Raises:
            ConfigError: torch has no such device.
        """
        device = runtime.existing_device(device)
        with torch.inference_mode(False):  # tensors made in inference mode count no writes
            self.encoder.to(device)
            self.front_end.to(device)
            if self.head is not None:
                self.head.to(device)
        return self

    def save(
        self, folder: str | os.PathLike[str], overwrite: bool = False, heads: checkpoint.Heads | None = None
    ) -> None:
        """Write `model.safetensors` and `card.json` into a new folder; the head's tensors are named "head.*".

        Args:
            folder: to write.
            overwrite: replace what is there.
            heads: of pretraining, for `heads.safetensors` and `heads.json`.

        Raises:
            CheckpointError: the folder exists and overwrite is off, or the disk is full.
        """
        head = {} if self.head is None else {f"head.{name}": value for name, value in self.head.state_dict().items()}
        checkpoint.save_model(Path(folder), {**self.encoder.state_dict(), **head}, self.card, overwrite, heads)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
        """Load a folder that `save` wrote.

        Raises:
            CheckpointError: files are missing, damaged, of a newer format, of another kind, or do not fit the card.
            ConfigError: torch has no such device.
        """
        encoder, front_end, training, head, labels = cards.read_folder(Path(folder))
        return cls(encoder, front_end, training, head, labels).to(device)

    def logits(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the logits of spectrograms, without gradients.

        Args:
            x: (R, 1, T, F), normalised, on the model's device.
            valid: (R, P) bool; other patches are ignored.

        Returns:
            (R, C) float32, on the model's device.

        Raises:
            ConfigError: the model is no classifier, or T or F does not fit the patches.
        """
        head, _ = self._classifier()
        with torch.no_grad():
            out: Tensor = head(head.tokens(self.encoder, x, valid=valid), valid=valid)
        return out

    def scores(self, waveforms: Tensor, precision: Precision = "float32") -> Tensor:
        """Return the probabilities of the classes: sigmoids if a clip may have several labels, else a softmax.

        Args:
            waveforms: (R, S) float at the model's rate, at most as long as in training; shorter ones are padded by the
                card's rule.
            precision: of the encoder; the head uses float32.

        Returns:
            (R, C) float32, on the CPU.

        Raises:
            ConfigError: the model is no classifier.
            AudioError: another shape, too long, or not finite.
        """
        self._classifier()
        x = self.input(waveforms)
        with runtime.autocast(self._precision(precision), self.encoder.pos_embed.device):
            logits = self.logits(x)
        return (logits.sigmoid() if self.multi else logits.softmax(1)).cpu()

    def input(self, waveforms: Tensor) -> Tensor:
        """Return the encoder's input of the training length, on the model's device.

        Args:
            waveforms: as for `scores`; the model need not be a classifier.

        Returns:
            (R, 1, T, F) float32 with T = `frames`.

        Raises:
            AudioError: as for `scores`.
        """
        longest = 0.0 if self.labelling is None else self.labelling.seconds
        return training_input(self.front_end, self.frames, longest, waveforms)

    def _classifier(self) -> tuple[Head, Labelling]:
        if self.head is None or self.labelling is None:
            raise ConfigError(
                "this model has no head and no labels: it is an encoder",
                "a classifier, as fine-tuning writes it",
                "fine-tune it first (`asit finetune`), or ask it for vectors (`embed`, `asit embed`)",
            )
        return self.head, self.labelling

    def embedder(
        self,
        layer: int | Sequence[int] | None = None,
        precision: Precision = "auto",
        hop: float | None = None,
        patches: bool = True,
    ) -> WindowEmbedder:
        """Return an `WindowEmbedder`, whose windows are prepared by threads and encoded by one thread.

        Args:
            layer: block to return, after the final norm (0 the first), or k of them, joined to k D; None: the last.
            precision: of the encoder; auto: see the property.
            hop: seconds between frames; None: one patch column. Smaller hops take several passes.
            patches: keep the tokens of all patches.

        Raises:
            ConfigError: no such layer, or a hop that does not divide a column in whole log-mel frames.
        """
        frames, low = hop_frames(self.encoder, self.front_end, hop), self._precision(precision)
        layers = None if layer is None else self.encoder.block_indices(layer)
        return WindowEmbedder(self.encoder, self.front_end, layer=layers, precision=low, hop=frames, patches=patches)

    def embed(self, x: Sound, rate: int | None = None, **options: Unpack[EmbedKeywords]) -> Embedding:
        """Embed one clip; see `embed_batch`."""
        return self.embed_batch([x], rate, **options)[0]

    def embed_batch(
        self, sounds: Iterable[Sound], rate: int | None = None, *, batch: int = 16, **options: Unpack[EmbedKeywords]
    ) -> list[Embedding]:
        """Embed clips of any length; the result of one does not depend on the others.

        A clip has as many patch columns as it covers, at least one. A last column is padded if at least half of what it
        adds is covered, else left out. Clips up to the training view use the positions of its first columns; those up
        to 1.5 times as long, resized positions. A longer one is split into windows of the view's length with a quarter
        of overlap, whose tokens are blended; the last one ends with the clip.

        Args:
            sounds: files of any rate, their bytes or open files; or samples (S,) or (channels, S), which are averaged.
            rate: sample rate of arrays in Hz; None: the model's.
            batch: windows per forward pass.
            options: as for `embedder`. Without patches an hour takes a tenth of the memory.

        Raises:
            AudioError: an input is empty, not finite, not floating point, of another shape, or unreadable.
            ConfigError: no such layer or hop.
        """
        return self.embedder(**options).run_sounds(several(sounds, "embed"), rate, batch)

    def stream(
        self,
        x: Sound,
        rate: int | None = None,
        *,
        batch: int = 8,
        start: float = 0.0,
        seconds: float | None = None,
        **options: Unpack[EmbedKeywords],
    ) -> Iterator[Embedding]:
        """Yield the embedding of a long input, or of `seconds` from `start` on, in parts of up to `batch` windows.

        Memory is constant. Joined, the parts equal `embed`; times count from `start`. Arguments and errors are those of
        `embed_batch`, but patches are off by default; an error in a file is raised when it is reached.
        """
        options.setdefault("patches", False)
        return self.embedder(**options).stream(x, rate, batch, start, seconds)

    def tagger(self, precision: Precision = "auto", window: float | None = None, hop: float | None = None) -> Tagger:
        """Return a `Tagger`, whose windows are prepared by threads and scored by one thread.

        Args:
            precision: of the encoder.
            window: seconds; None: the training input's length, to which shorter ones are padded by the card's rule.
            hop: seconds between windows; None: the window.

        Raises:
            ConfigError: the model is no classifier, or a window longer than the training input or shorter than the hop.
        """
        head, labels = self._classifier()
        return tagger_of(self.encoder, self.front_end, head, labels, self._precision(precision), window, hop)

    def tag(self, x: Sound, rate: int | None = None, **options: Unpack[TagKeywords]) -> Tags:
        """Tag one clip; see `tag_batch`."""
        return self.tag_batch([x], rate, **options)[0]

    def tag_batch(
        self, sounds: Iterable[Sound], rate: int | None = None, *, batch: int = 16, **options: Unpack[TagKeywords]
    ) -> list[Tags]:
        """Score the classes of clips of any length, for the whole clip and for each window.

        By default the scores equal those of `asit evaluate`: a clip up to the training input's length is one padded
        window; a longer one is split into windows, the last of which ends with the clip.

        Args:
            sounds, rate: as for `embed_batch`.
            batch: windows per forward pass.
            options: precision, window and hop, as for `tagger`.

        Raises:
            AudioError: as `embed_batch`.
            ConfigError: as `tagger`.
        """
        return self.tagger(**options).run_sounds(several(sounds, "tag"), rate, batch)

    def stream_tags(
        self,
        x: Sound,
        rate: int | None = None,
        *,
        batch: int = 8,
        start: float = 0.0,
        seconds: float | None = None,
        **options: Unpack[TagKeywords],
    ) -> Iterator[Tags]:
        """Yield the tags of a long input, or of `seconds` from `start` on, in parts of up to `batch` windows.

        Memory is constant. `join_tags` joins the parts to the result of `tag`; times count from `start`. Arguments and
        errors are those of `tag_batch`; an error in a file is raised when it is reached.
        """
        return self.tagger(**options).stream(x, rate, batch, start, seconds)

    def attention(
        self, x: Sound, rate: int | None = None, layer: int = -1, precision: Precision = "float32"
    ) -> AttentionMap:
        """Return the class token's attention to the patches of the first window.

        Arguments and errors are those of `embed`; `precision` is that of the blocks below `layer`, the attention itself
        is computed in float32.
        """
        embedder = self.embedder(layer, precision)
        return attention_of(embedder, next(embedder.windows(x, rate)))

    def _precision(self, wanted: Precision) -> Literal["float32", "bf16"]:
        """Resolve "auto"."""
        if wanted not in ("auto", "float32", "bf16"):
            raise ConfigError(f"precision {wanted!r}", "auto, float32 or bf16")
        name = self.precision.name if wanted == "auto" else wanted
        return "bf16" if name == "bf16" else "float32"
