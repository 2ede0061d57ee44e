"""Views made on a device, a batch at once, against those that the loader makes one by one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from asit.config import EncoderSettings, FrontEndSettings, MaskingSettings, PretrainSettings, ViewSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading import crops
from asit.pretrain.pretrain_dataset import DeviceViews, PretrainBatch, PretrainDataset, collate

RATE, MELS = 8000, 36
FRAMES, SHORT = 48, 16
SECONDS = (0.02, 0.3, 0.9, 1.4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    folder = tmp_path_factory.mktemp("sounds")
    listed = []
    for i, seconds in enumerate(SECONDS):
        wave = np.random.default_rng(i).normal(0, 0.1, round(seconds * RATE)).astype(np.float32)
        soundfile.write(folder / f"{i}.wav", wave, RATE, subtype="FLOAT")
        listed.append(Clip(str(folder / f"{i}.wav"), seconds, RATE, 1))
    return Catalogue.from_clips(listed)


def settings_of(padding: Any = "silence", noise: bool = False, **views: Any) -> PretrainSettings:
    return PretrainSettings(
        seed=7,
        front_end=FrontEndSettings(rate=RATE, mels=MELS, mean=-8.0, std=3.5, padding=padding),
        views=ViewSettings(**{"roll": 0.0, **views}),
        masking=MaskingSettings(fill="noise" if noise else "zeros"),
        encoder=EncoderSettings(size="tiny", patch_mels=12),
    )


Both = tuple[PretrainBatch, PretrainBatch]


@pytest.fixture
def both(catalogue: Catalogue) -> Callable[..., Both]:
    def make(
        padding: str = "silence", device: torch.device = CPU, noise: bool = False, of: int = len(SECONDS), **given: Any
    ) -> Both:
        """Return the batch whose views the loader makes, and the one of the device, of the first `of` clips."""
        settings = settings_of(padding, noise, **given)
        frames = (FRAMES, SHORT if settings.views.local_views else 0)
        keys = [(epoch, i) for epoch in range(2) for i in range(of)]
        gather = functools.partial(collate, donor_pool=4)
        there = gather(PretrainDataset(catalogue, settings, frames).__getitems__(keys))
        settings = settings.changed({"front_end_on": "device"})
        cropped = gather(PretrainDataset(catalogue, settings, frames).__getitems__(keys))
        assert cropped.clean.numel() == 0
        assert cropped.crops is not None
        assert cropped.crops.waveforms.shape[0] == len(keys)
        return there, DeviceViews(settings, frames, device)(cropped.to(device))

    return make


def assert_same(there: PretrainBatch, made: PretrainBatch) -> None:
    for f in fields(there):
        expected, found = getattr(there, f.name), getattr(made, f.name)
        if f.name in ("clean", "local") and expected is not None:
            torch.testing.assert_close(found.cpu(), expected, rtol=0.0, atol=1e-4)
        elif isinstance(expected, Tensor):
            assert found.dtype == expected.dtype
            assert torch.equal(found.cpu(), expected)
        else:
            assert found == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"local_views": 3},
        {"roll": 1.0, "local_views": 1},
        {"stretch": 0.5},
        {"mel_warp": 0.3, "gain_db": 6.0},
        {"roll": 0.5, "stretch": 0.3, "mel_warp": 0.2, "gain_db": 3.0, "local_views": 2, "segment_seconds": 0.6},
    ],
    ids=["plain", "local", "roll", "stretch", "warp and gain", "all"],
)
def test_views_made_on_the_device_are_those_of_the_loader(
    device: str, padding: str, given: dict[str, Any], both: Callable[..., Both]
) -> None:
    """Short clips, which are padded, and long ones, in one batch; every other part of it too."""
    assert_same(*both(padding, device=torch.device(device), **given))


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_a_batch_of_short_clips_alone(padding: str, both: Callable[..., Both], monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them gives as many frames as a view has."""
    monkeypatch.setattr(crops, "_MULTIPLE", 1)
    assert_same(*both(padding, of=2))


def test_noise_keeps_its_shape(both: Callable[..., Both]) -> None:
    there, made = both(noise=True)
    assert there.noise is not None
    assert there.noise.shape == there.clean.shape
    assert_same(there, made)


def test_a_batch_that_has_its_views_comes_back_as_it_is(both: Callable[..., Both]) -> None:
    there, made = both()
    prepare = DeviceViews(settings_of(), (FRAMES, 0), CPU)
    assert prepare(there) is there
    assert prepare(made) is made


@pytest.mark.parametrize("size", [1, 7, 8, 9, 128])
def test_bits_come_back_as_masks(size: int) -> None:
    mask = torch.rand(3, 1, 5, size, generator=torch.Generator().manual_seed(size)) < 0.5
    bits = crops.pack(mask)
    assert bits.shape[-1] == -(-size // 8)
    assert torch.equal(crops.unpack(bits, size), mask)
