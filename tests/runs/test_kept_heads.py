"""Pretraining that continues with the heads of an official checkpoint: the first loss is the official formula's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from asit import cli, runtime
from asit.config import PretrainSettings, presets
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import ConfigError
from asit.model.audio_model import AudioModel
from asit.pretrain import continued, pretrain_setup
from asit.pretrain import pretrain_run as runs
from asit.training.trainable import Now

WIDTH, BLOCKS, GRID, PATCH = 64, 2, (3, 2), 16
NORMS = {1: ("weight_g", "weight_v"), 2: ("parametrizations.weight.original0", "parametrizations.weight.original1")}
HIDDEN, BOTTLENECK, CLASSES, PATCHES = 24, 12, 40, 28


def official(version: int, seed: int = 0) -> dict[str, Any]:
    """A checkpoint as the official code saves it, of a small network; teacher and student differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + 0.15 * torch.randn(*shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    def network() -> dict[str, Tensor]:
        out = {"cls_token": draw(1, 1, WIDTH), "pos_embed": draw(1, 1 + GRID[0] * GRID[1], WIDTH)}
        out |= {"patch_embed.proj.weight": draw(WIDTH, 1, PATCH, PATCH), "patch_embed.proj.bias": draw(WIDTH)}
        for block in range(BLOCKS):
            for name, inputs, outputs in (
                ("attn.qkv", WIDTH, 3 * WIDTH),
                ("attn.proj", WIDTH, WIDTH),
                ("mlp.fc1", WIDTH, 4 * WIDTH),
                ("mlp.fc2", 4 * WIDTH, WIDTH),
            ):
                out |= linear(f"blocks.{block}.{name}", inputs, outputs)
        norms = [f"blocks.{block}.{name}" for block in range(BLOCKS) for name in ("norm1", "norm2")]
        for name in [*norms, "norm"]:
            out |= {f"{name}.weight": draw(WIDTH, mean=1.0), f"{name}.bias": draw(WIDTH)}
        out = {f"backbone.{name}": value for name, value in out.items()}
        head = {1: "head_cls", 2: "head"}[version]
        last = {1: [("cls_layer", CLASSES), ("data_layer", PATCHES)], 2: [("last_layer", CLASSES)]}[version]
        for i, inputs, outputs in ((0, WIDTH, HIDDEN), (2, HIDDEN, HIDDEN), (4, HIDDEN, BOTTLENECK)):
            out |= linear(f"{head}.mlp.{i}", inputs, outputs)
        norm, direction = NORMS[version]
        for name, count in last:
            scale = torch.ones(count, 1) if version == 1 else draw(count, 1, mean=1.0)
            out |= {f"{head}.{name}.{norm}": scale, f"{head}.{name}.{direction}": draw(count, BOTTLENECK)}
        for i, inputs, outputs in ((0, WIDTH, 20), (2, 20, 20), (4, 20, 16)):
            out |= linear(f"head_recons.mlp.{i}", inputs, outputs)
        return {**out, "head_recons.convTrans.weight": draw(16, 1, PATCH, PATCH), "head_recons.convTrans.bias": draw(1)}

    args = argparse.Namespace(num_mel_bins=32, sample_rate=8000, data_mean=-7.0, data_std=3.0)
    student = {f"module.{name}": value for name, value in network().items()}
    content = {"student": student, "teacher": network(), "epoch": 3, "args": args, "optimizer": {"state": {}}}
    if version == 1:
        return {**content, "loss_cls": {"center": draw(1, CLASSES)}, "loss_data": {"center": draw(1, PATCHES)}}
    return {**content, "CLS_PATCH_loss": {"center": draw(1, CLASSES), "center2": draw(1, 1, CLASSES)}}


def tokens_of(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """The encoder in float64: (R, 1, T, F) -> (R, 1 + P, D)."""
    w = {name.removeprefix("backbone."): value.double() for name, value in w.items() if name.startswith("backbone.")}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = F.conv2d(x.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for i in range(BLOCKS):
        b = f"blocks.{i}"
        q, k, v = F.linear(norm(x, f"{b}.norm1"), w[f"{b}.attn.qkv.weight"], w[f"{b}.attn.qkv.bias"]).chunk(3, -1)
        mixed = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v  # one head of 64
        x = x + F.linear(mixed, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
        y = F.gelu(F.linear(norm(x, f"{b}.norm2"), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]))
        x = x + F.linear(y, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    return norm(x, "norm")


def mlp(w: dict[str, Tensor], name: str, x: Tensor, last: bool) -> Tensor:
    for i in (0, 2, 4):
        x = F.linear(x, w[f"{name}.{i}.weight"].double(), w[f"{name}.{i}.bias"].double())
        x = F.gelu(x) if i < 4 or last else x
    return x


def logits(w: dict[str, Tensor], version: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prototype logits of the class token and of the patch tokens."""
    head = {1: "head_cls", 2: "head"}[version]
    z = F.normalize(mlp(w, f"{head}.mlp", x, last=False), dim=-1)
    norm, direction = NORMS[version]

    def layer(name: str) -> Tensor:
        g, v = w[f"{head}.{name}.{norm}"].double(), w[f"{head}.{name}.{direction}"].double()
        return g * v / v.norm(dim=1, keepdim=True)

    names = {1: ("cls_layer", "data_layer"), 2: ("last_layer", "last_layer")}[version]
    return z[:, 0] @ layer(names[0]).mT, z[:, 1:] @ layer(names[1]).mT


def official_loss(
    content: dict[str, Any], version: int, clean: Tensor, corrupted: Tensor, mask: Tensor
) -> dict[str, float]:
    """The parts of the loss and their sum, by the official formula in float64; both networks are the teacher's."""
    w = content["teacher"]
    if version == 1:
        centres = content["loss_cls"]["center"], content["loss_data"]["center"]
    else:
        centres = content["CLS_PATCH_loss"]["center"], content["CLS_PATCH_loss"]["center2"]
    seen = tokens_of(w, corrupted)
    (t_class, t_patch), (s_class, s_patch) = logits(w, version, tokens_of(w, clean)), logits(w, version, seen)

    def entropy(t: Tensor, s: Tensor, centre: Tensor) -> Tensor:
        probs = ((t - centre.double()) / 0.04).softmax(-1)
        return -(probs * (s / 0.1).log_softmax(-1)).sum(-1).mean()

    (t1, t2), (s1, s2) = t_class.chunk(2), s_class.chunk(2)
    of_class = (entropy(t1, s2, centres[0]) + entropy(t2, s1, centres[0])) / 2
    of_patch = entropy(t_patch, s_patch, centres[1])
    grid = mlp(w, "head_recons.mlp", seen[:, 1:], last=True).transpose(1, 2).unflatten(2, GRID)
    conv = (w[f"head_recons.convTrans.{name}"].double() for name in ("weight", "bias"))
    made = F.conv_transpose2d(grid, *conv, stride=PATCH)
    rebuilt = (made - clean.double()).abs()[mask].mean()
    total = of_class + of_patch + 2 * rebuilt if version == 1 else (of_class + of_patch) / 2 + rebuilt
    parts = {"loss": total, "global": of_class, "local": of_patch, "reconstruction": rebuilt}
    return {name: float(value) for name, value in parts.items()}


def settings(listed: Path, out: Path, model: Path, version: int = 1, **over: Any) -> PretrainSettings:
    given = {
        "data": str(listed), "out": str(out), "model": str(model), "keep_heads": True, "device": "cpu", "workers": 0,
        "precision": "float32", "batch_size": 4, "threads": 1, "epochs": 60,
        "views": {"seconds": 0.5, "local_views": 0},
        "encoder": {"drop_path": 0.0}, "records": {"tensorboard": False, "figure_every": 0},
        **over,
    }  # fmt: skip
    return presets.build(PretrainSettings, {1: "paper", 2: "official-v2"}[version], None, given)


def begun(given: PretrainSettings) -> pretrain_setup.PretrainSetup:
    effective, found = continued.start(given)
    world = runtime.World(0, 1, torch.device("cpu"), "")
    return pretrain_setup.prepare(effective, Catalogue.read(Path(given.data)), world, found)


@pytest.mark.parametrize("version", [1, 2])
def test_the_first_loss_is_the_official_formula(version: int, listed: Path, tmp_path: Path) -> None:
    content = official(version)
    torch.save(content, tmp_path / "official.pth")
    setup = begun(settings(listed, tmp_path / "run", tmp_path / "official.pth", version))
    heads = setup.settings.heads
    assert (heads.hidden, heads.bottleneck, heads.class_prototypes) == (HIDDEN, BOTTLENECK, CLASSES)
    assert heads.patch_prototypes == (PATCHES if version == 1 else CLASSES)
    assert (heads.share_prototypes, heads.train_norm) == (version == 2, version == 2)
    assert heads.reconstruction_hidden == (20, 20, 16)
    batch = setup.batch_of([setup.clips[0, i] for i in range(4)])
    now = Now(step=0, total=setup.plan.total, steps_per_epoch=setup.plan.steps_per_epoch, measure=True)
    with torch.no_grad():
        found = setup.task.step(batch, now, setup.precision, setup.world)
    corrupted, mask = setup.task._corrupted(batch), batch.drop | batch.replace
    want = official_loss(content, version, batch.clean, corrupted, mask)
    got = {"loss": float(found.loss), **{name: float(found.parts[name]) for name in want if name != "loss"}}
    assert got == pytest.approx(want, rel=1e-5)


def test_a_converted_folder_keeps_them_on_request(listed: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(official(1), tmp_path / "official.pth")
    convert = ["convert", str(tmp_path / "official.pth"), "--out"]
    assert cli.main([*convert, str(tmp_path / "with"), "--keep-heads"]) == 0
    assert "kept: heads of pretraining, 20 tensors" in capsys.readouterr().out
    assert cli.main([*convert, str(tmp_path / "without")]) == 0
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["card.json", "model.safetensors"]
    card = json.loads((tmp_path / "with" / "card.json").read_text())
    assert not any("head" in name for name in card["training"]["source"]["left_out"])
    setup = begun(settings(listed, tmp_path / "run", tmp_path / "with"))
    other = begun(settings(listed, tmp_path / "run", tmp_path / "official.pth"))
    theirs = other.task.student.state_dict()
    for name, ours in setup.task.student.state_dict().items():
        assert torch.equal(ours, theirs[name]), name
    with pytest.raises(
        ConfigError, match=r"keeps no heads of its pretraining(.|\n)*asit convert CHECKPOINT --keep-heads"
    ):
        begun(settings(listed, tmp_path / "run", tmp_path / "without"))
    fresh = begun(settings(listed, tmp_path / "run", tmp_path / "with", keep_heads=False))
    assert fresh.settings.heads.class_prototypes == 8192  # the preset's


def test_contradictions_and_what_has_no_heads(listed: Path, tmp_path: Path, capsys: Any) -> None:
    torch.save(official(2), tmp_path / "official.pth")
    with pytest.raises(ConfigError, match=r"heads\.hidden is 99, and 24 in the card"):
        begun(settings(listed, tmp_path / "run", tmp_path / "official.pth", heads={"hidden": 99}))
    given = ["pretrain", "--data", str(listed), "--out", str(tmp_path / "run"), "--keep-heads"]
    assert cli.main(given) == 2
    assert "keep_heads is on and no model is given" in capsys.readouterr().err
    named = [*given, "--model", str(tmp_path / "official.pth"), "--heads.bottleneck", "99"]
    assert cli.main(named) == 2
    assert "heads.bottleneck is 99, and 12 in the card" in capsys.readouterr().err
    encoder = {name: value for name, value in official(1)["teacher"].items() if "backbone" in name}
    args = official(1)["args"]
    torch.save({"teacher": encoder, "args": args}, tmp_path / "bare.pth")
    assert cli.main(["convert", str(tmp_path / "bare.pth"), "--out", str(tmp_path / "m"), "--keep-heads"]) == 2
    assert "has no heads of an ASiT pretraining" in capsys.readouterr().err
    part = {name: value for name, value in official(1)["teacher"].items() if "data_layer" not in name}
    part = {name: value for name, value in part.items() if "cls_layer" not in name}
    torch.save({"teacher": part, "args": args}, tmp_path / "part.pth")
    assert cli.main(["convert", str(tmp_path / "part.pth"), "--out", str(tmp_path / "m"), "--keep-heads"]) == 2
    assert "has incomplete heads of pretraining (projection.class_layer.weight_v)" in capsys.readouterr().err
    assert cli.main(["info", str(tmp_path / "part.pth")]) == 0  # a name keeps heads where they are whole


def test_a_run_resumes_with_them(listed: Path, tmp_path: Path, equal_runs: Any) -> None:
    torch.save(official(1), tmp_path / "official.pth")
    given = settings(listed, tmp_path / "whole", tmp_path / "official.pth")
    runs.pretrain(given.changed({"stop_after": 2, "records": {"checkpoint_every": 1}}))
    halves = given.changed({"out": str(tmp_path / "run"), "records": {"checkpoint_every": 1}})
    result = runs.pretrain(halves.changed({"stop_after": 1}))
    runs.pretrain(halves.changed({"stop_after": 2}), resume=True)
    equal_runs(tmp_path / "run", tmp_path / "whole")
    assert AudioModel.load(result.model).encoder.width == WIDTH
