"""Front end, encoder and card as one thing: saved, loaded, and asked for embeddings of sound, or for labels.

Letters: S samples, T frames, F mel bins, P patches, D width, R rows, C classes, W windows.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.audio.stream import Sound
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import ConfigError
from asit.io import checkpoint
from asit.model import card as cards
from asit.model.attention import AttentionMap, attention_of
from asit.model.card import CLASSIFIER, ENCODER
from asit.model.classifier import Head, Labelling
from asit.model.inference.embedding import Embedder, Embedding, Precision, hop_frames, several
from asit.model.inference.tagging import Tag, Tagger, Tags, tagger_of, training_input
from asit.model.vit import Encoder, empty_encoder

__all__ = ["CLASSIFIER", "ENCODER", "AttentionMap", "AudioModel", "Embedding", "Sound", "Tag", "Tags"]


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
        """A model, on the CPU, of a copy of the weights of `encoder` and `head`, so that their training can go on.

        Args:
            frames: T of the training view.

        Raises:
            ConfigError: as the class.
            CheckpointError: the encoder is not of these settings.
        """
        own = empty_encoder(encoder_settings, frames, front_end_settings.mels)
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
        return cards.write_card(self.encoder, self.front_end.settings, self.training, self.head, self.labelling)

    @property
    def precision(self) -> runtime.Precision:
        """What precision "auto" is on the model's device, and why; measured once in a process."""
        return runtime.best_precision(self.encoder.pos_embed.device.type)

    def to(self, device: str | torch.device) -> AudioModel:
        """Move the model; returns itself.

        Raises:
            ConfigError: torch sees no such device.
        """
        device = runtime.existing_device(device)
        with torch.inference_mode(False):  # weights made in inference mode could not be told from those before
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
            ConfigError: torch sees no such device.
        """
        encoder, front_end, training, head, labels = cards.read_folder(Path(folder))
        return cls(encoder, front_end, training, head, labels).to(device)

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
        arithmetic = runtime.autocast(self._precision(precision), self.encoder.pos_embed.device)
        x = self.input(waves)
        with arithmetic:
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
        longest = 0.0 if self.labelling is None else self.labelling.seconds
        return training_input(self.front_end, self.frames, longest, waves)

    def _classifier(self) -> Head:
        if self.head is None:
            raise ConfigError(
                "this model has no head and no labels: it is an encoder",
                "a classifier, as fine-tuning writes it",
                "fine-tune it first (`asit finetune`), or ask it for embeddings with embed",
            )
        return self.head

    def embedder(
        self,
        layer: int | None = None,
        precision: Precision = "auto",
        hop: float | None = None,
        patches: bool = True,
    ) -> Embedder:
        """The model's encoder, asked in two stages: threads prepare windows, one thread runs them; see `Embedder`.

        Args:
            layer: block whose output is wanted (0 the first, -1 the last), through the final norm; None: the last.
            precision: arithmetic of the encoder; auto: what the property says.
            hop: seconds between frames; None: from column to column. Smaller ones come from passes a hop apart.
            patches: keep the tokens of all patches.

        Raises:
            ConfigError: no such layer, or a hop that does not divide the columns' step in whole frames of log-mel.
        """
        if layer is not None:
            layer = self.encoder.block_index(layer)
        frames = hop_frames(self.encoder, self.front_end, hop)
        return Embedder(self.encoder, self.front_end, layer, self._precision(precision), frames, patches)

    def embed(
        self,
        x: Sound,
        rate: int | None = None,
        layer: int | None = None,
        precision: Precision = "auto",
        hop: float | None = None,
        patches: bool = True,
    ) -> Embedding:
        """Embed one clip; see `embed_batch`."""
        return self.embed_batch([x], rate, layer, precision, hop=hop, patches=patches)[0]

    def embed_batch(
        self,
        sounds: Iterable[Sound],
        rate: int | None = None,
        layer: int | None = None,
        precision: Precision = "auto",
        batch: int = 16,
        hop: float | None = None,
        patches: bool = True,
    ) -> list[Embedding]:
        """Embed clips of any lengths; what one gives does not depend on its neighbours.

        A clip becomes as many patch columns as it covers, at least one; a last one whose new part is covered by half
        or more is filled by the padding rule, one less covered is left out. Positions are those of the first columns of
        the training view. A clip up to half as long again as the view is seen whole, with resized positions. A longer
        one is cut into windows of the view's length, each a quarter of it over the one before, and blended there; the
        last is moved back to end with the clip.

        Args:
            sounds: files of any rate, their bytes or open files; or samples (S,) or (channels, S), which are averaged.
            rate: sample rate of the arrays in Hz; None: they are at the model's own. Files know theirs.
            layer, precision, hop: as for `embedder`.
            batch: windows that go through the encoder at once.
            patches: whether patch tokens are wanted; without them an hour takes a tenth of the memory.

        Raises:
            AudioError: a sound that is empty, not finite, not floating point, of another shape, or unreadable.
            ConfigError: no such layer or hop.
        """
        return self.embedder(layer, precision, hop, patches).embed(several(sounds, "embed"), rate, batch)

    def stream(
        self,
        x: Sound,
        rate: int | None = None,
        layer: int | None = None,
        precision: Precision = "auto",
        hop: float | None = None,
        patches: bool = False,
        batch: int = 8,
        start: float = 0.0,
        seconds: float | None = None,
    ) -> Iterator[Embedding]:
        """The embedding of a long sound, or of `seconds` of it from `start` on, in constant memory: consecutive
        stretches of up to `batch` windows. Joined they are what `embed` gives; times count from where the part begins.

        Args and errors are those of `embed_batch`; what is wrong in the middle of a file is raised when it is reached.
        """
        return self.embedder(layer, precision, hop, patches).stream(x, rate, batch, start, seconds)

    def tagger(self, precision: Precision = "auto", window: float | None = None, hop: float | None = None) -> Tagger:
        """The classifier, asked in two stages: threads prepare windows, one thread runs them; see `Tagger`.

        Args:
            precision: arithmetic of the encoder.
            window: seconds; None: the training input's length. Shorter ones are filled up to it by the card's rule.
            hop: seconds from window to window; None: the window, so they lie end to end.

        Raises:
            ConfigError: the model is no classifier; a window longer than the training input, or a hop longer than
                the window.
        """
        head, low = self._classifier(), self._precision(precision)
        assert self.labelling is not None
        return tagger_of(self.encoder, self.front_end, head, self.labelling, low, window, hop)

    def tag(
        self,
        x: Sound,
        rate: int | None = None,
        precision: Precision = "auto",
        window: float | None = None,
        hop: float | None = None,
    ) -> Tags:
        """Tag one clip; see `tag_batch`."""
        return self.tag_batch([x], rate, precision, window, hop)[0]

    def tag_batch(
        self,
        sounds: Iterable[Sound],
        rate: int | None = None,
        precision: Precision = "auto",
        window: float | None = None,
        hop: float | None = None,
        batch: int = 16,
    ) -> list[Tags]:
        """Scores of the classes for clips of any lengths, of the whole clip and window by window.

        By default a clip's scores are those of `asit evaluate`: a clip up to the training input's length is one
        window, filled by the card's rule; a longer one is cut into windows, the last moved back to end with the clip.

        Args:
            sounds, rate: as for `embed_batch`.
            precision, window, hop: as for `tagger`.
            batch: windows that go through the network at once.

        Raises:
            AudioError: as `embed_batch`.
            ConfigError: as `tagger`.
        """
        return self.tagger(precision, window, hop).tag(several(sounds, "tag"), rate, batch)

    def stream_tags(
        self,
        x: Sound,
        rate: int | None = None,
        precision: Precision = "auto",
        window: float | None = None,
        hop: float | None = None,
        batch: int = 8,
        start: float = 0.0,
        seconds: float | None = None,
    ) -> Iterator[Tags]:
        """The tags of a long sound, or of `seconds` of it from `start` on, in constant memory: pieces of up to `batch`
        windows. `join_tags` joins them to what `tag` gives; times count from where the part begins.

        Args and errors are those of `tag_batch`; what is wrong in the middle of a file is raised when it is reached.
        """
        return self.tagger(precision, window, hop).stream(x, rate, batch, start, seconds)

    def attention(
        self, x: Sound, rate: int | None = None, layer: int = -1, precision: Precision = "float32"
    ) -> AttentionMap:
        """The class token's attention to the patches of a sound; of a long one, to those of its first window.

        Args and errors are those of `embed`; `layer` is the block, -1 the last, and `precision` the arithmetic of
        those below, for the attention itself is computed in float32.
        """
        embedder = self.embedder(layer, precision)
        return attention_of(embedder, next(embedder.windows(x, rate)))

    def _precision(self, wanted: Precision) -> Literal["float32", "bf16"]:
        """The arithmetic that is meant."""
        if wanted not in ("auto", "float32", "bf16"):
            raise ConfigError(f"precision {wanted!r}", "auto, float32 or bf16")
        name = self.precision.name if wanted == "auto" else wanted
        return "bf16" if name == "bf16" else "float32"
