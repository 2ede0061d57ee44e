"""Scores of a classifier: means over windows, equal for any number of processes, unreadable clips, records."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor, nn

from asit import cli
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import read_labels
from asit.data.loading.windows import Windows
from asit.errors import CatalogueError
from asit.evaluate.classifier_scoring import ClassifierScorer, score_classifier
from asit.evaluate.frozen_scores import FrozenSettings
from asit.evaluate.result_records import (
    ClipScores,
    RecordHeader,
    group_codes,
    resampling_units,
    result_record,
    save_scores,
    summary_line,
)
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder
from asit.runtime import Precision, World

FRONT_END = FrontEndSettings(rate=8000, mels=32, mean=-8.0, std=3.5)
FLOAT = Precision("float32", "requested")
ALONE = World(0, 1, torch.device("cpu"), "requested")


class Network(nn.Module):
    """Logits that depend on everything in a window, so that rounding changes them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32 * 32, 3, generator=generator) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Nine clips of 0.1 to 1.7 s in three classes and two groups."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(1)
    clips = []
    for i in range(9):
        seconds = 0.1 + 0.2 * i
        path = folder / f"{i}.wav"
        soundfile.write(path, 0.1 * rng.standard_normal(round(8000 * seconds)), 8000, subtype="FLOAT")
        clips.append(Clip(str(path), seconds, 8000, 1, "abc"[i % 3], group=f"g{i % 2}"))
    return Catalogue.from_clips(clips)


def scorer(catalogue: Catalogue, world: World = ALONE, rows: Any = None, **over: Any) -> ClassifierScorer:
    chosen = np.arange(len(catalogue)) if rows is None else np.array(rows)
    windows = Windows(catalogue, chosen, FRONT_END, 32, 0.5, over.pop("block", 4))
    given = {"windows": windows, "multi": False, "workers": 0, "keep": False, "bad_files": 0.2, **over}
    return ClassifierScorer(world=world, precision=FLOAT, **given)


@pytest.mark.parametrize("multi", [False, True])
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_scores_are_means_over_windows(multi: bool, padding: Any, listed: Catalogue) -> None:
    """Against a plain loop over the file."""
    settings = FRONT_END.model_copy(update={"padding": padding})
    front_end, network = FrontEnd(settings), Network()
    windows = Windows(listed, np.array([8, 0, 3]), settings, 32, 0.5, 4)
    found = scorer(listed, windows=windows, multi=multi, bad_files=0.0)(network, 3)
    assert found.rows.tolist() == [8, 0, 3]
    assert found.failures == []
    samples = front_end.samples_for(32)
    for row, got in zip(found.rows, found.scores, strict=True):
        waveform = torch.from_numpy(soundfile.read(listed[int(row)].path, dtype="float32")[0])
        last = max(0, len(waveform) - samples)
        begins = [*range(0, last, samples // 2), last] if last else [0]
        each = []
        for begin in begins:
            part = front_end.pad(waveform[begin : begin + samples], samples)
            x = front_end.normalise(front_end.pad_frames(front_end.fbank(part[None])[0], 32))
            logits = network(x[None, None])
            each.append((logits.sigmoid() if multi else logits.softmax(1))[0].detach())
        np.testing.assert_allclose(got, torch.stack(each).mean(0), atol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_several_processes_give_the_scores_of_one_bit_for_bit(size: int, listed: Catalogue) -> None:
    """Each process scores its share of the blocks; what they exchange is put together here by hand."""
    network, parts = Network(), []

    class Share(World):
        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return [parts[r] if r < len(parts) else [] for r in range(self.size)]

    for rank in range(size - 1):
        with pytest.raises(IndexError):  # the others have not sent theirs yet
            scorer(listed, Share(rank, size, torch.device("cpu"), ""), block=2)(network, 3)
    last = scorer(listed, Share(size - 1, size, torch.device("cpu"), ""), block=2)(network, 3)
    alone = scorer(listed, block=2)(network, 3)
    assert np.array_equal(last.scores, alone.scores)


def test_workers_and_kept_blocks_change_nothing(listed: Catalogue) -> None:
    network, calls = Network(), []
    plain = scorer(listed)(network, 3)
    keeping = scorer(listed, keep=True, workers=1)
    for _ in range(2):
        found = keeping(network, 3, lambda *numbers: calls.append(numbers))
        assert np.array_equal(found.scores, plain.scores)
    assert calls[-1] == (9, 9, 0)
    done = [numbers[0] for numbers in calls[: len(calls) // 2]]
    assert done == sorted(done)
    keeping.windows.catalogue = None  # type: ignore[assignment]  # kept blocks are not loaded again
    assert np.array_equal(keeping(network, 3).scores, plain.scores)


def broken(listed: Catalogue, places: list[int], tmp_path: Path) -> Catalogue:
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    clips = [listed[i] for i in range(9)]
    for i in places:
        clips[i] = Clip(str(tmp_path / ("bad.wav" if i % 2 else f"gone-{i}.wav")), 0.8, 8000, 1, clips[i].label)
    return Catalogue.from_clips(clips)


def test_unreadable_clips_are_left_out_and_named(listed: Catalogue, tmp_path: Path) -> None:
    network, lost = Network(), broken(listed, [3], tmp_path)
    found, plain = scorer(lost)(network, 3), scorer(listed)(network, 3)
    assert found.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.allclose(found.scores, np.delete(plain.scores, 3, 0), atol=1e-6)
    assert len(found.failures) == 1
    assert "bad.wav" in found.failures[0]
    record = result_record(found, read_labels(lost), lost, RecordHeader("t", "test", "last", 1))
    assert (record["clips"], record["unreadable"]) == (8, 1)
    assert "8 clips, 1 unreadable, list " in summary_line(record)
    two = broken(listed, [3, 4], tmp_path)
    with pytest.raises(CatalogueError, match=r"2 of 9 clips could not be read: .*bad.*gone-4\.wav(.|\n)*at most 0\.2"):
        scorer(two)(network, 3)
    with pytest.raises(CatalogueError, match="2 of 2 clips could not be read"):
        scorer(two, rows=[3, 4], bad_files=1.0)(network, 3)


def test_a_long_recording_is_read_in_windows(tmp_path: Path) -> None:
    """Fifteen minutes of sound take 29 MB at this rate; none of it may be held."""
    path, seconds = tmp_path / "long.wav", 900
    with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
        part = (1000 * np.sin(np.arange(8000 * 10))).astype(np.int16)
        for _ in range(seconds // 10):
            file.write(part)
    long = Catalogue.from_clips([Clip(str(path), float(seconds), 8000, 1, "a")])
    windows = Windows(long, np.array([0]), FRONT_END, 1024, 0.0, 8)
    front_end = FrontEnd(FRONT_END)
    assert windows.counts[0] == int(np.ceil(seconds / (front_end.samples_for(1024) / 8000)))
    score = scorer(long, windows=windows, bad_files=0.0)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None] * torch.tensor([1.0, -1.0])

    tracemalloc.start()
    found = score(Mean(), 2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.scores.shape == (1, 2)
    assert peak < 8e6


def test_records(listed: Catalogue) -> None:
    labels = read_labels(listed)
    scores = np.full((9, 3), 0.1, np.float32)
    scores[np.arange(9), [0, 1, 2, 0, 1, 0, 1, 1, 2]] = [0.8, 0.7, 0.6, 0.9, 0.5, 0.4, 0.85, 0.3, 0.2]
    header = RecordHeader("t", "test", "last", 7)
    found = result_record(ClipScores(np.arange(9), scores, []), labels, listed, header, groups=group_codes(listed))
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(7 / 9)
    mistakes = [(Path(m["path"]).name, m["truth"], m["predicted"]) for m in found["mistakes"]]
    assert mistakes == [("6.wav", "a", "b"), ("5.wav", "c", "a")]
    assert [m["score"] for m in found["mistakes"]] == pytest.approx([0.85, 0.4])
    assert (found["bootstrap"]["unit"], found["bootstrap"]["units"]) == ("group", 2)
    assert resampling_units(group_codes(listed), np.array([0, 2, 4])) is None  # one group: clips are drawn
    assert resampling_units(None, np.arange(9)) is None
    soft = Catalogue.from_clips([Clip(f"/{i}", 1.0, 8000, 1, text) for i, text in enumerate(["a:0.6;b:0.4", "b", "a"])])
    several = read_labels(soft)
    rows = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.1], [0.7, 0.3, 0.1]], np.float32)[:, :2]
    found = result_record(ClipScores(np.arange(3), rows, []), several, soft, header)
    assert found["kind"] == "multi"
    assert [row["clips"] for row in found["per_class"]] == [2, 1]  # 0.4 is not yet a label
    assert "mistakes" not in found


def test_saved_scores(listed: Catalogue, tmp_path: Path) -> None:
    labels = read_labels(listed)
    scored = ClipScores(np.array([4, 2]), np.array([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3]], np.float32), [])
    save_scores(tmp_path, "test-last", scored, labels, listed)
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["test-last.npz"]
    with np.load(tmp_path / "scores" / "test-last.npz") as found:
        assert found["ids"].tolist() == list(listed.ids([4, 2]))
        assert (found["indptr"].tolist(), found["indices"].tolist()) == ([0, 1, 2], [1, 2])
        assert np.array_equal(found["scores"], scored.scores)


# --- a model with a head ----------------------------------------------------------------------------------------------


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
    """14 test and 6 validation clips of 0.3, 0.5 and 1.7 s."""
    root, found = tmp_path_factory.mktemp("clips"), []
    for i in range(20):
        path, seconds = root / f"{i:02d}.wav", (0.3, 0.5, 1.7)[i % 3]
        waveform = 0.2 * np.random.default_rng(i).standard_normal(round(8000 * seconds))
        soundfile.write(path, waveform.astype(np.float32), 8000, subtype="FLOAT")
        found.append(Clip(str(path), seconds, 8000, 1, "abc"[i % 3], "test" if i < 14 else "validation"))
    return Catalogue.from_clips(found)


def scored(model: AudioModel, clips: Catalogue, splits: Sequence[str] = ("test",)) -> list[dict[str, Any]]:
    return score_classifier(model, clips, FrozenSettings(test=splits), world=ALONE, precision=FLOAT)


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
