"""Where models are loaded from: folders of several kinds, and a hub that is played by a local server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.errors import CheckpointError, ConfigError
from asit.interop.huggingface import write
from asit.interop.loading import load
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder

PROGRAM = r"""
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

root = Path(sys.argv[1])
COMMIT = {"main": "a" * 40, "first": "b" * 40}
asked = []


class Hub(BaseHTTPRequestHandler):
    '''Answers as the hub does for files: resolve/REVISION/NAME, errors named in X-Error-Code.'''

    def answer(self):
        asked.append(f"{self.command} {self.path}")
        parts = self.path.strip("/").split("/")
        repository = "/".join(parts[:2])
        revision, name = parts[3:5] if len(parts) == 5 else ("main", "")
        if repository == "someone/broken":
            return self.send(500, {})
        if repository == "someone/gated":
            return self.send(403, {"X-Error-Code": "GatedRepo"}, "ask the owner")
        if not (root / "hub" / repository).is_dir():
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        commit = COMMIT.get(revision, revision if revision in COMMIT.values() else None)
        if commit is None:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        path = root / "hub" / repository / name
        if not path.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        self.send(200, {"X-Repo-Commit": commit, "ETag": f'"{path.stat().st_size:x}{name}"'}, path.read_bytes())

    do_HEAD = do_GET = answer

    def send(self, status, headers, body=b""):
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(root / "home"))
os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")

import time
time.sleep = lambda seconds: None  # huggingface_hub waits longer and longer before it gives up
import huggingface_hub
from asit.errors import AsitError
from asit.interop.loading import load

out = {}


def tell(name, source):
    before = len(asked)
    try:
        model = load(source)
        out[name] = {"sum": float(model.encoder.pos_embed.sum()), "classes": model.classes}
    except AsitError as error:
        out[name] = {"error": f"{type(error).__name__}: {error}"}
    out[name]["asked"] = asked[before:]


os.chdir(root)
for name, source in {
    "theirs": "barks", "own": "own", "commit": "barks@first", "revision": "barks@second", "unknown": "nothing",
    "gated": "gated", "vit": "vit", "bare": "bare", "empty": "empty", "broken": "broken", "name": "a--b",
}.items():
    tell(name, f"someone/{source}")
server.shutdown()
server.server_close()
for name, source in {"cached": "someone/barks", "own cached": "someone/own", "away": "someone/else"}.items():
    tell(name, source)
huggingface_hub.constants.HF_HUB_OFFLINE = True
tell("offline", "someone/barks")
tell("offline away", "someone/else")
(root / "out.json").write_text(json.dumps(out))
"""


def model(seed: int = 0) -> AudioModel:
    settings = EncoderSettings(size="custom", width=16, depth=1, heads=2, patch_frames=8, patch_mels=8)
    encoder = Encoder(settings, 16, 16)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return AudioModel(encoder, FrontEnd(FrontEndSettings(mels=16, mean=-6.0, std=3.0)), {"step": seed})


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
        ("weights.pth", r"weights\.pth is a file(.|\n)*asit convert weights\.pth"),
        ("own/model.safetensors", r"model\.safetensors is a file(.|\n)*give its folder: own$"),
        ("clip.wav", r"clip\.wav is a file(.|\n)*give a model's folder, such as RUN/model$"),
        ("index", r"index is an index of recordings(.|\n)*asit similar index FILE$"),
        ("ast", r"model_type 'audio-spectrogram-transformer'(.|\n)*asit convert ast"),
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
    write(model(5), root / "hub" / "someone" / "barks")
    model(6).save(root / "hub" / "someone" / "own")
    write(model(7), root / "hub" / "someone" / "bare")
    (root / "hub" / "someone" / "bare" / "model.safetensors").unlink()
    (root / "hub" / "someone" / "empty").mkdir()
    (root / "hub" / "someone" / "vit").mkdir()
    (root / "hub" / "someone" / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (root / "hub" / "someone" / "vit" / "model.safetensors").write_bytes(b"large")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        env={**clean, "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads((root / "out.json").read_text())
    return found


def test_a_repository_is_fetched_whole_and_no_more(hub: dict[str, dict[str, Any]]) -> None:
    assert hub["theirs"]["sum"] == pytest.approx(total(5))
    assert hub["own"]["sum"] == pytest.approx(total(6))
    assert hub["commit"]["sum"] == pytest.approx(total(5))
    got = {line.split("/")[-1] for line in hub["theirs"]["asked"] if line.startswith("GET")}
    assert got == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert not any(".py" in line or "README" in line for entry in hub.values() for line in entry["asked"])
    # The first file is of the branch, the others of the commit that this was.
    assert {line.split("/")[4] for line in hub["commit"]["asked"]} == {"first", "b" * 40}


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
        ("bare", "CheckpointError: someone/bare on the hub has no model.safetensors"),
        ("empty", "CheckpointError: someone/empty on the hub has no config.json or card.json"),
        ("broken", "someone/broken, the hub cannot be reached, and its cache"),
        ("name", "CheckpointError: there is no folder someone/a--b, and it is no valid name on the hub"),
    ],
)
def test_what_the_hub_cannot_give(hub: dict[str, dict[str, Any]], name: str, text: str) -> None:
    assert text in hub[name]["error"]
    assert "fix:" in hub[name]["error"] or "expected" in hub[name]["error"]


def test_another_models_weights_are_not_fetched(hub: dict[str, dict[str, Any]]) -> None:
    assert not any("safetensors" in line for line in hub["vit"]["asked"])
