"""Recordings that cannot be read while a run goes: each is told once, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Sequence

from asit.errors import TrainingError
from asit.runtime import World
from asit.training.metrics_log import Records


class Failures:
    """What all processes could not read, told by the one that writes the records.

    Args:
        most: recordings that may fail before the run stops.
        records: of this process; only the main one's write.
        world: the processes.
    """

    def __init__(self, most: int, records: Records, world: World) -> None:
        self.most, self.records, self.world = most, records, world
        self._known: dict[str, None] = {}
        self._new: list[str] = []

    @property
    def untold(self) -> bool:
        """Whether this process has met some that the others do not know of."""
        return bool(self._new)

    def add(self, found: Sequence[str], step: int) -> None:
        """Count what a batch could not read, each recording once however many epochs it fails in.

        Raises:
            TrainingError: more than `most` have failed; those of other processes count from `share` on.
        """
        new = [text for text in dict.fromkeys(found) if text not in self._known]
        self._known |= dict.fromkeys(new)
        if self.world.size == 1:
            self._tell(new, step)
        else:
            self._new += new
        if len(self._known) > self.most:
            raise TrainingError(
                f"{len(self._known)} recordings could not be read, the last: {next(reversed(self._known))}",
                f"at most {self.most}, from the setting bad_files",
                "see log.txt for their names; mend the storage, or raise bad_files",
            )

    def share(self, step: int) -> None:
        """Tell all processes of what each has met since the last time; every process must call this."""
        mine, self._new = self._new, []
        # All of them are new to all: what was shared before is known everywhere.
        met = dict.fromkeys(text for one in self.world.gather(mine) for text in one)
        self._known |= met
        self._tell(list(met), step)

    def _tell(self, texts: Sequence[str], step: int) -> None:
        for text in texts:
            self.records.event(step, f"left out: {text}; another clip stands in for it")
