"""Recomputed blocks, copies for asynchronous checkpoints, and the newest checkpoints by step."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from torch import Tensor

from asit.config import EncoderSettings
from asit.io import checkpoint
from asit.model.vit import Encoder
from asit.training import distributed
from asit.training.async_checkpoint import Saver


def gradients(encoder: Encoder, x: Tensor, drop: Tensor, bf16: bool) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        tokens = encoder(x, drop)
    (tokens.cls.float().square().sum() + tokens.patches.float().sin().sum()).backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


def test_blocks_computed_again_give_the_same_gradients_and_keep_less() -> None:
    plain = Encoder(EncoderSettings(size="custom", width=32, depth=3, heads=2), 64, 32)
    again = copy.deepcopy(plain)
    distributed.recompute(again)
    g = torch.Generator().manual_seed(0)
    x, drop = torch.randn(6, 1, 64, 32, generator=g), (torch.rand(3, 2, 6, generator=g) > 0.4).float() * 1.5
    kept: dict[bool, int] = {}
    for bf16 in (False, True):
        ours, theirs = gradients(again, x, drop, bf16), gradients(plain, x, drop, bf16)
        assert ours.keys() == theirs.keys() == dict(plain.named_parameters()).keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        for module in (plain, again):
            module.zero_grad()
    for module in (plain, again):
        saved: set[int] = set()
        total = 0

        def pack(t: Tensor, saved: set[int] = saved) -> Tensor:
            nonlocal total
            if t.data_ptr() not in saved and not isinstance(t, torch.nn.Parameter):
                saved.add(t.data_ptr())
                total += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(x, drop)
        kept[module is again] = total
    assert kept[True] < kept[False] / 3
    assert plain.state_dict().keys() == again.state_dict().keys()


def test_copies_stay_as_they_were_and_their_memory_is_used_again() -> None:
    with Saver() as saver:
        weight = torch.arange(4.0)
        first = saver.copy({"w": weight})
        weight += 1
        assert first["w"].tolist() == [0, 1, 2, 3]
        saver.start(lambda: None)
        saver.settle()
        second = saver.copy({"w": weight})
        assert second["w"].tolist() == [1, 2, 3, 4]
        assert second["w"].data_ptr() == first["w"].data_ptr()
    with Saver(background=False) as saver:
        assert saver.copy({"w": weight})["w"] is weight


def test_the_last_checkpoints_are_those_of_the_last_steps_whatever_their_times(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save_state(tmp_path, step, {"w": torch.zeros(1)}, {}, keep=2)
        os.utime(path, (1e9 - step * 86400, 1e9 - step * 86400))
    assert [p.name for p in checkpoint.list_states(tmp_path)] == ["step-00000002", "step-00000003"]
    latest = checkpoint.latest_state(tmp_path)
    assert latest is not None
    assert latest.name == "step-00000003"
