"""Frozen evaluation end to end: features, probes, verification, baselines."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from asit import cli
from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue import scan
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.errors import AsitError, CatalogueError, ConfigError
from asit.evaluate import feature_readers, features, frozen
from asit.evaluate import frozen as comparison
from asit.evaluate.feature_cache import Store
from asit.evaluate.features import Collected, collect
from asit.evaluate.frozen_scores import FrozenScores, FrozenSettings
from asit.evaluate.verification import VerificationSettings, read_trials, verification_text, verify
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder
from asit.runtime import World

RATE = 8000
FRONT_END = FrontEndSettings(rate=RATE, mels=32, mean=-8.0, std=3.5)
ALONE = World(0, 1, torch.device("cpu"), "")
Listed = Callable[[str], Catalogue]
"""The catalogue of one of the tables of `tones`."""
KINDS = ("class", "mean", feature_readers.TOKENS)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> AudioModel:
    """A tiny encoder with random weights, whose training view is half a second."""
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=16, patch_mels=16)
    encoder = Encoder(settings, 48, 32)
    encoder.init_weights(torch.Generator().manual_seed(0))
    return AudioModel(encoder, FrontEnd(FRONT_END))


def tone(path: Path, hertz: float, seconds: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * RATE)) / RATE
    waveform = 0.3 * np.sin(2 * np.pi * hertz * t) + 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform.astype(np.float32), RATE, subtype="FLOAT")


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 clips of 0.3 to 1.3 s: three pitches, six speakers who differ a little, a table with all columns."""
    root = tmp_path_factory.mktemp("tones")
    rows = []
    for i in range(72):
        pitch, speaker = i % 3, i // 3 % 6
        name = f"clips/{i * 37 % 72:02d}.wav"  # the table's order is not the paths'
        tone(root / name, (300, 700, 1900)[pitch] * (1 + 0.02 * speaker), 0.3 + 0.04 * (i % 26), i)
        split = "train" if speaker < 3 else "validation" if speaker == 3 else "test"
        row = {"path": name, "label": ("low", "mid", "high")[pitch], "split": split, "speaker": f"s{speaker}"}
        rows.append({**row, "fold": str(speaker // 2 + 1)})
    table(root / "all.csv", rows)
    table(root / "splits.csv", [{k: row[k] for k in ("path", "label", "split", "speaker")} for row in rows])
    table(root / "folds.csv", [{k: row[k] for k in ("path", "label", "fold")} for row in rows])
    return root


@pytest.fixture(scope="session")
def listed(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Listed:
    """The catalogue of one of the tables."""
    made: dict[str, Catalogue] = {}

    def read(name: str) -> Catalogue:
        if name not in made:
            out = tmp_path_factory.mktemp("listed") / "c.jsonl"
            made[name] = scan.build(tones / name, out, front_end=FRONT_END, workers=1, statistics_clips=0)
        return made[name]

    return read


def read(model: AudioModel, clips: Any, kinds: tuple[str, ...] = KINDS, reader: Any = None, **how: Any) -> Collected:
    listed = clips if isinstance(clips, Catalogue) else Catalogue.from_clips(clips)
    found = collect(listed, {"m": reader or feature_readers.EncoderReader(model, kinds)}, **how)
    assert found is not None
    return found


def same(left: Collected, right: Collected, of: Sequence[int] | None = None) -> None:
    """Bit for bit; `of`: the rows of the left that the right holds."""
    rows = np.arange(len(left.kept)) if of is None else np.asarray(of)
    assert left.vectors["m"].keys() == right.vectors["m"].keys()
    for kind, values in left.vectors["m"].items():
        np.testing.assert_array_equal(values[rows], right.vectors["m"][kind])
    for row, theirs in zip(rows, right.tokens.get("m", []), strict="m" in right.tokens):
        np.testing.assert_array_equal(left.tokens["m"][row], theirs)


# --- features --------------------------------------------------------------------------------------------------------


def test_features_are_those_of_embed(model: AudioModel, listed: Listed) -> None:
    """Short clips, clips longer than the view, and clips in several windows, in one batch."""
    clips = listed("all.csv")
    found = read(model, clips)
    lengths = set()
    for i in range(0, len(clips), 7):
        embedded = model.embed(clips[i].path, precision="float32")
        lengths.add(embedded.grid[0])
        np.testing.assert_allclose(found.vectors["m"]["class"][i], embedded.class_token, atol=1e-5)
        np.testing.assert_allclose(found.vectors["m"]["mean"][i], embedded.clip, atol=1e-5)
        np.testing.assert_allclose(found.tokens["m"][i].astype(np.float32), embedded.patches, atol=2e-3)
    assert min(lengths) < 3 < 1.5 * 3 < max(lengths)
    assert found.vectors["m"]["mean"].dtype == np.float32


def test_a_hit_is_a_miss_bit_for_bit(
    model: AudioModel, listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = listed("all.csv")
    without = read(model, clips)
    first = read(model, clips, store=Store(tmp_path))
    opened: list[str] = []
    reader = features.read_clip
    monkeypatch.setattr(
        features, "read_clip", lambda clip, *rate, **how: (opened.append(clip.path), reader(clip, *rate, **how))[1]
    )
    again = read(model, clips, store=Store(tmp_path))
    assert (first.cached, again.cached) == (0, len(clips))
    assert not opened
    same(without, first)
    same(without, again)
    # What one kind of feature lacks is computed, and each clip read once for it.
    more = read(model, clips, (*KINDS, "mean+std"), store=Store(tmp_path))
    same(read(model, clips, (*KINDS, "mean+std")), more)
    assert sorted(opened[: len(clips)]) == sorted(clip.path for clip in (clips[i] for i in range(len(clips))))


def test_features_do_not_depend_on_what_else_is_listed(
    model: AudioModel, listed: Listed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order, in any part, in blocks of any size, on any number of threads, and where the cache has some."""
    clips = listed("all.csv")
    some = np.random.default_rng(0).permutation(len(clips))[:25]
    read(model, clips.subset(some), store=Store(tmp_path))
    whole = read(model, clips, store=Store(tmp_path))
    assert whole.cached == len(some)
    same(read(model, clips), whole)
    before = torch.get_num_threads()
    for most, threads in ((64, 1), (3, 4)):
        monkeypatch.setattr(features, "MOST", most)
        torch.set_num_threads(threads)
        try:
            part = read(model, clips.subset(some))
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        same(whole, part, some)
    kept = read(model, clips.subset(some[::-1]), store=Store(tmp_path))
    assert kept.cached == len(some)
    same(whole, kept, some[::-1])


def test_what_makes_another_entry(model: AudioModel, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    tone(path, 500, 1.0, 1)
    clip = Clip(str(path), 1.0, RATE, 1)
    store = Store(tmp_path / "cache")

    def cached(model: AudioModel = model, clip: Clip = clip, **how: Any) -> int:
        return read(model, [clip], reader=feature_readers.EncoderReader(model, ("mean",), **how), store=store).cached

    assert cached() == 0
    assert cached() == 1
    assert cached(feature_readers.untrained(model, 5)) == 0
    other = FrontEnd(FRONT_END.model_copy(update={"mean": -7.0}))
    assert cached(AudioModel(model.encoder, other)) == 0
    assert cached(seconds=0.5) == 0
    assert cached(precision="bf16") == 0
    assert cached(clip=replace(clip, seconds=0.5)) == 0
    assert cached(clip=replace(clip, seconds=0.5, start=0.5)) == 0
    assert cached() == 1
    tone(path, 900, 1.0, 1)
    assert cached() == 0


def test_parts_of_a_file(model: AudioModel, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    tone(path, 500, 2.0, 1)
    waveform = soundfile.read(path, dtype="float32")[0]
    parts = [Clip(str(path), 0.75, RATE, 1, start=start) for start in (0.0, 1.25)]
    found = read(model, parts, ("mean",)).vectors["m"]["mean"]
    for vector, part in zip(found, (waveform[:6000], waveform[10000:]), strict=True):
        np.testing.assert_allclose(vector, model.embed(part, precision="float32").clip, atol=1e-5)


def test_unreadable_clips_are_named_and_too_many_stop(model: AudioModel, tmp_path: Path) -> None:
    for i in range(12):
        tone(tmp_path / f"{i:02d}.wav", 400, 0.5, i)
    (tmp_path / "03.wav").write_bytes(b"RIFF")
    clips = [Clip(str(tmp_path / f"{i:02d}.wav"), 0.5, RATE, 1) for i in range(12)]
    clips[7] = replace(clips[7], path=str(tmp_path / "gone.wav"))
    store = Store(tmp_path / "cache")
    found = read(model, clips, store=store, bad_files=0.2)
    assert found.kept.tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert [Path(path).name for path, _ in found.bad] == ["03.wav", "gone.wav"]
    assert len(found.tokens["m"]) == len(found.vectors["m"]["mean"]) == 10
    again = read(model, clips, store=store, bad_files=0.2)
    assert (again.bad, again.cached) == (found.bad, 10)
    same(found, again)
    with pytest.raises(CatalogueError, match=r"2 of the first 12 clips cannot be read.*\n +.*03\.wav(.|\n)*at most 1"):
        read(model, clips, bad_files=0.1)
    with pytest.raises(CatalogueError, match="none of the 1 clips can be read"):
        read(model, clips[3:4], bad_files=1.0)
    tone(tmp_path / "03.wav", 400, 0.5, 3)
    mended = read(model, clips, store=store, bad_files=0.2)
    assert (mended.cached, [Path(path).name for path, _ in mended.bad]) == (10, ["gone.wav"])
    assert 3 in mended.kept.tolist()


def test_features_that_are_not_finite_name_the_clip(model: AudioModel, tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 400, 0.5, 0)
    broken = feature_readers.untrained(model, 0)
    with torch.no_grad():
        broken.encoder.norm.weight[3] = torch.nan
    with pytest.raises(AsitError, match=r"a\.wav: the model's vectors are not finite"):
        read(broken, [Clip(str(tmp_path / "a.wav"), 0.5, RATE, 1)], ("mean",))


def test_order_in_time_needs_one_length(model: AudioModel, listed: Listed) -> None:
    with pytest.raises(AsitError, match=r"mel-mean features of .* the clips have different lengths"):
        read(model, listed("all.csv"), ("mel-mean",))
    reader = feature_readers.EncoderReader(model, ("mel-mean", "time-mean"), seconds=0.5)
    found = read(model, listed("all.csv"), reader=reader)
    columns = model.front_end.frames_for(round(0.5 * RATE)) // 16
    assert found.vectors["m"]["mel-mean"].shape == (72, columns * 32)
    assert found.vectors["m"]["time-mean"].shape == (72, 2 * 32)


def test_log_mel_statistics(model: AudioModel, tmp_path: Path) -> None:
    for name, seconds in (("a", 0.7), ("b", 0.01)):
        tone(tmp_path / f"{name}.wav", 400, seconds, 0)
    clips = [Clip(str(tmp_path / "a.wav"), 0.7, RATE, 1), Clip(str(tmp_path / "b.wav"), 0.01, RATE, 1)]
    found = read(model, clips, reader=feature_readers.LogMelReader(model.front_end))
    waveform = torch.from_numpy(soundfile.read(tmp_path / "a.wav", dtype="float32")[0])[None]
    logmel = model.front_end.fbank(waveform)[0]
    expected = torch.cat([logmel.mean(0), logmel.std(0, correction=0)])
    np.testing.assert_allclose(found.vectors["m"][feature_readers.LOG_MEL][0], expected, atol=1e-5)
    assert np.isfinite(found.vectors["m"][feature_readers.LOG_MEL][1]).all()


def test_two_processes_give_the_scores_of_one_bit_for_bit(
    model: AudioModel, tones: Path, listed: Listed, tmp_path: Path, ranks: Any
) -> None:
    model.save(tmp_path / "model")
    torch.set_num_threads(1)
    command = f"evaluate {tmp_path}/model --data {tones}/splits.csv --device cpu --threads 1 --probe linear,knn"
    for size, cache in ((1, "none"), (2, f"{tmp_path}/cache"), (1, f"{tmp_path}/cache")):
        out = tmp_path / f"{size}-{Path(cache).name}.json"
        call = [*command.split(), "--cache", cache, "--out", str(out)]
        ended = ranks(size, lambda call=call: cli.main(call))
        assert [e.code for e in ended] == [0] * size, ended
        assert [bool("accuracy on" in e.said) for e in ended] == [True] + [False] * (size - 1)
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(results) == 3
    assert all(one == results[0] for one in results)
    same(read(model, listed("all.csv")), read(model, listed("all.csv"), store=Store(tmp_path / "cache")))


def test_too_many_unreadable_clips_end_all_processes(model: AudioModel, tmp_path: Path, ranks: Any) -> None:
    model.save(tmp_path / "model")
    rows = []
    for i in range(40):
        tone(tmp_path / f"{i:02d}.wav", 400, 0.3, i)
        rows.append({"path": f"{i:02d}.wav", "label": "ab"[i % 2], "split": ("train", "test")[i // 20]})
    scan.build(table(tmp_path / "t.csv", rows), tmp_path / "c.jsonl", front_end=FRONT_END, workers=1)
    for i in range(5):
        (tmp_path / f"{i:02d}.wav").write_bytes(b"")
    call = f"evaluate {tmp_path}/model --data {tmp_path}/c.jsonl --device cpu --threads 1 --cache none".split()
    ended = ranks(2, lambda: cli.main(call))
    assert [e.code for e in ended] == [2, 2]
    assert all("5 of the first" in e.said and "at most 4 of 40" in e.said for e in ended)


# --- scores ----------------------------------------------------------------------------------------------------------


def evaluate(model: AudioModel, catalogue: Catalogue, **how: Any) -> FrozenScores:
    found = frozen.evaluate_frozen(model, catalogue, FrozenSettings(**how), world=ALONE)
    assert found is not None
    return found


def test_probes_read_the_pitch(model: AudioModel, listed: Listed) -> None:
    every: dict[str, Any] = {"probes": ("linear", "knn", "prototype"), "pooling": ("class+mean", "mean")}
    found = evaluate(model, listed("splits.csv"), baselines=True, **every)
    by_name = {record["weights"]: record for record in found.records}
    assert [*by_name] == [
        *("linear probe, class+mean", "knn probe, class+mean", "linear probe, mean", "knn probe, mean"),
        "prototype probe, patch tokens",
        *("linear probe, class+mean, untrained", "knn probe, class+mean, untrained"),
        *("linear probe, mean, untrained", "knn probe, mean, untrained", "prototype probe, patch tokens, untrained"),
        "linear probe, mean+std of log-mel, log-mel statistics",
        "knn probe, mean+std of log-mel, log-mel statistics",
    ]
    first = by_name["linear probe, class+mean"]
    assert first["metrics"]["accuracy"]["value"] > 0.9
    assert (first["clips"], first["train_clips"], first["split"], first["kind"]) == (24, 36, "test", "single")
    assert first["chosen_by"] == "accuracy on the validation split"
    assert first["bootstrap"]["unit"] == "group"
    assert len({record["list"] for record in by_name.values()}) == 1
    text = found.text()
    assert "accuracy on 24 test clips (list " + first["list"] + "), in brackets the 95 % interval over groups" in text
    assert [line.split("  ")[0] for line in text.splitlines()[1:-1]] == ["model", "untrained", "log-mel statistics"]


def test_few_labels_are_nested_draws_of_the_training_split(model: AudioModel, listed: Listed) -> None:
    found = evaluate(model, listed("splits.csv"), per_class=(1, 4), seeds=2, probes=("linear", "prototype"))
    clips = [(r["labels"], r["seed"], r["probe"], r["train_clips"]) for r in found.records]
    assert clips == [
        (f"{k} a class", seed, probe, 3 * k) for k in (1, 4) for seed in (0, 1) for probe in ("linear", "prototype")
    ]
    summary = found.summary()["model, class+mean+std, linear, 4 a class"]
    values = [r["metrics"]["accuracy"]["value"] for r in found.records if r["probe"] == "linear"][2:]
    assert summary["values"] == values
    assert summary["std"] == pytest.approx(np.std(values, ddof=1))
    assert "± is the standard deviation over 2 seeds" in found.text()
    shares = evaluate(model, listed("splits.csv"), shares=(0.5, 1.0), per_class=(2,), probes=("knn",))
    assert [(r["labels"], r["train_clips"]) for r in shares.records] == [("50 %", 18), ("100 %", 36), ("2 a class", 6)]


def test_folds_in_turn(model: AudioModel, listed: Listed) -> None:
    found = evaluate(model, listed("folds.csv"), probes=("linear",))
    assert [(r["fold"], r["clips"], r["split"]) for r in found.records] == [(f, 24, f"fold {f}") for f in "123"]
    assert "mean accuracy over 3 folds, 72 clips; ± is the standard deviation over folds" in found.text()
    one = evaluate(model, listed("all.csv"), probes=("linear",), fold="2")
    assert [r["fold"] for r in one.records] == ["2"]
    turned = evaluate(model, listed("splits.csv"), probes=("knn",), test=("train",), train=("test",))
    assert turned.records[0]["clips"] == 36
    with pytest.raises(CatalogueError, match="there is no fold 9"):
        evaluate(model, listed("all.csv"), fold="9")


def test_several_labels_a_clip(model: AudioModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Clips of two pitches are scored by mAP, and a class without test clips is named, not counted as 0."""
    caplog.set_level("INFO", "asit")
    rows = []
    for i in range(60):
        low, high = i % 2, i // 2 % 2
        path = tmp_path / f"{i:02d}.wav"
        t = np.arange(RATE // 2) / RATE
        waveform = 0.3 * low * np.sin(2 * np.pi * 300 * t) + 0.3 * high * np.sin(2 * np.pi * 2100 * t)
        noise = np.random.default_rng(i).standard_normal(len(t))
        soundfile.write(path, (waveform + 0.02 * noise).astype(np.float32), RATE, subtype="FLOAT")
        names = ["low"] * low + ["high"] * high + ["rare"] * (i in (8, 9)) or ["noise:0.5"]
        rows.append({"path": path.name, "labels": ";".join(names), "split": "train" if i < 36 else "test"})
    clips = scan.build(table(tmp_path / "t.csv", rows), tmp_path / "c.jsonl", front_end=FRONT_END, statistics_clips=0)
    found = evaluate(model, clips, probes=("linear", "knn", "prototype"))
    assert found.kind == "multi"
    assert all(record["metrics"]["mAP"]["value"] > 0.8 for record in found.records)
    assert all(record["skipped_classes"] == ["rare"] for record in found.records)
    assert "mAP on 24 test clips" in found.text()
    assert "1 of 4 classes have no test clips: rare" in caplog.text
    assert found.records[0]["chosen_by"] == "mAP over 5 folds of the training clips"


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"probes": ("lineer",)}, ConfigError, r"probe lineer \(did you mean linear\?\)"),
        ({"probes": ()}, ConfigError, "probe none"),
        ({"pooling": ("mean", "mean")}, ConfigError, "pooling mean, mean"),
        ({"shares": (0.1, 1.5)}, ConfigError, "parts of the labels: 1.5"),
        ({"per_class": (0,)}, ConfigError, "parts of the labels: 0"),
        ({"seeds": 0}, ConfigError, "seeds 0"),
        ({"test": ("tset",)}, CatalogueError, "there is no split tset"),
    ],
)
def test_settings_that_are_refused(
    model: AudioModel, listed: Listed, how: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, listed("splits.csv"), **{"probes": ("knn",), **how})


def test_tokens_that_memory_does_not_hold_are_refused_before_anything_is_read(
    model: AudioModel, listed: Listed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "TOKENS_SHARE", 1e-9)
    with pytest.raises(ConfigError, match=r"patch tokens of 0\.0 h of audio take .* GB, the machine has"):
        evaluate(model, listed("splits.csv"), probes=("prototype",))


def test_splits_that_leak_or_lack_are_refused(
    model: AudioModel, tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asit")

    def listed(**columns: Sequence[str]) -> Catalogue:
        rows = [{"path": str(path)} for path in sorted((tones / "clips").glob("*.wav"))[:8]]
        for name, values in columns.items():
            for i, row in enumerate(rows):
                row[name] = values[i % len(values)]
        out = tmp_path / "c.jsonl"
        return scan.build(table(tmp_path / "t.csv", rows), out, front_end=FRONT_END, statistics_clips=0, workers=1)

    splits = ["train"] * 4 + ["test"] * 4
    leaky = ["s1", "s2", "s1 ", "s2\u00a0"]
    for columns, message in (
        ({"label": "ab", "split": ["train"]}, "no clip to score: there is no test split"),
        ({"label": "ab"}, "no clip to score: there are no splits and no folds"),
        ({"label": "abababac", "split": splits}, "1 of 3 classes are in test and not in train: c"),
        (
            {"label": "abababac", "fold": ["1"] * 4 + ["2"] * 4},
            "fold 2: 1 of 3 classes are in test and not in train: c",
        ),
        ({"label": "ab", "split": splits, "speaker": leaky}, "2 groups are in train and in test"),
        ({"split": splits}, "8 clips has a label"),
    ):
        with pytest.raises(CatalogueError, match=message):
            evaluate(model, listed(**columns))
    left = evaluate(model, listed(label="abababac", split=splits), unseen="skip", probes=("linear",))
    assert [(r["unseen_classes"], r["clips"]) for r in left.records] == [(["c"], 3)]
    assert "1 of 3 classes have no training clip: c; their 1 " in caplog.text
    shared = evaluate(model, listed(label="ab", split=splits, speaker=["s1", "s2"]), allow_shared_groups=True)
    assert shared.records[0]["bootstrap"]["unit"] == "clip"


# --- verification ----------------------------------------------------------------------------------------------------


def verified(model: AudioModel, catalogue: Catalogue, **how: Any) -> list[dict[str, Any]]:
    found = verify(model, catalogue, VerificationSettings(**how), world=ALONE)
    assert found is not None
    return found


def test_verification_by_drawn_trials_and_by_a_list(
    model: AudioModel, tones: Path, listed: Listed, tmp_path: Path
) -> None:
    catalogue = listed("splits.csv")
    drawn = verified(model, catalogue, by="label", baselines=True)
    assert [record["encoder"] for record in drawn] == ["model", "untrained", "log-mel statistics"]
    first = drawn[0]
    assert (first["clips"], first["trials"], first["same_trials"]) == (24, 276, 84)
    assert all(held["value"] < 0.5 for record in drawn for held in list(record["metrics"].values())[:1])
    assert first["centred"]
    assert "276 trials, 84 of them of one label, over 24 clips" in verification_text(drawn)
    # A list of the same trials gives the same rates.
    test = np.flatnonzero(catalogue.texts("split") == "test")
    names, labels = catalogue.ids(test), catalogue.labels[test]
    pairs = itertools.combinations(range(len(test)), 2)
    lines = [f"{int(labels[i] == labels[j])} {names[i]} {names[j]}" for i, j in pairs]
    (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
    by_list = verified(model, catalogue, by="label", trials=str(tmp_path / "trials.txt"), train=("train",))
    assert by_list[0]["metrics"] == first["metrics"]
    assert by_list[0]["split"] == "trials.txt"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 a.wav b.wav", r"line 2: '2 a.wav b.wav'"),
        ("1 a.wav", "line 2"),
        ("", "holds no trials"),
        ("0 a.wav b.wav", "2 of 4 clips of the trials are not in the catalogue: .*a.wav"),
    ],
)
def test_a_list_of_trials_that_does_not_fit(listed: Listed, tmp_path: Path, line: str, message: str) -> None:
    catalogue = listed("splits.csv")
    first = "1 " + " ".join(catalogue.ids([0, 1]))
    (tmp_path / "t.txt").write_text(f"{first}\n{line}\n" if line else "\n")
    with pytest.raises(CatalogueError, match=message):
        read_trials(tmp_path / "t.txt", catalogue)


def test_verification_without_splits_or_speakers(model: AudioModel, listed: Listed) -> None:
    found = verified(model, listed("folds.csv"), most=50)
    assert (found[0]["by"], found[0]["centred"], found[0]["trials"]) == ("label", False, 50)
    with pytest.raises(CatalogueError, match="the catalogue has no groups to verify by"):
        verified(model, listed("folds.csv"), by="group")


# --- the short form --------------------------------------------------------------------------------------------------


def test_the_comparison_with_baselines_reads_the_same_features(
    model: AudioModel, listed: Listed, tones: Path, tmp_path: Path
) -> None:
    clips = comparison.labelled_clips(tones / "splits.csv", 1000, 0)
    assert clips.texts("split").tolist() == ["train"] * 36 + ["test"] * 24
    listed("splits.csv").write(tmp_path / "c.jsonl")
    same = comparison.labelled_clips(tmp_path / "c.jsonl", 1000, 0)
    assert [(clip.path, clip.label) for clip in same] == [(clip.path, clip.label) for clip in clips]
    compared, again = (
        comparison.accuracies(comparison.linear_probes(model, clips, seed=0, baselines=True, store=Store(tmp_path)))
        for _ in range(2)
    )
    assert compared == again
    assert [*compared] == ["pretrained", "untrained", "log-mel statistics"]
    assert compared["pretrained"]["class+mean"]["accuracy"] > 0.9
    quick = comparison.linear_probes(model, clips, seed=0, pooling=comparison.PRETRAINING_POOLINGS)
    assert comparison.accuracies(quick)["pretrained"]["class+mean"] == compared["pretrained"]["class+mean"]
    entry = comparison.metrics_entry(quick)
    assert (entry["accuracy"], entry["clips"]) == (compared["pretrained"]["class+mean"]["accuracy"], 24)


def test_the_verb_prints_scores_and_writes_json(
    model: AudioModel, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save(tmp_path / "model")
    command = f"evaluate {tmp_path}/model --data {tones}/splits.csv --device cpu --cache {tmp_path}/cache"
    assert cli.main([*command.split(), "--probe", "knn", "--out", str(tmp_path / "r.json")]) == 0
    out, log = capsys.readouterr()
    assert "features of 0 of 72 clips came from the cache" in log
    assert "knn: class+mean+std" in out
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["kind"] == "single"
    assert kept["results"][0]["per_class"][0]["class"] == "high"
    verify = ["--verify", "--verify-by", "label", "--pooling", "class+mean+std"]  # the features that the probes read
    assert cli.main([*command.split(), *verify]) == 0
    assert "features of 60 of 60 clips came from the cache" in capsys.readouterr().err
    for more, message in (
        ("--trials t.txt", "--trials without --verify"),
        ("--verify --probe knn", "--verify and --probe"),
        ("--shares 0.1;1", "numbers separated by commas"),
        ("--cache-limit-gb 0", "a cache limit of 0 GB"),
    ):
        assert cli.main([*command.split(), *more.split()]) == 2
        assert message in capsys.readouterr().err
