"""Scores of a classifier on chosen clips, and the records that tell them; the same for any number of processes.

Letters: N clips, C classes, W windows of a block, T frames, F mel bins.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, list_hash
from asit.data.loading.loader import loader
from asit.data.loading.windows import WindowBlock, Windows
from asit.errors import CatalogueError
from asit.evaluate import metrics
from asit.evaluate.bootstrap import DRAWS
from asit.io import atomic
from asit.runtime import Precision, World
from asit.training import run_dir

MISTAKES = 50
"""Most worst mistakes that a record lists."""
Progress = Callable[[int, int, int], None]
"""Called with (clips done, clips in all, unreadable ones)."""


@dataclass(frozen=True)
class Scored:
    """Probabilities of the clips that could be read.

    Attributes:
        rows: (N,) clips of the catalogue, in the order asked for.
        scores: (N, C) float32 probabilities, for a clip of several windows their mean.
        failures: what was found of each clip that could not be read; those are in neither.
    """

    rows: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    failures: list[str]


class Scorer:
    """Scores one list of clips, as often as asked.

    Args:
        windows: the clips, cut into blocks.
        multi: sigmoids instead of a softmax.
        world: its processes share the blocks.
        precision: arithmetic of the network.
        workers: loader processes; 0 with `keep`.
        keep: hold this process's blocks in memory once they have been made.
        bad_files: share of unreadable clips above which scoring stops.
    """

    def __init__(
        self,
        windows: Windows,
        multi: bool,
        world: World,
        precision: Precision,
        *,
        workers: int,
        keep: bool,
        bad_files: float,
    ) -> None:
        self.windows, self.multi, self.world, self.precision = windows, multi, world, precision
        self.workers, self.keep, self.bad_files = workers, keep, bad_files
        self._kept: list[WindowBlock] | None = None

    def __call__(self, network: nn.Module, classes: int, progress: Progress | None = None) -> Scored:
        """Score all clips.

        Args:
            network: (W, 1, T, F) to logits (W, C); is left in evaluation mode.
            classes: C.
            progress: told of the clips as they are done.

        Raises:
            CatalogueError: more clips than allowed cannot be read, or none can.
        """
        network.eval()
        mine = range(self.world.rank, len(self.windows), self.world.size)
        found, made, failed = [], [], 0
        with closing(self._blocks(mine)) as blocks:
            for done, block in enumerate(blocks, 1):
                found.append((block.owner, self._probabilities(network, block.x, classes), block.failures))
                if self.keep:
                    # A copy: what a worker sends lies in shared memory, of which a process may hold few pieces.
                    made.append(block if self._kept is not None else replace(block, x=block.x.clone()))
                failed += len(block.failures)
                if progress is not None and self.world.main:
                    clips = self.windows.done(done * self.world.size)
                    progress(clips, len(self.windows.rows), failed * self.world.size)
        self._kept = made if self.keep else None
        # Blocks in their own order again, whoever made them: sums are then the same for any number of processes.
        everyone = self.world.gather(found)
        ordered = [everyone[i % self.world.size][i // self.world.size] for i in range(len(self.windows))]
        return self._sum(ordered, classes)

    def _blocks(self, mine: Sequence[int]) -> Generator[WindowBlock]:
        if self._kept is not None:
            yield from self._kept
            return
        keys = [[block] for block in mine]
        with closing(loader(self.windows, keys, operator.itemgetter(0), workers=self.workers, pin=False)) as made:
            yield from made

    def _probabilities(self, network: nn.Module, x: Tensor, classes: int) -> npt.NDArray[np.float32]:
        if not len(x):
            return np.zeros((0, classes), np.float32)
        device = self.world.device
        with torch.inference_mode(), self.precision.autocast(device):
            logits = network(x.to(device, non_blocking=True)).float()
        probabilities: npt.NDArray[np.float32] = (logits.sigmoid() if self.multi else logits.softmax(1)).cpu().numpy()
        return probabilities

    def _sum(
        self,
        blocks: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], list[tuple[int, str]]]],
        classes: int,
    ) -> Scored:
        rows = self.windows.rows
        total, count = np.zeros((len(rows), classes)), np.zeros(len(rows), np.int64)
        failures: dict[int, str] = {}
        for owner, probabilities, failed in blocks:
            np.add.at(total, owner, probabilities)
            np.add.at(count, owner, 1)
            failures |= dict(failed)
        good = (count > 0) & ~np.isin(np.arange(len(rows)), list(failures))
        if not good.any() or len(failures) > self.bad_files * len(rows):
            first = "; ".join(list(failures.values())[:3])
            raise CatalogueError(
                f"{len(failures)} of {len(rows)} clips could not be read: {first}{'; ...' * (len(failures) > 3)}",
                f"a share of at most {self.bad_files:g}, from bad_files",
                "mend the storage, or raise bad_files; a score of other clips would not compare",
            )
        scores = (total[good] / count[good, None]).astype(np.float32)
        return Scored(rows[good], scores, list(failures.values()))


def measures(
    scored: Scored, labels: Labels, *, groups: npt.NDArray[Any] | None = None, seed: int = 0, draws: int = DRAWS
) -> dict[str, Any]:
    """Metrics, per-class rows and confusions of the scored clips: parts of a result record.

    Args:
        scored: scores of clips.
        labels: of all clips of the catalogue; soft ones count as whole from 0.5 on.
        groups: (N,) of the scored clips: whole groups are drawn for the intervals; see `units`.
        seed, draws: of the bootstrap.
    """
    part = labels.take(scored.rows)
    if labels.multi:
        return metrics.multi_label(
            scored.scores, part.matrix(np.arange(len(part))) >= 0.5, labels.names, seed=seed, draws=draws, groups=groups
        )
    return metrics.single_label(scored.scores, part.single, labels.names, seed=seed, draws=draws, groups=groups)


def group_codes(catalogue: Catalogue) -> npt.NDArray[np.int64] | None:
    """(N,) a number for each clip's group; a clip without one is a group of its own. None: the catalogue has none."""
    column = catalogue.column("group")
    if column is None:
        return None
    codes = column.codes.astype(np.int64)
    return np.where(codes < 0, len(column.words) + np.arange(len(codes)), codes)


def units(groups: npt.NDArray[np.int64] | None, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64] | None:
    """(n,) what the bootstrap draws of the clips at `rows`: their groups, or None, each clip, where all are of one."""
    if groups is None or len(np.unique(groups[rows])) < 2:
        return None
    return groups[rows]


def record(
    scored: Scored,
    labels: Labels,
    catalogue: Catalogue,
    *,
    task: str,
    split: str,
    weights: str,
    step: int | None,
    seed: int = 0,
    groups: npt.NDArray[Any] | None = None,
) -> dict[str, Any]:
    """One result record (docs/evaluate.md lists its entries)."""
    found = measures(scored, labels, groups=groups, seed=seed)
    out = {
        "task": task,
        "kind": "multi" if labels.multi else "single",
        "split": split,
        "weights": weights,
        "step": step,
        "list": list_hash(catalogue.ids(scored.rows)),
        "unreadable": len(scored.failures),
        **found,
    }
    if not labels.multi:
        out["mistakes"] = _mistakes(scored, labels, catalogue)
    return out


def _mistakes(scored: Scored, labels: Labels, catalogue: Catalogue) -> list[dict[str, Any]]:
    truth, predicted = labels.take(scored.rows).single, scored.scores.argmax(1)
    score = scored.scores.max(1)
    wrong = np.flatnonzero(predicted != truth)
    worst = wrong[np.argsort(-score[wrong], kind="stable")[:MISTAKES]]
    return [
        {
            "path": catalogue[int(scored.rows[i])].path,
            "start": catalogue[int(scored.rows[i])].start,
            "seconds": catalogue[int(scored.rows[i])].seconds,
            "truth": labels.names[truth[i]],
            "predicted": labels.names[predicted[i]],
            "score": float(score[i]),
        }
        for i in worst.tolist()
    ]


def save(out: Path, name: str, scored: Scored, labels: Labels, catalogue: Catalogue) -> None:
    """Keep the scores as OUT/scores/NAME.npz: ids, paths, scores, and the targets in CSR form."""
    part = labels.take(scored.rows)
    place = out / run_dir.SCORES / f"{name}.npz"
    place.parent.mkdir(parents=True, exist_ok=True)
    with atomic.write_file(place) as draft, draft.open("wb") as file:
        np.savez_compressed(
            file,
            ids=np.array(list(catalogue.ids(scored.rows)), dtype=str),
            root=np.array(catalogue.root),
            scores=scored.scores,
            classes=np.array(labels.names, dtype=str),
            indptr=part.indptr,
            indices=part.indices,
            weights=part.weights,
        )


def sentence(result: dict[str, Any], every: bool = True) -> str:
    """One line of a result record: its metrics with their 95 % intervals, the clips and the hash of their list.

    Args:
        result: of `record`.
        every: all metrics, else the first alone, which is what the task is compared by.
    """
    shown = []
    for name, held in list(result["metrics"].items())[: None if every else 1]:
        low_high = held.get("interval")
        spread = f" ({low_high[0]:.4f}-{low_high[1]:.4f})" if low_high else ""
        shown.append(f"{name} {held['value']:.4f}{spread}" if held["value"] is not None else f"{name} -")
    left = f", {result['unreadable']} unreadable" if result.get("unreadable") else ""
    return (
        f"{result['split']}, {result['weights']} weights: {', '.join(shown)}; {result['clips']} clips{left}, "
        f"list {result['list']}"
    )
