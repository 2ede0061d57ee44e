"""AST of Hugging Face: transformers' own network and feature extractor as oracles, old and new names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from asit.errors import AsitError, CheckpointError, ConfigError
from asit.interop import convert
from asit.interop.convert import SourceOptions

transformers = pytest.importorskip("transformers")

NAMES = {0: "Speech", 1: "Dog", 2: "Rain"}


def config(**over: Any) -> Any:
    given = {
        "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80, "patch_size": 8,
        "time_stride": 5, "frequency_stride": 6, "max_length": 64, "num_mel_bins": 32, "layer_norm_eps": 1e-4,
        "id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()},
    }  # fmt: skip
    return transformers.ASTConfig(**{**given, **over})


def network(kind: str = "ASTForAudioClassification", **over: Any) -> Any:
    model = getattr(transformers, kind)(config(**over)).eval()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15,
                              generator=torch.Generator().manual_seed(i))  # fmt: skip
    return model


def extractor(**over: Any) -> Any:
    given = {"mean": -6.0, "std": 3.0, "num_mel_bins": 32, "max_length": 64}
    return transformers.ASTFeatureExtractor(**{**given, **over})


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of transformers 4.x."""
    renamed = {
        ".layers.": ".encoder.layer.", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    out = {}
    for name, value in state.items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        out[name] = value
    return out


def folder(tmp_path: Path, model: Any, layout: str = "new", front: Any = None) -> Path:
    model.config.save_pretrained(tmp_path)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    if layout == "saved":
        model.save_pretrained(tmp_path)
    elif layout == "old.bin":
        torch.save(old_names(state), tmp_path / "pytorch_model.bin")
    else:
        renamed = old_names(state) if layout == "old" else state
        safetensors.torch.save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if front is not None:
        front.save_pretrained(tmp_path)
    return tmp_path


def test_the_old_names_are_not_the_new_ones() -> None:
    state = network().state_dict()
    old = old_names(state)
    assert "audio_spectrogram_transformer.encoder.layer.1.attention.attention.query.weight" in old
    assert "audio_spectrogram_transformer.encoder.layer.0.output.dense.bias" in old
    assert not any("layers." in name or "proj." in name for name in old if "patch" not in name)


@pytest.mark.parametrize("layout", ["new", "old", "old.bin", "saved"])
def test_tokens_and_logits_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    model = network()
    done = convert.convert(folder(tmp_path, model, layout, extractor()), SourceOptions())
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))  # (rows, frames, mel)
    with torch.no_grad():
        want = model.audio_spectrogram_transformer(x)
        logits = model(x).logits
    ours = x[:, None, : done.model.frames]
    tokens = done.model.encoder(ours)
    time, mel = tokens.grid
    assert (time, mel, done.model.frames) == (12, 5, 63)
    torch.testing.assert_close(tokens.cls, want.pooler_output, atol=1e-5, rtol=1e-5)
    patches = want.last_hidden_state[:, 2:].unflatten(1, (mel, time)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(tokens.patches, patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(done.model.logits(ours), logits, atol=1e-5, rtol=1e-5)
    assert done.model.classes == tuple(NAMES.values())
    assert (done.model.multi, done.left_out) == (False, {})
    assert done.mapped == len(model.state_dict())
    card = done.model.card
    assert (card["encoder"]["norm_eps"], done.model.head.norm.eps) == (1e-4, 1e-4)  # type: ignore[union-attr]
    assert card["training"]["source"]["statistics"] == "preprocessor_config.json"


def test_a_network_without_head_and_without_biases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network("ASTModel", qkv_bias=False)
    done = convert.convert(folder(tmp_path, model), SourceOptions())
    x = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(x).pooler_output
    torch.testing.assert_close(done.model.encoder(x[:, None, :63]).cls, want, atol=1e-5, rtol=1e-5)
    assert done.model.head is None
    assert "No preprocessor_config.json" in caplog.text


@pytest.mark.parametrize("samples", [6000, 4000, 12000])
def test_the_front_end_is_that_of_the_feature_extractor(tmp_path: Path, samples: int) -> None:
    front = extractor()
    done = convert.convert(folder(tmp_path, network(), front=front), SourceOptions())
    wave = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    want = torch.from_numpy(np.stack(front([wave], sampling_rate=16000)["input_values"])).float()[0, :63]
    need = done.model.front_end.samples_for(63)
    got = done.model.input(torch.from_numpy(wave)[None, :need])[0, 0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    if samples < need:
        assert torch.equal(got[-1], want[-1]), "filled up with zeros before the mean is taken off"


def test_what_config_and_extractor_say(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    front = extractor(do_normalize=False, sampling_rate=8000, max_length=128)
    model = network(problem_type="multi_label_classification", id2label={i: f"LABEL_{i}" for i in range(3)})
    done = convert.convert(folder(tmp_path, model, front=front), SourceOptions())
    settings = done.model.front_end.settings
    assert (settings.mean, settings.std, settings.rate) == (0.0, 0.5, 8000)
    assert done.model.multi
    assert done.model.classes == ("class 0", "class 1", "class 2")
    assert "pads clips to 128 frames, the network reads 64" in caplog.text


def test_an_extractor_of_another_kind_or_without_numbers(tmp_path: Path) -> None:
    folder(tmp_path, network(), front=extractor())
    place = tmp_path / "preprocessor_config.json"
    held = json.loads(place.read_text())
    for change, text in (
        ({"feature_extractor_type": "Wav2Vec2FeatureExtractor"}, r"is of a Wav2Vec2FeatureExtractor"),
        ({"mean": None}, "a front end of mean None"),
        ({"sampling_rate": 10**9}, "rate 1000000000"),
    ):
        place.write_text(json.dumps({**held, **change}))
        with pytest.raises(AsitError, match=text):
            convert.convert(tmp_path, SourceOptions())
    place.write_text(json.dumps({name: value for name, value in held.items() if name not in ("mean", "std")}))
    settings = convert.convert(tmp_path, SourceOptions()).model.front_end.settings
    plain = transformers.ASTFeatureExtractor(num_mel_bins=32)
    assert (settings.mean, settings.std) == (plain.mean, plain.std)


@pytest.mark.parametrize(
    ("over", "text"),
    [
        ({"max_length": 128}, r"makes 25 x 5 patches(.|\n)*belongs to these weights"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"patch_size": 0}, "patch_size 0"),
        ({"num_attention_heads": 5}, "a width of 48"),
        ({"layer_norm_eps": 2.0}, r"layer_norm_eps 2\.0"),
        ({"model_type": ["eat"]}, r"model_type .*eat.*(.|\n)*ssast"),
        ({"model_type": {}}, r"model_type(.|\n)*ssast"),
        ({"model_type": "wav2vec2"}, r"model_type 'wav2vec2'(.|\n)*ssast"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, over: dict[str, Any], text: str) -> None:
    folder(tmp_path, network())
    place = tmp_path / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **over}))
    with pytest.raises(CheckpointError, match=text):
        convert.convert(tmp_path, SourceOptions())


def test_a_folder_without_weights_or_with_others(tmp_path: Path) -> None:
    folder(tmp_path, network())
    weights = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    # transformers 4 and 5 name it differently
    (name,) = [n for n in state if "layer" in n and ".0.attention" in n and n.endswith(("q_proj.bias", "query.bias"))]
    safetensors.torch.save_file({n: v for n, v in state.items() if n != name}, weights)
    with pytest.raises(CheckpointError, match="three bias tensors of layer 0"):
        convert.convert(tmp_path, SourceOptions())
    for value in (torch.zeros(()), torch.zeros(47)):
        safetensors.torch.save_file({**state, name: value}, weights)
        with pytest.raises(CheckpointError, match="three bias tensors of layer 0"):
            convert.convert(tmp_path, SourceOptions())
    safetensors.torch.save_file({**state, "classifier.dense.bias": torch.zeros(())}, weights)
    with pytest.raises(CheckpointError, match=r"a head of shape \(3, 48\)"):
        convert.convert(tmp_path, SourceOptions())
    safetensors.torch.save_file({**state, "lora.a": torch.zeros(1)}, weights)
    with pytest.raises(CheckpointError, match=r"1 unknown tensors \(lora\.a\)"):
        convert.convert(weights, SourceOptions(kind="hf-ast"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        convert.convert(tmp_path, SourceOptions())
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is not there"):
        convert.convert(tmp_path, SourceOptions())


def test_a_folder_that_asit_wrote_comes_back(tmp_path: Path) -> None:
    from asit.interop.huggingface import write

    (tmp_path / "ast").mkdir()
    first = convert.convert(folder(tmp_path / "ast", network(), front=extractor()), SourceOptions()).model
    write(first, tmp_path / "ours")
    done = convert.convert(tmp_path / "ours", SourceOptions(license="MIT"))
    again = done.model.encoder.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.encoder.state_dict().items())
    assert done.mapped == len(again) + 4
    assert done.model.card["training"]["license"] == "MIT"
    with pytest.raises(ConfigError, match="more than --out and --license is given"):
        convert.convert(tmp_path / "ours", SourceOptions(frames=96))
