"""The APIs of two benchmarks, as these say them: HEAR's (https://hearbenchmark.com/hear-api.html), `asit.hear`; and
X-ARES' encoder, its README and checker (https://github.com/jimbozhang/xares), `asit.xares`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import asit.xares
from asit import hear
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.hear import MODEL, RegularFrames, frames_in, hop_of
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder


def build(rate: int = 16000, patch: int = 16, stride: int | None = None, shift: float = 10.0) -> AudioModel:
    settings = EncoderSettings(
        size="custom", width=32, depth=2, heads=2, patch_frames=patch, patch_mels=16, patch_stride_frames=stride
    )
    encoder = Encoder(settings, patch + 5 * (stride or patch), 32)
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    front_end = FrontEndSettings(rate=rate, mels=32, mean=-6.0, std=3.0, shift_ms=shift, high_hz=rate / 2 - 100)
    return AudioModel(encoder, FrontEnd(front_end))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hear") / "model"
    build().save(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> hear.HearModel:
    return hear.load_model(str(folder))


def audio(seconds: float, sounds: int = 2, rate: int = 16000, seed: int = 0) -> Tensor:
    """White noise in [-1, 1]."""
    return 2.0 * torch.rand(sounds, round(seconds * rate), generator=torch.Generator().manual_seed(seed)) - 1.0


def test_functions_and_attributes_are_those_of_the_specification(model: hear.HearModel) -> None:
    load = inspect.signature(hear.load_model).parameters
    assert next(iter(load)) == "model_file_path"
    assert all(one.default is not inspect.Parameter.empty for one in load.values()), "load_model() alone is called too"
    for function in (hear.get_timestamp_embeddings, hear.get_scene_embeddings):
        assert list(inspect.signature(function).parameters)[:2] == ["audio", "model"]
    assert isinstance(model, torch.nn.Module)
    assert model.sample_rate in (16000, 22050, 32000, 44100, 48000)
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int
    assert next(model.parameters()).device.type in ("cpu", "cuda")


@pytest.mark.parametrize("seconds", [0.001, 0.03, 0.11, 0.5, 1.07, 1.98, 4.0, 7.321])
def test_timestamps_are_regular_centred_and_cover_the_sound(model: hear.HearModel, seconds: float) -> None:
    sound = audio(seconds)
    embeddings, timestamps = hear.get_timestamp_embeddings(sound, model)
    length = 1000.0 * sound.shape[1] / model.sample_rate
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (2, timestamps.shape[1], model.timestamp_embedding_size)
    assert timestamps.shape[0] == 2
    assert embeddings.isfinite().all()
    assert torch.equal(timestamps[0], timestamps[1])
    assert timestamps.min() >= 0.0
    assert timestamps.max() <= length
    if timestamps.shape[1] > 1:
        steps = timestamps.double().diff(dim=1)
        assert steps.min() > 0
        assert steps.max() <= 50.0
        assert (steps - steps.mean()).abs().max() < 1.0
        assert timestamps.min() <= steps.mean(), "there is one at the beginning"
        assert timestamps.max() >= length - 50.0, "and at the end"


def test_an_event_is_where_its_timestamp_says() -> None:
    model = hear.HearModel(build(), "mean", hop=0.04, batch=4)
    quiet = torch.zeros(1, 3 * 16000)
    before, times = hear.get_timestamp_embeddings(quiet, model)
    for at in (0.02, 1.0, 1.5, 2.98):
        click = quiet.clone()
        click[0, int(at * 16000) - 8 : int(at * 16000) + 8] = 0.5
        after, _ = hear.get_timestamp_embeddings(click, model)
        moved = (after - before)[0].norm(dim=1)
        assert times[0, moved.argmax()] == pytest.approx(1000 * at, abs=100), "within half a patch"


def test_frames_are_those_of_embed_on_the_sound_set_in_silence() -> None:
    model, wave = build(), audio(0.9, sounds=1)
    found = RegularFrames(model, 0.16).frames(wave)[0]
    # A patch covers 175 ms: with 7.5 ms of silence before the sound the first is centred at 80 ms.
    padded = torch.nn.functional.pad(wave, (120, 5 * 2560 + 2800 - 120 - wave.shape[1]))
    expected = model.embed(padded[0], precision="float32")
    assert found.shape == (6, 32)
    torch.testing.assert_close(found, expected.frames, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(expected.times - 0.0075, 0.08 + 0.16 * torch.arange(6))


def test_scene_embeddings_are_the_clip_vectors_as_pooled(model: hear.HearModel, folder: Path) -> None:
    sound = audio(2.74, sounds=4)
    embeddings = hear.get_scene_embeddings(sound, model)
    assert (embeddings.dtype, embeddings.shape) == (torch.float32, (4, model.scene_embedding_size))
    expected = model.model.embed(sound[1], precision="float32").clip
    torch.testing.assert_close(embeddings[1], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(sound), embeddings)
    token = hear.get_scene_embeddings(sound, hear.load_model(folder, pooling="class"))
    both = hear.load_model(folder, pooling="class+mean")
    assert both.scene_embedding_size == 64
    torch.testing.assert_close(hear.get_scene_embeddings(sound, both), torch.cat([token, embeddings], 1))


@pytest.mark.parametrize("function", [hear.get_scene_embeddings, lambda *two: hear.get_timestamp_embeddings(*two)[0]])
def test_a_sound_does_not_depend_on_its_neighbours_or_on_the_call(
    model: hear.HearModel, function: Callable[[Tensor, hear.HearModel], Tensor]
) -> None:
    sound = audio(1.3, sounds=3).requires_grad_()
    several = function(sound, model)
    assert not several.requires_grad
    assert not several.is_inference()
    assert torch.equal(several, function(sound, model)), "the same twice"
    torch.testing.assert_close(function(sound.flip(0), model).flip(0), several, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(function(sound[1:2], model)[0], several[1], atol=1e-5, rtol=1e-5)


def test_a_model_of_a_rate_that_hear_has_not_is_given_the_next_higher_one() -> None:
    model = hear.HearModel(build(rate=8000), "mean", hop=0.04, batch=4)
    assert model.sample_rate == 16000
    embeddings, timestamps = hear.get_timestamp_embeddings(audio(1.0), model)
    assert embeddings.shape == (2, 25, 32)
    assert timestamps[0, -1] == 980.0
    assert hear.get_scene_embeddings(audio(1.0), model).shape == (2, 32)


@pytest.mark.parametrize(
    ("patch", "stride", "shift", "hop"),
    [(16, None, 10.0, 0.04), (16, 10, 10.0, 0.05), (4, None, 10.0, 0.04), (7, None, 10.0, 0.01), (2, None, 40.0, 0.04)],
)
def test_the_hop_divides_a_column_and_stays_within_50_ms(
    patch: int, stride: int | None, shift: float, hop: float
) -> None:
    model = build(patch=patch, stride=stride, shift=shift)
    assert hop_of(model) == pytest.approx(hop)
    assert frames_in(20 * 60 * 16000, 16000, hop) == round(20 * 60 / hop)
    frames = RegularFrames(model).frames(audio(0.8))
    assert frames.shape == (2, frames_in(12800, 16000, hop), 32)


def test_a_hop_of_ones_own(folder: Path) -> None:
    model = hear.load_model(folder, hop=0.16)
    embeddings, timestamps = hear.get_timestamp_embeddings(audio(1.6), model)
    assert embeddings.shape == (2, 10, 32)
    torch.testing.assert_close(timestamps[0], 160.0 * torch.arange(10) + 80.0)
    with pytest.raises(ConfigError, match="hop"):
        hear.get_timestamp_embeddings(audio(1.0), hear.load_model(folder, hop=0.03))


@pytest.mark.parametrize("shape", [(16000,), (2, 0), (1, 2, 3), (8000, 2), (2, 100)])
def test_audio_of_another_shape_or_type_is_refused(model: hear.HearModel, shape: tuple[int, ...]) -> None:
    given = torch.zeros(shape, dtype=torch.int16 if shape == (2, 100) else torch.float32)
    for function in (hear.get_scene_embeddings, hear.get_timestamp_embeddings):
        with pytest.raises(AudioError, match=r"audio of shape .* torch\.") as caught:
            function(given, model)
        assert "n_sounds, n_samples" in caught.value.expected
    none = torch.zeros(0, 16000)
    assert hear.get_scene_embeddings(none, model).shape == (0, 32)
    assert [found.shape for found in hear.get_timestamp_embeddings(none, model)] == [(0, 25, 32), (0, 25)]
    sound = audio(0.5)
    sound[1, 7] = float("nan")
    with pytest.raises(AudioError, match=r"not finite|NaN or infinite"):
        hear.get_scene_embeddings(sound, model)


def test_the_environment_names_the_model_where_nothing_else_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL, raising=False)
    with pytest.raises(ConfigError, match="no model was named, and ASIT_MODEL is not set"):
        hear.load_model()
    with pytest.raises(ConfigError, match="ASIT_MODEL is not set"):
        asit.xares.AsitEncoder()
    monkeypatch.setenv(MODEL, str(folder))
    assert hear.load_model().timestamp_embedding_size == asit.xares.AsitEncoder().output_dim == 32
    with pytest.raises(CheckpointError, match="does not exist"):
        hear.load_model(str(folder / "nothing"))
    with pytest.raises(ConfigError, match="pooling 'max'"):
        hear.load_model(str(folder), pooling="max")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_on_a_gpu_results_are_on_it_and_as_on_the_cpu(folder: Path) -> None:
    sound = audio(1.5)
    here, there = hear.load_model(str(folder), device="cpu"), hear.load_model(str(folder)).to("cuda")
    embeddings, timestamps = hear.get_timestamp_embeddings(sound.cuda(), there)
    assert embeddings.device.type == timestamps.device.type == "cuda"
    expected, times = hear.get_timestamp_embeddings(sound, here)
    torch.testing.assert_close(embeddings.cpu(), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(timestamps.cpu(), times)
    scenes = hear.get_scene_embeddings(sound.cuda(), there).cpu()
    torch.testing.assert_close(scenes, hear.get_scene_embeddings(sound, here), atol=1e-3, rtol=1e-3)
    frames = asit.xares.AsitEncoder(folder).to("cuda")(sound.cuda())
    assert frames.device.type == "cuda"
    torch.testing.assert_close(frames.cpu(), asit.xares.AsitEncoder(folder)(sound), atol=1e-3, rtol=1e-3)


# --- X-ARES -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(folder: Path) -> asit.xares.AsitEncoder:
    return asit.xares.AsitEncoder(folder)


def test_one_name_of_the_module_ends_in_encoder() -> None:
    """X-ARES takes the one name of the file that does, and refuses a file with several."""
    assert [name for name in dir(asit.xares) if name.endswith("Encoder")] == ["AsitEncoder"]


def test_the_checker_of_xares_would_be_content(encoder: asit.xares.AsitEncoder) -> None:
    assert isinstance(encoder, torch.nn.Module)
    assert (encoder.sampling_rate, encoder.output_dim, encoder.hop_size_in_ms) == (16000, 32, 40)
    found = encoder(audio(3.125))
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float32
    assert found.shape == (2, 78, 32)


@pytest.mark.parametrize("samples", [1, 300, 640, 8000, 16000, 16001, 12345, 160000])
def test_frames_follow_the_hop_at_any_length(encoder: asit.xares.AsitEncoder, samples: int) -> None:
    with torch.inference_mode():
        found = encoder(audio(samples / 16000)).to("cpu").detach()
    hops = samples / 16000 / (encoder.hop_size_in_ms / 1000)
    assert found.shape[1] in (max(1, math.floor(hops)), math.ceil(hops))
    assert found.isfinite().all()


def test_one_sound_without_a_batch_and_ten_minutes(encoder: asit.xares.AsitEncoder) -> None:
    wave = audio(0.5)[0]
    torch.testing.assert_close(encoder(wave), encoder(wave[None]))
    found = encoder(audio(600, sounds=1))
    assert found.shape == (1, 15000, 32)
    assert found.isfinite().all()


def test_a_subclass_names_its_model_as_the_documentation_says(folder: Path) -> None:
    class BirdsEncoder(asit.xares.AsitEncoder):
        def __init__(self) -> None:
            super().__init__(str(folder), hop=0.16)

    encoder = BirdsEncoder()
    assert encoder.hop_size_in_ms == 160
    assert encoder(audio(1.0)).shape == (2, 6, 32)


def test_what_is_not_audio_is_refused(encoder: asit.xares.AsitEncoder) -> None:
    with pytest.raises(AudioError, match="audio of shape"):
        encoder(torch.zeros(1, 2, 3))
    with pytest.raises(AudioError, match=r"\(8000, 2\)(.|\n)*transpose it"):
        encoder(torch.zeros(8000, 2))
