"""Folders for transformers: content, round trips, what is refused, and that transformers gives the same results."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface import read, register, write
from asit.interop.huggingface.folder import config_of, extractor_of, folder_settings
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling, Pooling
from asit.model.vit import Encoder

TINY = {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_frames": 8, "patch_mels": 8}
FRAMES, NEED = 48, 47 * 160 + 400  # frames of the view, and samples of them
LENGTHS = {"view": NEED, "short": 3000, "window": 400, "less": 90, "more": 9500, "long": 20000, "rest": NEED + 60}
FOUR = ("dog", "rain", "door", "باب")
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
    pooling: Pooling = "class+mean",
    training: dict[str, Any] | None = None,
    **settings: Any,
) -> AudioModel:
    kind = EncoderSettings.model_validate({**TINY, **settings})
    encoder = Encoder(kind, FRAMES, 32)
    labels = Labelling(classes, multi, pooling, 0.495, norm_eps=1e-5) if classes else None
    head = Head(32, len(classes), pooling, norm=norm, norm_eps=1e-5) if classes else None
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
    with pytest.raises(CheckpointError, match=r"r cannot be used: it holds a value of another kind"):
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


PROGRAM = r"""
import inspect, json, os, sys, warnings

class NoAsit:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "asit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocker = NoAsit()
sys.meta_path.insert(0, blocker)
import numpy as np, torch
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline
from transformers import AudioClassificationPipeline

transformers.logging.set_verbosity_error()
root, out = sys.argv[1], {}
ref = np.load(f"{root}/ref.npz")
names = ("view", "short", "window", "less", "more", "long", "rest")
waves = {name: ref[f"wave-{name}"] for name in names}
trust = {"trust_remote_code": True}


def off(found, wanted):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max())


def refused(do):
    try:
        do()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


OLD_DEFAULT = str(inspect.signature(AudioClassificationPipeline.postprocess).parameters["function_to_apply"].default)

for kind in ("single", "multi"):
    folder = f"{root}/{kind}"
    extractor = AutoFeatureExtractor.from_pretrained(folder, **trust)
    model = AutoModelForAudioClassification.from_pretrained(folder, **trust)
    # Before 5.23 the pipeline applies a softmax by default, also for several labels per clip.
    applied = {"function_to_apply": "sigmoid"} if kind == "multi" and "softmax" in OLD_DEFAULT else {}
    classify = pipeline("audio-classification", folder, feature_extractor=folder, top_k=None, **trust)
    got = {"features": 0.0, "scores": 0.0, "pipeline": 0.0, "dict": 0.0}
    of = (lambda x: x.sigmoid()) if kind == "multi" else (lambda x: x.softmax(1))
    for name in names:
        inputs = extractor(waves[name], sampling_rate=16000, return_tensors="pt")
        got["features"] = max(got["features"], off(inputs["input_values"], ref[f"{kind}-x-{name}"]))
        with torch.no_grad():
            found = of(model(**inputs).logits)[0]
        wanted = ref[f"{kind}-scores-{name}"]
        got["scores"] = max(got["scores"], off(found, wanted))
        named = {"function_to_apply": "sigmoid"} if kind == "multi" else {}
        answers = {
            "pipeline": classify(waves[name], **applied),
            "dict": classify({"raw": waves[name], "sampling_rate": 16000}, **named),
        }
        for how, given in answers.items():
            answer = {one["label"]: one["score"] for one in given}
            got[how] = max(got[how], max(abs(answer[c] - w) for c, w in zip(ref["classes"], wanted)))
    several = classify([waves[name] for name in names], batch_size=7, **applied)
    got["batch"] = max(
        abs({one["label"]: one["score"] for one in answer}[c] - w)
        for name, answer in zip(names, several) for c, w in zip(ref["classes"], ref[f"{kind}-scores-{name}"])
    )
    inputs = extractor([waves["view"], waves["short"]], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        full = model(**inputs, output_attentions=True, output_hidden_states=True)
        plain = model(**inputs)
    got["shapes"] = [list(full.attentions[0].shape), list(full.hidden_states[0].shape)]
    got["layers"] = [len(full.attentions), len(full.hidden_states)]
    got["rows"] = off(full.attentions[-1].sum(-1), np.ones(full.attentions[-1].shape[:-1], np.float32))
    got["eager"] = off(full.logits, plain.logits.numpy())
    got["tuple"] = off(model(**inputs, return_dict=False)[0], plain.logits.numpy())
    labels = torch.tensor([2, 0]) if kind == "single" else torch.tensor([[1.0, 0, 1, 0], [0, 0, 0.5, 0]])
    got["loss"] = float(model(**inputs, labels=labels).loss)
    model.train()
    torch.manual_seed(0)  # stochastic depth may otherwise leave a block out for both clips
    model(**inputs, labels=labels).loss.backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    model(**inputs, labels=labels).loss.backward()
    got["checkpointed"] = max(off(p.grad, first[name].numpy()) for name, p in model.named_parameters())
    got["gradients"] = all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
    model.eval()
    long = extractor(waves["long"], sampling_rate=16000, return_tensors="pt")
    got["long"] = [list(long["input_values"].shape), refused(lambda: model(**long, output_attentions=True))]
    got["cut"] = off(extractor(waves["long"], truncation=True, return_tensors="np")["input_values"], ref[f"{kind}-cut"])
    with torch.no_grad():
        model.head.linear.bias += 1.0
    model.save_pretrained(f"{root}/{kind}-saved")
    extractor.save_pretrained(f"{root}/{kind}-saved")
    got["files"] = sorted(os.listdir(f"{root}/{kind}-saved"))
    again = AutoModelForAudioClassification.from_pretrained(f"{root}/{kind}-saved", **trust)
    got["saved"] = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    kept = AutoFeatureExtractor.from_pretrained(f"{root}/{kind}-saved", **trust)
    got["extractor"] = kept.to_dict() == extractor.to_dict()
    out[kind] = got

folder = f"{root}/encoder"
extractor, model = AutoFeatureExtractor.from_pretrained(folder, **trust), AutoModel.from_pretrained(folder, **trust)
got = {}
few = [name for name in names if name != "long"]
inputs = extractor([waves[name] for name in few], sampling_rate=16000, return_tensors="pt")
mask = inputs["attention_mask"]
inputs["input_values"][mask == 0] = float("nan")
with torch.no_grad():
    found = model(**inputs)
for i, name in enumerate(few):
    tokens = ref[f"encoder-tokens-{name}"]
    got[name] = max(
        off(found.pooler_output[i], ref[f"encoder-clip-{name}"]), off(found.last_hidden_state[i, : len(tokens)], tokens)
    )
    got["beyond"] = float(found.last_hidden_state[i, len(tokens):].abs().sum()) + got.get("beyond", 0.0)
loose = extractor([waves["view"], waves["short"]], padding=False)
got["loose"] = [len(one) for one in loose["input_values"]]
got["mask"] = mask.sum(1).tolist()
got["pass"] = off(model(**extractor(waves["view"], return_tensors="pt"), output_hidden_states=True).hidden_states[2],
                  ref["encoder-before-norm"])
fresh = AutoModelForAudioClassification.from_pretrained(folder, num_labels=3, **trust)
got["fresh"] = [float(fresh.head.linear.bias.abs().sum()), float(fresh.head.norm.weight.sum()),
                bool(fresh.head.linear.weight.std() > 0), torch.equal(fresh.encoder.pos_embed, model.pos_embed)]
blank = AutoModel.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
got["blank"] = [bool(torch.isfinite(p).all()) for p in blank.parameters()].count(False)
got["std"] = float(blank.pos_embed.std())
out["encoder"] = got
out["refused"] = {
    "rate": refused(lambda: extractor(waves["view"], sampling_rate=8000)),
    "stereo": refused(lambda: extractor([waves["view"].reshape(2, -1)])),
    "turned": refused(lambda: extractor(np.zeros((800, 2), np.float32))),
    "turned tensor": refused(lambda: extractor(torch.zeros(800, 2))),
    "turned lists": refused(lambda: extractor([[0.0, 0.1]] * 800)),
    "integers": refused(lambda: extractor(np.zeros(800, np.int16))),
    "empty": refused(lambda: extractor(np.zeros(0, np.float32))),
    "none": refused(lambda: extractor([])),
    "nan": refused(lambda: extractor(np.full(800, np.nan, np.float32))),
    "padding": refused(lambda: extractor(waves["view"], padding="wide")),
    "mels": refused(lambda: model(torch.zeros(1, 48, 30))),
    "frames": refused(lambda: model(torch.zeros(1, 45, 32))),
    "mask": refused(lambda: model(torch.zeros(1, 48, 32), torch.ones(1, 40))),
    "untrusted": refused(lambda: AutoModel.from_pretrained(folder, trust_remote_code=False)),
}

import huggingface_hub
from types import SimpleNamespace
pushed = []
create = lambda *given, repo_id=None, **_: SimpleNamespace(repo_id=repo_id or given[-1])
commit = lambda *_, **given: pushed.append(sorted(one.path_in_repo for one in given["operations"]))
for owner in (huggingface_hub.HfApi, transformers.utils.hub):  # newer and older transformers
    owner.create_repo, owner.create_commit = create, commit
AutoModelForAudioClassification.from_pretrained(f"{root}/single", **trust).push_to_hub("someone/barks")
out["pushed"] = pushed

out["asit"] = [name for name in sys.modules if name.split(".")[0] in ("asit", "torchaudio")]
sys.meta_path.remove(blocker)
from asit.interop.huggingface import register
register()
register()
classify = pipeline("audio-classification", f"{root}/single", top_k=None)
answer = {one["label"]: one["score"] for one in classify(waves["view"])}
out["registered"] = {
    "scores": max(abs(answer[c] - w) for c, w in zip(ref["classes"], ref["single-scores-view"])),
    "module": type(classify.model).__module__,
}
classify.save_pretrained(f"{root}/registered-saved")
out["registered"]["files"] = sorted(os.listdir(f"{root}/registered-saved"))
with open(f"{root}/out.json", "w") as file:
    json.dump(out, file, default=float)
"""


MODELS = {
    "single": model(FOUR, training={"step": 7}, patch_stride_frames=4, patch_stride_mels=6),
    "multi": model(
        FOUR,
        multi=True,
        norm=False,
        padding="zero",
        pooling="class",
        training={"step": 7},
        distilled=True,
        norm_eps=1e-3,
        drop_path=0.0,
    ),
    "encoder": model((), padding="repeat", training={"step": 7}, mlp_ratio=2.0),
}


def reference() -> dict[str, Any]:
    """What asit says of the sounds."""
    held: dict[str, Any] = {"classes": np.array(FOUR)}
    rng = np.random.default_rng(0)
    for name, length in LENGTHS.items():
        held[f"wave-{name}"] = (rng.normal(size=length) * np.linspace(0.01, 0.3, length)).astype(np.float32)
    for kind in ("single", "multi"):
        made = MODELS[kind]
        held[f"{kind}-cut"] = made.input(torch.from_numpy(held["wave-long"][:NEED])[None])[:, 0].numpy()
        for name, length in LENGTHS.items():
            wave = torch.from_numpy(held[f"wave-{name}"])
            held[f"{kind}-scores-{name}"] = made.tag(wave, precision="float32").clip.numpy()
            # Windows end to end, the last moved back; a rest below half a hop is no reason for another.
            starts = {"long": [0, NEED, length - NEED], "more": [0, length - NEED]}.get(name, [max(0, length - NEED)])
            windows = torch.stack([wave[start : start + NEED] for start in starts])
            np.testing.assert_allclose(
                held[f"{kind}-scores-{name}"], made.scores(windows, precision="float32").mean(0).numpy(), atol=1e-6
            )
            held[f"{kind}-x-{name}"] = made.input(windows).reshape(1, -1, 32).numpy()
    for name in LENGTHS:
        found = MODELS["encoder"].embed(held[f"wave-{name}"], precision="float32")
        assert found.patches is not None
        held[f"encoder-clip-{name}"] = found.clip.numpy()
        held[f"encoder-tokens-{name}"] = torch.cat([found.class_token[None], found.patches]).numpy()
    encoder = MODELS["encoder"].encoder
    kept: list[torch.Tensor] = []
    hook = encoder.norm.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        encoder(MODELS["encoder"].input(torch.from_numpy(held["wave-view"])[None]))
    hook.remove()
    held["encoder-before-norm"] = kept[0].numpy()
    return held


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program above measured, and the folder that it worked in."""
    pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("transformers")
    for kind, made in MODELS.items():
        write(made, root / kind)
    held = reference()
    np.savez(root / "ref.npz", **held)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        env={**clean, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((root / "out.json").read_text()), "root": root, "ref": held}


def test_the_folders_work_without_asit(found: dict[str, Any]) -> None:
    assert found["asit"] == []


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_a_classifier_answers_as_asit_does(found: dict[str, Any], kind: str) -> None:
    got = found[kind]
    assert {name: got[name] for name in ("features", "scores", "pipeline", "dict", "batch", "cut")} == pytest.approx(
        dict.fromkeys(("features", "scores", "pipeline", "dict", "batch", "cut"), 0.0), abs=1e-5
    )
    columns = 11 if kind == "single" else 6
    count = 1 + columns * 5 if kind == "single" else 2 + columns * 4
    assert got["shapes"] == [[2, 2, count, count], [2, count, 32]]
    assert got["layers"] == [2, 3]
    assert max(got["rows"], got["eager"], got["tuple"]) < 1e-5
    assert got["long"][0] == [1, 3 * FRAMES, 32]
    assert "144 frames, more than the 48 of training" in got["long"][1]


def test_losses_are_those_of_the_labels(found: dict[str, Any]) -> None:
    scores = {
        kind: [found["ref"][f"{kind}-scores-{name}"] for name in ("view", "short")] for kind in ("single", "multi")
    }
    single = -np.log([scores["single"][0][2], scores["single"][1][0]]).mean()
    targets, p = np.array([[1.0, 0, 1, 0], [0, 0, 0.5, 0]]), np.array(scores["multi"], np.float64)
    multi = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean()
    assert (found["single"]["loss"], found["multi"]["loss"]) == pytest.approx((single, multi), rel=1e-4)
    for kind in ("single", "multi"):
        assert found[kind]["gradients"]
        assert found[kind]["checkpointed"] < 1e-5


def test_an_encoder_gives_asits_tokens_whatever_its_neighbours(found: dict[str, Any]) -> None:
    got = found["encoder"]
    names = [name for name in LENGTHS if name != "long"]
    assert {name: got[name] for name in names} == pytest.approx(dict.fromkeys(names, 0.0), abs=1e-5)
    assert got["beyond"] == 0.0
    assert got["mask"] == [48, 16, 8, 8, 56, 48]
    assert got["loose"] == [48, 16]
    assert got["pass"] < 1e-5


def test_fresh_weights_are_drawn(found: dict[str, Any]) -> None:
    assert found["encoder"]["fresh"] == [0.0, 32.0, True, True]
    assert found["encoder"]["blank"] == 0
    assert found["encoder"]["std"] == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_what_transformers_saves_carries_its_code_and_comes_back_to_asit(found: dict[str, Any], kind: str) -> None:
    code = ["configuration_asit.py", "feature_extraction_asit.py", "modeling_asit.py"]
    wanted = sorted([*code, "config.json", "model.safetensors", "preprocessor_config.json"])
    assert found[kind]["files"] == wanted
    assert found["registered"]["files"] == wanted
    assert found[kind]["saved"]
    assert found[kind]["extractor"]
    # A model is pushed without its extractor, and with a card of transformers' own where the repository has none.
    pushed = [name for name in wanted if not name.startswith(("feature", "preprocessor"))]
    assert found["pushed"] == [sorted([*pushed, "README.md"])]
    before, back = MODELS[kind], read(found["root"] / f"{kind}-saved")
    assert before.head is not None
    assert back.head is not None
    assert torch.equal(back.head.linear.bias, before.head.linear.bias + 1.0)
    assert torch.equal(back.encoder.pos_embed, before.encoder.pos_embed)
    assert back.card == before.card


def test_registered_it_loads_without_code_from_the_folder(found: dict[str, Any]) -> None:
    assert found["registered"]["scores"] < 1e-5
    assert found["registered"]["module"] == "asit.interop.huggingface.modeling_asit"
    assert "trust_remote_code" in found["refused"]["untrusted"]


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("rate", "ValueError: the audio is at 8000 Hz and this model needs 16000 Hz"),
        ("stereo", "ValueError: clip 0 has shape (2, "),
        *[(f"turned{how}", "ValueError: the clips have their samples along") for how in ("", " tensor", " lists")],
        ("integers", "ValueError: the clip holds torch.int16"),
        ("empty", "ValueError: the clip is empty"),
        ("none", "ValueError: there is no clip in the list"),
        ("nan", "ValueError: the clip has 800 samples that are not finite"),
        ("padding", "ValueError: padding is 'wide'; it can be 'max_length', 'longest' (True) or False"),
        ("mels", "ValueError: input_values has shape (1, 48, 30); (clips, frames, 32 mel bins)"),
        ("frames", "ValueError: input_values has 45 frames; patches of 8 every 8 need 40 or 48"),
        ("mask", "ValueError: attention_mask has shape (1, 40); (1, 48)"),
    ],
)
def test_what_cannot_be_is_refused_in_words(found: dict[str, Any], what: str, text: str) -> None:
    assert found["refused"][what].startswith(text)
