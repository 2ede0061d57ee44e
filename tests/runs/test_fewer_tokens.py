"""Runs with left-out patches, several masks and losses on a share: stopped, with workers, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from asit.config import PretrainSettings
from asit.model.audio_model import AudioModel
from asit.pretrain import pretrain_run as runs

FEWER: dict[str, Any] = {
    "masking": {"align": True, "keep": 0.5, "copies": 2, "donor_pool": 4},
    "losses": {"local_share": 0.5, "local_tokens": "masked", "reconstruction_tokens": "masked"},
}


def go(settings: PretrainSettings, **how: Any) -> int:
    return 0 if runs.pretrain(settings, **how).finished else 1


def test_stopped_and_with_a_worker_it_ends_as_if_never_stopped(
    tiny: Any, tmp_path: Path, state: Any, same: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert go(tiny(whole, **FEWER)) == 0
    assert go(tiny(parts, **FEWER, stop_after=3, workers=1)) == 1
    assert go(tiny(parts, **FEWER), resume=True) == 0
    same(state(parts), state(whole))
    assert any(name.startswith("task/student.decoder.blocks.0") for name in state(whole))
    encoder = AudioModel.load(whole / "model").encoder.state_dict()
    assert not [name for name in encoder if "decoder" in name or "mask_token" in name]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(parallel: str, tiny: Any, tmp_path: Path, ranks: Any, state: Any) -> None:
    """After one step AdamW's first moment is a tenth of the gradient, of every parameter."""
    over = {**FEWER, "batch_size": 16, "stop_after": 1, "optim": {"freeze_last_layer": 0, "clip": 0}}
    assert go(tiny(tmp_path / "one", **over)) == 1
    ended = ranks(2, lambda: go(tiny(tmp_path / "two", **over, parallel=parallel)))
    assert [e.code for e in ended] == [1, 1], ended
    ours, theirs = state(tmp_path / "two"), state(tmp_path / "one")
    moments = [name for name in theirs if name.endswith("/exp_avg")]
    assert any("decoder" in name for name in moments)
    for name in moments:
        scale = float(theirs[name].abs().max())
        if "attn.qkv.bias" in name:  # the keys' third is 0 but for rounding
            scale = max(scale, float(theirs[name.replace("bias", "weight")].abs().max()))
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5 * scale, msg=name)
