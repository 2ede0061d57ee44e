"""Praat TextGrids in the long and the short text form, as UTF-8 or UTF-16.

Source: Praat manual, "TextGrid file formats". Only numbers and quoted texts that stand alone, and flags such as
<exists>, are data, so both forms are the same sequence; "!" begins a comment.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from asit.data.annotations.box import Box, check_order, lines_of, seconds
from asit.data.catalogue.tables import bad_line
from asit.errors import CatalogueError, suggestion

_TOKEN = re.compile(r'"((?:[^"]|"")*)"|(?<!\S)!.*|(<\w+>)|(?<!\S)([+-]?\d[\d.]*(?:[eE][+-]?\d+)?)|[^\s"<]+')


class _Tokens:
    """The data of a TextGrid in order, each with its line."""

    def __init__(self, path: Path) -> None:
        self.path, self.line, self.found = path, 1, self._read("\n".join(lines_of(path)))

    def _read(self, text: str) -> Iterator[tuple[int, str, str]]:
        line, at = 1, 0
        for match in _TOKEN.finditer(text):
            line, at = line + text.count("\n", at, match.start()), match.start()
            quoted, flag, number = match.groups()
            if quoted is not None:
                yield line, "text", quoted.replace('""', '"')
            elif flag or number:
                yield line, "flag" if flag else "number", flag or number

    def next(self, kind: str, field: str) -> str:
        line, found, value = next(self.found, (self.line, "the end of the file", ""))
        if found != kind:
            shown = f"{found} {value!r:.40}" if value else found
            raise bad_line(self.path, line, f"{shown} in place of {field}", f"a {kind}", "save the TextGrid again")
        self.line = line
        return value

    def count(self, field: str) -> int:
        value = self.next("number", field)
        if not value.isdecimal():
            raise bad_line(self.path, self.line, f"{field} is {value}", "a whole number", "save the TextGrid again")
        return int(value)

    def time(self, field: str) -> float:
        value = self.next("number", field)
        return seconds(self.path, self.line, field, value)


def read_textgrid(path: Path, tier: str = "") -> list[Box]:
    """Read the intervals with a text, and the points, of one tier.

    Args:
        path: the file.
        tier: its name; "": the only tier with annotations.

    Raises:
        CatalogueError: no such tier, several to choose from, or damaged contents; names file, line and field.
    """
    tokens = _Tokens(path)
    for expected in ("ooTextFile", "TextGrid"):
        if (found := tokens.next("text", f'"{expected}"')) != expected:
            raise bad_line(
                path, tokens.line, f'"{found[:40]}"', f'"{expected}", as Praat writes it', "save it in Praat"
            )
    tokens.next("number", "xmin"), tokens.next("number", "xmax")
    tiers: dict[str, list[Box]] = {}
    exists = tokens.next("flag", "<exists>") == "<exists>"
    for _ in range(tokens.count("the number of tiers") if exists else 0):
        kind = tokens.next("text", "the class of a tier")
        if kind not in ("IntervalTier", "TextTier"):
            raise bad_line(path, tokens.line, f'"{kind[:40]}"', "a tier of class IntervalTier or TextTier")
        name = tokens.next("text", "the name of a tier")
        tokens.next("number", "xmin"), tokens.next("number", "xmax")
        boxes = [_box(tokens, kind) for _ in range(tokens.count("the number of intervals or points"))]
        tiers.setdefault(name, []).extend(box for box in boxes if box.label)
    return _chosen(path, tiers, tier)


def _box(tokens: _Tokens, kind: str) -> Box:
    if kind == "TextTier":
        start = end = tokens.time("the time of a point")
    else:
        start, end = tokens.time("xmin of an interval"), tokens.time("xmax of an interval")
        check_order(tokens.path, tokens.line, start, end)
    return Box(start, end, tokens.next("text", "its text").strip() or None)


def _chosen(path: Path, tiers: dict[str, list[Box]], tier: str) -> list[Box]:
    names = ", ".join(f"'{name}'" for name in tiers)
    fix = "give its name as --columns label=TIER"
    if tier:
        if tier not in tiers:
            raise CatalogueError(f"{path} has no tier '{tier}'" + suggestion(tier, tiers), f"one of {names}", fix)
        return tiers[tier]
    filled = [name for name, boxes in tiers.items() if boxes]
    if len(filled) > 1:
        raise CatalogueError(f"{path} has annotations in {len(filled)} tiers: {names}", "the tier of the labels", fix)
    return tiers[filled[0]] if filled else []
