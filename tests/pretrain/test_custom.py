"""Names of one's own classes in settings, and what they lead to; tests/runs/test_custom_run.py has the runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asit.config import PretrainSettings, custom_classes
from asit.errors import ConfigError
from asit.pretrain.custom import Mask

MODULE = """
from dataclasses import dataclass

import numpy as np

from asit.pretrain.custom import Mask


@dataclass
class Columns(Mask):
    share: float = 0.5

    def draw(self, rng, frames, mels, patch):
        mask = np.zeros((frames, mels), dtype=bool)
        mask[rng.random(frames) < self.share] = True
        return mask


class Wrong(Mask):
    def draw(self, rng, frames):
        return None


class Missing(Mask):
    pass


def function(rng, frames, mels, patch):
    return None
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`own_classes.py` in the working directory, and sys.path and sys.modules as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "own_classes.py").write_text(MODULE, "utf-8")
    yield
    sys.modules.pop("own_classes", None)


# names


@dataclasses.dataclass
class Here(Mask):
    width: int = 3
    name: str = "a, b"

    def draw(self, rng: Any, frames: int, mels: int, patch: tuple[int, int]) -> Any: ...


def test_a_class_or_an_instance_becomes_its_name() -> None:
    name = f"{__name__}:Here"
    assert custom_classes.name_of(Here) == name
    text = custom_classes.name_of(Here(width=5))
    assert text == f"{name}(width=5, name='a, b')"
    assert custom_classes.split(text) == (__name__, "Here", {"width": 5, "name": "a, b"})
    settings = PretrainSettings(custom={"mask": Here(4)})
    assert settings.custom.mask == f"{name}(width=4, name='a, b')"
    assert PretrainSettings.model_validate(json.loads(settings.model_dump_json())) == settings
    assert "custom" not in PretrainSettings().model_dump()  # old settings stay the same bytes


@pytest.mark.parametrize(
    "text",
    ["columns", "a:B(", "a:B(1)", "a:B(x=y)", "a b:C", "a:B + 1", "a:", ":B", "a:B(**{})", "a:B(x=__import__('os'))"],
)
def test_names_that_cannot_be(text: str) -> None:
    with pytest.raises(ValueError, match="write module:Class"):
        PretrainSettings(custom={"mask": text})


def test_a_class_without_a_name_is_refused() -> None:
    class Local(Here): ...

    with pytest.raises(ValueError, match="defined within a function"):
        PretrainSettings(custom={"mask": Local})
    with pytest.raises(ValueError, match="which is no dataclass"):
        PretrainSettings(custom={"view": object()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere_at_all:Mask", "importing nowhere_at_all failed: ModuleNotFoundError(.|\n)*set PYTHONPATH"),
        ("own_classes:Colums", "own_classes has no Colums"),
        ("own_classes:function", "own_classes:function is not one(.|\n)*derived from asit.pretrain.custom.Mask"),
        ("subprocess:Popen(args='true')", "subprocess:Popen(.*) is not one"),
        ("own_classes:Wrong", r"draw is draw\(self, rng, frames\)(.|\n)*draw\(self, rng: .*, frames: .*, mels"),
        ("own_classes:Missing", "draw is not defined"),
        ("own_classes:Columns(width=3)", r"unexpected keyword argument 'width'(.|\n)*Columns\(share"),
    ],
)
def test_what_a_name_leads_to_is_checked(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        custom_classes.find(text, Mask, "custom.mask")  # type: ignore[type-abstract]
