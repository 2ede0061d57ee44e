"""The saved model: embeddings, independence of the batch, windows, and errors for wrong cards and sounds."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from asit import cli
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import AudioError, CheckpointError, ConfigError
from asit.io import checkpoint
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

from .conftest import COLUMN, FRAMES, close, make_model, wave  # type: ignore[import-not-found]

ENCODER = EncoderSettings(size="custom", width=24, depth=3, heads=3, patch_frames=8, patch_mels=8)


def model(**front_end: Any) -> AudioModel:
    made: AudioModel = make_model(ENCODER, **front_end)
    return made


def by_hand(m: AudioModel, samples: np.ndarray) -> tuple[Tensor, Tensor]:
    """Class token and patches of one clip as long as the training view, without `embed`."""
    need = m.front_end.samples_for(FRAMES)
    x = m.front_end.fbank(torch.from_numpy(samples[:need])[None])
    with torch.no_grad():
        tokens = m.encoder(((x - -6.0) / (2 * 3.0))[:, None])
    return tokens.cls[0], tokens.patches[0]


def test_a_clip_as_long_as_the_view_is_the_encoders_output() -> None:
    m = model()
    out = m.embed(wave(9600)[: m.front_end.samples_for(FRAMES)])
    cls, patches = by_hand(m, wave(9600))
    assert out.grid == (6, 4)
    torch.testing.assert_close(out.patches, patches)
    torch.testing.assert_close(out.class_token, cls)
    torch.testing.assert_close(out.clip, patches.mean(0))
    assert out.clip.dtype == torch.float32


@pytest.mark.parametrize(
    ("samples", "columns"),
    [
        *((1, 1), (399, 1), (400, 1), (240 + COLUMN, 1), (240 + COLUMN + 639, 1), (240 + COLUMN + 640, 2)),
        *((240 + 6 * COLUMN, 6), (240 + 6 * COLUMN + 320, 6)),
        *((240 + n * COLUMN, n) for n in (7, 12, 20)),
    ],
)
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_columns_follow_the_length(samples: int, columns: int, padding: str) -> None:
    out = model(padding=padding).embed(wave(32000)[:samples])
    assert out.grid == (columns, 4)
    assert out.patches.shape == (columns * 4, 24)
    assert out.times.shape == (columns,)
    assert all(value.isfinite().all() for value in (out.clip, out.patches, out.class_token))


def test_the_last_columns_are_filled_by_the_cards_rule() -> None:
    samples = wave(32000)[: 240 + 3 * COLUMN + 1000]
    need = 240 + 4 * COLUMN
    silence, repeat, zero = (model(padding=rule) for rule in ("silence", "repeat", "zero"))
    padded = np.pad(samples, (0, need - len(samples)))
    close(silence.embed(samples), silence.embed(padded))
    repeated = np.concatenate([samples, samples])[:need]
    close(repeat.embed(samples), repeat.embed(repeated))
    frames = zero.front_end.frames_for(len(samples))
    logmel = torch.zeros(1, 32, 32)
    logmel[:, :frames] = zero.front_end.fbank(torch.from_numpy(samples)[None])
    with torch.no_grad():
        want = zero.encoder(((logmel + 6.0) / 6.0)[:, None], stretch=False)
    torch.testing.assert_close(zero.embed(samples).patches, want.patches[0], atol=1e-5, rtol=1e-5)


def overlapping() -> AudioModel:
    """Patches of 8 frames, every 5: a view of 48 frames has 9 columns."""
    made: AudioModel = make_model(ENCODER.model_copy(update={"patch_stride_frames": 5, "patch_stride_mels": 6}))
    return made


@pytest.mark.parametrize(
    ("frames", "columns"),
    [(1, 1), (8, 1), (10, 1), (11, 2), (13, 2), (15, 2), (16, 3), (48, 9), (68, 13), (73, 14), (108, 21)],
)
def test_columns_of_overlapping_patches(frames: int, columns: int, tmp_path: Path) -> None:
    m = overlapping()
    m.save(tmp_path / "m")
    m = AudioModel.load(tmp_path / "m")
    assert (m.frames, m.encoder.grid) == (FRAMES, (9, 5))
    samples = wave(32000)[: m.front_end.samples_for(frames)]
    out = m.embed(samples)
    assert out.grid == (columns, 5)
    torch.testing.assert_close(out.times, 0.0475 + 0.05 * torch.arange(columns))
    need = m.front_end.samples_for(3 + 5 * columns)
    padded = np.pad(samples, (0, max(0, need - len(samples))))[:need]
    with torch.no_grad():
        x = m.front_end(torch.from_numpy(padded)[None])
        if columns <= 9:
            want = m.encoder(x, stretch=False).patches[0]
        elif columns <= 13:
            want = m.encoder(x).patches[0]
        else:  # windows of 9 columns, 2 of which overlap with the next, the last one moved back
            want = blended(m, x, 9, 2, columns)
    torch.testing.assert_close(out.patches, want, atol=1e-5, rtol=1e-5)


def test_neighbours_of_overlapping_patches_do_not_matter() -> None:
    m = overlapping()
    sounds = [wave(int(16000 * s), i) for i, s in enumerate((0.3, 0.01, 0.5, 1.7, 0.12, 0.6))]
    for a, b in zip([m.embed(sound) for sound in sounds], m.embed_batch(sounds, batch=4), strict=True):
        close(a, b)


def blended(m: AudioModel, x: Tensor, view: int, overlap: int, columns: int) -> Tensor:
    """Patches (P, D) of a long spectrogram (1, 1, T, F), column by column, by what the documentation says."""
    hop, step, mel = view - overlap, m.encoder.stride[0], m.encoder.grid[1]
    out = torch.zeros(columns, mel, m.encoder.width)
    begin = 0
    while True:
        last = begin + view >= columns
        at = columns - view if last else begin
        with torch.no_grad():
            window = m.encoder(x[:, :, step * at : step * at + m.encoder.span(view)]).patches[0].unflatten(0, (-1, mel))
        for column in range(begin, at + view):
            weight = (column - begin + 1) / (overlap + 1) if begin and column < begin + overlap else 1.0
            out[column] = (1 - weight) * out[column] + weight * window[column - at]
        if last:
            return out.flatten(0, 1)
        begin += hop


@pytest.mark.parametrize("columns", [10, 11, 12, 15, 16, 17])
def test_a_long_clip_is_windows_that_overlap_by_a_quarter_and_the_last_one_moved_back(columns: int) -> None:
    m = model()
    samples = wave(32000)[: 240 + columns * COLUMN]
    out = m.embed(samples)
    x = m.front_end(torch.from_numpy(samples)[None])
    torch.testing.assert_close(out.patches, blended(m, x, 6, 1, columns), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.clip, out.patches.mean(0), atol=1e-6, rtol=1e-6)
    # Away from the overlaps a column is that of its window alone; the class tokens count by the columns each adds.
    starts = [*range(0, columns - 6, 5), columns - 6]
    alone = [by_hand(m, samples[start * COLUMN :]) for start in starts]
    torch.testing.assert_close(out.patches[: 5 * 4], alone[0][1][: 5 * 4], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.patches[-4:], alone[-1][1][-4:], atol=1e-5, rtol=1e-5)
    fresh = np.diff([0, *(start + 6 for start in starts)])
    tokens = sum(float(count) * cls for count, (cls, _) in zip(fresh, alone, strict=True)) / columns
    torch.testing.assert_close(out.class_token, tokens, atol=1e-5, rtol=1e-5)


def test_a_clip_half_as_long_again_is_seen_whole_whatever_its_neighbours() -> None:
    m = model()
    lengths = [3 * COLUMN, 6 * COLUMN, 8 * COLUMN, 9 * COLUMN, 8 * COLUMN, 10 * COLUMN, 21 * COLUMN]
    sounds = [wave(64000, seed=i)[: n + 240] for i, n in enumerate(lengths)]
    alone = m.embed(sounds[2])
    with torch.no_grad():
        whole = m.encoder(m.front_end(torch.from_numpy(sounds[2][: m.front_end.samples_for(64)])[None]))
    torch.testing.assert_close(alone.patches, whole.patches[0])
    torch.testing.assert_close(alone.class_token, whole.cls[0])
    for one, together in zip([m.embed(s) for s in sounds], m.embed_batch(sounds, batch=3), strict=True):
        close(one, together)
    assert [m.embed(s).grid[0] for s in sounds] == [3, 6, 8, 9, 8, 10, 21]


def test_results_can_be_trained_on() -> None:
    m = model()
    out = m.embed(wave(16000))
    weight = torch.ones(24, requires_grad=True)
    ((out.clip * weight).sum() + (out.patches @ weight).sum() + (out.class_token * weight).sum()).backward()
    assert weight.grad is not None
    assert not any(p.requires_grad for p in m.encoder.parameters())


def test_a_layer_is_passed_on() -> None:
    m, sound = model(), wave(8080)
    with torch.no_grad():
        want = m.encoder(m.front_end(torch.from_numpy(sound)[None])[:, :, :FRAMES], layer=0)
    torch.testing.assert_close(m.embed(sound, layer=0).patches, want.patches[0], atol=1e-5, rtol=1e-5)
    first, last, both = m.embed(sound, layer=0), m.embed(sound), m.embed(sound, layer=[-1, 0])
    for name in ("clip", "frames", "patches", "class_token"):
        torch.testing.assert_close(getattr(both, name), torch.cat([getattr(last, name), getattr(first, name)], -1))
    for wrong in (9, [0, 9]):
        with pytest.raises(ConfigError, match="layer 9"):
            m.embed(sound, layer=wrong)
    with pytest.raises(ConfigError, match="no layer is given"):
        m.embed(sound, layer=[])


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    m, sound = model(padding="repeat"), wave(14400)
    before = torch.get_rng_state()
    m.save(tmp_path / "m")
    loaded = AudioModel.load(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())
    close(loaded.embed(sound), m.embed(sound), 0.0)
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["kind"] == "audio-encoder"
    assert card["front_end"] == m.front_end.settings.model_dump(mode="json")
    assert (card["front_end"]["mean"], card["front_end"]["std"]) == (-6.0, 3.0)
    assert (card["frames"], card["grid"], card["axes"], card["padding"]) == (48, [6, 4], "(time, mel)", "repeat")
    assert card["training"] == {"steps": 7}
    assert loaded.card == m.card
    with pytest.raises(CheckpointError, match="already exists"):
        m.save(tmp_path / "m")
    m.save(tmp_path / "m", overwrite=True)


def test_from_parts_keeps_its_own_weights() -> None:
    encoder = Encoder(ENCODER, FRAMES, 32).train()
    settings = FrontEndSettings(mels=32, mean=0.0, std=1.0)
    m = AudioModel.from_parts(encoder, settings, ENCODER, FRAMES)
    first = m.embed(wave(8000)).clip
    with torch.no_grad():
        encoder.pos_embed.add_(1.0)
        encoder.norm.bias.add_(1.0)
    assert torch.equal(m.embed(wave(8000)).clip, first)
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())
    with pytest.raises(CheckpointError, match=r"the given encoder does not fit the Encoder: .*another shape"):
        AudioModel.from_parts(encoder, settings, ENCODER, 2 * FRAMES)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "other"}, "says kind 'other'"),
        ({"axes": "(mel, time)"}, r"axes '\(mel, time\)'"),
        ({"frames": 56}, r"pos_embed \(1, 25, 24\) instead of \(1, 29, 24\)"),
        ({"grid": [7, 4]}, r"grid \[7, 4\], and 48 frames make \[6, 4\]"),
        ({"frames": 50}, "use 48 or 56 frames"),
        ({"encoder": {"size": "tiny", "colour": 1}}, "colour"),
        ({"encoder": {**ENCODER.model_dump(), "depth": 2}}, r"8 unexpected|12 unexpected"),
        ({"encoder": {**ENCODER.model_dump(), "depth": 10**9}}, r"1000000000 blocks, and weights of 42 tensors"),
        ({"encoder": {**ENCODER.model_dump(), "width": 24 * 10**6}}, "of another shape"),
        ({"encoder": {**ENCODER.model_dump(), "mlp_ratio": -1.0}}, "cannot be used"),
        ({"frames": 8 * 10**12}, "of another shape .*pos_embed"),
        ({"front_end": {"mels": 32, "mean": 0.0, "std": 1.0, "rate": 10**9}}, "rate 1000000000 with window_ms 25"),
        ({"front_end": {"mels": 32, "mean": math.nan, "std": 1.0}}, "mean: input should be a finite number, found nan"),
        ({"front_end": {"mels": 32 * 10**7, "mean": 0.0, "std": 1.0}}, "of another shape .*pos_embed"),
        ({"front_end": {"mels": 32, "mean": 0.0, "std": 1.0, "shift_ms": 2.0**63}}, "shift_ms: .* less than"),
        ({"training": [1, 2]}, "training: list instead of facts"),
        ({"front_end": {"mels": 32}}, "front_end.mean is auto"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    m = model()
    m.save(tmp_path / "m")
    path = tmp_path / "m" / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises((CheckpointError, ConfigError), match=text):
        AudioModel.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("norm.bias", math.nan, r"1 tensors with numbers that are not finite \(norm\.bias\)"),
        ("blocks.0.mlp.fc1.weight", math.inf, r"not finite \(blocks\.0\.mlp\.fc1\.weight\)"),
        ("pos_embed", 1e300, r"not finite \(pos_embed\)"),  # of float64, beyond float32
        ("cls_token", 3, r"no plain floating-point numbers \(cls_token of torch\.int64\)"),
        ("cls_token", 1j, r"no plain floating-point numbers \(cls_token of torch\.complex64\)"),
        ("cls_token", True, r"no plain floating-point numbers \(cls_token of torch\.bool\)"),
    ],
)
def test_weights_that_no_training_gives_are_refused_though_their_hash_is_right(
    tmp_path: Path, name: str, value: Any, text: str
) -> None:
    m = model()
    state = m.encoder.state_dict()
    kind = torch.float64 if value == 1e300 else None
    bad = state[name].to(kind) if kind else state[name].clone() if isinstance(value, float) else torch.full_like(
        state[name], value, dtype=torch.tensor(value).dtype)  # fmt: skip
    bad.view(-1)[-1] = value
    checkpoint.save_model(tmp_path / "m", {**state, name: bad}, m.card)
    with pytest.raises(CheckpointError, match=text):
        AudioModel.load(tmp_path / "m")


@pytest.mark.slow
def test_every_verb_refuses_weights_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m, text = model(), r"1 tensors with numbers that are not finite \(norm\.bias\)"
    state = m.encoder.state_dict()
    checkpoint.save_model(tmp_path / "m", {**state, "norm.bias": state["norm.bias"] * math.nan}, m.card)
    clip, out, place = str(tmp_path / "c.wav"), str(tmp_path / "out"), str(tmp_path / "m")
    (tmp_path / "t.csv").write_text("path,label,split\n" + "c.wav,a,train\n")
    soundfile.write(clip, wave(8000), 16000)
    for given in (
        ["info", place],
        ["embed", place, clip, "--out", out + ".npz"],
        ["tag", place, clip],
        ["index", place, clip, "--out", out],
        ["export", place, "--to", "torch", "--out", out + ".pt2"],
        ["serve", place, "--port", "0"],
        ["evaluate", place, "--data", str(tmp_path / "t.csv")],
        ["finetune", "--model", place, "--data", str(tmp_path / "t.csv"), "--out", out],
    ):
        assert cli.main(given) == 2, given
        error = capsys.readouterr().err
        assert re.search(text, error), (given, error)
        assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.wav", "m", "t.csv"]


@pytest.mark.parametrize(
    ("sound", "text"),
    [
        (np.zeros(0, np.float32), r"shape \(0,\) is empty"),
        (np.zeros((2, 0), np.float32), "is not a clip|is empty"),
        (np.array([0.0, np.nan, np.inf], np.float32), "2 samples that are not finite"),
        (np.zeros(100, np.int16), r"holds int16(.|\n)*32768"),
        (np.zeros((1000, 2), np.float32), r"\(1000, 2\) is not a clip(.|\n)*transpose it"),
        (np.zeros((1, 2, 1000), np.float32), "is not a clip"),
        (torch.full((50,), torch.nan), "50 samples that are not finite"),
        ([0.0, 1.0], "a list"),
    ],
)
def test_sounds_that_cannot_be_embedded(sound: Any, text: str) -> None:
    with pytest.raises(AudioError, match=text):
        model().embed(sound)


def test_a_missing_file_and_a_forgotten_list(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"nothing\.wav"):
        model().embed(tmp_path / "nothing.wav")
    with pytest.raises(AudioError, match="a list of sounds"):
        model().embed_batch(wave(1600))  # type: ignore[arg-type]


def test_parts_that_do_not_go_together() -> None:
    encoder = Encoder(ENCODER, FRAMES, 32)
    with pytest.raises(ConfigError, match=r"front_end\.mean is auto"):
        AudioModel(encoder, FrontEnd(FrontEndSettings(mels=32)))
    with pytest.raises(ConfigError, match="64 mel bins, an encoder of 32"):
        AudioModel(encoder, FrontEnd(FrontEndSettings(mels=64, mean=0.0, std=1.0)))
