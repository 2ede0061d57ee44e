"""Recordings that cannot be read during a run: each is logged once, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Sequence

from asit.errors import TrainingError
from asit.runtime import World
from asit.training.metrics_log import Records


class Failures:
    """Recordings that any process could not read.

    Args:
        most: recordings that may fail before the run stops.
        records: of this process; only the main process writes them.
        world: the processes.
    """

    def __init__(self, most: int, records: Records, world: World) -> None:
        self.most, self.records, self.world = most, records, world
        self._known: dict[str, None] = {}
        self._new: list[str] = []

    @property
    def unshared(self) -> bool:
        """Whether this process has failures that the other processes do not know of."""
        return bool(self._new)

    def add(self, found: Sequence[str], step: int) -> None:
        """Count the failures of a batch; a recording counts once, however many epochs it fails in.

        Raises:
            TrainingError: more than `most` have failed; those of other processes count after `share`.
        """
        new = [text for text in dict.fromkeys(found) if text not in self._known]
        self._known |= dict.fromkeys(new)
        if self.world.size == 1:
            self._log(new, step)
        else:
            self._new += new
        if len(self._known) > self.most:
            raise TrainingError(
                f"{len(self._known)} recordings could not be read, the last: {next(reversed(self._known))}",
                f"at most {self.most}, from the setting bad_files",
                "see log.txt for their names; repair the storage, or raise bad_files",
            )

    def share(self, step: int) -> None:
        """Exchange new failures between the processes; every process must call this."""
        mine, self._new = self._new, []
        shared = dict.fromkeys(text for one in self.world.gather(mine) for text in one)
        self._known |= shared
        self._log(list(shared), step)

    def _log(self, texts: Sequence[str], step: int) -> None:
        for text in texts:
            self.records.event(step, f"left out: {text}; another clip stands in for it")
