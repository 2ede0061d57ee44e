"""Features of many clips by frozen models: each clip is read once, by several processes and threads, with a cache.

Letters: N clips, P patches, D width, F mel bins.

The windows of a clip are a batch of their own, run on one thread; several threads take several clips. So the features
of a clip depend on the clip alone, bit for bit: not on the other clips, on the number of processes and threads, or on
the cache. On one core clips of 10 s are as fast as in larger batches, clips of 1 s half as fast (docs/evaluate.md).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.waveforms import read_clip
from asit.data.shards import range_reader
from asit.errors import AsitError, AudioError, CatalogueError
from asit.evaluate.feature_cache import Shelf, Store, key_of
from asit.evaluate.feature_readers import TOKENS, EncoderReader, HeadReader, LogMelReader
from asit.io import storage
from asit.progress import Counter
from asit.runtime import World
from asit.training.block_rounds import BlockRounds, block_ends

Array = npt.NDArray[Any]

MOST, LONGEST = 64, 600.0
"""Clips, and seconds of sound, after which a block ends: the tokens of a block must fit in memory."""
FORMAT = "4"
"""Version of the cached features; 4: files with more audio than their headers promise are read to the end."""


@dataclass(frozen=True)
class Collected:
    """Features of the clips that could be read.

    Attributes:
        vectors: reader's name -> kind -> (n, width) float32, rows in the order of `kept`.
        tokens: reader's name -> n arrays (P, D) float16, of a `HeadReader` (W, features) float32; only where `TOKENS`
            was wanted.
        kept: (n,) int64, the clips they belong to, ascending.
        bad: (path, reason) of the clips that could not be read.
        cached: clips whose features were all in the cache.
    """

    vectors: dict[str, dict[str, npt.NDArray[np.float32]]]
    tokens: dict[str, list[Array]]
    kept: npt.NDArray[np.int64]
    bad: list[tuple[str, str]]
    cached: int


Readers = Mapping[str, EncoderReader | HeadReader | LogMelReader]
Of = tuple[str, str]
"""A reader's name, and a kind of feature."""


_ClipFeatures = dict[Of, Array] | str
"""Features of one clip, or why it cannot be read."""


def collect(
    clips: Catalogue,
    wanted: Readers,
    *,
    store: Store | None = None,
    world: World | None = None,
    bad_files: float = 0.1,
    progress: Counter | None = None,
) -> Collected | None:
    """Return the features of all clips; every process calls this, and those other than the main one return None.

    Args:
        clips: N of them, in any order.
        wanted: name -> reader of some kinds; all take audio of one rate.
        store: the cache; None: everything is computed.
        world: the processes that share the work; None: this one alone.
        bad_files: share of clips that may be unreadable; they are left out and listed.
        progress: called with clips done, clips in all, and unreadable ones.

    Raises:
        CatalogueError: no clip, or more unreadable ones than `bad_files` allows.
        AsitError: features that are not finite, or of different lengths where a kind keeps the order in time.
    """
    if not len(clips):
        raise CatalogueError("no clip to take features of", "at least one", "check the split that was chosen")
    world = world or World(0, 1, torch.device("cpu"), "")
    order = np.array(sorted(range(len(clips)), key=clips.ids().__getitem__), np.int64)
    ends = block_ends(clips.seconds[order].tolist(), MOST, LONGEST)
    starts = [0, *ends[:-1]]
    gathered = _Gathered(clips, bad_files)
    with _threads(world) as pool:
        reading = _Reading(wanted, store, pool)

        def read(share: Sequence[int]) -> list[tuple[int, list[_ClipFeatures], int]]:
            return [(b, *reading.block([clips[int(i)] for i in order[starts[b] : ends[b]]])) for b in share]

        for parts in BlockRounds(world, range(len(ends))).run(read):
            for b, found, cached in sorted(itertools.chain.from_iterable(parts), key=operator.itemgetter(0)):
                gathered.cached += cached
                gathered.take(order[starts[b] : ends[b]].tolist(), found, world.main)
            if progress is not None:
                progress(gathered.done, len(clips), len(gathered.bad))
    return gathered.result(wanted) if world.main else None


@contextmanager
def _threads(world: World) -> Iterator[ThreadPoolExecutor]:
    """A pool of as many threads as torch has, each of which computes on one; one thread for an accelerator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before if world.device.type == "cpu" else 1) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


class _Reading:
    """Features of blocks of clips: what the cache has, and the rest computed and added to it."""

    def __init__(self, wanted: Readers, store: Store | None, pool: ThreadPoolExecutor) -> None:
        self.wanted, self.pool = wanted, pool
        self.every: list[Of] = [(name, kind) for name, reader in wanted.items() for kind in reader.kinds]
        self.shelves: dict[Of, Shelf] = {}
        self.fingerprint = functools.cache(storage.fingerprint)  # each shard in a store is requested once
        if store is not None:
            self.shelves = {of: store.shelf(FORMAT, wanted[of[0]].digest, of[1]) for of in self.every}

    def block(self, clips: Sequence[Clip]) -> tuple[list[_ClipFeatures], int]:
        """Return the features of each clip of a block, and how many were all in the cache."""
        keys = [self._key(clip) for clip in clips] if self.shelves else []
        kept: list[dict[Of, Array]] = [{} for _ in clips]
        for of, shelf in self.shelves.items():
            held = shelf.get(keys)
            for have, key in zip(kept, keys, strict=True):
                if key in held:
                    have[of] = held[key]
        missing = [[of for of in self.every if of not in have] for have in kept]
        lacking = (clip for clip, lack in zip(clips, missing, strict=True) if lack)
        stored = range_reader.fetch(span for clip in lacking if (span := _far(clip)) is not None)
        made = list(self.pool.map(self._clip, clips, missing, itertools.repeat(stored)))
        for of, shelf in self.shelves.items():
            shelf.put(
                {key: new[of] for key, new in zip(keys, made, strict=True) if isinstance(new, dict) and of in new}
            )
        found = [new if isinstance(new, str) else have | new for have, new in zip(kept, made, strict=True)]
        return found, made.count({})

    def _clip(self, clip: Clip, missing: Sequence[Of], stored: Mapping[range_reader.ByteSpan, bytes]) -> _ClipFeatures:
        """Return the missing features of one clip, which is read once; or why it cannot be read."""
        if not missing:
            return {}
        settings = next(iter(self.wanted.values())).front_end
        try:
            wave = read_clip(clip, settings.rate, resampler=settings.resampler, found=stored)
        except AudioError as error:
            return error.found
        out: dict[Of, Array] = {}
        for name in dict.fromkeys(name for name, _ in missing):
            kinds = tuple(kind for of, kind in missing if of == name)
            try:
                read = self.wanted[name](wave, kinds)
            except AudioError as error:  # of the model: the sound has been read
                raise AsitError(f"{clip.path}: {error.found}", error.expected, error.remedy) from None
            out |= {(name, kind): array for kind, array in read.items()}
        return out

    def _key(self, clip: Clip) -> bytes:
        """Return the key of a clip: its path and part, and the fingerprint of its file or shard."""
        file = clip.shard or clip.path
        if _far(clip) is not None:
            stamp = f"{self.fingerprint(file)} {clip.offset} {clip.size}"
        else:
            try:
                stamp = " ".join(map(str, storage.fingerprint(file)))
            except OSError:
                stamp = "missing"
        return key_of(clip.path, stamp, repr(clip.start), repr(clip.seconds))


def _far(clip: Clip) -> range_reader.ByteSpan | None:
    """Return the range of a clip in an object store, from which the clips of a block are fetched together."""
    return range_reader.span_of(clip) if clip.shard is not None and storage.is_url(clip.shard) else None


class _Gathered:
    """Tables of features, filled block by block."""

    def __init__(self, clips: Catalogue, bad_files: float) -> None:
        self.clips, self.allowed, self.share = clips, int(bad_files * len(clips)), bad_files
        self.done, self.cached = 0, 0
        self.bad: list[tuple[str, str]] = []
        self.read = np.zeros(len(clips), bool)
        self.vectors: dict[Of, npt.NDArray[np.float32]] = {}
        self.tokens: dict[str, dict[int, Array]] = {}

    def take(self, rows: Sequence[int], found: Sequence[_ClipFeatures], keep: bool) -> None:
        """Add the clips of a block; `keep`: also their features, which only the main process needs."""
        self.done += len(rows)
        for row, features in zip(rows, found, strict=True):
            if isinstance(features, str):
                self.bad.append((self.clips[row].path, features))
            elif keep:
                self.read[row] = True
                for of, array in features.items():
                    self._put(of, row, array)
        if len(self.bad) > self.allowed:
            reasons = "\n    ".join(reason for _, reason in self.bad[:3])
            raise CatalogueError(
                f"{len(self.bad)} of the first {self.done} clips cannot be read, the first:\n    {reasons}",
                f"at most {self.allowed} of {len(self.read)} (bad_files {self.share:g})",
                "mend these files, leave them out, or raise --bad-files",
            )

    def _put(self, of: Of, row: int, array: Array) -> None:
        name, kind = of
        if kind == TOKENS:
            self.tokens.setdefault(name, {})[row] = array
            return
        if of not in self.vectors:
            self.vectors[of] = np.empty((len(self.read), array.size), np.float32)
        table = self.vectors[of]
        if array.size != table.shape[1]:
            raise AsitError(
                f"{kind} features of {table.shape[1]} and of {array.size} values: the clips have different lengths",
                "clips of one length for features that keep the order in time",
                "give a length that all clips are cut or padded to with --seconds, or choose another pooling",
            )
        table[row] = array.reshape(-1)

    def result(self, wanted: Readers) -> Collected:
        kept = np.flatnonzero(self.read)
        if not len(kept):
            raise CatalogueError(
                f"none of the {len(self.read)} clips can be read, the first: {self.bad[0][1]}",
                "clips that can be read",
                "mend these files",
            )
        complete = len(kept) == len(self.read)
        vectors: dict[str, dict[str, npt.NDArray[np.float32]]] = {name: {} for name in wanted}
        for (name, kind), table in self.vectors.items():
            vectors[name][kind] = table if complete else table[kept]
        tokens = {name: [of[i] for i in kept.tolist()] for name, of in self.tokens.items()}
        return Collected(vectors, tokens, kept, self.bad, self.cached)
