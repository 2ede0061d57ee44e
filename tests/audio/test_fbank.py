"""The front end against Kaldi's own arithmetic, and what it promises about crops, padding and precision."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit.audio.fbank import FLOOR, FrontEnd, logmel_statistics, mel_bank
from asit.audio.griffin_lim import griffin_lim
from asit.config import FrontEndSettings
from asit.errors import AudioError, ConfigError

SHARED = Path(os.environ.get("ASIT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
U = 2.0**-24
"""Half a unit in the last place of float32: the relative error of one rounding."""
TOLERANCE = 5e-5
"""torchaudio transforms the same frames with the same function; its sums of up to 2 * 200 squares, none negative, are
taken in another order, on each processor in its own: 2 * 400 * U. The promise is 1.5e-4."""


@pytest.fixture(scope="module")
def kaldi() -> Any:
    """torchaudio's pure-Python Kaldi file, loaded alone: the package's own import needs libraries of its build."""
    try:
        # In a folder of its own: transformers imports any torchaudio it sees, and the binaries of this one do not load.
        found = next(metadata.distributions(name="torchaudio", path=[f"{sys.prefix}/oracles", *sys.path]))
        path = found.locate_file("torchaudio/compliance/kaldi.py")
    except StopIteration:
        pytest.skip("torchaudio is not installed (pip install --no-deps torchaudio): its Kaldi code is the oracle")
    spec = importlib.util.spec_from_file_location("torchaudio_compliance_kaldi", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
        spec.loader.exec_module(module)
    return module


def oracle(kaldi: Any, wave: torch.Tensor, rate: int, mels: int = 128, **other: float) -> torch.Tensor:
    result: torch.Tensor = kaldi.fbank(
        wave[None],
        htk_compat=True,
        sample_frequency=rate,
        use_energy=False,
        window_type="hanning",
        num_mel_bins=mels,
        dither=0.0,
        frame_shift=10,
        **other,
    )
    return result


def front_end(**settings: Any) -> FrontEnd:
    return FrontEnd(FrontEndSettings(**settings))


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def signals(samples: int) -> dict[str, torch.Tensor]:
    n, seeded = torch.arange(samples), torch.Generator().manual_seed(2)
    return {
        "noise": noise(samples),
        "silence": torch.zeros(samples),
        "offset": torch.full((samples,), 0.5),
        "loud tone over faint noise": 0.9 * torch.sin(0.05 * n) + 1e-5 * noise(samples, 1),
        "click": torch.nn.functional.one_hot(torch.tensor(samples // 2), samples).float(),
        "16-bit noise of one step": torch.randint(-1, 2, (samples,), generator=seeded) / 32768,
    }


@pytest.mark.parametrize("mels", [64, 128])
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 32000, 44100])
def test_equals_torchaudio(kaldi: Any, rate: int, mels: int) -> None:
    model = front_end(rate=rate, mels=mels)
    for samples in (model.window, model.window + 1, rate // 3, 2 * rate + 7):
        for name, wave in signals(samples).items():
            ours, theirs = model.fbank(wave[None])[0], oracle(kaldi, wave, rate, mels)
            assert ours.shape == theirs.shape == (model.frames_for(samples), mels)
            assert (ours - theirs).abs().max() <= TOLERANCE, (name, samples)


def test_equals_torchaudio_with_other_settings(kaldi: Any) -> None:
    wave = noise(16000)
    ours = front_end(low_hz=50, high_hz=-400, window_ms=32, preemphasis=0.9).fbank(wave[None])[0]
    theirs = oracle(kaldi, wave, 16000, low_freq=50, high_freq=-400, frame_length=32, preemphasis_coefficient=0.9)
    assert (ours - theirs).abs().max() <= TOLERANCE


def test_equals_torchaudio_on_speech(kaldi: Any) -> None:
    files = sorted((SHARED / "free-spoken-digit-dataset" / "recordings").glob("*_9.wav"))[:10]
    files += sorted((SHARED / "arabic-speech-commands" / "dataset" / "open").glob("*.opus"))[:5]
    files += sorted((SHARED / "arabic-speech-commands" / "background_noise").glob("*.flac"))[:1]
    if not files:
        pytest.skip("no recordings: ../shared/data (or ASIT_SHARED_DATA) is absent")
    for file in files:
        wave, rate = soundfile.read(file, dtype="float32", frames=160000)
        ours = front_end(rate=rate).fbank(torch.from_numpy(wave)[None])[0]
        assert (ours - oracle(kaldi, torch.from_numpy(wave), rate)).abs().max() <= TOLERANCE, file.name


def in_float64(wave: torch.Tensor, model: FrontEnd) -> tuple[np.ndarray, np.ndarray]:
    """The log-mel in float64, and how far one in float32 may be from it on any processor; (T, F) each.

    Two things are rounded. The Fourier transform of x errs by up to 6.7 U log2(N) |x| a coefficient (Higham, Accuracy
    and Stability of Numerical Algorithms, theorem 24.2, the error spread evenly). The mel scale is computed up to
    2,840 and differences of it are divided by a step of 22: a weight errs by up to 1e-4, by which triangles of one or
    two weights differ between libraries.
    """
    rate, size, mels = model.settings.rate, 1 << (model.window - 1).bit_length(), model.settings.mels
    frames = wave.double().unfold(0, model.window, model.shift)
    x = frames - frames.mean(1, keepdim=True)
    x = x - model.settings.preemphasis * torch.cat([x[:, :1], x[:, :-1]], 1)
    x = x * torch.hann_window(model.window, periodic=False, dtype=torch.float64)
    amplitude = torch.fft.rfft(x, size)[:, :-1].abs()
    low, top = (1127 * math.log(1 + hz / 700) for hz in (model.settings.low_hz, rate / 2))
    step = (top - low) / (mels + 1)
    points = 1127 * torch.log(1 + torch.arange(size // 2, dtype=torch.float64) * rate / size / 700)
    position = (points[:, None] - low) / step - torch.arange(mels)
    weights = torch.minimum(position, 2 - position).clamp(min=0)
    # Two roundings before the logarithm, and one of it and of each product and sum after it, in each of four terms.
    weight_error = 4 * (1127 * U * (2 + top / 1127) + 2 * top * U) / step
    touched = ((position > -weight_error) & (position < 2 + weight_error)).double()
    error = 6.7 * U * math.log2(size) * x.norm(dim=1, keepdim=True)
    energy = amplitude**2 @ weights
    off = weight_error * (amplitude**2 @ touched) + (2 * amplitude * error + error**2) @ weights
    energy = energy.clamp(min=FLOOR)
    return energy.log().numpy(), (off / energy - torch.log1p(-(off / energy).clamp(max=0.5)) + 32 * U).numpy()


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_close_to_kaldi_native_fbank(rate: int) -> None:
    native = pytest.importorskip("kaldi_native_fbank")
    model = front_end(rate=rate)
    options = native.FbankOptions()
    options.frame_opts.samp_freq = rate
    options.frame_opts.frame_length_ms, options.frame_opts.frame_shift_ms = 25, 10
    options.frame_opts.window_type, options.frame_opts.dither, options.frame_opts.snip_edges = "hanning", 0, True
    options.mel_opts.num_bins, options.use_energy, options.htk_compat = 128, False, True
    wave = noise(rate)
    computer = native.OnlineFbank(options)
    computer.accept_waveform(rate, wave.tolist())
    computer.input_finished()
    theirs = np.stack([computer.get_frame(i) for i in range(computer.num_frames_ready)])
    ours = model.fbank(wave[None])[0].numpy()
    assert ours.shape == theirs.shape
    exact, bound = in_float64(wave, model)
    assert np.all(np.abs(ours - exact) <= bound)
    assert np.all(np.abs(ours - theirs) <= 2 * bound)
    assert np.median(bound) < 6e-4


def test_one_bin_of_the_common_bank_is_empty() -> None:
    assert (mel_bank(FrontEndSettings()).sum(0) == 0).nonzero().flatten().tolist() == [3]
    assert torch.all(front_end().fbank(noise(16000)[None])[0, :, 3] == math.log(FLOOR))


THREADS = """
import torch
from asit.audio.fbank import FrontEnd, logmel_statistics
from asit.config import FrontEndSettings
for rate in (16000, 44100):
    model, found = FrontEnd(FrontEndSettings(rate=rate)), []
    wave = 0.1 * torch.randn(3, 2 * rate, generator=torch.Generator().manual_seed(0))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(model.fbank(wave))
    assert all(torch.equal(other, found[0]) for other in found)
    assert all(logmel_statistics(other) == logmel_statistics(found[0]) for other in found)
"""


def test_the_number_of_threads_changes_nothing() -> None:
    """A loader's process has one thread, and without such processes the run's own do the same work.

    In a process of its own: tests fork this one, and a fork of a process with OpenMP threads can hang.
    """
    subprocess.run([sys.executable, "-c", THREADS], check=True, timeout=300)


def test_a_crop_on_the_hop_grid_is_a_crop_of_the_logmel() -> None:
    model, wave = front_end(), noise(40 * 16000)
    whole = model.fbank(wave[None])[0]
    for start in (0, 1, 333, 3000):
        for frames in (1, 2, 3, 98, 511, 512, 513, 598, 998):
            crop = wave[start * model.shift :][: model.samples_for(frames)]
            assert torch.equal(model.fbank(crop[None])[0], whole[start : start + frames]), (start, frames)


@pytest.mark.parametrize("samples", [400, 16000, 170000])
def test_rows_do_not_touch_each_other(samples: int) -> None:
    model = front_end()
    waves = torch.stack([noise(samples, seed) for seed in range(7)])
    together = model.fbank(waves)
    assert torch.equal(together, torch.cat([model.fbank(wave[None]) for wave in waves]))


def test_float32_under_autocast_half_weights_and_lowered_matmul_precision() -> None:
    wave = noise(16000)[None]
    expected = front_end().fbank(wave)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(front_end().fbank(wave), expected)
    assert torch.equal(front_end().to(torch.bfloat16).fbank(wave), expected)
    with torch.device("meta"):
        empty = front_end()
    assert torch.equal(empty.to_empty(device="cpu").fbank(wave), expected)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(front_end().fbank(wave), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_is_saved_with_the_weights() -> None:
    assert not front_end().state_dict()
    assert not list(front_end().parameters())


def test_input_is_left_alone_and_the_output_is_normalised() -> None:
    model = front_end(mean=-4.2677393, std=4.5689974)
    wave = noise(16000).repeat(2, 1)
    kept = wave.clone()
    out = model(wave)
    assert torch.equal(wave, kept)
    assert (out.shape, out.dtype) == ((2, 1, 98, 128), torch.float32)
    expected = (model.fbank(wave).double() + 4.2677393) / (2 * 4.5689974)
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=0, atol=1e-6)
    # Silence is about -1.28 on this scale (spec/method.md).
    assert model(torch.zeros(1, 400)).mean().item() == pytest.approx(-1.28, abs=0.005)


@pytest.mark.parametrize(("rate", "samples", "frames"), [(16000, 399, 0), (16000, 400, 1), (16000, 96000, 598)])
def test_frames_and_samples(rate: int, samples: int, frames: int) -> None:
    model = front_end(rate=rate)
    assert model.frames_for(samples) == frames
    assert model.frames_for(model.samples_for(frames)) == frames
    assert frames == 0 or model.frames_for(model.samples_for(frames) - 1) == frames - 1


def test_padding_rules() -> None:
    wave = torch.tensor([1.0, 2.0, 3.0])
    assert front_end(padding="silence").pad(wave, 5).tolist() == [1, 2, 3, 0, 0]
    assert front_end(padding="repeat").pad(wave, 7).tolist() == [1, 2, 3, 1, 2, 3, 1]
    for rule in ("silence", "repeat", "zero"):
        assert torch.equal(front_end(padding=rule).pad(wave, 3), wave)
        assert torch.equal(front_end(padding=rule).pad(wave, 2), wave)
        with pytest.raises(AudioError, match="no samples"):
            front_end(padding=rule).pad(wave[:0], 5)
    zero = front_end(padding="zero")
    assert zero.pad(wave, 16000).shape == (zero.window,)
    x = zero.fbank(noise(16000)[None])[0]
    padded = zero.pad_frames(x, 120)
    assert torch.equal(padded, torch.cat([x, torch.zeros(22, 128)]))
    assert torch.equal(front_end(padding="silence").pad_frames(x, 120), x)


def test_a_wave_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(AudioError, match=r"399 samples \(24.9 ms\)[\s\S]*400 samples \(25 ms at 16000 Hz\)[\s\S]*pad"):
        front_end().fbank(torch.zeros(1, 399))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="high_hz <= 4000"):
        front_end(rate=8000, high_hz=8000)
    with pytest.raises(ConfigError, match="0 and 160 samples"):
        front_end(window_ms=0.01)
    with pytest.raises(ConfigError, match="asit catalogue"):
        front_end().normalise(torch.zeros(1))


def test_statistics_are_summed_in_float64() -> None:
    x = -15.942385 + 1e-4 * noise(1_000_000)
    total, squares, count = logmel_statistics(x.view(1000, 1000))
    exact = x.numpy().astype(np.longdouble)
    assert count == 1_000_000
    # n terms of one sign, summed in whatever order: n roundings at most, each of 2^-53. Float32 would err by n 2^-24.
    assert total == pytest.approx(float(exact.sum()), rel=count * 2.0**-53)
    assert squares == pytest.approx(float((exact**2).sum()), rel=count * 2.0**-53)


def test_a_tone_comes_back_at_its_pitch() -> None:
    model = front_end()
    tone = 0.3 * torch.sin(2 * math.pi * 440 / 16000 * torch.arange(32000))
    wave = griffin_lim(model.fbank(tone[None])[0], model.settings)
    assert (wave.dtype, wave.shape) == (np.float32, (31920,))
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    # Half a bin of the 512-point transform is 16 Hz: finer than that the log-mel does not say.
    assert abs(spectrum.argmax() * 16000 / len(wave) - 440) < 16
    assert np.std(wave[4000:-4000]) == pytest.approx(0.3 / math.sqrt(2), rel=0.1)


def test_griffin_lim_round_trip_and_seed() -> None:
    model = front_end()
    n = torch.arange(24000)
    gate = (n // 4000) % 2
    chord = sum(torch.sin(2 * math.pi * hz / 16000 * n) for hz in (220, 554.4, 1318.5, 3000))
    x = model.fbank((0.1 * gate * chord + 0.01 * noise(24000))[None])[0]
    wave = griffin_lim(x, model.settings)
    back = model.fbank(torch.from_numpy(wave)[None])[0]
    assert np.corrcoef(x.flatten(), back.flatten())[0, 1] > 0.9
    assert np.array_equal(wave, griffin_lim(x, model.settings))
    assert not np.array_equal(wave, griffin_lim(x, model.settings, seed=1))
    assert np.abs(wave).max() <= 1


@pytest.mark.parametrize("shape", [(0, 128), (10, 64), (1, 10, 128)])
def test_griffin_lim_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(AudioError, match=r"expected: \(frames, 128\)"):
        griffin_lim(torch.zeros(shape), FrontEndSettings())
