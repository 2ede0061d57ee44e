"""Plan which clips go into which tar shard, before any is read, and keep the plan beside the shards for a resume.

Shards follow from the lengths of files alone, so they depend neither on the number of processes nor on interruptions.
Beside each finished shard a record lists what is in it, until the index is written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from asit.data.catalogue.catalogue import INDEX, Catalogue, Clip, common_root, relative
from asit.data.catalogue.columns import decode, json_line
from asit.errors import ConfigError
from asit.io import parsing, storage

Encoding = Literal["original", "flac", "opus"]
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
"""Rates that Opus has, Hz (RFC 6716, section 2)."""
SKIPPED = "index.skipped.jsonl"
PLAN = "shards.plan.json"
"""What shards are being written here; deleted when all of them are."""
_LAYOUT = 1
# Estimated bytes per second of re-encoded audio: 16-bit FLAC takes about half of its samples, Opus of libsndfile about
# 4 kB at 16 kHz (7,200 Arabic words: 0.49 and 3.7 kB; noise takes more).
_FLAC_SHARE, _OPUS = 0.55, 3200.0
_COVER = 1536  # bytes of headers, padding and sidecar around a member


@dataclass(frozen=True)
class PackSettings:
    """How a catalogue is packed.

    Attributes:
        encode, rate: see `tar_writer.encode_clip`; rate in Hz.
        shard_mb: megabytes of a shard, roughly.
        clips: clips of a shard instead of megabytes.
        shuffle: seed of the order in which clips go into shards; None: the catalogue's. The index keeps that one.
        workers: processes; the bytes written do not depend on their number.
        bad_files: largest share of clips that cannot be read.
    """

    encode: Encoding = "original"
    rate: int = 16000
    shard_mb: float = 256.0
    clips: int | None = None
    shuffle: int | None = None
    workers: int = 1
    bad_files: float = 0.1


@dataclass(frozen=True)
class ShardPlan:
    """The shards of a catalogue.

    Attributes:
        out: folder or URL.
        names: of the tar files, one each shard.
        bounds: (shards + 1,) int64, first clip of each shard in `order`, and the end.
        order: (clips,) int64, rows of the catalogue.
        facts: what must agree for shards that exist to be of use.
    """

    out: str
    names: list[str]
    bounds: npt.NDArray[np.int64]
    order: npt.NDArray[np.int64]
    facts: dict[str, Any]

    @classmethod
    def make(cls, source: Catalogue, out: str, settings: PackSettings) -> ShardPlan:
        """Plan the shards.

        Raises:
            ConfigError: sizes that make no shards.
        """
        bounds, order = _layout(source, settings)
        facts = {
            "layout": _LAYOUT,
            "clips": len(source),
            "source": source.digest,
            "encode": settings.encode,
            "rate": None if settings.encode == "original" else settings.rate,
            "shuffle": settings.shuffle,
            "shards": len(bounds) - 1,
            "bounds": hashlib.sha256(bounds.astype("<i8").tobytes()).hexdigest(),
        }
        return cls(out, [f"shard-{number:06d}.tar" for number in range(len(bounds) - 1)], bounds, order, facts)

    def claim(self, *, resume: bool, overwrite: bool) -> dict[str, int]:
        """Make the location ready; return the finished shards, each with how many of its clips were left out.

        Raises:
            ConfigError: it is not free, or its shards are of another plan.
            StoreError: it cannot be made, read or written.
        """
        out, found = self.out, storage.list(self.out)
        if foreign := [name for name in found if not _is_own(name)]:
            raise ConfigError(
                f"{out} holds files that are not shards: {', '.join(foreign[:5])}",
                "a new or empty folder for the shards",
                "choose another --out",
            )
        if found and not (resume or overwrite):
            what = "finished shards" if INDEX in found else "shards"
            raise ConfigError(
                f"{out} holds {what} already ({len(found)} files)",
                "a new or empty folder, or a choice",
                "pass --resume to continue with them, or --overwrite to delete them and start again",
            )
        if resume and PLAN in found:
            self._check_same()
            return self._finished(found)
        if resume and INDEX in found:
            raise ConfigError(f"{out} is finished", "shards that are not", f"use it: --data {storage.join(out, INDEX)}")
        tars = [name for name in found if name.endswith(".tar")]
        if resume and tars:  # they may be another program's
            raise ConfigError(
                f"{out} holds {len(tars)} shards, such as {tars[0]}, and no {PLAN}",
                "shards that an earlier asit shard began",
                "choose another --out, or pass --overwrite to delete them and start again",
            )
        # The index first: shards without it count as unfinished.
        for name in sorted(found, key=lambda name: name != INDEX):
            storage.remove(storage.join(out, name))
        storage.write(storage.join(out, PLAN), json_line(self.facts))
        return {}

    def record(self, shard: dict[str, Any]) -> None:
        """Keep what `tar_writer.write_shard` returned beside the shard."""
        storage.write(self._record(shard["name"]), json.dumps(shard).encode())

    def recorded(self, name: str) -> dict[str, Any]:
        """Return what is in a finished shard; empty where its record is damaged."""
        return _read_json(self._record(name))

    def finish(self) -> None:
        """Delete the records and the plan."""
        for location in [*map(self._record, self.names), storage.join(self.out, PLAN)]:
            storage.remove(location)

    def _record(self, name: str) -> str:
        return storage.join(self.out, _record_name(name))

    def _check_same(self) -> None:
        before = _read_json(storage.join(self.out, PLAN))
        if differ := [name for name in self.facts if before.get(name, ...) != self.facts[name]]:
            text = ", ".join(
                "other clips" if name == "source" else f"{name} {before.get(name)}, now {self.facts[name]}"
                for name in differ
                if name != "bounds" or differ == ["bounds"]
            )
            raise ConfigError(
                f"the shards in {self.out} were begun with other settings: {text}",
                "the same catalogue and settings, to continue with them",
                "use those again, or pass --overwrite to start again",
            )

    def _finished(self, found: dict[str, int | None]) -> dict[str, int]:
        """Return shards of the length that their records give; drafts of killed writers are deleted."""
        for name in found:
            if name.startswith("."):
                storage.remove(storage.join(self.out, name))
        done = {}
        for name in self.names:
            if name in found and _record_name(name) in found:
                shard, length = self.recorded(name), found[name]
                length = storage.size(storage.join(self.out, name)) if length is None else length
                if shard and shard["bytes"] == length:
                    done[name] = len(shard["skipped"])
        return done


def _read_json(location: str) -> dict[str, Any]:
    """Return the object in a file; empty where it is damaged."""
    try:
        found = parsing.from_json(decode(storage.read(location)), surrogates=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _record_name(shard: str) -> str:
    return shard.removesuffix(".tar") + ".done.json"


def _is_own(name: str) -> bool:
    draft = name.startswith((".shard-", ".shards.", ".index.")) and name.endswith(".tmp")
    number = name.removeprefix("shard-").partition(".")
    shard = name.startswith("shard-") and number[0].isdigit() and number[2] in ("tar", "done.json")
    return draft or shard or name in (INDEX, SKIPPED, PLAN)


def _layout(source: Catalogue, settings: PackSettings) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the bounds and the order of a plan."""
    shard_mb, clips, count = settings.shard_mb, settings.clips, len(source)
    if not shard_mb > 0 or (clips is not None and clips < 1):
        raise ConfigError(f"--shard-mb {shard_mb:g}, --clips {clips}", "above 0, and 1 or more", "change them")
    order = np.arange(count)
    if settings.shuffle is not None:
        order = np.random.default_rng([settings.shuffle, count]).permutation(count)
    if clips is not None:
        return np.append(np.arange(0, count, clips), count), order
    if settings.encode == "original":
        sizes = _sizes(source)
    else:
        rate = _OPUS if settings.encode == "opus" else 2.0 * settings.rate * _FLAC_SHARE
        sizes = source.seconds.astype(np.float64) * rate
    ends = np.cumsum(sizes[order] + _COVER)
    shard = np.floor((ends - ends[0]) / (shard_mb * 1e6)).astype(np.int64)
    return np.append(np.flatnonzero(np.diff(shard, prepend=-1)), count), order


def _sizes(source: Catalogue) -> npt.NDArray[np.float64]:
    """Return the bytes of each clip: of its file, or estimated for a part of one; 0 of a missing file."""
    if source.shards is not None and (source.shards.codes >= 0).all():
        return source.shards.spans[:, 1].astype(np.float64)
    sizes = np.zeros(len(source))
    clips = [source[row] for row in range(len(source))]
    parts = Counter(clip.path for clip in clips) if source.starts.any() else Counter[str]()
    for row, clip in enumerate(clips):
        if clip.shard is not None or storage.is_url(clip.path):
            sizes[row] = clip.size or clip.seconds * 2 * clip.rate
        elif parts[clip.path] > 1 or clip.start:  # it becomes FLAC
            sizes[row] = clip.seconds * 2 * clip.rate * _FLAC_SHARE
        else:
            try:
                sizes[row] = Path(clip.path).stat().st_size
            except OSError:
                sizes[row] = 0
    return sizes


def relative_names(source: Catalogue) -> list[str]:
    """Return a name for each clip, below one folder: no path of this machine goes into shards."""
    names = source.ids()
    outside = [name for name in names if storage.is_url(name) or Path(name).is_absolute()]
    if not outside:
        return names
    top = common_root([Clip(name, 1.0, 1, 1) for name in outside])
    inside = set(names).difference(outside)
    short = {name: relative(name, top).lstrip("/") for name in outside}
    return [short[name] if name in short and short[name] not in inside else name.lstrip("/") for name in names]
