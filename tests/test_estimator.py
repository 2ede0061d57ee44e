"""`asit.Embedder` in scikit-learn's hands, and `asit.create_encoder`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

import asit
from asit.errors import ConfigError
from asit.model.audio_model import AudioModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., AudioModel]) -> Path:
    root = tmp_path_factory.mktemp("estimator")
    small_model().save(root / "model")
    for i in range(12):
        t = np.arange(4000 + 1500 * i) / 16000
        noise = np.random.default_rng(i).standard_normal(len(t))
        soundfile.write(root / f"{i:02d}.wav", 0.3 * np.sin(2 * np.pi * (300, 2500)[i % 2] * t) + 0.02 * noise, 16000)
    return root


def test_vectors_are_those_of_the_embedding(folder: Path) -> None:
    paths = sorted(map(str, folder.glob("*.wav")))
    embedder = asit.Embedder(folder / "model", layers=(0, -1))
    got = embedder.fit_transform(paths)
    assert got.shape == (12, 2 * 3 * 32)
    assert got.dtype == np.float32
    for path, row in zip(paths, got, strict=True):
        found = asit.load(folder / "model").embed(path, layer=[0, 1], precision="float32")
        patches = found.patches.double().numpy()
        want = np.concatenate([found.class_token.numpy(), patches.mean(0), patches.std(0)])
        np.testing.assert_allclose(row, want, atol=1e-4)
    waves = np.stack([soundfile.read(path, dtype="float32")[0][:4000] for path in paths])
    arrays = asit.Embedder(asit.load(folder / "model"), pooling="mean", rate=16000).transform(waves)
    assert arrays.shape == (12, 32)


def test_scikit_learn_can_clone_search_and_pickle_it(folder: Path) -> None:
    paths, y = sorted(map(str, folder.glob("*.wav"))), np.arange(12) % 2
    embedder = asit.Embedder(str(folder / "model"), pooling="mean")
    copied = clone(embedder)
    assert copied is not embedder
    assert copied.get_params() == embedder.get_params()
    pipeline = make_pipeline(embedder, LogisticRegression())
    search = GridSearchCV(pipeline, {"embedder__pooling": ["mean", "class+mean+std"]}, cv=2).fit(paths, y)
    assert search.best_score_ > 0.9
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    np.testing.assert_array_equal(again.predict(paths), search.predict(paths))
    assert "Embedder(model=" in repr(pipeline)
    with pytest.raises(ValueError, match="parameters are"):
        embedder.set_params(window=3)
    with pytest.raises(ConfigError, match="pooling"):
        asit.Embedder(folder / "model", pooling="median").transform(paths)


def test_an_encoder_is_a_module_of_the_documented_shapes(folder: Path) -> None:
    encoder = asit.create_encoder("custom", width=32, depth=2, heads=2, frames=64, mels=32)
    assert isinstance(encoder, torch.nn.Module)
    tokens = encoder(torch.zeros(3, 1, 64, 32))
    assert (tokens.cls.shape, tokens.patches.shape, tokens.grid) == ((3, 32), (3, 8, 32), (4, 2))
    assert encoder(torch.zeros(3, 1, 96, 32), layer=(0, 1)).patches.shape == (3, 12, 64)
    tokens.patches.sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.blocks.parameters())
    same = asit.create_encoder("custom", width=32, depth=2, heads=2, frames=64, mels=32)
    assert torch.equal(same.cls_token, encoder.cls_token)
    loaded = asit.create_encoder(weights=folder / "model")
    assert loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), asit.load(folder / "model").encoder.state_dict())
    with pytest.raises(ConfigError, match="frames"):
        asit.create_encoder(weights=folder / "model", frames=64)
    with pytest.raises(ConfigError, match="width"):
        asit.create_encoder("tiny", width=30)
