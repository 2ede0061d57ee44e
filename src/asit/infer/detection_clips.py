"""Detections cut out of their recordings as WAV files, at the recording's own rate and with all of its channels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from asit.audio.files import read_channels
from asit.data.catalogue.inputs import Item, named
from asit.errors import AsitError, ConfigError
from asit.io import atomic
from asit.io.local_files import file_name, relative_stem
from asit.model.inference.tagging import Tag

_SUBTYPES = {"PCM_24": "PCM_24", "PCM_32": "PCM_24", "FLOAT": "FLOAT", "DOUBLE": "FLOAT"}
"""Samples of a clip by those of its recording; of all others 16 bits. A float32 holds 24 bits."""
_BITS = {"PCM_16": (16, np.int16), "PCM_24": (24, np.int32)}


@dataclass
class DetectionClips:
    """Collects detections, and cuts them out into a new folder: LABEL/RECORDING_STARTs_LABEL_SCORE.wav.

    Attributes:
        folder: absent, or empty.
        padding: seconds that a clip has before and after the detection, within the recording.
        most: most clips of a label, those with the highest scores; None: all.

    Raises:
        ConfigError: the folder holds something.
    """

    folder: Path
    padding: float = 0.0
    most: int | None = None
    _found: dict[str, list[tuple[float, int, Item, Tag]]] = field(default_factory=lambda: defaultdict(list), init=False)
    _count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise ConfigError(
                f"{self.folder} exists and is not empty", "a new folder for the clips", "name another one"
            )

    def add(self, item: Item, found: Sequence[Tag]) -> None:
        """Add the detections of a recording; times count from the beginning of its file."""
        for tag in found:
            self._found[tag.label].append((-tag.score, self._count, item, tag))
            self._count += 1

    def save(self) -> tuple[int, list[str]]:
        """Write the folder atomically; returns the number of clips, and why others could not be read.

        Raises:
            CheckpointError: the folder was written by another process meanwhile, or the disk is full.
        """
        chosen = [one for found in self._found.values() for one in sorted(found, key=lambda one: one[:2])[: self.most]]
        items: dict[int, list[tuple[Item, Tag]]] = defaultdict(list)
        for _, _, item, tag in sorted(chosen, key=lambda one: one[1]):
            items[id(item)].append((item, tag))
        clips, faults, names = 0, list[str](), set[str]()
        with atomic.write_folder(self.folder, sync=False) as draft:
            for found in items.values():
                try:
                    sound = found[0][0].sound()
                    for item, tag in found:
                        self._write(draft / _clip_name(item, tag, names), sound, tag)
                        clips += 1
                except (AsitError, OSError) as error:
                    reason = error.found if isinstance(error, AsitError) else error.strerror or str(error)
                    faults.append(named(found[0][0].text, reason))
        return clips, faults

    def _write(self, path: Path, sound: str | bytes, tag: Tag) -> None:
        samples, info = read_channels(sound, tag.start - self.padding, tag.end + self.padding)
        subtype = _SUBTYPES.get(info.format.rpartition("/")[2], "PCM_16")
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, _whole(samples, subtype), info.rate, subtype, format="WAV")


def _whole(samples: np.ndarray, subtype: str) -> np.ndarray:
    """Return samples as integers: libsndfile would multiply by 32767, and not restore what it has read."""
    if subtype not in _BITS:
        return samples
    bits, kind = _BITS[subtype]
    full = 1 << (bits - 1)
    whole = np.rint(samples.astype(np.float64) * full).clip(-full, full - 1).astype(kind)
    return whole << (whole.itemsize * 8 - bits)


def _clip_name(item: Item, tag: Tag, names: set[str]) -> str:
    """Return a name that is not among `names`, and add it; their case is ignored, as some disks do."""
    label = file_name(tag.label, 80)
    recording = file_name(str(relative_stem(item.name)), 100)
    name = f"{label}/{recording}_{tag.start:.3f}s_{label}_{tag.score:.3f}"
    number = 1
    while (numbered := f"{name}-{number}" if number > 1 else name).casefold() in names:
        number += 1
    names.add(numbered.casefold())
    return f"{numbered}.wav"
