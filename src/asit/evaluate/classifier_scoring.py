"""Score clips with a classifier: probabilities averaged over windows, the same for any number of processes.

Letters: N clips, C classes, W windows of a block, T frames, F mel bins.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import make_splits, may_share_groups, rows_of_splits
from asit.data.loading.loader import loader
from asit.data.loading.windows import WindowBlock, Windows
from asit.errors import CatalogueError
from asit.evaluate.frozen_scores import FrozenSettings
from asit.evaluate.result_records import ClipScores, RecordHeader, group_codes, result_record
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier
from asit.progress import Counter, counter
from asit.runtime import Precision, World
from asit.training.resources import loader_workers

log = logging.getLogger(__name__)

BLOCK = 64
"""Windows scored together, as in `score_batch` of fine-tuning."""
FITTED_ON, ALL_CLIPS = "fitted_on", "all clips"
"""Fact in the card of a classifier: the splits of its catalogue that its head was fitted on, or that all clips were."""


_BlockScores = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], list[tuple[int, str]]]
"""Of one block: the clip of each window, probabilities (W, C), and (clip, reason) of unreadable clips."""


@dataclass(kw_only=True)
class ClassifierScorer:
    """Scores one list of clips any number of times.

    Args:
        windows: the clips, cut into blocks.
        multi: use a sigmoid instead of a softmax.
        world: its processes share the blocks.
        precision: arithmetic of the network.
        workers: loader processes; 0 with `keep`.
        keep: hold this process's blocks in memory once they are loaded.
        bad_files: share of unreadable clips above which scoring fails.
    """

    windows: Windows
    multi: bool
    world: World
    precision: Precision
    workers: int
    keep: bool
    bad_files: float
    _kept: list[WindowBlock] | None = field(default=None, init=False)

    def __call__(self, network: nn.Module, classes: int, progress: Counter | None = None) -> ClipScores:
        """Score all clips; a clip's score is the mean over its windows.

        Args:
            network: (W, 1, T, F) to logits (W, C); is left in evaluation mode.
            classes: C.
            progress: called with (clips done, clips in all, unreadable clips).

        Raises:
            CatalogueError: no clip can be read, or more than the allowed share cannot.
        """
        network.eval()
        own = range(self.world.rank, len(self.windows), self.world.size)
        found: list[_BlockScores] = []
        loaded, failed = [], 0
        with closing(self._blocks(own)) as blocks:
            for done, block in enumerate(blocks, 1):
                found.append((block.owner, self._probabilities(network, block.x, classes), block.failures))
                if self.keep:
                    # A copy: what a worker sends is in shared memory, of which a process may hold few pieces.
                    loaded.append(block if self._kept is not None else replace(block, x=block.x.clone()))
                failed += len(block.failures)
                if progress is not None and self.world.main:
                    clips = self.windows.done(done * self.world.size)
                    progress(clips, len(self.windows.rows), failed * self.world.size)
        self._kept = loaded if self.keep else None
        # Sums run over blocks in their own order, so that they are the same for any number of processes.
        everyone = self.world.gather(found)
        ordered = [everyone[i % self.world.size][i // self.world.size] for i in range(len(self.windows))]
        return self._mean(ordered, classes)

    def _blocks(self, own: Sequence[int]) -> Generator[WindowBlock]:
        if self._kept is not None:
            yield from self._kept
            return
        keys = [[block] for block in own]
        with closing(loader(self.windows, keys, operator.itemgetter(0), workers=self.workers, pin=False)) as loaded:
            yield from loaded

    def _probabilities(self, network: nn.Module, x: Tensor, classes: int) -> npt.NDArray[np.float32]:
        if not len(x):
            return np.zeros((0, classes), np.float32)
        device = self.world.device
        with torch.inference_mode(), self.precision.autocast(device):
            logits = network(x.to(device, non_blocking=True)).float()
        probabilities: npt.NDArray[np.float32] = (logits.sigmoid() if self.multi else logits.softmax(1)).cpu().numpy()
        return probabilities

    def _mean(self, blocks: Sequence[_BlockScores], classes: int) -> ClipScores:
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
                "repair the storage, or raise bad_files; scores of fewer clips are not comparable",
            )
        scores = (total[good] / count[good, None]).astype(np.float32)
        return ClipScores(rows[good], scores, list(failures.values()))


def score_classifier(
    model: AudioModel,
    catalogue: Catalogue,
    settings: FrozenSettings,
    *,
    world: World,
    precision: Precision,
    overlap: float = 0.0,
) -> list[dict[str, Any]]:
    """Score a model with a head on any catalogue, one result record per split.

    Every process of the world calls this; the main one gets the records, the others none.

    Args:
        model: with a head, on the world's device.
        catalogue: the clips; without splits, all are scored.
        settings: what to score: test splits or one fold, and how; probes and features do not count.
        world: the processes that share the clips.
        precision: arithmetic of the network.
        overlap: of the windows of a long clip, as a share.

    Raises:
        CatalogueError: an unknown split or fold, labels that are no class of the model, too many unreadable clips.
    """
    assert model.head is not None
    fitted = set(model.training.get(FITTED_ON, ())) if model.training.get("catalogue") == catalogue.digest else set()
    if world.main and fitted & {ALL_CLIPS, *settings.test}:
        log.warning("this model was fitted on these very clips: its score on them is not a test")
    labels = read_labels(catalogue, "multi" if model.multi else "single", model.classes, missing=settings.missing)
    network = Classifier(model.encoder, model.head)
    step, task = model.training.get("step"), str(catalogue.header.get("task") or "")
    groups = None if may_share_groups(catalogue, settings.allow_shared_groups) else group_codes(catalogue)
    records = []
    for name, rows in _scored_rows(catalogue, settings).items():
        rows = rows[labels.known[rows]]
        scorer = ClassifierScorer(
            windows=Windows(catalogue, rows, model.front_end.settings, model.frames, overlap, BLOCK),
            multi=model.multi,
            world=world,
            precision=precision,
            workers=loader_workers("auto", world),
            keep=False,
            bad_files=settings.bad_files,
        )
        scored = scorer(network, len(labels.names), counter(f"scoring {name}", "clips"))
        if world.main:
            header = RecordHeader(task, name, "model", step if isinstance(step, int) else None)
            records.append(result_record(scored, labels, catalogue, header, seed=settings.seed, groups=groups))
    return records


def _scored_rows(catalogue: Catalogue, settings: FrozenSettings) -> dict[str, npt.NDArray[np.int64]]:
    """Return the rows to score by the name of their split or fold."""
    if settings.fold is not None:
        return {f"fold {settings.fold}": make_splits(catalogue, fold=settings.fold).test}
    if catalogue.column("split") is None:
        return {"all": np.arange(len(catalogue))}
    return {name: rows_of_splits(catalogue, (name,)) for name in settings.test}
