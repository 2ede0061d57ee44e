"""Runs with the classes of examples/research: resume, several processes, what is drawn, mistakes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import asit
from asit.config import PretrainSettings, yaml
from asit.errors import ConfigError
from asit.pretrain import pretrain_run, pretrain_setup
from asit.runtime import World

EXAMPLES = Path(__file__).parents[2] / "examples" / "research"
CUSTOM: dict[str, Any] = {
    "mask": "parts:Spans(share=0.5, columns=1)",
    "view": "parts:Tilt",
    "objective": "parts:TeacherTokens(beta=0.5)",
    "objective_weight": 0.5,
}
ALONE = World(0, 1, torch.device("cpu"), "")
FAMILY: dict[str, Any] = {"family": "parts:ConvStem(channels=4)"}
WRONG = '''
import numpy as np
import torch
from asit.pretrain.custom import Mask, Objective, ViewChange


class Shape(Mask):
    def draw(self, rng, frames, mels, patch):
        return np.zeros((mels, frames + 1), dtype=bool)


class Broken(Mask):
    def draw(self, rng, frames, mels, patch):
        return {}["width"]


class Halved(ViewChange):
    def change(self, rng, view):
        return view[::2]


class Rows(Objective):
    def forward(self, student, teacher, batch, generator):
        return student.cls.mean(1)


class Constant(Objective):
    def forward(self, student, teacher, batch, generator):
        return torch.zeros(())


class Noisy(Objective):
    """A loss that needs its own draws."""

    def __init__(self, width, grid, patch):
        super().__init__(width, grid, patch)
        self.scale = torch.nn.Linear(width, 1)

    def forward(self, student, teacher, batch, generator):
        assert teacher is None
        noise = torch.rand(student.cls.shape, generator=generator, device=generator.device)
        return (self.scale(student.cls * noise) - 1).square().mean()
'''


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`parts` and `wrong_parts` in the working directory; sys.path and sys.modules are put back."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    shutil.copy(EXAMPLES / "parts.py", "parts.py")
    Path("wrong_parts.py").write_text(WRONG, "utf-8")
    yield
    for name in ("parts", "wrong_parts"):
        sys.modules.pop(name, None)


def go(settings: PretrainSettings, **how: Any) -> int:
    return 0 if pretrain_run.pretrain(settings, **how).finished else 1


@pytest.mark.parametrize("own", ["examples", "draws of an objective alone"])
def test_a_stopped_run_equals_one_that_was_not(
    own: str, tiny: Any, tmp_path: Path, equal_runs: Any, state: Any
) -> None:
    """With a worker process in the one, and none in the other."""
    over: dict[str, Any] = {"custom": CUSTOM, "encoder": FAMILY}
    if own != "examples":
        over = {
            "custom": {"objective": "wrong_parts:Noisy"},
            "losses": {"global_weight": 0, "local_weight": 0, "reconstruction_weight": 0},
            "accumulate": 2,
        }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    go(tiny(whole, workers=1, **over))
    for i, stop in enumerate([3, 5, 0]):
        sys.modules.pop("parts", None)
        sys.modules.pop("wrong_parts", None)  # a later process imports it again
        go(tiny(parts, stop_after=stop, **over), resume=i > 0)
    equal_runs(whole, parts, lines=True)
    names = [name for name in state(whole) if name.startswith("task/student.objective.")]
    assert names
    held = yaml.build(PretrainSettings, yaml.read_yaml(whole / "config.yaml"), "config.yaml")
    assert held.custom.mask == over["custom"].get("mask", "")
    other = tmp_path / "other"
    go(tiny(other, stop_after=4, **{**over, "seed": 4}))
    assert any(not torch.equal(state(other)[name], state(whole)[name]) for name in names)


def test_the_drawn_masks_and_views_reach_the_step(tiny: Any, tmp_path: Path) -> None:
    settings = tiny(tmp_path / "run", custom={"mask": "parts:Spans(columns=1)", "view": "parts:Tilt(std=0.5)"})
    made = pretrain_setup.prepare(settings, catalogue := _catalogue(settings), ALONE)
    plain = pretrain_setup.prepare(tiny(tmp_path / "run"), catalogue, ALONE)
    sample, other = made.clips[1, 2], plain.clips[1, 2]
    columns = sample.drop.unflatten(1, (-1, 16)).flatten(2).float().mean(2)
    assert set(columns.unique().tolist()) <= {0.0, 1.0}
    assert not sample.replace.any()
    rng = np.random.default_rng([settings.seed, 3, 1, 2])  # the stream of changes of views
    views = [(sample.clean, other.clean), (sample.local, other.local)]
    for changed, clean in (pair for group in views for pair in zip(*group, strict=True)):
        slope = torch.linspace(-1, 1, 32, dtype=torch.float64) * rng.normal(0.0, 0.5)
        torch.testing.assert_close(changed, (clean + slope).float(), rtol=0, atol=1e-6)


def _catalogue(settings: PretrainSettings) -> Any:
    from asit.data.catalogue.catalogue import Catalogue

    return Catalogue.read(Path(settings.data))


def test_two_processes_equal_one(tiny: Any, tmp_path: Path, ranks: Any, state: Any, close: Any) -> None:
    over = {"custom": CUSTOM, "encoder": FAMILY, "batch_size": 16, "epochs": 2, "optim": {"freeze_last_layer": 0.0}}
    go(tiny(tmp_path / "one", **over))
    ranks(2, lambda: go(tiny(tmp_path / "two", **over)), code=0)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    close(two, one, "task/student.", steps=2 * 2 * 0.05 * 16 / 256)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"custom": {"mask": "wrong_parts:Shape"}}, r"bool of shape \(32, 49\)(.|\n)*shape \(48, 32\)"),
        ({"custom": {"mask": "wrong_parts:Broken"}}, r"raised KeyError: 'width' \(wrong_parts.py, line 14\)"),
        ({"custom": {"view": "wrong_parts:Halved"}}, r"float32 of shape \(24, 32\)(.|\n)*shape \(48, 32\)"),
        ({"custom": {"objective": "wrong_parts:Rows"}}, r"Rows.forward returned torch.float32 of shape \(8,\)"),
        ({"custom": {"objective": "wrong_parts:Constant"}}, "a scalar without a gradient"),
        ({"custom": {"view": "parts:Tilt"}, "front_end_on": "device"}, "take front_end_on loader"),
        ({"encoder": {"family": "parts:Nowhere"}}, "parts has no Nowhere"),
        ({"records": {"callbacks": ["parts:Tilt"]}}, "derived from asit.training.callbacks.Callback"),
    ],
)
def test_mistakes(over: dict[str, Any], message: str, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        go(tiny(tmp_path / "run", **over))
    go(tiny(tmp_path / "run", stop_after=1))  # the folder is still free


def test_another_mask_is_another_run(tiny: Any, tmp_path: Path) -> None:
    go(tiny(tmp_path / "run", custom={"mask": "parts:Spans"}, stop_after=2))
    with pytest.raises(ConfigError, match=re.escape("custom.mask")):
        go(tiny(tmp_path / "run", custom={"mask": "parts:Spans(share=0.2)"}), resume=True)


def test_the_model_of_an_encoder_of_ones_own(
    tiny: Any, tmp_path: Path, recordings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model's card imports nothing: its module must have been imported, or be named by ASIT_IMPORT."""
    go(tiny(tmp_path / "run", encoder=FAMILY, stop_after=2))
    kept = asit.load(tmp_path / "run").embed(recordings / "00.wav", precision="float32").clip
    sys.modules.pop("parts")
    with pytest.raises(ConfigError, match=r"the module parts is not imported(.|\n)*ASIT_IMPORT=parts"):
        asit.load(tmp_path / "run")
    monkeypatch.setenv("ASIT_IMPORT", "parts")
    found = asit.load(tmp_path / "run")
    assert type(found.encoder).__name__ == "ConvStem"
    assert torch.equal(found.embed(recordings / "00.wav", precision="float32").clip, kept)


def test_callbacks(tiny: Any, tmp_path: Path) -> None:
    records = {"callbacks": ["parts:LossFile(name='mine.jsonl')"]}
    go(tiny(tmp_path / "run", records=records, stop_after=3))
    go(tiny(tmp_path / "run", records=records), resume=True)
    entries = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 9))
    assert sorted(entry["step"] for entry in entries if "model" in entry) == [2, 3, 4, 6, 8]
    assert [entry["finished"] for entry in entries if "finished" in entry] == [False, True]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in entries if "loss" in e] == [line["loss"] for line in lines if line["kind"] == "train"]
