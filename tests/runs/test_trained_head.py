"""Scores of a model with a head: by hand, over windows, and the same for two processes."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit import cli
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue import scan
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import CatalogueError
from asit.evaluate.classifier_scoring import ClassifierSettings, score_classifier
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder
from asit.runtime import Precision, World

RATE = 8000
FRONT_END = FrontEndSettings(rate=RATE, mels=32, mean=-8.0, std=3.5)
ALONE = World(0, 1, torch.device("cpu"), "")
EXACT = Precision("float32", "requested")


@pytest.fixture(scope="module")
def model() -> AudioModel:
    """A tiny classifier of three classes with random weights; its input is half a second."""
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=16, patch_mels=16)
    encoder = Encoder(settings, 48, 32)
    encoder.init_weights(torch.Generator().manual_seed(0))
    head = Head(32, 3, "mean")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(generator=generator)
    return AudioModel(encoder, FrontEnd(FRONT_END), {"step": 7}, head, Labelling(("a", "b", "c"), False, "mean", 0.5))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    root = tmp_path_factory.mktemp("clips")
    with (root / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for i in range(20):
            waveform = 0.2 * np.random.default_rng(i).standard_normal(round(RATE * (0.3, 0.5, 1.7)[i % 3]))
            soundfile.write(root / f"{i:02d}.wav", waveform.astype(np.float32), RATE, subtype="FLOAT")
            writer.writerow([f"{i:02d}.wav", "abc"[i % 3], "test" if i < 14 else "validation"])
    return scan.build(root / "t.csv", root / "c.jsonl", front_end=FRONT_END, workers=1, statistics_clips=0)


def scored(model: AudioModel, clips: Catalogue, splits: Sequence[str] = ("test",)) -> list[dict[str, Any]]:
    return score_classifier(model, clips, ClassifierSettings(splits=splits), world=ALONE, precision=EXACT)


def by_hand(model: AudioModel, path: str) -> np.ndarray:
    """Probabilities of a clip: windows end to end, the last one ending with the clip, and their mean."""
    waveform = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    need = model.front_end.samples_for(48)
    starts = [0] if len(waveform) <= need + 40 else [*range(0, len(waveform) - need, need), len(waveform) - need]
    parts = [model.scores(waveform[None, start : start + need])[0] for start in starts]
    return torch.stack(parts).mean(0).numpy()


def test_accuracy_by_hand(model: AudioModel, clips: Catalogue) -> None:
    (record,) = scored(model, clips)
    right = [by_hand(model, clips[i].path).argmax() == i % 3 for i in range(14)]
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(right))
    assert (record["clips"], record["split"], record["weights"], record["step"]) == (14, "test", "model", 7)
    assert np.sum(record["confusion"]) == 14
    worst = record["mistakes"][0]
    index = next(i for i in range(14) if clips[i].path == worst["path"])
    assert worst["score"] == pytest.approx(by_hand(model, worst["path"]).max(), abs=1e-4)
    assert worst["predicted"] == "abc"[by_hand(model, clips[index].path).argmax()]


def test_each_split_has_a_record(model: AudioModel, clips: Catalogue) -> None:
    records = scored(model, clips, ("validation", "test"))
    assert [(record["split"], record["clips"]) for record in records] == [("validation", 6), ("test", 14)]
    assert records[0]["list"] != records[1]["list"]
    with pytest.raises(CatalogueError, match="there is no split dev2"):
        scored(model, clips, ("dev2",))


def test_labels_that_the_model_does_not_know(model: AudioModel, clips: Catalogue, tmp_path: Path) -> None:
    other = AudioModel(model.encoder, model.front_end, {}, model.head, Labelling(("a", "b", "d"), False, "mean", 0.5))
    with pytest.raises(CatalogueError, match="1 labels are not among the 3 classes: 'c'"):
        scored(other, clips)


def test_the_verb_scores_the_head_the_same_in_two_processes(
    model: AudioModel, clips: Catalogue, tmp_path: Path, ranks: Any
) -> None:
    model.save(tmp_path / "model")
    clips.write(tmp_path / "c.jsonl")
    command = f"evaluate {tmp_path}/model --data {tmp_path}/c.jsonl --device cpu --threads 1"
    for size in (1, 2):
        call = [*command.split(), "--out", f"{tmp_path}/{size}.json"]
        ended = ranks(size, lambda call=call: cli.main(call))
        assert [e.code for e in ended] == [0] * size, ended
        assert [e.said.count("test, model weights: accuracy") for e in ended] == [1] + [0] * (size - 1)
    one, two = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2))
    assert one == two
    assert one["classes"] == ["a", "b", "c"]
    assert one["results"] == json.loads(json.dumps(scored(model, clips)))
