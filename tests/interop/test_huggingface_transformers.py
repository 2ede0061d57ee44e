"""What transformers makes of our folders, in one process that has no network and, at first, no asit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.interop.huggingface import read, write
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling, Pooling
from asit.model.vit import Encoder

pytest.importorskip("transformers")

FRAMES, NEED = 48, 47 * 160 + 400  # frames of the view, and samples of them
LENGTHS = {"view": NEED, "short": 3000, "window": 400, "less": 90, "more": 9500, "long": 20000, "rest": NEED + 60}
CLASSES = ("dog", "rain", "door", "باب")

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
    model(**inputs, labels=labels).loss.backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
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


def made(pooling: Pooling | None, multi: bool, padding: str, **settings: Any) -> AudioModel:
    kind = EncoderSettings.model_validate(
        {"size": "custom", "width": 32, "depth": 2, "heads": 2, "patch_frames": 8, "patch_mels": 8, **settings}
    )
    encoder = Encoder(kind, FRAMES, 32)
    labels = Labelling(CLASSES, multi, pooling, 0.495, norm_eps=1e-5) if pooling else None
    head = Head(32, len(CLASSES), pooling, norm=not multi, norm_eps=1e-5) if pooling else None
    with torch.no_grad():
        for i, parameter in enumerate([*encoder.parameters(), *(head.parameters() if head else ())]):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(i))
    front = FrontEndSettings.model_validate({"mels": 32, "mean": -6.125, "std": 3.1, "padding": padding})
    return AudioModel(encoder, FrontEnd(front), {"step": 7}, head, labels)


MODELS = {
    "single": made("class+mean", False, "silence", patch_stride_frames=4, patch_stride_mels=6),
    "multi": made("class", True, "zero", distilled=True, norm_eps=1e-3, drop_path=0.0),
    "encoder": made(None, False, "repeat", mlp_ratio=2.0),
}


def reference() -> dict[str, Any]:
    """What asit says of the sounds."""
    held: dict[str, Any] = {"classes": np.array(CLASSES)}
    rng = np.random.default_rng(0)
    for name, length in LENGTHS.items():
        held[f"wave-{name}"] = (rng.normal(size=length) * np.linspace(0.01, 0.3, length)).astype(np.float32)
    for kind in ("single", "multi"):
        model = MODELS[kind]
        held[f"{kind}-cut"] = model.input(torch.from_numpy(held["wave-long"][:NEED])[None])[:, 0].numpy()
        for name, length in LENGTHS.items():
            wave = torch.from_numpy(held[f"wave-{name}"])
            held[f"{kind}-scores-{name}"] = model.tag(wave, precision="float32").clip.numpy()
            # Windows end to end, the last moved back; a rest below half a hop is no reason for another.
            starts = {"long": [0, NEED, length - NEED], "more": [0, length - NEED]}.get(name, [max(0, length - NEED)])
            windows = torch.stack([wave[start : start + NEED] for start in starts])
            np.testing.assert_allclose(
                held[f"{kind}-scores-{name}"], model.scores(windows, precision="float32").mean(0).numpy(), atol=1e-6
            )
            held[f"{kind}-x-{name}"] = model.input(windows).reshape(1, -1, 32).numpy()
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
    root = tmp_path_factory.mktemp("transformers")
    for kind, model in MODELS.items():
        write(model, root / kind)
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
    assert found["multi"]["checkpointed"] < 1e-5  # the other one has stochastic depth, drawn anew


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
