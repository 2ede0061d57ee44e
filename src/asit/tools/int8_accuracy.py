"""Measure on recordings what an int8 file loses: accuracy or mAP where they are labelled, else agreement of outputs."""

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
from asit.evaluate.result_records import ClipScores, label_metrics
from asit.interop.onnx import OutputAgreement, Run
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.training import open_data

BAD_FILES = 0.1
"""Share of unreadable clips above which measuring fails."""


@dataclass(frozen=True)
class OnRecordings:
    """Compares float32 and int8 outputs on recordings, for `asit.interop.onnx.export`.

    Args:
        model: what is exported.
        output: scores, logits, embedding or frames; None: scores of a classifier, the embedding of an encoder.
        catalogue: the recordings; with splits, those of the test split are used.
        name: of the recordings, for the record.
        clips: maximum number of clips, drawn with the seed.
        seed: of the draw.
    """

    model: AudioModel
    output: str | None
    catalogue: Catalogue
    name: str
    clips: int
    seed: int

    def __call__(self, exact: Run, coarse: Run) -> dict[str, Any]:
        """Return `OutputAgreement.facts`, with "metric", "float32" and "int8" where clips are labelled.

        Raises:
            CatalogueError: no clips, too many unreadable ones, or labels that are no class of the model.
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
                pairs = [(exact(part[None])[0], coarse(part[None])[0]) for part in self._windows(catalogue, row)]
            except AudioError as error:
                failures.append(error.found)
                continue
            finally:
                show(done, len(rows), len(failures))
            outputs = [np.stack([pair[i] for pair in pairs]) for i in range(2)]
            if classes:
                outputs = [windows.mean(0) for windows in outputs]
                scores.append(outputs)
            agreement.add(*outputs)
            read.append(row)
        if not read or len(failures) > BAD_FILES * len(rows):
            raise CatalogueError(
                f"{len(failures)} of {len(rows)} clips of {self.name} could not be read: {'; '.join(failures[:3])}",
                f"a share of at most {BAD_FILES:g}",
                "repair the storage, or give other recordings with --check-data",
            )
        facts = agreement.facts(f"clips of {self.name}")
        if labels is not None:
            facts["metric"] = metric = "mAP" if labels.multi else "accuracy"
            for name, table in zip(("float32", "int8"), np.stack(scores, 1), strict=True):
                found = label_metrics(ClipScores(np.array(read), table, []), labels, draws=0)
                facts[name] = found["metrics"][metric]["value"]
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
        """Yield the windows (S,) of a clip, cut as in `asit evaluate`."""
        settings, front_end = self.model.front_end.settings, self.model.front_end
        clip, reader = catalogue[row], WaveformReader(settings)
        span = front_end.samples_for(self.model.frames) / settings.rate
        count = int(window_counts(np.array([clip.seconds]), span, span, settings.shift_ms / 2000.0)[0])
        for i in range(count):
            waveform = reader.read(clip, window_start(i, count, clip.seconds, span, span), min(span, clip.seconds))
            if not len(waveform):
                raise AudioError(f"{clip.path} is empty", "at least one sample")
            yield waveform[: front_end.samples_for(self.model.frames)]


def recordings(data: str, model: AudioModel) -> Catalogue:
    """Read a catalogue, or make one of a table or a folder; sub-folders named after classes are labels.

    Raises:
        CatalogueError: nothing usable is there.
    """
    path, classes = Path(data), set(model.classes or ())
    named = path.is_dir() and any(part.is_dir() and part.name in classes for part in path.iterdir())
    wanted = open_data.CatalogueRequest(data, model.front_end.settings, BAD_FILES, "folder" if named else "auto")
    return open_data.catalogue(wanted, None)


def _labels(model: AudioModel, catalogue: Catalogue) -> Labels | None:
    if catalogue.column("label") is None:
        return None
    return read_labels(catalogue, "multi" if model.multi else "single", model.classes, missing="skip")
