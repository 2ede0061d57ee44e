"""X-ARES' encoder interface, as its README and checker say it (https://github.com/jimbozhang/xares): `asit.xares`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import asit.xares
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import AudioError, ConfigError
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = EncoderSettings(size="custom", width=32, depth=1, heads=2)
    encoder = Encoder(settings, 96, 32)
    encoder.init_weights(torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("xares") / "model"
    AudioModel(encoder, FrontEnd(FrontEndSettings(mels=32, mean=-6.0, std=3.0))).save(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> asit.xares.AsitEncoder:
    return asit.xares.AsitEncoder(folder)


def noise(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_one_name_of_the_module_ends_in_encoder() -> None:
    """X-ARES takes the one name of the file that does, and refuses a file with several."""
    assert [name for name in dir(asit.xares) if name.endswith("Encoder")] == ["AsitEncoder"]


def test_the_checker_of_xares_would_be_content(encoder: asit.xares.AsitEncoder) -> None:
    assert type(encoder).__name__.endswith("Encoder")
    assert isinstance(encoder, torch.nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 32, 40)
    found = encoder(torch.randn(2, 50000, generator=torch.Generator().manual_seed(0)))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert found.shape == (2, 78, 32)


@pytest.mark.parametrize("samples", [1, 300, 640, 8000, 16000, 16001, 12345, 160000])
def test_frames_follow_the_hop_at_any_length(encoder: asit.xares.AsitEncoder, samples: int) -> None:
    with torch.inference_mode():
        found = encoder(noise(2, samples)).to("cpu").detach()
    hops = samples / 16000 / (encoder.hop_size_in_ms / 1000)
    assert found.shape[1] in (max(1, math.floor(hops)), math.ceil(hops))
    assert found.isfinite().all()


def test_one_sound_without_a_batch(encoder: asit.xares.AsitEncoder) -> None:
    wave = noise(8000)
    torch.testing.assert_close(encoder(wave), encoder(wave[None]))


def test_ten_minutes(encoder: asit.xares.AsitEncoder) -> None:
    found = encoder(noise(1, 600 * 16000))
    assert found.shape == (1, 15000, 32)
    assert found.isfinite().all()


def test_it_is_made_without_arguments_where_the_environment_names_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASIT_MODEL", raising=False)
    with pytest.raises(ConfigError, match="ASIT_MODEL is not set"):
        asit.xares.AsitEncoder()
    monkeypatch.setenv("ASIT_MODEL", str(folder))
    assert asit.xares.AsitEncoder().output_dim == 32


def test_a_subclass_names_its_model_as_the_documentation_says(folder: Path) -> None:
    class BirdsEncoder(asit.xares.AsitEncoder):
        def __init__(self) -> None:
            super().__init__(str(folder), hop=0.16)

    encoder = BirdsEncoder()
    assert encoder.hop_size_in_ms == 160
    assert encoder(noise(2, 16000)).shape == (2, 6, 32)


def test_what_is_not_audio_is_refused(encoder: asit.xares.AsitEncoder) -> None:
    with pytest.raises(AudioError, match="audio of shape"):
        encoder(torch.zeros(1, 2, 3))
    with pytest.raises(AudioError, match=r"\(8000, 2\)(.|\n)*transpose it"):
        encoder(torch.zeros(8000, 2))


@pytest.mark.gpu
def test_it_moves_to_a_gpu_and_answers_there(folder: Path) -> None:
    encoder = asit.xares.AsitEncoder(folder).to("cuda")
    found = encoder(noise(2, 16000).cuda())
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), asit.xares.AsitEncoder(folder)(noise(2, 16000)), atol=1e-3, rtol=1e-3)
