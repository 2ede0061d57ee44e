"""Labels of sounds: the same as `asit evaluate` scores, windows, pieces of long sounds, segments."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading.windows import Windows
from asit.errors import AudioError, ConfigError
from asit.evaluate.classifier_scoring import ClassifierScorer
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier, Head, Labelling
from asit.model.inference.tagging import Tag, Tags, join_tags
from asit.model.vit import Encoder

from .conftest import CLASSES, FRAMES, NEED, TINY, make_model, wave  # type: ignore[import-not-found]


def model(multi: bool = True, padding: str = "silence", eps: float = 1e-6) -> AudioModel:
    head, labels = Head(32, 3, "class+mean", norm_eps=eps), Labelling(CLASSES, multi, "class+mean", 0.5, eps)
    made: AudioModel = make_model(head=head, labels=labels, padding=padding)
    return made


@pytest.mark.parametrize("multi", [True, False])
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_a_clips_scores_are_those_of_an_evaluation(tmp_path: Path, multi: bool, padding: str, overlap: float) -> None:
    m, clips, sounds = model(multi, padding), [], []
    for i, samples in enumerate((100, 3000, NEED, NEED + 79, NEED + 80, NEED + 81, 2 * NEED + 80, 33_333)):
        sounds.append(tmp_path / f"{i}.wav")
        soundfile.write(sounds[-1], wave(samples, i), 16000, subtype="FLOAT")
        clips.append(Clip(str(sounds[-1]), samples / 16000, 16000, 1))
    catalogue = Catalogue.from_clips(clips, root=tmp_path)
    windows = Windows(catalogue, np.arange(len(clips)), m.front_end.settings, FRAMES, overlap, 4)
    world, precision = runtime.World(0, 1, torch.device("cpu"), ""), runtime.Precision("float32", "")
    scorer = ClassifierScorer(
        windows=windows, multi=multi, world=world, precision=precision, workers=0, keep=False, bad_files=0.0
    )
    assert m.head is not None
    want = scorer(Classifier(m.encoder, m.head), 3).scores
    hop = (1 - overlap) * NEED / 16000
    found = m.tag_batch(sounds, hop=hop) if overlap else m.tag_batch(sounds)
    np.testing.assert_allclose(torch.stack([tags.clip for tags in found]), want, atol=1e-6)
    assert [len(tags.windows) for tags in found] == windows.counts.tolist()


def test_windows_where_they_lie() -> None:
    m = model()
    tags = m.tag(wave(20_000))
    starts = np.array([0, NEED, 20_000 - NEED]) / 16000
    np.testing.assert_allclose(tags.starts, starts, rtol=1e-6)
    np.testing.assert_allclose(tags.ends, starts + NEED / 16000, rtol=1e-6)
    assert (tags.classes, tags.multi, tags.windows.shape, tags.windows.dtype) == (CLASSES, True, (3, 3), torch.float32)
    for window, start in zip(tags.windows, (0, NEED, 20_000 - NEED), strict=True):
        want = m.scores(torch.from_numpy(wave(20_000)[start : start + NEED])[None])[0]
        torch.testing.assert_close(window, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(tags.clip, tags.windows.mean(0))
    short = m.tag(wave(4000))
    assert (short.starts.tolist(), short.ends.tolist()) == ([0.0], [0.25])


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_shorter_windows_are_filled_up_to_the_training_length(padding: str) -> None:
    m, sound = model(padding=padding), wave(12_000)
    tags = m.tag(sound, window=0.2, hop=0.1)
    np.testing.assert_allclose(tags.starts, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55], atol=1e-6)
    np.testing.assert_allclose(tags.ends - tags.starts, 0.2, atol=1e-6)
    for window, start in zip(tags.windows, (tags.starts * 16000).round().int().tolist(), strict=True):
        want = m.scores(torch.from_numpy(sound[start : start + 3200])[None])[0]
        torch.testing.assert_close(window, want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("samples", [1, 5000, NEED, 20_000, 70_001])
@pytest.mark.parametrize("batch", [1, 3])
def test_pieces_of_a_long_sound_are_its_tags(samples: int, batch: int) -> None:
    m, sound = model(False), wave(samples)
    for choice in ({}, {"window": 0.3, "hop": 0.07}):
        want = m.tag(sound, **choice)
        pieces = list(m.stream_tags(sound, batch=batch, **choice))
        assert len(pieces) == -(-len(want.starts) // batch)
        found = join_tags(pieces)
        for name in ("clip", "windows", "starts", "ends"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name), atol=1e-6, rtol=1e-6)


def test_sounds_of_every_kind_and_parts_of_them(tmp_path: Path) -> None:
    m, path = model(), tmp_path / "a.wav"
    soundfile.write(path, wave(100_000), 44100, subtype="FLOAT")
    want = m.tag(wave(100_000), rate=44100)
    for sound in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        torch.testing.assert_close(m.tag(sound).windows, want.windows, atol=1e-6, rtol=1e-6)
    soundfile.write(path, wave(50_000), 16000, subtype="FLOAT")
    part = join_tags(list(m.stream_tags(path, start=1.0, seconds=1.5)))
    whole = m.tag(wave(50_000)[16_000:40_000])
    torch.testing.assert_close(part.windows, whole.windows, atol=1e-6, rtol=1e-6)
    assert part.starts.tolist() == whole.starts.tolist()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 0.02)])
def test_neighbours_do_not_matter(precision: Any, tolerance: float) -> None:
    m = model()
    sounds = [wave(n, i) for i, n in enumerate((1, 3000, 20_000, 7920, 9000, 400))]
    alone = [m.tag(sound, precision=precision) for sound in sounds]
    for batch in (1, 2, 64):
        for one, together in zip(alone, m.tag_batch(sounds, precision=precision, batch=batch), strict=True):
            torch.testing.assert_close(one.windows, together.windows, atol=tolerance, rtol=tolerance)
            assert torch.equal(one.starts, together.starts)
    assert m.tag_batch([]) == []


def test_invalid_settings() -> None:
    m, sound = model(), wave(9000)
    for choice, text in (
        ({"window": 0.6}, r"windows of 0\.6 s(.|\n)*0\.01 to 0\.5 s"),
        ({"window": 0.0}, r"windows of 0 s"),
        ({"window": float("nan")}, r"windows of nan s"),
        ({"hop": 0.6}, r"a hop of 0\.6 s between windows of 0\.495 s"),
        ({"window": 0.2, "hop": 0.3}, r"a hop of 0\.3 s between windows of 0\.2 s"),
        ({"hop": 0.0}, r"a hop of 0 s"),
    ):
        with pytest.raises(ConfigError, match=text):
            m.tag(sound, **choice)
    encoder = AudioModel(Encoder(TINY, FRAMES, 32), FrontEnd(FrontEndSettings(mels=32, mean=0.0, std=1.0)))
    for ask in (encoder.tag, encoder.stream_tags, lambda x: encoder.tag_batch([x]), lambda _: encoder.tagger()):
        with pytest.raises(ConfigError, match=r"no head and no labels(.|\n)*asit finetune"):
            ask(sound)
    with pytest.raises(AudioError, match="tag_batch was given one ndarray"):
        m.tag_batch(sound)


def test_answers_that_are_not_finite_are_refused() -> None:
    """Finite weights that are too large for the arithmetic; multi=False, since a sigmoid of infinity is finite."""
    m, sound = model(multi=False), wave(9000)
    with torch.no_grad():
        m.encoder.norm.weight.fill_(3e38)
        m.encoder.norm.bias.fill_(3e38)
    for ask, what in (
        (lambda: m.embed(sound), "vectors"),
        (lambda: list(m.stream(sound)), "vectors"),
        (lambda: m.tag(sound), "scores"),
        (lambda: list(m.stream_tags(sound)), "scores"),
    ):
        with pytest.raises(AudioError, match=rf"the model's {what} are not finite(.|\n)*mean and std in its card"):
            ask()


def tags(windows: list[list[float]], starts: list[float], seconds: float = 1.0) -> Tags:
    scores, begins = torch.tensor(windows), torch.tensor(starts)
    return Tags(CLASSES, True, scores.mean(0), scores, begins, begins + seconds)


def test_the_best_labels_of_a_clip() -> None:
    found = tags([[0.1, 0.9, 0.6], [0.2, 0.7, 0.6]], [0.0, 1.0])
    assert [tag.label for tag in found.top()] == ["rain", "door", "dog"]
    (best,) = found.top(1)
    assert (best.label, best.start, best.end) == ("rain", 0.0, 2.0)
    assert best.score == pytest.approx(0.8)
    assert [tag.label for tag in found.top(5, threshold=0.5)] == ["rain", "door"]
    assert found.top(0) == []


def test_neighbouring_windows_of_a_label_are_one_segment() -> None:
    found = tags(
        [[0.9, 0.0, 0.6], [0.8, 0.0, 0.1], [0.1, 0.5, 0.2], [0.7, 0.9, 0.0], [0.0, 0.95, 0.0]],
        [0.0, 1.0, 2.0, 3.0, 3.5],  # the last one moved back
    )
    assert [(tag.label, round(tag.score, 3), tag.start, tag.end) for tag in found.segments(0.5)] == [
        ("dog", 0.9, 0.0, 2.0),
        ("door", 0.6, 0.0, 1.0),
        ("rain", 0.95, 2.0, 4.5),
        ("dog", 0.7, 3.0, 4.0),
    ]
    assert [tag.label for tag in found.segments(0.5, k=1)] == ["dog", "rain"]
    assert found.segments(0.99) == []
    assert all(isinstance(tag, Tag) for tag in found.segments(0.0))
    assert len(found.segments(0.0)) == 3


def test_the_heads_epsilon_travels_with_the_card(tmp_path: Path) -> None:
    m = model(eps=0.5)
    m.save(tmp_path / "m")
    loaded = AudioModel.load(tmp_path / "m")
    assert loaded.labelling == m.labelling
    assert torch.equal(loaded.tag(wave(9000)).windows, m.tag(wave(9000)).windows)
    assert not torch.allclose(model().tag(wave(9000)).windows, m.tag(wave(9000)).windows, atol=1e-4)
