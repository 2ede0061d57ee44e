"""The exception for content that is refused, and names out of such a file for display."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818  # never leaves this package
    """Refused content.

    Args:
        what: the sentence after the file's name.
        remedy: the fix.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy or (
            "where the file came from, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        )


def shown(text: str, most: int = 80) -> str:
    """Return a name out of a file of unknown origin, shortened and printable."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut if cut.isprintable() else ascii(cut)
