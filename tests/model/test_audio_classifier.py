"""A saved model with a head: its scores, its card, and the parts that do not fit each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.io import checkpoint
from asit.model.audio_model import AudioModel
from asit.model.classifier import Classifier, Head, Labelling, Pooling
from asit.model.vit import Encoder

from .conftest import CLASSES, FRAMES, NEED, TINY, filled, make_model  # type: ignore[import-not-found]


def parts(pooling: Pooling = "mean", norm: bool = True) -> tuple[Encoder, Head]:
    encoder = filled(Encoder(TINY, FRAMES, 32))
    return encoder, filled(Head(32, 3, pooling, dropout=0.1, norm=norm), first=len(list(encoder.parameters())))


def model(
    multi: bool = False, pooling: Pooling = "mean", norm: bool = True, padding: str = "silence", seconds: float = 0.5
) -> AudioModel:
    labels = Labelling(CLASSES, multi, pooling, seconds)
    made: AudioModel = make_model(head=parts(pooling, norm)[1], labels=labels, padding=padding)
    return made


def waves(samples: int = NEED, rows: int = 4) -> Tensor:
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("pooling", ["class", "mean", "class+mean"])
def test_scores_are_those_of_the_network_that_was_trained(pooling: Pooling) -> None:
    x = waves()
    single, multi = model(False, pooling), model(True, pooling)
    network = Classifier(*parts(pooling)).eval()
    with torch.no_grad():
        logits = network(single.front_end(x)).double().numpy()
    want = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(single.scores(x), want, atol=1e-5)
    np.testing.assert_allclose(multi.scores(x), 1 / (1 + np.exp(-logits)), atol=1e-5)
    torch.testing.assert_close(single.logits(single.front_end(x)).double(), torch.from_numpy(logits))
    assert not torch.allclose(single.scores(x)[0], single.scores(x)[1])


def test_short_waves_are_filled_by_the_cards_rule() -> None:
    x = waves(5000)
    silence, repeat, zero = (model(padding=rule) for rule in ("silence", "repeat", "zero"))
    assert torch.equal(silence.scores(x), silence.scores(torch.nn.functional.pad(x, (0, NEED - 5000))))
    assert torch.equal(repeat.scores(x), repeat.scores(torch.cat([x, x], 1)[:, :NEED]))
    logmel = torch.zeros(4, FRAMES, 32)
    frames = zero.front_end.frames_for(5000)
    logmel[:, :frames] = zero.front_end.fbank(x)
    want = zero.logits(((logmel + 6.0) / 6.0)[:, None]).softmax(1)
    torch.testing.assert_close(zero.scores(x), want)
    assert zero.scores(waves(100)).isfinite().all(), "shorter than a window"


def test_a_training_length_between_two_columns_is_cut_to_the_first() -> None:
    m = model(seconds=0.52)
    x = waves(8320)
    assert torch.equal(m.scores(x), m.scores(x[:, :NEED]))


def test_padding_in_a_batch_of_spectrograms_has_no_part() -> None:
    m = model(pooling="class+mean")
    x = m.front_end(waves())
    valid = torch.ones(4, 24, dtype=torch.bool)
    valid[2, 8:] = False
    want = m.logits(x)
    x[2, :, 16:] = float("nan")
    got = m.logits(x, valid)
    assert got.isfinite().all()
    torch.testing.assert_close(got[[0, 1, 3]], want[[0, 1, 3]], atol=1e-5, rtol=1e-5)


def test_bf16_is_near_and_the_head_is_float32() -> None:
    m, x = model(), waves()
    near, plain = m.scores(x, precision="bf16"), m.scores(x)
    assert near.dtype == torch.float32
    assert (near - plain).abs().max() < 0.05
    assert not torch.equal(near, plain)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("multi", [True, False])
def test_saved_and_loaded_it_is_the_same(tmp_path: Path, multi: bool, norm: bool) -> None:
    m = model(multi, "class+mean", norm)
    before = torch.get_rng_state()
    m.save(tmp_path / "m")
    loaded = AudioModel.load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(loaded.scores(waves()), m.scores(waves()))
    assert (loaded.classes, loaded.multi, loaded.labelling) == (CLASSES, multi, m.labelling)
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["kind"] == "audio-classifier"
    assert card["labels"] == {
        "classes": list(CLASSES), "multi": multi, "pooling": "class+mean", "seconds": 0.5, "norm": norm,
        "norm_eps": 1e-6,
    }  # fmt: skip
    assert loaded.card == m.card
    tensors, _ = checkpoint.load_model(tmp_path / "m")
    heads = {"head.linear.weight", "head.linear.bias"} | ({"head.norm.weight", "head.norm.bias"} if norm else set())
    assert {name for name in tensors if name.startswith("head.")} == heads
    assert set(tensors) - heads == set(m.encoder.state_dict())
    assert torch.equal(loaded.embed(waves()[0]).patches, m.embed(waves()[0]).patches)


def test_from_parts_keeps_its_own_head() -> None:
    encoder, head = parts()
    settings = FrontEndSettings(mels=32, mean=0.0, std=1.0)
    m = AudioModel.from_parts(
        encoder, settings, TINY, FRAMES, head=head.train(), labels=Labelling(CLASSES, True, "mean", 0.5)
    )
    before = m.scores(waves())
    with torch.no_grad():
        head.linear.weight.add_(1.0)
    assert torch.equal(m.scores(waves()), before)
    assert head.training
    assert all(p.requires_grad for p in head.parameters())
    assert m.head is not None
    assert not any(p.requires_grad for p in m.head.parameters())


@pytest.mark.gpu
def test_a_copy_of_a_network_on_a_gpu_is_on_the_cpu_and_scores_on_either() -> None:
    network = Classifier(*parts()).to("cuda")
    settings, labels = FrontEndSettings(mels=32, mean=-6.0, std=3.0), Labelling(CLASSES, True, "mean", 0.5)
    m = AudioModel.from_parts(network.encoder, settings, TINY, FRAMES, head=network.head, labels=labels)
    assert m.head is not None
    assert {p.device.type for p in (*m.encoder.parameters(), *m.head.parameters())} == {"cpu"}
    want = m.scores(waves())
    torch.testing.assert_close(m.to("cuda").scores(waves()), want, atol=1e-4, rtol=1e-4)


def test_an_encoder_is_asked_for_scores() -> None:
    encoder, _ = parts()
    m = AudioModel(encoder, FrontEnd(FrontEndSettings(mels=32, mean=0.0, std=1.0)))
    assert (m.classes, m.multi, m.head) == (None, False, None)
    for ask in (lambda: m.scores(waves()), lambda: m.logits(m.front_end(waves()))):
        with pytest.raises(ConfigError, match=r"no head and no labels(.|\n)*asit finetune"):
            ask()


THREE = Labelling(CLASSES, True, "mean", 0.5)


@pytest.mark.parametrize(
    ("head", "labels", "text"),
    [
        (Head(32, 3, "mean"), None, "a head without labels"),
        (None, THREE, "labels without a head"),
        (
            Head(32, 3, "mean"),
            Labelling(("a", "b"), True, "mean", 0.5),
            "a head of 3 classes on mean .* labels of 2 on mean",
        ),
        (Head(32, 3, "mean"), Labelling(CLASSES, True, "class", 0.5), "labels of 3 on class"),
        (Head(24, 3, "mean"), THREE, "a head of 24 features"),
        (Head(32, 3, "mean", norm_eps=0.5), THREE, r"epsilon 0\.5, labels of 3 on mean with 1e-06"),
    ],
)
def test_head_and_labels_that_do_not_go_together(head: Head | None, labels: Labelling | None, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        AudioModel(parts()[0], FrontEnd(FrontEndSettings(mels=32, mean=0.0, std=1.0)), head=head, labels=labels)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "audio-encoder"}, "kind 'audio-encoder', with labels"),
        ({"labels": None}, "'audio-classifier', without labels"),
        ({"labels": {"classes": ["dog", "rain"]}}, r"head\.\*\) does not fit the Head: .*another shape.*linear.weight"),
        ({"labels": {"pooling": "class+mean"}}, r"head\.\*\) does not fit the Head"),
        ({"labels": {"norm": False}}, r"2 unexpected \(norm"),
        ({"labels": {"classes": ["dog", "dog", "door"]}}, "'dog' more than once"),
        ({"labels": {"classes": "dog"}}, "no list of names"),
        ({"labels": {"multi": "False"}}, "neither true nor false"),
        ({"labels": {"seconds": "long"}}, "could not convert"),
        ({"labels": {"pooling": "max"}}, "pooling 'max'"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    model().save(tmp_path / "m")
    path = tmp_path / "m" / "card.json"
    card = json.loads(path.read_text())
    if "labels" in change:
        change = {"labels": change["labels"] and {**card["labels"], **change["labels"]}}
    card = {name: value for name, value in {**card, **change}.items() if value is not None}
    path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=text):
        AudioModel.load(tmp_path / "m")


def test_weights_without_the_cards_head(tmp_path: Path) -> None:
    m = model()
    checkpoint.save_model(tmp_path / "m", m.encoder.state_dict(), m.card)
    with pytest.raises(CheckpointError, match=r"head\.\*\) does not fit the Head: 4 missing \(norm\.weight"):
        AudioModel.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(NEED), "waveforms of shape"),
        (torch.zeros(2, 0), "waveforms of shape"),
        (torch.zeros(800, 2), r"waveforms of shape \(800, 2\)(.|\n)*turn the axes"),
        (torch.zeros(2, 9000), r"1 to 8001 samples \(0\.500 s at 16000 Hz\)(.|\n)*windows"),
        (torch.zeros(2, NEED, dtype=torch.int16), "torch.int16"),
        (torch.tensor([[0.0] * 500, [float("nan")] * 500]), r"1 of 2 waveforms hold .* \(rows \[1\]\)"),
    ],
)
def test_waves_that_cannot_be_scored(x: Tensor, text: str) -> None:
    with pytest.raises(AudioError, match=text):
        model().scores(x)
