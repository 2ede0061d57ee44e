"""Detections as the annotation files of other programs: Raven selection tables, Audacity label tracks, Praat TextGrids.

Sources: Raven Pro's manual (selection tables), and BirdNET-Analyzer's for tables of several recordings; Audacity's
manual, "Importing and Exporting Labels"; Praat's manual, "TextGrid file formats".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from asit.audio import files
from asit.data.catalogue.inputs import Item
from asit.io import storage
from asit.model.inference.tagging import Tag, Tags

AnnotationFormat = Literal["raven", "audacity", "textgrid"]

ENDINGS: dict[AnnotationFormat, str] = {
    "raven": ".Table.1.selections.txt",
    "audacity": ".txt",
    "textgrid": ".TextGrid",
}
"""How the file of a recording is called: Raven's own ending, and what Audacity and Praat list."""

_RAVEN = (
    *("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)"),
    *("Begin Path", "Begin File", "File Offset (s)", "Annotation", "Score"),
)


class Annotator:
    """Makes the lines of a file, of one recording or, of Raven, of several.

    Begin and end in Raven's table count from the beginning of the first recording, as Raven has them where it opens the
    recordings of a table as one sequence; File Offset is the begin in the recording itself. Only recordings with a
    selection are part of the sequence.

    Args:
        form: the format.
        band: lowest and highest frequency of Raven's selections, Hz.
    """

    def __init__(self, form: AnnotationFormat, band: tuple[float, float]) -> None:
        self.form, self.band = form, band
        self.header = "\t".join(_RAVEN) if form == "raven" else ""
        self._begins: dict[str, float] = {}  # of each recording in the sequence, s; by path
        self._total, self._count = 0.0, 0

    def lines(self, item: Item, tags: Tags, found: Sequence[Tag]) -> Iterator[str]:
        """Yield the lines of a recording.

        Args:
            item, tags: the recording, and its scores.
            found: its detections by start; times count from the beginning of its file.

        Raises:
            AudioError: a recording of which a part is tagged cannot be read any more.
        """
        if self.form == "audacity":
            yield from audacity_lines(found)
        elif self.form == "textgrid":
            yield from textgrid_lines(_length(item, tags), found, tags.multi)
        elif found:
            yield from self._selections(item, tags, found)

    def _selections(self, item: Item, tags: Tags, found: Sequence[Tag]) -> Iterator[str]:
        path = item.path if item.member is None else item.name
        if not storage.is_url(path) and item.member is None:
            path = str(Path(path).absolute())
        if path not in self._begins:
            self._begins[path] = self._total
            self._total += _length(item, tags)
        places = [plain(path), plain(Path(path).name)]
        band = [f"{hz:g}" for hz in self.band]
        for tag in found:
            self._count += 1
            times = [f"{self._begins[path] + time:.6f}" for time in (tag.start, tag.end)]
            known = [f"{tag.start:.6f}", plain(tag.label), f"{tag.score:.6f}"]
            yield "\t".join([str(self._count), "Spectrogram 1", "1", *times, *band, *places, *known])


def audacity_lines(found: Sequence[Tag]) -> Iterator[str]:
    """Yield a line for each detection: start, end, label, and the score, which Audacity ignores."""
    for tag in found:
        yield f"{tag.start:.6f}\t{tag.end:.6f}\t{plain(tag.label)}\t{tag.score:.6f}"


def textgrid_lines(seconds: float, found: Sequence[Tag], multi: bool) -> Iterator[str]:
    """Yield a TextGrid with one interval tier, or with one for each label, in the order in which they begin.

    Intervals of a tier may not overlap, so one begins where the one before it ends at the earliest.

    Args:
        seconds: length of the recording.
        found: its detections, by start.
        multi: a tier for each label.
    """
    tiers: dict[str, list[tuple[float, float, str]]] = {}
    for tag in found:
        tier = tiers.setdefault(tag.label if multi else "label", [])
        last = tier[-1][1] if tier else 0.0
        start, end = max(tag.start, last), min(tag.end, seconds)
        if end <= start:
            continue
        if start > last:
            tier.append((last, start, ""))
        tier.append((start, end, tag.label))
    tiers = tiers or {"label": []}
    for tier in tiers.values():
        last = tier[-1][1] if tier else 0.0
        if last < seconds:
            tier.append((last, seconds, ""))
    yield from ('File type = "ooTextFile"', 'Object class = "TextGrid"', "")
    yield from ("xmin = 0", f"xmax = {seconds:.6f}", "tiers? <exists>", f"size = {len(tiers)}", "item []:")
    for number, (label, tier) in enumerate(tiers.items(), 1):
        yield from (f"    item [{number}]:", '        class = "IntervalTier"', f"        name = {_quoted(label)}")
        yield from ("        xmin = 0", f"        xmax = {seconds:.6f}", f"        intervals: size = {len(tier)}")
        for place, (start, end, text) in enumerate(tier, 1):
            yield from (f"        intervals [{place}]:", f"            xmin = {start:.6f}")
            yield from (f"            xmax = {end:.6f}", f"            text = {_quoted(text)}")


def _length(item: Item, tags: Tags) -> float:
    """Return the length of a recording, s; of one that is tagged in part by its header, or else to that part's end."""
    end = item.start + float(tags.ends[-1])
    if not item.start and item.seconds is None:
        return end
    return max(end, files.probe(item.sound()).seconds)


def plain(text: str) -> str:
    """Return a text without tabs, line breaks and other control characters, which would end its cell."""
    return "".join(c if c.isprintable() else " " for c in text)


def _quoted(text: str) -> str:
    return '"' + plain(text).replace('"', '""') + '"'
