"""Pretraining that continues from a model: its weights, its front end and encoder, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import asit
from asit import cli, runtime
from asit.config import EncoderSettings, FinetuneSettings, FrontEndSettings, PretrainSettings, presets, yaml
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, CheckpointError, ConfigError
from asit.finetune import init_model
from asit.interop import huggingface
from asit.interop.convert import SourceOptions, convert
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.encoders import empty_encoder
from asit.pretrain import continued, pretrain_setup
from asit.pretrain import pretrain_run as runs
from asit.tools.run_estimate import dry_run

FRONT_END = FrontEndSettings(rate=8000, mels=32, mean=-7.0, std=3.0)
ENCODER = EncoderSettings(size="custom", width=32, depth=2, heads=2, drop_path=0.3)
CPU = torch.device("cpu")
Settings = Callable[..., PretrainSettings]


def source(
    folder: Path,
    frames: int = 48,
    labels: Labelling | None = None,
    training: dict[str, Any] | None = None,
    **encoder: Any,
) -> Path:
    """A model folder with drawn weights."""
    settings, generator = ENCODER.changed(encoder), torch.Generator().manual_seed(1)
    made = empty_encoder(settings, frames, FRONT_END.mels)
    made.init_weights(generator)
    with torch.no_grad():
        for parameter in made.parameters():  # biases and norms too, which begin as zeros and ones
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    head = Head(32, len(labels.classes), labels.pooling) if labels else None
    AudioModel.from_parts(made, FRONT_END, settings, frames, training or {"step": 7}, head, labels).save(folder)
    return folder


@pytest.fixture
def settings(tiny: Any) -> Settings:
    """Settings of a tiny run that continues from a model, with the front end and the encoder left to its card."""

    def make(out: Path, model: Path | str, **over: Any) -> PretrainSettings:
        groups = {name: over.pop(name) for name in presets.MODEL_GROUPS if name in over}
        values = tiny(out, **over).model_dump(exclude=set(presets.MODEL_GROUPS))
        return PretrainSettings(**{**values, **groups, "model": str(model)})

    return make


def begun(settings: PretrainSettings) -> pretrain_setup.PretrainSetup:
    """The run before its first step."""
    effective, found = continued.start(settings)
    return pretrain_setup.prepare(effective, Catalogue.read(Path(settings.data)), runtime.World(0, 1, CPU, ""), found)


def weights(model: Path) -> dict[str, Tensor]:
    return AudioModel.load(model).encoder.state_dict()


# the first weights


def test_after_no_steps_the_model_is_the_source_bit_for_bit(settings: Settings, tmp_path: Path, same: Any) -> None:
    model = source(tmp_path / "model")
    setup = begun(settings(tmp_path / "run", model))
    assert setup.frames == 48
    same(setup.task.student.encoder.state_dict(), weights(model))
    setup.model(0).save(tmp_path / "saved")
    same(weights(tmp_path / "saved"), weights(model))
    ours, theirs = AudioModel.load(tmp_path / "saved"), AudioModel.load(model)
    assert ours.front_end.settings == theirs.front_end.settings == FRONT_END
    assert ours.encoder.settings == ENCODER.changed({"drop_path": 0.1})  # stochastic depth is of the run


@pytest.mark.parametrize("frames", [32, 48, 96])
def test_teacher_equals_student_and_positions_are_those_of_fine_tuning(
    frames: int, settings: Settings, tmp_path: Path, same: Any
) -> None:
    model = source(tmp_path / "model", frames)
    setup = begun(settings(tmp_path / "run", model))
    student, teacher = setup.task.student, setup.task.teacher
    assert teacher is not None
    state = student.state_dict()
    same(teacher.state_dict(), {name: state[name] for name in teacher.state_dict()})
    tuning = FinetuneSettings(model=str(model))
    start = init_model.origin(tuning, init_model.pretrained(tuning), setup.catalogue)
    resolved = tuning.changed({"encoder": start.encoder.model_dump(), "front_end": start.front_end.model_dump()})
    same(
        student.encoder.state_dict(),
        init_model.build(start, resolved, setup.frames, ("a", "b"), False).encoder.state_dict(),
    )


def test_heads_are_fresh_and_seeded(settings: Settings, tmp_path: Path) -> None:
    model = source(tmp_path / "model")

    def heads(**over: Any) -> Tensor:
        projection = begun(settings(tmp_path / "run", model, **over)).task.student.projection
        assert projection is not None
        return torch.cat([parameter.detach().flatten() for parameter in projection.parameters()])

    assert torch.equal(heads(), heads())
    assert not torch.equal(heads(), heads(seed=4))


def test_image_weights(settings: Settings, image_file: Path, tmp_path: Path) -> None:
    """The encoder and the front end are of the settings, and the grey filter is the sum of the three colours'."""
    squares = {"patch_frames": 16, "patch_mels": 16}
    encoder = {"size": "custom", "width": 64, "depth": 2, "heads": 1, **squares}
    setup = begun(settings(tmp_path / "run", image_file, encoder=encoder, front_end={"rate": 8000, "mels": 32}))
    state, ours = safetensors.torch.load_file(image_file), setup.task.student.encoder.state_dict()
    torch.testing.assert_close(ours["patch_embed.proj.weight"], state["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert torch.equal(ours["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert setup.model(0).training["continued_from"]["kind"] == "image weights"
    with pytest.raises(CheckpointError, match="is 64 wide and has 2 blocks"):
        runs.pretrain(settings(tmp_path / "run", image_file, encoder=squares))
    assert not (tmp_path / "run").exists()


# what the model is


def test_every_folder_that_asit_loads(settings: Settings, tmp_path: Path, caplog: Any, same: Any) -> None:
    caplog.set_level("INFO", "asit")
    labels = Labelling(("high", "low"), False, "class+mean", 0.6)
    model = source(tmp_path / "run" / "model", labels=labels, training={"step": 7, "license": "CC-BY-4.0"})
    (tmp_path / "run" / "config.yaml").touch()
    huggingface.write(AudioModel.load(model), tmp_path / "exported")
    official = {f"backbone.{name}": value for name, value in weights(source(tmp_path / "plain", width=64)).items()}
    torch.save({"teacher": {**official, "head.last_layer.weight_g": torch.ones(1)}}, tmp_path / "official.pth")
    for given in (model, tmp_path / "run", tmp_path / "exported"):
        caplog.clear()
        setup = begun(settings(tmp_path / "new", given))
        same(setup.task.student.encoder.state_dict(), weights(model))
        facts = setup.model(0).training["continued_from"]
        assert (facts["model"], facts["kind"], facts["license"]) == (str(given), "audio-classifier", "CC-BY-4.0")
        assert facts["training"]["step"] == 7
        assert (
            f"The head of {given} (2 classes) is left out: the encoder alone is pretrained further" in caplog.messages
        )
    options = SourceOptions(kind="asit", mels=32, rate=8000, mean=-7.0, std=3.0)
    convert(tmp_path / "official.pth", options).model.save(tmp_path / "converted")
    setup = begun(settings(tmp_path / "new", tmp_path / "converted"))
    same(setup.task.student.encoder.state_dict(), weights(tmp_path / "converted"))
    assert setup.model(0).training["continued_from"]["training"]["source"]["file"] == "official.pth"


def test_an_encoder_with_a_distillation_token_takes_a_step(settings: Settings, tmp_path: Path) -> None:
    model = source(tmp_path / "model", distilled=True)
    result = runs.pretrain(settings(tmp_path / "run", model, stop_after=1))
    assert AudioModel.load(result.model).encoder.settings.distilled


def test_statistics(settings: Settings, listed: Path, tmp_path: Path, caplog: Any) -> None:
    """The card's, unless others are given; the data's own are logged."""
    caplog.set_level("INFO", "asit")
    model, header = source(tmp_path / "model"), Catalogue.read(listed).header
    own = f"the data's own are {header['mean']:.4f} and {header['std']:.4f}"
    begun(settings(tmp_path / "run", model))
    assert f"Log-mel mean -7.0000 and std 3.0000 are used; {own}" in caplog.messages
    setup = begun(settings(tmp_path / "run", model, front_end={"mean": "auto", "std": 2.0, "padding": "repeat"}))
    found = setup.settings.front_end
    assert (found.mean, found.std, found.padding) == (header["mean"], 2.0, "repeat")
    faster = tmp_path / "faster"
    AudioModel.from_parts(
        AudioModel.load(model).encoder, FRONT_END.changed({"rate": 16000}), ENCODER, 48, {"step": 7}
    ).save(faster)
    begun(settings(tmp_path / "run", faster))
    assert any(
        "own are not known: the catalogue's mean and std were measured under" in line for line in caplog.messages
    )
    assert any(
        line.startswith("16 of 16 recordings have a lower rate than the model's 16000") for line in caplog.messages
    )


# resuming


def test_parts_equal_the_whole_without_the_source(
    settings: Settings, tmp_path: Path, equal_runs: Any, same: Any
) -> None:
    model = source(tmp_path / "model", 96)
    runs.pretrain(settings(tmp_path / "whole", model))
    runs.pretrain(settings(tmp_path / "run", model, stop_after=3))
    shutil.rmtree(model)
    for stop in (5, 0):  # the same command again, which names no front end or encoder
        result = runs.pretrain(settings(tmp_path / "run", model, stop_after=stop), resume=True)
    assert result.finished
    equal_runs(tmp_path / "run", tmp_path / "whole", lines=True)
    same(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))
    cards = [json.loads((tmp_path / name / "model" / "card.json").read_text()) for name in ("run", "whole")]
    assert cards[0] == cards[1]
    assert cards[0]["training"]["continued_from"]["training"] == {"step": 7}
    assert yaml.read_yaml(tmp_path / "run" / "config.yaml")["model"] == str(model)


def test_a_run_without_a_checkpoint_begins_from_the_model(settings: Settings, tmp_path: Path, equal_runs: Any) -> None:
    model = source(tmp_path / "model")
    runs.pretrain(settings(tmp_path / "whole", model, stop_after=2))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    runs.pretrain(settings(tmp_path / "run", model, stop_after=2), resume=True)
    equal_runs(tmp_path / "run", tmp_path / "whole", lines=True)


def test_a_run_s_settings_repeat_it(settings: Settings, tmp_path: Path, equal_runs: Any) -> None:
    model = source(tmp_path / "model")
    runs.pretrain(settings(tmp_path / "first", model, stop_after=2, front_end={"mean": -6.0}))
    again = presets.build(PretrainSettings, None, tmp_path / "first" / "config.yaml", {"out": str(tmp_path / "second")})
    runs.pretrain(again.changed({"stop_after": 2}))
    equal_runs(tmp_path / "first", tmp_path / "second", lines=True)


# settings


def test_the_preset_and_what_is_left_to_the_card(tmp_path: Path) -> None:
    def built(**given: Any) -> PretrainSettings:
        return presets.build_for(PretrainSettings, "", given.pop("preset", None), given.pop("file", None), given)

    assert (built().preset, built(model="").preset) == ("default", "default")
    gentle, usual = built(model="RUN/model"), built()
    assert gentle.preset == "adapt"
    assert gentle.optim.lr < usual.optim.lr
    assert gentle.optim.teacher_momentum > usual.optim.teacher_momentum
    assert gentle.optim.warmup / gentle.epochs > 0.1
    (tmp_path / "mine.yaml").write_text("model: RUN/model\nencoder: {width: 64}\n")
    assert built(file=tmp_path / "mine.yaml").preset == "adapt"
    assert built(file=tmp_path / "mine.yaml").encoder.model_fields_set == {"width"}  # nothing is derived from it
    paper = built(model="RUN/model", preset="paper", front_end={"mels": 64})
    assert (paper.preset, paper.front_end.rate) == ("paper", 16000)
    assert paper.front_end.model_fields_set == {"mels"}
    # Image weights have no card: the preset's front end and encoder are theirs, below what is set.
    image = presets.with_model_groups(built(model="vit.pth", preset="paper", encoder={"width": 64}))
    assert (image.front_end.rate, image.encoder.size, image.encoder.heads) == (32000, "custom", 1)
    assert built(model="vit.pth").preset == "adapt"


CONTRADICTIONS = [
    "front_end.mels is 128, and 32 in the card",
    "front_end.window_ms is 20.0, and 25.0 in the card",
    "encoder.size is base (width, depth and heads (768, 12, 12)), and (32, 2, 2) in the card",
    "encoder.patch_frames is 8, and 16 in the card",
]


def test_contradictions_are_told_all_at_once(
    tmp_path: Path, listed: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are the defaults count where they are given, and presets' do not."""
    model = source(tmp_path / "model")
    named = "--front-end.mels 128 --front-end.window-ms 20 --encoder.size base --encoder.patch-frames 8 --preset paper"
    given = ["--model", str(model), "--data", str(listed), "--out", str(tmp_path / "run"), *named.split()]
    for extra in ([], ["--dry-run"]):
        assert cli.main(["pretrain", *given, *extra]) == 2
        said = capsys.readouterr().err
        for line in (f"pretraining cannot continue from {model}, in 4 points:", *CONTRADICTIONS, "leave out --model"):
            assert line in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    groups = {"front_end": {"mels": 128, "window_ms": 20.0}, "encoder": {"size": "base", "patch_frames": 8}}
    with pytest.raises(ConfigError) as caught:
        asit.pretrain(listed, tmp_path / "run", model=model, **groups)
    assert all(line in str(caught.value) for line in CONTRADICTIONS)
    same = {"front_end": {"mels": 32, "mean": -6.0}, "encoder": {"width": 32, "heads": 2, "drop_path": 0.2}}
    settings = presets.build(PretrainSettings, None, None, {"model": str(model), **same})
    found, _ = continued.start(settings.changed({"epochs": 60}))
    assert (found.front_end.mean, found.front_end.std) == (-6.0, 3.0)
    assert found.encoder == ENCODER.changed({"drop_path": 0.2})


def overlapping(folder: Path) -> Path:
    return source(folder, patch_stride_frames=8, patch_stride_mels=8)


def not_finite(folder: Path) -> Path:
    model = AudioModel.load(source(folder))
    with torch.no_grad():
        model.encoder.pos_embed[0, 0, 0] = torch.nan
    model.save(folder, overwrite=True)
    return folder


def a_file(folder: Path) -> Path:
    folder.with_suffix(".json").write_text("{}")
    return folder.with_suffix(".json")


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "over", "messages"),
    [
        (lambda path: path / "nowhere", {}, ["nowhere does not exist", "check the path"]),
        (lambda path: path.with_suffix(".pth"), {}, ["model.pth does not exist", "check the path"]),
        (empty, {}, ["holds no model: it is empty", "give a model's folder"]),
        (a_file, {}, ["is a file", "give a model's folder"]),
        (not_finite, {}, ["1 tensors with numbers that are not finite (pos_embed)", "take an earlier checkpoint"]),
        (overlapping, {}, ["patches of (16, 16) overlap, with a stride of (8, 8)", "--encoder.patch-stride-frames 16"]),
        (
            overlapping,
            {"front_end": {"mels": 64}},
            ["in 2 points", "front_end.mels is 64, and 32 in the card", "overlap"],
        ),
        (
            source,
            {"encoder": {"patch_stride_frames": 8}},
            ["a stride of (8, 16)", "pretraining needs patches side"],
        ),
        (lambda path: "none", {}, ["model is none", "leave out model"]),
        (source, {"epochs": 1, "optim": {"warmup": 3}}, ["the warm-up must end before the run"]),
    ],
)
def test_bad_input(
    make: Any, over: dict[str, Any], messages: list[str], settings: Settings, tmp_path: Path, recordings: Path
) -> None:
    model = make(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AsitError) as caught:
        runs.pretrain(settings(tmp_path / "run", model, data=recordings, **over))
    for message in messages:
        assert message in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_positions_of_overlapping_patches_may_be_resized(settings: Settings, tmp_path: Path) -> None:
    strides = {"patch_stride_frames": 16, "patch_stride_mels": 16}
    setup = begun(settings(tmp_path / "run", overlapping(tmp_path / "model"), encoder=strides))
    assert setup.task.student.encoder.grid == (3, 2)


def test_a_dry_run(settings: Settings, tmp_path: Path) -> None:
    model = source(tmp_path / "model")
    measured = dry_run(settings(tmp_path / "run", model))
    assert measured.shapes["patch grid (time, mel)"] == [3, 2]
    assert f"model: {model}" in measured.settings
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
