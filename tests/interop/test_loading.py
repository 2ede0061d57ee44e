"""Sources of models: folders of several kinds, and a local server in place of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import family_oracles
import pytest
import safetensors.torch
import torch
from hub_server import COMMITS

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface import write
from asit.interop.loading import load
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

PROGRAM = r"""
import json, os, sys
from pathlib import Path

root = Path(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from hub_server import HubServer, environment

server = HubServer(root / "hub")
os.environ.update(environment(server.url, root / "home"))

import time
time.sleep = lambda seconds: None  # huggingface_hub waits longer and longer before it gives up
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 10  # what came before a break is kept by whole chunks
from asit.errors import AsitError
from asit.interop.loading import load

out = {}


def tell(name, source):
    before = len(server.asked)
    try:
        model = load(source)
        out[name] = {"sum": float(model.encoder.pos_embed.sum()), "classes": model.classes, "training": model.training}
    except AsitError as error:
        out[name] = {"error": f"{type(error).__name__}: {error}"}
    out[name]["asked"] = server.asked[before:]


os.chdir(root)
server.cut.add("/someone/ast/resolve/main/config.json")
server.cut.add("/someone/ast/resolve/" + "a" * 40 + "/model.safetensors")
server.wrong.add("damaged.bin")
for name, source in {
    "theirs": "barks", "own": "own", "commit": "barks@first", "revision": "barks@second", "unknown": "nothing",
    "gated": "gated", "vit": "vit", "bare": "bare", "empty": "empty", "broken": "broken", "name": "a--b",
    "ast": "ast", "ast again": "ast", "ast first": "ast@first", "several": "several", "one of several": "several:a.pth",
    "absent": "several:c.pth", "objects": "objects", "sharded": "sharded", "damaged": "damaged", "whole": "whole",
    "eat": "eat",
}.items():
    tell(name, f"someone/{source}")
out["ranges"] = {"asked": server.ranges}
server.stop()
for name, source in {"cached": "someone/barks", "own cached": "someone/own", "away": "someone/else"}.items():
    tell(name, source)
tell("ast cached", "someone/ast")
tell("several cached", "someone/several:a.pth")
huggingface_hub.constants.HF_HUB_OFFLINE = True
tell("offline", "someone/barks")
tell("offline away", "someone/else")
tell("offline ast", "someone/ast")
(root / "out.json").write_text(json.dumps(out))
"""


def model(seed: int = 0) -> AudioModel:
    settings = EncoderSettings(size="custom", width=16, depth=1, heads=2, patch_frames=8, patch_mels=8)
    encoder = Encoder(settings, 16, 16)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return AudioModel(encoder, FrontEnd(FrontEndSettings(mels=16, mean=-6.0, std=3.0)), {"step": seed})


def write_ast(folder: Path, seed: int) -> Any:
    """A folder of transformers' AST, with a README that states its licence; returns the network."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 80}
    patches = {"patch_size": 8, "time_stride": 5, "frequency_stride": 6, "max_length": 64, "num_mel_bins": 32}
    config = transformers.ASTConfig(**sizes, **patches, id2label={0: "Speech", 1: "Dog"})
    network = transformers.ASTForAudioClassification(config).eval()
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(100 * seed + i))
    network.save_pretrained(folder)
    transformers.ASTFeatureExtractor(mean=-6.0, std=3.0, num_mel_bins=32, max_length=64).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: bsd-3-clause\ntags:\n- audio\n---\n# a model\n")
    return network


def asit_file(path: Path, seed: int) -> None:
    """A file of PretrainedSED's names."""
    state = {f"model.asit.{name}": value for name, value in square_encoder(seed).state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def square_encoder(seed: int) -> Encoder:
    encoder = Encoder(EncoderSettings(size="custom", width=64, depth=1, heads=1), 32, 128)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return encoder.requires_grad_(False)


def total(seed: int) -> float:
    return float(model(seed).encoder.pos_embed.sum())


def test_every_kind_of_folder(tmp_path: Path) -> None:
    model(1).save(tmp_path / "own")
    model(2).save(tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text("x: 1")
    write(model(3), tmp_path / "hf")
    for seed, name in ((1, "own"), (2, "run"), (2, "run/model"), (3, "hf")):
        for source in (tmp_path / name, str(tmp_path / name), f"{tmp_path / name}{os.sep}"):
            loaded = load(source)
            assert loaded.training["step"] == seed
            assert float(loaded.encoder.pos_embed.sum()) == total(seed)
    assert load(tmp_path / "own", device="meta").encoder.pos_embed.device.type == "meta"


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model(4).save("someone/barks")
    assert load("someone/barks").training["step"] == 4


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("nowhere", "nowhere does not exist"),
        ("runs/second", r"runs/second does not exist(.|\n)*runs has first, third"),
        ("./someone/barks", r"\./someone/barks does not exist"),
        ("~/nothing-of-the-kind/here", "does not exist"),
        ("someone/barks/model", "someone/barks/model does not exist"),
        ("/no/such/place", "/no/such/place does not exist"),
        (Path("someone/barks"), "someone/barks does not exist"),
        ("", "holds no model|does not exist"),
        ("~no-user-of-this-name/model", "cannot be accessed: Could not determine home"),
        ("x" * 300, "cannot be accessed: .*name too long"),
        ("runs", "runs holds no model: first, third"),
        ("runs/first", "runs/first is a run that has saved no model yet"),
        ("runs/third", "runs/third holds no model: it is empty"),
        ("weights.pth", r"weights\.pth .*(.|\n)*options are given to: asit convert weights\.pth --out MODEL$"),
        ("loose", r"loose holds no model: weights\.pth(.|\n)*give the file of weights: loose/weights\.pth$"),
        ("ssast-base-patsch", r"does not exist, did you mean ssast-base-patch\?(.|\n)*asit models"),
        ("asit-official", r"ASiT, checkpoint of its authors\) cannot be fetched(.|\n)*download it, then give its path"),
        ("own/model.safetensors", r"model\.safetensors is a file(.|\n)*give its folder: own$"),
        ("clip.wav", r"clip\.wav is a file(.|\n)*give a model's folder, such as RUN/model$"),
        ("index", r"index is an index of recordings(.|\n)*asit similar index FILE$"),
        ("ast", r"ast has no model\.safetensors and no pytorch_model\.bin"),
    ],
)
def test_paths_that_lead_nowhere_do_not_ask_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | Path, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "runs" / "first" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("x: 1")
    (tmp_path / "runs" / "third").mkdir()
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "weights.pth").write_bytes(b"x")
    for name in ("weights.pth", "clip.wav"):
        (tmp_path / name).write_bytes(b"x")
    model(4).save(tmp_path / "own")
    (tmp_path / "index").mkdir()
    for name in ("card.json", "rows.npy", "vectors.npy"):
        (tmp_path / "index" / name).touch()
    (tmp_path / "ast").mkdir()
    (tmp_path / "ast" / "config.json").write_text('{"model_type": "audio-spectrogram-transformer"}')
    with pytest.raises(CheckpointError, match=text):
        load(source)


def test_the_hub_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"no folder someone/barks(.|\n)*pip install 'asit-audio\[huggingface\]'"):
        load("someone/barks")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was loaded from the server, or the error, and what the server was asked for."""
    pytest.importorskip("huggingface_hub")
    root = tmp_path_factory.mktemp("hub")
    owner = root / "hub" / "someone"
    write(model(5), owner / "barks")
    model(6).save(owner / "own")
    write(model(7), owner / "bare")
    (owner / "bare" / "model.safetensors").unlink()
    for name in ("empty", "gated", "vit", "objects", "sharded"):
        (owner / name).mkdir()
    (owner / "gated" / "config.json").write_text("{}")
    (owner / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (owner / "vit" / "model.safetensors").write_bytes(b"large")
    write_ast(owner / "ast", 1)
    asit_file(owner / "several" / "a.pth", 11)
    asit_file(owner / "several" / "b.pth", 12)
    (owner / "several" / "optimizer.pt").write_bytes(b"state")
    torch.save({"when": date(2024, 1, 1), "w": torch.zeros(2)}, owner / "objects" / "model.pth")
    (owner / "sharded" / "model-00001-of-00002.safetensors").write_bytes(b"part")
    asit_file(owner / "damaged" / "damaged.bin", 13)
    asit_file(owner / "whole" / "w.pth", 14)
    tensors = torch.load(owner / "whole" / "w.pth")
    safetensors.torch.save_file(tensors, owner / "whole" / "w.safetensors")
    (owner / "whole" / "w.pth").write_bytes(b"never read")
    (owner / "eat").mkdir()
    safetensors.torch.save_file(family_oracles.eat_weights(head=527, hub=True), owner / "eat" / "model.safetensors")
    config = {"model_type": "eat", "layer_norm_first": False, "num_heads": 2, "norm_eps": 1e-6}
    (owner / "eat" / "config.json").write_text(json.dumps({**config, "img_size": [1024, 128]}))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), str(Path(__file__).parents[1])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((root / "out.json").read_text())
    return found


def got(entry: dict[str, Any]) -> set[str]:
    """Names of the files that were fetched."""
    return {line.split("/")[-1] for line in entry["asked"] if line.startswith("GET") and "/resolve/" in line}


def test_a_repository_is_fetched_whole_and_no_more(hub: dict[str, dict[str, Any]]) -> None:
    assert hub["theirs"]["sum"] == pytest.approx(total(5))
    assert hub["own"]["sum"] == pytest.approx(total(6))
    assert hub["commit"]["sum"] == pytest.approx(total(5))
    assert got(hub["theirs"]) == {"config.json", "preprocessor_config.json", "model.safetensors"}
    own = [line for name in ("theirs", "own", "commit") for line in hub[name]["asked"]]
    assert not any(".py" in line or "README" in line for line in own)
    # The first file is of the branch, the others of the commit that this was.
    of_files = [line.split("/") for line in hub["commit"]["asked"] if "/resolve/" in line]
    assert {parts[4] for parts in of_files} == {"first", COMMITS["first"]}


def test_an_ast_of_the_hub_is_converted_once_with_its_licence_and_revision(hub: dict[str, dict[str, Any]]) -> None:
    ast = hub["ast"]
    assert ast["classes"] == ["Speech", "Dog"]
    source = ast["training"]["source"]
    assert (source["kind"], source["repository"], source["revision"]) == ("hf-ast", "someone/ast", COMMITS["main"])
    assert (source["file"], ast["training"]["license"]) == ("model.safetensors", "bsd-3-clause")
    assert got(ast) == {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}
    assert got(hub["ast again"]) == set()
    for name in ("ast again", "ast cached", "offline ast"):
        assert (hub[name]["sum"], hub[name]["training"]) == (ast["sum"], ast["training"])
    assert hub["ast first"]["training"]["source"]["revision"] == COMMITS["first"]
    assert hub["ast first"]["sum"] == ast["sum"]


def test_another_family_of_the_hub(hub: dict[str, dict[str, Any]]) -> None:
    source = hub["eat"]["training"]["source"]
    assert (source["kind"], source["repository"], len(hub["eat"]["classes"])) == ("eat", "someone/eat", 527)


def test_a_truncated_download_is_resumed(hub: dict[str, dict[str, Any]]) -> None:
    lines = [line for line in hub["ast"]["asked"] if line.startswith("GET") and "model.safetensors" in line]
    assert len(lines) == 2
    assert any(line.startswith("model.safetensors bytes=") for line in hub["ranges"]["asked"])  # the rest alone


def test_several_files_of_weights(hub: dict[str, dict[str, Any]]) -> None:
    error = hub["several"]["error"]
    assert "someone/several on the hub has 2 files of weights: a.pth, b.pth" in error
    assert "name it: someone/several:a.pth" in error
    want = float(square_encoder(11).pos_embed.sum())
    assert hub["one of several"]["sum"] == pytest.approx(want)
    assert hub["several cached"]["sum"] == hub["one of several"]["sum"]
    assert got(hub["one of several"]) == {"a.pth"}
    assert hub["whole"]["sum"] == pytest.approx(float(square_encoder(14).pos_embed.sum()))
    assert got(hub["whole"]) == {"w.safetensors"}


def test_what_was_fetched_is_used_without_a_network(hub: dict[str, dict[str, Any]]) -> None:
    assert hub["cached"]["sum"] == hub["offline"]["sum"] == hub["theirs"]["sum"]
    assert hub["own cached"]["sum"] == hub["own"]["sum"]
    assert hub["own cached"]["asked"] == []
    for name in ("away", "offline away"):
        assert "the hub cannot be reached, and its cache does not have" in hub[name]["error"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("revision", "CheckpointError: someone/barks has no revision second"),
        ("unknown", "CheckpointError: there is no folder someone/nothing, and the hub has no such repository"),
        ("gated", "CheckpointError: someone/gated is gated: its owner decides"),
        ("vit", "model_type 'vit'"),
        ("bare", "CheckpointError: someone/bare on the hub has no model.safetensors; it has "),
        ("empty", "CheckpointError: someone/empty on the hub has no file of weights; it has no files"),
        ("broken", "someone/broken, the hub cannot be reached, and its cache"),
        ("name", "CheckpointError: there is no folder someone/a--b, and it is no valid name on the hub"),
        ("absent", "someone/several on the hub has no file of weights c.pth; it has a.pth, b.pth"),
        ("objects", "datetime"),
        ("sharded", "no file of weights, in parts, which asit does not read; it has model-00001-of-00002.safetensors"),
        ("damaged", "as the hub says"),
    ],
)
def test_what_the_hub_cannot_give(hub: dict[str, dict[str, Any]], name: str, text: str) -> None:
    assert text in hub[name]["error"]
    assert "fix:" in hub[name]["error"] or "expected" in hub[name]["error"]


def test_another_models_weights_are_not_fetched(hub: dict[str, dict[str, Any]]) -> None:
    assert not any("/resolve/" in line and "safetensors" in line for line in hub["vit"]["asked"])


def test_a_file_and_a_folder_of_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asit_file(tmp_path / "ASIT_ssl.pt", 3)
    first = load(tmp_path / "ASIT_ssl.pt")
    assert first.training["source"]["file"] == "ASIT_ssl.pt"
    assert float(first.encoder.pos_embed.sum()) == float(square_encoder(3).pos_embed.sum())
    (folder,) = (tmp_path / "cache" / "asit" / "models").iterdir()
    made = (folder / "card.json").stat().st_mtime_ns
    load(tmp_path / "ASIT_ssl.pt")
    assert (folder / "card.json").stat().st_mtime_ns == made
    asit_file(tmp_path / "ASIT_ssl.pt", 4)  # another content under the same name
    assert float(load(tmp_path / "ASIT_ssl.pt").encoder.pos_embed.sum()) == float(square_encoder(4).pos_embed.sum())
    network = write_ast(tmp_path / "ast", 2)
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    loaded = load(str(tmp_path / "ast"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(x[:, None, : loaded.frames]), network(x).logits, atol=1e-5, rtol=1e-5)


def test_image_weights_need_a_length(tmp_path: Path) -> None:
    state = Encoder(EncoderSettings(size="tiny"), 224, 224).state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].repeat(1, 3, 1, 1)
    safetensors.torch.save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=r"no length in time is given(.|\n)*options are given to: asit convert"):
        load(tmp_path / "vit.safetensors")
