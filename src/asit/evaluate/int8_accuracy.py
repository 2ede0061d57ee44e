"""What an int8 file loses on recordings: accuracy or mAP where they are labelled, likeness of the outputs elsewhere.

Letters: N clips, C classes, B windows of a clip, S samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.audio.windowing import window_counts, window_start
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import Labels, read_labels
from asit.data.catalogue.splits import TEST
from asit.data.loading.waveforms import WaveformReader
from asit.errors import AudioError, CatalogueError
from asit.evaluate.ranking import average_precision
from asit.interop.onnx import OutputAgreement, Run
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.training import open_data

BAD_FILES = 0.1
"""Share of unreadable clips above which nothing is measured."""


@dataclass(frozen=True)
class OnRecordings:
    """A measure for `asit.interop.onnx.export`.

    Args:
        model: what is exported.
        output: scores, logits, embedding or frames; None: scores of a classifier, the embedding of an encoder.
        catalogue: the recordings; of one with splits the test side is taken.
        name: of the recordings, for the record.
        clips: at most so many, drawn with the seed.
        seed: of the draw.
    """

    model: AudioModel
    output: str | None
    catalogue: Catalogue
    name: str
    clips: int
    seed: int

    def __call__(self, exact: Run, coarse: Run) -> dict[str, Any]:
        """The loss; see `Likeness.facts`, with "metric", "float32" and "int8" where clips are labelled.

        Raises:
            CatalogueError: no clips, too many unreadable ones, or labels that the model does not know.
        """
        catalogue = self.catalogue
        rows = self._rows(catalogue)
        classes = self.model.head is not None and self.output in (None, "scores", "logits")
        labels = _labels(self.model, catalogue) if classes else None
        if labels is not None:
            rows = rows[labels.known[rows]]
        agreement, scores, read, failures = OutputAgreement(classes), [], [], []
        show = counter("comparing int8", "clips")
        for done, row in enumerate(rows.tolist(), 1):
            try:
                pairs = [(exact(wave[None])[0], coarse(wave[None])[0]) for wave in self._windows(catalogue, row)]
            except AudioError as error:
                failures.append(error.found)
                continue
            finally:
                show(done, len(rows), len(failures))
            several = [np.stack([pair[i] for pair in pairs]) for i in range(2)]
            if classes:
                several = [of_windows.mean(0) for of_windows in several]
                scores.append(several)
            agreement.add(*several)
            read.append(row)
        if not read or len(failures) > BAD_FILES * len(rows):
            raise CatalogueError(
                f"{len(failures)} of {len(rows)} clips of {self.name} could not be read: {'; '.join(failures[:3])}",
                f"a share of at most {BAD_FILES:g}",
                "mend the storage, or give other recordings with --check-data",
            )
        facts = agreement.facts(f"clips of {self.name}")
        if labels is not None:
            facts |= _metric(np.array(scores), labels, np.array(read))
        return facts

    def _rows(self, catalogue: Catalogue) -> npt.NDArray[np.int64]:
        rows = np.arange(len(catalogue))
        if catalogue.column("split") is not None:
            tests = np.flatnonzero(np.isin(catalogue.splits.astype(str), TEST))
            rows = tests if len(tests) else rows
        if len(rows) > self.clips:
            rows = np.sort(np.random.default_rng([self.seed]).permutation(rows)[: self.clips])
        return rows

    def _windows(self, catalogue: Catalogue, row: int) -> Iterator[npt.NDArray[np.float32]]:
        """Windows (S,) of a clip, cut as `asit evaluate` does."""
        settings, front_end = self.model.front_end.settings, self.model.front_end
        clip, waves = catalogue[row], WaveformReader(settings)
        span = front_end.samples_for(self.model.frames) / settings.rate
        count = int(window_counts(np.array([clip.seconds]), span, span, settings.shift_ms / 2000.0)[0])
        for i in range(count):
            wave = waves.read(clip, window_start(i, count, clip.seconds, span, span), min(span, clip.seconds))
            if not len(wave):
                raise AudioError(f"{clip.path} is empty", "at least one sample")
            yield wave[: front_end.samples_for(self.model.frames)]


def recordings(data: str, model: AudioModel) -> Catalogue:
    """A catalogue, or one made for this look of a table or a folder, whose sub-folders are labels if they are classes.

    Raises:
        CatalogueError: nothing usable there.
    """
    place, classes = Path(data), set(model.classes or ())
    named = place.is_dir() and any(part.is_dir() and part.name in classes for part in place.iterdir())
    wanted = open_data.Wanted(data, model.front_end.settings, BAD_FILES, "folder" if named else "auto")
    return open_data.catalogue(wanted, None)


def _labels(model: AudioModel, catalogue: Catalogue) -> Labels | None:
    if catalogue.column("label") is None:
        return None
    return read_labels(catalogue, "multi" if model.multi else "single", model.classes, missing="skip")


def _metric(
    scores: npt.NDArray[np.float32], labels: Labels, rows: npt.NDArray[np.int64]
) -> dict[str, Any]:  # fmt: skip
    """Accuracy or mAP of both, scores being (N, 2, C): float32 and int8."""
    part = labels.take(rows)
    if not labels.multi:
        found = [float((scores[:, i].argmax(1) == part.single).mean()) for i in range(2)]
        return {"metric": "accuracy", "float32": found[0], "int8": found[1]}
    targets = part.matrix(np.arange(len(part))) >= 0.5
    found = [float(np.nanmean(average_precision(scores[:, i], targets))) for i in range(2)]
    return {"metric": "mAP", "float32": found[0], "int8": found[1]}
