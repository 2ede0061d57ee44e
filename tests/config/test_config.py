"""Settings in and out of YAML, mistakes reported all at once, and the presets against what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from asit.commands.train import PretrainOptions
from asit.config import FinetuneSettings, PretrainOptimSettings, PretrainSettings, presets
from asit.config import yaml as config
from asit.errors import ConfigError
from asit.terminal import options as parse

# YAML


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((PretrainSettings, n) for n in ("default", "paper", "official-v2")), (FinetuneSettings, "esc50")],
)
def test_settings_go_through_yaml_unchanged(kind: Any, name: str, tmp_path: Path) -> None:
    mine: dict[str, Any] = {"optim": {"lr": 1e-5}, "data": "Ä: #x"}
    mine |= {"heads": {"reconstruction_hidden": [3, 4]}} if kind is PretrainSettings else {}
    settings = presets.build(kind, name, None, mine)
    for text in (config.to_yaml(settings), config.annotated(settings)):
        (tmp_path / "c.yaml").write_text(text, "utf-8")
        again = config.build(kind, config.read_yaml(tmp_path / "c.yaml"), "c.yaml")
        assert again == settings
        assert presets.build(kind, None, tmp_path / "c.yaml") == settings
        assert config.differences(settings, again) == {}


def test_annotated_settings_explain_each_one() -> None:
    lines = config.annotated(PretrainSettings()).splitlines()
    for name in config.names(PretrainSettings):
        leaf = name.rsplit(".", 1)[-1]
        assert any(line.strip().startswith(f"{leaf}:") for line in lines), name
    at = lines.index("  teacher_temperature_start: 0.04")
    assert lines[at - 1] == "  # Teacher temperature at the start."


def test_every_setting_says_what_it_is() -> None:
    def walk(kind: type[BaseModel]) -> None:
        for name, field in kind.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)
            else:
                assert field.description, f"{kind.__name__}.{name}"

    walk(PretrainSettings)
    walk(FinetuneSettings)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("optim: [", r"is not YAML"),
        ("- 1\n- 2\n", r"holds a list(.|\n)*a mapping of settings to values"),
        ("just words", r"holds a str"),
        (b"\xff\xfe\x00", r"is not YAML"),
    ],
)
def test_files_that_are_no_settings(text: str | bytes, found: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=found):
        config.read_yaml(file)


def test_a_file_that_is_not_there_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        config.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert config.read_yaml(tmp_path / "empty.yaml") == {}


# mistakes


def test_all_mistakes_are_told_at_once_with_the_nearest_name() -> None:
    wrong: dict[str, Any] = {
        "epoch": 3,
        "optim": {"lrr": 1, "betas": [0.9], "clip": -1, "warmup": "soon"},
        "masking": {"drop": 1.5, "fil": "zeros", "fill": "snow"},
        "encodr": {"size": "tiny"},
        "losses": {"teacher_temprature": 0.1},
        "views": {"prototypes": 3},
        "xyzzy": 1,
        "batch_size": 0,
    }
    with pytest.raises(ConfigError) as caught:
        config.build(PretrainSettings, wrong, "mine.yaml")
    text = str(caught.value)
    assert text.startswith("mine.yaml: ")
    assert "settings do not fit" in text
    for message in (
        "epoch: no such setting, did you mean epochs?",
        "optim.lrr: no such setting, did you mean optim.lr?",
        "masking.fil: no such setting, did you mean masking.fill?",
        "encodr: no such setting, did you mean encoder?",
        "losses.teacher_temprature: no such setting, did you mean losses.teacher_temperature?",
        "masking.drop: input should be less than or equal to 1, found 1.5",
        "optim.clip: input should be greater than or equal to 0, found -1",
        "batch_size: input should be greater than or equal to 1, found 0",
        "'snow'",
        "'soon'",
    ):
        assert message in text, message
    assert "xyzzy: no such setting\n" in text
    lines = text.splitlines()
    assert len(lines) == len(set(lines))
    assert "asit settings" in caught.value.remedy


def test_a_name_of_another_group_is_found_by_its_last_part() -> None:
    assert (
        config.nearest("teacher_momentum", config.names(PretrainSettings)) == ", did you mean optim.teacher_momentum?"
    )
    assert config.nearest("optim.mel_warp", config.names(PretrainSettings)) == ", did you mean views.mel_warp?"
    assert config.nearest("qqqqqq", config.names(PretrainSettings)) == ""


def test_a_wrong_assignment_is_refused_too() -> None:
    settings = PretrainOptimSettings()
    with pytest.raises(ValidationError):
        settings.lr = -1.0
    with pytest.raises(ValidationError):
        PretrainSettings(epoch=3)  # type: ignore[call-arg]


def test_mistakes_in_a_file_are_told_of_the_file_and_not_of_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("maskin: {drop: 0.5}\n")
    with pytest.raises(
        ConfigError, match=r"mine\.yaml: 1 setting does not fit(.|\n)*maskin: no such setting, did you mean masking\?"
    ):
        presets.build(PretrainSettings, "paper", file)
    with pytest.raises(ConfigError, match=r"no preset is called papr, did you mean paper\?(.|\n)*official-v2"):
        presets.build(PretrainSettings, "papr")


# merging


def test_merge_leaves_both_as_they_were() -> None:
    base, over = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 1}}
    assert config.merge(base, over) == {"a": {"b": 9, "c": 2}, "d": {"e": 1}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert config.nested([("a.b", 9), ("d", 3), ("a.c", 2)]) == {"a": {"b": 9, "c": 2}, "d": 3}
    left, right = PretrainSettings(seed=1), PretrainSettings(seed=1, optim={"lr": 1.0}, views={"seconds": 2})  # type: ignore[arg-type]
    assert config.differences(left, right) == {"optim.lr": (5e-4, 1.0), "views.seconds": ("auto", 2.0)}


def test_preset_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: paper\nepochs: 7\nmasking: {drop: 0.6, replace: 0.2}\n")
    found = presets.build(PretrainSettings, None, file, {"masking": {"drop": 0.4}})
    assert (found.preset, found.epochs) == ("paper", 7)
    assert (found.masking.drop, found.masking.replace) == (0.4, 0.2)
    assert found.front_end.rate == 32000  # the preset's
    assert presets.build(PretrainSettings, "official-v2", file).preset == "official-v2"
    assert presets.build(PretrainSettings).preset == "default"


@pytest.mark.parametrize(
    ("kind", "recipe", "given"), [(PretrainSettings, "paper", {}), (FinetuneSettings, "esc50", {"model": "none"})]
)
def test_a_run_gone_on_with_keeps_its_own_settings(kind: Any, recipe: str, given: Any, tmp_path: Path) -> None:
    own = presets.build(kind, recipe, None, {"epochs": 3, "out": "elsewhere", "data": "there", **given})
    (tmp_path / "config.yaml").write_text(config.to_yaml(own))
    found = presets.build_for(kind, tmp_path, None, None, {"data": "", **dict.fromkeys(given, "")}, resume=True)
    assert found == own.changed({"out": str(tmp_path)})
    changed = presets.build_for(kind, tmp_path, None, None, {"data": "moved", "epochs": 4}, resume=True)
    assert changed == found.changed({"data": "moved", "epochs": 4})
    assert presets.build_for(kind, tmp_path, None, None, {}, resume=False).epochs > 4


def test_a_files_out_holds_unless_another_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("out: from-file\n")
    assert presets.build_for(PretrainSettings, "", None, file, {}, resume=False).out == "from-file"
    assert presets.build_for(PretrainSettings, "given", None, file, {}, resume=False).out == "given"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("epochs: 3\n")
    assert presets.build_for(PretrainSettings, "", None, None, {}, resume=True).epochs == 100  # no run was named


# presets against the published settings

BOTH: dict[str, Any] = {
    "epochs": 100,
    "front_end": {"mels": 128, "window_ms": 25, "shift_ms": 10, "mean": -4.2677393, "std": 4.5689974},
    "views": {"segment_seconds": 10, "seconds": 6, "gain_db": 0, "stretch": 0, "mel_warp": 0},
    "masking": {
        **{"replace": 0.3, "replace_probability": 0.5, "combine": False, "align": False, "fill": "zeros"},
        "max_block": 0.3,
    },
    "encoder": {"size": "base", "drop_path": 0.1},
    "heads": {"hidden": 2048, "bottleneck": 256},
    "losses": {
        **{"local_tokens": "all", "student_temperature": 0.1, "teacher_temperature_start": 0.04},
        **{"teacher_temperature": 0.07, "centre_momentum": 0.9},
    },
    "optim": {
        **{"lr": 5e-4, "min_lr": 1e-6, "warmup": 10, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip": 3},
        **{"clip_per_parameter": True, "teacher_momentum": 0.996, "teacher_momentum_end": 1},
    },
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "paper": {
        "front_end": {"rate": 32000},
        "views": {"roll": 0.5, "local_views": 0},
        "masking": {"drop": 0.7},
        "heads": {
            **{"class_prototypes": 8192, "patch_prototypes": 1024, "share_prototypes": False, "train_norm": False},
            "reconstruction_hidden": (768, 768, 128),
        },
        "losses": {"global_weight": 1, "local_weight": 1, "reconstruction_weight": 2, "teacher_warmup": 30},
        "batch_size": 4 * 32,
        "optim": {"freeze_last_layer": 0},
    },
    "official-v2": {
        "front_end": {"rate": 16000},
        "views": {"roll": 0, "local_views": 4},
        "masking": {"drop": 0.5},
        "heads": {
            **{"class_prototypes": 8192, "patch_prototypes": 8192, "share_prototypes": True, "train_norm": True},
            "reconstruction_hidden": "auto",
        },
        "losses": {"global_weight": 0.5, "local_weight": 0.5, "reconstruction_weight": 1, "teacher_warmup": 5},
        "batch_size": 4 * 20,
        "optim": {"freeze_last_layer": 1},
    },
}
OURS: dict[str, Any] = {
    "front_end": {"low_hz": 20, "high_hz": 0, "preemphasis": 0.97},
    "encoder": {"patch_frames": 16, "patch_mels": 16, "mlp_ratio": 4},
}
"""Defaults that are Kaldi's or the only ones there are, which the presets leave out."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_what_was_published(name: str) -> None:
    """Written down in the preset itself, wherever our default may be tuned."""
    settings = dict(config.flat(presets.build(PretrainSettings, name).model_dump()))
    written = dict(config.flat(presets.read_recipe(PretrainSettings, name)))
    published = dict(config.flat(config.merge(BOTH, PUBLISHED[name])))
    assert {dotted: settings[dotted] for dotted in published} == published
    assert published.keys() - written.keys() == set()
    ours = dict(config.flat(OURS))
    assert {dotted: settings[dotted] for dotted in ours} == ours
    assert name == "paper" or settings["views.local_seconds"] == 2


@pytest.mark.parametrize("kind", [PretrainSettings, FinetuneSettings])
def test_recipes_are_whole_and_readable(kind: type[PretrainSettings | FinetuneSettings]) -> None:
    for name in presets.recipes(kind):
        built, written = presets.build(kind, name), presets.read_recipe(kind, name)
        assert getattr(built, kind.RECIPE) == name
        assert built.model_dump() == config.build(kind, written, name).model_dump()
        assert yaml.safe_dump(written)


# tasks

PROTOCOLS: dict[str, dict[str, Any]] = {
    "audioset-2m": {  # AudioMAE
        **{"epochs": 100, "batch_size": 256, "labels": "multi", "input.seconds": 10, "loss.kind": "bce"},
        **{"optim.lr": 2e-4, "optim.warmup": 10, "optim.layer_decay": 0.75, "augment.mixup_probability": 0.5},
        **{"augment.mel_mask": 48, "augment.time_mask": 192, "sampling.order": "balanced"},
        **{"sampling.epoch_clips": 200_000, "sides.train": ("balanced", "unbalanced")},
    },
    "audioset-20k": {  # AudioMAE's length, EAT's rest
        **{"epochs": 60, "batch_size": 32, "labels": "multi", "loss.kind": "bce", "optim.lr": 5e-5},
        **{"optim.layer_decay": 0.65, "augment.mixup": 0.8, "sides.train": ("balanced",), "sampling.order": "shuffle"},
    },
    "esc50": {  # EAT
        **{"batch_size": 48, "labels": "single", "input.seconds": 5, "sides.fold": "all", "loss.smoothing": 0.1},
        **{"validation.every": 0, "augment.mixup": 0},
    },
    "speech-commands-v1": {  # SUPERB, SSAST
        **{"batch_size": 32, "sampling.order": "inverse", "network.pooling": "mean", "optim.lr": 1e-4},
        **{"input.seconds": 1, "validation.every": 1},
    },
    "speech-commands-v2": {  # AST
        **{"batch_size": 128, "epochs": 30, "optim.lr": 2.5e-4, "optim.schedule": "step", "optim.step_from": 5},
        **{"optim.step_every": 1, "optim.step_factor": 0.85, "augment.mixup": 10, "augment.mixup_probability": 0.6},
        **{"augment.mel_mask": 48, "augment.time_mask": 48, "augment.roll_seconds": 0.1, "loss.kind": "bce"},
        **{"optim.betas": (0.95, 0.999), "optim.weight_decay": 5e-7, "validation.every": 1},
    },
    "voxceleb1": {  # M2D, SSAST
        **{"batch_size": 64, "epochs": 50, "optim.lr": 5e-4, "input.seconds": 8, "network.pooling": "mean"},
        **{"augment.mel_mask": 30, "augment.time_mask": 48, "augment.mixup": 0, "sides.shared_groups": True},
    },
}


@pytest.mark.parametrize("task", PROTOCOLS)
def test_tasks_are_what_their_sources_say(task: str) -> None:
    settings, small = (presets.build(FinetuneSettings, name) for name in (task, f"{task}-cpu"))
    found = dict(config.flat(settings.model_dump()))
    assert {dotted: found[dotted] for dotted in PROTOCOLS[task]} == PROTOCOLS[task]
    assert (small.task, small.epochs < settings.epochs) == (f"{task}-cpu", True)
    kept = ("labels", "loss.kind", "sampling.order", "network.pooling", "validation.every")
    theirs = dict(config.flat(small.model_dump()))
    assert small.sides == settings.sides
    assert [theirs[dotted] for dotted in kept] == [found[dotted] for dotted in kept]
    assert "base" not in presets.read_recipe(FinetuneSettings, f"{task}-cpu")


def test_all_tasks_are_named() -> None:
    assert set(presets.recipes(FinetuneSettings)) == {"any", *PROTOCOLS, *(f"{task}-cpu" for task in PROTOCOLS)}
    with pytest.raises(ConfigError, match=r"no task is called esc-50, did you mean esc50"):
        presets.build(FinetuneSettings, "esc-50")


def test_a_file_and_overrides_go_over_a_task(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: esc50\noptim: {lr: 0.001, warmup: 2}\n")
    found = presets.build(FinetuneSettings, None, tmp_path / "mine.yaml", {"optim": {"warmup": 3}})
    assert (found.task, found.optim.lr, found.optim.warmup, found.sides.fold) == ("esc50", 0.001, 3, "all")
    assert presets.build(FinetuneSettings).task == "any"
    with pytest.raises(ConfigError, match=r"optim\.lrs: no such setting, did you mean optim\.lr"):
        presets.build(FinetuneSettings, "any", None, {"optim": {"lrs": 1}})


# one setting given alone


@pytest.mark.parametrize(
    ("preset", "given", "found"),
    [
        ("speech", {"epochs": 1}, {"optim.warmup": "auto"}),
        ("speech", {"epochs": 2}, {"optim.warmup": 1.0}),
        ("paper", {"epochs": "5"}, {"optim.warmup": "auto", "losses.teacher_warmup": 30.0}),
        ("paper", {"epochs": 5, "optim": {"warmup": 10}}, {"optim.warmup": 10.0}),
        ("speech", {"encoder": {"size": "small"}}, {"encoder.width": None, "encoder.heads": None}),
        ("speech", {"encoder": {"depth": 3}}, {"encoder.size": "custom", "encoder.width": 192, "encoder.depth": 3}),
        ("speech", {"encoder": {"width": 1000}}, {"encoder.size": "custom", "encoder.depth": 6, "encoder.heads": 10}),
        ("speech", {"encoder": {"width": 384}}, {"encoder.heads": 3}),
        ("paper", {"encoder": {"width": 256}}, {"encoder.size": "custom", "encoder.depth": 12, "encoder.heads": 4}),
        ("paper", {"encoder": {"width": 1000}}, {"encoder.heads": 10}),
        ("paper", {"encoder": {"depth": 6}}, {"encoder.width": 768, "encoder.depth": 6, "encoder.heads": 12}),
        ("paper", {"encoder": {"size": "tiny", "width": 64}}, {"encoder.size": "tiny", "encoder.width": 64}),
        ("speech", {"front_end": {"mels": 80}}, {"encoder.patch_mels": 80}),
        ("speech", {"front_end": {"mels": 80}, "encoder": {"patch_mels": 40}}, {"encoder.patch_mels": 40}),
        ("paper", {"front_end": {"mels": 64}}, {"encoder.patch_mels": 16}),
        ("default", {"heads": {"share_prototypes": True}}, {"heads.patch_prototypes": 512}),
        ("official-v2", {"heads": {"patch_prototypes": 512}}, {"heads.class_prototypes": 512}),
        ("paper", {"heads": {"class_prototypes": 512}}, {"heads.patch_prototypes": 1024}),
    ],
)
def test_what_one_setting_rules_out_is_derived(preset: str, given: dict[str, Any], found: dict[str, Any]) -> None:
    values = dict(config.flat(presets.build(PretrainSettings, preset, None, given).model_dump()))
    assert {name: values[name] for name in found} == found
    # The same from the command line.
    base = presets.build(PretrainSettings, preset)
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in config.flat(given)]
    options = parse.parse(PretrainOptions, "asit pretrain", "x", flags, default=PretrainOptions(**base.model_dump()))
    settings = parse.settings_of(PretrainSettings, base, options, flags)
    values = dict(config.flat(settings.model_dump()))
    assert {name: values[name] for name in found} == found


def test_a_file_s_values_give_way_to_flags_as_a_recipe_s_do(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(config.to_yaml(presets.build(PretrainSettings, "speech")))
    settings = presets.build(PretrainSettings, None, tmp_path / "run.yaml", {"epochs": 1, "encoder": {"size": "tiny"}})
    assert (settings.preset, settings.optim.warmup, settings.encoder.width) == ("speech", "auto", None)
    assert presets.build(FinetuneSettings, "esc50", None, {"epochs": 10}).optim.warmup == "auto"


def test_settings_of_the_other_kind_of_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: paper\nviews: {seconds: 3}\n")
    with pytest.raises(ConfigError, match=r"holds settings of pretraining: preset: paper(.|\n)*use asit pretrain"):
        presets.build(FinetuneSettings, None, tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml holds settings of pretraining"):
        presets.build_for(FinetuneSettings, tmp_path, None, None, {}, resume=True)
    (tmp_path / "mine.yaml").write_text("task: esc50\n")
    with pytest.raises(ConfigError, match=r"holds settings of fine-tuning: task: esc50(.|\n)*use asit finetune"):
        presets.build(PretrainSettings, None, tmp_path / "mine.yaml")
