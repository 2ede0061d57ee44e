"""The data set of pretraining: samples are pure functions of (seed, epoch, index), and views are crops of the file."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from torch import Tensor

from asit.audio import files
from asit.audio.fbank import FrontEnd
from asit.config import FrontEndSettings, MaskingSettings, PretrainSettings, ViewSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading import waveforms
from asit.data.loading.loader import loader
from asit.data.loading.sampler import MicroBatchSampler, shuffled
from asit.errors import CatalogueError, ConfigError
from asit.pretrain import pretrain_dataset
from asit.pretrain.pretrain_dataset import PretrainDataset, PretrainSample, collate, view_frames

RATE, MEAN, STD = 8000, -8.0, 3.5
SHIFT = RATE // 100
FRAMES, SHORT = 48, 16


gather = functools.partial(collate, donor_pool=4)


def make_wave(seconds: float, seed: int, rate: int = RATE) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * rng.uniform(80, 800) * t * (1 + t)) + 0.05 * rng.standard_normal(len(t))
    return wave.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sounds")


Make = Callable[..., PretrainDataset]


@pytest.fixture
def clips(folder: Path) -> Make:
    """Clips of recordings of the given lengths."""

    def make(
        *seconds: float,
        rate: int = RATE,
        suffix: str = "wav",
        frames: tuple[int, int] = (FRAMES, SHORT),
        seed: int = 7,
        padding: str = "silence",
        **views: Any,
    ) -> PretrainDataset:
        listed = []
        for i, length in enumerate(seconds):
            path = folder / f"{i}-{length:g}-{rate}.{suffix}"
            if not path.exists():
                kind = {"subtype": "FLOAT"} if suffix == "wav" else {}
                soundfile.write(path, make_wave(length, i, rate), rate, **kind)
            listed.append(Clip(str(path), soundfile.info(path).duration, rate, 1))
        front_end = FrontEndSettings(rate=RATE, mels=32, mean=MEAN, std=STD, padding=padding)
        settings = PretrainSettings(
            seed=seed,
            front_end=front_end,
            views=ViewSettings(**{"roll": 0.0, "local_views": 2, **views}),
            masking=MaskingSettings(fill="noise"),
        )
        return PretrainDataset(Catalogue.from_clips(listed), settings, frames)

    return make


def whole(clips: PretrainDataset, index: int) -> Tensor:
    """(T, F): the normalised log-mel of the whole recording."""
    wave = files.read(clips.catalogue[index].path, rate=RATE)
    return (clips.front_end.fbank(torch.from_numpy(wave)[None])[0] - MEAN) / (2 * STD)


def places(view: Tensor, of: Tensor, atol: float = 0.0) -> list[int]:
    """Where the view lies in a log-mel: first frames of all crops that equal it."""
    crops = of.unfold(0, len(view), 1).transpose(1, 2)
    return torch.nonzero((crops - view).abs().amax((1, 2)) <= atol).flatten().tolist()


def equal(left: Any, right: Any) -> bool:
    for f in fields(left):
        a, b = getattr(left, f.name), getattr(right, f.name)
        if isinstance(a, Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif isinstance(a, np.ndarray):
            if not np.array_equal(a, b):
                return False
        elif a != b:
            return False
    return True


# where views lie


@pytest.mark.parametrize(("suffix", "rate", "atol"), [("wav", RATE, 0.0), ("flac", RATE, 0.0), ("wav", 22050, 2e-3)])
def test_views_are_crops_of_the_whole_files_log_mel(suffix: str, rate: int, atol: float, clips: Make) -> None:
    """Bit for bit at the front end's own rate; a part resampled by itself differs by the resampler's rounding."""
    made = clips(1.3, 0.9, 2.2, rate=rate, suffix=suffix, segment_seconds=2.0)
    assert len(made) == 3
    starts: list[int] = []
    for epoch in range(4):
        for i in range(3):
            sample, mel = made[epoch, i], whole(made, i)
            assert sample.clean.shape == (2, FRAMES, 32)
            assert sample.local.shape == (2, SHORT, 32)
            for view in (*sample.clean, *sample.local):
                found = places(view, mel, atol)
                assert len(found) == 1
                starts += found
    assert len(set(starts)) > 20


def test_views_are_independent_and_reach_both_ends_of_a_clip(clips: Make) -> None:
    """Every place is drawn, the first and the last, with the same probability."""
    made = clips(0.7)
    mel = whole(made, 0)
    starts = np.array([[places(view, mel)[0] for view in made[epoch, 0].clean] for epoch in range(150)])
    assert set(starts.flat) == set(range(len(mel) - FRAMES + 1))
    counts = np.bincount(starts.flatten())
    assert counts.min() > 0.3 * counts.mean()
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.25
    assert (starts[:, 0] != starts[:, 1]).mean() > 0.9


def test_a_rolled_clip_is_the_roll_of_its_waveform(clips: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = clips(1.3, roll=1.0)
    shares: list[float] = []
    real = pretrain_dataset.augment.roll
    monkeypatch.setattr(pretrain_dataset.augment, "roll", lambda x, share: (shares.append(share), real(x, share))[1])
    wave = make_wave(1.3, 0)
    for epoch in range(5):
        sample = made[epoch, 0]
        rolled = np.roll(wave, int(shares[-1] * len(wave)))
        mel = (made.front_end.fbank(torch.from_numpy(rolled)[None])[0] - MEAN) / (2 * STD)
        assert all(len(places(view, mel)) == 1 for view in (*sample.clean, *sample.local))
    assert len(set(shares)) == 5
    half = clips(1.3, roll=0.5)
    shares.clear()
    for epoch in range(60):
        half[epoch, 0]
    assert 15 < sum(share > 0 for share in shares) < 45


def test_a_change_of_level_moves_every_bin_alike(clips: Make) -> None:
    plain, louder = clips(1.3), clips(1.3, gain_db=6.0)
    moved = [(louder[e, 0].clean - plain[e, 0].clean).flatten(1) for e in range(12)]
    for difference in torch.cat(moved):
        assert float(difference.std()) < 1e-5
    steps = torch.cat(moved).mean(1) * 2 * STD / (np.log(10) / 10)  # back to dB
    assert float(steps.abs().max()) <= 6.0
    assert float(steps.min()) < -2
    assert float(steps.max()) > 2


def test_stretched_and_warped_views_keep_their_size(clips: Make) -> None:
    made = clips(0.4, 1.3, stretch=0.5, mel_warp=0.3)
    plain = clips(0.4, 1.3)
    for i in range(2):
        sample = made[0, i]
        assert sample.clean.shape == (2, FRAMES, 32)
        assert sample.local.shape == (2, SHORT, 32)
        assert sample.clean.isfinite().all()
        assert not torch.equal(sample.clean, plain[0, i].clean)


# long recordings


def test_a_long_recording_counts_once_for_each_segment(clips: Make) -> None:
    lengths = (0.3, 1.9, 2.0, 3.99, 6.5, 25.0)
    made = clips(*lengths, segment_seconds=2.0)
    assert len(made) == 1 + 1 + 1 + 1 + 3 + 12
    rows = [made._locate(i) for i in range(len(made))]
    assert [row for row, _, _ in rows] == [0, 1, 2, 3, 4, 4, 4, *[5] * 12]
    assert [segment for row, segment, _ in rows if row == 5] == list(range(12))
    assert {of for row, _, of in rows if row == 4} == {3}


def test_all_of_a_long_recording_is_reached_and_no_more_is_read_than_needed(
    clips: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = clips(25.0, segment_seconds=2.0)
    asked: list[tuple[int, float, float]] = []

    def read(path: str, *, rate: int, start: float, seconds: float, resampler: str) -> npt.NDArray[np.float32]:
        asked.append((index, start, seconds))
        return np.ones(round(seconds * rate), np.float32)

    monkeypatch.setattr(waveforms.files, "read", read)
    for epoch in range(60):
        for index in range(len(made)):
            made[epoch, index]
    starts = np.array([start for _, start, _ in asked])
    ends = np.array([start + seconds for _, start, seconds in asked])
    assert starts.min() >= 0
    assert starts.min() < 0.5
    assert ends.max() <= 25.0 + 1e-6
    assert ends.max() > 24.5
    assert max(seconds for *_, seconds in asked) <= 2.0 + 1e-9
    covered = np.zeros(250)
    for start, end in zip(starts, ends, strict=True):
        covered[int(start * 10) : int(end * 10)] += 1
    assert covered[4:-4].min() > 0
    assert covered[15:-15].min() > 0.4 * covered.mean()
    for segment in range(12):  # an epoch goes through all of the recording
        mine = starts[[i == segment for i, *_ in asked]]
        assert segment * 23 / 12 <= mine.min()
        assert mine.max() <= (segment + 1) * 23 / 12 + 2.0


def test_views_of_a_segment_are_crops_of_the_file_from_its_start(clips: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = clips(9.0, segment_seconds=1.0)
    asked: list[float] = []
    real = files.read

    def read(path: str, **how: Any) -> npt.NDArray[np.float32]:
        asked.append(how["start"])
        return real(path, **how)

    monkeypatch.setattr(waveforms.files, "read", read)
    wave = make_wave(9.0, 0)
    for index in range(9):
        sample = made[2, index]
        mel = made.front_end.fbank(torch.from_numpy(wave[round(asked[-1] * RATE) :][: 2 * RATE])[None])[0]
        mel = (mel - MEAN) / (2 * STD)
        found = [places(view, mel) for view in (*sample.clean, *sample.local)]
        assert all(len(each) == 1 for each in found)
        assert max(each[0] for each in found) <= 100


# short files


@pytest.mark.parametrize("seconds", [0.004, 0.02, 0.3, 0.48])
@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_short_files_are_filled_by_the_rule(padding: str, seconds: float, clips: Make) -> None:
    made = clips(seconds, padding=padding, local_views=0)
    wave, need = make_wave(seconds, 0), (FRAMES - 1) * SHIFT + 200
    if padding == "repeat":
        filled = np.tile(wave, -(-need // len(wave)))[:need]
        want = made.front_end.fbank(torch.from_numpy(filled)[None])[0]
    elif padding == "silence":
        want = made.front_end.fbank(torch.from_numpy(np.pad(wave, (0, need - len(wave))))[None])[0]
    else:
        want = torch.zeros(FRAMES, 32)
        filled = np.pad(wave, (0, max(0, 200 - len(wave))))
        mel = made.front_end.fbank(torch.from_numpy(filled)[None])[0]
        want[: len(mel)] = mel
    want = (want - MEAN) / (2 * STD)
    for epoch in range(2):
        for view in made[epoch, 0].clean:
            torch.testing.assert_close(view, want, rtol=0, atol=0)
            assert view.isfinite().all()


def test_a_short_file_gives_its_short_views_from_all_of_itself(clips: Make) -> None:
    """Padding is behind the sound, and a short view of a short file holds sound first."""
    made = clips(0.3, padding="silence")
    mel = whole(made, 0)
    starts = set()
    for epoch in range(60):
        for view in made[epoch, 0].local:
            starts |= set(places(view, mel))
    assert starts == set(range(len(mel) - SHORT + 1))


# pure


def test_a_sample_is_a_pure_function_of_seed_epoch_and_index(clips: Make, no_global_draws: None) -> None:
    how: dict[str, Any] = {"roll": 0.5, "gain_db": 3.0, "stretch": 0.2, "mel_warp": 0.1}
    one, two = clips(1.3, 0.9, 1.1, **how), clips(1.3, 0.9, 1.1, **how)
    keys = [(e, i) for e in range(3) for i in range(3)]
    first = {key: one[key] for key in keys}
    assert all(equal(two[key], first[key]) for key in reversed(keys))
    for key in keys:
        for other in ((key[0] + 1, key[1]), (key[0], (key[1] + 1) % 3)):
            assert not torch.equal(one[other].clean, first[key].clean)
            assert not torch.equal(one[other].drop, first[key].drop)
    apart = clips(1.3, 0.9, 1.1, seed=8, **how)
    assert not torch.equal(apart[0, 0].clean, first[0, 0].clean)
    assert not torch.equal(apart[0, 0].drop, first[0, 0].drop)


def test_masks_do_not_hang_on_what_is_cut(clips: Make) -> None:
    """Material and corruption draw from streams of their own."""
    assert torch.equal(clips(1.3)[0, 0].drop, clips(1.3, gain_db=3, roll=1.0)[0, 0].drop)


# files that are gone


def test_another_clip_stands_in_for_a_file_that_is_gone(clips: Make, tmp_path: Path) -> None:
    made = clips(1.3, 0.9, 1.1)
    gone = Clip(str(tmp_path / "gone.wav"), 1.0, RATE, 1)
    rest = [made.catalogue[i] for i in range(3)]
    made = PretrainDataset(Catalogue.from_clips([gone, *rest]), made.settings, made.frames)
    seen = set()
    for epoch in range(12):
        sample = made[epoch, 0]
        assert sample.name != gone.path
        assert sample.failures
        assert all("gone.wav" in text for text in sample.failures)
        assert equal(sample, made[epoch, 0])
        seen.add(sample.name)
        assert made[epoch, 1].failures == []
    assert seen == {clip.path for clip in rest}


def test_when_all_are_gone_it_ends(clips: Make, tmp_path: Path) -> None:
    made = clips(1.3)
    lost = Catalogue.from_clips([Clip(str(tmp_path / f"{i}.wav"), 1.0, RATE, 1) for i in range(20)])
    made = PretrainDataset(lost, made.settings, made.frames)
    with pytest.raises(CatalogueError, match="eight clips in a row could not be read"):
        made[0, 3]
    for workers in (0, 1):
        keys = MicroBatchSampler(order=shuffled(7, 20), count=20, batch=4, micro=4)
        with pytest.raises(CatalogueError) as caught:
            next(loader(made, keys, gather, workers=workers, pin=False))
        assert "Traceback" not in str(caught.value)


# batches


def test_rows_are_view_major(clips: Make) -> None:
    made = clips(1.3, 0.9, 1.1)
    samples = [made[0, i] for i in range(3)]
    batch = gather(samples)
    assert batch.clean.shape == (6, 1, FRAMES, 32)
    assert batch.local.shape == (6, 1, SHORT, 32)
    assert batch.factors.shape == (12, 2, 12)
    for v in range(2):
        for b in range(3):
            row = 3 * v + b
            for name in ("clean", "drop", "replace", "local", "noise"):
                assert torch.equal(getattr(batch, name)[row, 0], getattr(samples[b], name)[v]), name
            assert torch.equal(batch.factors[:, :, row], samples[b].factors[v])
            assert torch.equal(batch.factors[:, :, 6 + row], samples[b].factors[2 + v])
            assert row // 3 == int(batch.donor[row]) // 3
    assert batch.ids == [sample.name for sample in samples]
    assert batch.to(torch.device("cpu")) is batch
    assert gather([clips(1.3, local_views=0)[0, 0]]).local is None


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, clips: Make) -> None:
    made = clips(1.3, 0.9, 1.1, 0.7, 0.5)
    keys = MicroBatchSampler(order=shuffled(7, 5), count=5, batch=2, micro=2, start=1)
    theirs = loader(made, keys, gather, workers=0, pin=False)
    with contextlib.closing(loader(made, keys, gather, workers=workers, pin=False)) as ours:
        for _ in range(5):
            assert equal(next(ours), next(theirs))


def test_samples_cost_little(clips: Make) -> None:
    """Both views share one read and one pass of the front end."""
    made = clips(1.3)
    calls = []
    real = made.front_end.fbank
    made.front_end.fbank = lambda wave: (calls.append(wave.shape), real(wave))[1]  # type: ignore[method-assign]
    made[0, 0]
    assert len(calls) == 1
    assert isinstance(made[0, 0], PretrainSample)


# lengths of views


def front_end(rate: int = 16000) -> FrontEnd:
    return FrontEnd(FrontEndSettings(rate=rate))


@pytest.mark.parametrize("rate", [16000, 32000])
def test_the_published_lengths(rate: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "asit")
    settings = ViewSettings(seconds=6.0, local_views=4, local_seconds=2.0)
    frames, short = view_frames(settings, front_end(rate), 16, 10.0)
    assert (frames, short) == (592, 192)
    assert "598 frames, of which 6 are left out to fill complete patches: 592 = 37 x 16" in caplog.messages[0]
    assert "192 = 12 x 16" in caplog.messages[1]


@pytest.mark.parametrize(
    ("segment", "seconds", "typical", "fits", "short"),
    [
        *((10.0, "auto", typical, 6.0, 2.0) for typical in (600.0, 12.0, 10.0, 9.0)),
        *((10.0, "auto", typical, fits, fits / 3) for typical, fits in ((8.0, 4.8), (5.0, 3.0))),
        *((10.0, "auto", typical, fits, 0.6 * fits) for typical, fits in ((2.0, 1.5), (1.0, 0.85), (0.6, 0.51))),
        (3.0, "auto", 12.0, 1.8, 1.08),  # 0.6 of a segment, as of a clip of 3 s
        (1.0, "auto", 12.0, 0.85, 0.51),
        (60.0, "auto", 600.0, 6.0, 2.0),
        (10.0, 0.2, 1.0, 0.2, 0.175),  # a third would hold no patch of 16 frames
    ],
)
def test_auto_follows_the_typical_clip(segment: float, seconds: Any, typical: float, fits: float, short: float) -> None:
    settings = ViewSettings(segment_seconds=segment, seconds=seconds, local_views=1)
    found = view_frames(settings, front_end(), 16, typical)
    assert found == tuple(int((s - 0.025) / 0.01 + 1 + 1e-6) // 16 * 16 for s in (fits, short))
    assert found[0] * 0.01 < typical


def test_views_that_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match=r"views\.seconds is 0\.1: 8 frames hold no patch of 16(.|\n)*at least 0\.175 s"
    ):
        view_frames(ViewSettings(seconds=0.1), front_end(), 16, 1.0)
    with pytest.raises(ConfigError, match=r"views\.local_seconds is 0\.01: 0 frames"):
        view_frames(ViewSettings(seconds=1, local_views=1, local_seconds=0.01), front_end(), 16, 1.0)
    with pytest.raises(ConfigError, match=r"views\.seconds is 12, views\.segment_seconds is 10"):
        view_frames(ViewSettings(seconds=12), front_end(), 16, 20.0)
