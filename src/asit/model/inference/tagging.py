"""Sound of any length to the scores of a classifier, window by window, and to labels with times.

Windows are cut and scored as in `asit evaluate`, so a clip has the same scores in both.

Letters: S samples, T frames, F mel bins, C classes, W windows.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from asit import runtime
from asit.audio.faults import Wave
from asit.audio.fbank import FrontEnd
from asit.audio.stream import is_transposed
from asit.audio.windowing import cut
from asit.errors import AudioError, ConfigError
from asit.model.classifier import Head, Labelling
from asit.model.inference.batching import BatchedModel
from asit.model.inference.data_frames import data_frame
from asit.model.inference.embedding import Precision, check_finite
from asit.model.vit import Encoder, Tokens

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Precision", "Tag", "Tagger", "Tags", "join_tags"]


class TagKeywords(TypedDict, total=False):
    """Keyword arguments of `AudioModel.tagger`, which documents them."""

    precision: Precision
    window: float | None
    hop: float | None


@dataclass(frozen=True)
class Tag:
    """A label of a stretch of sound: its score in [0, 1], and the stretch's start and end in seconds."""

    label: str
    score: float
    start: float
    end: float


@dataclass(frozen=True)
class Tags:
    """The scores of one sound, or of a stretch of a long one; float32, on the CPU.

    Attributes:
        classes: names of the C classes.
        multi: whether a clip may have several labels: scores are sigmoids then, else a softmax.
        clip: (C,) mean over the windows, as `asit evaluate` scores a clip.
        windows: (W, C) scores of each window.
        starts: (W,) where the windows begin, in seconds from the sound's start.
        ends: (W,) where they end, without padding.
    """

    classes: tuple[str, ...]
    multi: bool
    clip: Tensor
    windows: Tensor
    starts: Tensor
    ends: Tensor

    def __repr__(self) -> str:
        best = ", ".join(f"{tag.label} {tag.score:.3f}" for tag in self.top(3))
        kind = "several labels a clip" if self.multi else "one label a clip"
        windows = f"{len(self.windows)} window{'s' if len(self.windows) > 1 else ''}"
        return f"Tags({float(self.ends[-1]):.2f} s, {windows}, {len(self.classes)} classes, {kind}; {best})"

    def to_frame(self) -> DataFrame:
        """Return a pandas DataFrame with a row for each window: start, end, and a column of scores for each class.

        Detections are a table too: ``pandas.DataFrame(tags.segments(0.5))``.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame({"start": self.starts, "end": self.ends}, self.windows, self.classes)

    def top(self, k: int = 5, threshold: float | None = None) -> list[Tag]:
        """Return the k labels with the highest scores of the clip, highest first; with `threshold` only labels that
        score at least that."""
        start, end = float(self.starts[0]), float(self.ends[-1])
        scores, order = self.clip.sort(descending=True, stable=True)
        found = [
            Tag(self.classes[i], score, start, end)
            for score, i in zip(scores[:k].tolist(), order[:k].tolist(), strict=True)
        ]
        return found if threshold is None else [tag for tag in found if tag.score >= threshold]

    def segments(self, threshold: float, k: int | None = None, merge: bool = True) -> list[Tag]:
        """Return the stretches over which a label holds, by start, then by score: consecutive windows with it, merged.

        Args:
            threshold: score from which on a window has a label.
            k: most labels of a window; None: all above the threshold.
            merge: False: a stretch for each window that has the label.

        Returns:
            labels, each with the highest score of its windows.
        """
        has = self.windows >= threshold
        if k is not None and k < len(self.classes):
            best = torch.zeros_like(has)
            has &= best.scatter_(1, self.windows.topk(k, 1).indices, True)
        # By class, then by window: the first of each row of windows, and the one after its last.
        if merge:
            edge = torch.zeros(1, len(self.classes), dtype=torch.int8)
            change = torch.diff(torch.cat([edge, has.to(torch.int8), edge]), dim=0).T
            owners, firsts = (change == 1).nonzero(as_tuple=True)
            _, ends = (change == -1).nonzero(as_tuple=True)
        else:
            owners, firsts = has.T.nonzero(as_tuple=True)
            ends = firsts + 1
        found = [
            Tag(
                self.classes[owner],
                float(self.windows[first:end, owner].max()),
                float(self.starts[first]),
                float(self.ends[end - 1]),
            )
            for owner, first, end in zip(owners.tolist(), firsts.tolist(), ends.tolist(), strict=True)
        ]
        return sorted(found, key=lambda tag: (tag.start, -tag.score))


def join_tags(pieces: Sequence[Tags]) -> Tags:
    """Join the tags of consecutive stretches of one sound."""
    windows, starts, ends = (
        torch.cat([getattr(piece, name) for piece in pieces]) for name in ("windows", "starts", "ends")
    )
    return Tags(pieces[0].classes, pieces[0].multi, windows.double().mean(0).float(), windows, starts, ends)


@dataclass(frozen=True)
class TagWindow:
    """A stretch of a sound to be scored.

    Attributes:
        x: (T, F) normalised log-mel of the training length.
        start, end: of the window without padding, in seconds.
        columns: of patches; the same in all windows.
    """

    x: Tensor
    start: float
    end: float
    columns: int


@dataclass(frozen=True)
class Tagger(BatchedModel[TagWindow, Tags, Tags]):
    """A classifier with its front end: any thread may make `windows`, one thread calls `run`.

    Args:
        encoder, front_end, head: in evaluation mode.
        classes: names of the C outputs.
        multi: sigmoids instead of a softmax.
        precision: arithmetic of the encoder; the head's is float32.
        window: samples of a window, at most those of the training length; a shorter one is filled up to it by the
            front end's padding rule.
        hop: samples from window to window.
    """

    encoder: Encoder
    front_end: FrontEnd
    head: Head
    classes: tuple[str, ...]
    multi: bool
    precision: Literal["float32", "bf16"]
    window: int
    hop: float
    pooled: ClassVar[int] = 1

    def windows_of(self, blocks: Iterator[Wave]) -> Generator[TagWindow, None, None]:
        """See `BatchedModel.windows_of`."""
        rate = self.front_end.settings.rate
        # Less than half a hop of the log-mel is no reason for another window.
        for wave, first in cut(blocks, self.window, self.hop, self.front_end.shift / 2):
            x = training_input(self.front_end, self.encoder.frames, 0.0, torch.from_numpy(wave[None]))[0, 0]
            yield TagWindow(x, first / rate, (first + len(wave)) / rate, self.encoder.grid[0])

    def run(self, windows: Sequence[TagWindow]) -> list[Tags]:
        """See `BatchedModel.run`; the tags of each window."""
        device = self.encoder.pos_embed.device
        with torch.inference_mode(), runtime.autocast(self.precision, device):
            logits = self.head(self._tokens(windows)).float()
            scores = (logits.sigmoid() if self.multi else logits.softmax(1)).cpu()
        scores = scores.clone()  # outside inference mode
        times = torch.tensor([(window.start, window.end) for window in windows], device="cpu")
        return [
            Tags(self.classes, self.multi, clip, one, start, end)
            for clip, one, start, end in zip(scores, scores.split(1), *times.T.unsqueeze(2), strict=True)
        ]

    def pooled_of(self, windows: Sequence[TagWindow]) -> Tensor:
        """Return what the head pools of each window, (W, features) float32, on the model's device."""
        with torch.inference_mode(), runtime.autocast(self.precision, self.encoder.pos_embed.device):
            return self.head.pool(self._tokens(windows))

    def _tokens(self, windows: Sequence[TagWindow]) -> Tokens:
        x = torch.stack([window.x for window in windows]).unsqueeze(1)
        return self.head.tokens(self.encoder, x.to(self.encoder.pos_embed.device))

    def gatherer(self) -> _TagGatherer:
        """See `BatchedModel.gatherer`."""
        return _TagGatherer()

    @staticmethod
    def checked(found: Tags) -> Tags:
        """See `BatchedModel.checked`."""
        check_finite(found.windows, "scores")
        return found


class _TagGatherer:
    """Collects the tags of the windows of one sound."""

    def __init__(self) -> None:
        self.parts: list[Tags] = []

    def add(self, part: Tags) -> None:
        self.parts.append(part)

    def ready(self) -> Tags | None:
        return self.rest() if self.parts else None

    def rest(self) -> Tags:
        parts, self.parts = self.parts, []
        return join_tags(parts)


def tagger_of(
    encoder: Encoder,
    front_end: FrontEnd,
    head: Head,
    labels: Labelling,
    precision: Literal["float32", "bf16"],
    window: float | None,
    hop: float | None,
) -> Tagger:
    """Return a tagger; see `AudioModel.tagger`. The front end's hop is the least for window and hop."""
    rate, samples = front_end.settings.rate, front_end.samples_for(encoder.frames)
    longest, least = max(samples / rate, labels.seconds), front_end.shift / rate
    if window is not None and not least <= window <= longest + 1e-9:
        raise ConfigError(
            f"windows of {window:g} s",
            f"{least:g} to {longest:g} s, the length of the input in training",
            "leave the window out for that length",
        )
    size = samples if window is None else min(samples, round(window * rate))
    if hop is not None and not least <= hop <= (window or longest) + 1e-9:
        raise ConfigError(
            f"a hop of {hop:g} s between windows of {size / rate:g} s",
            f"{least:g} s to the window's length, so that no sound is left out",
            "leave the hop out for windows end to end",
        )
    step = float(size) if hop is None else min(hop * rate, float(size))
    return Tagger(
        encoder, front_end, head, classes=labels.classes, multi=labels.multi, precision=precision, window=size, hop=step
    )


def training_input(front_end: FrontEnd, frames: int, longest: float, waveforms: Tensor) -> Tensor:
    """Return waveforms (R, S) as the network's input of the training length: (R, 1, T, F) with T = `frames`.

    Args:
        longest: seconds that a waveform may have although the frames do not cover them.

    Raises:
        AudioError: waveforms of another shape, longer than in training, or with samples that are not finite.
    """
    rate, need = front_end.settings.rate, front_end.samples_for(frames)
    most = max(need, round(longest * rate) + 1) if longest else need
    if not isinstance(waveforms, Tensor):
        raise AudioError(
            f"waveforms that are a {type(waveforms).__name__}",
            "a tensor (rows, samples)",
            "wrap an array in torch.from_numpy",
        )
    transposed = is_transposed(waveforms.shape)
    if waveforms.ndim != 2 or not waveforms.is_floating_point() or not 0 < waveforms.shape[1] <= most or transposed:
        raise AudioError(
            f"waveforms of shape {tuple(waveforms.shape)}, {waveforms.dtype}",
            f"(rows, samples) floats of 1 to {most} samples ({most / rate:.3f} s at {rate} Hz)",
            "turn the axes" if transposed else "cut a longer clip into windows of that length",
        )
    if not waveforms.isfinite().all():
        bad = (~waveforms.isfinite().all(1)).nonzero().flatten().tolist()
        raise AudioError(
            f"{len(bad)} of {len(waveforms)} waveforms hold samples that are not finite (rows {bad[:3]})",
            "numbers in [-1, 1]",
            "mend them or leave them out",
        )
    if waveforms.shape[1] < need:
        waveforms = torch.stack([front_end.pad(wave, need) for wave in waveforms])
    # Single precision first: not every device has double.
    logmel = front_end.fbank(waveforms.float().to(front_end.hann.device))[:, :frames]
    if logmel.shape[1] < frames:
        logmel = torch.stack([front_end.pad_frames(one, frames) for one in logmel])
    return front_end.normalise(logmel).unsqueeze(1)
