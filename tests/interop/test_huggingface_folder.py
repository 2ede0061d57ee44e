"""Folders for transformers: what is in them, that they come back as they were, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface import read, register, write
from asit.interop.huggingface.fields import config_of, extractor_of, folder_settings
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder

TINY = {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_frames": 8, "patch_mels": 8}
FILES = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
    *("configuration_asit.py", "feature_extraction_asit.py", "modeling_asit.py"),
}


def model(
    classes: tuple[str, ...] = ("dog", "rain, hail", "باب"),
    *,
    multi: bool = False,
    norm: bool = True,
    padding: str = "silence",
    training: dict[str, Any] | None = None,
    **settings: Any,
) -> AudioModel:
    kind = EncoderSettings.model_validate({**TINY, **settings})
    encoder = Encoder(kind, 48, 32)
    labels = Labelling(classes, multi, "class+mean", 0.495, norm_eps=1e-5) if classes else None
    head = Head(32, len(classes), "class+mean", norm=norm, norm_eps=1e-5) if classes else None
    with torch.no_grad():
        for i, parameter in enumerate([*encoder.parameters(), *(head.parameters() if head else ())]):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    front = FrontEndSettings.model_validate({"mels": 32, "mean": -6.125, "std": 3.1, "padding": padding})
    return AudioModel(encoder, FrontEnd(front), training, head, labels)


def same(one: AudioModel, other: AudioModel) -> bool:
    pairs = zip(one.encoder.state_dict().items(), other.encoder.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    if one.head is not None and other.head is not None:
        heads = zip(one.head.state_dict().items(), other.head.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in heads)
    return one.card == other.card


@pytest.mark.parametrize(
    "made",
    [
        model(training={"steps": 7, "data": ["someone/sounds"]}),
        model(multi=True, norm=False, padding="zero", distilled=True, norm_eps=1e-12, mlp_ratio=2.0),
        model((), padding="repeat", patch_stride_frames=4, patch_stride_mels=6, drop_path=0.0),
        model(("one",)),
    ],
    ids=["single", "multi", "encoder", "one class"],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, made: AudioModel) -> None:
    write(made, tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == FILES
    assert same(made, read(tmp_path / "hf"))
    wave = 0.1 * torch.randn(9000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(tmp_path / "hf").embed(wave).patches, made.embed(wave).patches)


def test_neither_transformers_nor_the_hub_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    write(model(), tmp_path / "hf")
    read(tmp_path / "hf")
    with pytest.raises(ConfigError, match=r"not installed(.|\n)*pip install 'asit-audio\[huggingface\]'"):
        register()


def test_folders_of_whoever_trained_it_are_not_published(tmp_path: Path) -> None:
    facts = {
        "from": "weights of /data/someone/secret/model",
        "source": {"file": "C:\\Users\\someone\\last.pth", "all": ["/a/b.pth"], "url": "https://example.org/x/y"},
        "share": "1/2 of clips, lr 3e-4",
        "spaces": "/data/someone else/last name/model",
        "home": "~someone/model",
        "server": "\\\\server\\someone\\model",
        "steps": 3,
    }
    write(model(training=facts), tmp_path / "hf")
    assert read(tmp_path / "hf").training == {
        "from": "weights of model",
        "source": {"file": "last.pth", "all": ["b.pth"], "url": "https://example.org/x/y"},
        "share": "1/2 of clips, lr 3e-4",
        "spaces": "model",
        "home": "model",
        "server": "model",
        "steps": 3,
    }
    assert "someone" not in "".join(path.read_text("utf-8", "replace") for path in (tmp_path / "hf").iterdir())


def results(folder: Path, step: int, classes: tuple[str, ...] = ("dog", "rain, hail", "باب")) -> Path:
    def record(split: str, weights: str, at: int, value: float) -> dict[str, Any]:
        metrics = {"accuracy": {"value": value, "interval": [value - 0.1, value + 0.1]}, "auc": {"value": None}}
        clips = {"clips": 40, "list": "abc", "task": "any", "split": split, "weights": weights, "step": at}
        return {**clips, "metrics": metrics}

    records = [record("test", "last", step, 0.71234), record("test", "best", step - 1, 0.9)]
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"classes": classes, "results": records}))
    return folder


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, matter, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(matter), text


def test_the_model_card_tells_what_files_say(tmp_path: Path) -> None:
    run = results(tmp_path / "run", 7)
    made = model(multi=True, training={"step": 7, "license": "cc-by-4.0", "data": ["someone/sounds", "own tapes"]})
    write(made, tmp_path / "hf", title="Dogs | doors", run=run)
    front, text = front_matter(tmp_path / "hf")
    assert (front["license"], front["library_name"], front["pipeline_tag"], front["datasets"], front["metrics"]) == (
        "cc-by-4.0", "transformers", "audio-classification", ["someone/sounds"], ["accuracy"],
    )  # fmt: skip
    assert front["model-index"][0]["name"] == "Dogs | doors"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.71234}]
    assert "| test | accuracy | 0.7123 | 0.6123 to 0.8123 | 40 | abc |" in text
    assert "0.9" not in text.partition("## Evaluation")[2].replace("0.8123", "")
    assert made.head is not None
    count = sum(p.numel() for p in (*made.encoder.parameters(), *made.head.parameters()))
    assert f"{count:,} parameters" in text
    assert "`rain, hail`" in text
    assert 'function_to_apply="sigmoid"' in text
    assert "mean -6.125, standard deviation 3.1" in text


def test_names_of_classes_do_not_break_the_model_card(tmp_path: Path) -> None:
    write(model(("a\n# b", "`c`")), tmp_path / "hf")
    assert "\n\n`a # b`, `'c'`\n\n" in front_matter(tmp_path / "hf")[1]
    assert read(tmp_path / "hf").classes == ("a\n# b", "`c`")


def test_scores_of_other_weights_are_not_told(tmp_path: Path) -> None:
    made = model(training={"step": 7})
    for name, run in (("a", results(tmp_path / "r", 9)), ("b", results(tmp_path / "s", 7, ("x", "y", "z")))):
        write(made, tmp_path / name, run=run, license="Ask Us First")
        front, text = front_matter(tmp_path / name)
        assert "metrics" not in front
        assert "Evaluation" not in text
        assert (front["license"], front["license_name"]) == ("other", "Ask Us First")
    write(model(()), tmp_path / "c", run=tmp_path)
    front, text = front_matter(tmp_path / "c")
    assert front["pipeline_tag"] == "feature-extraction"
    assert "license" not in front
    assert "AutoModel.from_pretrained" in text
    assert "Not recorded." in text
    (tmp_path / "r" / "results.json").write_text('{"classes": 3}')
    with pytest.raises(CheckpointError, match=r"results\.json is damaged"):
        write(made, tmp_path / "d", run=tmp_path / "r")
    assert not (tmp_path / "d").exists()


def test_an_output_that_exists_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(model(), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="already exists"):
        write(model(), tmp_path / "hf")
    write(model(multi=True), tmp_path / "hf", overwrite=True)
    assert read(tmp_path / "hf").multi
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"holds something else: chapter\.tex"):
        write(model(), tmp_path / "thesis", overwrite=True)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("asit.interop.huggingface.folder.shutil.copyfile", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write(model(), tmp_path / "hf", overwrite=True)
    assert read(tmp_path / "hf").multi
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "thesis"}


@pytest.mark.parametrize(
    ("file", "change", "text"),
    [
        ("config.json", {"model_type": "vit"}, r"model_type 'vit'(.|\n)*asit convert"),
        ("config.json", {"hidden_size": None}, "the field 'hidden_size' is missing"),
        ("config.json", {"hidden_size": 48}, r"does not fit the Head|of another shape"),
        ("config.json", {"num_frames": 64}, "num_frames is 64 in config.json and 48 in preprocessor_config.json"),
        ("config.json", {"pooling": "max"}, "pooling 'max'"),
        ("config.json", {"id2label": {"0": "a", "2": "b", "3": "c"}}, "does not name the outputs 0 to 2"),
        ("config.json", {"id2label": {"0": "a", "1": "b"}}, "does not fit the Head"),
        ("config.json", {"id2label": {"0": "a", "1": "a", "2": "b"}}, "'a' more than once"),
        ("preprocessor_config.json", {"padding_rule": "mirror"}, "padding"),
        ("preprocessor_config.json", {"feature_size": 40}, "num_mel_bins is 32 in config.json and 40"),
        ("preprocessor_config.json", {"std": -1.0}, "std"),
        ("preprocessor_config.json", {"sampling_rate": 10**9}, "rate 1000000000 with window_ms 25"),
        ("preprocessor_config.json", {"mean": float("nan")}, "mean: input should be a finite number, found nan"),
        ("config.json", {"hidden_size": 10**6}, "of another shape|heads"),
        ("config.json", {"num_hidden_layers": 10**9}, "1000000000 blocks, and weights of"),
        ("config.json", {"mlp_ratio": float("inf")}, "mlp_ratio: input should be a finite number, found inf"),
        ("config.json", {"mlp_ratio": 1e12}, "cannot be used|of another shape"),
        ("config.json", {"num_frames": 48 * 10**9}, "num_frames is 48000000000 in config|of another shape"),
        ("config.json", {"id2label": ["a", "b", "c"]}, "cannot be used"),
        ("config.json", {"patch_size": [10**6, 8]}, "cannot be used|patch_size is 1000000"),
    ],
)
def test_a_folder_that_does_not_agree_with_itself(tmp_path: Path, file: str, change: dict[str, Any], text: str) -> None:
    write(model(), tmp_path / "hf")
    path = tmp_path / "hf" / file
    held = {**json.loads(path.read_text("utf-8")), **change}
    path.write_text(json.dumps({name: value for name, value in held.items() if value is not None}))
    with pytest.raises(CheckpointError, match=text):
        read(tmp_path / "hf")


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    for file in ("config.json", "preprocessor_config.json", "model.safetensors"):
        write(model(), folder)
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) - 20])
        with pytest.raises(CheckpointError, match=f"{file} is damaged"):
            read(folder)
        (folder / file).unlink()
        with pytest.raises(CheckpointError, match=f"has no {file}"):
            read(folder)
        shutil.rmtree(folder)
    write(model(), folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors, but pytorch_model\.bin"):
        read(folder)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: it is nested more than 100 deep"):
        read(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        read(folder)


def test_weights_of_another_precision_and_without_their_front_name(tmp_path: Path) -> None:
    made = model(())
    write(made, tmp_path / "hf")
    # Cloned: what was read may be a map of the file that is written to below.
    tensors = {k: v.clone() for k, v in safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors").items()}
    assert set(tensors) == set(made.encoder.state_dict())
    half = {f"encoder.{name}": value.bfloat16() for name, value in tensors.items()}
    safetensors.torch.save_file(half, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    loaded = read(tmp_path / "hf")
    whole = {name: value.to(torch.int8) if "fc1" in name else value for name, value in tensors.items()}
    safetensors.torch.save_file(whole, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"4 tensors that are no plain floating-point numbers"):
        read(tmp_path / "hf")
    assert loaded.encoder.pos_embed.dtype == torch.float32
    assert torch.equal(loaded.encoder.pos_embed, made.encoder.pos_embed.bfloat16().float())


def test_a_named_size_stays_named() -> None:
    made = model()
    config, extractor = config_of(made), extractor_of(made)
    shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    assert folder_settings(config, extractor, True).encoder == made.encoder.settings
    assert folder_settings({**config, **shape}, extractor, True).encoder.size == "small"
    assert folder_settings({**config, **shape}, extractor, True).encoder.width is None
