"""The grids: every arm can be run over every preset, and no two are the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asit.config import PretrainSettings, presets
from asit.config.pretrain_settings import check
from asit.errors import ConfigError
from asit.study import grids
from asit.study.grids import COST, Grid, arm_settings

NAMES = grids.names()


def test_the_studies_are_those_of_the_documentation(repository: Path) -> None:
    assert NAMES == ["alignment", "corruption", "length", "losses", "masked-share", "strategies", "views"]
    page = (repository / "docs/study.md").read_text("utf-8")
    assert [name for name in NAMES if f"| `{name}` |" not in page] == []


def test_the_grid_of_the_documentation_is_read(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs/study.md").read_text("utf-8").split("```\n")[-2]
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    grid = grids.read(str(tmp_path / "mine.yaml"))
    base = presets.build(PretrainSettings, "default", None, {"epochs": 10})
    arms = arm_settings(grid, base, lambda: 10.0)
    assert (arms["paper"].preset, arms["slow"].epochs, grid.length("slow")) == ("paper", 20, 2.0)
    assert (arms["short"].views.seconds, arms["short"].masking.align, grid.axis) == (3.0, True, COST)


@pytest.mark.parametrize("preset", presets.recipes(PretrainSettings))
@pytest.mark.parametrize("name", NAMES)
def test_every_arm_can_be_run_and_is_another(name: str, preset: str) -> None:
    grid, base = grids.read(name), presets.build(PretrainSettings, preset)
    arms = arm_settings(grid, base, lambda: 10.0)
    assert list(arms) == list(grid.arms)
    assert grid.source
    for settings in arms.values():
        check(settings)
    dumped = {json.dumps(settings.model_dump(mode="json")) for settings in arms.values()}
    assert len(dumped) == len(arms) > 1
    if grid.axis:
        places = [grid.place(arm) for arm in arms]
        assert places == sorted(places)


def test_multiples_follow_epochs_and_clips() -> None:
    base = presets.build(PretrainSettings, "default", None, {"epochs": 8})
    lengths = arm_settings(grids.read("length"), base, lambda: 10.0)
    assert [settings.epochs for settings in lengths.values()] == [2, 4, 8, 16, 32]
    views = arm_settings(grids.read("views"), base, lambda: 1.0)
    np.testing.assert_allclose([float(s.views.seconds) for s in views.values()], [0.2, 0.4, 0.6, 0.8, 1.0])


def test_shares_of_the_area_are_what_is_masked() -> None:
    base = presets.build(PretrainSettings, "paper")
    for arm, settings in arm_settings(grids.read("masked-share"), base, lambda: 10.0).items():
        share = int(arm.removeprefix("masked-")) / 100
        assert (settings.masking.drop, settings.masking.replace) == (share, share)


def test_an_arm_may_name_a_preset_and_keeps_what_was_given() -> None:
    base = presets.build(PretrainSettings, "default", None, {"epochs": 3, "encoder": {"size": "tiny"}})
    grid = Grid("own", "", {"here": {}, "there": {"preset": "speech", "optim.lr": 0.01}}, "here")
    there = arm_settings(grid, base, lambda: 1.0)["there"]
    assert (there.preset, there.epochs, there.optim.lr, there.encoder.size) == ("speech", 3, 0.01, "tiny")
    assert there.encoder.patch_mels == 128


def test_a_file_of_ones_own_is_read_and_faults_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"

    def read(text: str, *chosen: str) -> Grid:
        file.write_text(text, "utf-8")
        return grids.read(str(file), chosen)

    grid = read(f"axis: {COST}\narms:\n  a:\n  b: {{optim: {{lr: 0.1}}}}\n", "b")
    assert (grid.name, grid.arms, grid.reference) == ("mine", {"b": {"optim.lr": 0.1}}, "b")
    for text, said in (
        ("arms: []", "holds no arms"),
        ("arm: {a: {}}", "has no arm to read"),
        ("arms: {a/b: {}}", "arms named a/b"),
        ("arms: {a-s0: {}}", "arms named a-s0"),
        ("arms: {alpha: {}}\nreference: alfa", "no arm alfa, did|no arm alfa; did"),
        ("axis: share\narms: {a: {}}", "no place on the axis share"),
    ):
        with pytest.raises(ConfigError, match=said):
            read(text)
    base = PretrainSettings()
    with pytest.raises(ConfigError, match="arms a and b have the same settings"):
        arm_settings(read("arms: {a: {}, b: {seed: 0}}"), base, lambda: 1.0)
    with pytest.raises(ConfigError, match=r"(?s)arm a: .*no such setting"):
        arm_settings(read("arms: {a: {masking.dorp: 1}}"), base, lambda: 1.0)
    with pytest.raises(ConfigError, match="no study is called loses; did you mean losses"):
        grids.read("loses")
