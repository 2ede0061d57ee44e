"""Embeddings: streams against complete sounds, several passes for a smaller hop, batches, threads, and "auto"."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from torch import Tensor

from asit import runtime
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings
from asit.errors import AudioError, ConfigError
from asit.model.audio_model import AudioModel, Embedding
from asit.model.inference import batching, embedding
from asit.model.inference.embedding import Window, WindowEmbedder
from asit.model.inference.logmel_stream import LogMels
from asit.model.vit import Encoder

from .conftest import COLUMN, FRAMES, TINY, close, make_model, wave  # type: ignore[import-not-found]


def model(padding: str = "silence", distilled: bool = False) -> AudioModel:
    made: AudioModel = make_model(TINY.model_copy(update={"distilled": distilled}), padding=padding)
    return made


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
@pytest.mark.parametrize("sizes", [[77], [399, 1, 160, 3000], [100_000]])
def test_log_mels_in_pieces_are_those_of_the_whole(padding: str, sizes: list[int]) -> None:
    front_end = model(padding).front_end
    for samples, frames in ((1, 4), (399, 2), (400, 1), (30_000, 190), (90_123, 570)):
        sound = wave(samples)
        cuts = np.cumsum([sizes[i % len(sizes)] for i in range(samples)])
        pieces = [piece for piece in np.split(sound, cuts[cuts < samples]) if len(piece)]
        stream = LogMels(front_end, iter(pieces), 16)
        stream.read(10**9)
        assert (stream.ended, stream.frames) == (True, front_end.frames_for(samples))
        stream.fill(frames)
        filled = front_end.pad(torch.from_numpy(sound), front_end.samples_for(frames))
        logmel = front_end.pad_frames(front_end.fbank(filled[None])[0], frames)
        want = front_end.normalise(logmel)[:frames]
        assert torch.equal(stream.take(0, frames), want)
        assert torch.equal(stream.take(frames // 2, frames - frames // 2), want[frames // 2 :])
        stream.drop(frames // 2)
        assert torch.equal(stream.take(frames - 1, 1), want[-1:])


@pytest.mark.parametrize("columns", [0.2, 6, 9, 9.499, 9.5, 10, 10.4, 16.5, 24, 31])
@pytest.mark.parametrize("batch", [1, 3])
def test_streamed_it_is_as_in_memory(columns: float, batch: int) -> None:
    m, sound = model(), wave(240 + int(columns * COLUMN))
    for hop in (None, 0.02):
        whole = m.embed(sound, hop=hop)
        pieces = list(m.stream(sound, hop=hop, patches=True, batch=batch))
        assert len(pieces) > 1 or columns < 24 or batch > 1
        for name in ("frames", "patches", "times"):
            torch.testing.assert_close(
                torch.cat([getattr(piece, name) for piece in pieces]), getattr(whole, name), atol=1e-6, rtol=1e-6
            )
        lean = list(m.stream(sound, hop=hop, batch=batch))
        assert all(piece.patches is None and piece.frames.shape == (piece.grid[0], 32) for piece in lean)
        assert torch.equal(torch.cat([piece.frames for piece in lean]), torch.cat([piece.frames for piece in pieces]))
        close(m.embed(sound, hop=hop, patches=False), Embedding(**{**vars(whole), "patches": None}))


def test_files_bytes_arrays_and_tensors_are_one_sound(tmp_path: Path) -> None:
    m, path = model(), tmp_path / "a.wav"
    both = np.stack([wave(100_000, 1), wave(100_000, 2)])
    soundfile.write(path, both.T, 44100, subtype="FLOAT")
    content, want = path.read_bytes(), m.embed(soxr.resample(both.mean(0), 44100, 16000, "HQ"))
    for sound in (both, torch.from_numpy(both), both.astype(np.float64)):
        close(m.embed(sound, rate=44100), want, 1e-4)
    assert m.embed(both[0]).grid != want.grid, "without a rate an array is taken at the model's"
    want = m.embed(both, rate=44100)
    for sound in (path, str(path), content, bytearray(content), io.BytesIO(content)):
        close(m.embed(sound), want, 1e-6)
        sound = io.BytesIO(content) if isinstance(sound, io.BytesIO) else sound
        frames = torch.cat([piece.frames for piece in m.stream(sound, batch=2)])
        torch.testing.assert_close(frames, want.frames, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("hop", "shift"), [(0.04, 4), (0.02, 2), (0.01, 1), (0.08, 8)])
@pytest.mark.parametrize("columns", [1, 5.3, 9, 21.75])
def test_finer_frames_are_those_of_the_sound_begun_later(hop: float, shift: int, columns: float) -> None:
    m, sound = model(), wave(240 + int(columns * COLUMN))
    found = m.embed(sound, hop=hop)
    passes = 8 // shift
    torch.testing.assert_close(found.times, 0.0475 + hop * torch.arange(found.grid[0]), atol=1e-6, rtol=1e-6)
    whole = m.front_end.frames_for(len(sound))
    assert found.grid == (sum(max(k == 0, int((whole - k * shift - 8) / 8 + 1.5)) for k in range(passes)), 4)
    for k in range(min(passes, found.grid[0])):
        later = m.embed(sound[k * shift * 160 :])
        torch.testing.assert_close(found.frames[k::passes], later.frames, atol=1e-5, rtol=1e-5)
        assert found.patches is not None
        assert later.patches is not None
        patches = found.patches.unflatten(0, found.grid)[k::passes]
        torch.testing.assert_close(patches.flatten(0, 1), later.patches, atol=1e-5, rtol=1e-5)


def test_a_hop_that_does_not_divide_the_column() -> None:
    m = model()
    for hop, text in ((0.03, "0.02 or 0.04"), (0.16, "0.04 or 0.08"), (0.005, "0.01 or 0.02"), (-1.0, "0.01 or 0.02")):
        with pytest.raises(ConfigError, match=rf"a hop of {hop:g} s, .* every 0\.08 s(.|\n)*use {text}"):
            m.embed(wave(9000), hop=hop)


@pytest.mark.parametrize("samples", [1, 160, 1600])
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_the_shortest_sounds(samples: int, padding: str) -> None:
    m = model(padding)
    out = m.embed(wave(samples))
    assert out.grid[0] == 1
    assert out.frames.isfinite().all()
    fine = m.embed(wave(samples), hop=0.01)
    assert fine.grid[0] == 1 + sum(int((m.front_end.frames_for(samples) - k - 8) / 8 + 1.5) > 0 for k in range(1, 8))


LENGTHS = (1, 5000, 5200, 7900, 9000, 9001, 15_000, 29_000)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 0.05)])
def test_neighbours_do_not_matter_even_poisoned(
    precision: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    m = model()
    sounds = [wave(n, i) for i, n in enumerate(LENGTHS)]
    alone = [m.embed(sound, precision=precision) for sound in sounds]
    monkeypatch.setattr(embedding, "WASTE", float("inf"))  # as on a GPU: all that are shorter than a view together
    zeros = torch.zeros

    def poison(*shape: Any, **kind: Any) -> Tensor:
        return zeros(*shape, **kind).fill_(float("nan")) if len(shape) == 4 else zeros(*shape, **kind)

    monkeypatch.setattr(torch, "zeros", poison)
    for batch in (1, 2, 3, 64):
        for one, together in zip(alone, m.embed_batch(sounds, precision=precision, batch=batch), strict=True):
            close(one, together, tolerance)
    for one, together in zip(alone[::-1], m.embed_batch(sounds[::-1], precision=precision), strict=True):
        close(one, together, tolerance)


def test_parts_are_those_of_any_threads_and_batches() -> None:
    m = model(distilled=True)
    sounds = [wave(n, i) for i, n in enumerate(LENGTHS)]
    want = m.embed_batch(sounds, hop=0.04)
    embedder = m.embedder(hop=0.04)
    with ThreadPoolExecutor(4) as pool:
        windows = list(pool.map(lambda sound: list(embedder.windows(sound)), sounds))
    flat = [(i, window) for i, of_sound in enumerate(windows) for window in of_sound]
    parts: list[list[Any]] = [[] for _ in sounds]
    for first in range(0, len(flat), 5):
        few = flat[first : first + 5]
        for (owner, _), part in zip(few, embedder.run([window for _, window in few]), strict=True):
            parts[owner].append(part)
    for one, of_sound in zip(want, parts, strict=True):
        close(embedder.join(of_sound), one, 1e-5)
    assert embedder.run([]) == []


def test_a_part_of_a_sound_and_its_times(tmp_path: Path) -> None:
    m, sound = model(), wave(60_000)
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    want = m.embed(sound[16000:48000])
    embedder = m.embedder()
    close(embedder.join(embedder.run(list(embedder.windows(tmp_path / "a.wav", start=1.0, seconds=2.0)))), want)
    pieces = list(m.stream(tmp_path / "a.wav", start=1.0, seconds=2.0, batch=1))
    torch.testing.assert_close(torch.cat([piece.times for piece in pieces]), want.times)
    torch.testing.assert_close(torch.cat([piece.frames for piece in pieces]), want.frames, atol=1e-6, rtol=1e-6)


def test_a_long_sound_is_held_in_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    m, taken = model(), 0
    view = m.front_end.samples_for(FRAMES)

    def blocks() -> Iterator[np.ndarray]:
        nonlocal taken
        for i in range(10**6):
            taken += 4000
            yield wave(4000, i % 7)

    @contextmanager
    def endless(*_: object) -> Iterator[Any]:
        yield SimpleNamespace(blocks=blocks)

    held = []
    real = LogMels.take
    monkeypatch.setattr(LogMels, "take", lambda self, *at: (held.append(sum(map(len, self._made))), real(self, *at))[1])
    monkeypatch.setattr(batching, "open_sound", endless)
    given = 0
    for i, piece in enumerate(m.stream("endless", batch=2)):
        given += len(piece.frames) * COLUMN
        # What goes through the front end at once, and the windows of a batch and one ahead.
        assert taken <= given + 600 * 160 + 4 * view
        if i == 40:
            break
    assert given > 300_000
    assert max(held) < 1100, "two blocks of the front end"


def test_a_fault_in_the_middle_is_raised_after_what_came_before(tmp_path: Path) -> None:
    sound = wave(400_000)
    sound[390_000] = np.nan
    soundfile.write(tmp_path / "a.wav", sound, 16000, subtype="FLOAT")
    stream = model().stream(tmp_path / "a.wav", batch=2)
    assert len(next(stream).frames) > 0
    with pytest.raises(AudioError, match=r"a\.wav .* NaN or infinite"):
        list(stream)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    m, sound = model(), wave(30_000)
    plain, low = m.embed(sound, precision="float32"), m.embed(sound, precision="bf16")
    assert not torch.equal(plain.clip, low.clip)
    assert torch.nn.functional.cosine_similarity(plain.clip, low.clip, dim=0) > 0.999
    for name, want in (("float32", plain), ("bf16", low)):
        chosen = runtime.Precision(name, "measured")
        monkeypatch.setattr(runtime, "best_precision", lambda device, it=chosen: it)
        assert m.precision is chosen
        assert torch.equal(m.embed(sound).frames, want.frames)
    with pytest.raises(ConfigError, match=r"precision 'int4'(.|\n)*auto, float32 or bf16"):
        m.embed(sound, precision="int4")  # type: ignore[arg-type]


def test_float32_is_float32_whatever_surrounds_it() -> None:
    m, sound = model(), wave(30_000)
    want, looked = m.embed(sound, precision="float32"), m.attention(sound).map
    with torch.autocast("cpu", torch.bfloat16):
        close(m.embed(sound, precision="float32"), want, 0.0)
        assert torch.equal(m.attention(sound).map, looked)


def test_a_model_used_and_then_trained_uses_its_new_weights() -> None:
    m, sound = model(), wave(30_000)
    before = m.embed(sound, precision="bf16").clip
    m.encoder.train().requires_grad_(True)
    x = torch.randn(2, 1, FRAMES, 32, generator=torch.Generator().manual_seed(0))
    step = torch.optim.SGD(m.encoder.parameters(), lr=0.05)
    for _ in range(2):
        step.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            m.encoder(x).cls.square().mean().backward()
        step.step()
    m.encoder.eval().requires_grad_(False)
    other = AudioModel.from_parts(m.encoder, m.front_end.settings, TINY, FRAMES)
    after = m.embed(sound, precision="bf16").clip
    assert torch.equal(after, other.embed(sound, precision="bf16").clip)
    assert not torch.allclose(after, before, atol=1e-3)


def test_threads_that_share_a_model_get_what_one_alone_gets() -> None:
    m = model()
    sounds = [wave(240 + int(c * COLUMN), i) for i, c in enumerate((0.5, 3, 6, 7, 8, 9, 14, 7.2) * 3)]
    want = [m.embed(sound, precision="bf16") for sound in sounds]
    for layer in m.encoder.modules():
        layer.__dict__.pop("_low", None)
    m.encoder._resized = {}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda sound: m.embed(sound, precision="bf16"), sounds))
    for one, other in zip(found, want, strict=True):
        close(one, other, 0.0)


def test_made_and_used_in_inference_mode(tmp_path: Path) -> None:
    sound = wave(240 + 8 * COLUMN)
    model().save(tmp_path / "m")
    with torch.inference_mode():
        m = AudioModel.load(tmp_path / "m")
        for precision in ("float32", "bf16"):
            m.embed(sound, precision=precision)  # type: ignore[arg-type]
    assert m.encoder.blocks[0].mlp.fc1._low is not None, "its weights are kept in bf16 too"
    weight = torch.ones(32, requires_grad=True)
    (m.embed(sound).frames @ weight).sum().backward()
    assert weight.grad is not None


def test_whatever_the_default_device_is(tmp_path: Path) -> None:
    """Meta stands for a GPU: what is made without a device would be there, and could not meet what is on the CPU."""
    for padding in ("silence", "zero", "repeat"):
        m = model(padding)
        want = m.embed_batch([wave(n, i) for i, n in enumerate(LENGTHS)], hop=0.04)
        looked = m.attention(wave(30_000)).map
        m.save(tmp_path / padding)
        with torch.device("meta"):
            m = AudioModel.load(tmp_path / padding)
            found = m.embed_batch([wave(n, i) for i, n in enumerate(LENGTHS)], hop=0.04)
            assert torch.equal(m.attention(wave(30_000)).map, looked)
        for one, other in zip(found, want, strict=True):
            close(one, other, 0.0)


def test_on_another_device_nothing_is_made_on_the_cpu() -> None:
    """A device that only shapes are computed for refuses to meet another one, as a GPU does."""
    m = model(distilled=True)
    windows = [Window(torch.zeros(8 * n, 32), n, 0, 0, 0, 0) for n in (1, 3, 6, 9, 6, 8)]
    encoder = m.encoder.to("meta")
    seen = []
    encoder.register_forward_hook(lambda _, given, out: seen.append((given[0].device.type, out.patches.shape)))
    away = WindowEmbedder(encoder, m.front_end, None, "float32", 4)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        away.run(windows)
    assert seen == [("meta", (4, 24, 32))], "all that are shorter than a view go together; then the results are fetched"


@pytest.mark.parametrize("batch", [0, -1, 2.5, None])
def test_invalid_batches(batch: Any) -> None:
    m, sound = model(), wave(9000)
    for ask in (lambda: m.embed_batch([sound], batch=batch), lambda: list(m.stream(sound, batch=batch))):
        with pytest.raises(ConfigError, match=r"batch (0|-1|2\.5|None)(.|\n)*from 1 on"):
            ask()


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"device '{device}'(.|\n)*one of .*cpu"):
        model().to(device)


def test_layers_and_a_second_token() -> None:
    m, sound = model(distilled=True), wave(240 + 14 * COLUMN)
    assert m.embed(sound).class_token.shape == (32,)
    first = torch.cat([piece.frames for piece in m.stream(sound, layer=0, batch=1)])
    torch.testing.assert_close(first, m.embed(sound, layer=0).frames, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(first, m.embed(sound).frames)
    with pytest.raises(ConfigError, match="layer -3 of an encoder of 2 blocks"):
        next(m.stream(sound, layer=-3))


def test_one_column_views() -> None:
    encoder = Encoder(TINY, 8, 32)
    m = AudioModel(encoder, FrontEnd(FrontEndSettings(mels=32, mean=-6.0, std=3.0)))
    sound = wave(240 + 5 * COLUMN)
    out = m.embed(sound)
    alone = [m.embed(sound[k * COLUMN : k * COLUMN + 240 + COLUMN]).frames for k in range(5)]
    torch.testing.assert_close(out.frames, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same() -> None:
    m = model(distilled=True)
    sounds = [wave(n, i) for i, n in enumerate(LENGTHS)]
    want = m.embed_batch(sounds, hop=0.04)
    looked = m.attention(sounds[-1])
    m.to("cuda")
    for one, there in zip(want, m.embed_batch(sounds, hop=0.04), strict=True):
        close(one, there, 1e-3)
    torch.testing.assert_close(m.attention(sounds[-1]).map, looked.map, atol=1e-3, rtol=1e-3)
