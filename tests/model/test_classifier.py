"""The head in float64 by hand, its pooling and padding, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.errors import ConfigError
from asit.model.classifier import Classifier, Head, Labelling, Pooling, draw_dropout
from asit.model.vit import Encoder, Tokens

from .conftest import filled  # type: ignore[import-not-found]

TINY = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=4, patch_mels=8)
POOLINGS: tuple[Pooling, ...] = ("class", "mean", "class+mean", "mean+std", "class+mean+std")


def classifier(pooling: Pooling = "class", norm: bool = True, dropout: float = 0.0) -> Classifier:
    model: Classifier = filled(Classifier(Encoder(TINY, 24, 16), Head(32, 5, pooling, dropout, norm)), 0.3)
    return model.eval()


def spectrogram(rows: int = 3) -> Tensor:
    return torch.randn(rows, 1, 24, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_logits_are_norm_and_product_of_the_pooled_tokens(pooling: Pooling, norm: bool) -> None:
    model, x = classifier(pooling, norm), spectrogram()
    with torch.no_grad():
        tokens, got = model.encoder(x), model(x)
    cls, patches = tokens.cls.double().numpy(), tokens.patches.double().numpy()
    mean = sum(patches[:, i] for i in range(patches.shape[1])) / patches.shape[1]
    deviation = np.sqrt(sum((patches[:, i] - mean) ** 2 for i in range(patches.shape[1])) / patches.shape[1])
    named = {"class": cls, "mean": mean, "std": deviation}
    read = np.concatenate([named[part] for part in pooling.split("+")], 1)
    state = {name: value.double().numpy() for name, value in model.head.state_dict().items()}
    if norm:
        centred = read - read.mean(1, keepdims=True)
        read = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
        read = read * state["norm.weight"] + state["norm.bias"]
    np.testing.assert_allclose(got, read @ state["linear.weight"].T + state["linear.bias"], atol=1e-4)
    assert got.dtype == torch.float32


def test_names_of_parameters() -> None:
    model = classifier()
    own = {name for name, _ in model.named_parameters()}
    assert own == {f"encoder.{name}" for name, _ in model.encoder.named_parameters()} | {
        *("head.norm.weight", "head.norm.bias", "head.linear.weight", "head.linear.bias")
    }


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_padding_reaches_no_logit_and_no_gradient(pooling: Pooling, poison: float) -> None:
    model, x = classifier(pooling), spectrogram()
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 6:] = False  # 3 of 6 columns
    valid[2, 2:] = False
    want = []
    for i, columns in enumerate((6, 3, 1)):
        tokens = model.encoder(x[i : i + 1, :, : 4 * columns], stretch=False)
        want.append(model.head(tokens))
    x[1, :, 12:] = poison
    x[2, :, 4:] = poison
    got = model(x, valid=valid)
    torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=1e-4)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_head_is_float32_under_autocast() -> None:
    model, x = classifier("class+mean"), spectrogram()
    with torch.no_grad():
        plain = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            near, tokens = model(x), model.encoder(x)
        alone = model.head(tokens)
    assert near.dtype == torch.float32
    assert torch.equal(near, alone), "nothing of the head in bfloat16"
    assert torch.nn.functional.cosine_similarity(near, plain, dim=1).min() > 0.99


def test_stochastic_depth_is_handed_on() -> None:
    model, x = classifier("mean"), spectrogram()
    drop = torch.ones(2, 2, 3)
    drop[1, :, 2] = 0.0
    with torch.no_grad():
        want = model.head(model.encoder(x, drop=drop))
        assert torch.equal(model(x, drop=drop), want)
        assert not torch.allclose(model(x)[2], want[2])


def test_dropout_is_drawn_outside_and_keeps_the_mean() -> None:
    model, x = classifier("class+mean", dropout=0.25), spectrogram()
    draws = np.stack([draw_dropout(np.random.default_rng([3, i]), model.head) for i in range(3000)])
    assert draws.shape == (3000, 64)
    assert draws.dtype == np.float32
    assert (draws == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert draws.mean() == pytest.approx(1.0, abs=0.01)
    assert np.array_equal(draws[7], draw_dropout(np.random.default_rng([3, 7]), model.head))
    factors = torch.from_numpy(draws[:3])
    before = torch.get_rng_state()
    with torch.no_grad():
        normed = model.head.norm(model.head.pool(model.encoder(x)))  # type: ignore[misc]
        want = model.head.linear(normed * factors)
        torch.testing.assert_close(model.train()(x, dropout=factors), want)
    with pytest.raises(ValueError, match=r"dropout 0\.25 in training needs factors"):
        model.train()(x)
    assert torch.equal(before, torch.get_rng_state())


def test_init_sets_every_number_and_is_seeded() -> None:
    head = Head(200, 50, "class+mean")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
    head.init_weights(torch.Generator().manual_seed(1))
    first = {name: value.clone() for name, value in head.state_dict().items()}
    head.init_weights(torch.Generator().manual_seed(1))
    assert all(torch.equal(value, first[name]) for name, value in head.state_dict().items())
    assert first["linear.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (first["linear.bias"] == 0).all()
    assert (first["norm.weight"] == 1).all()
    assert (first["norm.bias"] == 0).all()


def test_a_row_without_any_valid_patch_has_finite_logits() -> None:
    with torch.no_grad():
        out = classifier("mean")(spectrogram(1), valid=torch.zeros(1, 12, dtype=torch.bool))
    assert out.isfinite().all()


def test_a_head_of_another_width() -> None:
    with pytest.raises(ConfigError, match="a head of 48 features, an encoder of width 32"):
        Classifier(Encoder(TINY, 24, 16), Head(24, 5, "class+mean"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"classes": ()}, "0 classes"),
        ({"classes": ("dog", "cat", "dog")}, "'dog' more than once"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"seconds": 0.0}, "0.0 seconds"),
        ({"seconds": float("nan")}, "nan seconds"),
        ({"norm_eps": 0.0}, "a norm's epsilon of 0.0"),
    ],
)
def test_labellings_that_cannot_be(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Labelling(**{"classes": ("a",), "multi": True, "pooling": "class", "seconds": 1.0, **given})


def test_the_norms_epsilon_is_the_heads() -> None:
    head = Head(24, 5, norm_eps=0.5).eval()
    tokens = Tokens(torch.randn(2, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 24), (1, 1))
    centred = tokens.cls - tokens.cls.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(head(tokens), normed @ head.linear.weight.T)
    usual = Head(24, 5).eval()
    usual.load_state_dict(head.state_dict())
    assert (usual(tokens) - head(tokens)).abs().max() > 1e-3
