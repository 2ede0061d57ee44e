"""Measure on recordings what an int8 file loses: accuracy or mAP where they are labelled, else agreement of outputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from asit.audio.windowing import window_counts, window_start
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import read_labels
from asit.data.catalogue.splits import TEST
from asit.data.loading.waveforms import WaveformReader
from asit.errors import AudioError, CatalogueError
from asit.evaluate.result_records import ClipScores, label_metrics
from asit.interop.onnx import Measure, Run, agreement
from asit.model.audio_model import AudioModel
from asit.progress import counter
from asit.training import open_data

BAD_FILES = 0.1
"""Share of unreadable clips above which measuring fails."""


def on_recordings(model: AudioModel, output: str | None, data: str, clips: int) -> Measure:
    """Return a function that compares float32 and int8 outputs on recordings, for `asit.interop.onnx.export`.

    It returns `agreement`, with "metric", "float32" and "int8" where clips are labelled.

    Args:
        model: what is exported.
        output: scores, logits, embedding or frames; None: scores of a classifier, the embedding of an encoder.
        data: a catalogue, table or folder, whose sub-folders named after classes are labels; with splits, the test
            split is used.
        clips: maximum number of clips, drawn with seed 0.

    Raises:
        CatalogueError: nothing usable is there; later: too many clips cannot be read, or labels are no class of the
            model.
    """
    path, known = Path(data), set(model.classes or ())
    named = path.is_dir() and any(part.is_dir() and part.name in known for part in path.iterdir())
    labels: open_data.Labels = "folder" if named else "auto"
    catalogue = open_data.catalogue(data, model.front_end.settings, None, bad_files=BAD_FILES, labels=labels)
    classes = model.head is not None and output in (None, "scores", "logits")
    # The name without its folder, since the exported file may be published.
    return functools.partial(_compare, model, catalogue, path.name, _rows(catalogue, clips), classes)


def _compare(
    model: AudioModel,
    catalogue: Catalogue,
    name: str,
    rows: npt.NDArray[np.int64],
    classes: bool,
    *graphs: Run,
) -> dict[str, Any]:
    labels = None
    if classes and catalogue.column("label") is not None:
        labels = read_labels(catalogue, "multi" if model.multi else "single", model.classes, missing="skip")
        rows = rows[labels.known[rows]]
    scores, read, failures = [], [], []
    show = counter("comparing int8", "clips")

    def outputs() -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        for done, row in enumerate(rows.tolist(), 1):
            try:
                windows = list(_windows(model, catalogue[row]))
            except AudioError as error:
                failures.append(error.found)
                continue
            finally:
                show(done, len(rows), len(failures))
            exact, coarse = (np.stack([graph(window[None])[0] for window in windows]) for graph in graphs)
            if classes:
                exact, coarse = exact.mean(0), coarse.mean(0)
                scores.append((exact, coarse))
            read.append(row)
            yield exact, coarse
        if not read or len(failures) > BAD_FILES * len(rows):
            raise CatalogueError(
                f"{len(failures)} of {len(rows)} clips of {name} could not be read: {'; '.join(failures[:3])}",
                f"a share of at most {BAD_FILES:g}",
                "repair the storage, or give other recordings with --check-data",
            )

    facts = agreement(outputs(), classes, f"clips of {name}")
    if labels is not None:
        facts["metric"] = metric = "mAP" if labels.multi else "accuracy"
        for kind, table in zip(("float32", "int8"), np.stack(scores, 1), strict=True):
            found = label_metrics(ClipScores(np.array(read), table, []), labels, draws=0)
            facts[kind] = found["metrics"][metric]["value"]
    return facts


def _rows(catalogue: Catalogue, clips: int) -> npt.NDArray[np.int64]:
    rows = np.arange(len(catalogue))
    if catalogue.column("split") is not None:
        tests = np.flatnonzero(np.isin(catalogue.texts("split").astype(str), TEST))
        rows = tests if len(tests) else rows
    return rows if len(rows) <= clips else np.sort(np.random.default_rng([0]).permutation(rows)[:clips])


def _windows(model: AudioModel, clip: Clip) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the windows (S,) of a clip, cut as in `asit evaluate`."""
    settings, samples = model.front_end.settings, model.front_end.samples_for(model.frames)
    span, reader = samples / settings.rate, WaveformReader(settings)
    count = int(window_counts(np.array([clip.seconds]), span, span, settings.shift_ms / 2000.0)[0])
    for i in range(count):
        waveform = reader.read(clip, window_start(i, count, clip.seconds, span, span), min(span, clip.seconds))
        if not len(waveform):
            raise AudioError(f"{clip.path} is empty", "at least one sample")
        yield waveform[:samples]
