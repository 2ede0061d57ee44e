"""The readme of the package index: README.md, whose links into the repository are put as text.

Relative links lead nowhere on the index, and the repository has no public address that could be put before them. The
files that they name are in the source distribution.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def without_relative_links(text: str) -> str:
    """Return Markdown in which only links to addresses are left; others become their text and the file they name."""

    def plain(found: re.Match[str]) -> str:
        label, target = found.groups()
        return f"`{target}`" if label.strip("`") == target else f"{label} (`{target}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)\s]+)\)", plain, text)


class Readme(MetadataHookInterface):
    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": without_relative_links(text)}
