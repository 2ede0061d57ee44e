"""The losses against float64 loops, against plain torch, and against numbers of both official versions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from asit.config import LossSettings
from asit.pretrain import chunked_loss, losses

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "official_losses.json").read_text())
V1 = LossSettings()
V2 = LossSettings(global_weight=0.5, local_weight=0.5, reconstruction_weight=1.0)


def rows(n: int, k: int, seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Student logits and teacher probabilities."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * scale, torch.randn(n, k, generator=g).mul(3).softmax(-1)


def h(p: Any, s: Any, temperature: float) -> float:
    """- sum p log softmax(s / temperature) of one row, by Python floats."""
    z = [float(x) / temperature for x in s]
    top = max(z)
    norm = top + math.log(math.fsum(math.exp(x - top) for x in z))
    return -math.fsum(float(a) * (b - norm) for a, b in zip(p, z, strict=True))


def plain(s: Tensor, p: Tensor, temperature: float) -> Tensor:
    return -(p * (s / temperature).log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_cross_entropy_and_its_gradient_equal_float64(scale: float) -> None:
    s, p = rows(11, 17, 0, scale)
    s.requires_grad_()
    found = losses.cross_entropy(s, p, 0.1)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([h(p[i], s[i].detach(), 0.1) for i in range(11)], rel=2e-6)
    weights = torch.linspace(-1, 2, 11)
    (found * weights).sum().backward()
    s64 = s.detach().double().requires_grad_()
    (plain(s64, p.double(), 0.1) * weights.double()).sum().backward()
    assert s.grad is not None
    assert s64.grad is not None
    torch.testing.assert_close(s.grad.double(), s64.grad, rtol=1e-5, atol=1e-5)


def test_rows_need_not_sum_to_one() -> None:
    s, p = rows(5, 17, 1)
    p = p * torch.tensor([0.5, 1.0, 2.0, 5.0, 0.0]).unsqueeze(-1)
    a, b = s.clone().requires_grad_(), s.double().requires_grad_()
    losses.cross_entropy(a, p, 0.2).sum().backward()
    plain(b, p.double(), 0.2).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_lose_only_their_own_rounding(autocast: bool) -> None:
    s, p = rows(9, 501, 2)
    low, low_p = s.bfloat16().requires_grad_(), p.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = losses.cross_entropy(low, low_p, 0.1)
        found.sum().backward()
    exact = s.bfloat16().double().requires_grad_()
    wanted = plain(exact, low_p.double(), 0.1)
    wanted.sum().backward()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert low.grad is not None
    assert exact.grad is not None
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    s, p = rows(50, 64, 3)
    s.requires_grad_()
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses.cross_entropy(s, p, 0.1)
    assert sorted(kept) == sorted([s.data_ptr(), p.data_ptr()])


def test_nothing_flows_back_to_the_teacher() -> None:
    s, p = rows(4, 10, 4)
    s.requires_grad_()
    t = rows(4, 10, 14)[0].requires_grad_()
    probs = losses.teacher_distribution(t, torch.zeros(10), 0.04)
    assert not probs.requires_grad
    p.requires_grad_()
    losses.cross_entropy(s, p, 0.1).sum().backward()
    assert p.grad is None


def test_teacher_distribution_equals_scipy() -> None:
    g = torch.Generator().manual_seed(5)
    logits, centre = torch.randn(3, 7, 13, generator=g), torch.randn(13, generator=g)
    wanted = scipy.special.softmax((logits.double() - centre.double()).numpy() / 0.05, axis=-1)
    found = losses.teacher_distribution(logits, centre, 0.05)
    assert found.shape == (3, 7, 13)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-5, atol=1e-12)


def test_entropy_equals_scipy_and_knows_its_ends() -> None:
    _, p = rows(10, 33, 6)
    np.testing.assert_allclose(losses.entropy(p).numpy(), scipy.stats.entropy(p.double().numpy(), axis=-1), rtol=1e-5)
    ends = torch.stack([torch.eye(33)[3], torch.full((33,), 1 / 33)])
    assert losses.entropy(ends).tolist() == pytest.approx([0.0, math.log(33)], abs=1e-6)
    assert losses.entropy(p.view(2, 5, 33)).shape == (2, 5)


def test_the_centre_moves_to_the_mean_once_a_step_however_many_micro_batches() -> None:
    logits = torch.randn(12, 9, generator=torch.Generator().manual_seed(7))
    centre = losses.Centre(9)
    start = torch.linspace(-1, 1, 9)
    centre.value.copy_(start)
    for part in logits.split(5):
        centre.collect(part)
        assert torch.equal(centre.value, start), "the centre must stay while the step lasts"
    losses.update_centres([centre], 0.9)
    wanted = 0.9 * start.double() + 0.1 * logits.double().mean(0)
    torch.testing.assert_close(centre.value.double(), wanted, rtol=1e-6, atol=1e-7)
    moved = centre.value.clone()
    losses.update_centres([centre], 0.9)
    assert torch.equal(centre.value, moved), "what was collected is used once"
    assert list(centre.state_dict()) == ["value"]


def test_the_centre_averages_over_all_processes_by_their_numbers_of_tokens() -> None:
    here, there = torch.randn(10, 5, generator=torch.Generator().manual_seed(12)).split([8, 2])

    def add_other(x: Tensor) -> None:
        x += torch.cat([there.sum(0), torch.tensor([2.0])])

    centre = losses.Centre(5)
    centre.collect(here.reshape(2, 4, 5))
    losses.update_centres([centre], 0.5, add_other)
    wanted = 0.5 * torch.cat([here, there]).mean(0)
    torch.testing.assert_close(centre.value, wanted)
    idle = losses.Centre(5)
    losses.update_centres([idle], 0.5, add_other)
    torch.testing.assert_close(idle.value, 0.5 * there.mean(0))
    losses.update_centres([idle], 0.5, lambda x: None)
    torch.testing.assert_close(idle.value, 0.5 * there.mean(0))


def test_masked_l1_equals_a_loop_and_ignores_what_is_outside() -> None:
    g = torch.Generator().manual_seed(8)
    p, t = torch.randn(2, 1, 6, 5, generator=g), torch.randn(2, 1, 6, 5, generator=g)
    mask = torch.rand(2, 1, 6, 5, generator=g) < 0.4
    p[~mask] = float("nan")
    p.requires_grad_()
    found = losses.masked_l1(p, t, mask, mask.sum())
    picked = [abs(float(p[i].detach()) - float(t[i])) for i in np.ndindex(2, 1, 6, 5) if mask[i]]
    assert float(found.detach()) == pytest.approx(math.fsum(picked) / len(picked), rel=1e-6)
    found.backward()
    assert p.grad is not None
    assert torch.equal(p.grad[~mask], torch.zeros_like(p.grad[~mask]))
    assert torch.equal(p.grad[mask], (p.detach() - t).sign()[mask] / mask.sum())
    none = torch.zeros_like(mask)
    found = losses.masked_l1(p, t, none, none.sum())
    assert found.item() == 0.0
    assert not torch.autograd.grad(found, p)[0].any()


@pytest.mark.parametrize(("teachers", "students", "pairs"), [(2, 2, 2), (2, 6, 10), (1, 3, 2), (3, 2, 4)])
def test_global_loss_is_the_mean_over_all_pairs_of_different_views(teachers: int, students: int, pairs: int) -> None:
    g = torch.Generator().manual_seed(9)
    s = torch.randn(students, 4, 15, generator=g)
    p = torch.randn(teachers, 4, 15, generator=g).mul(2).softmax(-1)
    terms = [h(p[i, b], s[j, b], 0.1) for i in range(teachers) for j in range(students) if i != j for b in range(4)]
    assert len(terms) == 4 * pairs
    wanted = pytest.approx(math.fsum(terms) / len(terms), rel=1e-6)
    assert losses.global_loss(s, p, 0.1).item() == wanted
    assert losses.global_loss(list(s), p, 0.1).item() == wanted


def test_global_loss_refuses_a_single_view() -> None:
    with pytest.raises(ValueError, match="two different views"):
        losses.global_loss(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1 / 3), 0.1)


def wave(shape: tuple[int, ...], step: float, phase: float) -> Tensor:
    index = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy(np.sin(step * index + phase).reshape(shape)).float()


@pytest.mark.parametrize(("version", "settings", "students"), [("v1", V1, 2), ("v2", V2, 6)])
def test_two_steps_give_the_numbers_of_the_official_code(version: str, settings: LossSettings, students: int) -> None:
    size = GOLDEN["inputs"]["sizes"]
    b, n = size["clips"], size["patches"]
    k_class = size.get(f"{version}_class_prototypes", size["v2_prototypes"])
    k_patch = size.get(f"{version}_patch_prototypes", size["v2_prototypes"])
    class_centre, patch_centre = losses.Centre(k_class), losses.Centre(k_patch)
    for c, wanted in enumerate(GOLDEN[version]):
        tau = wanted["teacher_temperature"]
        t_class, s_class = wave((2, b, k_class), 0.7, c), wave((students, b, k_class), 1.3, 2 + c)
        t_patch, s_patch = wave((2 * b, n, k_patch), 0.9, 3 + c), wave((2 * b, n, k_patch), 1.1, 4 + c)
        p_class = losses.teacher_distribution(t_class, class_centre.value, tau)
        shape = (2 * b, 1, size["frames"], size["mels"])
        mask = wave(shape, 0.05, 2 + c) > 0.2
        found = {
            "global": losses.global_loss(s_class, p_class, settings.student_temperature),
            "local": chunked_loss.local_loss(
                *(chunked_loss.Projected(x.flatten(0, 1), torch.eye(k_patch)) for x in (s_patch, t_patch)),
                patch_centre.value,
                (settings.student_temperature, tau),
                dtype=torch.float32,
            )[0],
            "reconstruction": losses.masked_l1(wave(shape, 0.47, 1 + c), wave(shape, 0.31, c), mask, mask.sum()),
        }
        found["total"] = sum(found[part] * getattr(settings, f"{part}_weight") for part in list(found))
        for part, value in found.items():
            assert value.item() == pytest.approx(wanted[part], rel=2e-6), part
        class_centre.collect(t_class)
        patch_centre.collect(t_patch.flatten(0, 1), torch.eye(k_patch))
        losses.update_centres([class_centre], settings.centre_momentum)
        losses.update_centres([patch_centre], settings.centre_momentum)
        assert class_centre.value.tolist() == pytest.approx(wanted["class_centre"], abs=1e-7)
        assert patch_centre.value.tolist() == pytest.approx(wanted["patch_centre"], abs=1e-7)
