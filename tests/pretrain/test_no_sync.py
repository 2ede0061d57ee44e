"""A step asks nothing of the accelerator: on meta tensors, which have no values, it would fail where it does.

A meta tensor takes the same path as one on a GPU, and refuses `.item()`, `nonzero`, `bool()` and copies to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asit.config import PretrainSettings
from asit.data.loading.crops import StackedCrops
from asit.model import vit
from asit.pretrain import masking, method, token_selection
from asit.pretrain.pretrain_dataset import DeviceViews, PretrainBatch
from asit.pretrain.pretrain_resolve import resolve
from asit.runtime import Precision, World
from asit.training import optim
from asit.training.trainable import Now

META = torch.device("meta")
FRAMES, SHORT, CLIPS = 64, 32, 4
WAVES = {"mel_warp": 0.1, "gain_db": 3.0, "stretch": 0.1, "local_views": 2}
SETTINGS: dict[str, Any] = {
    "batch_size": CLIPS,
    "epochs": 2,
    "front_end": {"rate": 8000, "mels": 32, "mean": -8.0, "std": 3.5},
    "views": WAVES,
    "encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2},
    "heads": {"hidden": 32, "bottleneck": 16, "class_prototypes": 64, "patch_prototypes": 48},
}


def stacked(parts: list[Any]) -> Tensor | None:
    return None if parts[0] is None else torch.from_numpy(np.stack(parts, 1)).flatten(0, 1)


def drawn(settings: PretrainSettings, device: torch.device) -> PretrainBatch:
    """A batch as the loader gives it: crops and bits of masks; copied to the device."""
    rng = np.random.default_rng(0)
    copies = settings.masking.copies
    seen, rows, local = copies * 2 * CLIPS, 2 * CLIPS, settings.views.local_views * CLIPS
    chosen = [
        token_selection.choose(
            rng,
            [masking.draw(rng, FRAMES, 32, settings.masking) for _ in range(copies * 2)],
            settings.masking,
            settings.losses,
            (16, 16),
        )
        for _ in range(CLIPS)
    ]
    masks = [one.masks[view] for view in range(copies * 2) for one in chosen]
    rates = vit.drop_path_rates(settings.encoder)
    factors = np.stack([vit.draw_drop_path(rng, rates) for _ in range(seen + local)])
    bits = [np.packbits(np.stack([getattr(m, name) for m in masks]), axis=-1)[:, None] for name in ("drop", "replace")]
    waveforms = rng.normal(0, 0.1, (CLIPS, 8000)).astype(np.float32)
    lengths = np.concatenate([np.full(rows, FRAMES + 2), np.full(local, SHORT)])
    batch = PretrainBatch(
        clean=torch.zeros(rows, 1, 0, 32),
        local=torch.zeros(local, 1, 0, 32) if local else None,
        drop=torch.from_numpy(bits[0]),
        replace=torch.from_numpy(bits[1]),
        donor=torch.from_numpy(masking.donor_rows(rng.random((CLIPS, copies * 2)), 4)) % rows,
        factors=torch.from_numpy(factors).permute(1, 2, 0).contiguous(),
        ids=[str(i) for i in range(CLIPS)],
        crops=StackedCrops(
            torch.from_numpy(waveforms),
            torch.full((CLIPS,), 98),
            torch.from_numpy(np.stack([rng.integers(0, 20, rows + local), lengths], 1)),
            torch.ones(rows + local, 2),
        ),
        keep=stacked([one.keep for one in chosen]),
        tokens=stacked([one.local for one in chosen]),
    )
    if device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device)


def step(given: Mapping[str, Any], device: torch.device, prepared: Any = None) -> Tensor:
    """One whole step but for the loop's own checks: views, losses, gradients, clipping, AdamW, teacher and centres."""
    settings = resolve(PretrainSettings(**{**SETTINGS, **given}))
    world = World(0, 1, device, "a test")
    task = method.ASiT(settings, FRAMES, torch.Generator().manual_seed(0), device)
    optimiser = optim.adamw(task.trainable().named_parameters(), settings.optim.betas)
    views = DeviceViews(settings, (FRAMES, SHORT), device)
    precision = Precision("bf16" if device.type == "cuda" else "float32", "")
    batch = drawn(settings, device)
    if prepared is not None:  # the first step sets up what may wait
        prepared(lambda: _step(task, optimiser, views(batch), precision, world))
    return _step(task, optimiser, views(batch), precision, world)


def _step(task: method.ASiT, optimiser: Any, batch: PretrainBatch, precision: Precision, world: World) -> Tensor:
    now = Now(50, 100, 50, measure=True)
    optim.set_rates(optimiser, 1e-3, 0.1)
    output = task.step(batch, now, precision, world)
    output.loss.backward()  # type: ignore[no-untyped-call]
    task.gradients_ready(now)
    gradients = [p.grad for p in task.trainable().parameters() if p.grad is not None]
    optim.clip(gradients, 3.0, per_parameter=True)
    optimiser.step()
    task.after_update(now, world)
    return output.loss.detach()


CASES: list[dict[str, Any]] = [
    {},
    {"losses": {"local_tokens": "masked"}, "masking": {"fill": "time", "combine": True}},
    {"heads": {**SETTINGS["heads"], "patch_prototypes": 64, "share_prototypes": True, "train_norm": True}},
    {"views": {**WAVES, "local_views": 0}, "optim": {"clip_per_parameter": False}},
    {
        "masking": {"align": True, "keep": 0.5, "copies": 2},
        "losses": {"local_share": 0.5, "local_tokens": "masked", "reconstruction_tokens": "masked"},
    },
]
NAMES = ["plain", "masked tokens", "shared prototypes", "two views", "fewer tokens"]


@pytest.mark.parametrize("given", CASES, ids=NAMES)
def test_a_step_asks_nothing_of_the_accelerator(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # The fused AdamW has no form without values; both forms leave the host alone (the gpu test has it).
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **kw: adamw(*args, **{**kw, "fused": False}))
    loss = step(given, META)
    assert loss.device == META
    assert loss.shape == ()


def test_the_proof_would_notice() -> None:
    x = torch.ones(3, device=META)
    for ask in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), lambda: x[x > 0], lambda: x.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.gpu
@pytest.mark.parametrize("given", CASES, ids=NAMES)
def test_a_step_never_waits_for_the_gpu(given: dict[str, Any]) -> None:
    def prepared(once: Any) -> None:
        once()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    try:
        loss = step(given, torch.device("cuda"), prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(torch.isfinite(loss))


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu() -> None:
    for expected, found in zip(
        (step(given, torch.device("cpu")) for given in CASES),
        (step(given, torch.device("cuda")) for given in CASES),
        strict=True,
    ):
        assert float(found) == pytest.approx(float(expected), rel=2e-2)
