"""Which clips come into which tar shard, and what they are called there: settled before any is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from asit.data.catalogue import locations
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.shards import encode as members
from asit.errors import ConfigError
from asit.io import storage

# Bytes a second of sound written anew, to settle beforehand what a shard holds. 16-bit FLAC takes about half of its
# samples, Opus of libsndfile about 4 kB at 16 kHz (7,200 Arabic words: 0.49 and 3.7 kB; noise takes more).
_FLAC_SHARE, _OPUS = 0.55, 3200.0
_COVER = 1536  # bytes of headers, padding and sidecar around a member


def layout(
    source: Catalogue, encode: members.Encoding, rate: int, shard_mb: float, clips: int | None, shuffle: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The first clip of each shard and the end, and the order in which clips are laid into them."""
    if not shard_mb > 0 or (clips is not None and clips < 1):
        raise ConfigError(f"--shard-mb {shard_mb:g}, --clips {clips}", "above 0, and 1 or more", "change them")
    count = len(source)
    order = np.arange(count) if shuffle is None else np.random.default_rng([shuffle, count]).permutation(count)
    if clips is not None:
        return np.append(np.arange(0, count, clips), count), order
    if encode == "original":
        size = _lengths(source)
    else:
        size = source.seconds.astype(np.float64) * (_OPUS if encode == "opus" else 2.0 * rate * _FLAC_SHARE)
    ends = np.cumsum(size[order] + _COVER)
    shard = np.floor((ends - ends[0]) / (shard_mb * 1e6)).astype(np.int64)
    return np.append(np.flatnonzero(np.diff(shard, prepend=-1)), count), order


def _lengths(source: Catalogue) -> npt.NDArray[np.float64]:
    """Bytes of each clip: of its file, or of as much of the file as the clip takes; 0 of what is not there."""
    if source.shards is not None and (source.shards.codes >= 0).all():
        return source.shards.spans[:, 1].astype(np.float64)
    sizes = np.zeros(len(source))
    clips = [source[place] for place in range(len(source))]
    parts = Counter(clip.path for clip in clips) if source.starts.any() else Counter[str]()
    for place, clip in enumerate(clips):
        if clip.shard is not None or storage.is_url(clip.path):
            sizes[place] = clip.size or clip.seconds * 2 * clip.rate
            continue
        if parts[clip.path] > 1 or clip.start:  # it becomes FLAC
            sizes[place] = clip.seconds * 2 * clip.rate * _FLAC_SHARE
            continue
        try:
            sizes[place] = Path(clip.path).stat().st_size
        except OSError:
            sizes[place] = 0
    return sizes


def names(source: Catalogue) -> list[str]:
    """A name for each clip, below one folder: no place of this machine goes into shards."""
    names = source.ids()
    outside = [name for name in names if storage.is_url(name) or Path(name).is_absolute()]
    if not outside:
        return names
    top = locations.common([Clip(name, 1.0, 1, 1) for name in outside])
    inside = set(names).difference(outside)
    short = {name: locations.relative(name, top).lstrip("/") for name in outside}
    return [short[name] if name in short and short[name] not in inside else name.lstrip("/") for name in names]
