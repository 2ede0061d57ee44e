"""Model folders and run states: exact, in order, and each damage named."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from asit.errors import CheckpointError
from asit.io import checkpoint
from asit.io.checkpoint import (
    latest_state,
    list_states,
    load_model,
    load_state,
    load_strict,
    save_model,
    save_state,
)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(6, 4, generator=generator)
    return {
        "float": big,
        "alias": big,
        "part": big[1:3],
        "turned": big.t(),
        "half": torch.randn(3, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "count": torch.tensor([2**62, -1]),
        "rng": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
        "parameter": nn.Parameter(torch.ones(2)),
    }


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# Models


def test_a_full_disk_in_safetensors_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:  # what safetensors 0.8 raised on a full tmpfs
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_model(tmp_path / "m", {"a": torch.zeros(1)}, {})
    assert names(tmp_path) == set()


def test_a_model_comes_back_exactly(tmp_path: Path) -> None:
    given, card = tensors(), {"kind": "k", "third": 1 / 3, "nested": {"a": [1, None]}}
    save_model(tmp_path / "m", given, card)
    assert names(tmp_path / "m") == {"model.safetensors", "card.json"}
    got, read = load_model(tmp_path / "m")
    assert got.keys() == given.keys()
    for name, tensor in given.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert {name: read[name] for name in card} == card
    assert read["format"] == 1
    assert len(read["sha256"]) == 64
    save_model(tmp_path / "m", given, {**read, "sha256": "stale", "format": 99}, overwrite=True)
    assert load_model(tmp_path / "m")[1] == read


def test_each_damage_of_a_model_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(CheckpointError, match=r"m does not exist\n.*model.safetensors and card.json"):
        load_model(folder)
    save_model(folder, {"a": torch.zeros(100)}, {})
    weights, card = folder / "model.safetensors", folder / "card.json"
    whole, text = weights.read_bytes(), card.read_text()
    flip(weights, -1)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: its SHA-256"):
        load_model(folder)
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(folder)
    weights.write_bytes(whole)
    card.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(
        CheckpointError, match=r"has format 2, written by asit .*\n.*format 1 or older.*\n.*pip install --up"
    ):
        load_model(folder)
    for bad in ("{", "[]", "{}", '{"format": 1}'):
        card.write_text(bad)
        with pytest.raises(CheckpointError, match=r"card.json is damaged"):
            load_model(folder)
    card.unlink()
    with pytest.raises(CheckpointError, match=r"has no card\.json"):
        load_model(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a folder"):
        load_model(weights)


def test_a_runs_folder_points_to_its_model(tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "model", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match=r"a run's folder\n.*\n.*give .*run.model"):
        load_model(tmp_path / "run")


# Run states


def test_a_state_comes_back_exactly_and_the_newest_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert list_states(root) == []
    assert latest_state(root) is None
    meta = {"rng": 2**127 + 1, "loss": 0.1 + 0.2}
    for step in (5, 20, 100000000, 7):
        assert save_state(root, step, tensors(), {**meta, "step": step}, keep=3) == root / f"step-{step:08d}"
    got, read = load_state(root / "step-00000020")
    assert torch.equal(got["rng"], tensors()["rng"])
    assert {name: read[name] for name in meta} == meta
    assert [p.name for p in list_states(root)] == ["step-00000005", "step-00000007", "step-00000020", "step-100000000"]
    save_state(root, 21, {"a": torch.zeros(1)}, {}, keep=2)
    assert names(root) == {"step-00000020", "step-00000021", "step-100000000"}
    assert latest_state(root) == root / "step-100000000"


def test_an_old_state_goes_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, 1, {"a": torch.zeros(1)}, {}, keep=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_pair", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        save_state(tmp_path, 2, {"a": torch.zeros(1)}, {}, keep=1)
    assert names(tmp_path) == {"step-00000001"}


def test_drafts_are_no_states_and_the_next_save_removes_them(tmp_path: Path) -> None:
    (tmp_path / ".step-00000009.tmp-123").mkdir()
    (tmp_path / ".step-00000009.tmp-123" / "state.safetensors").write_bytes(b"half")
    assert latest_state(tmp_path) is None
    save_state(tmp_path, 10, {"a": torch.zeros(1)}, {}, keep=2)
    assert names(tmp_path) == {"step-00000010"}


def test_a_damaged_newest_state_names_the_older_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_state(tmp_path, step, {"a": torch.zeros(9)}, {}, keep=3)
    newest = tmp_path / "step-00000003"
    flip(newest / "state.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"damaged(.|\n)*fix:      remove .*step-00000003 and .*step-00000002$"):
        load_state(newest)
    facts = newest / "state.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99(.|\n)*upgrade asit"):
        load_state(newest)
    facts.unlink()
    with pytest.raises(CheckpointError, match=r"has no state.json(.|\n)*from .*step-00000002$"):
        load_state(newest)
    flip(tmp_path / "step-00000001" / "state.safetensors", -1)
    with pytest.raises(CheckpointError, match="no older state beside it"):
        load_state(tmp_path / "step-00000001")


@pytest.mark.parametrize("step", [1, 2**70, True, "2", None, 2.0])
def test_a_state_says_the_step_of_its_folder(tmp_path: Path, step: Any) -> None:
    save_state(tmp_path, 2, {"a": torch.zeros(9)}, {"step": step}, keep=3)
    with pytest.raises(CheckpointError, match=r"says step .*, and its folder is step-00000002(.|\n)*remove"):
        load_state(tmp_path / "step-00000002")


def test_numbers_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_state(tmp_path / "c", 1, {}, {"loss": float("nan")}, keep=1)
    assert names(tmp_path / "c") == set()


# Modules


def test_strict_loading_lists_what_does_not_fit_and_changes_nothing() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    bad = {"0.weight": torch.zeros(4, 2), "0.bias": torch.zeros(3), **{f"x{i}": torch.zeros(1) for i in range(5)}}
    with pytest.raises(CheckpointError) as raised:
        load_strict(module, bad, "w.safetensors")
    text = str(raised.value)
    assert "w.safetensors does not fit the Sequential" in text
    assert "2 missing (1.weight, 1.bias)" in text
    assert "5 unexpected (x0, x1, x2, ...)" in text
    assert "1 of another shape (0.weight (4, 2) instead of (3, 2))" in text
    assert "another size" in text
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    good = {name: torch.full_like(value, 2.0) for name, value in before.items()}
    load_strict(module, good, "w")
    assert all((value == 2).all() for value in module.state_dict().values())


def test_a_card_is_plain_json(tmp_path: Path) -> None:
    save_model(tmp_path / "m", {"a": torch.zeros(1)}, {"b": 1})
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert set(card) == {"b", "format", "asit", "sha256"}
