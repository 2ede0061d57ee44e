"""The heads against torch's weight normalisation and transposed convolution."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from asit.config import HeadSettings
from asit.model.cpu.bf16 import linear
from asit.pretrain.heads import ProjectionHead, ReconstructionHead

SMALL = HeadSettings(hidden=20, bottleneck=6, class_prototypes=11, patch_prototypes=7)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(head: ProjectionHead, cls: Tensor, patches: Tensor) -> list[Tensor]:
    """Class and patch logits, (R, K) and (R * P, K2)."""
    pairs = ((cls, head.class_layer), (patches.flatten(0, 1), head.patch_layer))
    return [linear(head.embed(x), layer.weight()) for x, layer in pairs]


def roughen(module: nn.Module) -> None:
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i + 1))


@pytest.mark.parametrize("train_norm", [False, True])
def test_logits_equal_torchs_weight_norm(train_norm: bool) -> None:
    head = ProjectionHead(5, SMALL.model_copy(update={"train_norm": train_norm}))
    roughen(head)
    cls, patches = noise(3, 5), noise(3, 4, 5, seed=9)
    got = logits(head, cls, patches)
    mlp = nn.Sequential(nn.Linear(5, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 6))
    mlp.load_state_dict(head.mlp.state_dict())
    for x, layer, found in ((cls, head.class_layer, got[0]), (patches.reshape(12, 5), head.patch_layer, got[1])):
        z = mlp(x)
        z = z / z.pow(2).sum(-1, keepdim=True).sqrt()
        oracle = weight_norm(nn.Linear(6, len(layer.weight_v), bias=False), dim=0)
        with torch.no_grad():
            oracle.parametrizations.weight.original0.copy_(layer.weight_g)
            oracle.parametrizations.weight.original1.copy_(layer.weight_v)
        torch.testing.assert_close(found, oracle(z))
    assert got[0].shape == (3, 11)
    assert got[1].shape == (12, 7)


def test_the_bottleneck_has_unit_length_and_logits_are_cosines() -> None:
    head = ProjectionHead(5, SMALL)
    roughen(head)
    assert torch.allclose(head.embed(noise(2, 3, 5)).norm(dim=-1), torch.ones(2, 3))
    found = logits(head, 100 * noise(50, 5), noise(50, 2, 5))[0]
    assert found.abs().max() <= 1 + 1e-5
    roughen(head.class_layer)
    with torch.no_grad():
        head.class_layer.weight_v.mul_(17)
    assert logits(head, 100 * noise(50, 5), noise(50, 2, 5))[0].abs().max() <= 1 + 1e-5


def test_frozen_norms_are_no_parameters_and_trained_ones_move() -> None:
    fixed = ProjectionHead(5, SMALL)
    assert [name for name, _ in fixed.named_parameters() if "weight_g" in name] == []
    assert "class_layer.weight_g" in fixed.state_dict()
    trained = ProjectionHead(5, SMALL.model_copy(update={"train_norm": True}))
    sum(y.square().sum() for y in logits(trained, noise(2, 5), noise(2, 3, 5))).backward()  # type: ignore[union-attr]
    grad = trained.patch_layer.weight_g.grad
    assert grad is not None
    assert (grad != 0).all()


@pytest.mark.parametrize(
    ("shared", "norm", "count"), [(False, False, 2), (True, False, 1), (False, True, 4), (True, True, 2)]
)
def test_last_layers_are_all_after_the_bottleneck_once(shared: bool, norm: bool, count: int) -> None:
    head = ProjectionHead(5, SMALL.model_copy(update={"share_prototypes": shared, "train_norm": norm}))
    assert (head.class_layer is head.patch_layer) == shared
    last, mlp = head.last_layers(), list(head.mlp.parameters())
    assert len(last) == len({id(p) for p in last}) == count
    assert {id(p) for p in last} | {id(p) for p in mlp} == {id(p) for p in head.parameters()}
    assert not {id(p) for p in last} & {id(p) for p in mlp}
    assert logits(head, noise(2, 5), noise(2, 3, 5))[1].shape == (6, 11 if shared else 7)


def test_init_sets_every_number() -> None:
    for head in (
        ProjectionHead(5, SMALL.model_copy(update={"train_norm": True})),
        ReconstructionHead(5, SMALL, (4, 2)),
    ):
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.fill_(float("nan"))
        head.init_weights(torch.Generator().manual_seed(0))
        assert all(p.isfinite().all() for p in head.parameters())
        assert {name for name, p in head.named_parameters() if (p == 0).all()} == {
            name for name, _ in head.named_parameters() if name.endswith("bias")
        }


def test_bf16_runs_forward_and_backward() -> None:
    head = ProjectionHead(5, SMALL)
    roughen(head)
    cls, patches = noise(3, 5), noise(3, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        halves = logits(head, cls, patches)
    for half, full in zip(halves, logits(head, cls, patches), strict=True):
        torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)
    (halves[0].float().sum() + halves[1].float().square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("hidden", ["auto", (9, 9, 3), ()])
def test_reconstruction_equals_a_transposed_convolution(hidden: object) -> None:
    head = ReconstructionHead(5, HeadSettings.model_validate({"reconstruction_hidden": hidden}), (4, 2))
    roughen(head)
    tokens = noise(3, 6, 5, seed=4)
    widths = {"auto": [5, 5, 5, 5], (9, 9, 3): [5, 9, 9, 3], (): [5]}[hidden]  # type: ignore[index]
    assert [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)] == [
        (o, i) for i, o in itertools.pairwise(widths)
    ]
    conv = nn.ConvTranspose2d(widths[-1], 1, (4, 2), (4, 2))
    with torch.no_grad():
        conv.weight.copy_(head.weight)
        conv.bias.copy_(head.bias)  # type: ignore[union-attr]
    want = conv(head.mlp(tokens).view(3, 2, 3, -1).permute(0, 3, 1, 2))
    got = head(tokens, (2, 3))
    assert got.shape == (3, 1, 8, 6)
    torch.testing.assert_close(got, want)
