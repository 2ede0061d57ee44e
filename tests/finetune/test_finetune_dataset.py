"""Labelled samples: augmentation of waveforms and targets, as pure functions of seed, epoch, index and position."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit.config import AugmentSettings, FinetuneSettings, FrontEndSettings, NetworkSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import read_labels
from asit.data.loading import crops
from asit.data.loading.sampler import MATERIAL
from asit.data.loading.waveforms import WaveformReader
from asit.errors import CatalogueError
from asit.finetune.finetune_dataset import DeviceInputs, FinetuneDataset, FinetuneSample, collate

RATE = 8000
FRAMES = 40
LENGTHS = (0.9, 0.2, 0.42, 0.3, 0.005, 1.3)
ALL = AugmentSettings(
    mixup=0.5,
    mixup_probability=0.7,
    roll_seconds=0.05,
    gain_db=3.0,
    noise=0.2,
    stretch=0.2,
    mel_warp=0.1,
    mel_mask=6,
    time_mask=8,
    masks=2,
)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """Six clips of several lengths, one shorter than a window of the front end; the fourth's labels are soft."""
    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    clips = []
    for i, (seconds, label) in enumerate(zip(LENGTHS, ("a", "b", "c", "a:0.25;b:0.5", "b", "c"), strict=True)):
        wave = 0.3 + 0.2 * rng.standard_normal(round(RATE * seconds))  # an offset, of which mixup frees it
        soundfile.write(folder / f"{i}.wav", wave, RATE, subtype="FLOAT")
        clips.append(Clip(str(folder / f"{i}.wav"), seconds, RATE, 1, label))
    return Catalogue.from_clips(clips)


def made(listed: Catalogue, changes: AugmentSettings | None = None, seed: int = 7, **over: Any) -> FinetuneDataset:
    settings = FinetuneSettings(
        seed=seed,
        front_end=FrontEndSettings(rate=RATE, mels=32, mean=-6.0, std=3.0, **over),
        augment=changes or AugmentSettings(),
        network=NetworkSettings(dropout=0.5),
    )
    return FinetuneDataset(listed, np.array([5, 1, 2, 3, 4, 0]), read_labels(listed), settings, FRAMES)


def same(a: FinetuneSample, b: FinetuneSample) -> bool:
    arrays = [(np.asarray(getattr(a, n)), np.asarray(getattr(b, n))) for n in ("x", "target", "factors", "dropout")]
    return a.name == b.name and all(np.array_equal(left, right) for left, right in arrays)


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_plain_clips_are_cut_and_padded(padding: Any, listed: Catalogue) -> None:
    clips = made(listed, padding=padding)
    front_end, samples = clips.front_end, clips.front_end.samples_for(FRAMES)
    for index, row in ((1, 1), (3, 3), (4, 4)):
        wave = torch.from_numpy(soundfile.read(listed[row].path, dtype="float32")[0])
        want = front_end.pad_frames(front_end.fbank(front_end.pad(wave, samples)[None])[0], FRAMES)
        sample = clips[0, index]
        assert sample.x.shape == (FRAMES, 32)
        torch.testing.assert_close(sample.x, front_end.normalise(want))
        assert sample.target.tolist() == read_labels(listed).matrix([row])[0].tolist()
    begins = set()
    whole = soundfile.read(listed[5].path, dtype="float32")[0]
    for epoch in range(4):  # a long clip: a random part, drawn from (seed, epoch, index)
        begin = (listed[5].seconds - samples / RATE) * np.random.default_rng([7, MATERIAL, epoch, 0, 0]).random(4)[3]
        first = round(begin * RATE)
        want = front_end.normalise(front_end.fbank(torch.from_numpy(whole[first : first + samples])[None])[0])
        torch.testing.assert_close(clips[epoch, 0].x, want, rtol=1e-3, atol=1e-3)
        begins.add(first)
    assert len(begins) == 4


def test_mixup_weighs_waves_and_targets_alike(listed: Catalogue) -> None:
    """The draws are made again from the key; the mix is by hand."""
    clips = made(listed, AugmentSettings(mixup=2.0, mixup_probability=1.0))
    front_end, samples = clips.front_end, clips.front_end.samples_for(FRAMES)
    labels, partners, heavy = read_labels(listed).matrix(np.arange(6)), set(), []
    for epoch in range(12):
        for index in (1, 3):  # shorter than the input: always whole
            rng = np.random.default_rng([7, MATERIAL, epoch, index, 0])
            rng.uniform(-1.0, 1.0, 3)
            rng.random()  # place of the cut
            rng.random()  # whether
            other = int(rng.integers(6))
            weight = rng.beta(2.0, 2.0)
            row, theirs = int(clips.rows[index]), int(clips.rows[other])
            sample = clips[epoch, index]
            np.testing.assert_allclose(sample.target, weight * labels[row] + (1 - weight) * labels[theirs], atol=1e-6)
            partners.add(theirs)
            heavy.append(weight)
            if LENGTHS[theirs] * RATE < samples:
                waves = []
                for at in (row, theirs):
                    wave = np.zeros(samples)
                    read = soundfile.read(listed[at].path)[0]
                    wave[: len(read)] = read
                    waves.append(wave - wave.mean())
                mixed = torch.from_numpy(weight * waves[0] + (1 - weight) * waves[1]).float()
                want = front_end.normalise(front_end.fbank(mixed[None])[0])
                torch.testing.assert_close(sample.x, want, rtol=1e-3, atol=2e-3)
    assert len(partners) >= 4
    assert min(heavy) < 0.4 < 0.6 < max(heavy)


def test_mixup_of_clips_of_other_lengths_fills_the_input(listed: Catalogue) -> None:
    for padding in ("silence", "zero", "repeat"):
        clips = made(listed, AugmentSettings(mixup=1.0, mixup_probability=1.0, stretch=0.3), padding=padding)
        for epoch in range(4):
            for index in range(6):
                sample = clips[epoch, index]
                assert sample.x.shape == (FRAMES, 32)
                assert sample.x.isfinite().all()


def test_how_often_clips_are_mixed(listed: Catalogue) -> None:
    clips = made(listed, AugmentSettings(mixup=1.0, mixup_probability=0.3))
    mixed = [float(clips[epoch, 1].target.max()) < 1.0 for epoch in range(300)]
    assert 0.15 < np.mean(mixed) < 0.35  # less than 0.3: two clips may be of one class
    assert not any(float(made(listed)[epoch, 1].target.max()) < 1.0 for epoch in range(20))


def test_samples_are_pure_functions_of_their_key(listed: Catalogue, no_global_draws: None) -> None:
    clips, again = made(listed, ALL), made(listed, ALL)
    keys = [(epoch, index, place) for epoch in range(2) for index in range(6) for place in (0, 9)]
    first = {key: clips[key] for key in keys}
    for key in reversed(keys):
        assert same(first[key], again[key]), key
        assert same(first[key], clips[key]), key
    for i, one in enumerate(keys):  # epoch, index and place all count
        assert not any(torch.equal(first[one].x, first[two].x) for two in keys[:i])
    other = made(listed, ALL, seed=8)
    assert not any(same(first[key], other[key]) for key in keys)
    assert same(pickle.loads(pickle.dumps(clips))[keys[0]], first[keys[0]])


@pytest.mark.parametrize("name", ["roll_seconds", "noise", "gain_db", "mel_warp", "mel_mask", "time_mask", "stretch"])
def test_each_change_alone(name: str, listed: Catalogue) -> None:
    value = {"mel_mask": 10, "time_mask": 15, "gain_db": 6.0, "roll_seconds": 0.1}.get(name, 0.3)
    plain, changed = made(listed), made(listed, AugmentSettings(**{name: value}))
    samples = [(plain[epoch, 2], changed[epoch, 2]) for epoch in range(12)]
    assert all(np.array_equal(a.target, b.target) and a.name == b.name for a, b in samples)
    assert sum(not torch.equal(a.x, b.x) for a, b in samples) >= 9
    if name in ("mel_mask", "time_mask"):
        widths = []
        for a, b in samples:
            wiped = (b.x == 0).all(0 if name == "mel_mask" else 1)
            assert torch.equal(
                a.x[:, ~wiped] if name == "mel_mask" else a.x[~wiped],
                b.x[:, ~wiped] if name == "mel_mask" else b.x[~wiped],
            )
            places = wiped.nonzero().flatten()
            assert len(places) == 0 or int(places[-1] - places[0]) + 1 == len(places)  # one stripe
            widths.append(len(places))
        assert max(widths) <= value
        assert len(set(widths)) > 3
    if name == "noise":
        deviations = [float((b.x - a.x).std()) for a, b in samples]
        assert max(deviations) < 0.32
        assert min(deviations) < 0.1 < 0.2 < max(deviations)
    if name == "gain_db":
        shifts = [float((b.x - a.x).median()) for a, b in samples]
        assert max(map(abs, shifts)) <= 6.0 * np.log(10) / 10 / 6.0 + 1e-3  # dB to nepers, over 2 std
        assert min(shifts) < 0 < max(shifts)


def test_a_rolled_wave_goes_either_way(listed: Catalogue) -> None:
    settings = AugmentSettings(roll_seconds=0.1)
    clips, found = made(listed, settings), []
    samples = clips.front_end.samples_for(FRAMES)
    wave = np.zeros(samples)
    read = soundfile.read(listed[1].path)[0]
    wave[: len(read)] = read
    for epoch in range(10):
        rng = np.random.default_rng([7, MATERIAL, epoch, 1, 0])
        rng.uniform(-1.0, 1.0, 3)
        rng.random()
        shift = int(rng.integers(-800, 801))
        rolled = torch.from_numpy(np.roll(wave, shift)).float()
        want = clips.front_end.normalise(clips.front_end.fbank(rolled[None])[0])
        torch.testing.assert_close(clips[epoch, 1].x, want, rtol=1e-3, atol=1e-3)
        found.append(shift)
    assert min(found) < 0 < max(found)


def test_batches(listed: Catalogue) -> None:
    clips = made(listed, ALL)
    keys = [(0, i, 3 + i) for i in range(4)]
    samples = [clips[key] for key in keys]
    batch = collate(samples)
    assert batch.x.shape == (4, 1, FRAMES, 32)
    assert (batch.target.shape, batch.target.dtype) == ((4, 3), torch.float32)
    assert (batch.factors.shape, batch.dropout.shape) == ((12, 2, 4), (4, 1536))
    for i, sample in enumerate(samples):
        assert torch.equal(batch.x[i, 0], sample.x)
        assert np.array_equal(batch.factors[..., i], sample.factors)
        assert np.array_equal(batch.dropout[i], sample.dropout)
    assert batch.ids == [listed[int(clips.rows[i])].path for i in range(4)]
    assert batch.to(torch.device("cpu")) is batch


def test_another_clip_stands_in_with_its_own_label(listed: Catalogue, tmp_path: Path) -> None:
    each = [listed[i] for i in range(6)]
    lost = Catalogue.from_clips([Clip(str(tmp_path / "gone.wav"), 0.3, RATE, 1, "a"), *each[1:]])
    clips = made(lost)
    labels = read_labels(lost).matrix(np.arange(6))
    for epoch in range(6):
        sample = clips[epoch, 5]
        assert len(sample.failures) >= 1
        assert "gone.wav" in sample.failures[0]
        row = next(i for i in range(6) if lost[i].path == sample.name)
        assert row != 0
        assert sample.target.tolist() == labels[row].tolist()
    nothing = Catalogue.from_clips([Clip(str(tmp_path / f"{i}.wav"), 0.3, RATE, 1, "abc"[i % 3]) for i in range(6)])
    with pytest.raises(CatalogueError, match="eight clips in a row could not be read"):
        made(nothing)[0, 0]


def test_parts_of_one_file_that_begin_together(listed: Catalogue) -> None:
    """Kept in memory, each is as long as itself."""
    waves = WaveformReader(FrontEndSettings(rate=RATE, mels=32))
    path = listed[5].path
    short, long = Clip(path, 0.3, RATE, 1), Clip(path, 0.9, RATE, 1)
    plain = [
        waves.read(short, 0.0, 0.3),
        waves.read(long, 0.0, 0.9),
        waves.read(Clip(path, 0.4, RATE, 1, start=0.5), 0.1, 0.2),
    ]
    waves.keep()
    for _ in range(2):
        kept = [
            waves.read(short, 0.0, 0.3),
            waves.read(long, 0.0, 0.9),
            waves.read(Clip(path, 0.4, RATE, 1, start=0.5), 0.1, 0.2),
        ]
        assert [len(wave) for wave in kept] == [2400, 7200, 1600]
        for a, b in zip(plain, kept, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
@pytest.mark.parametrize("changes", [AugmentSettings(), ALL], ids=["plain", "all"])
@pytest.mark.parametrize("indices", [range(6), (1, 4)], ids=["all clips", "short ones"])
def test_inputs_made_on_the_device_are_those_of_the_loader(
    indices: Any, changes: AugmentSettings, padding: Any, listed: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crops, "_MULTIPLE", 1)
    clips, device = made(listed, changes, padding=padding), torch.device("cpu")
    keys = [(epoch, index) for epoch in range(3) for index in indices]
    expected = collate(clips.__getitems__(keys))  # type: ignore[arg-type]
    clips.on_device = True
    cropped = collate(clips.__getitems__(keys))  # type: ignore[arg-type]
    assert cropped.x.numel() == 0
    settings = FinetuneSettings(front_end=clips.front_end.settings, augment=changes)
    prepare = DeviceInputs(settings, FRAMES, device)
    found = prepare(cropped)
    torch.testing.assert_close(found.x, expected.x, rtol=0.0, atol=2e-4)
    for f in dataclasses.fields(expected):
        if f.name != "x":
            ours, theirs = getattr(found, f.name), getattr(expected, f.name)
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert prepare(found) is found
