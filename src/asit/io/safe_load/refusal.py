"""What a file holds that it must not, and how names out of such a file are shown."""

from __future__ import annotations


class Refused(Exception):  # noqa: N818  # never leaves this package
    """What the file holds; the file's name goes before it.

    Args:
        what: goes on where the file's name ends.
        remedy: the way out.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy or (
            "where the file came from, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        )


def shown(text: str, most: int = 80) -> str:
    """A name out of a file of unknown origin, such that a terminal can only print it."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut if cut.isprintable() else ascii(cut)
