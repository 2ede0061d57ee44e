"""What a fine-tuning run starts from: a pretrained encoder, its architecture alone, image weights, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asit import logs
from asit.config import EncoderSettings, FinetuneSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import CheckpointError, ConfigError
from asit.finetune import finetune_run as runs
from asit.finetune import init_model
from asit.model import positions
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.encoders import empty_encoder
from asit.model.vit import Encoder
from asit.training import open_data

SMALL = EncoderSettings(size="custom", width=32, depth=2, heads=2, drop_path=0.3)
FRONT_END = FrontEndSettings(rate=8000, mels=32, mean=-7.0, std=3.0)
CLASSES = ("high", "low", "middle")


def encoder(settings: EncoderSettings = SMALL, frames: int = 64, seed: int = 1) -> Encoder:
    made = empty_encoder(settings, frames, 32)  # Encoder() itself draws
    made.init_weights(torch.Generator().manual_seed(seed))
    return made


def saved(folder: Path, labels: Labelling | None = None) -> Path:
    head = None
    if labels is not None:
        with torch.device("meta"):
            head = Head(32, len(labels.classes), labels.pooling)
        head.to_empty(device="cpu")
        head.init_weights(torch.Generator().manual_seed(5))
        with torch.no_grad():
            head.linear.bias += 0.25
    AudioModel.from_parts(encoder(), FRONT_END, SMALL, 64, head=head, labels=labels).save(folder)
    return folder


def built(settings: FinetuneSettings, frames: int = 64) -> tuple[Any, init_model.Origin, list[str]]:
    """Return the network, what it starts from, and what was logged."""
    model = init_model.pretrained(settings)
    start = init_model.origin(settings, model, Catalogue.from_clips([], root="/", header={"mean": -5.0, "std": 2.0}))
    with logs.run_log() as log:
        resolved = settings.changed({"encoder": start.encoder.model_dump(), "front_end": start.front_end.model_dump()})
        made = init_model.build(start, resolved, frames, CLASSES, False)
    return made, start, [record.getMessage() for record in log.buffer]


def settings(model: Path | str, **over: Any) -> FinetuneSettings:
    return FinetuneSettings(model=str(model), **over)


def test_pretrained_weights_come_over(tmp_path: Path, no_global_draws: None) -> None:
    made, start, notes = built(settings(saved(tmp_path / "model")))
    for name, value in encoder().state_dict().items():
        assert torch.equal(made.encoder.state_dict()[name], value), name
    assert start.front_end == FRONT_END
    assert start.encoder == SMALL.model_copy(update={"drop_path": 0.1})
    assert start.text == f"weights of {tmp_path / 'model'}"
    assert notes == []
    again, *_ = built(settings(tmp_path / "model"))
    assert torch.equal(made.head.linear.weight, again.head.linear.weight)
    other, *_ = built(settings(tmp_path / "model", seed=1))
    assert not torch.equal(made.head.linear.weight, other.head.linear.weight)


def test_fresh_keeps_the_architecture_alone(tmp_path: Path, no_global_draws: None) -> None:
    made, start, _ = built(settings(saved(tmp_path / "model"), fresh=True))
    assert start.text == f"fresh weights, architecture of {tmp_path / 'model'}"
    assert start.front_end == FRONT_END
    theirs = encoder().state_dict()
    for name, value in made.encoder.state_dict().items():
        assert value.shape == theirs[name].shape
        if value.ndim > 1 and name != "pos_embed":
            assert not torch.equal(value, theirs[name]), name
    nothing, start, _ = built(
        settings("none", encoder=EncoderSettings(size="custom", width=32, depth=2, heads=2), front_end={"mels": 32})
    )
    assert start.text == "fresh weights"
    assert (start.front_end.mean, start.front_end.std) == (-5.0, 2.0)  # measured by the catalogue
    for name, value in nothing.state_dict().items():  # the same seed, the same fresh weights
        assert torch.equal(value, made.state_dict()[name]), name


@pytest.mark.parametrize(
    ("over", "taken"),
    [
        ({}, True),
        ({"classes": ("low", "high", "middle")}, False),
        ({"multi": True}, False),
        ({"pooling": "mean"}, False),
    ],
)
def test_a_head_of_the_same_classes_is_taken_over(over: dict[str, Any], taken: bool, tmp_path: Path) -> None:
    labels = Labelling(**{"classes": CLASSES, "multi": False, "pooling": "class+mean", "seconds": 0.6, **over})
    made, _, notes = built(settings(saved(tmp_path / "model", labels)))
    assert torch.allclose(made.head.linear.bias, torch.tensor(0.25 if taken else 0.0))
    assert ("trained further" in notes[-1]) == taken
    fresh, _, notes = built(settings(tmp_path / "model", fresh=True))
    assert not fresh.head.linear.bias.any()
    assert notes == []


@pytest.mark.parametrize(("stride", "frames", "grid"), [(None, 32, (2, 2)), (None, 96, (6, 2)), (8, 64, (7, 3))])
def test_other_lengths_and_strides(stride: int | None, frames: int, grid: tuple[int, int], tmp_path: Path) -> None:
    over = {"stride_frames": stride, "stride_mels": stride}
    made, start, notes = built(settings(saved(tmp_path / "model"), network=over), frames)
    assert made.encoder.grid == grid
    assert start.encoder.patch_stride_frames == stride
    wanted = positions.adapt_positions(
        encoder().state_dict(), SMALL, start.encoder, old_frames=64, frames=frames, mels=32
    )
    assert torch.equal(made.encoder.pos_embed, wanted["pos_embed"])
    assert notes == [f"positions of (4, 2) patches (time, mel) made into {grid}: docs/finetune.md"]
    assert made(torch.randn(2, 1, frames, 32, generator=torch.Generator().manual_seed(0))).shape == (2, 3)


def test_a_run_at_stride_ten(tuned: Any, tmp_path: Path) -> None:
    """AST's stride: the model folder holds it, and is read back with it."""
    result = runs.finetune(tuned(tmp_path / "run", epochs=1, network={"stride_frames": 10, "stride_mels": 10}))
    model = AudioModel.load(result.model)
    assert model.encoder.settings.patch_stride_frames == 10
    assert model.encoder.grid == positions.grid_of(model.frames, 32, (16, 16), (10, 10))
    assert model.scores(torch.zeros(1, 3000) + torch.arange(3000) * 1e-4).shape == (1, 3)


def test_image_weights(image_file: Path, no_global_draws: None) -> None:
    small = {"encoder": {"size": "custom", "width": 64, "depth": 2, "heads": 1}, "front_end": {"mels": 32}}
    made, start, notes = built(settings(image_file, **small))
    assert start.text == f"image weights of {image_file}"
    state = safetensors.torch.load_file(image_file)
    assert torch.equal(made.encoder.state_dict()["blocks.1.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert "head.weight" in notes[-1]
    with pytest.raises(CheckpointError):
        built(settings(image_file, **{**small, "encoder": {"size": "custom", "width": 128, "depth": 2, "heads": 2}}))
    with pytest.raises(ConfigError, match=r"vit\.safetensors, a file of image weights, and fresh is on"):
        init_model.pretrained(settings(image_file, fresh=True, **small))


def test_nothing_that_was_set_is_lost(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    over = {"encoder": {"size": "tiny", "drop_path": 0.2}, "front_end": {"padding": "repeat"}}
    with pytest.raises(ConfigError, match="would not have") as caught:
        built(settings(model, **over))
    for message in (
        "encoder.size is tiny, and would be custom",
        "encoder.drop_path is 0.2, and would be 0.1",
        "front_end.padding is repeat, and would be silence",
        "network.stride_frames",
    ):
        assert message in str(caught.value)
    same = {"encoder": {"size": "custom", "width": 32, "depth": 2, "heads": 2}, "front_end": {"mels": 32}}
    built(settings(model, **same))  # said again is not lost
    built(settings(model, encoder={"drop_path": 0.2}, network={"drop_path": 0.2}))


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass --model RUN/model, or --model none"):
        init_model.pretrained(settings(""))
    saved(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").touch()
    assert init_model.pretrained(settings(tmp_path / "run")) is not None  # as for every other verb
    with pytest.raises(CheckpointError, match=r"nowhere does not exist(.|\n)*such as RUN/model"):
        init_model.pretrained(settings(tmp_path / "nowhere"))
    assert init_model.pretrained(settings("none")) is None
    (tmp_path / "run" / "model").rename(tmp_path / "best.bin")  # a folder, whatever its name
    assert init_model.pretrained(settings(tmp_path / "best.bin")) is not None


@pytest.mark.parametrize("given", [{"mean": 2.0}, {"std": 2.0}, {"mean": 2.0, "std": 3.0}, {}])
def test_mean_or_std_given_alone_is_kept(listed: Path, given: dict[str, float]) -> None:
    catalogue = Catalogue.read(listed)
    found = open_data.measured(FrontEndSettings(rate=8000, mels=32, **given), catalogue)
    measured = {name: catalogue.header[name] for name in ("mean", "std")}
    assert {"mean": found.mean, "std": found.std} == {**measured, **given}
