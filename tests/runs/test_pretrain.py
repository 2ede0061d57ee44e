"""A pretraining run's folder: its files, who may use it, and starts and steps that fail."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asit
from asit import cli, runtime
from asit.config import PretrainSettings, presets, yaml
from asit.data.catalogue.catalogue import Catalogue
from asit.data.loading.sampler import Key, permutation
from asit.errors import CatalogueError, ConfigError, TrainingError
from asit.io import checkpoint
from asit.pretrain import pretrain_dataset, pretrain_setup
from asit.pretrain import pretrain_run as runs
from asit.runtime import World
from asit.tools import step_profile
from asit.tools.run_estimate import dry_run
from asit.training import open_data


def go(settings: PretrainSettings, **how: Any) -> runs.PretrainResult:
    return runs.pretrain(settings, **how)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def log(run: Path) -> str:
    return (run / "log.txt").read_text("utf-8")


@pytest.fixture
def copied(recordings: Path, tmp_path: Path) -> Path:
    """The recordings, to be changed."""
    return Path(shutil.copytree(recordings, tmp_path / "copied"))


# what a run leaves


def test_the_folder_holds_what_is_promised(tiny: Any, tmp_path: Path, recordings: Path) -> None:
    run = tmp_path / "run"
    result = go(tiny(run, data=recordings, records={"figure_every": 5}))
    assert (result.out, result.model, result.step, result.total) == (run, run / "model", 8, 8)
    assert result.finished
    assert result.stopped_by is None
    assert result.clips_per_second > 0
    assert names(run) == {
        *("config.yaml", "environment.json", "catalogue.jsonl", "catalogue.skipped.jsonl", "metrics.jsonl", "log.txt"),
        *("checkpoints", "model", "figures"),
    }
    assert names(run / "checkpoints") == {"step-00000006", "step-00000008"}
    assert names(run / "model") == {"model.safetensors", "card.json"}
    assert len([name for name in names(run / "figures") if name.endswith(".png")]) == 2  # steps 5 and 8
    environment = json.loads((run / "environment.json").read_text())
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert environment["precision_reason"] == environment["device_reason"] == "as requested"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_global_generator_matters(tiny: Any, tmp_path: Path, no_global_draws: None, equal_runs: Any) -> None:
    """Draws from Python's and numpy's raise here; torch's, which its modules draw from at first, is moved."""
    before = torch.get_rng_state()
    try:
        go(tiny(tmp_path / "one", stop_after=2))
        torch.manual_seed(99)
        go(tiny(tmp_path / "two", stop_after=2))
    finally:
        torch.set_rng_state(before)
    equal_runs(tmp_path / "two", tmp_path / "one")


def test_the_model_is_the_teacher_and_says_where_it_is_from(
    unstopped: Path, tiny: Any, tmp_path: Path, state: Any
) -> None:
    model, held = asit.load(unstopped / "model"), state(unstopped)
    weights = model.encoder.state_dict()
    assert weights
    assert all(torch.equal(value, held[f"task/teacher.encoder.{name}"]) for name, value in weights.items())
    training = model.card["training"]
    assert (training["step"], training["steps"], training["batch_size"], training["seed"]) == (8, 8, 4, 3)
    assert training["network"] == "teacher"
    assert (model.front_end.settings.mean, model.front_end.settings.std) == (-8.0, 3.5)
    go(tiny(tmp_path / "alone", losses={"global_weight": 0, "local_weight": 0}))
    model, held = asit.load(tmp_path / "alone" / "model"), state(tmp_path / "alone")
    assert model.card["training"]["network"] == "student"
    weights = model.encoder.state_dict()
    assert all(torch.equal(value, held[f"task/student.encoder.{name}"]) for name, value in weights.items())


def test_the_resolved_config_repeats_the_run(tiny: Any, tmp_path: Path, equal_runs: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    autos = {"optim": {"warmup": "auto", "freeze_last_layer": "auto"}, "losses": {"teacher_warmup": "auto"}}
    go(tiny(first, **autos, views={"seconds": "auto", "local_seconds": "auto"}))
    again = presets.build(PretrainSettings, None, first / "config.yaml", {"out": str(second)})
    flat = dict(yaml.flat(again.model_dump(mode="json")))
    assert {name for name, value in flat.items() if value == "auto"} <= {
        *("front_end.mean", "front_end.std", "heads.reconstruction_hidden")
    }
    go(again)
    equal_runs(second, first, lines=True)


def test_mean_and_std_come_from_the_catalogue(tiny: Any, tmp_path: Path, listed: Path) -> None:
    run, header = tmp_path / "run", Catalogue.read(listed).header
    go(tiny(run, front_end={"mean": "auto", "std": "auto"}, stop_after=1))
    front_end = asit.load(run / "model").front_end.settings
    assert (front_end.mean, front_end.std) == (header["mean"], header["std"])
    with pytest.raises(CatalogueError, match=r"mels 32 there, 48 here(.|\n)*set both numbers"):
        go(tiny(tmp_path / "other", front_end={"mean": "auto", "std": "auto", "mels": 48}))
    assert not (tmp_path / "other" / "config.yaml").exists()


# who may use it


def test_an_occupied_folder_is_refused_with_both_ways_on(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    go(tiny(run, stop_after=1))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError) as caught:
        go(tiny(run))
    assert "--resume" in caught.value.remedy
    assert "--overwrite" in caught.value.remedy
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    with pytest.raises(ConfigError, match="--resume and --overwrite were both given"):
        go(tiny(run), resume=True, overwrite=True)


def test_overwrite_starts_afresh(tiny: Any, tmp_path: Path, recordings: Path, copied: Path, equal_runs: Any) -> None:
    """Nothing of the old run is left, its list of recordings neither."""
    run = tmp_path / "run"
    for i in range(4, 16):
        (copied / f"{i:02d}.wav").unlink()
    go(tiny(run, data=copied, seed=9, records={"checkpoint_every": 1}))
    (run / "figures").mkdir()
    for name in ("figures/step-00000002.png", "report.html", ".metrics.jsonl.tmp", ".config.yaml.4711.tmp"):
        (run / name).touch()
    (run / ".model.tmp-4711").mkdir()
    go(tiny(run, data=recordings), overwrite=True)
    assert len(Catalogue.read(run / "catalogue.jsonl")) == 16
    go(tiny(tmp_path / "fresh", data=recordings))
    equal_runs(run, tmp_path / "fresh")
    assert names(run) == names(tmp_path / "fresh")
    assert names(run / "checkpoints") == names(tmp_path / "fresh" / "checkpoints")
    assert "goes on" not in log(run)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_refused(overwrite: bool, tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("ten years")
    with pytest.raises(ConfigError, match=r"not a run's: thesis\.tex(.|\n)*another --out"):
        go(tiny(run), overwrite=overwrite)
    assert names(run) == {"thesis.tex"}
    with pytest.raises(ConfigError, match="is a file"):
        go(tiny(run / "thesis.tex"), overwrite=overwrite)
    with pytest.raises(ConfigError, match="--out RUN"):
        go(tiny(Path()).model_copy(update={"out": ""}))


# starts that fail


def bad_files(data: Path) -> None:
    for i in range(8):
        (data / f"bad-{i}.wav").write_bytes(b"no sound")


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"optim": {"warmup": 5}}, r"epochs is 2 and optim\.warmup is 5: the warm-up must end before the run"),
        ({"encoder": {"heads": 5}}, r"encoder\.width is 32 and encoder\.heads is 5"),
        ({"views": {"seconds": 0.05}}, r"views\.seconds is 0\.05: 3 frames hold no patch of 16 frames"),
        ({"data": "recordingz"}, "there is no(.|\n)*recordingz"),
        ({}, "8 of the 24 files"),
    ],
)
def test_a_failed_start_does_not_block_the_next(
    over: dict[str, Any], text: str, tiny: Any, tmp_path: Path, copied: Path
) -> None:
    run = tmp_path / "run"
    if not over:
        bad_files(copied)
    with pytest.raises(asit.AsitError, match=text):
        go(tiny(run, **{"data": copied, **over}))
    assert not (run / "config.yaml").exists()
    assert "data" not in over or not run.exists()
    for bad in copied.glob("bad-*"):
        bad.unlink()
    assert go(tiny(run, data=copied, stop_after=1)).step == 1


def test_a_run_that_breaks_before_its_first_checkpoint_leaves_the_folder_free(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CatalogueError, match=r"nowhere\.csv"):
        go(tiny(run, probe={"table": str(tmp_path / "nowhere.csv")}))
    assert not (run / "config.yaml").exists()
    assert go(tiny(run, stop_after=1)).step == 1


def test_a_stopped_scan_of_something_else_does_not_block(
    tiny: Any, tmp_path: Path, recordings: Path, copied: Path
) -> None:
    run = tmp_path / "run"
    bad_files(copied)
    for other in ({"data": copied}, {"data": copied, "front_end": {"mels": 48}}):
        with pytest.raises(CatalogueError, match="of the 24 files"):
            go(tiny(run, **other))
        assert (run / "catalogue.jsonl.partial").exists()
    assert go(tiny(run, data=recordings, stop_after=1)).step == 1
    assert len(Catalogue.read(run / "catalogue.jsonl")) == 16


def test_the_settings_are_checked_before_the_recordings(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def scanned(*_: Any, **__: Any) -> None:
        raise AssertionError("hours went into looking at files")

    monkeypatch.setattr(open_data, "catalogue", scanned)
    with pytest.raises(ConfigError, match="warm-up"):
        go(tiny(tmp_path / "run", optim={"warmup": 5}))
    with pytest.raises(ConfigError, match="warm-up"):
        dry_run(tiny(tmp_path / "run", optim={"warmup": 5}))


# batches and lengths


def test_a_batch_larger_than_the_data_shrinks_with_a_warning(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = go(tiny(run, batch_size=63, accumulate=3, epochs=3))
    assert (result.step, result.total) == (3, 3)
    assert "warning: batch_size 63 is larger than the 16 clips of an epoch: using 15" in log(run)
    assert yaml.read_yaml(run / "config.yaml")["batch_size"] == 15
    assert asit.load(run / "model").card["training"]["batch_size"] == 15
    with pytest.raises(CatalogueError, match="at least 17 clips"):
        go(tiny(tmp_path / "more", batch_size=34, accumulate=17))


def test_one_clip_a_pass_has_no_donor(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert go(tiny(run, batch_size=1, stop_after=2, masking={"replace_probability": 1})).step == 2
    assert "there is no other clip to replace from" in log(run)


def test_recordings_shorter_than_a_view(tiny: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert go(tiny(run, views={"seconds": 0.9}, stop_after=1)).step == 1
    assert "5 recordings are shorter than a view of 0.82 s" not in log(run)
    log_lines = next(line for line in log(run).splitlines() if "shorter than a view" in line)
    count = int(log_lines.split(" recordings")[0].split()[-1])
    needed = 0.025 + 0.01 * (80 - 1)
    assert count == sum(0.8 + 0.02 * i < needed - 1e-3 for i in range(16))
    assert log_lines.endswith("padded (silence)")
    go(tiny(tmp_path / "skip", views={"seconds": 0.9, "short_files": "skip"}, stop_after=1))
    assert f"{count} recordings are shorter than a view" in log(tmp_path / "skip")
    assert f"Data: {16 - count} recordings" in log(tmp_path / "skip")
    with pytest.raises(CatalogueError, match=r"all 16 recordings are shorter(.|\n)*--views\.short-files pad"):
        go(tiny(tmp_path / "none", views={"seconds": 3, "short_files": "skip"}))


# recordings that go away


def test_a_file_that_vanishes_is_stood_in_for_and_told_once(tiny: Any, tmp_path: Path, copied: Path) -> None:
    run = tmp_path / "run"
    go(tiny(run, data=copied, stop_after=2))
    (copied / "03.wav").unlink()
    (copied / "07.wav").write_bytes(b"")
    assert go(tiny(run, data=copied, epochs=2), resume=True).finished
    log_lines = [line for line in log(run).splitlines() if "left out:" in line]
    assert len(log_lines) == 2
    assert all("another clip stands in" in line for line in log_lines)
    assert {name for name in ("03.wav", "07.wav") if any(name in line for line in log_lines)} == {"03.wav", "07.wav"}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("stands in" in line.get("text", "") for line in events) == 2


def test_a_few_files_gone_never_end_a_long_run(tiny: Any, tmp_path: Path, copied: Path) -> None:
    """The budget is a share of the files, whatever the number of epochs in which they are missed."""
    run = tmp_path / "run"
    settings = tiny(run, data=copied, epochs=13, batch_size=16)
    go(settings.model_copy(update={"stop_after": 1}))
    (copied / "03.wav").unlink()
    assert go(settings, resume=True).finished


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_files_gone(workers: int, tiny: Any, tmp_path: Path, copied: Path, fork: Any) -> None:
    run, file = tmp_path / "run", tmp_path / "settings.yaml"
    go(tiny(run, data=copied, stop_after=1))
    file.write_text(yaml.to_yaml(tiny(run, data=copied, workers=workers)))
    for i in range(16):
        (copied / f"{i:02d}.wav").unlink()
    (copied / "00.wav").write_bytes(b"")  # the first is looked for at the start
    ended = fork(lambda: cli.main(["pretrain", "--config", str(file), "--resume"])).end()
    assert ended.code == 2
    assert "Traceback" not in ended.said
    assert "eight clips in a row could not be read" in ended.said
    assert "check that the storage is still mounted" in ended.said


def test_the_budget_of_files_gone(tiny: Any, tmp_path: Path, copied: Path) -> None:
    for i in range(16):
        for k in range(2):
            shutil.copy(copied / f"{i:02d}.wav", copied / f"{i:02d}-{k}.wav")
    run = tmp_path / "run"
    go(tiny(run, data=copied, stop_after=1))
    for i in range(16):
        (copied / f"{i:02d}-1.wav").unlink()
    with pytest.raises(TrainingError, match=r"1[1-4] recordings could not be read(.|\n)*bad_files") as caught:
        go(tiny(run, data=copied), resume=True)
    assert "--resume" in caught.value.remedy
    assert go(tiny(run, data=copied, bad_files=0.5), resume=True).finished


# losses that are not finite


class Spoilt(pretrain_dataset.PretrainDataset):
    """Clips of which one is not a number from the second epoch on."""

    def __getitem__(self, key: Key) -> pretrain_dataset.PretrainSample:
        sample = super().__getitem__(key)
        if key[0] == 1 and sample.name.endswith("05.wav"):
            sample.clean[1, 3, 4] = float("nan")
        return sample


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loss_that_is_not_finite(
    workers: int, unstopped: Path, tiny: Any, tmp_path: Path, fork: Any, monkeypatch: Any, equal_runs: Any
) -> None:
    """Refused before the weights change, naming part, step and clip; the corrected run resumes."""
    run, file = tmp_path / "run", tmp_path / "settings.yaml"
    settings = tiny(run, workers=workers, records={"checkpoint_every": 1, "keep": 8})
    file.write_text(yaml.to_yaml(settings))
    with monkeypatch.context() as broken:
        broken.setattr(pretrain_setup, "PretrainDataset", Spoilt)
        ended = fork(lambda: cli.main(["pretrain", "--config", str(file)])).end()
    assert ended.code == 2, ended.said
    assert "Traceback" not in ended.said
    line = next(line for line in ended.said.splitlines() if "not finite" in line)
    drawn = permutation(3, 1, 16)
    place = next(i for i, index in enumerate(drawn) if index == 5) // 4
    assert line.startswith(f"asit: step {4 + place}: not finite: ")
    assert all(part in line for part in ("global", "local", "reconstruction"))
    assert line.endswith("05.wav")
    assert "the weights were not changed" in ended.said
    last = checkpoint.latest_state(run / "checkpoints")
    assert last is not None
    assert last.name == f"step-{4 + place:08d}"
    assert f"ended by an error: step {4 + place}: not finite: " in (run / "log.txt").read_text()
    assert go(settings, resume=True).finished
    equal_runs(run, unstopped)


def test_weights_that_ran_away(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d: not finite(.|\n)*lower optim\.lr"):
        go(tiny(tmp_path / "run", optim={"lr": 1e9, "warmup": 0, "clip": 0}, epochs=4))


# looking before


def test_a_dry_run_writes_nothing(
    tiny: Any, tmp_path: Path, recordings: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "asit")
    measured = dry_run(tiny(tmp_path / "run", data=recordings, views={"seconds": "auto"}))
    assert list(tmp_path.iterdir()) == []
    assert measured.shapes["global views"] == [8, 1, 64, 32]
    assert measured.shapes["local views"] == [4, 1, 16, 32]
    assert measured.shapes["patch grid (time, mel)"] == [4, 2]
    assert measured.shapes["tokens a global view"] == 9
    assert measured.seconds_per_step > 0
    assert measured.seconds_per_clip > 0
    assert measured.total_seconds == pytest.approx(8 * measured.seconds_per_step)
    assert measured.clips_per_second == pytest.approx(4 / measured.seconds_per_step)
    assert not measured.extrapolated
    assert 0.05 < measured.memory_gb["cpu"] < 20
    assert "warmup: 0.5" in measured.settings
    assert "8 steps: 2 epochs of 4 steps of 4 clips" in caplog.messages


def test_a_large_batch_is_extrapolated(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Two small forward passes are measured, and the line through them is followed."""
    seen, now = list[int](), [0.0]

    def train(setup: Any, world: Any, batches: Any, steps: int, clips: int) -> None:
        seen.append(clips)
        for _ in range(steps):
            next(batches)

    def clock(device: torch.device) -> float:
        now[0] += 1.0 + 0.5 * seen[-1]
        return now[0]

    monkeypatch.setattr(step_profile, "_train", train)
    monkeypatch.setattr(step_profile, "_now", clock)
    monkeypatch.setattr(step_profile, "_peak", lambda device: {"cpu": 3.0 + 0.25 * seen[-1]})
    measured = dry_run(tiny(tmp_path / "run", batch_size=12, accumulate=2))
    assert seen == [2, 4]
    assert measured.extrapolated
    assert measured.seconds_per_step == pytest.approx(2 * (1.0 + 0.5 * 6))
    assert measured.memory_gb == {"cpu": pytest.approx(3.0 + 0.25 * 6)}
    assert measured.shapes["global views"][0] == 2 * 6


# device and arithmetic


def test_a_device_that_is_not_there(tiny: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"device 'cuda', and this torch \(.*\) sees none"):
        go(tiny(tmp_path / "run", device="cuda"))
    assert not (tmp_path / "run").exists()


def test_precision_is_chosen_with_a_reason() -> None:
    alone = World(0, 1, torch.device("cpu"), "")
    assert runtime.precision("bf16", alone) == runtime.Precision("bf16", "as requested")
    auto = runtime.precision("auto", alone)
    assert auto.name in ("bf16", "float32")
    assert "measured" in auto.reason


def test_all_processes_take_the_first_ones_precision() -> None:
    class Second(World):
        def gather(self, value: object) -> list[object]:
            assert value is None, "only the main process measures"
            return [runtime.Precision("bf16", "as measured there"), None]

    assert runtime.precision("auto", Second(1, 2, torch.device("cpu"), "")).reason == "as measured there"


def test_bf16_trains_and_goes_on_bit_for_bit(tiny: Any, tmp_path: Path, state: Any, equal_runs: Any) -> None:
    """On a CPU; the weights, the centres and the optimiser are float32."""
    go(tiny(tmp_path / "whole", precision="bf16", epochs=1))
    go(tiny(tmp_path / "run", precision="bf16", epochs=1, stop_after=3))
    assert go(tiny(tmp_path / "run", precision="auto", epochs=1), resume=True).finished  # as it was resolved then
    equal_runs(tmp_path / "run", tmp_path / "whole")
    assert {value.dtype for value in state(tmp_path / "run").values()} == {torch.float32}


# every way to corrupt and to cut


@pytest.mark.parametrize(
    "over",
    [
        {"masking": {"fill": "zeros", "replace_probability": 0.3}, "views": {"local_views": 0}},
        {
            "masking": {"fill": "noise", "combine": True, "replace_probability": 1},
            "views": {"local_views": 3, "roll": 1.0, "mel_warp": 0.2, "stretch": 0.3, "gain_db": 6},
        },
        {
            "masking": {"fill": "time", "align": True},
            "encoder": {"drop_path": 0.0, "patch_frames": 8, "patch_mels": 32},
        },
        {"masking": {"fill": "freq", "replace": 0.0}, "losses": {"local_tokens": "masked"}, "accumulate": 2},
        {
            "masking": {"official_bounds": True, "align": True},
            "heads": {"share_prototypes": True, "train_norm": True, "patch_prototypes": 64},
        },
        {"masking": {"drop": 0.0}, "optim": {"clip_per_parameter": False, "clip": 0.5}},
        {"masking": {"drop": 1.0, "replace": 1.0, "replace_probability": 0.5}},
    ],
    ids=str,
)
def test_every_setting_trains(over: dict[str, Any], tiny: Any, tmp_path: Path, metrics: Any) -> None:
    run = tmp_path / "run"
    assert go(tiny(run, **over, stop_after=2)).step == 2
    lines = metrics(run)
    assert all(np.isfinite([line["loss"], *line["parts"].values()]).all() for line in lines)
    assert lines[0]["parts"]["mask_share"] > 0


# records


def test_collapse_gauges_and_schedules_are_recorded(tiny: Any, tmp_path: Path, metrics: Any) -> None:
    go(tiny(tmp_path / "run", records={"log_every": 3}))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [3, 6, 8]  # the last step always
    for line in lines:
        assert {"lr", "weight_decay", "teacher_momentum", "teacher_temperature", "epoch", "loss"} <= line.keys()
        assert set(line["parts"]) == {
            *("global", "local", "reconstruction", "gradient_norm", "feature_spread", "mask_share"),
            *("teacher_entropy_class", "teacher_entropy_patch", "centre_norm_class", "centre_norm_patch"),
        }
        assert 0 < line["parts"]["teacher_entropy_class"] <= np.log(64)
        assert 0 < line["parts"]["teacher_entropy_patch"] <= np.log(48)
        assert 0 < line["parts"]["feature_spread"] <= 1
        total = line["parts"]["global"] + line["parts"]["local"] + 2 * line["parts"]["reconstruction"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_where_to_stop_is_said_of_one_call(tiny: Any, tmp_path: Path) -> None:
    go(tiny(tmp_path / "run", stop_after=1))
    kept = yaml.build(PretrainSettings, yaml.read_yaml(tmp_path / "run" / "config.yaml"), "kept")
    assert kept.stop_after == 0
    assert go(kept, resume=True).finished


def test_only_the_named_splits_are_heard(tiny: Any, tmp_path: Path, recordings: Path) -> None:
    files = sorted(path for path in recordings.rglob("*") if path.suffix == ".wav")
    rows = [f"{path},{'Training' if i % 2 else 'test'}" for i, path in enumerate(files)]
    table = tmp_path / "table.csv"
    table.write_text("path,split\n" + "\n".join(rows) + "\n")
    go(tiny(tmp_path / "run", data=table, splits=("train",), batch_size=2, stop_after=1))
    listed = Catalogue.read(tmp_path / "run" / "catalogue.jsonl")
    assert set(listed.texts("split")) == {"Training"}
    again = go(tiny(tmp_path / "run", data=table, splits=("train",), batch_size=2, stop_after=2), resume=True)
    assert again.step == 2
    with pytest.raises(CatalogueError, match=r"there is no split tets; did you mean test\?"):
        go(tiny(tmp_path / "other", data=table, splits=("tets",)))
