"""An index of recordings, read from its folder and searched for the rows nearest to a vector or a sound.

A search is one matrix product over all rows.

Letters: N rows, D width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from asit.audio.stream import Sound, open_sound
from asit.errors import AsitError, ConfigError
from asit.interop.loading import load
from asit.model.audio_model import AudioModel, Embedding
from asit.model.inference.overlap import ClipPooling
from asit.search import embed_windows, index_files
from asit.search.index_files import Files, Source

_OVERLAP = 1e-3  # s that two stretches must share; windows end to end share less
_TOGETHER = 64  # windows of a long query that are held at once

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbour:
    """A row of an index, a stretch of a recording, and how similar it is to what was searched for.

    Attributes:
        row: its number, from 0.
        path: the file, absolute.
        name: of the recording, as it was given.
        start, end: in s from the beginning of the file or the tar shard's member.
        label: where the index's input had labels.
        member: of a recording in a tar shard.
        similarity: the cosine, from -1 to 1; of a row by its number 1.
    """

    row: int
    path: str
    name: str
    start: float
    end: float
    label: str | None = None
    member: str | None = None
    similarity: float = 1.0


class Index:
    """Vectors of recordings to search, made by `asit.search.build`; safe to search from several threads.

    Attributes:
        folder: of its files.
        card: how the vectors were made; JSON.
        sources: the recordings.
        rows: (N,) of `index_files.ROW`, sorted by recording.
        vectors: (N, D) float16, on the disk.
    """

    def __init__(
        self,
        folder: Path,
        card: dict[str, Any],
        sources: list[Source],
        rows: npt.NDArray[Any],
        vectors: npt.NDArray[np.float16],
    ) -> None:
        self.folder, self.card, self.sources, self.rows, self.vectors = folder, card, sources, rows, vectors
        self._model: AudioModel | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Index:
        """Read an index.

        Raises:
            CheckpointError: it is missing, damaged, altered, or of a newer format.
        """
        folder = Path(folder)
        card = index_files.read_card(folder)
        return cls(folder, card, *index_files.read_files(folder, card))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        shape = f"{len(self)} rows of {len(self.sources)} recordings, {self.vectors.shape[1]} values each"
        return f"Index({shape}, {str(self.folder)!r})"

    @property
    def pooling(self) -> ClipPooling:
        """How the vectors are pooled."""
        return cast(ClipPooling, self.card["pooling"])

    @functools.cached_property
    def _matrix(self) -> Vector:
        """The vectors as float32, in which CPUs multiply faster."""
        out: Vector = torch.tensor(self.vectors).float().numpy()  # four times as fast as numpy
        return out

    @functools.cached_property
    def _by_path(self) -> dict[tuple[str, str | None], list[int]]:
        indices = defaultdict[tuple[str, str | None], list[int]](list)
        for i, source in enumerate(self.sources):
            indices[source.path, source.member].append(i)
        return indices

    def cosines(self, vectors: Vector) -> Vector:
        """Return the cosine similarity of vectors (W, D) of length 1 to all rows, (W, N)."""
        found: Vector = vectors @ self._matrix.T
        return found

    def source(self, row: int) -> Source:
        """Return the recording of a row, whose `item().sound()` is its file or bytes; raises ConfigError where there is
        no such row."""
        if not 0 <= row < len(self):
            raise ConfigError(f"row {row}", f"0 to {len(self) - 1}", "take the rows of neighbours")
        return self.sources[int(self.rows["file"][row])]

    def clip(self, row: int) -> Neighbour:
        """Return a row; errors are those of `source`."""
        source = self.source(row)
        shared = {name: getattr(source, name) for name in ("path", "name", "label", "member")}
        return Neighbour(row=row, start=float(self.rows["start"][row]), end=float(self.rows["end"][row]), **shared)

    def vector(self, row: int) -> Vector:
        """Return the vector (D,) of a row; errors are those of `source`."""
        self.source(row)
        return self.vectors[row].astype(np.float32)

    def query(self, embedding: Embedding) -> Vector:
        """Return the vector (D,) of an embedded sound, pooled as the index's own."""
        return embed_windows.unit_vector(embedding, self.pooling)

    def nearest(
        self, vector: npt.ArrayLike, k: int = 10, without: npt.NDArray[np.int64] | None = None
    ) -> list[Neighbour]:
        """Return the k rows of the highest cosine similarity to a vector, best first.

        Args:
            vector: (D,) of any length but 0.
            k: at least 1; fewer are returned where the index has fewer.
            without: rows to leave out.

        Raises:
            ConfigError: a vector of another width, or not finite, or a k below 1.
        """
        query = np.asarray(vector, np.float64)
        length = float(np.linalg.norm(query)) if query.shape == (self.card["width"],) else 0.0
        if not 0 < length < math.inf:
            raise ConfigError(
                f"a vector of shape {query.shape}" + (" that is zero or not finite" if query.ndim == 1 else ""),
                f"({self.card['width']},) finite numbers",
                "make it with Index.query(model.embed(sound)), by the model of the index",
            )
        if k < 1:
            raise ConfigError(f"k is {k}", "at least 1", "ask for one neighbour or more")
        unit = (query / length).astype(np.float32)
        scores = self._matrix @ unit
        if without is not None:
            scores[without] = -np.inf
        keep = min(k, int(np.isfinite(scores).sum()))
        best = np.argpartition(-scores, keep - 1)[:keep] if 0 < keep < len(scores) else np.arange(len(scores))
        found = best[np.lexsort((best, -scores[best]))][:keep]
        return [dataclasses.replace(self.clip(row), similarity=float(scores[row])) for row in found.tolist()]

    def similar(
        self,
        sound: Sound,
        k: int = 10,
        model: AudioModel | None = None,
        rate: int | None = None,
        start: float = 0.0,
        seconds: float | None = None,
        include_self: bool = False,
    ) -> list[Neighbour]:
        """Return the k rows that sound most like a sound, or like a part of it.

        The vector of a sound that is longer than the index's windows is the mean of its windows' vectors.

        Args:
            sound: a file, bytes, array or tensor; see `AudioModel.embed`.
            model: the one that the index was made with; None: it is loaded from the path in the card.
            rate: of arrays in Hz.
            start, seconds: the part to search by; None: to the end.
            include_self: also return rows of the sound itself, where it is a file of the index.

        Raises:
            AudioError: the sound cannot be read.
            ConfigError: another model than the index's, or k below 1.
            CheckpointError: the model cannot be loaded.
        """
        if model is not None:
            self.check(model)
        model, own = model or self.model(), None
        if not include_self and isinstance(sound, str | os.PathLike):
            own = self.rows_of(os.fspath(sound), start=start, seconds=seconds)
        return self.nearest(self.vector_of(sound, model, rate, start, seconds), k, own)

    def vector_of(
        self,
        sound: Sound,
        model: AudioModel,
        rate: int | None = None,
        start: float = 0.0,
        seconds: float | None = None,
        check: Callable[[], None] | None = None,
    ) -> Vector:
        """Return the vector (D,) of a sound of any length; see `similar`, which also checks the model.

        `check` is called between batches of windows, and may raise.
        """
        total = np.zeros(self.card["width"])
        settings = {name: self.card[name] for name in ("layer", "precision")}
        with open_sound(sound, rate, model.rate, model.front_end.settings.resampler, start, seconds) as source:
            windows = embed_windows.cut(source.blocks(), model.rate, self.card["window"], self.card["hop"])
            while waveforms := [wave for _, _, wave in itertools.islice(windows, _TOGETHER)]:
                if check is not None:
                    check()
                found = model.embed_batch(waveforms, **settings, patches=False)
                total += np.sum([self.query(one) for one in found], axis=0, dtype=np.float64)
        return total.astype(np.float32)

    def rows_of(
        self, path: str, member: str | None = None, start: float = 0.0, seconds: float | None = None
    ) -> npt.NDArray[np.int64]:
        """Return the rows of a file, or of a tar shard's member, that overlap the part from `start` on; none where the
        index does not hold it."""
        names = {Files().path(path), os.path.realpath(path)}
        held = [i for name in names for i in self._by_path.get((name, member), ())]
        end = math.inf if seconds is None else start + seconds
        rows = self.rows_at(held)
        times = self.rows[rows]
        found: npt.NDArray[np.int64] = rows[(times["start"] < end - _OVERLAP) & (times["end"] > start + _OVERLAP)]
        return found

    def rows_at(self, indices: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the rows of some of the `sources`, given by their indices."""
        wanted = np.zeros(len(self.sources), bool)
        wanted[list(indices)] = True
        return np.flatnonzero(wanted[self.rows["file"]])

    def check(self, model: AudioModel) -> None:
        """Raise ConfigError for a model that is not the one the index was made with."""
        mine, other = self.card["model"], index_files.facts(model)
        names = [name for name in other if mine.get(name) != other[name]]
        if names:
            raise ConfigError(
                f"{self.folder} was made with another model: not the same {', '.join(names)}",
                f"the model with the weights {str(mine.get('weights'))[:12]}, which was {mine.get('path')}",
                "give that model, or rebuild the index with this one: asit index ... --overwrite",
            )

    def model(self, device: str | torch.device = "cpu") -> AudioModel:
        """Return the model that the index was made with, loaded once from the path in the card.

        Raises:
            CheckpointError: it is missing.
            ConfigError: another model is there now, or the card has no path.
        """
        if self._model is None:
            path = self.card["model"]["path"]
            if path is None:
                raise ConfigError(f"{self.folder} has no path of its model", "a model", "pass it: --model MODEL")
            try:
                model = load(path, device)
            except AsitError as error:
                raise type(error)(
                    f"the model of {self.folder} cannot be loaded: {error.found}",
                    error.expected,
                    "give its path: --model MODEL",
                ) from error
            self.check(model)
            self._model = model
        return self._model
