"""Embed recordings in a page, encoded small, so that the page needs no other file; the mistakes of a model with their
sound."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from markupsafe import Markup
from matplotlib.image import imsave
from numpy.typing import NDArray

from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.waveforms import read_clip
from asit.errors import AsitError
from asit.io import storage
from asit.report.score_records import Scores
from asit.report.templates import part

AUDIO_SECONDS = 10.0
"""Longest audio of a player."""
RATE = 16000
"""Samples per second of recordings in a page."""
COLUMNS, MELS = 400, 64
"""Most columns, and bins, of a recording's spectrogram."""
MOST_BYTES = 4_000_000
"""All recordings of a page together; further ones are named without audio."""
_MP3_RATES = {8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000}


def player(waveform: NDArray[np.float32], rate: int, label: str) -> Markup:
    """Return an <audio> element: MP3 where the rate allows it, since every browser plays it; else FLAC.

    Args:
        waveform: (S,) float32.
        rate: samples per second.
        label: for screen readers.
    """
    mp3 = rate in _MP3_RATES and "MP3" in soundfile.available_formats()
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="MP3" if mp3 else "FLAC", compression_level=0.9)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return part("player", f"data:audio/{'mpeg' if mp3 else 'flac'};base64,{encoded}", label)


def picture(values: NDArray[Any], low: float, high: float, colours: str, kind: str) -> str:
    """Return a (T, F) array as an image's data URI, low bins at the bottom; `kind` is png or jpeg."""
    buffer = io.BytesIO()
    extra = {"quality": 68} if kind == "jpeg" else {"optimize": True}
    imsave(buffer, values.T, vmin=low, vmax=high, cmap=colours, format=kind, origin="lower", pil_kwargs=extra)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spectrogram(waveform: NDArray[np.float32]) -> str:
    """The picture of a log-mel of at most COLUMNS columns and MELS bins."""
    import torch  # takes seconds, and a page without sound does not need it

    from asit.audio.fbank import FrontEnd

    shift = max(10.0, 1000 * len(waveform) / RATE / COLUMNS)
    front_end = FrontEnd(FrontEndSettings(rate=RATE, mels=MELS, shift_ms=shift, mean=0.0, std=1.0))
    padded = front_end.pad(torch.from_numpy(waveform), max(len(waveform), front_end.window))
    values = front_end.fbank(padded[None]).flatten(0, -3)[0].numpy()
    low, high = np.quantile(values, [0.02, 0.998])
    return picture(values, float(low), float(max(high, low + 1e-3)), "magma", "jpeg")


class Recordings:
    """The clips of a run, found by id and read on demand.

    Args:
        folder: the run's; its catalogue has the paths of the recordings.
    """

    def __init__(self, folder: Path) -> None:
        self._catalogue, self._bytes, self._problem = folder / "catalogue.jsonl", 0, ""
        self._clips: dict[str, Clip] = {}

    def find(self, ids: Iterable[str]) -> None:
        """Look up clips in the catalogue, all in one pass."""
        wanted = set(ids)
        try:
            catalogue = Catalogue.read(self._catalogue, look=False)
        except AsitError as error:
            self._problem = error.found
            return
        self._clips = {name: catalogue[row] for row, name in enumerate(catalogue.ids()) if name in wanted}

    def player(self, clip: Clip | str) -> Markup:
        """Return a player for a clip or the id of one that was looked up, or the reason why there is none."""
        if isinstance(clip, str):
            if clip not in self._clips:
                return part("no_sound", self._problem or f"{clip} is not in the run's catalogue")
            clip = self._clips[clip]
        location = clip.shard or clip.path
        if not storage.is_url(location) and not Path(location).is_file():
            return part("no_sound", f"{clip.path} is not there")
        if self._bytes >= MOST_BYTES:
            return part("no_sound", f"left out: the page holds {MOST_BYTES / 1e6:.0f} MB of sound already")
        try:
            waveform = read_clip(clip, RATE, seconds=min(AUDIO_SECONDS, clip.seconds))
        except AsitError as error:
            return part("no_sound", error.found)
        name = _basename(clip.path)
        made = part("picture", _spectrogram(waveform), f"spectrogram of {name}") + player(waveform, RATE, name)
        self._bytes += len(made)
        return made + (part("first_seconds", AUDIO_SECONDS) if clip.seconds > AUDIO_SECONDS else "")


SOUNDS = 20
"""Clips with sound on a page."""
CLASSES = 12
"""Multi-label data: classes whose worst clips are named, the lowest average precision first."""
EACH = 3
"""Clips of such a class that are named for scoring too high, and as many for scoring too low."""
CLASSES_WITH_SOUND = 5
"""The first of these classes, of which the two worst clips of each kind are played."""


def single_label(mistakes: Sequence[Mapping[str, Any]], recordings: Recordings) -> Markup:
    """Return the wrong answers with the highest scores.

    Args:
        mistakes: of a result record: path, truth, predicted, score; start and seconds if the clip is a part of a file.
        recordings: source of the sound.
    """
    if not mistakes:
        return part("text", "No clip was given a wrong class.")
    cards = []
    for held in sorted(mistakes, key=lambda m: -float(m["score"]))[:SOUNDS]:
        path, seconds, begin = str(held["path"]), float(held.get("seconds", AUDIO_SECONDS)), float(held.get("start", 0))
        sound = recordings.player(Clip(path=path, seconds=seconds, rate=0, channels=0, start=begin))
        cards.append((held["truth"], held["predicted"], float(held["score"]), _basename(path), sound))
    return part("mistakes", cards)


def multi_label(
    held: Scores, classes: Sequence[str], per_class: Sequence[Mapping[str, Any]], recordings: Recordings
) -> Markup:
    """Return, for the classes with the lowest average precision, the highest scores without the label and the lowest
    with it.

    Args:
        held: scores of all clips.
        classes: (C,) names, in the order of the scores.
        per_class: of a result record; classes without clips are skipped.
        recordings: source of the sound.
    """
    columns = {name: i for i, name in enumerate(classes)}
    rows = [row for row in per_class if row.get("AP") is not None and row["class"] in columns]
    worst = sorted(rows, key=lambda row: (float(row["AP"]), str(row["class"])))[:CLASSES]
    if not worst:
        return part("missing", "No class has both clips and an average precision.")
    positives = held.positives
    chosen: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for row in worst:
        scores, has = held.scores[:, columns[row["class"]]], positives[:, columns[row["class"]]]
        chosen.append((_smallest(-scores, ~has), _smallest(scores, has)))
    recordings.find(str(held.ids[i]) for high, low in chosen[:CLASSES_WITH_SOUND] for i in [*high, *low])
    shown = []
    for number, (row, (high, low)) in enumerate(zip(worst, chosen, strict=True)):
        cards = []
        for kind, clips in (("scored highest without the label", high), ("scored lowest with the label", low)):
            for rank, i in enumerate(clips):
                name, score = str(held.ids[i]), float(held.scores[i, columns[row["class"]]])
                labels = ", ".join(classes[j] for j in held.indices[held.indptr[i] : held.indptr[i + 1]]) or "none"
                sound = recordings.player(name) if number < CLASSES_WITH_SOUND and rank < 2 else ""
                cards.append((kind, score, labels, _basename(name), sound))
        shown.append((row["class"], row["AP"], row["clips"], cards))
    return part("worst_classes", shown, min(len(worst), CLASSES_WITH_SOUND))


def _smallest(values: NDArray[np.float32], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rows of `among` with the smallest values, in order, at most EACH."""
    rows = np.flatnonzero(among)
    if len(rows) > EACH:
        rows = rows[np.argpartition(values[rows], EACH - 1)[:EACH]]
    return rows[np.lexsort((rows, values[rows]))]


def _basename(path: str) -> str:
    return os.path.basename(path)  # noqa: PTH119
